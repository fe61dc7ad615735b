"""A study in sentences and as Markdown. The sentences head the page, the Markdown file and the terminal's output."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raydml.analysis.trials import ENDINGS, FAILURES
from raydml.metrics.names import interval_text, metric_label, metric_name
from raydml.ops.wording import counted

#: Whether the source of a published number chose the epoch on the test classes, in words.
CHOSEN_ON_TEST = {True: "chosen on test", False: "", None: "unknown whether chosen on test"}

SMOKE_WARNING = "Smoke run on generated images: it shows that the recipes run, and none of its numbers is a result."

HOW_TO_COMPARE = (
    "Published systems are trained on all training classes; ours leave some classes out for validation. *Chosen on "
    "test* means that the epoch was selected on these test classes. *Unknown whether chosen on test* means that the "
    "source does not say how the epoch was selected. Without a mark it was not selected on the test classes. Ours was "
    "selected on validation classes."
)
HOW_INTERVALS_ARE_MADE = (
    "Intervals are 95 % t intervals of the mean over folds and seeds. Differences are paired by fold and seed; their "
    "p-values are adjusted for all pairs by Holm's method. Folds share training classes, so intervals and p-values are "
    "somewhat too optimistic."
)
_MAIN_METRICS, _MAX_MAIN_METRICS = re.compile(r"recall_at_\d+|r_precision|map_at_r"), 7
_SCHEDULERS = {"asha": "ASHA", "sync": "synchronous halving"}
_NOT_INDEPENDENT = "Choices made after such a read are not independent of the test."
_MAX_PUBLISHED, _NUM_BEST_PUBLISHED = 10, 4
_MAX_SEARCHED = 10  # trials in the Markdown; trials.csv has all
_MARKDOWN = re.compile(r"([\\<>|\[\]])")  # what starts HTML, links, images and cells


class Findings(NamedTuple):
    """Sentences about each part of a study, the most important first. warnings: reasons to doubt the others."""

    question: list[str]
    winner: list[str]
    test: list[str]
    settled: list[str]
    cost: list[str]
    warnings: list[str]


def findings(summary: Mapping[str, Any]) -> Findings:
    """Return the findings of a study (see `study/summary.py`). A stage that has not ended has no sentences."""
    stability = summary["stability"]
    return Findings(
        question=_question(summary),
        winner=_winner(summary),
        test=_test(summary),
        settled=_settled(summary, stability) if stability else [],
        cost=_cost(summary["cost"]),
        warnings=_warnings(summary),
    )


def score_text(score: Mapping[str, Any] | None, decimals: int = 4) -> str | None:
    """Return ``0.7000 ± 0.0100``; None for a score that was not measured."""
    if score is None or score["mean"] is None:
        return None
    return interval_text(score["mean"], score["half_width"], decimals)


def published_text(score: Mapping[str, Any] | None) -> str | None:
    """Return a published number and the deviation of its runs, which is no interval and therefore named."""
    if score is None:
        return None
    deviation = "" if score["deviation"] is None else f" (deviation {score['deviation']:.4f})"
    return f"{score['mean']:.4f}{deviation}"


def source_text(entry: Mapping[str, Any]) -> str:
    """Return the source of a published number, how it was checked, and whether its epoch was chosen on test."""
    return "; ".join(filter(None, [entry["source"], entry["status"], CHOSEN_ON_TEST[entry["chosen_on_test"]]]))


def comparison_text(row: Mapping[str, Any]) -> str:
    """Return ``0.027 ± 0.038 (p = 0.51)``: the difference, its interval and the adjusted p."""
    decimals = 3 if row["difference"] >= 0.001 else 5
    text = interval_text(row["difference"], row["half_width"], decimals)
    return text if row["p_holm"] is None else f"{text} (p {p_text(row['p_holm'])})"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def hours_text(hours: float) -> str:
    """Return ``12.3 h``, ``4.5 min`` or ``12 s``."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def all_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Return the metrics of the test classes, the ranking metric first."""
    names = dict.fromkeys(name for row in summary["final"] for name in row["metrics"])
    first = summary["metric"].removeprefix("val_")
    return [*([first] if first in names else []), *(name for name in names if name != first)]


