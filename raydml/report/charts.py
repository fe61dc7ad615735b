"""Charts as inline SVG: no scripts, no fonts, text that keeps its size while the drawing takes the width there is.

Positions across are in percent of the plot, so letters and dots are never scaled; only polylines live in a nested
drawing that is stretched. Colours are classes and variables of the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from raydml.report.markup import Markup, element, joined

NUM_COLOURS = 8  # series-0 ... series-7 of the style sheet
_RUNG_LABEL_SHARE = 0.17  # of the narrowest plot, 300 pixels
_LEFT_PX, _BELOW_PX = 46, 34  # room for the tick labels beside and below a plot


class Scale(NamedTuple):
    """Values between `low` and `high` as shares of an axis."""

    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return 0.5 if high == low else (at - low) / (high - low)


class Line(NamedTuple):
    """A curve. points: (x, y), values that are not finite leave a gap; mark: "end", "cut", "failed" or None."""

    points: Sequence[tuple[float, float]]
    style: str  # classes: "series-0", "quiet", "strong"
    title: str
    mark: str | None = "end"


class Whisker(NamedTuple):
    """A mean with its interval and the single values it is made of."""

    letter: str
    label: str
    mean: float
    half_width: float | None
    values: Sequence[tuple[str, float]]  # (what it is, value)
    text: str


def scale_of(values: Sequence[float], *, margin: float = 0.06) -> Scale:
    """A linear scale around finite values, a little wider than they are; below 0 only where a value is."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Scale(0.0, 1.0)
    low, high = min(finite), max(finite)
    room = (high - low) * margin or abs(high) * 0.05 or 0.5
    return Scale(max(low - room, 0.0) if low >= 0 else low - room, high + room)


