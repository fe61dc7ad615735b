"""Results of a finished study: the model to take away, the runs worth pictures, the summary and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raydml.config.refit import has_search
from raydml.inference.footprint import footprint_metrics
from raydml.ops.files import write_whole
from raydml.study.events import read_state, read_trials
from raydml.study.folder import (
    RESULT_FILES,
    StudyError,
    is_whole,
    newest_checkpoint,
    read_json,
    read_study,
    stages_of,
    write_json,
)
from raydml.study.summary import histories, summarise

NUM_TOP_TRIALS = 3  # trials whose checkpoint, configuration and retrievals go to MLflow


def is_finished(folder: Path) -> bool:
    """Return whether every stage has its result and the study was recorded as finished: nothing is left to do.

    A result that is damaged is none: the study makes it anew.
    """
    if read_state(folder).state != "finished":
        return False
    study = read_study(folder)
    return all(is_whole(folder / RESULT_FILES[stage]) for stage in stages_of(study["study"], study["trials"]))


def trials_of(folder: Path, stage: str) -> list[str]:
    """Return the keys of the trials that the result of a stage is about; none without a result, and of finalize."""
    rows = _rows(folder, stage) if stage != "finalize" and is_whole(folder / RESULT_FILES[stage]) else []
    return [key for row in rows for key in _keys(row.get("runs") or [row])]


def _keys(runs: list[dict[str, Any]]) -> list[str]:
    return [run["trial"] for run in runs]


def refuse_lost_events(folder: Path) -> None:
    """Raise StudyError where the events of all trials are gone, and results of them are there.

    Without them there is no curve and no configuration of any trial, and MLflow would be emptied to match.
    """
    of_stages = {stage: trials for stage in RESULT_FILES if (trials := trials_of(folder, stage))}
    known = read_state(folder).trials if of_stages else {}  # not read for nothing: it may be large
    for stage, trials in of_stages.items():
        if not set(trials) & known.keys():
            raise StudyError(
                f"{folder / 'events.jsonl'} has no trial of the stage {stage}, whose result is "
                f"{folder / RESULT_FILES[stage]}. Cure: put it back from a backup, or make the study again under "
                "another name (sweep ... --name)"
            )


class Winner(NamedTuple):
    """The best checkpoint of a study, chosen on validation classes and never on the test classes."""

    trial: str  # key, refit-000, confirm-001 or search-003
    configuration: str  # fingerprint of the searched configuration
    checkpoint: Path


def find_winner(folder: Path) -> Winner:
    """Return the model to take away: a refit of the best configuration where there is one, else `find_validated`.

    Nothing validates a refit, so there is nothing to choose one by: the first seed counts. In a study without
    validation classes nothing ranks the configurations either, and the first counts. Raises StudyError while there is
    no model.
    """
    validated = _best_validated(folder)
    refits = _rows(folder, "refit")
    best = [row for row in refits if validated is None or row["configuration"] == validated[2]]
    if best:
        return _winner(folder, best[0]["runs"][0]["trial"], "refit", best[0]["configuration"])
    return find_validated(folder)


def find_validated(folder: Path) -> Winner:
    """Return the best run of the best confirmed configuration, or the best trial of a search that is not confirmed.

    Raises StudyError while there is none, and in a study without validation classes.
    """
    found = _best_validated(folder)
    if found is None:
        study = read_study(folder)
        if not has_search(study.get("trials", [])):
            raise StudyError(
                f"study {folder.name!r} has no run with validation classes, and no refit has ended. "
                f"Cure: launch.py resume {folder.name}"
            )
        raise StudyError(
            f"study {folder.name!r} has not ended its search. Cure: launch.py resume {folder.name}, or name a "
            f"checkpoint below {folder / 'search'}"
        )
    return _winner(folder, *found)


def best_that_validates(folder: Path) -> str:
    """Return the key of the run of `find_validated`, also where its checkpoint is gone; empty while there is none."""
    found = _best_validated(folder)
    return "" if found is None else found[0]


def _rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Return the result of a stage; empty while it has none."""
    path = folder / RESULT_FILES[stage]
    return list(read_json(path)) if path.exists() else []


