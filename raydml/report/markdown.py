"""A study's results as Markdown: short, what matters first; the page and the CSV files have the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydml.analysis.trials import ENDINGS
from raydml.metrics.names import metric_label, metric_name
from raydml.report.words import (
    CHOICES,
    HOW_INTERVALS_ARE_MADE,
    HOW_TO_COMPARE,
    counted,
    findings,
    main_metrics,
    protocols_in_words,
    published_groups,
    published_text,
    score_text,
    telling,
)

NUM_SHOWN = 10  # trials of the search; all of them are in trials.csv


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """The findings in words, then the test numbers, those published, the confirmed configurations, the best trials.

    summary: as `study_summary.py` describes it. A stage that has not ended has no table.
    """
    found = findings(summary)
    sentences = [*found.won, *found.tested, *found.settled, *found.cost]
    parts = [f"# Study {_cell(summary['study'])}", *(_cell(sentence) for sentence in found.asked)]
    parts += ["\n".join(f"- {_cell(sentence)}" for sentence in sentences)]
    parts += [f"> **Note** {_cell(sentence)}" for sentence in found.warnings]
    parts += [*_test(summary), *_published(summary), *_confirmed(summary), *_search(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _test(summary: Mapping[str, Any]) -> list[str]:
    """One table for all final configurations: the ranking metric beside the untrained network's, then the others."""
    if not summary["final"]:
        return []
    first, *others = main_metrics(summary)
    with_ensemble = any(row["ensemble"] for row in summary["final"])
    label = metric_label(first)
    header = ["", "configuration", f"{label}, test", *([f"{label}, concatenated"] if with_ensemble else [])]
    header += [f"{label}, untrained", f"{label}, validation", *(metric_label(name) for name in others)]
    rows = [
        [row["letter"], row["label"], score_text(row["metrics"].get(first))]
        + ([score_text(row["ensemble"].get(first))] if with_ensemble else [])
        + [score_text(row[part].get(first)) for part in ("untrained", "validation")]
        + [score_text(row["metrics"].get(name)) for name in others]
        for row in summary["final"]
    ]
    asked = protocols_in_words(summary)
    return ["## Test classes", *([asked] if asked else []), _table(header, rows)]


def _published(summary: Mapping[str, Any]) -> list[str]:
    """A table for each data set and protocol that somebody published numbers of: ours, then theirs, best last."""
    parts = []
    for dataset, protocol, names, ours, theirs in published_groups(summary):
        rows = [
            [f"**this study**: {row['letter']}, {row['label']}", row["backbone"], row["embedding_dim"]]
            + [score_text(row["metrics"].get(name)) for name in names]
            + [f"configuration `{row['configuration']}`"]
            for row in ours
        ]
        shown = telling(theirs)
        for entry in shown:
            ran = f" (this study ran it: {', '.join(entry['ours'])})" if entry["ours"] else ""
            choice = f"; {CHOICES[entry['chosen_on_test']]}" if CHOICES[entry["chosen_on_test"]] else ""
            rows.append(
                [f"{entry['system']}: {entry['variant']}{ran}", entry["backbone"], entry["embedding_dim"]]
                + [published_text(entry["metrics"].get(name)) for name in names]
                + [f"{entry['source']}; {entry['status']}{choice}"]
            )
        header = ["", "backbone", "dimensions", *(metric_name(name) for name in names), "source and standing"]
        parts += [f"## Published numbers: {dataset}, {protocol.replace('_', ' ')}", _table(header, rows)]
        hidden = len(theirs) - len(shown)
        parts += [f"... and {hidden} more in report.html"] if hidden else []
        parts += [HOW_TO_COMPARE]
    return parts


def _confirmed(summary: Mapping[str, Any]) -> list[str]:
    if not summary["confirm"]:
        return []
    rows = [
        [row["letter"], row["label"], f"`{row['configuration']}`", row["from_trial"], score_text(row), row["num_runs"]]
        for row in summary["confirm"]
    ]
    title = f"## Confirmed: {metric_name(summary['metric'])} over folds and seeds"
    header = ["", "recipe", "configuration", "from", "mean ± 95 % interval", "runs"]
    return [title, _table(header, rows), HOW_INTERVALS_ARE_MADE]


def _search(summary: Mapping[str, Any]) -> list[str]:
    if not summary["search"]:
        return []
    rows = [
        [rank, row["trial"], row["recipe"], None if row["best"] is None else f"{row['best']:.4f}",
         row["epoch_of_best"], ENDINGS.get(row["ended"], row["ended"])]
        for rank, row in enumerate(summary["search"][:NUM_SHOWN], start=1)
    ]  # fmt: skip
    header = ["", "trial", "recipe", f"best {metric_name(summary['metric'])}", "at epoch", "ended"]
    hidden = len(summary["search"]) - len(rows)
    more = [f"... and {hidden} more in trials.csv"] if hidden else []
    return [f"## Search: {counted(len(summary['search']), 'trial')}", _table(header, rows), *more]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
