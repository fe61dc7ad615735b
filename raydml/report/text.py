"""A study in sentences and as Markdown. The sentences head the page, the Markdown file and the terminal's output."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raydml.analysis.trials import ENDINGS, FAILURES, folds_text
from raydml.data.benchmarks import TEST_LISTS
from raydml.evaluation.protocols import PROTOCOLS
from raydml.inference.footprint import MEASURES, measure_text
from raydml.metrics.names import interval_text, metric_label, metric_name
from raydml.ops.wording import counted, hours_text
from raydml.report.comparability import (
    HOW_TO_COMPARE,
    NONE_COMPARES,
    comparability,
    epochs_rule,
    is_comparable,
    published_groups,
    published_name,
    published_text,
    source_text,
)

SMOKE_WARNING = "Smoke run on generated images: it shows that the recipes run, and none of its numbers is a result."

HOW_INTERVALS_ARE_MADE = (
    "Intervals are 95 % t intervals of the mean over folds and seeds. Differences are paired by fold and seed; their "
    "p-values are adjusted for all pairs by Holm's method. Folds share training classes, so intervals and p-values are "
    "somewhat too optimistic."
)
#: Kinds of models that are tested, in order of display.
MODEL_KINDS = ("refit", "metrics", "ensemble", "untrained", "validation")
HOW_INTERVALS_OF_SEEDS_ARE_MADE = "Intervals are 95 % t intervals of the mean over seeds."
_MAIN_METRICS, _MAX_MAIN_METRICS = re.compile(r"recall_at_\d+|r_precision|map_at_r"), 7
_SCHEDULERS = {
    "asha": "ASHA", "sync": "synchronous halving", "promotion": "ASHA with promotion", "pasha": "PASHA",
}  # fmt: skip
_LIMITS = {"time": "The time limit", "budget": "The budget", "settled": "Its settled ranking"}
_NOT_INDEPENDENT = "Choices made after such a read are not independent of the test."
_MAX_SEARCHED = 10  # trials in the Markdown; trials.csv has all
_MARKDOWN = re.compile(r"([\\<>|\[\]])")  # what starts HTML, links, images and cells


class Findings(NamedTuple):
    """Sentences about each part of a study, the most important first. warnings: reasons to doubt the others."""

    question: list[str]
    winner: list[str]
    refit: list[str]
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
        refit=_refit(summary),
        test=_test(summary),
        settled=_settled(summary, stability) if stability else [],
        cost=_cost(summary["cost"], summary.get("forecast")),
        warnings=_warnings(summary),
    )


def score_text(score: Mapping[str, Any] | None, decimals: int = 4) -> str | None:
    """Return ``0.7000 ± 0.0100``; None for a score that was not measured."""
    if score is None or score["mean"] is None:
        return None
    return interval_text(score["mean"], score["half_width"], decimals)


def comparison_text(row: Mapping[str, Any]) -> str:
    """Return ``0.027 ± 0.038 (p = 0.51)``: the difference, its interval and the adjusted p."""
    decimals = 3 if row["difference"] >= 0.001 else 5
    text = interval_text(row["difference"], row["half_width"], decimals)
    return text if row["p_holm"] is None else f"{text} (p {p_text(row['p_holm'])})"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def all_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Return the metrics of the test classes, the ranking metric first; none where no model was scored."""
    scores = [part for row in summary["final"] for part in (row["metrics"], (row["refit"] or {}).get("metrics", {}))]
    names = dict.fromkeys(name for part in scores for name in part)
    first = summary["metric"].removeprefix("val_")
    return [*([first] if first in names else []), *(name for name in names if name != first)]


