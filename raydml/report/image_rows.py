"""Rows of images with frames, names and captions: what retrievals, confusions and clusters are drawn with."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from raydml.images.pixels import Pixels
from raydml.images.preprocessing import centre_crop
from raydml.report.style import INK, PALE, WIDTH_IN, save_picture, shortened

_TITLE_PT, _HEADING_PT, _NAME_PT = 9.5, 8.0, 7.5
_MARGIN_IN, _GAP_IN, _ROW_GAP_IN, _FRAME_IN = 0.08, 0.1, 0.14, 0.035
_LETTER = 0.57  # mean width of a letter, in units of its size


class LabelledImages(NamedTuple):
    """pixels: N images. labels: (N,) ids into class_names. The centre squares are what pictures show of them."""

    pixels: Pixels
    labels: NDArray[np.int64]
    class_names: Sequence[str]


class Cell(NamedTuple):
    """One image of a row: its number, the text above and below it, the colour of its frame and of the text below."""

    image: int
    name: str = ""
    caption: str = ""
    colour: str = INK


class ImageRow(NamedTuple):
    """Images side by side under a heading ("" for none); a None keeps its place empty.

    begins_group: whether a line sets the row apart from one above it.
    """

    heading: str
    cells: Sequence[Cell | None]
    begins_group: bool = False


def draw_image_rows(rows: Sequence[ImageRow], pixels: Pixels, path: Path, *, title: str = "") -> Path:
    """Draw the rows one below the other as a PNG of a fixed width; the images' centre squares are shown.

    Only the images that are shown are read. pixels: N images. path: where the picture goes; its folder is made.
    Raises ValueError where there is nothing to draw.
    """
    if not any(cell is not None for row in rows for cell in row.cells):
        raise ValueError(f"{path}: {len(rows)} rows without an image: there is nothing to draw")
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


def _draw_cell(axes: Axes, cell: Cell, image: NDArray[np.uint8], width: int) -> None:
    # Small images keep their pixels, large ones are smoothed.
    axes.imshow(image, interpolation="nearest" if len(image) < 100 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(cell.colour)
        spine.set_linewidth(72 * _FRAME_IN)
    # A class name may hold a dollar sign, which is no formula.
    axes.set_title(shortened(cell.name, width), fontsize=_NAME_PT, color=INK, pad=4, linespacing=1.05, parse_math=False)
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
    """Room for the names above the images, which are of one line or two."""
    width = _letters(size_in, _NAME_PT)
    names = [shortened(cell.name, width) for cell in row.cells if cell is not None and cell.name]
    num_lines = max((name.count("\n") + 1 for name in names), default=0)
    return (num_lines * 1.2 * _NAME_PT + 3) / 72 if num_lines else 0.04


def _letters(width_in: float, points: float) -> int:
    return max(4, int(72 * width_in / (_LETTER * points)))


def _wrapped(text: str, points: float) -> list[str]:
    return textwrap.wrap(text, _letters(WIDTH_IN - 2 * _MARGIN_IN, points)) if text else []


def _lines_in(lines: Sequence[str], points: float) -> float:
    return (len(lines) * 1.25 * points + 4) / 72 if lines else 0.0
