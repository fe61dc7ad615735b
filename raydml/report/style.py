"""How the pictures of a study look: the palette, the width, counted words, and files that appear whole."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from raydml.ops.files import write_whole

DPI = 140
# Half of it, 350 pixels, is what a report has room for: text of 7.5 points is then still read.
WIDTH_IN = 5.0
INK, GREY, PALE, BLUE = "#333333", "#8a8a8a", "#d5d5d5", "#7fa6c9"
GREEN, RED, ORANGE, PURPLE = "#1a9641", "#d7191c", "#d95f0e", "#762a83"


class Picture(NamedTuple):
    """A file and what it says, in words."""

    path: Path
    title: str
    caption: str


def save_picture(figure: Figure, path: Path) -> Path:
    """Write the PNG aside, then rename it; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, lambda aside: figure.savefig(aside, format="png", facecolor="white", dpi=DPI))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 image``, ``2 images``, ``3 classes``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"


def shortened(name: str, width: int) -> str:
    """At most two lines of `width` letters; the middle of a longer name is left out, its two ends tell it apart."""
    if len(name) > 2 * width:
        name = f"{name[: width - 1]}…{name[-width:]}"
    if len(name) <= width:
        return name
    breaks = [place + 1 for place, letter in enumerate(name) if letter in " /-_" and place < width]
    suitable = [place for place in breaks if len(name) - place <= width]
    place = suitable[-1] if suitable else width
    return f"{name[:place].strip()}\n{name[place:].strip()}"


def one_line(name: str, width: int) -> str:
    """At most `width` letters, the middle of a longer name left out."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"