def main_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Return as many of these metrics as a table has room for: the ranking metric, the same on each test list of the
    data set and each extra test, and those that papers print."""
    names = all_metrics(summary)
    lists = dict.fromkeys(one for row in summary["final"] for one in TEST_LISTS.get(row["dataset"], {}).values())
    lists |= dict.fromkeys(one for row in summary["final"] for one in row.get("extra_tests", ()))
    of_lists = [f"{one}_{name}" for name in names[:1] for one in lists if f"{one}_{name}" in names]
    others = [name for name in names[1:] if _MAIN_METRICS.fullmatch(name)]
    return [*names[:1], *of_lists, *others][:_MAX_MAIN_METRICS]


class ScoredModels(NamedTuple):
    """Models of one final configuration that were scored together.

    row: the configuration. kind: of `final_models`. title: what they are. num_runs: over how many the scores are means;
    None where there is no such number. scores: metric -> mean and interval; empty for models that are never scored.
    remark: what a reader must know of them.
    """

    row: Mapping[str, Any]
    kind: str
    title: str
    num_runs: int | None
    scores: Mapping[str, Any]
    remark: str = ""


def final_models(summary: Mapping[str, Any], kinds: Sequence[str] = MODEL_KINDS) -> list[ScoredModels]:
    """Return what was tested of each final configuration: its refits, its fold models, their ensemble and so on."""
    return [one for row in summary["final"] for one in _models_of(summary, row) if one.kind in kinds]


def _models_of(summary: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[ScoredModels]:
    validated = "fold models" if summary["plan"]["folds"] else "searched trial"
    refit = row["refit"]
    title = _epochs_text(refit) + _lost_seeds_text(summary, refit["num_runs"]) if refit else ""
    if refit is not None and refit["classes"] == "all":
        remark = "trained on the test classes as well: never scored"
        yield ScoredModels(row, "refit", f"refit on all classes, {title}", refit["num_runs"], {}, remark)
    elif refit is not None:
        remark = "comparable" if is_comparable(summary, row) and summary["published"] else ""
        yield ScoredModels(row, "refit", f"refit, {title}", refit["num_runs"], refit["metrics"], remark)
    num_runs = len(row["runs"])
    # Of the refits where there are some: those are other networks than the untrained ones of the folds.
    untrained = (refit or {}).get("untrained") or row["untrained"]
    for kind, title, number, scores in (
        ("metrics", validated, num_runs, row["metrics"]),
        ("ensemble", f"ensemble of {validated}", None, row["ensemble"]),
        ("untrained", "untrained network", None, untrained),
        ("validation", f"{validated}, validation classes", num_runs, row["validation"]),
    ):
        if scores:
            yield ScoredModels(row, kind, title, number, scores)


def _lost_seeds_text(summary: Mapping[str, Any], num_runs: int) -> str:
    """Return ", 2 of 3 seeds" where fewer refits reached their end than were planned, else nothing."""
    planned = (summary["plan"].get("refit") or {}).get("seeds", num_runs)
    return f", {num_runs} of {counted(planned, 'seed')}" if num_runs < planned else ""


def _epochs_text(refit: Mapping[str, Any]) -> str:
    return counted(refit["epochs"], "epoch")


def protocols_in_words(summary: Mapping[str, Any]) -> list[str]:
    """Return how the test was run: "Leave one out: each of 90 images searches the 89 others; 5 classes.".

    The sentences about all images come first, then those of each test list.
    """
    found: dict[str, None] = {}
    for row in summary["final"]:
        lists = ["", *(f"{one}_" for one in TEST_LISTS.get(row["dataset"], {}).values())]
        order = [f"{one}{protocol}" for one in lists for protocol in PROTOCOLS]
        named = sorted(
            row["protocols"].items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)
        )
        found |= {sentence: None for _, sentence in named}
    return [f"{sentence[:1].upper()}{sentence[1:]}." for sentence in found]


def _question(summary: Mapping[str, Any]) -> list[str]:
    plan, metric = summary["plan"], metric_name(summary["metric"])
    question = summary["question"]
    sentences = [question[:1].upper() + question[1:]] if question else []
    if "search" not in plan["stages"]:
        configurations = counted(plan["num_trials"], "configuration")
        sentences.append(
            f"{configurations} on {plan['dataset']}, trained on all development classes for at most "
            f"{counted(plan['epochs'], 'epoch')}, without validation classes and without a search."
        )
        return [*sentences, *_unfinished(plan)]
    searched = f"{counted(plan['num_trials'], 'trial')} on {plan['dataset']}, ranked by {metric}"
    searched += f", of at most {counted(plan['epochs'], 'epoch')}" if plan["epochs"] else ""
    searched += {"none": ", without early stopping"}.get(
        plan["scheduler"], f", with early stopping ({_SCHEDULERS.get(plan['scheduler'])})"
    )
    sentences.append(f"{searched}.")
    if num := plan.get("num_from_results"):
        sentences.append(f"The searcher {plan['searcher']} drew {num} of them from results.")
    if names := plan.get("eliminated"):
        sentences.append(f"{' and '.join(names)} could not win any more, and got no further trials.")
    sentences += _further_folds(summary)
    if summary["confirm"]:
        runs = f"{counted(plan['folds'], 'fold')} × {counted(plan['seeds'], 'seed')}"
        number = len(summary["confirm"])
        top = "The best configuration was" if number == 1 else f"The top {number} configurations were"
        sentences.append(f"{top} re-trained on {runs}.")
    if 0 < len(summary["search"]) < plan["num_trials"]:
        limit = _LIMITS[plan.get("ended_by") or "time"]
        sentences.append(f"{limit} ended the search after {len(summary['search'])} of these trials had started.")
    return [*sentences, *_unfinished(plan)]


def _further_folds(summary: Mapping[str, Any]) -> list[str]:
    """Return how many configurations of a search on several folds have all of them, once it has ended."""
    rows, num_folds = summary["search"], summary["plan"].get("search_folds", 1)
    if num_folds == 1 or not rows:
        return []
    num_all = sum(row["num_folds"] > 1 for row in rows)
    if not num_all:
        return [
            f"No configuration has a mean over {num_folds} folds: all are ranked by their value on the first fold. "
            "`resume --num-trials` with the same number runs what a limit has kept from running."
        ]
    num_ended, num_pruned = sum(row["ended"] == "finished" for row in rows), sum(row["pruned"] for row in rows)
    sentences = [
        f"{counted(num_all, 'configuration')} with a mean over {num_folds} folds "
        f"{'is' if num_all == 1 else 'are'} ranked first, and the others by their value on the first fold."
    ]
    if num_pruned:
        sentences.append(
            f"Of {num_ended} that ran to their end, {num_pruned} {'was' if num_pruned == 1 else 'were'} significantly "
            "worse than the best on the first fold, and got no further folds."
        )
    return sentences


def _unfinished(plan: Mapping[str, Any]) -> list[str]:
    missing = [stage for stage in plan["stages"] if stage not in plan["finished"]]
    return [f"Not finished yet: {', '.join(missing)}."] if missing else []


def _winner(summary: Mapping[str, Any]) -> list[str]:
    metric = metric_name(summary["metric"])
    if "search" not in summary["plan"]["stages"]:
        return []
    if not summary["confirm"]:
        best = summary["best_so_far"]
        if best is None:
            return ["No epoch has ended yet."]
        name = f"{best['trial']} ({best['recipe']})"
        so_far = "" if summary["search"] else " so far"
        if (num_folds := best.get("num_folds", 1)) > 1:
            return [f"The best trial{so_far} is {name}: {metric} {best['best']:.4f}, the mean over {num_folds} folds."]
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


def _refit(summary: Mapping[str, Any]) -> list[str]:
    sentences = []
    for row in summary["refit"]:
        classes = "all classes, the test classes included," if row["classes"] == "all" else "all development classes"
        seeds = counted(len(row["runs"]), "seed")
        again = "trained" if "search" not in summary["plan"]["stages"] else "trained once more"
        sentences.append(
            f"{row['letter']} ({row['label']}) was {again} on {classes} for {_epochs_text(row)}, {seeds}; its last "
            "weights count."
        )
        if row["classes"] == "all":
            sentences.append("No image is left that these models could be tested on, so they are never scored.")
    return [*sentences, epochs_rule(summary)] if sentences else []


def _test(summary: Mapping[str, Any]) -> list[str]:
    models = {one.kind: one for one in final_models({**summary, "final": summary["final"][:1]}) if one.scores}
    if not models:
        return []
    name, letter = all_metrics(summary)[0], summary["final"][0]["letter"]
    texts = {kind: score_text(one.scores.get(name), 3) for kind, one in models.items()}
    sentences = []
    if texts.get("refit"):
        runs = counted(models["refit"].num_runs or 0, "run")
        sentences.append(
            f"The refit of {letter} scores {metric_name(name)} {texts['refit']} on the test classes ({runs})."
        )
        if texts.get("metrics"):
            noun, verb = ("Its fold models", "score") if summary["plan"]["folds"] else ("Its searched trial", "scores")
            sentences.append(f"{noun} {verb} {texts['metrics']}.")
    elif texts.get("metrics"):
        sentences.append(f"{letter} scores {metric_name(name)} {texts['metrics']} on the test classes.")
    if texts.get("ensemble"):
        sentences.append(f"The ensemble of its fold models scores {texts['ensemble']}.")
    if texts.get("untrained"):
        sentences.append(f"The untrained network scores {texts['untrained']}.")
    if letters := _near_untrained(summary, name):
        noun = "interval" if len(letters) == 1 else "intervals"
        verb = "reaches" if len(letters) == 1 else "reach"
        sentences.append(f"The {noun} of {', '.join(letters)} {verb} down to the score of the untrained network.")
    ranked = [sentence.replace("There is", "there is", 1) for sentence in summary["test_ranking_in_words"]]
    sentences += [f"On the test classes, {sentence}." for sentence in ranked]
    return [*sentences, *_beside_published(summary), comparability(summary).verdict]


def _beside_published(summary: Mapping[str, Any]) -> list[str]:
    """Return for each data set and protocol how many published numbers of the same backbone our first one exceeds."""
    sentences = []
    for group in published_groups(summary):
        key = group.metrics[0]
        found = [(row, scores[key]["mean"]) for row, scores in group.ours if key in scores]
        if not found:
            continue
        # The winner on validation classes, even where another one is better here: final is in that order.
        row, value = found[0]
        equal = [entry for entry in group.theirs if entry["backbone"] == row["backbone"] and key in entry["metrics"]]
        num_below = sum(value > entry["metrics"][key]["mean"] for entry in equal)
        if equal:
            sentences.append(
                f"The refit of {row['letter']} ({metric_name(key)} {value:.3f}) exceeds {num_below} of "
                f"{counted(len(equal), 'published number')} of {row['backbone']} on {group.title}."
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


def _near_untrained(summary: Mapping[str, Any], name: str) -> list[str]:
    """Return the letters of the configurations whose interval reaches down to the untrained network's mean."""
    letters = []
    for row in summary["final"]:
        models = {one.kind: one.scores.get(name) for one in _models_of(summary, row)}
        score, untrained = models.get("refit") or models.get("metrics"), models.get("untrained")
        if score and untrained and score["mean"] - (score["half_width"] or 0.0) <= untrained["mean"]:
            letters.append(row["letter"])
    return letters


