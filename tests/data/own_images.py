"""A user's own images as the tests write them: class folders, and CSV lists."""

import csv
from pathlib import Path

from PIL import Image

from raydml.data.catalog import Catalog
from raydml.data.datasets import open_catalog


def write_image(file: Path, shade: int = 100) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file)


def folder_of(root: Path, **images_per_class: int) -> Path:
    for name, count in images_per_class.items():
        for index in range(count):
            write_image(root / name / f"{index}.png", shade=index)
    return root


def write_list(root: Path, rows: list[list[str]], header: tuple[str, ...] = ("path", "label")) -> str:
    with open(root / "list.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return "list.csv"


def open_list(root: Path, rows: list[list[str]] | str, header: tuple[str, ...] = ("path", "label")) -> Catalog:
    """The catalog of a list, given by its rows or as the text of its file."""
    if isinstance(rows, str):
        (root / "list.csv").write_text(rows, encoding="utf-8")
        return open_catalog("image_list", root, "list.csv")
    return open_catalog("image_list", root, write_list(root, rows, header))
