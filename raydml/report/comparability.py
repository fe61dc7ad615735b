"""Which test numbers of a study compare with published ones, and the published numbers that are printed beside them.

Published models are trained on all training classes of a benchmark. The score of a model that left classes out for
validation is never printed beside theirs; that of a refit on the development classes is. No score is where the images
are not the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raydml.data.benchmarks import BENCHMARK_OF, BENCHMARKS, metric_prefix

#: Whether the source of a published number chose the epoch on the test classes, in words.
CHOSEN_ON_TEST = {True: "chosen on test", False: "", None: "unknown whether chosen on test"}

HOW_TO_COMPARE = (
    "*Chosen on test* means that the epoch was selected on these test classes. *Unknown whether chosen on test* means "
    "that the source does not say how the epoch was selected. Without a mark it was not selected on the test classes, "
    "and ours never is."
)
NONE_COMPARES = "No number of this study is comparable to these; the test results say why."
_ADD_A_REFIT = "For a model that leaves none out, add `refit: {seeds: 3}` below `study:` in the search space."
_RUN_AS_PUBLISHED = "To train a published system exactly as published, run its search space with `--recipe published`."
_MAX_PUBLISHED, _NUM_BEST_PUBLISHED = 10, 4

#: A summary, or a part of one, by name.
Values = Mapping[str, Any]


class PublishedGroup(NamedTuple):
    """The published numbers of one data set under one protocol, and ours that compare with them.

    metrics: names of the columns, the first one ranks. ours: our rows, each with its scores of this protocol; empty
    where no number of the study is comparable. theirs: published entries, the best last. shown: those of them that are
    not folded away.
    """

    dataset: str
    protocol: str
    metrics: list[str]
    ours: list[tuple[Values, Values]]
    theirs: list[Values]
    shown: list[Values]

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.protocol.replace('_', ' ')}"


def is_comparable(summary: Values, row: Values) -> bool:
    """Return whether the refit of a final configuration has scores that compare with published ones."""
    refit = row["refit"]
    is_scored = refit is not None and refit["classes"] == "development" and bool(refit["metrics"])
    return is_scored and not summary.get("smoke") and not summary.get("unlike_published")


class Comparability(NamedTuple):
    """Which of a study's test numbers is comparable to published ones, as a sentence, and why, with the cure."""

    verdict: str
    reason: str


def comparability(summary: Values) -> Comparability:
    """Return which test numbers of a study compare with published ones, and why.

    Of a data set without published numbers, the number to report is stated.
    """
    has_published = bool(summary["published"])
    none = "None of these numbers is comparable to published ones."
    if summary.get("smoke"):
        return Comparability(none, "The images are generated.")
    if differences := summary.get("unlike_published"):
        return Comparability(none, f"The images are not the published ones: {'; '.join(differences)}.")
    final = summary["final"]
    if any(is_comparable(summary, row) for row in final):
        others = any(row["metrics"] for row in final)
        verdict = f"{'Only the' if others else 'The'} refits are comparable to published numbers."
        subject = "As published models are, they" if has_published else "They"
        contrast = "; the other models left some of these classes out for validation" if others else ""
        reason = (
            f"{subject} are trained on all development classes, for a number of epochs that is fixed beforehand, and "
            f"scored with their last weights{contrast}."
        )
        return Comparability(verdict if has_published else "The scores of the refits are those to report.", reason)
    reason = "Each model left some of the development classes out for validation"
    if any(row["refit"] and row["refit"]["classes"] == "all" for row in final):
        reason += ", and the refits, which are trained on the test classes as well, have no score"
    if not has_published:
        return Comparability(
            "No model that was tested is trained on all development classes.", f"{reason}. {_ADD_A_REFIT}"
        )
    return Comparability(none, f"{reason}. {_ADD_A_REFIT} {_RUN_AS_PUBLISHED}")