def ticks(scale: Scale, *, at_most: int = 5, whole: bool = False) -> list[float]:
    """Round values inside a linear scale: steps of 1, 2 or 5 times a power of ten."""
    width = scale.high - scale.low
    if width <= 0:
        return [scale.low]
    step = 10.0 ** math.floor(math.log10(width / at_most))
    step *= next((factor for factor in (1, 2, 5) if width / (step * factor) <= at_most), 10)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def number_text(value: float, *, digits: int = 4) -> str:
    """The digits that matter: 0.25, 1200, 3.2e-5."""
    mantissa, exponential, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponential else mantissa


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    rungs: Sequence[float] = (),
    up: Scale | None = None,
    height_px: int = 300,
    description: str = "",
) -> Markup:
    """Curves over epochs or trials; rungs are upright dashed lines with their number above. up: the scale of the values
    where it is not to be made from them."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    across = Scale(min(xs, default=0.0), max(xs, default=1.0))
    if across.low == across.high:
        across = Scale(across.low - 1, across.high + 1)
    up = up or scale_of(ys)
    parts = [_grid_up(up), _ticks_across(across, whole=True)]
    labelled = -1.0
    for rung in rungs:
        place = percent(across.share(rung))
        parts.append(element("line", x1=place, x2=place, y1="0", y2="100%", class_="rung"))
        # Early rungs lie close together: those without room for their label, on a telephone, have none.
        if across.share(rung) - labelled >= _RUNG_LABEL_SHARE:
            labelled = across.share(rung)
            parts.append(element("text", f"rung {rung:g}", x=place, y="-5", class_="tick middle"))
    parts += [_drawn_line(line, across, up) for line in lines]
    if not any(math.isfinite(y) for y in ys):
        parts.append(element("text", "nothing has been measured yet", x="50%", y="50%", class_="tick middle"))
    return _plot(parts, height_px, x_label, y_label, description or y_label)


def whisker_rows(rows: Sequence[Whisker], *, x_label: str, reference: tuple[float, str] | None = None) -> Markup:
    """A row for each mean: its label, its interval as dot and whisker over the single values, its number in words.

    reference: a value to hold all of them against, as a dashed line, and its name.
    """
    ends = [reference[0]] if reference else []
    for row in rows:
        ends += [value for _, value in row.values]
        ends += [row.mean - (row.half_width or 0.0), row.mean + (row.half_width or 0.0)]
    scale = scale_of(ends)
    drawn = [
        element(
            "div",
            element("div", element("b", row.letter), f" {row.label}", class_="whisker-label"),
            _drawn_whisker(row, scale, reference[0] if reference else None),
            element("div", row.text, class_="whisker-number"),
            class_="whisker-row",
        )
        for row in rows
    ]
    axis = element("svg", _ticks_across(scale, whole=False, below=False), width="100%", height="18", aria_hidden="true")
    label = f"{x_label}; dashed: {reference[1]}, {number_text(round(reference[0], 4))}" if reference else x_label
    axis_row = element("div", element("div", label, class_="whisker-label muted"), axis, element("div"),
                       class_="whisker-row axis-row")  # fmt: skip
    return element("div", *drawn, axis_row, class_="whiskers")


def bars(rows: Sequence[tuple[str, float, str]]) -> Markup:
    """(label, share of the longest bar, number in words) as horizontal bars."""
    drawn = [
        element(
            "div",
            element("div", label, class_="bar-label"),
            element("div", element("div", class_="bar", style=f"width:{100 * min(max(share, 0.0), 1.0):.2f}%"),
                    class_="bar-room"),
            element("div", text, class_="bar-number"),
            class_="bar-row",
        )
        for label, share, text in rows
    ]  # fmt: skip
    return element("div", *drawn, class_="bars")


def percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def polyline(pieces: Sequence[Sequence[tuple[float, float]]], style: str, title: str) -> Markup:
    """Runs of (share across, share up) as one path in a drawing that is stretched; the pen is not."""
    path = "".join(
        "M" + "L".join(f"{1000 * x:.1f} {1000 * (1 - y):.1f}" for x, y in piece) for piece in pieces if piece
    )
    drawn = element("path", element("title", title), d=path, class_=f"line {style}", vector_effect="non-scaling-stroke")
    return element("svg", drawn, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%",
                   overflow="visible")  # fmt: skip


# --- inside -----------------------------------------------------------------------------------------------------------


def _plot(parts: Sequence[Markup], height_px: int, x_label: str, y_label: str, description: str) -> Markup:
    drawing = element("svg", *parts, width="100%", height=height_px, role="img", aria_label=description)
    labels = element("div", element("span", y_label), class_="y-label"), element("div", x_label, class_="x-label")
    room = f"padding:22px 12px {_BELOW_PX - 14}px {_LEFT_PX}px"
    return element("div", labels[0], element("div", drawing, class_="plot", style=room), labels[1], class_="chart")


def _grid_up(scale: Scale) -> Markup:
    parts = []
    for tick in ticks(scale):
        place = percent(1 - scale.share(tick))
        parts.append(element("line", x1="0", x2="100%", y1=place, y2=place, class_="grid"))
        parts.append(element("text", number_text(tick), x="-6", y=place, dy="4", class_="tick end"))
    return joined(*parts)


def _ticks_across(scale: Scale, *, whole: bool, below: bool = True) -> Markup:
    parts = []
    for tick in ticks(scale, whole=whole):
        place = percent(scale.share(tick))
        if below:
            text = element("text", number_text(tick), x=place, y="100%", dy="16", class_="tick middle")
        else:
            text = element("text", number_text(tick), x=place, y="13", class_="tick middle")
        parts.append(text)
    return joined(*parts)


def _drawn_line(line: Line, across: Scale, up: Scale) -> Markup:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if math.isfinite(y):
            pieces[-1].append((across.share(x), up.share(y)))
        elif pieces[-1]:
            pieces.append([])
    whole = [piece for piece in pieces if piece]
    if not whole:
        return Markup()
    x, y = whole[-1][-1]
    marks: dict[str | None, Callable[[], Markup]] = {
        None: Markup,
        "end": lambda: element("circle", cx=percent(x), cy=percent(1 - y), r="3.5", class_=f"dot {line.style}"),
        "cut": lambda: _cross(x, y, f"cut {line.style}", upright=True),
        "failed": lambda: _cross(x, y, f"cut {line.style}", upright=False),
    }
    return joined(polyline(whole, line.style, line.title), marks[line.mark]())


def _cross(x: float, y: float, style: str, *, upright: bool) -> Markup:
    """A short upright bar where a trial was stopped, a diagonal cross where it failed; both keep their size."""
    path = "M0 -6V6" if upright else "M-4 -4L4 4M-4 4L4 -4"
    return element("svg", element("path", d=path, class_=style), x=percent(x), y=percent(1 - y), overflow="visible")


def _drawn_whisker(row: Whisker, scale: Scale, reference: float | None) -> Markup:
    middle = percent(scale.share(row.mean))
    parts = [element("line", x1="0", x2="100%", y1="50%", y2="50%", class_="grid")]
    if reference is not None:
        place = percent(scale.share(reference))
        parts.append(element("line", x1=place, x2=place, y1="0", y2="100%", class_="rung"))
    if row.half_width is not None:
        low, high = (percent(scale.share(row.mean + sign * row.half_width)) for sign in (-1, 1))
        parts.append(element("line", x1=low, x2=high, y1="50%", y2="50%", class_="whisker"))
        parts += [element("line", x1=end, x2=end, y1="30%", y2="70%", class_="whisker") for end in (low, high)]
    parts += [
        element("circle", element("title", f"{what}: {value:.4f}"), cx=percent(scale.share(value)), cy="50%", r="3",
                class_="value")
        for what, value in row.values
    ]  # fmt: skip
    parts.append(element("circle", element("title", row.text), cx=middle, cy="50%", r="5", class_="mean"))
    return element(
        "svg", *parts, width="100%", height="26", role="img", aria_label=f"{row.letter} {row.label}: {row.text}"
    )
