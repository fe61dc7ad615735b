"""Sections of the report about the outcome: test classes, published numbers, confirmed configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydml.metrics.names import metric_label, metric_name
from raydml.report.charts import Whisker, whisker_rows
from raydml.report.markup import Markup, bullets, element, folded, joined, paragraph, table
from raydml.report.section import Section
from raydml.report.words import (
    CHOICES,
    HOW_INTERVALS_ARE_MADE,
    HOW_TO_COMPARE,
    all_metrics,
    comparison_text,
    counted,
    findings,
    main_metrics,
    p_text,
    protocols_in_words,
    published_groups,
    published_text,
    score_text,
    telling,
)

_PARTS = {
    "metrics": "test",
    "ensemble": "test, folds concatenated",
    "untrained": "test, untrained",
    "validation": "validation",
    "untrained_validation": "validation, untrained",
}


def result_sections(summary: Mapping[str, Any]) -> list[Section]:
    """The findings, and every part of the outcome that there is."""
    return [
        Section("findings", "What was found", _findings(summary)),
        Section("test", "Test classes", _test(summary)),
        Section("published", "Beside published numbers", _published(summary)),
        Section("confirmed", "Confirmed over folds and seeds", _confirmed(summary)),
    ]


def _findings(summary: Mapping[str, Any]) -> Markup:
    found = findings(summary)
    rows = {
        "Asked": found.asked,
        "Won": found.won,
        "On the test classes": found.tested,
        "Is the search settled": found.settled,
        "Cost": found.cost,
    }
    parts = [
        joined(element("dt", title), element("dd", *(paragraph(sentence) for sentence in sentences)))
        for title, sentences in rows.items()
        if sentences
    ]
    warned = bullets(found.warnings, class_="warnings") if found.warnings else Markup()
    return joined(warned, element("dl", *parts, class_="findings"))


# --- test classes -----------------------------------------------------------------------------------------------------


def _test(summary: Mapping[str, Any]) -> Markup:
    if not summary["final"]:
        return Markup()
    first, *others = main_metrics(summary)
    parts = [part for part in ("metrics", "ensemble", "untrained", "validation") if _measured(summary, part, first)]
    header = ["", "configuration", *(f"{metric_label(first)}, {_PARTS[part]}" for part in parts)]
    header += [metric_label(name) for name in others]
    rows = [
        [element("b", row["letter"]), row["label"], *(_number(row[part].get(first)) for part in parts)]
        + [_number(row["metrics"].get(name)) for name in others]
        for row in summary["final"]
    ]
    return joined(
        *([paragraph(protocols_in_words(summary))] if protocols_in_words(summary) else []),
        paragraph("Columns without a note are of the test classes. ", HOW_INTERVALS_ARE_MADE, class_="muted"),
        _test_whiskers(summary, first),
        table(header, rows, words=(0, 1), caption="Final configurations", emphasised=(_best(summary, first),)),
        folded("All metrics of the trained and of the untrained networks", _all_metrics(summary)),
        _comparisons(summary["test_comparisons"], f"Test classes, {metric_label(first)}: every two configurations"),
    )


def _all_metrics(summary: Mapping[str, Any]) -> Markup:
    """A table for each part: a row a metric, a column a configuration."""
    header = ["metric", *(row["letter"] for row in summary["final"])]
    tables = []
    for part, title in _PARTS.items():
        names = [name for name in all_metrics(summary) if _measured(summary, part, name)]
        rows = [[metric_name(name), *(_number(row[part].get(name)) for row in summary["final"])] for name in names]
        tables += [table(header, rows, caption=title)] if rows else []
    return element("div", *tables, class_="beside")


def _measured(summary: Mapping[str, Any], part: str, name: str) -> bool:
    return any(name in row[part] for row in summary["final"])


def _best(summary: Mapping[str, Any], name: str) -> int:
    means = [row["metrics"].get(name, {"mean": -1.0})["mean"] for row in summary["final"]]
    return means.index(max(means))


def _number(score: Mapping[str, Any] | None) -> Markup | None:
    """A mean with its interval, the interval smaller; distances may need more decimals than shares."""
    tiny = score is not None and score["mean"] is not None and 0 < abs(score["mean"]) < 0.01
    text = score_text(score, decimals=6 if tiny else 3)
    if text is None:
        return None
    mean, _, interval = text.partition(" ")
    return joined(mean, element("span", f" {interval}", class_="interval") if interval else "")


def _test_whiskers(summary: Mapping[str, Any], name: str) -> Markup:
    rows = [
        Whisker(
            row["letter"],
            row["label"],
            row["metrics"][name]["mean"],
            row["metrics"][name]["half_width"],
            [(_run_name(run), run["test"][name]) for run in row["runs"] if name in run["test"]],
            score_text(row["metrics"][name], decimals=3) or "",
        )
        for row in summary["final"]
        if name in row["metrics"]
    ]
    untrained = [row["untrained"][name]["mean"] for row in summary["final"] if name in row["untrained"]]
    return whisker_rows(
        rows, x_label=f"{metric_name(name)}, test", reference=(min(untrained), "untrained") if untrained else None
    )


def _run_name(run: Mapping[str, Any]) -> str:
    return f"{run['trial']}, fold {run['fold']}, seed {run['seed']}"


# --- published --------------------------------------------------------------------------------------------------------


def _published(summary: Mapping[str, Any]) -> Markup:
    parts = [_beside(*group) for group in published_groups(summary)]
    if not parts:
        return Markup()
    marked_words = "Rows that are set apart are ours and those of the systems that this study ran."
    return joined(*parts, paragraph(HOW_TO_COMPARE.replace("*", ""), " ", marked_words, class_="muted"))


def _beside(
    dataset: str, protocol: str, names: Sequence[str], ours: Sequence[Mapping[str, Any]], theirs: Sequence[Any]
) -> Markup:
    """Ours, then what was published, best last; where that is much, its best and the systems that this study ran."""
    title = f"{dataset}, {protocol.replace('_', ' ')}"
    mine: list[Sequence[object]] = [
        [element("b", f"this study: {row['letter']}, {row['label']}")]
        + [_number(row["metrics"].get(name)) for name in names]
        + [row["backbone"], row["embedding_dim"], f"configuration {row['configuration']}"]
        for row in ours
    ]
    chosen = telling(theirs)
    rows = [*mine, *(_published_row(entry, names) for entry in chosen)]
    marked = [number for number, entry in enumerate(chosen, start=len(ours)) if entry["ours"]]
    header = ["", *(metric_label(name) for name in names), "backbone", "dimensions", "source and standing"]
    words = (0, len(names) + 1, len(names) + 3)
    shown = table(header, rows, words=words, caption=title, emphasised=(*range(len(ours)), *marked))
    if len(chosen) == len(theirs):
        return shown
    every = table(header, [_published_row(entry, names) for entry in theirs], words=words, caption=title)
    return joined(shown, folded(f"All {len(theirs)} published rows of {title}", every))


def _published_row(entry: Mapping[str, Any], names: Sequence[str]) -> list[object]:
    ran = element("span", f"this study ran it: {', '.join(entry['ours'])}", class_="tag") if entry["ours"] else ""
    standing = [entry["source"], entry["status"], CHOICES[entry["chosen_on_test"]]]
    return [
        joined(f"{entry['system']}: {entry['variant']} ", ran),
        *(published_text(entry["metrics"].get(name)) for name in names),
        entry["backbone"],
        entry["embedding_dim"],
        "; ".join(word for word in standing if word),
    ]


# --- confirmed --------------------------------------------------------------------------------------------------------


def _confirmed(summary: Mapping[str, Any]) -> Markup:
    if not summary["confirm"]:
        return Markup()
    name = metric_name(summary["metric"])
    rows = [
        Whisker(
            row["letter"],
            row["label"],
            row["mean"],
            row["half_width"],
            [(_run_name(run), run["value"]) for run in row["runs"] if run["value"] is not None],
            score_text(row, decimals=3) or "",
        )
        for row in summary["confirm"]
    ]
    details = [
        [row["letter"], row["label"], row["configuration"], row["from_trial"], score_text(row), row["num_runs"]]
        for row in summary["confirm"]
    ]
    header = ["", "configuration", "fingerprint", "from", "mean ± 95 % interval", "runs"]
    return joined(
        paragraph("Large dots are means, lines their intervals, small dots single runs (a fold and a seed)."),
        whisker_rows(rows, x_label=name),
        bullets([f"{sentence}." for sentence in summary["ranking_in_words"]]),
        _comparisons(summary["comparisons"], "Every two configurations"),
        folded("The same as a table", table(header, details, words=(0, 1, 2, 3), caption=f"Confirmed: {name}")),
        paragraph(HOW_INTERVALS_ARE_MADE, class_="muted"),
    )


def _comparisons(comparisons: Sequence[Mapping[str, Any]], title: str) -> Markup:
    if not comparisons:
        return Markup()
    rows = [
        [f"{row['better']} above {row['worse']}", comparison_text(row).partition(",")[0],
         None if row["p"] is None else p_text(row["p"]).removeprefix("= "),
         None if row["p_holm"] is None else p_text(row["p_holm"]).removeprefix("= "),
         None if row.get("p_corrected") is None else p_text(row["p_corrected"]).removeprefix("= "),
         "real" if row["is_real"] else "may be chance", row["num_pairs"]]
        for row in comparisons
    ]  # fmt: skip
    real = [number for number, row in enumerate(comparisons) if row["is_real"]]
    header = [
        "",
        "difference ± 95 % interval",
        "p",
        "p, Holm",
        "p, Holm, corrected for shared classes",
        "",
        "paired runs",
    ]
    body = table(header, rows, words=(0, 5), caption=title, emphasised=real)
    return folded(f"{title}: {counted(len(rows), 'comparison')}, {len(real)} real", body)
