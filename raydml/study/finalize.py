"""The last stage of a study: the test classes are opened once, for the winners of the stages before.

Every read of the test classes is recorded, as an event and in ``test_reads.jsonl``, before it happens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from raydml.metrics.intervals import t_interval
from raydml.study.actor import evaluate_ensemble_remotely, evaluate_remotely, illustrate_remotely
from raydml.study.folder import RESULT_FILES, StudyError, newest_checkpoint, read_json, write_json
from raydml.study.results import illustrated_runs, top_trials
from raydml.study.runner import StudySession
from raydml.training import checkpoint

#: Metric -> ``mean`` and ``half_width``.
Means = dict[str, dict[str, float | None]]


def finalize(session: StudySession) -> None:
    """Test the confirmed winners, or those of a search that is not confirmed: each of their checkpoints once."""
    assert session.study.finalize is not None
    winners = _winners(session.folder)[: session.study.finalize.top]
    num_trials = sum(len(winner["keys"]) for winner in winners)
    session.record("stage_started", stage="finalize", num_trials=num_trials, num_ended=0, max_epochs=0)
    finished = []
    for winner in winners:
        runs = _test_runs(session, winner["stage"], winner["keys"])
        finished.append(
            {
                "configuration": winner["configuration"],
                "from_trial": winner["from_trial"],
                "runs": runs,
                "metrics": _intervals(runs, "test", ""),
                "untrained": _intervals(runs, "test", "untrained_"),
                "validation": _intervals(runs, "val", ""),
                "untrained_validation": _intervals(runs, "val", "untrained_"),
                "ensemble": _ensemble(session, winner["runs"]),
                "protocols": next(iter(runs.values()))["protocols"],
            }
        )
    write_json(session.folder / RESULT_FILES["finalize"], finished)
    session.record("stage_finished", stage="finalize", ranking=finished)


def _winners(folder: Path) -> list[dict[str, Any]]:
    """Return the configurations to test, best first: ``configuration``, ``from_trial``, the ``stage`` and the ``keys``
    of their trials, and the ``runs`` of the confirmation."""
    confirmed = folder / RESULT_FILES["confirm"]
    if confirmed.exists():
        return [
            {**row, "stage": "confirm", "keys": [run["trial"] for run in row["runs"] if run["value"] is not None]}
            for row in read_json(confirmed)
        ]
    return [
        {
            "configuration": row["fingerprint"],
            "from_trial": row["trial"],
            "stage": "search",
            "keys": [row["trial"]],
            "runs": [],
        }
        for row in read_json(folder / RESULT_FILES["search"])
        if row["value"] is not None
    ]


def _intervals(runs: Mapping[str, Any], part: str, prefix: str) -> Means:
    """Return the means over the runs of the metrics with this prefix (``untrained_`` or none)."""
    return _means(
        [
            {
                name.removeprefix(prefix): value
                for name, value in run[part].items()
                if name.startswith("untrained_") == bool(prefix)
            }
            for run in runs.values()
        ]
    )


def _means(scores: Sequence[Mapping[str, float]]) -> Means:
    """Return the mean and the half-width of the interval of each metric that every run has.

    Not every run defines every metric: the spectrum of embeddings that leave a direction unused is undefined, say. A
    mean over the others would be a mean over other runs than the rest of the table.
    """
    shared = [name for name in scores[0] if all(name in score for score in scores)]
    intervals = {name: t_interval([score[name] for score in scores]) for name in shared}
    return {name: {"mean": interval.mean, "half_width": interval.half_width} for name, interval in intervals.items()}


def _ensemble(session: StudySession, runs: Sequence[Mapping[str, Any]]) -> Means:
    """Return the means over the seeds of the metrics of the concatenated embeddings of all folds.

    Empty with one fold. There is no interval from fewer than three seeds.
    """
    by_seed: dict[int, list[Path]] = {}
    for run in sorted(runs, key=lambda run: run["fold"]):
        if run["value"] is not None:
            by_seed.setdefault(run["seed"], []).append(_embeddings_file(session, run["trial"]))
    ensembles = [files for files in by_seed.values() if len(files) > 1]
    if not ensembles:
        return {}
    if not all(file.exists() for files in ensembles for file in files):  # they are large and may have been deleted
        session.note("no ensemble of the folds: some runs' test embeddings were not kept")
        return {}
    record = _read_record(session)
    for file in (file for files in ensembles for file in files):
        _record_test_read(session, None, file)
    task = evaluate_ensemble_remotely.options(**_resources(session))
    machine = session.machine.model_dump(mode="json")
    scores = _fetch([task.remote([str(file) for file in files], machine, *record) for files in ensembles])
    means = _means(scores)
    # A t interval of two seeds is 13 times as wide as their distance: too wide to be of use for scores between 0 and 1.
    return means if len(scores) > 2 else {name: {**row, "half_width": None} for name, row in means.items()}


def _test_runs(session: StudySession, stage: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return key -> {"val": metrics, "test": metrics, "protocols"}; what an interrupted run has written is read."""
    scores: dict[str, Any] = {}
    pending: dict[Any, str] = {}
    (session.folder / "final").mkdir(exist_ok=True)
    machine, record = session.machine.model_dump(mode="json"), _read_record(session)
    task = evaluate_remotely.options(**_resources(session))
    for key in keys:
        written = session.folder / "final" / f"{key}.json"
        if written.exists():
            scores[key] = read_json(written)
            continue
        found = newest_checkpoint(session.folder, stage, key)
        if found is None:
            raise StudyError(f"no intact checkpoint of {key} is left in {session.folder / stage}: it cannot be tested")
        _record_test_read(session, key, found)
        pending[task.remote(str(found), machine, *record, str(_embeddings_file(session, key)))] = key
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        key = pending.pop(ready)
        scores[key] = _fetch(ready)
        write_json(session.folder / "final" / f"{key}.json", scores[key])
    return {key: scores[key] for key in keys}


def illustrate(session: StudySession) -> None:
    """Draw pictures of the winner, its rivals and its test embedding, in a task: a head node may have no GPU."""
    folder = session.folder / "illustrations"
    if (folder / "illustrations.json").exists():  # written last
        return
    chosen = {**illustrated_runs(session.folder), **top_trials(session.folder)}
    tests = [path for path in [_embeddings_file(session, next(iter(chosen)))] if path.exists()]
    for path in tests:
        _record_test_read(session, None, path)
    checkpoints = {key: str(path) for key, path in chosen.items()}
    task = illustrate_remotely.options(**_resources(session))
    machine = session.machine.model_dump(mode="json")
    _fetch(task.remote(checkpoints, machine, str(folder), [str(path) for path in tests], *_read_record(session)))


def _record_test_read(session: StudySession, trial: str | None, opened: Path) -> None:
    session.record("test_read", stage="finalize", trial=trial, checkpoint=str(opened), commit=_commit())


def _read_record(session: StudySession) -> tuple[str, str]:
    """Return the file in which a worker records its reads of the test classes, and the commit to name there."""
    return str(session.folder / "test_reads.jsonl"), _commit()


def _commit() -> str:
    return checkpoint.git_commit() or "unknown"


def _resources(session: StudySession) -> dict[str, float]:
    return {"num_cpus": session.resources["cpu"], "num_gpus": session.resources["gpu"]}


def _embeddings_file(session: StudySession, key: str) -> Path:
    return session.folder / "final" / f"{key}.npz"


def _fetch(references: Any) -> Any:
    """Return ``ray.get``; a mistake of the user that a worker finds (changed images, say) is a StudyError."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise StudyError(str(error.cause)) from error
        raise
