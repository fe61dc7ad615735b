"""Tables of a study: rows of a page's table, two CSV files with all numbers, and the final results in LaTeX."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from raydml.analysis.trials import TrialState
from raydml.config.recipe import flatten
from raydml.metrics.names import metric_label, metric_name
from raydml.ops.wording import counted
from raydml.report.text import main_metrics, published_groups

_LONG = 18  # letters from which on a cell of text may break into lines
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # of a text that a spreadsheet would run
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "\n": " ",
        **{letter: f"\\{letter}" for letter in "{}&%$#_"},
    }
)


class TableCell(NamedTuple):
    """One cell. style: a class of the style sheet. small: muted text after the text. tag: a coloured note after it."""

    text: str
    style: str = ""
    small: str = ""
    tag: str = ""
    strong: bool = False


class Table(NamedTuple):
    """A table of the page. emphasised: numbers of the rows to highlight."""

    header: list[TableCell]
    rows: list[list[TableCell]]
    caption: str
    emphasised: Sequence[int]


class FoldedTable(NamedTuple):
    """A table that opens on a click on its title; one without a title is open."""

    title: str
    table: Table


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    words: Sequence[int] = (0,),
    caption: str = "",
    emphasised: Sequence[int] = (),
) -> Table:
    """Make a table of values; None becomes a dash.

    words: numbers of the columns of text; the others are aligned right.
    """

    def cell(column: int, value: object) -> TableCell:
        made = value if isinstance(value, TableCell) else TableCell("–" if value is None else str(value))
        style = "number" if column not in words else "long" if len(made.text) > _LONG else ""
        return made._replace(style=style)

    body = [[cell(column, value) for column, value in enumerate(row)] for row in rows]
    return Table([cell(column, title) for column, title in enumerate(header)], body, caption, emphasised)


def trials_csv(trials: Sequence[TrialState], summary: Mapping[str, Any]) -> str:
    """Return the `trial_rows` as CSV. Lists are JSON; a missing value is an empty cell."""
    return _csv(trial_rows(trials, summary))


def trial_rows(trials: Sequence[TrialState], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each trial.

    It has how the trial ended, all metrics of its best epoch (``best.``), those of the test classes (``test.``), and
    every parameter by its path in the search space (``loss.name``).
    """
    configurations = {run["trial"]: row["configuration"] for row in summary["confirm"] for run in row["runs"]}
    tested = {run["trial"]: run["test"] for row in summary["final"] for run in row["runs"]}
    rows = []
    for trial in trials:
        at_best = trial.epochs.get(trial.epoch_of_best, {}) if trial.epoch_of_best is not None else {}
        row: dict[str, Any] = {
            "trial": trial.trial,
            "stage": trial.stage,
            "fingerprint": trial.fingerprint,
            # A searched trial is its own configuration; a confirmed one repeats it on other folds and seeds.
            "configuration": configurations.get(trial.trial, trial.fingerprint if trial.stage == "search" else None),
            "recipe": trial.recipe,
            "fold": trial.fold,
            "seed": trial.seed,
            "ended": trial.ended,
            "error": trial.error,
            "epochs_run": trial.num_epochs,
            "epochs_planned": trial.num_planned_epochs,
            "seconds": sum(metrics.get("epoch_s", 0.0) for metrics in trial.epochs.values()),
            "best": trial.best,
            "epoch_of_best": trial.epoch_of_best,
        }
        row |= {f"best.{name}": value for name, value in at_best.items()}
        row |= {f"test.{name}": value for name, value in tested.get(trial.trial, {}).items()}
        row |= {name: value for name, value in flatten(trial.config).items() if name != "seed"}
        rows.append(row)
    return rows


def epochs_csv(trials: Sequence[TrialState]) -> str:
    """Return the `epoch_rows` as CSV."""
    return _csv(epoch_rows(trials))


