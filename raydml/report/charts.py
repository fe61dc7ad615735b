"""Charts as plain values: where curves, whiskers and axes are, as shares of a drawing; charts.html draws them as SVG.

Letters and dots keep their size while the drawing takes the available width, because their positions are in percent.
Only curves are in a nested drawing that is stretched. Colours are classes and variables of the style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

NUM_SERIES = 8  # series-0 ... series-7 of the style sheet
NUM_GRADES = 5  # grade-0 (worst fifth) ... grade-4 (best) of the style sheet
_RUNG_LABEL_SHARE = 0.17  # room for the label of a rung in the narrowest plot, 300 pixels
_MARGIN = 0.06  # room on both sides of a scale, as a share of the values' range
_LOG_FROM = 10  # largest over smallest value from which on an axis is logarithmic
_LEVEL_PX, _TICK_SHARE = 18, 0.1  # height of a level; share of an axis below which two tick labels would overlap
_LETTER_SHARE = 0.08  # below it the letters of two points would overlap
_LETTER_PX, _GAP_PX = 7.4, 18  # width of a letter of a label, and the gap between the labels of two axes

Ticks = list[tuple[float, str]]  # (share of the axis, label)


class Scale(NamedTuple):
    """Converts values between `low` and `high` to shares of an axis."""

    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return 0.5 if high == low else (at - low) / (high - low)


def scale_of(values: Sequence[float]) -> Scale:
    """Return a linear scale a little wider than the finite values; it goes below 0 only where a value does."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Scale(0.0, 1.0)
    low, high = min(finite), max(finite)
    room = (high - low) * _MARGIN or abs(high) * 0.05 or 0.5
    return Scale(max(low - room, 0.0) if low >= 0 else low - room, high + room)


def tick_values(scale: Scale, *, at_most: int = 5, integers: bool = False) -> list[float]:
    """Return round values inside a linear scale: steps of 1, 2 or 5 times a power of ten."""
    width = scale.high - scale.low
    if width <= 0:
        return [scale.low]
    step = 10.0 ** math.floor(math.log10(width / at_most))
    step *= next((factor for factor in (1, 2, 5) if width / (step * factor) <= at_most), 10)
    step = max(step, 1.0) if integers else step
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def number_text(value: float, *, digits: int = 4) -> str:
    """Return the significant digits: 0.25, 1200, 3.2e-5."""
    mantissa, exponential, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponential else mantissa


def _ticks(scale: Scale, *, integers: bool = False) -> Ticks:
    return [(scale.share(value), number_text(value)) for value in tick_values(scale, integers=integers)]


def _path(pieces: Sequence[Sequence[tuple[float, float]]]) -> str:
    """Return the data of an SVG path in a drawing of 1000 x 1000, from pieces of (share across, share up)."""
    return "".join("M" + "L".join(f"{1000 * x:.1f} {1000 * (1 - y):.1f}" for x, y in piece) for piece in pieces)


class Curve(NamedTuple):
    """Values over epochs or trials.

    points: (x, y); values that are not finite leave a gap. style: classes, such as "series-0" or "series-0 quiet".
    mark: what is drawn at the end: "end" a dot, "cut" an upright bar, "failed" a cross, None nothing.
    """

    points: Sequence[tuple[float, float]]
    style: str
    title: str
    mark: str | None = "end"


class CurveShape(NamedTuple):
    """A curve as it is drawn. path: of `_path`. x, y: its end, as shares across and up."""

    path: str
    x: float
    y: float
    curve: Curve


class LineChart(NamedTuple):
    """Curves with their axes. rungs: (share across, label or "")."""

    shapes: list[CurveShape]
    rungs: Ticks
    x_ticks: Ticks
    y_ticks: Ticks
    x_label: str
    y_label: str
    height_px: int
    description: str


