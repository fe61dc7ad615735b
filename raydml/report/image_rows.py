"""Pictures made of rows of images with frames, names and captions, and the look that all pictures share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from raydml.images.pixels import Pixels
from raydml.images.preprocessing import centre_crop
from raydml.ops.files import write_whole

DPI = 140
# A report shows it at half its size, 350 pixels; text of 7.5 points is then still legible.
WIDTH_IN = 5.0
INK, GREY, PALE, BLUE = "#333333", "#8a8a8a", "#d5d5d5", "#7fa6c9"
GREEN, RED, ORANGE = "#1a9641", "#d7191c", "#d95f0e"
_TITLE_PT, _HEADING_PT, _NAME_PT = 9.5, 8.0, 7.5
_MARGIN_IN, _GAP_IN, _ROW_GAP_IN, _FRAME_IN = 0.08, 0.1, 0.14, 0.035
_LETTER = 0.57  # mean width of a letter, in units of its size


def save_picture(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, lambda aside: figure.savefig(aside, format="png", facecolor="white", dpi=DPI))


def two_lines(name: str, width: int) -> str:
    """Return a name in at most two lines of `width` letters; a longer one is cut in the middle, because ends differ."""
    if len(name) > 2 * width:
        name = f"{name[: width - 1]}…{name[-width:]}"
    if len(name) <= width:
        return name
    breaks = [place + 1 for place, letter in enumerate(name) if letter in " /-_" and place < width]
    suitable = [place for place in breaks if len(name) - place <= width]
    place = suitable[-1] if suitable else width
    return f"{name[:place].strip()}\n{name[place:].strip()}"


def one_line(name: str, width: int) -> str:
    """Return at most `width` letters of a name; a longer one is cut in the middle."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def different_classes_first(order: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort row numbers of the labels: the first of every class, then the second of each, each in the given order."""
    turns = pd.Series(labels[order]).groupby(labels[order]).cumcount().to_numpy()
    return order[np.argsort(turns, kind="stable")]


class LabelledImages(NamedTuple):
    """Images with their classes. pixels: N images, shown as centre squares. labels: (N,) ids into class_names."""

    pixels: Pixels
    labels: NDArray[np.int64]
    class_names: Sequence[str]


class ImageCell(NamedTuple):
    """One image of a row. name: above it. caption: below it. colour: of its frame and of the caption."""

    image: int
    name: str = ""
    caption: str = ""
    colour: str = INK


class ImageRow(NamedTuple):
    """Images side by side under a heading ("" for none); None leaves a gap.

    begins_group: whether a line separates the row from the one above it.
    """

    heading: str
    cells: Sequence[ImageCell | None]
    begins_group: bool = False


def draw_image_rows(rows: Sequence[ImageRow], pixels: Pixels, path: Path, *, title: str = "") -> Path:
    """Draw the rows below each other as a PNG of a fixed width.

    pixels: N images, of which only the shown ones are read. path: of the picture; its folder is made.

    Raises ValueError for rows without an image.
    """
    if not any(cell is not None for row in rows for cell in row.cells):
        raise ValueError(f"{path}: {len(rows)} rows without an image")
    squares = _squares(rows, pixels)
    num_columns = max(len(row.cells) for row in rows)
    size_in = (WIDTH_IN - 2 * _MARGIN_IN - (num_columns - 1) * _GAP_IN) / num_columns
    title_lines = _wrapped(title, _TITLE_PT)
    heights_in = [_height_in(row, size_in) for row in rows]
    height_in = _lines_in(title_lines, _TITLE_PT) + sum(heights_in) + 2 * _MARGIN_IN
    figure = Figure(figsize=(WIDTH_IN, height_in))
    top_in = height_in - _MARGIN_IN
    _write(figure, title_lines, _MARGIN_IN, top_in, _TITLE_PT)
    top_in -= _lines_in(title_lines, _TITLE_PT)
    for number, (row, row_height_in) in enumerate(zip(rows, heights_in, strict=True)):
        if row.begins_group and number:
            place = (top_in + _ROW_GAP_IN / 2) / height_in
            figure.add_artist(Line2D([0.02, 0.98], [place, place], color=PALE, linewidth=1))
        _draw_row(figure, row, squares, top_in, size_in)
        top_in -= row_height_in
    return save_picture(figure, path)