def epoch_rows(trials: Sequence[TrialState]) -> list[dict[str, Any]]:
    """Return one row for each epoch with every metric that it reported."""
    return [
        {"trial": trial.trial, "stage": trial.stage, "epoch": epoch, **metrics}
        for trial in trials
        for epoch, metrics in sorted(trial.epochs.items())
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows; the columns are in order of their first appearance, and "trial" is there without rows as well."""
    columns = list(dict.fromkeys(["trial", *(name for row in rows for name in row)]))
    cells = [{name: _csv_cell(value) for name, value in row.items()} for row in rows]
    # As objects: pandas would turn an integer column with a gap into decimals.
    text: str = pd.DataFrame(cells, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")
    return text


def _csv_cell(value: object) -> object:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA_STARTS) else value  # a spreadsheet shows the quoted text
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # measured, unlike an empty cell
    return json.dumps(value) if isinstance(value, list | tuple | dict | bool) else value


def final_latex(summary: Mapping[str, Any]) -> str:
    """Return a table environment: mean $\\pm$ 95 % interval in percent, one row for each configuration.

    summary: see `study/summary.py`. Before `finalize` it has the confirmed validation numbers, before those the
    searched ones; the caption says which. Published numbers are below a rule. The only package needed is booktabs.
    """
    if summary["final"]:
        names = main_metrics(summary)
        groups = [_final_rows(summary["final"], names), *_published_rows(summary, names)]
        about = "on the test classes, untrained networks for comparison"
    elif summary["confirm"]:
        names = [summary["metric"]]
        groups = [[[_latex(row["label"]), _latex_score(row)] for row in summary["confirm"]]]
        about = "of the confirmed configurations on the validation classes"
    else:
        names = [summary["metric"]]
        best = summary["search"][:10]
        groups = [[[_latex(f"{row['trial']}: {row['recipe']}"), _latex_percent(row["best"])] for row in best]]
        about = "of the best trials on the validation classes, one run each"
    caption = f"Study {_latex(summary['study'])}: {_latex(', '.join(map(metric_name, names)))} {about}, in percent"
    if summary["final"] or summary["confirm"]:
        runs = max((row["num_runs"] for row in summary["confirm"]), default=1)
        caption += f"; mean $\\pm$ 95\\,\\% t interval over up to {counted(runs, 'run')}"
    for group in groups[1:]:
        group[0][0] = f"\\midrule\n{group[0][0]}"
    header = ["", *(_latex(metric_label(name)) for name in names)]
    rows = [row for group in groups for row in group]
    styled = pd.DataFrame(rows, columns=header, dtype=object).style.hide(axis="index")
    tabular = styled.to_latex(
        hrules=True, column_format="l" + "r" * len(names), caption=f"{caption}.", position_float="centering"
    )
    return f"% needs \\usepackage{{booktabs}}\n{tabular}"


def _final_rows(final: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for row in final:
        rows.append([_latex(row["label"]), *(_latex_score(row["metrics"].get(name)) for name in names)])
        for part, title in (("ensemble", "ensemble of folds"), ("untrained", "untrained")):
            if row[part]:
                rows.append([f"\\quad {title}", *(_latex_score(row[part].get(name)) for name in names)])
    return rows


def _published_rows(summary: Mapping[str, Any], names: Sequence[str]) -> list[list[list[str]]]:
    """Return a group of rows for each data set and protocol. The deviation of a published number is no interval and is
    left out of a column of intervals."""
    groups = []
    for *_, theirs in published_groups(summary):
        rows = []
        for entry in theirs:
            mark = r"$^\ast$" if entry["chosen_on_test"] else ""
            means = [entry["metrics"].get(name, {"mean": None})["mean"] for name in names]
            rows.append([_latex(f"{entry['system']}: {entry['variant']}") + mark, *map(_latex_percent, means)])
        groups.append(rows)
    return groups


def _latex(value: object) -> str:
    return str(value).translate(_LATEX)


def _latex_percent(value: float | None) -> str:
    return "--" if value is None else f"{100 * value:.1f}"


def _latex_score(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] is None:
        return "--"
    half_width = score["half_width"]
    return _latex_percent(score["mean"]) + ("" if half_width is None else f" $\\pm$ {100 * half_width:.1f}")