def main_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Return as many of these metrics as a table has room for: the ranking metric and those that papers print."""
    first, *others = all_metrics(summary)
    return [first, *(name for name in others if _MAIN_METRICS.fullmatch(name))][:_MAX_MAIN_METRICS]


def final_scores(summary: Mapping[str, Any], parts: Mapping[str, str]) -> tuple[list[str], list[list[Any]]]:
    """Return a header, and for each final configuration its scores: the ranking metric of every part, then the others.

    parts: key of a part -> its name in the header; a part without a score has no column. A missing score is None.
    """
    final, (first, *others) = summary["final"], main_metrics(summary)
    measured = [part for part in parts if any(first in row[part] for row in final)]
    header = [*(f"{metric_label(first)}, {parts[part]}" for part in measured), *map(metric_label, others)]
    cells = [*((part, first) for part in measured), *(("metrics", name) for name in others)]
    return header, [[row[part].get(name) for part, name in cells] for row in final]


def protocols_in_words(summary: Mapping[str, Any]) -> str:
    """Return how the test was run: "Leave one out: each of 90 images searches the 89 others; 5 classes."."""
    sentences = dict.fromkeys(sentence for row in summary["final"] for sentence in row["protocols"].values())
    return " ".join(f"{sentence[:1].upper()}{sentence[1:]}." for sentence in sentences)


def published_groups(summary: Mapping[str, Any]) -> list[tuple[str, str, list[str], list[Any], list[Any]]]:
    """Return (data set, protocol, names of the metrics both have, our rows, published entries with the best last)."""
    groups = []
    for dataset, protocol in dict.fromkeys((entry["dataset"], entry["protocol"]) for entry in summary["published"]):
        ours = [row for row in summary["final"] if row["dataset"] == dataset]
        theirs = [
            entry for entry in summary["published"] if (entry["dataset"], entry["protocol"]) == (dataset, protocol)
        ]
        measured = dict.fromkeys(name for row in ours for name in row["metrics"])
        names = [name for name in measured if any(name in entry["metrics"] for entry in theirs)]
        theirs = [entry for entry in theirs if any(name in entry["metrics"] for name in names)]
        theirs.sort(key=lambda entry: entry["metrics"].get(names[0], {"mean": 0.0})["mean"])
        if theirs:
            groups.append((dataset, protocol, names, ours, theirs))
    return groups


def best_published(theirs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Shorten a long list of published entries, best last, to the best and the systems that the study ran."""
    if len(theirs) <= _MAX_PUBLISHED:
        return list(theirs)
    best = theirs[-_NUM_BEST_PUBLISHED:]
    return [entry for entry in theirs if entry["ours"] or entry in best]


def _question(summary: Mapping[str, Any]) -> list[str]:
    plan, metric = summary["plan"], metric_name(summary["metric"])
    searched = f"{counted(plan['num_trials'], 'trial')} on {plan['dataset']}, ranked by {metric}"
    searched += f", of at most {counted(plan['epochs'], 'epoch')}" if plan["epochs"] else ""
    searched += {"none": ", without early stopping"}.get(
        plan["scheduler"], f", with early stopping ({_SCHEDULERS.get(plan['scheduler'])})"
    )
    question = summary["question"]
    sentences = [question[:1].upper() + question[1:]] if question else []
    sentences.append(f"{searched}.")
    if summary["confirm"]:
        runs = f"{counted(plan['folds'], 'fold')} × {counted(plan['seeds'], 'seed')}"
        number = len(summary["confirm"])
        top = "The best configuration was" if number == 1 else f"The top {number} configurations were"
        sentences.append(f"{top} re-trained on {runs}.")
    if 0 < len(summary["search"]) < plan["num_trials"]:
        sentences.append(f"The time limit ended the search after {len(summary['search'])} of these trials had started.")
    missing = [stage for stage in plan["stages"] if stage not in plan["finished"]]
    if missing:
        sentences.append(f"Not finished yet: {', '.join(missing)}.")
    return sentences


