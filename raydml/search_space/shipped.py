"""The search spaces that come with raydml, in a checkout and in an installed package, and the one for a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import raydml

_PACKAGE = Path(raydml.__file__).parent


def spaces_folder() -> Path:
    """Return the folder of the search spaces: in the package where it was installed, beside it in a checkout."""
    installed = _PACKAGE / "search_spaces"
    return installed if installed.is_dir() else _PACKAGE.parent / "search_spaces"


def shipped_spaces() -> list[Path]:
    """Return the files of the search spaces, by name."""
    return sorted(spaces_folder().glob("*.yaml"))


def find_space(path: Path) -> Path | None:
    """Return a file that exists, or the shipped space of this name: image_folder, search_spaces/image_folder.yaml."""
    if path.is_file():
        return path
    if path.parent.name not in ("", "search_spaces") or path.suffix not in ("", ".yaml"):
        return None
    shipped = spaces_folder() / f"{path.stem}.yaml"
    return shipped if shipped.is_file() else None


def heading_of(space_text: str, heading: str) -> str | None:
    """Return what the comment at the head of a search space says after ``# heading:``, up to the next heading."""
    words: list[str] = []
    for line in space_text.splitlines():
        text = line.removeprefix("#").strip() if line.startswith("#") else ""
        if text.startswith(f"{heading}:"):
            words = [text.removeprefix(f"{heading}:").strip()]
        elif words and (not text or not line.startswith("#  ")):
            break
        elif words:
            words.append(text)
    return " ".join(words) or None


class SpaceDescription(NamedTuple):
    """What the head of a space says. data: the name of its data set. cost: its first sentence."""

    data: str
    question: str
    cost: str


def describe_space(path: Path) -> SpaceDescription:
    """Read the head of a search space that comes with raydml."""
    text = path.read_text(encoding="utf-8")
    data = re.search(r"^  data:.*?\bname: (\w+)", text, re.DOTALL | re.MULTILINE)
    cost = re.split(r"(?<=[a-z])[.;:] ", heading_of(text, "cost") or "", maxsplit=2)
    first = cost[1] if cost[0].startswith("an estimate") and len(cost) > 1 else cost[0]
    question = heading_of(text, "Question") or ""
    return SpaceDescription(data[1] if data else "", question[: question.find("?") + 1] or question, first)


def overrides_for_folder(images: Path) -> list[str]:
    """Return what makes the space `image_folder` one for these images: ``key=value``, as ``--set`` takes it.

    images: a folder, or a list of images (CSV with the columns path and label) beside them. The study has its name. A
    list in the folder decides on the classes.
    """
    from raydml.data.image_list import find_list
    from raydml.search_space.space import study_name_from

    root, found = (images, find_list(images)) if images.is_dir() else (images.parent, images.name)
    name = images.resolve().name if images.is_dir() else images.stem
    settings = {"machine.data_root": str(root), "study.name": study_name_from(name)}
    if found is not None:
        settings |= {"trial.data.name": "image_list", "trial.data.list_file": found}
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
