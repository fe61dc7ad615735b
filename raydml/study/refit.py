"""The stage refit: the best configurations once more, on all development classes, and what it ends with.

refit.json: [{"configuration" (fingerprint), "from_trial", "epochs", "best_epochs" (those whose median `epochs` is;
empty where `epochs` was given), "classes" (development or all), "runs": [{"trial", "seed", "ended"}]}], best
configuration first, each with the runs that reached their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydml.analysis.trials import TrialState
from raydml.config.refit import has_search, median_epochs, refit_trial, trains_on_test_classes
from raydml.config.trial import StudySettings, Trial, fingerprint
from raydml.ops.wording import counted
from raydml.study.events import StudyState, letters_of
from raydml.study.folder import RESULT_FILES, read_json

NEVER_SCORED = "trained on the test classes as well: nothing can be measured on them, so it is never scored"


def configurations_to_refit(folder: Path, state: StudyState, trials: Mapping[str, Trial]) -> list[dict[str, Any]]:
    """Return, best first, ``configuration``, ``from_trial`` and ``best_epochs`` of what the stages before have left.

    trials: of the search, by key. Without validation classes all of them, in their order, and without best epochs.
    """
    if not has_search(trials.values()):
        return [
            {"configuration": fingerprint(trial), "from_trial": key, "best_epochs": []} for key, trial in trials.items()
        ]
    confirmed = folder / RESULT_FILES["confirm"]
    if confirmed.exists():
        return [
            {
                "configuration": row["configuration"],
                "from_trial": row["from_trial"],
                "best_epochs": [state.trials[run["trial"]].epoch_of_best for run in row["runs"]],
            }
            for row in read_json(confirmed)
        ]
    return [
        {
            "configuration": row["fingerprint"],
            "from_trial": row["trial"],
            # Of a configuration that lacks a fold, the first one counts here as in the ranking.
            "best_epochs": [run["epoch_of_best"] for run in row.get("runs", [row])[: row.get("num_folds", 1)]],
        }
        for row in read_json(folder / RESULT_FILES["search"])
        if row["value"] is not None
    ]


def refit_trials(
    configurations: Sequence[Mapping[str, Any]], trials: Mapping[str, Trial], study: StudySettings
) -> list[dict[str, Any]]:
    """Return the refits of the best configurations: rows of the keys of a configuration, ``epochs`` and ``trial``.

    configurations: of `configurations_to_refit`. trials: of the search, by key.
    """
    assert study.refit is not None
    rows = []
    for row in configurations[: study.refit.top if has_search(trials.values()) else None]:
        searched, best_epochs = trials[row["from_trial"]], list(row["best_epochs"])
        if study.refit.epochs != "confirmed":
            epochs, best_epochs = study.refit.epochs, []
        else:
            epochs = median_epochs(best_epochs) if best_epochs else searched.epochs
        for seed in range(study.refit.seeds):
            trial = refit_trial(searched, epochs=epochs, classes=study.refit.classes, seed=study.seed + seed)
            rows.append({**row, "best_epochs": best_epochs, "epochs": epochs, "trial": trial})
    return rows


def notes_on_refits(rows: Sequence[Mapping[str, Any]], study: StudySettings, state: StudyState) -> list[str]:
    """Return a sentence for each configuration that says where its number of epochs comes from."""
    assert study.refit is not None
    letters, notes = letters_of(state), []
    for row in {row["configuration"]: row for row in rows}.values():
        name = letters.get(row["configuration"], row["from_trial"])
        listed = ", ".join(map(str, sorted(row["best_epochs"])))
        if study.refit.epochs != "confirmed":
            why = "as study.refit.epochs says"
        elif not row["best_epochs"]:
            why = "its own; without validation classes there is nothing to select by"
        elif study.confirm is None and len(row["best_epochs"]) > 1:
            why = f"the median of the best epochs {listed} of {row['from_trial']} on its folds"
        elif study.confirm is None:
            why = f"the best epoch of {row['from_trial']}"
        else:
            why = f"the median of the best epochs {listed} of its confirmed runs"
            why = why if len(row["best_epochs"]) > 1 else f"the best epoch of its confirmed run, {listed}"
        notes.append(f"refit of {name}: {counted(row['epochs'], 'epoch')}, {why}")
    if any(trains_on_test_classes(row["trial"]) for row in rows):
        notes.append(f"each refit is {NEVER_SCORED}")
    return notes


def refitted(rows: Mapping[str, Mapping[str, Any]], states: Mapping[str, TrialState]) -> list[dict[str, Any]]:
    """Return what refit.json contains. rows: of `refit_trials`, by the keys of their trials.

    A configuration of which no run reached its end is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, row in rows.items():
        if states[key].ended == "finished":
            named = {name: row[name] for name in ("configuration", "from_trial", "epochs", "best_epochs")}
            named |= {"classes": "all" if trains_on_test_classes(row["trial"]) else "development", "runs": []}
            run = {"trial": key, "seed": row["trial"].seed, "ended": states[key].ended}
            found.setdefault(row["configuration"], named)["runs"].append(run)
    return list(found.values())


def lost_refits(states: Iterable[TrialState]) -> list[TrialState]:
    """Return the refits that ended before their last epoch."""
    return [state for state in states if state.ended and state.ended != "finished"]
