"""Parallel coordinates of the trials of a search: which values of the parameters the good trials have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raydml.report.charts import Scale, number_text, percent, polyline
from raydml.report.markup import Markup, element

NUM_GRADES = 5  # grade-0 (worst fifth) ... grade-4 (best) of the style sheet
_LOG_FROM = 10  # a parameter whose largest value is so many times its smallest was sampled over orders of magnitude
_LEVEL_PX, _TICK_SHARE = 18, 0.1  # of an axis: a number nearer to another one would stand in it
_LETTER_PX, _GAP_PX = 7.4, 18  # of the labels, so that those of two axes never meet


class Axis(NamedTuple):
    """shares: where each trial stands, None for one without this parameter. ticks: (share, text)."""

    label: str
    shares: list[float | None]
    ticks: list[tuple[float, str]]


def axis_of(label: str, values: Sequence[Any]) -> Axis:
    """Numbers on a linear or logarithmic axis, anything else evenly spaced; None is a trial without the parameter."""
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
    """The fifth that each value is in, by rank: 0 for the worst, 4 for the best."""
    order = sorted(range(len(values)), key=lambda number: values[number])
    found = [0] * len(values)
    for rank, number in enumerate(order):
        found[number] = rank * NUM_GRADES // len(values)
    return found


def labels_of(names: Sequence[str]) -> Mapping[str, str]:
    """The last part of a parameter's name (``schedule`` of ``schedule.name``), all where two would be the same."""
    last = [name.removesuffix(".name").rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}


def parallel_coordinates(
    axes: Sequence[Axis], values: Sequence[float], titles: Sequence[str], *, height_px: int = 260
) -> Markup:
    """One upright axis a parameter, one line a trial, coloured by its value's fifth, the best on top.

    A trial without a parameter passes that axis by. The drawing scrolls where the axes have no room.
    """
    places, width_px = _places(axes)
    height_px = max(height_px, _LEVEL_PX * max(len(axis.ticks) for axis in axes))
    found = grades(values)
    parts: list[Markup] = []
    for trial in sorted(range(len(values)), key=lambda number: values[number]):
        known = [(place, axis.shares[trial]) for place, axis in zip(places, axes, strict=True)]
        points = [(place, share) for place, share in known if share is not None]
        parts.append(polyline([points], f"grade-{found[trial]}", titles[trial]))
    for place, axis in zip(places, axes, strict=True):
        at = percent(place)
        parts.append(element("line", x1=at, x2=at, y1="0", y2="100%", class_="axis"))
        parts.append(element("text", axis.label, x=at, y="-14", class_="tick middle strong-text"))
        for share, text in axis.ticks:
            parts.append(element("text", text, x=at, y=percent(1 - share), dx="6", dy="4", class_="tick halo"))
    drawing = element(
        "svg", *parts, width="100%", height=height_px, role="img", aria_label="parallel coordinates of the trials"
    )
    inner = element("div", drawing, class_="parallel", style=f"min-width:{width_px:.0f}px")
    return element("div", inner, class_="scrolls", tabindex=0, role="region", aria_label="parallel coordinates")


def _places(axes: Sequence[Axis]) -> tuple[list[float], float]:
    """Where the axes stand, as shares of the width, and the smallest width in which no two labels meet."""
    ends: list[float] = []
    reached = 0.0
    for axis in axes:
        label_px = _LETTER_PX * len(axis.label) / 2
        ends.append(reached + label_px)
        reached = ends[-1] + max(label_px, _LETTER_PX * max(len(text) for _, text in axis.ticks) + 6) + _GAP_PX
    return [end / reached for end in ends], reached
