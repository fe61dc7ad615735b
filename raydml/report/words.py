"""What a study found, in sentences: the same at the head of the page, in Markdown and on the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raydml.metrics.intervals import Interval
from raydml.metrics.names import metric_name

#: How far a published number can be compared with ours.
CHOICES = {True: "chosen on test", False: "", None: "not known whether chosen on test"}

HOW_TO_COMPARE = (
    "Published numbers come from training on all training classes, where ours leave some out to validate on. Those "
    "marked *chosen on test* are of the epoch that was best on these very test classes; of those marked *not known "
    "whether chosen on test* the source does not say how the epoch was chosen; those without a mark were not chosen on "
    "them. Ours were chosen on validation classes."
)
HOW_INTERVALS_ARE_MADE = (
    "Intervals are 95 % t intervals of the mean over folds and seeds; differences are paired over the same folds and "
    "seeds, p-values adjusted by Holm's method for all pairs. Folds share training classes, so both are somewhat too "
    "optimistic."
)
_MAIN, _NUM_MAIN = re.compile(r"recall_at_\d+|r_precision|map_at_r"), 7
_MANY_PUBLISHED, _NUM_BEST_PUBLISHED = 10, 4


class Findings(NamedTuple):
    """Sentences, what matters first. warnings: what a careful reader must know before believing the rest."""

    asked: list[str]
    won: list[str]
    tested: list[str]
    settled: list[str]
    cost: list[str]
    warnings: list[str]


def findings(summary: Mapping[str, Any]) -> Findings:
    """The findings of a study (`study_summary.py`); a stage that has not ended has none."""
    return Findings(
        asked=_asked(summary),
        won=_won(summary),
        tested=_tested(summary),
        settled=_settled(summary),
        cost=_cost(summary["cost"]),
        warnings=_warnings(summary),
    )


def score_text(score: Mapping[str, Any] | None, decimals: int = 4) -> str | None:
    """``0.7000 ± 0.0100``; None for what was not measured."""
    if score is None or score["mean"] is None:
        return None
    return Interval(score["mean"], score["half_width"], 0).text(decimals=decimals)


def published_text(score: Mapping[str, Any] | None) -> str | None:
    """A published number and, in words, the deviation of its runs, which is no interval."""
    if score is None:
        return None
    deviation = "" if score["deviation"] is None else f" (deviation {score['deviation']:.4f})"
    return f"{score['mean']:.4f}{deviation}"


def comparison_text(row: Mapping[str, Any]) -> str:
    """``0.0273 ± 0.0383, p = 0.51``: the difference, its interval and the adjusted p."""
    text = Interval(row["difference"], row["half_width"], 0).text(decimals=4)
    return text if row["p_holm"] is None else f"{text}, p {p_text(row['p_holm'])}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def hours_text(hours: float) -> str:
    """``12.3 h``, ``4.5 min`` or ``12 s``."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def published_groups(summary: Mapping[str, Any]) -> list[tuple[str, str, list[str], list[Any], list[Any]]]:
    """(data set, protocol, names of the metrics both have, our rows, published entries with the best last)."""
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