def line_chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    rungs: Sequence[float] = (),
    up: Scale | None = None,
    height_px: int = 300,
    description: str = "",
) -> LineChart:
    """Place curves between their axes.

    rungs: epochs, drawn as upright dashed lines. up: the scale of the values; None fits it to them.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    across = Scale(min(xs, default=0.0), max(xs, default=1.0))
    if across.low == across.high:
        across = Scale(across.low - 1, across.high + 1)
    up = up or scale_of([y for curve in curves for _, y in curve.points])
    labelled, placed = -1.0, []
    for share, rung in ((across.share(rung), rung) for rung in rungs):
        # Early rungs are close together: one without room for its label on a narrow screen has none.
        has_room = share - labelled >= _RUNG_LABEL_SHARE
        labelled = share if has_room else labelled
        placed.append((share, f"rung {rung:g}" if has_room else ""))
    return LineChart(
        [shape for curve in curves if (shape := _shape(curve, across, up))],
        placed,
        _ticks(across, integers=True),
        _ticks(up),
        x_label,
        y_label,
        height_px,
        description or y_label,
    )


def _shape(curve: Curve, across: Scale, up: Scale) -> CurveShape | None:
    """Return the shape of a curve, None for one without a finite value."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in curve.points:
        if math.isfinite(y):
            pieces[-1].append((across.share(x), up.share(y)))
        elif pieces[-1]:
            pieces.append([])
    pieces = [piece for piece in pieces if piece]
    return CurveShape(_path(pieces), *pieces[-1][-1], curve) if pieces else None


class Whisker(NamedTuple):
    """A mean with its interval and the single values behind it, each with its name."""

    letter: str
    label: str
    mean: float
    half_width: float | None
    values: Sequence[tuple[str, float]]
    text: str


class WhiskerChart(NamedTuple):
    """Means below each other on one scale. reference: (value, name) of a dashed line to compare them with."""

    rows: Sequence[Whisker]
    scale: Scale
    ticks: Ticks
    x_label: str
    reference: tuple[float, str] | None


def whisker_chart(
    rows: Sequence[Whisker], *, x_label: str, reference: tuple[float, str] | None = None
) -> WhiskerChart | None:
    """Place means on a scale that shows all of their intervals and values; None without a mean."""
    if not rows:
        return None
    ends = [reference[0]] if reference else []
    for row in rows:
        ends += [value for _, value in row.values]
        ends += [row.mean - (row.half_width or 0.0), row.mean + (row.half_width or 0.0)]
    scale = scale_of(ends)
    label = f"{x_label}; dashed: {reference[1]}, {number_text(round(reference[0], 4))}" if reference else x_label
    return WhiskerChart(rows, scale, _ticks(scale), label, reference)


class ScatterPoint(NamedTuple):
    """A model by its cost (x) and its quality (y). title: its words when it is pointed at."""

    x: float
    y: float
    letter: str
    title: str
    is_on_front: bool


class PlacedPoint(NamedTuple):
    """A point as it is drawn. x, y: shares across and up. is_left: its letter is on its left, not on its right."""

    x: float
    y: float
    point: ScatterPoint
    is_left: bool


class ScatterChart(NamedTuple):
    """Points with their axes. is_log: of the costs. path: the front, of `_path`."""

    points: list[PlacedPoint]
    is_log: bool
    path: str
    x_ticks: Ticks
    y_ticks: Ticks
    x_label: str
    y_label: str
    height_px: int


def scatter_chart(points: Sequence[ScatterPoint], *, x_label: str, y_label: str, height_px: int = 260) -> ScatterChart:
    """Place points between their axes; what costs ten times as much as another one makes the axis logarithmic.

    The front is a staircase: a quality is had from the cost of a point on. Costs are positive.
    """
    xs = [point.x for point in points]
    across = Scale(min(xs), max(xs), is_log=max(xs) / min(xs) >= _LOG_FROM)
    # Room on both sides, so that no letter is cut off.
    if across.is_log:
        room = (across.high / across.low) ** _MARGIN
        across = Scale(across.low / room, across.high * room, True)
    else:
        across = scale_of(xs)
    up = scale_of([point.y for point in points])
    placed: list[PlacedPoint] = []
    for point in sorted(points, key=lambda point: (-point.y, point.x)):
        x, y = across.share(point.x), up.share(point.y)
        near = [one for one in placed if abs(one.x - x) < _LETTER_SHARE and abs(one.y - y) < _LETTER_SHARE]
        placed.append(PlacedPoint(x, y, point, bool(near) and not near[-1].is_left))
    front = sorted({(one.x, one.y) for one in placed if one.point.is_on_front})
    steps = [*front[:1], *(step for (_, before), now in pairwise(front) for step in ((now[0], before), now))]
    path = _path([[*steps, (1.0, steps[-1][1])]]) if steps else ""
    marks = _log_ticks(across) if across.is_log else tick_values(across)
    x_ticks = [(across.share(mark), _amount_text(mark)) for mark in marks]
    return ScatterChart(placed, across.is_log, path, x_ticks, _ticks(up), x_label, y_label, height_px)