def _best_validated(folder: Path) -> tuple[str, str, str] | None:
    """Return key, stage and configuration of the best run with validation classes; None while there is none."""
    if confirmed := _rows(folder, "confirm"):
        run = max(confirmed[0]["runs"], key=lambda run: run["value"])
        return run["trial"], "confirm", confirmed[0]["configuration"]
    if ranked := _rows(folder, "search"):
        return tested_run(folder, ranked[0]), "search", ranked[0]["fingerprint"]
    return None


def tested_run(folder: Path, row: Mapping[str, Any]) -> str:
    """Return the key of the run whose model stands for a configuration of the search. row: of its result.

    It is the trial on the first fold. Where that has lost its checkpoint, which happens where a longer search has made
    the best of a configuration that had none, it is the first run on another fold that has one.
    """
    keys = _keys(row.get("runs") or [])
    kept = (key for key in keys if newest_checkpoint(folder, "search", key, whole=False) is not None)
    return next(kept, row["trial"])


def _winner(folder: Path, key: str, stage: str, configuration: str) -> Winner:
    """Return a winner with its newest checkpoint. Raises StudyError where that is gone."""
    found = newest_checkpoint(folder, stage, key)
    if found is None:
        metric = read_study(folder)["select_on"]
        what = "is the model to take away" if stage == "refit" else f"is the best by {metric}"
        raise StudyError(
            f"study {folder.name!r}: {key} {what}, but it has no intact checkpoint "
            f"left. Cure: the exported model {folder / 'model'}, if it is there"
        )
    return Winner(key, configuration, found)


class MeanOfRuns(NamedTuple):
    """The mean over all confirmed runs, or over all refits, of one configuration, of which `trial` is one.

    metric: named as in reports, with its part (val_map_at_r). half_width: of the 95 % interval, None for one run.
    """

    trial: str
    num_runs: int
    metric: str
    mean: float
    half_width: float | None


def mean_of_runs(folder: Path, trial: str, on: str) -> MeanOfRuns | None:
    """Return the mean of the configuration that a confirmed run or a refit belongs to, on "val" or "test" classes.

    None for a run of the search, and on test classes that the study has not read.
    """
    if not (folder / "summary.json").exists():
        return None
    summary = read_json(folder / "summary.json")
    metric = summary["metric"].removeprefix("val_")
    for row in summary["confirm" if on == "val" else "final"]:
        for group in filter(None, (row, row.get("refit"))):
            score = group if on == "val" else group["metrics"].get(metric)
            if score and score["mean"] is not None and trial in [run["trial"] for run in group["runs"]]:
                return MeanOfRuns(trial, len(group["runs"]), f"{on}_{metric}", score["mean"], score["half_width"])
    return None


def top_trials(folder: Path) -> dict[str, Path]:
    """Return key -> checkpoint of the best searched trials and of the winner."""
    keys = [row["trial"] for row in _rows(folder, "search")[:NUM_TOP_TRIALS]]
    found = {key: newest_checkpoint(folder, "search", key) for key in keys}
    winner = find_winner(folder)
    return {key: path for key, path in found.items() if path is not None} | {winner.trial: winner.checkpoint}


