"""Pictures of rows of images, read back from their figures: which image is where, in which frame."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

GREEN, RED = "#1a9641", "#d7191c"


class Shown(NamedTuple):
    """number: of the image, as `squares` painted it. left: where its place begins, a share of the figure's width."""

    number: int
    frame: str
    name: str
    caption: str
    left: float


def squares(num_images: int, size: int = 16) -> np.ndarray:
    """Images (N, size, size, 3) whose colour encodes their number."""
    pixels = np.zeros((num_images, size, size, 3), dtype=np.uint8)
    pixels[..., 1] = (np.arange(num_images) // 200)[:, None, None]
    pixels[..., 2] = (np.arange(num_images) % 200)[:, None, None]
    return pixels


def rows_of(figure: Figure) -> list[list[Shown]]:
    """The images from top to bottom and from left to right."""
    rows: dict[float, list[Shown]] = {}
    for axes in figure.axes:
        colour = axes.images[0].get_array()[0, 0].astype(int)
        frame, left = to_hex(axes.spines["left"].get_edgecolor()), round(axes.get_position().x0, 6)
        shown = Shown(200 * colour[1] + colour[2], frame, axes.get_title().replace("\n", " "), axes.get_xlabel(), left)
        rows.setdefault(round(axes.get_position().y0, 6), []).append(shown)
    return [sorted(rows[height], key=lambda cell: cell.left) for height in sorted(rows, reverse=True)]


def words_of(figure: Figure) -> str:
    """Title and headings as one line."""
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
