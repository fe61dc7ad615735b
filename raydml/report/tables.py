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
from raydml.report.comparability import PublishedGroup, published_groups, published_name
from raydml.report.text import final_models, main_metrics

_LONG = 18  # letters from which on a cell of text may break into lines
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")  # of a text that a spreadsheet would run
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
    rerun = [*summary["confirm"], *summary["refit"]]
    configurations = {run["trial"]: row["configuration"] for row in rerun for run in row["runs"]}
    tested = {
        run["trial"]: run["test"]
        for row in summary["final"]
        for run in [*row["runs"], *(row["refit"] or {"runs": []})["runs"]]
    }
    rows = []
    for trial in trials:
        own = trial.configuration or trial.fingerprint  # older events lack the first
        at_best = trial.epochs.get(trial.epoch_of_best, {}) if trial.epoch_of_best is not None else {}
        row: dict[str, Any] = {
            "trial": trial.trial,
            "stage": trial.stage,
            "fingerprint": trial.fingerprint,
            # A searched trial is its own configuration; others repeat it on other folds and seeds.
            "configuration": configurations.get(trial.trial, own if trial.stage == "search" else None),
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
    cells = [{_csv_cell(name): _csv_cell(value) for name, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(["trial", *(name for row in cells for name in row)]))
    # As objects: pandas would turn an integer column with a gap into decimals.
    text: str = pd.DataFrame(cells, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")
    return text


def _csv_cell(value: object) -> object:
    if isinstance(value, str):
        # Bytes of file names that are not UTF-8; and pandas does not quote a carriage return, which would begin a row.
        text = value.encode("utf-8", "backslashreplace").decode().replace("\r\n", "\n").replace("\r", "\n")
        return f"'{text}" if text.startswith(_FORMULA_STARTS) else text  # a spreadsheet shows the quoted text
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # measured, unlike an empty cell
    return json.dumps(value) if isinstance(value, list | tuple | dict | bool) else value


def final_latex(summary: Mapping[str, Any]) -> str:
    """Return table environments: mean $\\pm$ 95 % interval in percent, one row for each configuration.

    summary: see `study/summary.py`. Before `finalize` the table has the confirmed validation numbers, before those the
    searched ones; the caption says which. Refits that compare with published numbers are in a further table for each
    data set and protocol, above the published ones. The only package needed is booktabs.
    """
    if summary["final"]:
        names, rows = main_metrics(summary), _final_rows(summary)
        about = "on the test classes, untrained networks for comparison"
    elif summary["confirm"]:
        names = [summary["metric"]]
        rows = [[_latex(row["label"]), _latex_score(row)] for row in summary["confirm"]]
        about = "of the confirmed configurations on the validation classes"
    else:
        names = [summary["metric"]]
        best = summary["search"][:10]
        rows = [[_latex(f"{row['trial']}: {row['recipe']}"), _latex_percent(row["best"])] for row in best]
        over = {row.get("num_folds", 1) for row in best}
        what = "one run each" if max(over, default=1) == 1 else f"means over {max(over)} folds"
        what += ", those of one run below them" if len(over) > 1 else ""
        about = f"of the best trials on the validation classes, {what}"
    caption = f"Study {_latex(summary['study'])}: {_latex(', '.join(map(metric_name, names)))} {about}, in percent"
    if summary["final"] or summary["confirm"]:
        runs = max((one.num_runs or 1 for one in final_models(summary)), default=0)
        runs = runs or max((row["num_runs"] for row in summary["confirm"]), default=1)
        caption += f"; mean $\\pm$ 95\\,\\% t interval over up to {counted(runs, 'run')}"
    tables = [_latex_table(names, rows, caption)]
    tables += [_published_latex(summary, group) for group in published_groups(summary) if group.ours]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(tables)


def _latex_table(names: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    header = ["", *(_latex(metric_label(name)) for name in names)]
    styled = pd.DataFrame(rows, columns=header, dtype=object).style.hide(axis="index")
    text: str = styled.to_latex(
        hrules=True, column_format="l" + "r" * len(names), caption=f"{caption}.", position_float="centering"
    )
    return text


def _final_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each kind of models; the first of a configuration has its label."""
    rows, names, labelled = [], main_metrics(summary), set()
    for one in final_models(summary, ("refit", "metrics", "ensemble", "untrained")):
        scores = [_latex_score(one.scores.get(name)) for name in names]
        if one.row["letter"] in labelled:
            rows.append([f"\\quad {_latex(one.title)}", *scores])
        else:
            labelled.add(one.row["letter"])
            title = f"{one.row['label']}, {one.title}" if one.kind == "refit" else one.row["label"]
            rows.append([_latex(title) + (f" ({_latex(one.remark)})" if not one.scores else ""), *scores])
    return rows


def _published_latex(summary: Mapping[str, Any], group: PublishedGroup) -> str:
    """Return ours, then the published ones below a rule. The deviation of a published number is no interval and is left
    out of a column of intervals."""
    rows = [
        [_latex(f"{row['label']}, refit"), *(_latex_score(scores.get(name)) for name in group.metrics)]
        for row, scores in group.ours
    ]
    for number, entry in enumerate(group.shown):
        mark = r"$^\ast$" if entry["chosen_on_test"] else r"$^\dagger$" if entry["chosen_on_test"] is None else ""
        means = [entry["metrics"].get(name, {"mean": None})["mean"] for name in group.metrics]
        rule = "" if number else "\\midrule\n"
        facts = ", ".join(str(fact) for fact in (entry["backbone"], entry["embedding_dim"]) if fact is not None)
        title = f"{published_name(entry)} ({facts})" if facts else published_name(entry)
        rows.append([rule + _latex(title) + mark, *map(_latex_percent, means)])
    caption = f"Study {_latex(summary['study'])} beside published numbers of {_latex(group.title)}, in percent; "
    caption += "$^\\ast$: epoch chosen on the test classes, $^\\dagger$: not known whether it was"
    return _latex_table(group.metrics, rows, caption)


def _latex(value: object) -> str:
    return str(value).translate(_LATEX)


def _latex_percent(value: float | None) -> str:
    return "--" if value is None else f"{100 * value:.1f}"


def _latex_score(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] is None:
        return "--"
    half_width = score["half_width"]
    return _latex_percent(score["mean"]) + ("" if half_width is None else f" $\\pm$ {100 * half_width:.1f}")