def epochs_rule(summary: Values) -> str:
    """Return where the number of epochs of the refits comes from, as a sentence."""
    plan = summary["plan"]
    if "search" not in plan["stages"]:
        rule = "is that of the search space"
    elif plan["refit"] and plan["refit"]["epochs"] != "confirmed":
        rule = "is that of study.refit.epochs"
    elif plan["folds"]:
        rule = "was found in validation: the median of the best epochs of the confirmed runs"
    elif plan.get("search_folds", 1) > 1:
        rule = "was found in validation: the median of the best epochs of the searched trial on its folds"
    else:
        rule = "was found in validation: the best epoch of the searched trial"
    return f"The number of epochs {rule}."


def published_groups(summary: Values) -> list[PublishedGroup]:
    """Return the published numbers by data set and protocol, beside our comparable ones."""
    groups = []
    for dataset, protocol in dict.fromkeys((entry["dataset"], entry["protocol"]) for entry in summary["published"]):
        tested = [row for row in summary["final"] if _prefix(row, dataset, protocol) is not None]
        ours: list[tuple[Values, Values]] = [
            (row, _under(row, dataset, protocol, row["refit"]["metrics"]))
            for row in tested
            if is_comparable(summary, row)
        ]
        theirs = [
            entry for entry in summary["published"] if (entry["dataset"], entry["protocol"]) == (dataset, protocol)
        ]
        printed = list(dict.fromkeys(name for entry in theirs for name in entry["metrics"]))
        scored = [{**(row["refit"] or {"metrics": {}})["metrics"], **row["metrics"]} for row in tested]
        measured = [_under(row, dataset, protocol, scores) for row, scores in zip(tested, scored, strict=True)]
        names = [name for name in dict.fromkeys(name for scores in measured for name in scores) if name in printed]
        theirs = [entry for entry in theirs if any(name in entry["metrics"] for name in names)]
        if theirs:
            theirs.sort(key=lambda entry: entry["metrics"].get(names[0], {"mean": 0.0})["mean"])
            backbones = {row["backbone"] for row in tested}
            groups.append(PublishedGroup(dataset, protocol, names, ours, theirs, _best(theirs, backbones)))
    return groups


def _prefix(row: Values, dataset: str, protocol: str) -> str | None:
    """Return how the names of a row's metrics begin that are of this data set and protocol; None where there are none.

    Those of a test list begin with it, and then with the protocol unless it is the first: ``small_recall_at_1``,
    ``small_one_gallery_image_recall_at_1``.
    """
    of_list = metric_prefix(row["dataset"], dataset)
    if of_list is None or f"{of_list}{protocol}" not in row["protocols"]:
        return None
    is_first = protocol == BENCHMARKS[BENCHMARK_OF[dataset]].protocols[0]
    return of_list if is_first else f"{of_list}{protocol}_"


def _under(row: Values, dataset: str, protocol: str, scores: Values) -> dict[str, Any]:
    """Return the scores of one data set and protocol by plain names."""
    prefix = _prefix(row, dataset, protocol) or ""
    return {name.removeprefix(prefix): score for name, score in scores.items() if name.startswith(prefix)}


def _best(theirs: Sequence[Values], backbones: set[str]) -> list[Values]:
    """Shorten a long list, best last, to the systems that the study ran and the best ones with our backbones."""
    if len(theirs) <= _MAX_PUBLISHED:
        return list(theirs)
    like_ours = [entry for entry in theirs if entry["backbone"] in backbones]
    best = (like_ours or theirs)[-_NUM_BEST_PUBLISHED:]
    return [entry for entry in theirs if entry["ours"] or any(entry is one for one in best)]


def published_name(entry: Values) -> str:
    """Return ``HIER`` or ``MIC: margin loss``."""
    return f"{entry['system']}: {entry['variant']}" if entry["variant"] else str(entry["system"])


def published_text(score: Values | None) -> str | None:
    """Return a published number and the deviation of its runs, which is no interval and therefore named."""
    if score is None:
        return None
    deviation = "" if score["deviation"] is None else f" (deviation {score['deviation']:.4f})"
    return f"{score['mean']:.4f}{deviation}"


def source_text(entry: Values) -> str:
    """Return the source of a published number, how it was checked, and whether its epoch was chosen on test."""
    return "; ".join(filter(None, [entry["source"], entry["status"], CHOSEN_ON_TEST[entry["chosen_on_test"]]]))
