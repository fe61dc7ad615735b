"""The study on Ray: search, confirm, finalize. Every stage can be interrupted and asked for again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray

from raydml.config.trial import Machine, Study, Trial, fingerprint, parse_trial
from raydml.metrics.intervals import t_interval
from raydml.study.actor import evaluate_ensemble_remotely, evaluate_remotely, illustrate_remotely
from raydml.study.events import events_path
from raydml.study.folder import (
    StudyError,
    confirm_trials,
    newest_checkpoint,
    read_json,
    read_study,
    stages_of,
    write_json,
)
from raydml.study.results import illustrated_runs, top_trials, write_results
from raydml.study.runner import Context, drop_checkpoints, run_trials
from raydml.study.state import TrialState, rank, read_state
from raydml.training import checkpoint
from raydml.training.trial_images import Catalogs


class Outcome(NamedTuple):
    status: str  # "finished" or "interrupted"
    signal: int | None = None


class _Interrupted(Exception):
    """INT or TERM arrived; Tune has stopped its actors."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_study(folder: Path, *, address: str | None = None) -> Outcome:
    """Run the stages of a study that are not finished. Blocks. ``address``: a running Ray cluster, or None for an
    embedded one that ends with this call. Raises DataError before anything starts if the images are gone or others."""
    study_json = read_study(folder)
    study = Study.model_validate(study_json["study"])
    machine = Machine.model_validate(study_json["machine"])
    stages = stages_of(study)
    if is_finished(folder, stages):
        return Outcome("finished")
    _refuse_other_images(study_json, machine)
    start = Context(folder, study, machine, study_json["select_on"], {})
    start.announce(
        "study_started",
        study=study.name,
        study_id=study_json["study_id"],
        config={**study_json["study"], "select_on": start.metric},
        storage=study_json["storage"],
        commit=study_json["commit"],
    )
    with _signals() as received:
        try:
            with _ray(address):
                resources = _resources(machine, start.announce, joined=address is not None)
                context = start._replace(resources=resources)
                for stage in stages:
                    _run_stage(context, stage, received)
                _illustrate(context)
        except (_Interrupted, KeyboardInterrupt):
            start.announce("interrupted", signal=received[0] if received else signal.SIGINT)
            return Outcome("interrupted", received[0] if received else signal.SIGINT)
        write_results(folder, start.announce)
        start.announce("study_finished")
    return Outcome("finished")


def _refuse_other_images(study_json: Mapping[str, Any], machine: Machine) -> None:
    """Raise DataError where the images are not those of the study: each trial would crash on them, and count as run."""
    catalogs = Catalogs(machine)
    for trial in study_json["trials"]:
        catalogs.of(parse_trial(trial))


def _run_stage(context: Context, stage: str, received: list[int]) -> None:
    result = context.folder / _result_file(stage)
    if result.exists():
        return
    if not received:
        _STAGE[stage](context)
    if received:
        raise _Interrupted(received[0])
    if not result.exists():
        raise StudyError(f"stage {stage} ended with trials that have not; see {events_path(context.folder)}")


# --- Ray ------------------------------------------------------------------------------------------------------------