def telling(theirs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of published entries, best last: all if they are few, else the best and the systems that the study ran."""
    if len(theirs) <= _MANY_PUBLISHED:
        return list(theirs)
    best = theirs[-_NUM_BEST_PUBLISHED:]
    return [entry for entry in theirs if entry["ours"] or entry in best]


def all_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Metrics of the test classes, that of the ranking first."""
    names = dict.fromkeys(name for row in summary["final"] for name in row["metrics"])
    first = summary["metric"].removeprefix("val_")
    return [*([first] if first in names else []), *(name for name in names if name != first)]


def protocols_in_words(summary: Mapping[str, Any]) -> str:
    """How the test classes were asked: "Leave one out: each of 90 images searches the 89 others; 5 classes."."""
    sentences = dict.fromkeys(sentence for row in summary["final"] for sentence in row["protocols"].values())
    return " ".join(f"{sentence[:1].upper()}{sentence[1:]}." for sentence in sentences)


def main_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Those of them that papers print, as many as a table has room for: the ranking metric and plain retrieval."""
    first, *others = all_metrics(summary)
    return [first, *(name for name in others if _MAIN.fullmatch(name))][:_NUM_MAIN]


# --- sentences --------------------------------------------------------------------------------------------------------


def _asked(summary: Mapping[str, Any]) -> list[str]:
    plan, metric = summary["plan"], metric_name(summary["metric"])
    searched = f"{counted(plan['num_trials'], 'trial')} on {plan['dataset']}, ranked by {metric}"
    searched += f", at most {counted(plan['epochs'], 'epoch')} each" if plan["epochs"] else ""
    searched += {"none": ", none stopped early"}.get(plan["scheduler"], f", stopped early by {plan['scheduler']}")
    question = summary["question"]
    sentences = [question[:1].upper() + question[1:]] if question else []
    sentences.append(f"{searched}.")
    if summary["confirm"]:
        runs = f"{counted(plan['folds'], 'fold')} of {counted(plan['seeds'], 'seed')}"
        sentences.append(f"{counted(len(summary['confirm']), 'configuration')} confirmed over {runs}.")
    missing = [stage for stage in plan["stages"] if stage not in plan["finished"]]
    if missing:
        sentences.append(f"Not finished yet: {', '.join(missing)}.")
    return sentences


def _won(summary: Mapping[str, Any]) -> list[str]:
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
        sentences += [f"{sentence}." for sentence in summary["ranking_in_words"]]
    return sentences


def _lead(summary: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    pair = {summary["confirm"][0]["letter"], second["letter"]}
    found = [row for row in summary["comparisons"] if {row["better"], row["worse"]} == pair]
    if not found:
        return f"Whether it beats {second['letter']} ({second['label']}) was not tested."
    verdict = "a real difference" if found[0]["is_real"] else "which may be chance"
    return f"It is ahead of {second['letter']} ({second['label']}) by {comparison_text(found[0])}: {verdict}."


def _tested(summary: Mapping[str, Any]) -> list[str]:
    if not summary["final"]:
        return []
    first, (name, *_) = summary["final"][0], all_metrics(summary)
    scores = [first[part].get(name) for part in ("metrics", "untrained", "ensemble")]
    text = f"On the test classes {first['letter']} has {metric_name(name)} {score_text(scores[0])}"
    text += f"; the same network untrained has {score_text(scores[1])}" if scores[1] else ""
    text += f"; its folds' embeddings concatenated have {score_text(scores[2])}" if scores[2] else ""
    sentences = [f"{text}.", *_trained_for_nothing(summary, name)]
    # Only a letter stands for itself in the middle of a sentence.
    ranked = [sentence.replace("These runs", "these runs", 1) for sentence in summary["test_ranking_in_words"]]
    sentences += [f"On the test classes {sentence}." for sentence in ranked]
    for dataset, _, names, ours, theirs in published_groups(summary):
        key = names[0]
        known = [entry for entry in theirs if key in entry["metrics"]]
        # The one chosen on validation classes, whatever the others reach here: final is in that order.
        best = next(row for row in ours if key in row["metrics"])
        value = best["metrics"][key]["mean"]
        above = sum(value > entry["metrics"][key]["mean"] for entry in known)
        sentences.append(
            f"Of {counted(len(known), 'published number')} of {metric_name(key)} on {dataset}, our winner on "
            f"validation ({best['letter']}, {value:.4f}) is above {above}."
        )
    return sentences


def _trained_for_nothing(summary: Mapping[str, Any], name: str) -> list[str]:
    """The configurations whose interval on the test classes reaches down to the untrained network's mean."""
    letters = []
    for row in summary["final"]:
        score, untrained = row["metrics"].get(name), row["untrained"].get(name)
        if score and untrained and score["mean"] - (score["half_width"] or 0.0) <= untrained["mean"]:
            letters.append(row["letter"])
    verb = "is" if len(letters) == 1 else "are"
    return [f"{', '.join(letters)} {verb} not clearly better there than the untrained network."] if letters else []


def _settled(summary: Mapping[str, Any]) -> list[str]:
    stability = summary["stability"]
    return [f"The search is {stability['verdict']}."] if stability else []


def _cost(cost: Mapping[str, Any]) -> list[str]:
    hours, saved = (sum(stage[key] for stage in cost["stages"]) for key in ("hours", "hours_saved"))
    if not hours:
        return []
    device = cost["unit"].removesuffix("-hours")
    text = f"Training cost {hours_text(hours)} of {device} time"
    return [text + (f"; stopping trials early saved about {hours_text(saved)}." if saved else ".")]


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    reads: Sequence[Mapping[str, Any]] = summary["test_reads"]
    warnings = []
    # finalize tests networks one by one, and then ensembles of them ("finalize: ensemble of ...").
    others = [read for read in reads if not str(read.get("purpose")).startswith("finalize")]
    tested = sum(len(row["runs"]) for row in summary["final"])
    finalized = sum(read.get("purpose") == "finalize" for read in reads)
    if others:
        purposes = ", ".join(sorted({str(read.get("purpose", "a damaged line")) for read in others}))
        warnings.append(
            f"The test classes were read {counted(len(others), 'time')} outside of finalize ({purposes}): a choice "
            "made after such a read has seen the test."
        )
    if summary["final"] and finalized > tested:
        warnings.append(f"finalize read the test classes {finalized} times for {tested} runs: it was interrupted.")
    failed = [row for row in summary["search"] if row["ended"] in ("non_finite_loss", "collapsed", "crashed")]
    if failed:
        warnings.append(f"{counted(len(failed), 'trial')} of {len(summary['search'])} failed; see how trials ended.")
    if summary["confirm"] and min(row["num_runs"] for row in summary["confirm"]) < 3:
        warnings.append("Some configurations were confirmed by fewer than 3 runs: their intervals say little.")
    return warnings
