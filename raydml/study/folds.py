"""Several folds in a search: which trials run on further folds, and how configurations then rank.

One fold misleads where it has few classes, or others than the rest. The search itself runs on one fold, and its
searcher and its scheduler know no other. Then each trial that ran to its end is compared with the best of them, class
by class on the validation classes of that fold, by Wilcoxon's signed-rank test, as in Optuna's `WilcoxonPruner`. Those
that are significantly worse are pruned. The others run on the further folds without early stopping, as trials such as
``search-003-fold-1``, and the mean over all folds is the value of their configuration.

All of this follows from the results on the first fold, so a study that is resumed, or searches on, decides again and
keeps the runs that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from raydml.analysis.trials import TrialState, further_key
from raydml.config.trial import StudySettings, Trial
from raydml.data.splits import further_folds
from raydml.study.events import rank

#: A trial is pruned where p is below it. It is that of Optuna's pruner, and not 0.05: a bad configuration that goes on
#: costs a run for each further fold, a good one that is pruned is only found again by a longer search. Fewer than four
#: classes give no p below it, so nothing is pruned then.
FOLD_LEVEL = 0.1
#: Differences are compared to so many decimals: equal means may differ in their last bits.
_DECIMALS = 12


def p_of_worse(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the p of the one-sided signed-rank test that values are worse than those of a reference.

    values, reference: of the same classes. Classes in which the two are equal count half for each side (``zsplit``), so
    a few other classes alone do not decide. For few classes p is exact, else from the normal approximation.
    """
    from scipy import stats

    differences = np.round(np.subtract(values, reference), _DECIMALS)
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="zsplit", alternative="less").pvalue)


def p_values_of(states: Iterable[TrialState]) -> dict[str, float | None]:
    """Return key -> p of the trials that ran to their end and have a value, best first.

    Each but the first is compared with the first. p is None of the first, and where the values of the classes are not
    known.
    """
    by_key = {state.trial: state for state in states if state.ended == "finished" and state.best is not None}
    found: dict[str, float | None] = {}
    reference: tuple[float, ...] = ()
    for row in rank(by_key.values()):
        values = by_key[row["trial"]].class_values
        is_tested = bool(found) and 0 < len(values) == len(reference)
        reference = reference if found else values
        found[row["trial"]] = p_of_worse(values, reference) if is_tested else None
    return found


def is_pruned(p: float | None) -> bool:
    """Return whether a trial with this p gets no further folds."""
    return p is not None and p < FOLD_LEVEL


def further_trials(
    tested: Mapping[str, float | None], trials: Mapping[str, Trial], study: StudySettings
) -> dict[str, tuple[str, Trial]]:
    """Return the runs on further folds: key -> the key of the searched trial, and the trial; best configuration first.

    tested: of `p_values_of`. trials: of the search, by key.
    """
    found = {}
    for searched in (key for key, p in tested.items() if not is_pruned(p)):
        data = trials[searched].data
        for fold in further_folds(data.split.fold, data.split.num_folds, study.search.folds):
            on_fold = data.model_copy(update={"split": data.split.model_copy(update={"fold": fold})})
            trial = trials[searched].model_copy(update={"data": on_fold})
            found[further_key(searched, fold)] = (searched, trial)
    return found


def note_on_pruned(tested: Mapping[str, float | None]) -> str:
    """Return in a sentence how many configurations get no further folds."""
    num_pruned = sum(map(is_pruned, tested.values()))
    if not tested:
        return "no configuration is trained on further folds: none ran to its end on the first"
    if len(tested) == 1:
        return "the only configuration that ran to its end on the first fold is trained on further folds"
    if not num_pruned:
        return (
            f"none of the {len(tested)} configurations that ran to their end is significantly worse than the best on "
            f"the first fold (Wilcoxon, p < {FOLD_LEVEL}): all of them are trained on further folds"
        )
    are = "is" if num_pruned == 1 else "are"
    return (
        f"{num_pruned} of {len(tested)} configurations {are} significantly worse than the best on the first fold "
        f"(Wilcoxon, p < {FOLD_LEVEL}) and {are} not trained on further folds"
    )


def rank_over_folds(
    states: Mapping[str, TrialState],
    tested: Mapping[str, float | None],
    further: Mapping[str, TrialState],
    num_folds: int,
) -> list[dict[str, Any]]:
    """Return the rows of `rank` for the trials on the first fold, those that have all folds first.

    A row has these keys as well: ``num_folds``, over how many folds its ``value`` is the mean (all or 1), ``p`` of
    `p_values_of`, ``pruned``, and ``runs``, that of the first fold first, each with ``trial``, ``fold``, ``value``,
    ``epoch_of_best`` and ``ended``. A configuration of which a run on a further fold did not reach its end, or has
    no value, does not have all folds: its value is that on the first one.

    states: of the trials on the first fold, by key. further: of those of the runs on other folds that count.
    """
    runs: dict[str, list[dict[str, Any]]] = {key: [_run(state)] for key, state in states.items()}
    for state in further.values():
        runs[state.searched].append(_run(state))
    rows = []
    for row in rank(states.values()):
        own, p = runs[row["trial"]], tested.get(row["trial"])
        has_all = len(own) == num_folds and all(run["ended"] == "finished" and run["value"] is not None for run in own)
        value = fmean(run["value"] for run in own) if has_all else row["value"]
        over = num_folds if has_all else 1
        rows.append({**row, "value": value, "num_folds": over, "p": p, "pruned": is_pruned(p), "runs": own})
    # `rank` has sorted those with one value: the sort is stable.
    return sorted(rows, key=lambda row: (-row["num_folds"], -row["value"] if row["num_folds"] > 1 else 0.0))


def lack_folds(rows: Iterable[Mapping[str, Any]], num_folds: int) -> bool:
    """Return whether a limit has kept runs on further folds from starting. rows: of `rank_over_folds`."""
    return any(
        row["ended"] == "finished" and not row.get("pruned") and len(row.get("runs", ())) < num_folds for row in rows
    )


def _run(state: TrialState) -> dict[str, Any]:
    return {
        "trial": state.trial,
        "fold": state.fold,
        "value": state.best,
        "epoch_of_best": state.epoch_of_best,
        "ended": state.ended,
    }


def runs_of_use(rows: Sequence[Mapping[str, Any]], keep: int) -> set[str]:
    """Return the keys of the runs whose checkpoints are kept after the search.

    The best ``keep`` configurations keep those of all their folds. The others that have all folds keep that of the
    first one: where a longer search compares with another trial, they may be ahead. rows: of `rank_over_folds`.
    """
    kept: set[str] = set()
    for place, row in enumerate(rows):
        runs = row["runs"] if place < keep else row["runs"][:1] if row["num_folds"] > 1 else []
        kept.update(run["trial"] for run in runs)
    return kept