def is_finished(folder: Path, stages: list[str]) -> bool:
    """Return whether every stage has its result and the study was recorded as finished: nothing is left to do."""
    return all((folder / _result_file(stage)).exists() for stage in stages) and read_state(folder).state == "finished"


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    if ray.is_initialized():  # a test or a notebook brought its own
        yield
        return
    import raydml

    if not address:
        # Ray says above our table that it turned its token authentication on, which is what we want.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # Below an error Tune has only advice that is wrong here, such as to go on with Tuner.restore.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # On a cluster the workers get this very code; an embedded Ray imports it from where the driver did.
    environment = {"py_modules": [str(Path(raydml.__file__).parent)]} if address else {}
    try:
        ray.init(
            address=address or "local",  # never somebody else's cluster by accident
            runtime_env=environment,
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
            **({} if address else {"include_dashboard": False}),
        )
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        if not address:
            raise
        raise StudyError(
            f"--address {address}: no Ray cluster lets us in there ({str(error).strip().splitlines()[0]}). Cure: check "
            "the address with `ray status`; a cluster with tokens needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """INT and TERM end the running Tune loop cleanly (its own handler listens to USR1); the second one is rude."""
    received: list[int] = []
    over = threading.Event()

    def nobody(_number: int, _frame: Any) -> None:
        """Between Tune runs nobody listens to USR1, and its default action would kill the driver."""

    def pass_on() -> None:
        # A Tune run that is only just starting has no handler yet: each one is told as soon as it listens.
        told: Any = nobody
        while not over.wait(0.1):
            listener = signal.getsignal(signal.SIGUSR1)
            if listener is not told:
                told = listener
                os.kill(os.getpid(), signal.SIGUSR1)

    def on_signal(number: int, _frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        threading.Thread(target=pass_on, name="interrupt", daemon=True).start()

    watched = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, on_signal) for number in watched}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, nobody)
    try:
        yield received
    finally:
        over.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _resources(machine: Machine, announce: Any, *, joined: bool) -> dict[str, float]:
    """CPU and GPU share of one trial. ``auto``: a whole GPU where the cluster has one, else none, and it says so.

    In a joined cluster GPU nodes may start on demand, so a share asked for in so many words is waited for there.
    """
    cluster = ray.cluster_resources()
    present, cpus = cluster.get("GPU", 0), cluster.get("CPU", 0)
    if machine.cpus_per_trial > cpus and not joined:
        raise StudyError(
            f"machine.cpus_per_trial = {machine.cpus_per_trial}, but this machine has {cpus:g} CPUs, and the trials "
            f"would wait for ever. Cure: --set machine.cpus_per_trial={max(1, int(cpus))}"
        )
    if machine.gpus_per_trial == "auto":
        gpus = 1.0 if present and machine.device != "cpu" else 0.0
        if not present:
            cure = " (GPU nodes that start on demand: --set machine.gpus_per_trial=1)" if joined else ""
            announce("note", text=f"no GPU in this Ray cluster: trials run on the CPU{cure}")
        elif not gpus:
            announce("note", text="machine.device is cpu: the GPUs of this cluster stay idle")
    else:
        gpus = float(machine.gpus_per_trial)
        if gpus > present and not joined:
            raise StudyError(
                f"machine.gpus_per_trial = {gpus:g}, but this machine has {present:g} GPUs, and the trials would wait "
                "for ever. Cure: --set machine.gpus_per_trial=0, or --address of a cluster with GPUs"
            )
        if not gpus and present:
            announce("note", text="machine.gpus_per_trial is 0: the GPUs of this cluster stay idle")
    if joined and not any(
        node["Alive"]
        and node["Resources"].get("CPU", 0) >= machine.cpus_per_trial
        and node["Resources"].get("GPU", 0) >= gpus
        for node in ray.nodes()
    ):
        asked = f"{machine.cpus_per_trial} CPU and {gpus:g} GPU"
        announce("note", text=f"no node has {asked} for a trial yet: waiting for one to start")
    return {"cpu": float(machine.cpus_per_trial), "gpu": gpus}


# --- the stages -----------------------------------------------------------------------------------------------------


def search_trials(study_json: Mapping[str, Any]) -> dict[str, Trial]:
    return {f"search-{index:03d}": parse_trial(trial) for index, trial in enumerate(study_json["trials"])}


def _search(context: Context) -> None:
    trials = search_trials(read_study(context.folder))
    configurations = {key: fingerprint(trial) for key, trial in trials.items()}
    states = run_trials(context, "search", trials, configurations, context.study.search.scheduler)
    failed = [key for key, state in states.items() if state.ended and state.best is None]
    if len(failed) == len(trials):
        raise StudyError(
            f"no trial of the search has a value of {context.metric}: {_endings(states)}. Nothing can be ranked. "
            "Cure: gentler settings (smaller learning rates, say) under another --name"
        )
    _finish(context, "search", trials, states, lambda: rank(states.values()))


def _confirm(context: Context) -> None:
    rows = confirm_trials(
        read_json(context.folder / "ranking.json"), search_trials(read_study(context.folder)), context.study
    )
    trials = {f"confirm-{index:03d}": row["trial"] for index, row in enumerate(rows)}
    origin = dict(zip(trials, rows, strict=True))
    configurations = {key: row["configuration"] for key, row in origin.items()}
    states = run_trials(context, "confirm", trials, configurations, "none")

    def confirmed() -> list[dict[str, Any]]:
        groups: dict[str, dict[str, Any]] = {}
        for key, row in origin.items():
            group = groups.setdefault(
                row["configuration"],
                {"configuration": row["configuration"], "from_trial": row["from_trial"], "runs": []},
            )
            group["runs"].append(
                {
                    "trial": key,
                    "fold": row["trial"].data.split.fold,
                    "seed": row["trial"].seed,
                    "value": states[key].best,
                    "ended": states[key].ended,
                }
            )
        for group in groups.values():
            values = [run["value"] for run in group["runs"] if run["value"] is not None]
            interval = t_interval(values) if values else None
            group["mean"] = interval.mean if interval else None
            group["half_width"] = interval.half_width if interval else None
            group["num_runs"] = len(values)
        # A configuration with a failed run is not confirmed: its mean would be over fewer, perhaps easier, folds.
        complete = [group for group in groups.values() if group["num_runs"] == len(group["runs"])]
        if not complete:
            raise StudyError(f"no configuration got through all its folds and seeds: {_endings(states)}")
        return sorted(complete, key=lambda group: -group["mean"])

    _finish(context, "confirm", trials, states, confirmed)
    if (context.folder / _result_file("confirm")).exists():
        _drop_unneeded(context, origin)


def _drop_unneeded(context: Context, origin: Mapping[str, Mapping[str, Any]]) -> None:
    """The checkpoints of confirmed runs that nobody will test."""
    top = context.study.finalize.top if context.study.finalize else 1
    kept = {row["configuration"] for row in read_json(context.folder / "confirmed.json")[:top]}
    for key, row in origin.items():
        if row["configuration"] not in kept:
            drop_checkpoints(context.folder, "confirm", key)


def _endings(states: Mapping[str, TrialState]) -> str:
    """``search-000 crashed (ValueError: ...), search-001 non_finite_loss``."""
    return ", ".join(
        f"{key} {state.ended}" + (f" ({state.error})" if state.error else "") for key, state in states.items()
    )


def _finish(
    context: Context, stage: str, trials: Mapping[str, Trial], states: Mapping[str, TrialState], ranking: Any
) -> None:
    """Write the stage's result, unless the run was cut short: an unfinished stage has no result."""
    if any(key not in states or not states[key].ended for key in trials):
        return
    rows = ranking()
    write_json(context.folder / _result_file(stage), rows)
    context.announce("stage_finished", stage=stage, ranking=rows)


def _finalize(context: Context) -> None:
    """Open the test classes for the confirmed winners: each checkpoint once, each read recorded before it happens."""
    assert context.study.finalize is not None
    finished: list[dict[str, Any]] = []
    confirmed = context.folder / "confirmed.json"
    if confirmed.exists():
        winners = [
            {
                **row,
                "stage": "confirm",
                "keys": [run["trial"] for run in row["runs"] if run["value"] is not None],
            }
            for row in read_json(confirmed)
        ]
    else:
        ranking = read_json(context.folder / "ranking.json")
        winners = [
            {
                "configuration": row["fingerprint"],
                "from_trial": row["trial"],
                "stage": "search",
                "keys": [row["trial"]],
            }
            for row in ranking
            if row["value"] is not None
        ]
    winners = winners[: context.study.finalize.top]
    context.announce("stage_started", stage="finalize", num_trials=sum(len(row["keys"]) for row in winners),
                     num_ended=0, max_epochs=0)  # fmt: skip
    for winner in winners:
        runs = _final_scores(context, winner["stage"], winner["keys"])
        finished.append(
            {
                "configuration": winner["configuration"],
                "from_trial": winner["from_trial"],
                "runs": runs,
                "metrics": _intervals(runs, "test", ""),
                "untrained": _intervals(runs, "test", "untrained_"),
                "validation": _intervals(runs, "val", ""),
                "untrained_validation": _intervals(runs, "val", "untrained_"),
                "ensemble": _ensemble(context, winner.get("runs", [])),
                "protocols": next(iter(runs.values()))["protocols"],
            }
        )
    write_json(context.folder / _result_file("finalize"), finished)
    context.announce("stage_finished", stage="finalize", ranking=finished)


def _intervals(runs: Mapping[str, Any], part: str, prefix: str) -> dict[str, dict[str, float | None]]:
    """Metric -> mean and half-width over the runs, of the metrics with this prefix (``untrained_`` or none)."""
    scores = [
        {name.removeprefix(prefix): value for name, value in run[part].items()
         if name.startswith("untrained_") == bool(prefix)}
        for run in runs.values()
    ]  # fmt: skip
    return _means(scores)


def _means(scores: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Metric -> mean and half-width, of the metrics that every run has: one that a run does not define (the spectrum of
    embeddings that leave a direction unused, say) would be a mean over other runs than the rest."""
    shared = [name for name in scores[0] if all(name in score for score in scores)]
    intervals = {name: t_interval([score[name] for score in scores]) for name in shared}
    return {name: {"mean": interval.mean, "half_width": interval.half_width} for name, interval in intervals.items()}


def _ensemble(context: Context, runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Metric -> mean and half-width, over the seeds, of the concatenated embeddings of all folds; {} with one fold, no
    interval from fewer than three seeds."""
    by_seed: dict[int, list[str]] = {}
    for run in sorted(runs, key=lambda run: run["fold"]):
        if run["value"] is not None:
            by_seed.setdefault(run["seed"], []).append(str(_embeddings_file(context, run["trial"])))
    # They are large: somebody may have deleted them.
    several = [files for files in by_seed.values() if len(files) > 1]
    whole = [files for files in several if all(Path(file).exists() for file in files)]
    if len(whole) < len(several):
        context.announce("note", text="no ensemble of the folds: some runs' test embeddings were not kept")
    if not whole or len(whole) < len(several):
        return {}
    reads, commit = str(context.folder / "test_reads.jsonl"), checkpoint.git_commit() or "unknown"
    task = evaluate_ensemble_remotely.options(num_cpus=context.resources["cpu"], num_gpus=context.resources["gpu"])
    machine = context.machine.model_dump(mode="json")
    for file in (file for files in whole for file in files):
        context.announce("test_read", stage="finalize", trial=None, checkpoint=file, commit=commit)
    scores = _fetch([task.remote(files, machine, reads, commit) for files in whole])
    means = _means(scores)
    # Of two seeds a t interval is 13 times as wide as their distance: it says nothing of scores between 0 and 1.
    return means if len(scores) > 2 else {name: {**row, "half_width": None} for name, row in means.items()}


def _embeddings_file(context: Context, key: str) -> Path:
    return context.folder / "final" / f"{key}.npz"


def _final_scores(context: Context, stage: str, keys: list[str]) -> dict[str, Any]:
    """Trial key -> {"val": metrics, "test": metrics}; what an interrupted finalize wrote is not computed again."""
    scores: dict[str, Any] = {}
    pending: dict[Any, str] = {}
    (context.folder / "final").mkdir(exist_ok=True)
    reads, commit = str(context.folder / "test_reads.jsonl"), checkpoint.git_commit() or "unknown"
    for key in keys:
        part = context.folder / "final" / f"{key}.json"
        if part.exists():
            scores[key] = read_json(part)
            continue
        found = newest_checkpoint(context.folder, stage, key)
        if found is None:
            raise StudyError(f"no intact checkpoint of {key} is left in {context.folder / stage}: it cannot be tested")
        context.announce("test_read", stage="finalize", trial=key, checkpoint=str(found), commit=commit)
        task = evaluate_remotely.options(num_cpus=context.resources["cpu"], num_gpus=context.resources["gpu"])
        kept = str(_embeddings_file(context, key))
        pending[task.remote(str(found), context.machine.model_dump(mode="json"), reads, commit, kept)] = key
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        key = pending.pop(ready)
        scores[key] = _fetch(ready)
        write_json(context.folder / "final" / f"{key}.json", scores[key])
    return {key: scores[key] for key in keys}


def _fetch(references: Any) -> Any:
    """``ray.get``; a mistake of the user that a worker met (images that changed, say) is told as one."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise StudyError(str(error.cause)) from error
        raise


def _illustrate(context: Context) -> None:
    """Pictures of the winner, its rivals and its test embedding, where the GPUs are: a head node may have none."""
    if (context.folder / "illustrations" / "illustrations.json").exists():  # written last
        return
    chosen = {**illustrated_runs(context.folder), **top_trials(context.folder)}
    tests = [path for path in [_embeddings_file(context, next(iter(chosen)))] if path.exists()]
    reads, commit = str(context.folder / "test_reads.jsonl"), checkpoint.git_commit() or "unknown"
    for path in tests:
        context.announce("test_read", stage="finalize", trial=None, checkpoint=str(path), commit=commit)
    task = illustrate_remotely.options(num_cpus=context.resources["cpu"], num_gpus=context.resources["gpu"])
    _fetch(
        task.remote(
            {key: str(path) for key, path in chosen.items()},
            context.machine.model_dump(mode="json"),
            str(context.folder / "illustrations"),
            [str(path) for path in tests],
            reads,
            commit,
        )
    )


def _result_file(stage: str) -> str:
    return {"search": "ranking.json", "confirm": "confirmed.json", "finalize": "final.json"}[stage]


_STAGE = {"search": _search, "confirm": _confirm, "finalize": _finalize}