def _squares(rows: Sequence[ImageRow], pixels: Pixels) -> dict[int, NDArray[np.uint8]]:
    shown = sorted({int(cell.image) for row in rows for cell in row.cells if cell is not None})
    return {
        image: centre_crop(found, min(found.shape[:2])) for image, found in zip(shown, pixels.read(shown), strict=True)
    }


def _draw_row(
    figure: Figure, row: ImageRow, squares: dict[int, NDArray[np.uint8]], top_in: float, size_in: float
) -> None:
    width_in, height_in = figure.get_size_inches()
    heading = _wrapped(row.heading, _HEADING_PT)
    _write(figure, heading, _MARGIN_IN, top_in, _HEADING_PT)
    top_in -= _lines_in(heading, _HEADING_PT) + _names_in(row, size_in)
    for column, cell in enumerate(row.cells):
        if cell is None:
            continue
        left_in = _MARGIN_IN + column * (size_in + _GAP_IN)
        bounds = (left_in / width_in, (top_in - size_in) / height_in, size_in / width_in, size_in / height_in)
        _draw_cell(figure.add_axes(bounds), cell, squares[int(cell.image)], _letters(size_in, _NAME_PT))


def _draw_cell(axes: Axes, cell: ImageCell, image: NDArray[np.uint8], width: int) -> None:
    # Small images keep their pixels, large ones are smoothed.
    axes.imshow(image, interpolation="nearest" if len(image) < 100 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(cell.colour)
        spine.set_linewidth(72 * _FRAME_IN)
    # A dollar sign in a class name does not begin a formula.
    axes.set_title(two_lines(cell.name, width), fontsize=_NAME_PT, color=INK, pad=4, linespacing=1.05, parse_math=False)
    axes.set_xlabel(cell.caption, fontsize=_NAME_PT, color=cell.colour, labelpad=3, parse_math=False)


def _write(figure: Figure, lines: Sequence[str], left_in: float, top_in: float, points: float) -> None:
    width_in, height_in = figure.get_size_inches()
    place = (left_in / width_in, top_in / height_in)
    if lines:
        figure.text(
            *place, "\n".join(lines), fontsize=points, color=INK, va="top", ha="left", linespacing=1.2, parse_math=False
        )


def _height_in(row: ImageRow, size_in: float) -> float:
    captioned = any(cell is not None and cell.caption for cell in row.cells)
    below_in = (1.3 * _NAME_PT + 4) / 72 if captioned else 0.0
    heading_in = _lines_in(_wrapped(row.heading, _HEADING_PT), _HEADING_PT)
    return heading_in + _names_in(row, size_in) + size_in + below_in + _ROW_GAP_IN


def _names_in(row: ImageRow, size_in: float) -> float:
    """Return the height of the names above the images, of one line or two."""
    width = _letters(size_in, _NAME_PT)
    names = [two_lines(cell.name, width) for cell in row.cells if cell is not None and cell.name]
    num_lines = max((name.count("\n") + 1 for name in names), default=0)
    return (num_lines * 1.2 * _NAME_PT + 3) / 72 if num_lines else 0.04


def _letters(width_in: float, points: float) -> int:
    return max(4, int(72 * width_in / (_LETTER * points)))


def _wrapped(text: str, points: float) -> list[str]:
    return textwrap.wrap(text, _letters(WIDTH_IN - 2 * _MARGIN_IN, points)) if text else []


def _lines_in(lines: Sequence[str], points: float) -> float:
    return (len(lines) * 1.25 * points + 4) / 72 if lines else 0.0