def _log_ticks(scale: Scale) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten inside a logarithmic scale; the powers alone where these are many."""
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    factors = (1, 2, 5) if scale.high / scale.low <= 100 else (1,)
    marks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [mark for mark in marks if scale.low <= mark <= scale.high]


def _amount_text(value: float) -> str:
    """Return "2 G", "500 k" or "0.5"."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{number_text(value / unit)} {name}"
    return number_text(value)


class Axis(NamedTuple):
    """One parameter. shares: where each trial is, None for a trial without this parameter."""

    label: str
    shares: list[float | None]
    ticks: Ticks


class ParallelChart(NamedTuple):
    """Trials as lines over upright axes. axes: (share across, axis). lines: (path, grade, title), the best last."""

    axes: list[tuple[float, Axis]]
    lines: list[tuple[str, int, str]]
    width_px: float
    height_px: int


def axis_of(label: str, values: Sequence[Any]) -> Axis:
    """Place numbers on a linear or logarithmic axis, anything else evenly spaced; None is a missing parameter."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        low, high = min(present), max(present)
        scale = Scale(low, high, is_log=low > 0 and high / low >= _LOG_FROM)
        middle = math.sqrt(low * high) if scale.is_log else (low + high) / 2
        marks = [low, middle, high] if len(set(present)) > 4 else sorted(set(present))
        ticks = [(scale.share(mark), number_text(mark, digits=3)) for mark in marks]
        kept = ticks[:1] if high == low else [ticks[0], ticks[-1]]
        for tick in ticks[1:-1]:
            if all(abs(tick[0] - share) >= _TICK_SHARE for share, _ in kept):
                kept.append(tick)
        return Axis(label, [None if value is None else scale.share(value) for value in values], sorted(kept))
    levels = sorted({str(value) for value in present})
    share = {level: (place + 0.5) / len(levels) for place, level in enumerate(levels)}
    shares = [None if value is None else share[str(value)] for value in values]
    return Axis(label, shares, [(share[level], level) for level in levels])


def grades(values: Sequence[float]) -> list[int]:
    """Return the fifth of each value by rank: 0 for the worst, 4 for the best."""
    order = sorted(range(len(values)), key=lambda number: values[number])
    found = [0] * len(values)
    for rank, number in enumerate(order):
        found[number] = rank * NUM_GRADES // len(values)
    return found


def labels_of(names: Sequence[str]) -> Mapping[str, str]:
    """Shorten parameter names to their last part (``schedule.name`` to ``schedule``) where that is unique."""
    last = [name.removesuffix(".name").rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}


def parallel_chart(
    axes: Sequence[Axis], values: Sequence[float], titles: Sequence[str], *, height_px: int = 260
) -> ParallelChart:
    """Place one upright axis for each parameter and one line for each trial, graded by its value.

    The line of a trial without a parameter skips that axis.
    """
    places, width_px = _places(axes)
    found = grades(values)
    lines = []
    for trial in sorted(range(len(values)), key=lambda number: values[number]):
        shares = [(place, axis.shares[trial]) for place, axis in zip(places, axes, strict=True)]
        points = [(place, share) for place, share in shares if share is not None]
        lines.append((_path([points] if points else []), found[trial], titles[trial]))
    height_px = max(height_px, _LEVEL_PX * max(len(axis.ticks) for axis in axes))
    return ParallelChart(list(zip(places, axes, strict=True)), lines, width_px, height_px)


def _places(axes: Sequence[Axis]) -> tuple[list[float], float]:
    """Return the places of the axes, as shares of the width, and the smallest width in which no labels overlap."""
    ends: list[float] = []
    reached = 0.0
    for axis in axes:
        label_px = _LETTER_PX * len(axis.label) / 2
        ends.append(reached + label_px)
        reached = ends[-1] + max(label_px, _LETTER_PX * max(len(text) for _, text in axis.ticks) + 6) + _GAP_PX
    return [end / reached for end in ends], reached
