"""What a study shows: learning curves, sample retrievals, and its summary in Markdown.

Everything here takes plain lists, dictionaries and arrays, or reads the study's own files, so that a picture can be
drawn again after the fact and without a cluster.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from raydml.images.pixels import Pixels
from raydml.preprocessing import centre_crop
from raydml.retrieval import nearest_neighbours
from raydml.statistics import Interval

Curves = Mapping[str, Sequence[tuple[int, float]]]

_log = logging.getLogger(__name__)

_DPI = 140
_GREY, _BLUE, _ORANGE, _INK = "#b9b9b9", "#7fa6c9", "#d95f0e", "#333333"
_GREEN, _RED, _PURPLE = "#1a9641", "#d7191c", "#762a83"
_FAILURES = ("non_finite_loss", "collapsed", "crashed")
_ENDINGS = {
    "finished": "ran to the end",
    "stopped_early": "stopped early",
    "non_finite_loss": "non-finite loss",
    "collapsed": "collapsed",
    "crashed": "crashed",
    "": "not ended",
}

_CHOICES = {True: "; chosen on test", False: "", None: "; not known whether chosen on test"}

_HOW_TO_COMPARE = (
    "Published numbers come from training on all training classes, where ours leave some out to validate on. Those "
    "marked *chosen on test* are of the epoch that was best on these very test classes; of those marked *not known "
    "whether chosen on test* the source does not say how the epoch was chosen; those without a mark were not chosen on "
    "them. Ours were chosen on validation classes, and the test classes were opened once."
)


# --- learning curves -------------------------------------------------------------------------------------------------


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
    figure = Figure(figsize=(9, 5.2), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    # Later is on top: what was stopped lies behind what was not, the winner before everything.
    kinds = ("stopped_early", *_FAILURES, "", "finished")
    for kind in kinds:
        trials = [key for key in curves if ended.get(key, "") == kind and key != winner]
        for key in trials:
            label = f"{_ENDINGS[kind]} ({len(trials)})" if key == trials[0] else None
            _draw_curve(axes, curves[key], kind, label)
    if winner is not None:
        _draw_winner(axes, winner, curves[winner])
    if not any(_finite(points) for points in curves.values()):
        axes.text(0.5, 0.5, "no epoch has ended yet", transform=axes.transAxes, ha="center", color=_INK)
    elif axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, reverse=True)
    axes.set_title(f"{_metric_name(metric)} of {_counted(len(curves), 'trial')}", loc="left", fontsize=12, color=_INK)
    axes.set_xlabel("epoch")
    axes.set_ylabel(_metric_name(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _draw_curve(axes: Axes, points: Sequence[tuple[int, float]], kind: str, label: str | None) -> None:
    epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
    colour = _BLUE if kind in ("finished", "") else _PURPLE if kind in _FAILURES else _GREY
    style = "--" if kind == "" else "-"
    # The end is marked, so that a trial of one epoch is seen as well.
    marker = "x" if kind in _FAILURES else "o"
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
        axes.plot([epoch], [value], "o", color=_ORANGE, markersize=9, markeredgecolor="white", zorder=6)
    axes.plot(epochs, values, color=_ORANGE, linewidth=2.8, marker="o", markersize=3, label=label, zorder=5)


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(epoch, value) for epoch, value in points if math.isfinite(value)]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _metric_name(metric: str) -> str:
    """`val_map_at_r` -> "validation MAP@R", `binary_recall_at_1` -> "binary Recall@1"; what is unknown stays."""
    part, bare = ("validation ", metric[4:]) if metric.startswith("val_") else ("", metric)
    if bare.startswith("binary_"):
        part, bare = f"{part}binary ", bare.removeprefix("binary_")
    if bare.startswith("recall_at_"):
        return f"{part}Recall@{bare.removeprefix('recall_at_')}"
    names = {"map_at_r": "MAP@R", "r_precision": "R-precision"}
    return part + names[bare] if bare in names else metric


# --- sample retrievals -----------------------------------------------------------------------------------------------


def sample_retrievals(
    pixels: Pixels,
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    embeddings: NDArray[np.float32],
    path: Path,
    *,
    num_queries: int = 6,
    num_neighbours: int = 5,
    seed: int = 0,
) -> Path:
    """Draw some queries, one a row, with their nearest neighbours as a PNG: green frame = same class, red = another.

    Half of the queries are drawn from those whose nearest neighbour is wrong, as far as there are any, and the
    picture says so; within each half different classes come first. The choice depends on `seed` alone.

    Args:
        pixels: N images; their centre squares are drawn.
        labels: (N,) ids into class_names.
        embeddings: (N, D) float32.
        path: where the picture goes; its folder is made.

    Raises RetrievalError for unusable embeddings.
    """
    if not len(pixels) == len(labels) == len(embeddings) or len(pixels) < 2:
        raise ValueError(
            f"{len(pixels)} images, {len(labels)} labels and {len(embeddings)} embeddings: "
            "the numbers must be equal and at least 2"
        )
    neighbours, distances = nearest_neighbours(embeddings, k=min(num_neighbours, len(pixels) - 1))
    right = labels[neighbours] == labels[:, None]
    chosen = _choose_queries(labels, right[:, 0], num_queries, seed)
    num_columns = 1 + neighbours.shape[1]
    shown = np.unique([*chosen, *neighbours[chosen].ravel()]).tolist()
    squares = {
        row: centre_crop(image, min(image.shape[:2])) for row, image in zip(shown, pixels.read(shown), strict=True)
    }
    spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.02, hspace=0.03)
    figure = Figure(figsize=(1.75 * num_columns, 2.25 * len(chosen) + 0.8), dpi=_DPI, layout=spacing)
    grid = figure.subplots(len(chosen), num_columns, squeeze=False)
    for row, query in enumerate(chosen):
        found = f"query: {right[query].sum()} of {len(right[query])} right"
        _draw_image(grid[row, 0], squares[int(query)], class_names[labels[query]], _INK, found)
        for column, other in enumerate(neighbours[query]):
            good = right[query, column]
            caption = f"{'✓' if good else '✗'}  distance {math.sqrt(distances[query, column]):#.3g}"
            name = class_names[labels[other]]
            _draw_image(grid[row, column + 1], squares[int(other)], name, _GREEN if good else _RED, caption)
    num_wrong = int((~right[chosen, 0]).sum())
    title = f"Nearest neighbours of {len(chosen)} of {len(labels)} images."
    title += f" The nearest is right for {right[:, 0].mean():.1%} of all."
    if num_wrong:
        title += f"\nPicked because theirs is wrong: the last {_counted(num_wrong, 'row')}."
    figure.suptitle(title, fontsize=10.5, color=_INK)
    return _save(figure, path)


def _choose_queries(labels: NDArray[np.int64], right: NDArray[np.bool_], num_queries: int, seed: int) -> list[int]:
    """Row numbers, those with a right neighbour first."""
    order = np.random.default_rng(seed).permutation(len(labels))
    seen: dict[int, int] = {}
    turns = np.empty(len(labels), dtype=np.int64)
    for row in order:  # the first image of every class, then the second of every class, ...
        turns[row] = seen[labels[row]] = seen.get(labels[row], -1) + 1
    spread = order[np.argsort(turns[order], kind="stable")]
    good, bad = spread[right[spread]], spread[~right[spread]]
    num_bad = min(len(bad), max(num_queries // 2, num_queries - len(good)))
    return [int(row) for row in (*good[: num_queries - num_bad], *bad[:num_bad])]


def _draw_image(axes: Axes, image: NDArray[np.uint8], name: str, colour: str, caption: str) -> None:
    # Small images keep their pixels, large ones are smoothed.
    axes.imshow(image, interpolation="nearest" if len(image) < 100 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(4)
    # A class name may hold a dollar sign, which is no formula.
    axes.set_title(_shortened(name), fontsize=8.5, color=_INK, pad=5, parse_math=False)
    axes.set_xlabel(caption, fontsize=8.5, color=colour, labelpad=4)


def _shortened(name: str, width: int = 19) -> str:
    """At most two lines of `width`; the middle of a longer name is left out, its two ends tell it apart."""
    if len(name) > 2 * width:
        name = f"{name[: width - 1]}…{name[-width:]}"
    if len(name) <= width:
        return name
    breaks = [place + 1 for place, letter in enumerate(name) if letter in " /-_" and place < width]
    suitable = [place for place in breaks if len(name) - place <= width]
    place = suitable[-1] if suitable else width
    return f"{name[:place].strip()}\n{name[place:].strip()}"


def _save(figure: Figure, path: Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", facecolor="white")
    aside.replace(path)
    return path


# --- summary ---------------------------------------------------------------------------------------------------------


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """A study's summary as Markdown: the test numbers, those published, the confirmed configurations, the leaderboard.

    summary: {
        "study": name, "metric": what trials are ranked by,
        "search":  [{"trial", "recipe" (method, loss, miner, regularisers in words), "best" | None,
                     "epoch_of_best" | None, "ended"}], best first,
        "confirm": [{"configuration" (fingerprint), "recipe", "from_trial", "mean" | None, "half_width" | None,
                     "num_runs"}],
        "final":   [{"configuration", "recipe", "dataset", "backbone", "embedding_dim",
                     "metrics": {name: {"mean", "half_width" | None}}, "untrained": the same,
                     "validation": the same, "untrained_validation": the same}], metrics are those of the test classes,
        "published": [{"system", "variant", "dataset", "metrics": {name: {"mean", "deviation" | None}}, "protocol",
                     "backbone" | None, "embedding_dim" | None, "source", "status", "chosen_on_test" | None}] of
                     published.py; None is not known,
    }
    A stage that has not been run is an empty list and has no table. Intervals are 95 % t intervals.
    """
    metric = _metric_name(summary["metric"])
    parts = [f"# Study {_cell(summary['study'])}"]
    parts_shown = ("metrics", "untrained", "validation", "untrained_validation")
    for row in summary["final"]:
        rows = [
            [_metric_name(name), *(_interval(row[part].get(name)) for part in parts_shown)] for name in row["metrics"]
        ]
        parts += [
            f"## Test classes, configuration `{row['configuration']}`: {_cell(row['recipe'])}",
            _table(["metric", "test", "test, untrained", "validation", "validation, untrained"], rows),
        ]
    parts += _beside_published(summary["final"], summary["published"])
    if summary["confirm"]:
        rows = [
            [f"`{row['configuration']}`", row["recipe"], row["from_trial"], _interval(row), row["num_runs"]]
            for row in summary["confirm"]
        ]
        title = f"## Confirmed: {metric} over folds and seeds"
        parts += [title, _table(["configuration", "recipe", "from", "mean ± 95 % interval", "runs"], rows)]
    if summary["search"]:
        rows = [
            [
                str(rank),
                row["trial"],
                row["recipe"],
                _number(row["best"]),
                row["epoch_of_best"],
                _ENDINGS.get(row["ended"], row["ended"]),
            ]
            for rank, row in enumerate(summary["search"], start=1)
        ]
        header = ["", "trial", "recipe", f"best {metric}", "at epoch", "ended"]
        parts += [f"## Search: {_counted(len(rows), 'trial')}", _table(header, rows)]
    return "\n\n".join(parts) + "\n"


def _beside_published(final: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each data set and protocol that somebody published numbers of: ours first, then theirs, best last."""
    parts = []
    for dataset, protocol in dict.fromkeys((entry["dataset"], entry["protocol"]) for entry in published):
        ours = [row for row in final if row["dataset"] == dataset]
        theirs = [entry for entry in published if (entry["dataset"], entry["protocol"]) == (dataset, protocol)]
        measured = dict.fromkeys(name for row in ours for name in row["metrics"])
        names = [name for name in measured if any(name in entry["metrics"] for entry in theirs)]
        theirs = [entry for entry in theirs if any(name in entry["metrics"] for name in names)]
        theirs.sort(key=lambda entry: entry["metrics"].get(names[0], {"mean": 0.0})["mean"])
        if not theirs:
            continue
        rows = [
            [f"**this study**: {row['recipe']}", row["backbone"], row["embedding_dim"]]
            + [_interval(row["metrics"].get(name)) for name in names]
            + [f"configuration `{row['configuration']}`"]
            for row in ours
        ]
        rows += [
            [f"{entry['system']}: {entry['variant']}", entry["backbone"], entry["embedding_dim"]]
            + [_deviating(entry["metrics"].get(name)) for name in names]
            + [f"{entry['source']}; {entry['status']}{_CHOICES[entry['chosen_on_test']]}"]
            for entry in theirs
        ]
        header = ["", "backbone", "dimensions", *(_metric_name(name) for name in names), "source and standing"]
        parts += [f"## Published numbers: {dataset}, {protocol.replace('_', ' ')}", _table(header, rows)]
        parts += [_HOW_TO_COMPARE]
    return parts


def _deviating(score: Mapping[str, Any] | None) -> str | None:
    """A published number and, in words, the deviation of its runs, which is no interval."""
    if score is None:
        return None
    deviation = "" if score["deviation"] is None else f" (deviation {score['deviation']:.4f})"
    return f"{score['mean']:.4f}{deviation}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _interval(row: Mapping[str, Any] | None) -> str | None:
    if row is None or row["mean"] is None:
        return None
    return Interval(row["mean"], row["half_width"], 0).text(decimals=4)
