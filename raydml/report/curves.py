"""Learning curves of a study: read from its events, drawn as one picture for MLflow."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raydml.analysis.trial_history import ENDINGS, FAILURES
from raydml.metrics.names import metric_name
from raydml.report.style import BLUE, INK, ORANGE, PALE, PURPLE, counted, save_picture

Curves = Mapping[str, Sequence[tuple[int, float]]]

_log = logging.getLogger(__name__)


def read_curves(
    events_path: Path, *, metric: str = "val_map_at_r"
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
    """The curves of a study from its events file.

    Returns:
        curves: trial key -> [(epoch, value)] in order of epoch. An epoch without the metric is left out; one
            reported twice, before and after a resume, counts as reported last.
        ended: trial key -> reason, of trials that have ended and were not taken up again.

    A last line without its end is the one being written and is left for later. A line broken in the middle of the
    file (a writer was killed) is passed over with a warning in the log.
    """
    values: dict[str, dict[int, float]] = {}
    ended: dict[str, str] = {}
    lines = Path(events_path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            _log.warning("%s:%d is not a whole event and is passed over: %.80s", events_path, number, line)
            continue
        kind, trial = event["event"], event.get("trial")
        if kind in ("trial_started", "trial_retried"):
            values.setdefault(trial, {})
            ended.pop(trial, None)
        elif kind == "epoch" and metric in event["metrics"]:
            values.setdefault(trial, {})[int(event["epoch"])] = float(event["metrics"][metric])
        elif kind == "trial_ended":
            ended[trial] = event["reason"]
    return {trial: sorted(points.items()) for trial, points in values.items()}, ended


def learning_curves(curves: Curves, ended: Mapping[str, str], winner: str | None, metric: str, path: Path) -> Path:
    """Draw the metric of all trials over epochs as a PNG: stopped trials grey, the winner in colour and named.

    Args:
        curves: trial key -> [(epoch, value)]; values that are not finite leave a gap.
        ended: trial key -> "finished", "stopped_early", "non_finite_loss", "collapsed" or "crashed".
        winner: key of the trial to highlight, or None.
        metric: what the values are, as named in the results (`val_map_at_r`).
        path: where the picture goes; its folder is made.

    Raises ValueError when the winner is not among the curves.
    """
    if winner is not None and winner not in curves:
        raise ValueError(f"winner: {winner!r} has no curve; curves of {', '.join(sorted(curves)) or 'no trial'}")
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    # Later is on top: what was stopped lies behind what was not, the winner before everything.
    kinds = ("stopped_early", *FAILURES, "", "finished")
    for kind in kinds:
        trials = [key for key in curves if ended.get(key, "") == kind and key != winner]
        for key in trials:
            label = f"{ENDINGS[kind]} ({len(trials)})" if key == trials[0] else None
            _draw_curve(axes, curves[key], kind, label)
    if winner is not None:
        _draw_winner(axes, winner, curves[winner])
    if not any(_finite(points) for points in curves.values()):
        axes.text(0.5, 0.5, "no epoch has ended yet", transform=axes.transAxes, ha="center", color=INK)
    elif axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, reverse=True)
    axes.set_title(f"{metric_name(metric)} of {counted(len(curves), 'trial')}", loc="left", fontsize=12, color=INK)
    axes.set_xlabel("epoch")
    axes.set_ylabel(metric_name(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return save_picture(figure, path)


def _draw_curve(axes: Axes, points: Sequence[tuple[int, float]], kind: str, label: str | None) -> None:
    epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
    colour = BLUE if kind in ("finished", "") else PURPLE if kind in FAILURES else PALE
    style = "--" if kind == "" else "-"
    # The end is marked, so that a trial of one epoch is seen as well.
    marker = "x" if kind in FAILURES else "o"
    last = [len(points) - 1] if points else []
    axes.plot(
        epochs, values, style, color=colour, linewidth=1.3, marker=marker, markersize=4, markevery=last, label=label
    )


def _draw_winner(axes: Axes, key: str, points: Sequence[tuple[int, float]]) -> None:
    epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
    finite = _finite(points)
    label = f"winner: {key}"
    if finite:
        epoch, value = max(finite, key=lambda point: (point[1], -point[0]))
        label += f"\n{value:.4f} at epoch {epoch}"
        axes.plot([epoch], [value], "o", color=ORANGE, markersize=9, markeredgecolor="white", zorder=6)
    axes.plot(epochs, values, color=ORANGE, linewidth=2.8, marker="o", markersize=3, label=label, zorder=5)


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(epoch, value) for epoch, value in points if math.isfinite(value)]
