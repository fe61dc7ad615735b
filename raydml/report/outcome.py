"""The sections of the report's page about the outcome: test classes, published numbers, confirmed configurations.

Each function returns plain values for its macro in sections.html, or None where there is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydml.metrics.names import metric_label, metric_name
from raydml.report.charts import Whisker, WhiskerChart, whisker_chart
from raydml.report.tables import FoldedTable, TableCell, table
from raydml.report.text import (
    CHOSEN_ON_TEST,
    HOW_INTERVALS_ARE_MADE,
    HOW_TO_COMPARE,
    all_metrics,
    best_published,
    comparison_text,
    counted,
    findings,
    main_metrics,
    p_text,
    protocols_in_words,
    published_groups,
    published_text,
    score_text,
)

Values = Mapping[str, Any]

_PARTS = {
    "metrics": "test",
    "ensemble": "test, folds concatenated",
    "untrained": "test, untrained",
    "validation": "validation",
    "untrained_validation": "validation, untrained",
}


def findings_section(summary: Values) -> Values:
    found = findings(summary)
    groups = {
        "Question": found.question,
        "Winner": found.winner,
        "On the test classes": found.test,
        "Is the search settled": found.settled,
        "Cost": found.cost,
    }
    return {"warnings": found.warnings, "groups": [(title, group) for title, group in groups.items() if group]}


def final_section(summary: Values) -> Values | None:
    final = summary["final"]
    if not final:
        return None
    first, *others = main_metrics(summary)

    def is_measured(part: str, name: str) -> bool:
        return any(name in row[part] for row in final)

    parts = [part for part in ("metrics", "ensemble", "untrained", "validation") if is_measured(part, first)]
    header = ["", "configuration", *(f"{metric_label(first)}, {_PARTS[part]}" for part in parts)]
    header += [metric_label(name) for name in others]
    rows = [
        [TableCell(row["letter"], strong=True), row["label"], *(_score(row[part].get(first)) for part in parts)]
        + [_score(row["metrics"].get(name)) for name in others]
        for row in final
    ]
    means = [row["metrics"].get(first, {"mean": -1.0})["mean"] for row in final]
    every = []
    for part, title in _PARTS.items():  # a row for each metric, a column for each configuration
        names = [name for name in all_metrics(summary) if is_measured(part, name)]
        scores = [[metric_name(name), *(_score(row[part].get(name)) for row in final)] for name in names]
        every += [table(["metric", *(row["letter"] for row in final)], scores, caption=title)] if scores else []
    title = f"Test classes, {metric_label(first)}: every two configurations"
    return {
        "protocols": protocols_in_words(summary),
        "note": f"Columns without a note are of the test classes. {HOW_INTERVALS_ARE_MADE}",
        "whiskers": _test_whiskers(final, first),
        "table": table(
            header, rows, words=(0, 1), caption="Final configurations", emphasised=(means.index(max(means)),)
        ),
        "all_metrics": every,
        "comparisons": _comparisons(summary["test_comparisons"], title),
    }


def _score(score: Values | None) -> TableCell | None:
    """A mean with its interval in small letters; small distances have more decimals than shares."""
    is_tiny = score is not None and score["mean"] is not None and 0 < abs(score["mean"]) < 0.01
    text = score_text(score, decimals=6 if is_tiny else 3)
    if text is None:
        return None
    mean, _, interval = text.partition(" ")
    return TableCell(mean, small=interval)


def _test_whiskers(final: Sequence[Values], name: str) -> WhiskerChart | None:
    rows = [
        Whisker(
            row["letter"],
            row["label"],
            row["metrics"][name]["mean"],
            row["metrics"][name]["half_width"],
            [(_run_name(run), run["test"][name]) for run in row["runs"] if name in run["test"]],
            score_text(row["metrics"][name], decimals=3) or "",
        )
        for row in final
        if name in row["metrics"]
    ]
    untrained = [row["untrained"][name]["mean"] for row in final if name in row["untrained"]]
    reference = (min(untrained), "untrained") if untrained else None
    return whisker_chart(rows, x_label=f"{metric_name(name)}, test", reference=reference)


def _run_name(run: Values) -> str:
    return f"{run['trial']}, fold {run['fold']}, seed {run['seed']}"


def published_section(summary: Values) -> Values | None:
    groups = [_published_group(*group) for group in published_groups(summary)]
    note = HOW_TO_COMPARE.replace("*", "") + " Highlighted rows are ours and those of the systems that this study ran."
    return {"groups": groups, "note": note} if groups else None


def _published_group(
    dataset: str, protocol: str, names: Sequence[str], ours: Sequence[Values], theirs: Sequence[Values]
) -> Values:
    """Our rows, then the published ones, best last; a long table shows the best and the systems that this study ran."""
    title = f"{dataset}, {protocol.replace('_', ' ')}"
    mine: list[list[object]] = [
        [TableCell(f"this study: {row['letter']}, {row['label']}", strong=True)]
        + [_score(row["metrics"].get(name)) for name in names]
        + [row["backbone"], row["embedding_dim"], f"configuration {row['configuration']}"]
        for row in ours
    ]
    chosen = best_published(theirs)
    marked = [number for number, entry in enumerate(chosen, start=len(ours)) if entry["ours"]]
    header = ["", *(metric_label(name) for name in names), "backbone", "dimensions", "source and status"]
    words = (0, len(names) + 1, len(names) + 3)
    rows = [*mine, *(_published_row(entry, names) for entry in chosen)]
    shown = table(header, rows, words=words, caption=title, emphasised=(*range(len(ours)), *marked))
    every = table(header, [_published_row(entry, names) for entry in theirs], words=words, caption=title)
    is_shortened = len(chosen) < len(theirs)
    folded = FoldedTable(f"All {len(theirs)} published rows of {title}", every) if is_shortened else None
    return {"shown": shown, "every": folded}


def _published_row(entry: Values, names: Sequence[str]) -> list[object]:
    status = [entry["source"], entry["status"], CHOSEN_ON_TEST[entry["chosen_on_test"]]]
    tag = f"this study ran it: {', '.join(entry['ours'])}" if entry["ours"] else ""
    return [
        TableCell(f"{entry['system']}: {entry['variant']}", tag=tag),
        *(published_text(entry["metrics"].get(name)) for name in names),
        entry["backbone"],
        entry["embedding_dim"],
        "; ".join(word for word in status if word),
    ]


def confirmed_section(summary: Values) -> Values | None:
    confirmed, name = summary["confirm"], metric_name(summary["metric"])
    if not confirmed:
        return None
    rows = [
        Whisker(
            row["letter"],
            row["label"],
            row["mean"],
            row["half_width"],
            [(_run_name(run), run["value"]) for run in row["runs"] if run["value"] is not None],
            score_text(row, decimals=3) or "",
        )
        for row in confirmed
    ]
    details = [
        [row["letter"], row["label"], row["configuration"], row["from_trial"], score_text(row), row["num_runs"]]
        for row in confirmed
    ]
    header = ["", "configuration", "fingerprint", "from", "mean ± 95 % interval", "runs"]
    return {
        "whiskers": whisker_chart(rows, x_label=name),
        "ranking": [f"{sentence}." for sentence in summary["ranking_in_words"]],
        "comparisons": _comparisons(summary["comparisons"], "Every two configurations"),
        "as_table": FoldedTable(
            "The same as a table", table(header, details, words=(0, 1, 2, 3), caption=f"Confirmed: {name}")
        ),
        "note": HOW_INTERVALS_ARE_MADE,
    }


def _comparisons(comparisons: Sequence[Values], title: str) -> FoldedTable | None:
    if not comparisons:
        return None

    def p_cell(p: float | None) -> str | None:
        return None if p is None else p_text(p).removeprefix("= ")

    rows = [
        [f"{row['better']} above {row['worse']}", comparison_text(row).partition(",")[0], p_cell(row["p"]),
         p_cell(row["p_holm"]), p_cell(row.get("p_corrected")), "real" if row["is_real"] else "may be chance",
         row["num_pairs"]]
        for row in comparisons
    ]  # fmt: skip
    real = [number for number, row in enumerate(comparisons) if row["is_real"]]
    header = ["", "difference ± 95 % interval", "p", "p, Holm", "p, Holm, corrected for shared classes", "",
              "paired runs"]  # fmt: skip
    body = table(header, rows, words=(0, 5), caption=title, emphasised=real)
    return FoldedTable(f"{title}: {counted(len(rows), 'comparison')}, {len(real)} real", body)