def _cost(cost: Mapping[str, Any], forecast: Mapping[str, Any] | None) -> list[str]:
    hours, saved = (sum(stage[key] for stage in cost["stages"]) for key in ("hours", "hours_saved"))
    if not hours:
        return []
    sentences = [f"Training took {hours_text(hours)} of {cost['unit'].removesuffix('-hours')} time."]
    if (budget := cost.get("budget")) is not None:
        sentences.append(f"Of the {budget:g} {cost['unit']} allowed, {hours:.2f} were used.")
    sentences += [f"Early stopping saved about {hours_text(saved)}."] if saved else []
    return sentences + ([_forecast_error(forecast)] if forecast else [])


def _forecast_error(forecast: Mapping[str, Any]) -> str:
    """Return how far a forecast of the whole study was from what it took."""
    apart = forecast["seconds"] / forecast["took_seconds"] - 1
    kind = f"{abs(apart):.0%} too {'long' if apart > 0 else 'short'}" if round(abs(apart), 2) else "right"
    return (
        f"It took {hours_text(forecast['took_seconds'] / 3600)} from the first trial to the end; the forecast was "
        f"{hours_text(forecast['seconds'] / 3600)}, {kind}."
    )


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    reads: Sequence[Mapping[str, Any]] = summary["test_reads"]
    warnings = [SMOKE_WARNING] if summary.get("smoke") else []
    # finalize tests networks one by one, and then ensembles of them ("finalize: ensemble of ...").
    # A refit on all classes reads them to train (`_refit` says so).
    others = [read for read in reads if not str(read.get("purpose")).startswith(("finalize", "training"))]
    num_tested = sum(len(row["runs"]) + len((row["refit"] or {"runs": []})["runs"]) for row in summary["final"])
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
    refits = [row["refit"]["num_runs"] for row in summary["final"] if row["refit"] and row["refit"]["metrics"]]
    if refits and min(refits) < 3:
        warnings.append("Some configurations have fewer than 3 refits, too few for an interval.")
    if summary["confirm"] and min(row["num_runs"] for row in summary["confirm"]) < 3:
        warnings.append("Some configurations have fewer than 3 confirmation runs; their intervals are not reliable.")
    return warnings


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """Return the findings, then tables: test numbers, published numbers, confirmed configurations, the best trials.

    summary: see `study/summary.py`. A stage that has not ended has no table. Text that comes from the study is escaped:
    it cannot start HTML, a link, an image or a cell.
    """
    found = findings(summary)
    sentences = [*found.winner, *found.refit, *found.test, *found.settled, *found.cost]
    parts = [f"# Study {markdown_text(summary['study'])}", *map(markdown_text, found.question)]
    parts += ["\n".join(f"- {markdown_text(sentence)}" for sentence in sentences)]
    parts += [f"> **Note** {markdown_text(sentence)}" for sentence in found.warnings]
    parts += [*_test_table(summary), *_footprint_table(summary), *_published_tables(summary)]
    parts += [*_confirmed_table(summary), *_search_table(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _test_table(summary: Mapping[str, Any]) -> list[str]:
    """One table for all final configurations, and which of its rows compare with published numbers."""
    if not summary["final"]:
        return []
    names = main_metrics(summary)
    rows = [
        [one.row["letter"], one.row["label"], one.title + (f" ({one.remark})" if one.remark else ""), one.num_runs]
        + [score_text(one.scores.get(name)) for name in names]
        for one in final_models(summary)
    ]
    header = ["", "configuration", "models", "runs", *map(metric_label, names)]
    protocols = [markdown_text(sentence) for sentence in protocols_in_words(summary)]
    how = "\n".join(f"- {sentence}" for sentence in protocols) if len(protocols) > 1 else "".join(protocols)
    return ["## Test results", how, _table(header, rows), " ".join(comparability(summary))]


def footprint_rows(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the final configurations whose inference cost was measured; none of older studies."""
    return [row for row in summary["final"] if row.get("footprint")]


def _footprint_table(summary: Mapping[str, Any]) -> list[str]:
    """One row for each final configuration whose inference cost was measured."""
    found = footprint_rows(summary)
    if not found:
        return []
    rows = [
        [row["letter"], row["label"], *(measure_text(name, row["footprint"][name]) for name in MEASURES)]
        for row in found
    ]
    return ["## Inference cost", _table(["", "configuration", *MEASURES.values()], rows)]


def _published_tables(summary: Mapping[str, Any]) -> list[str]:
    """One table for each data set and protocol with published numbers: ours that compare, then theirs, best last."""
    parts: list[str] = []
    groups = published_groups(summary)
    for group in groups:
        rows = [
            [f"**this study**: refit of {row['letter']}, {row['label']}", row["backbone"], row["embedding_dim"]]
            + [score_text(scores.get(name)) for name in group.metrics]
            + [f"configuration `{row['configuration']}`"]
            for row, scores in group.ours
        ]
        for entry in group.shown:
            ran = f" (this study ran it: {', '.join(entry['ours'])})" if entry["ours"] else ""
            rows.append(
                [published_name(entry) + ran, entry["backbone"], entry["embedding_dim"]]
                + [published_text(entry["metrics"].get(name)) for name in group.metrics]
                + [source_text(entry)]
            )
        header = ["", "backbone", "dimensions", *map(metric_name, group.metrics), "source and status"]
        parts += [
            f"## Published numbers: {group.title}",
            NONE_COMPARES if group is groups[0] and not group.ours else "",
        ]
        parts += [_table(header, rows)]
        num_hidden = len(group.theirs) - len(group.shown)
        parts += [f"... and {num_hidden} more in report.html"] if num_hidden else []
    return [*parts, HOW_TO_COMPARE] if groups else []


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
    has_folds = summary["plan"].get("search_folds", 1) > 1
    rows = [
        [rank, row["trial"], row["recipe"], None if row["best"] is None else f"{row['best']:.4f}",
         row["epoch_of_best"], ENDINGS.get(row["ended"], row["ended"]), *([folds_text(row)] if has_folds else [])]
        for rank, row in enumerate(summary["search"][:_MAX_SEARCHED], start=1)
    ]  # fmt: skip
    header = ["", "trial", "recipe", f"best {metric_name(summary['metric'])}", "at epoch", "ended"]
    header += ["folds"] if has_folds else []
    num_hidden = len(summary["search"]) - len(rows)
    more = [f"... and {num_hidden} more in trials.csv"] if num_hidden else []
    return [f"## Search: {counted(len(summary['search']), 'trial')}", _table(header, rows), *more]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(markdown_text(value) for value in line) + " |" for line in lines)


def markdown_text(value: object) -> str:
    """Return a value as one line of Markdown text; None is a dash."""
    return "–" if value is None else _MARKDOWN.sub(r"\\\1", " ".join(str(value).splitlines()))