def write_results(folder: Path, record: Callable[..., None], num_steps: int = 2) -> None:
    """Write the summary, the report and the exported model, and the events that bring them to MLflow.

    record: appends an event to the study's file. num_steps: of the study, of which these are the last two.
    """
    from raydml.inference.export import export_model
    from raydml.report.page import read_illustrations, write_report
    from raydml.report.text import summary_markdown

    record("step", name="writing the report", number=num_steps - 1, total=num_steps)
    trials = histories(folder)
    summary = summarise(folder)
    illustrations = read_illustrations(folder)
    write_json(folder / "summary.json", summary)
    write_whole(folder / "summary.md", summary_markdown(summary))
    write_report(folder / "report", summary, trials, illustrations)
    winner = find_winner(folder)
    for name in ("space.yaml", "summary.json", "summary.md", "split.json", "test_reads.jsonl"):
        if (folder / name).exists():  # not every study reads the test classes
            record("artifact", trial=None, path=str(folder / name), artifact_path="study")
    record("artifact", trial=None, path=str(folder / "report"), artifact_path="report")
    for key, path in top_trials(folder).items():
        record("artifact", trial=key, path=str(path), artifact_path="checkpoint")
    for picture in illustrations:
        record("artifact", trial=picture.trial, path=str(picture.path), artifact_path="pictures")
    record("step", name="exporting the model", number=num_steps, total=num_steps)
    export_model(winner.checkpoint, folder / "model")
    record(
        "model",
        trial=None,
        checkpoint=str(winner.checkpoint),
        folder=str(folder / "model"),
        name=f"raydml-{summary['study']}",
    )
    record("summary", metrics=_summary_metrics(summary), tags={"winner": winner.trial})


def _summary_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Return the few numbers of a study for its own MLflow run, under flat names that MLflow accepts."""
    metrics: dict[str, float] = {}
    if summary["search"] and summary["search"][0]["best"] is not None:
        metrics[f"search_best_{summary['metric']}"] = summary["search"][0]["best"]
    if summary["confirm"] and summary["confirm"][0]["mean"] is not None:
        metrics[f"confirmed_{summary['metric']}"] = summary["confirm"][0]["mean"]
    for row in summary["final"][:1]:
        parts = {"test_": "metrics", "test_untrained_": "untrained", "test_ensemble_": "ensemble"}
        parts |= {"val_": "validation", "val_untrained_": "untrained_validation"}
        for prefix, part in parts.items():
            metrics |= {f"{prefix}{name}": score["mean"] for name, score in row[part].items()}
        refit = row.get("refit") or {}
        for prefix, part in (("test_refit_", "metrics"), ("test_refit_untrained_", "untrained")):
            metrics |= {f"{prefix}{name}": score["mean"] for name, score in refit.get(part, {}).items()}
        metrics |= footprint_metrics(row["footprint"])
    return metrics


def illustrated_runs(folder: Path) -> dict[str, Path]:
    """Return key -> checkpoint folder of the runs worth pictures: the winner, the runner-up, the best of other methods.

    The best comes first. Each further configuration has its best run on the fold of the first, so that both validate on
    the same classes. Runs without an intact checkpoint (only the best keep theirs) are left out. Refits validate on
    nothing and are not among them; in a study without validation classes there is none. Raises StudyError while there
    is no winner.
    """
    if not has_search(read_study(folder).get("trials", [])):
        return {}
    winner = find_validated(folder)
    chosen = {winner.trial: winner.checkpoint}
    searched = read_trials(folder, "search")
    seen: set[str] = set()
    for place, (from_trial, runs) in enumerate(_configurations(folder, winner.trial)):
        method = str((searched[from_trial].config.get("method") or {}).get("name", "plain"))
        if place < 2 or method not in seen:
            stage = "confirm" if (folder / "confirmed.json").exists() else "search"
            found = ((run["trial"], newest_checkpoint(folder, stage, run["trial"], whole=False)) for run in runs)
            key, path = next(((key, path) for key, path in found if path is not None), ("", None))
            if path is not None:
                chosen.setdefault(key, path)
                seen.add(method)
    return chosen


def _configurations(folder: Path, winner: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return, best first, the searched trial of each configuration and its runs on the winner's fold, best first."""
    if not (folder / "confirmed.json").exists():
        ranked = [row for row in read_json(folder / "ranking.json") if row["value"] is not None]
        return [(row["trial"], [row]) for row in ranked]
    confirmed = read_json(folder / "confirmed.json")
    (fold,) = (run["fold"] for row in confirmed for run in row["runs"] if run["trial"] == winner)
    return [
        (row["from_trial"], sorted((run for run in row["runs"] if run["fold"] == fold), key=lambda run: -run["value"]))
        for row in confirmed
    ]
