"""What the choices of a search did: losses by methods, importance of hyperparameters, parallel coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydml.analysis.importance import CrossingCell, Importance, crossing_of
from raydml.analysis.trials import TrialState, parameters_of, varying
from raydml.metrics.names import metric_name
from raydml.report.charts import bars
from raydml.report.markup import Markup, element, escaped, joined, paragraph, table
from raydml.report.parallel import axis_of, labels_of, parallel_coordinates
from raydml.report.section import legend, titled
from raydml.report.words import counted

_MAX_AXES = 10


def crossing_table(searched: Sequence[TrialState]) -> Markup:
    """Loss by method, or whichever two choices vary most; nothing where none varies."""
    crossing = crossing_of(searched)
    if crossing is None:
        return Markup()
    bests = [cell.best for cell in crossing.cells.values()]
    low, high = min(bests), max(bests)

    def shown(cell: CrossingCell | None) -> Markup:
        if cell is None:
            return escaped(None)
        strength = 0.0 if high == low else (cell.best - low) / (high - low)
        words = f"median {cell.median:.3f}, {counted(cell.num_trials, 'trial')}"
        return element("div", element("b", f"{cell.best:.3f}"), element("small", words), class_="cell",
                       style=f"--strength:{100 * strength:.0f}%")  # fmt: skip

    rows = [[row, *(shown(crossing.cells.get((row, column))) for column in crossing.columns)] for row in crossing.rows]
    title = f"{crossing.rows_of} × {crossing.columns_of}" if crossing.columns_of else crossing.rows_of
    header = [title, *(column or "reached" for column in crossing.columns)]
    note = "Best value of the ranking metric, median and number of trials; best rows and columns first."
    return joined(paragraph(note, class_="muted"), table(header, rows))


def importance_charts(summary: Mapping[str, Any], searched: Sequence[TrialState]) -> Markup:
    """Bars and parallel coordinates once the search has ended; in words where there is too little to learn from."""
    if summary["stability"] is None:
        return Markup()
    found = Importance(**summary["importance"])
    return joined(_shares(found), _parallel(searched, found, metric_name(summary["metric"])))


def _shares(found: Importance) -> Markup:
    if found.reason is not None:
        return paragraph(f"Hyperparameter importance is not shown: {found.reason}.")
    longest = max(found.shares.values())
    shown = [(name, share) for name, share in found.shares.items() if share >= 0.01]
    rows = [(name, share / longest, f"{share:.0%}") for name, share in shown]
    hidden = len(found.shares) - len(shown)
    caveat = (
        f"A random forest over {found.num_trials} trials explains {max(found.r2 or 0.0, 0.0):.0%} of the variance of "
        "trials it was not grown on; the bars are how much worse it gets when one parameter is shuffled, as shares of "
        "the whole. They hold for the ranges searched here. Parameters that were drawn together share their weight, "
        "and a trial stopped early counts with the value it had reached by then."
    )
    rest = f" {counted(hidden, 'parameter')} below 1 % left out." if hidden else ""
    return joined(paragraph(caveat + rest, class_="muted"), bars(rows))


def _parallel(searched: Sequence[TrialState], found: Importance, metric: str) -> Markup:
    reached = [(trial, trial.best) for trial in searched if trial.best is not None]
    parameters = [parameters_of(trial.config) for trial, _ in reached]
    varied = varying(parameters)
    # One that most trials do not have says little about them.
    shared = [name for name in varied if sum(name in one for one in parameters) * 2 > len(parameters)]
    shared.sort(key=lambda name: -found.shares.get(name, 0.0))
    names = shared[:_MAX_AXES]
    if len(reached) < 2 or not names:
        return Markup()
    labels = labels_of(names)
    axes = [axis_of(labels[name], [one.get(name) for one in parameters]) for name in names]
    values = [value for _, value in reached]
    axes.append(axis_of(metric.removeprefix("validation "), values))
    titles = [f"{trial.trial}: {value:.4f}, {trial.recipe}" for trial, value in reached]
    keys = legend([("grade-0", "worst fifth"), ("grade-1", ""), ("grade-2", ""), ("grade-3", ""),
                      ("grade-4", "best fifth of the trials")])  # fmt: skip
    left_out = len(varied) - len(names)
    note = f" {counted(left_out, 'parameter')} of few trials or little weight left out." if left_out else ""
    return titled(
        f"Parameters of the trials, by {metric}.{note}", joined(parallel_coordinates(axes, values, titles), keys)
    )