def _winner(summary: Mapping[str, Any]) -> list[str]:
    metric = metric_name(summary["metric"])
    if not summary["confirm"]:
        best = summary["best_so_far"]
        if best is None:
            return ["No epoch has ended yet."]
        name = f"{best['trial']} ({best['recipe']})"
        so_far = "" if summary["search"] else " so far"
        return [
            f"The best trial{so_far} is {name}: {metric} {best['best']:.4f} at epoch {best['epoch_of_best']}, one run."
        ]
    first = summary["confirm"][0]
    runs = f"{metric} {score_text(first)} over {counted(first['num_runs'], 'run')}"
    sentences = [f"{first['letter']} ({first['label']}) has the best mean: {runs}."]
    if len(summary["confirm"]) > 1:
        sentences.append(_lead(summary, summary["confirm"][1]))
    if len(summary["confirm"]) > 2:  # of two, the sentence before says it all
        sentences += [f"{sentence}." for sentence in summary["ranking_in_words"]]
    return sentences


def _lead(summary: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    pair = {summary["confirm"][0]["letter"], second["letter"]}
    found = [row for row in summary["comparisons"] if {row["better"], row["worse"]} == pair]
    if not found:
        return f"The difference from {second['letter']} ({second['label']}) was not tested."
    verdict = "a significant difference" if found[0]["is_real"] else "no significant difference"
    first = summary["confirm"][0]["letter"]
    return f"{first} leads {second['letter']} ({second['label']}) by {comparison_text(found[0])}: {verdict}."


def _test(summary: Mapping[str, Any]) -> list[str]:
    if not summary["final"]:
        return []
    first, (name, *_) = summary["final"][0], all_metrics(summary)
    scores = [first[part].get(name) for part in ("metrics", "untrained", "ensemble")]
    sentences = [f"{first['letter']} scores {metric_name(name)} {score_text(scores[0], 3)} on the test classes."]
    if scores[1]:
        sentences.append(f"The untrained network scores {score_text(scores[1], 3)}.")
    if scores[2]:
        sentences.append(f"The ensemble of its fold models scores {score_text(scores[2], 3)}.")
    if letters := _near_untrained(summary["final"], name):
        noun = "interval" if len(letters) == 1 else "intervals"
        verb = "reaches" if len(letters) == 1 else "reach"
        sentences.append(f"The {noun} of {', '.join(letters)} {verb} down to the score of the untrained network.")
    ranked = [sentence.replace("There is", "there is", 1) for sentence in summary["test_ranking_in_words"]]
    sentences += [f"On the test classes, {sentence}." for sentence in ranked]
    for dataset, _, names, ours, theirs in published_groups(summary):
        key = names[0]
        published = [entry["metrics"][key]["mean"] for entry in theirs if key in entry["metrics"]]
        # The winner on validation classes, even where another one is better here: final is in that order.
        best = next(row for row in ours if key in row["metrics"])
        value = best["metrics"][key]["mean"]
        num_below = sum(value > mean for mean in published)
        sentences.append(
            f"The validation winner ({best['letter']}, {metric_name(key)} {value:.3f}) exceeds {num_below} of "
            f"{counted(len(published), 'published number')} on {dataset}."
        )
    return sentences


def _settled(summary: Mapping[str, Any], stability: Mapping[str, Any]) -> list[str]:
    """Return whether the search has converged and, if not, the command that gives it the trials that it lacks."""
    verdict, missing, remark = stability["verdict"], stability["num_missing"], stability["remark"]
    remarks = [remark] if remark else []
    if stability["settled"]:
        return [f"The search has converged: {verdict}.", *remarks]
    if len(stability["ranking"]) < 2:
        return [f"Whether the search has converged cannot be judged: {verdict}.", *remarks]
    if missing is None:
        advice = "It would need more than 10 times as many trials"
    else:
        number = f"{'at least' if stability['is_lower_bound'] else 'about'} {counted(missing, 'more trial')}"
        advice = f"Run {number} (`resume {summary['study']} --num-trials {_num_trials(summary, missing)}`)"
    return [f"The search has not converged. {advice}: {verdict}.", *remarks]


def more_trials(summary: Mapping[str, Any]) -> int:
    """Return a ``--num-trials`` for a longer search: what it needs to converge, or twice as many where that is not
    known."""
    missing = (summary["stability"] or {}).get("num_missing")
    return _num_trials(summary, missing or len(summary["search"]))


def _num_trials(summary: Mapping[str, Any], num_missing: int) -> int:
    """Return the ``--num-trials`` with which a search has that many more; with grids it counts rounds through them."""
    plan = summary["plan"]
    needed = math.ceil((len(summary["search"]) + num_missing) / plan["num_grid_points"])
    return max(needed, plan["num_trials"] // plan["num_grid_points"])


def _near_untrained(final: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return the letters of the configurations whose interval reaches down to the untrained network's mean."""
    letters = []
    for row in final:
        score, untrained = row["metrics"].get(name), row["untrained"].get(name)
        if score and untrained and score["mean"] - (score["half_width"] or 0.0) <= untrained["mean"]:
            letters.append(row["letter"])
    return letters


def _cost(cost: Mapping[str, Any]) -> list[str]:
    hours, saved = (sum(stage[key] for stage in cost["stages"]) for key in ("hours", "hours_saved"))
    if not hours:
        return []
    sentences = [f"Training took {hours_text(hours)} of {cost['unit'].removesuffix('-hours')} time."]
    return sentences + ([f"Early stopping saved about {hours_text(saved)}."] if saved else [])


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    reads: Sequence[Mapping[str, Any]] = summary["test_reads"]
    warnings = [SMOKE_WARNING] if summary.get("smoke") else []
    # finalize tests networks one by one, and then ensembles of them ("finalize: ensemble of ...").
    others = [read for read in reads if not str(read.get("purpose")).startswith("finalize")]
    num_tested = sum(len(row["runs"]) for row in summary["final"])
    num_finalized = sum(read.get("purpose") == "finalize" for read in reads)
    if others:
        purposes = ", ".join(sorted({str(read.get("purpose", "a damaged line")) for read in others}))
        warnings.append(
            f"The test classes were read {counted(len(others), 'time')} outside finalize ({purposes}). "
            f"{_NOT_INDEPENDENT}"
        )
    for extension in summary["extensions"]:
        num_before = sum(str(read.get("time", "")) < extension["time"] for read in reads)
        if num_before:
            warnings.append(
                f"The test classes were read {counted(num_before, 'time')} before the search was given more than "
                f"{counted(extension['num_trials_before'], 'trial')}. {_NOT_INDEPENDENT}"
            )
    if summary["final"] and num_finalized > num_tested and not summary["extensions"]:
        warnings.append(
            f"finalize read the test classes {num_finalized} times for {num_tested} runs, because it was interrupted."
        )
    num_failed = sum(row["ended"] in FAILURES for row in summary["search"])
    if num_failed:
        warnings.append(f"{num_failed} of {counted(len(summary['search']), 'trial')} failed (see All trials).")
    if summary["confirm"] and min(row["num_runs"] for row in summary["confirm"]) < 3:
        warnings.append("Some configurations have fewer than 3 confirmation runs; their intervals are not reliable.")
    return warnings


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """Return the findings, then tables: test numbers, published numbers, confirmed configurations, the best trials.

    summary: see `study/summary.py`. A stage that has not ended has no table. Text that comes from the study is escaped:
    it cannot start HTML, a link, an image or a cell.
    """
    found = findings(summary)
    sentences = [*found.winner, *found.test, *found.settled, *found.cost]
    parts = [f"# Study {_escaped(summary['study'])}", *map(_escaped, found.question)]
    parts += ["\n".join(f"- {_escaped(sentence)}" for sentence in sentences)]
    parts += [f"> **Note** {_escaped(sentence)}" for sentence in found.warnings]
    parts += [*_test_table(summary), *_published_tables(summary), *_confirmed_table(summary), *_search_table(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _test_table(summary: Mapping[str, Any]) -> list[str]:
    """One table for all final configurations: the ranking metric beside the untrained network's, then the others."""
    if not summary["final"]:
        return []
    parts = {"metrics": "test", "ensemble": "ensemble", "untrained": "untrained", "validation": "validation"}
    header, scores = final_scores(summary, parts)
    rows = [
        [row["letter"], row["label"], *map(score_text, own)] for row, own in zip(summary["final"], scores, strict=True)
    ]
    table = _table(["", "configuration", *header], rows)
    return ["## Test results", _escaped(protocols_in_words(summary)), table]


def _published_tables(summary: Mapping[str, Any]) -> list[str]:
    """One table for each data set and protocol with published numbers: ours, then theirs, best last."""
    parts = []
    for dataset, protocol, names, ours, theirs in published_groups(summary):
        rows = [
            [f"**this study**: {row['letter']}, {row['label']}", row["backbone"], row["embedding_dim"]]
            + [score_text(row["metrics"].get(name)) for name in names]
            + [f"configuration `{row['configuration']}`"]
            for row in ours
        ]
        shown = best_published(theirs)
        for entry in shown:
            ran = f" (this study ran it: {', '.join(entry['ours'])})" if entry["ours"] else ""
            rows.append(
                [f"{entry['system']}: {entry['variant']}{ran}", entry["backbone"], entry["embedding_dim"]]
                + [published_text(entry["metrics"].get(name)) for name in names]
                + [source_text(entry)]
            )
        header = ["", "backbone", "dimensions", *(metric_name(name) for name in names), "source and status"]
        parts += [f"## Published numbers: {dataset}, {protocol.replace('_', ' ')}", _table(header, rows)]
        num_hidden = len(theirs) - len(shown)
        parts += [f"... and {num_hidden} more in report.html"] if num_hidden else []
        parts += [HOW_TO_COMPARE]
    return parts


def _confirmed_table(summary: Mapping[str, Any]) -> list[str]:
    if not summary["confirm"]:
        return []
    rows = [
        [row["letter"], row["label"], f"`{row['configuration']}`", row["from_trial"], score_text(row), row["num_runs"]]
        for row in summary["confirm"]
    ]
    title = f"## Confirmed: {metric_name(summary['metric'])} over folds and seeds"
    header = ["", "recipe", "configuration", "from", "mean ± 95 % interval", "runs"]
    return [title, _table(header, rows), HOW_INTERVALS_ARE_MADE]


def _search_table(summary: Mapping[str, Any]) -> list[str]:
    if not summary["search"]:
        return []
    rows = [
        [rank, row["trial"], row["recipe"], None if row["best"] is None else f"{row['best']:.4f}",
         row["epoch_of_best"], ENDINGS.get(row["ended"], row["ended"])]
        for rank, row in enumerate(summary["search"][:_MAX_SEARCHED], start=1)
    ]  # fmt: skip
    header = ["", "trial", "recipe", f"best {metric_name(summary['metric'])}", "at epoch", "ended"]
    num_hidden = len(summary["search"]) - len(rows)
    more = [f"... and {num_hidden} more in trials.csv"] if num_hidden else []
    return [f"## Search: {counted(len(summary['search']), 'trial')}", _table(header, rows), *more]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_escaped(value) for value in line) + " |" for line in lines)


def _escaped(value: object) -> str:
    """Return a value as one line of Markdown text; None is a dash."""
    return "–" if value is None else _MARKDOWN.sub(r"\\\1", str(value).replace("\n", " "))
