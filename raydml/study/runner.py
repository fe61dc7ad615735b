"""The trials of one stage through Ray Tune: those that have not ended, each from its newest checkpoint.

A restart is a *new* Tune run over the trials that have not ended, and its scheduler reads their history from the
events. ``Tuner.restore`` is not used: it forgets ASHA's rungs, follows a pickled snapshot that lags behind the
checkpoints on disk, and silently starts over when that snapshot was cut off (docs/LOG.md).
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.logger import JsonLoggerCallback
from ray.tune.result import SHOULD_CHECKPOINT
from ray.tune.stopper import CombinedStopper

from raydml.analysis.trials import FAILURES, LOST_NODE, OUT_OF_MEMORY, PREEMPTED
from raydml.config.trial import Machine, StudySettings, Trial, fingerprint
from raydml.study import events
from raydml.study.actor import TrialActor
from raydml.study.drawing import DrawnSearch
from raydml.study.events import StudyReader, TrialState, events_path, read_trials
from raydml.study.faults import FaultStop, fault_in, is_without_memory, with_half_batch
from raydml.study.folder import newest_checkpoint
from raydml.study.gauges import StudyGauges
from raydml.study.lean_ray import uncounted_callbacks
from raydml.study.listed_trials import ListedTrials
from raydml.study.node import NodeNeeds, fit_nodes, node_fault_in, node_of_actor, selector_of
from raydml.study.preemption import PreemptionWatch
from raydml.study.probe import shape_key
from raydml.study.process import MachineFault
from raydml.study.promotion import Pasha, Promotion
from raydml.study.remote import StudyPlace, files_of_study
from raydml.study.retention import Retention
from raydml.study.rungs import milestones
from raydml.study.scheduler import Asha, InOrder, SyncHalving, trial_key
from raydml.study.search_limit import Reached, SearchLimit
from raydml.study.stuck import StuckWatch
from raydml.training import checkpoint

STUCK = "stuck"
#: Ends of trials that are not saved at the moment of the end.
_WITHOUT_SAVING = ("crashed", STUCK, OUT_OF_MEMORY)
#: Ray's words for an actor whose node is gone.
_LOST_NODE = re.compile(r"its node has died|node failure|marked dead|NodeDied")
#: Ray's words for an actor that does not answer, before Ray knows what has become of its node.
_UNAVAILABLE = re.compile(r"is temporarily unavailable")
#: Ray's words for an actor that it has given up before the actor was set up, because it found no node, for example.
_GIVEN_UP = re.compile(r"never ran")
#: Ray's words for an actor whose process has died. While the actor is set up, Ray adds that it never ran.
_DEAD_PROCESS = re.compile(r"worker process has died|worker process was killed|setup hook")
#: How often in a row Ray may give up a trial whose process has not died.
_MAX_GIVEN_UP = 10
_CHECK_EVERY_S = 1.0  # for stuck trials
_SLOTS_EVERY_S = 5.0  # how often it is asked how many trials there is room for
_MAX_LEFT_OUT = 5  # nodes that join a stage, and cannot run a trial


class StudySession(NamedTuple):
    """One run of a study by a driver.

    folder, place: of the study. metric: what trials are ranked by. resources: CPUs and GPUs of each trial, at most.
    limit: ends the search; None lets it run. needs: what every node must have. bad_nodes: by their ids, those that are
    left out, and why. seen_nodes: those that have been looked at. shares: what trials hold of a GPU that share one, by
    their shape (see `raydml.study.probe.shape_key`).
    """

    folder: Path
    place: StudyPlace
    study: StudySettings
    machine: Machine
    metric: str
    resources: dict[str, float]
    needs: NodeNeeds
    bad_nodes: dict[str, str]
    seen_nodes: set[str]
    limit: SearchLimit | None = None
    shares: Mapping[str, float] = {}

    def record(self, event: str, **fields: Any) -> None:
        """Append an event to the study's file."""
        events.append(events_path(self.folder), {"event": event, **fields})

    def step(self, name: str, number: int = 0, total: int = 0) -> None:
        """Record what the study does from now on beside training, and which of how many steps it is."""
        self.record("step", name=name, number=number, total=total)

    def note(self, text: str) -> None:
        """Record a sentence for the user."""
        self.record("note", text=text)

    def resources_of(self, trial: Trial) -> dict[str, float]:
        """Return the CPUs and GPUs that a trial holds."""
        if not self.shares:  # a shape is made of all settings of a trial, and there may be 100,000 trials
            return dict(self.resources)
        return {**self.resources, "gpu": self.shares.get(shape_key(trial), self.resources["gpu"])}

    @property
    def selector(self) -> dict[str, str]:
        """Ray's label selector for the nodes that a trial may run on; empty for all."""
        return selector_of(self.machine.node_labels, self.bad_nodes)

    def nodes(self, resources: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """Return the nodes that have room for what a trial holds; None: at most."""
        return fit_nodes(resources or self.resources, self.bad_nodes, self.machine.node_labels)

    def leave_out(self, bad_nodes: Mapping[str, str]) -> None:
        """Leave some nodes out from now on, and note why. Raises MachineFault where no other one can run a trial."""
        for reason in bad_nodes.values():
            self.note(f"a node is left out: {reason}")
        self.bad_nodes.update(bad_nodes)
        if bad_nodes and not self.nodes():
            reasons = list(dict.fromkeys(self.bad_nodes.values()))
            raise MachineFault(f"no node can run a trial: {'; '.join(reasons[:3])}")


class StudyEvents(tune.Callback):
    """Writes what Tune does into the study's event file, and deletes checkpoints of losing trials as they lose.

    A fault of the machine or of a node is handed to ``stop``, which ends the Tune run, and leaves the trial unended. A
    trial that is stuck is killed, and tried once more. A trial on a node that is about to be taken away is saved and
    started elsewhere; neither that nor the loss of a node counts as a failure of the trial. Retries count in a row: an
    epoch between two failures begins a new row.

    Tune pickles its callbacks, hence plain data. keep, max_bytes, all_finished: see `Retention`; a ``keep`` of None
    keeps everything. alone: whether the trials run one after the other, after they have found no memory. joined:
    whether nodes may come and go.
    """

    def __init__(
        self,
        folder: str,
        stage: str,
        keep: int | None,
        max_bytes: int | None,
        *,
        all_finished: bool = False,
        stop: FaultStop | None = None,
        stuck_after_s: float = math.inf,
        stuck_before: Iterable[str] = (),
        longest_s: Mapping[str, float] | None = None,
        alone: bool = False,
        joined: bool = False,
    ) -> None:
        self._folder, self._stage = folder, stage
        self._retention = (
            None if keep is None else Retention(Path(folder), stage, keep, max_bytes, all_finished=all_finished)
        )
        self._alone = alone
        self._stop, self._watch = stop or FaultStop(), StuckWatch(stuck_after_s, longest_s)
        self._preemption = PreemptionWatch() if joined else None
        self._gauges = StudyGauges(Path(folder)) if joined else None
        self._num_failed = 0
        self._stuck_before = set(stuck_before)
        self._failed_after: dict[str, int] = {}  # key -> the epoch reported last before its newest failure
        self._killed: dict[str, tuple[str, str]] = {}  # key -> the reason of its end, and why, in words
        self._given_up: Counter[str] = Counter()  # key -> how often by Ray since its newest epoch
        self._nodes: dict[str, str] = {}  # key -> the name of the node that it has started on last
        self._devices: dict[str, str] = {}  # key -> the name of the one that it has trained on last
        self._checked_s = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": None, "_preemption": None, "_gauges": None}

    def _append(self, event: str, trial: Any, *, durable: bool = True, **fields: Any) -> None:
        path = events_path(Path(self._folder))
        fields = {"event": event, "stage": self._stage, "trial": trial_key(trial), **fields}
        if event != "epoch" and (node := self._nodes.get(trial_key(trial))):
            fields["node"] = node
        if event in ("trial_retried", "trial_ended") and (device := self._devices.get(trial_key(trial))):
            fields["device"] = device
        events.append(path, fields, durable=durable)
        if event == "trial_retried":  # its next actor may die before Tune knows where it is
            self._nodes.pop(trial_key(trial), None)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        run = trial.config["run"]
        config = run["trial"]
        self._nodes[trial_key(trial)], _ = node_of_actor(trial.temporary_state.ray_actor)
        self._append(
            "trial_started",
            trial,
            fingerprint=run["fingerprint"],
            configuration=run["configuration"],
            config=config,
            fold=config["data"]["split"]["fold"],
            seed=config["seed"],
            gpus=run["gpus"],
        )

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        for text in result.get("notes", ()):
            events.append(events_path(Path(self._folder)), {"event": "note", "text": f"{trial_key(trial)}: {text}"})
        record = result["record"]
        if record.get("ended") == OUT_OF_MEMORY:
            return
        self._devices[trial_key(trial)] = result.get("device", "")
        metrics = {name: value for name, value in record.items() if name not in ("epoch", "ended")}
        # Trials are compared by the values of rungs. Another epoch may be lost with the power: it is in the checkpoint,
        # or is trained again with the same result, and MLflow gets it only when it is on the disk.
        is_rung = bool(result.get(SHOULD_CHECKPOINT))
        self._append("epoch", trial, durable=is_rung, epoch=record["epoch"], metrics=metrics)
        self._watch.report(trial_key(trial), metrics.get("epoch_s"))
        self._given_up.pop(trial_key(trial), None)
        if record["epoch"] > self._failed_after.get(trial_key(trial), -1):
            trial.run_metadata.num_failures = 0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        if time.monotonic() - self._checked_s < _CHECK_EVERY_S:
            return
        self._checked_s = time.monotonic()
        if self._retention is not None:
            self._retention.read_on()
        running = {trial_key(trial): trial for trial in trials if trial.status == trial.RUNNING}
        for late in self._watch.stuck(running):
            trial = running[late.key]
            actor = trial.temporary_state.ray_actor
            if actor is None:
                continue
            if late.key in self._stuck_before:
                trial.max_failures = 0  # once more is enough
            self._stuck_before.add(late.key)
            self._killed[late.key] = STUCK, str(late)
            ray.kill(actor)
        if self._preemption is not None:
            self._move(self._preemption, running)
        if self._gauges is not None:
            self._gauges.set(self._stage, [trial.status for trial in trials], self._num_failed)

    def _move(self, watch: PreemptionWatch, running: Mapping[str, Any]) -> None:
        """Start the trials elsewhere that are saved, of those on nodes which are about to be taken away."""
        actors = {key: trial.temporary_state.ray_actor for key, trial in running.items() if key not in self._killed}
        moves = watch.look({key: actor for key, actor in actors.items() if actor is not None})
        for note in moves.notes:
            events.append(events_path(Path(self._folder)), {"event": "note", "text": note})
        for key in moves.keys:
            running[key].moves = True  # see `_forgive`
            self._killed[key] = PREEMPTED, f"{self._nodes.get(key) or 'its node'} is about to be taken away"
            ray.kill(actors[key])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        if self._stop_for_fault(trial):
            return
        error, key = _error_text(trial), trial_key(trial)
        is_lost = _LOST_NODE.search(error) is not None
        self._given_up[key] += _is_failure_of_node(error) and not is_lost
        if self._given_up[key] >= _MAX_GIVEN_UP:  # it would be tried for ever
            self._stop.fault = (
                f"Ray has given up {key} {_MAX_GIVEN_UP} times in a row: {_last_line(trial)} Cure: start all nodes and "
                "this command with the same RAY_AUTH_MODE and token, and see gcs_server.out in the logs of Ray on the "
                "head"
            )
        # An epoch is reported before it is saved: only a later one shows that the trial gets beyond this failure.
        reported = int((trial.last_result or {}).get("epoch", -1))
        self._failed_after[key] = max(reported, self._failed_after.get(key, -1))
        is_away = is_lost or _UNAVAILABLE.search(error) is not None
        reason, error = self._killed.pop(key, (LOST_NODE if is_away else None, _last_line(trial)))
        self._append("trial_retried", trial, error=error, reason=reason)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        record = (trial.last_result or {}).get("record", {})
        ended = record.get("ended")
        if ended == OUT_OF_MEMORY and not self._alone:  # `run_trials` runs it again
            self._append("trial_retried", trial, error=record["error"], reason=OUT_OF_MEMORY)
            return
        class_values = (trial.last_result or {}).get("class_values")
        more = {} if class_values is None else {"class_values": class_values}
        self._end(trial, ended or "stopped_early", record.get("error"), **more)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        if self._stop_for_fault(trial):
            return
        error = _last_line(trial)
        reason, words = self._killed.pop(trial_key(trial), ("", ""))
        if reason == STUCK:
            self._end(trial, STUCK, words)
        elif is_without_memory(error) and not self._alone:
            self._append("trial_retried", trial, error=error, reason=OUT_OF_MEMORY)
        elif is_without_memory(error):
            self._end(trial, OUT_OF_MEMORY, error)
        else:
            self._end(trial, "crashed", error)

    def _stop_for_fault(self, trial: Any) -> bool:
        error = _error_text(trial)
        fault, node_fault = fault_in(error), node_fault_in(error)
        if fault is not None:
            self._stop.fault = fault
        elif node_fault is not None:
            self._stop.bad_nodes.update([node_fault])
        return fault is not None or node_fault is not None

    def _end(self, trial: Any, reason: str, error: str | None, **more: Any) -> None:
        if reason in _WITHOUT_SAVING:
            _count_saved_epochs(Path(self._folder), self._stage, trial_key(trial))
        self._num_failed += reason in FAILURES
        self._append("trial_ended", trial, reason=reason, error=error, **more)
        if self._retention is not None:
            self._retention.drop_losers()


def _count_saved_epochs(folder: Path, stage: str, key: str) -> None:
    """Let only the epochs up to its newest checkpoint count for a trial that is about to end without being saved.

    The weights of the later ones are lost: a trial that was ranked by them could not be tested or exported.
    The saved epoch is reported again, and the last report counts (see `TrialState`); without any checkpoint that is
    epoch 0, which has no value.
    """
    state = read_trials(folder, stage).get(key)
    if state is None or not state.num_epochs:
        return
    found = newest_checkpoint(folder, stage, key, whole=False)
    saved = int(checkpoint.load_card(found)["epoch"]) if found else 0
    if saved >= state.num_epochs:
        return
    metrics = state.reports[saved].metrics if saved in state.reports else {}
    path = events_path(folder)
    note = f"{key}: its epochs after epoch {saved} do not count: no checkpoint has their weights"
    events.append(path, {"event": "note", "text": note})
    events.append(path, {"event": "epoch", "stage": stage, "trial": key, "epoch": saved, "metrics": dict(metrics)})


def _error_text(trial: Any) -> str:
    """Return the text of the newest error of a trial."""
    file = trial.error_file
    if not file or not Path(file).exists():
        return ""
    # Tune appends each failure to the file, below a line with its number.
    return re.split(r"^Failure # \d+ .*$", Path(file).read_text(encoding="utf-8"), flags=re.MULTILINE)[-1]


def _last_line(trial: Any) -> str:
    """Return the exception of a failed trial, without Ray's traceback."""
    lines = [line.strip() for line in _error_text(trial).splitlines() if line.strip()]
    return lines[-1] if lines else "unknown"


def _is_failure_of_node(error: str) -> bool:
    """Return whether an actor has ended because of its node, or because it never started on one.

    error: the words of Ray.
    """
    if _LOST_NODE.search(error) or _UNAVAILABLE.search(error):
        return True
    return _GIVEN_UP.search(error) is not None and not _DEAD_PROCESS.search(error)


def _forgive(trial: Any, exception: Exception) -> None:
    """Take off the failure that Tune is about to count, where the node has failed or the trial is to move.

    Tune compares the failures with the tries before it calls a callback.
    """
    moves, trial.moves = getattr(trial, "moves", False), False
    is_counted = not (isinstance(exception, RayActorError) and exception.preempted)
    if is_counted and (moves or _is_failure_of_node(str(exception))):
        trial.run_metadata.num_failures -= 1


def count_deaths_once() -> None:
    """Let Tune count the death of an actor once, although two of its calls were under way, and that of a node never.

    After the first call has failed, Tune puts the trial back in line (PENDING). If another call fails then because the
    actor is dead, Tune would end the trial without a retry; that failure is ignored here. A trial is in line as well
    while it takes over an actor. An error of its own counts there; after the death of the actor it gets another one.
    """
    original = TuneController._trial_task_failure
    if getattr(original, "counts_once", False):
        return

    def task_failure(self: TuneController, trial: Any, exception: Exception) -> None:
        self._resetting_trials.discard(trial)  # else Tune waits for ever for the actor that it took over
        if trial.status != trial.PENDING or not isinstance(exception, RayActorError):
            _forgive(trial, exception)
            original(self, trial, exception)

    task_failure.counts_once = True  # type: ignore[attr-defined]
    TuneController._trial_task_failure = task_failure


def run_trials(session: StudySession, stage: str, trials: Mapping[str, Trial], configurations: Mapping[str, str],
                scheduler: str, later: DrawnSearch | None = None) -> dict[str, TrialState]:  # fmt: skip
    """Run the trials of a stage that have not ended, and return the states of all its trials by key.

    Where a limit ends the search, the trials that run end with its reason, such as ``time``; others never start. Trials
    that have found no memory run once more after the others, one at a time, on a whole device. Raises MachineFault
    where disk or images end every trial; the trials that run then have not ended.

    configurations: for each key the fingerprint of the searched configuration. scheduler: as in `SearchStage`. later:
    draws the trials of a search that are not known yet.
    """
    trials, configurations = dict(trials), dict(configurations)
    reader = StudyReader(session.folder)

    def read_states() -> dict[str, TrialState]:
        reader.read_on()
        return {key: reader.trials[key] for key in trials if key in reader.trials}

    states = read_states()
    waiting = [key for key in trials if key not in states or not states[key].ended]
    session.record(
        "stage_started", stage=stage, num_trials=later.num_trials if later else len(trials),
        num_ended=len(trials) - len(waiting), max_epochs=_max_epochs(trials, later), resources=session.resources,
        configurations=[] if stage == "search" else list(dict.fromkeys(configurations.values())),
        num_slots=num_slots(session, list(trials.values())), reused=list(states),
    )  # fmt: skip
    is_alone, num_left_out = False, 0
    while True:
        without_memory = {key for key, trial in states.items() if OUT_OF_MEMORY in trial.retry_reasons}
        unended = [key for key in trials if key not in states or not states[key].ended]
        group = [key for key in unended if (key in without_memory) == is_alone]
        if is_alone and set(unended) != set(group):
            break  # a signal or the time limit has ended the first run
        # Looked up once: each file of a checkpoint is hashed for it.
        resume_from = {key: _newest_checkpoint(session, stage, key, states.get(key)) for key in group}
        if _put_back_lost_epochs(session, stage, trials, states, resume_from):
            states = read_states()
        drawn = None if is_alone or later is None or later.is_over else later
        is_idle = not group and drawn is None
        if is_idle or _run_group(
            session, stage, trials, resume_from, states, configurations, scheduler, is_alone, drawn
        ):
            if is_alone:
                break
            is_alone = True
        else:
            num_left_out += 1
            if num_left_out >= _MAX_LEFT_OUT:  # each has stopped the trials that ran
                last = list(session.bad_nodes.values())[-1]
                raise MachineFault(f"{num_left_out} nodes that joined this stage cannot run a trial, the last: {last}")
        states = read_states()
    reader.read_on()  # the start of the stage says which of the trials of a finished stage count again
    return {trial.trial: trial for trial in reader.now().of_stage(stage)}


def _max_epochs(trials: Mapping[str, Trial], later: DrawnSearch | None) -> int:
    return max([trial.epochs for trial in trials.values()] + ([later.max_epochs] if later else []))


def _put_back_lost_epochs(
    session: StudySession,
    stage: str,
    trials: Iterable[str],
    states: Mapping[str, TrialState],
    resume_from: Mapping[str, Path | None],
) -> bool:
    """Add the epochs that only the checkpoints of trials have to the events, and return whether there were any.

    The end of a file can be lost when a machine loses its power. Without these epochs the ranking would be another one.

    resume_from: the newest checkpoints that are known already.
    """
    were_lost = False
    for key in trials:
        state = states.get(key)
        reports = {} if state is None else state.reports
        num_epochs = max(reports, default=0)
        num_missing = num_epochs - len(reports)
        if state is not None and state.ended and not num_missing:
            continue
        found = resume_from[key] if key in resume_from else newest_checkpoint(session.folder, stage, key, whole=False)
        epochs = checkpoint.load_history(found) if found else []
        lost = {record["epoch"]: record for record in epochs if record["epoch"] not in reports}
        if num_missing > sum(epoch < num_epochs for epoch in lost):
            session.note(f"{key}: some of its epochs are missing in events.jsonl, and no checkpoint has them")
        if not lost:
            continue
        were_lost = True
        if [*lost] != [num_epochs + 1]:  # a signal may leave the last one to the checkpoint alone
            session.note(
                f"{key}: {len(lost)} of its epochs were not in events.jsonl, and are taken from its checkpoint"
            )
        # The epoch that is reported last is the one from which the trial goes on, see `TrialState`.
        if num_epochs > max(lost):
            lost[num_epochs] = {**reports[num_epochs].metrics, "epoch": num_epochs}
        for epoch, record in sorted(lost.items()):
            metrics = {name: value for name, value in record.items() if name not in ("epoch", "ended")}
            session.record("epoch", stage=stage, trial=key, epoch=epoch, metrics=metrics)
    return were_lost


def _newest_checkpoint(session: StudySession, stage: str, key: str, state: TrialState | None) -> Path | None:
    """Return the checkpoint that a trial goes on from, and note each newer one that is damaged."""
    damaged: list[str] = []
    found = newest_checkpoint(session.folder, stage, key, damaged, whole=False)
    for damage in damaged:
        session.note(f"{key}: {damage}")
    if damaged or (found is None and state is not None and state.num_epochs):
        session.note(f"{key}: it goes on from {found}" if found else f"{key}: it starts over: no checkpoint is intact")
    return found


def _run_group(
    session: StudySession,
    stage: str,
    trials: dict[str, Trial],
    resume_from: Mapping[str, Path | None],
    states: Mapping[str, TrialState],
    configurations: dict[str, str],
    scheduler: str,
    is_alone: bool,
    later: DrawnSearch | None,
) -> bool:
    """Run some trials of a stage in one Tune run. resume_from: their keys, each with its checkpoint or None.

    later: draws further ones while they run, which are added to the trials and to the configurations.

    Returns False where a node has to be left out, and the trials that have not ended run without it next.
    """
    folder, study, machine = session.folder, session.study, session.machine
    machine, search = with_half_batch(machine) if is_alone else machine, stage == "search"
    rungs = []
    if scheduler != "none":
        rungs = milestones(
            max_epochs=_max_epochs(trials, later),
            grace_epochs=study.search.grace_epochs,
            reduction_factor=study.search.reduction_factor,
        )
    runs = files_of_study(folder).runs(stage)  # a folder that was fetched from a store has not all of them
    run = f"run-{int(runs[-1].rpartition('-')[2]) + 1 if runs else 0:03d}"

    def config_of(key: str) -> dict[str, Any]:
        gpus, found = session.resources_of(trials[key])["gpu"], resume_from.get(key)
        return {
            "key": key,
            "trial": trials[key].model_dump(mode="json"),
            "fingerprint": fingerprint(trials[key]),
            "configuration": configurations[key],
            "machine": machine.model_dump(mode="json"),
            "metric": session.metric,
            # Each searched trial may be compared with the best one, class by class.
            "by_class": search and study.search.folds > 1 and not TrialState(key, stage).is_further_fold,
            "gpus": max(1.0, gpus) if is_alone and gpus else gpus,
            "needs": session.needs,
            "place": session.place,
            "resume_from": str(found) if found else None,
            "checkpoints": str(folder / stage / run / key),
            "rungs": rungs,
        }

    slots = _Slots(session, trials)

    def draw(num_running: int) -> tuple[dict[str, Any] | None, bool]:
        """Return the configuration of the next trial, None while there is none; and whether none comes any more."""
        assert later is not None
        drawn = later.next(is_slot_free=num_running < slots.number())
        if drawn is None:
            if later.is_over and isinstance(made_scheduler, SyncHalving):
                made_scheduler.leave_out(later.keys[later.num_trials :])
            return None, later.is_over
        key, trials[drawn[0]] = drawn
        configurations[key] = fingerprint(drawn[1])
        return config_of(key), False

    # With plain values alone: Tune pickles it.
    resources, selector = dict(session.resources), session.selector

    def place(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        return _placement({**resources, "gpu": config["run"]["gpus"]}, selector)

    ended = [key for key in trials if key not in resume_from]
    limit = session.limit if search else None
    stop = FaultStop()
    made_scheduler = _scheduler(session, scheduler, trials, ended, states, resume_from, later)
    session.step("starting the trials")
    count_deaths_once()
    tuner = tune.Tuner(
        tune.with_resources(TrialActor, place),
        tune_config=tune.TuneConfig(
            # What runs is what was validated and fingerprinted.
            search_alg=ListedTrials(
                [config_of(key) for key in resume_from],
                max_concurrent=1 if is_alone else study.search.max_concurrent or 0,
                later=None if later is None else draw,
            ),
            scheduler=made_scheduler,
            reuse_actors=True,
            trial_name_creator=trial_key,
            trial_dirname_creator=trial_key,
        ),
        run_config=tune.RunConfig(
            name=run,
            storage_path=str(folder / stage),
            stop=stop if limit is None else CombinedStopper(limit, stop),
            failure_config=tune.FailureConfig(max_failures=study.max_retries),
            # The actor itself writes the others while it trains, and deletes the old ones.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            callbacks=[
                JsonLoggerCallback(),  # Tune itself reads these files
                StudyEvents(str(folder), stage, study.keep_checkpoints if search else None,
                            int(study.max_checkpoint_gib * 2**30) if study.max_checkpoint_gib else None,
                            all_finished=study.search.folds > 1, stop=stop, alone=is_alone,
                            stuck_after_s=machine.stuck_after_s, joined=session.needs.is_joined,
                            longest_s=_longest_epochs_s(states),
                            stuck_before=[key for key, state in states.items() if STUCK in state.retry_reasons])
            ],
            verbose=0,
        ),
    )  # fmt: skip
    with uncounted_callbacks():
        tuner.fit()
    if stop.fault:
        raise MachineFault(stop.fault)
    session.leave_out(stop.bad_nodes)
    if limit is not None and limit.reached is not None:
        _end_by_limit(session, limit.reached, trials, later.num_trials if later else len(trials))
        return True
    return not stop.bad_nodes


def _placement(resources: Mapping[str, float], selector: Mapping[str, str]) -> tune.PlacementGroupFactory:
    """Return where a trial may run, and what it holds there. selector: of the labels of nodes."""
    held = {name.upper(): amount for name, amount in resources.items() if amount}
    return tune.PlacementGroupFactory([held], **({"bundle_label_selector": [dict(selector)]} if selector else {}))


def _end_by_limit(session: StudySession, reached: Reached, trials: Iterable[str], num_trials: int) -> None:
    """Record the end of the trials that Tune stopped for a limit of the search: it does not report them.

    trials: the keys of the run. Those on further folds may wait meanwhile for their own.
    """
    states = {key: state for key, state in read_trials(session.folder, "search").items() if key in set(trials)}
    unended = [key for key, state in states.items() if not state.ended]
    if _put_back_lost_epochs(session, "search", unended, states, {}):
        states = {key: state for key, state in read_trials(session.folder, "search").items() if key in states}
    for key, state in states.items():
        if not state.ended:
            _count_saved_epochs(session.folder, "search", key)
            session.record("trial_ended", stage="search", trial=key, reason=reached.reason, error=None)
    session.note(f"{reached.words}: {len(states)} of {num_trials} trials started")


def num_slots(session: StudySession, trials: Sequence[Trial] = ()) -> int:
    """Return how many trials the cluster, as it is now, has room for at once. trials: those with shares of GPUs."""
    resources = session.resources
    if session.shares and trials:
        resources = {**resources, "gpu": fmean(session.resources_of(trial)["gpu"] for trial in trials)}
    held = {name: amount for name, amount in resources.items() if amount}
    rooms = [
        min(node["Resources"].get(name.upper(), 0.0) // amount for name, amount in held.items())
        for node in session.nodes(held)
    ]
    return max(1, int(min(sum(rooms), session.study.search.max_concurrent or math.inf)))


class _Slots:
    """How many trials the cluster has room for at once, which is asked anew every few seconds: nodes come and go.

    trials: those of the stage, whose shares of a GPU count.
    """

    def __init__(self, session: StudySession, trials: Mapping[str, Trial]) -> None:
        self._session, self._trials = session, trials
        self._number, self._asked_s = 1, -math.inf

    def number(self) -> int:
        if time.monotonic() - self._asked_s > _SLOTS_EVERY_S:
            self._number = num_slots(self._session, list(self._trials.values()))
            self._asked_s = time.monotonic()
        return self._number


def _longest_epochs_s(states: Mapping[str, TrialState]) -> dict[str, float]:
    """Return the longest time of an epoch of each trial that has reported one."""
    times = {key: [row.get("epoch_s", 0.0) for row in state.epochs.values()] for key, state in states.items()}
    return {key: longest_s for key, values in times.items() if (longest_s := max(values, default=0.0))}


def _history(
    states: Mapping[str, TrialState], resume_from: Mapping[str, Path | None]
) -> dict[str, list[tuple[int, float]]]:
    """Return the values that no trial will report again (see :class:`raydml.study.scheduler.Asha`)."""
    history = {}
    for key, state in states.items():
        rows = state.curve(state.metric)
        if not state.ended and key in resume_from:
            found = resume_from[key]
            resumed = checkpoint.load_card(found)["epoch"] if found else 0
            rows = [(epoch, value) for epoch, value in rows if epoch < resumed]
        history[key] = rows
    return history


def _all_reports(states: Mapping[str, TrialState]) -> list[tuple[str, int, float]]:
    """Return key, epoch and value of all reports in the order of their times, those included that will come again."""
    rows = [
        (report.time_s, key, epoch, report.metrics[state.metric])
        for key, state in states.items()
        for epoch, report in state.reports.items()
        if state.metric in report.metrics
    ]
    return [(key, epoch, value) for _, key, epoch, value in sorted(rows)]


def _scheduler(
    session: StudySession,
    name: str,
    trials: Mapping[str, Trial],
    ended: list[str],
    states: Mapping[str, TrialState],
    resume_from: Mapping[str, Path | None],
    later: DrawnSearch | None,
) -> Any:
    search = session.study.search
    if name == "none":
        return InOrder()
    rungs: dict[str, Any] = {
        "metric": session.metric,
        "max_epochs": _max_epochs(trials, later),
        "grace_epochs": search.grace_epochs,
        "reduction_factor": search.reduction_factor,
    }
    if name == "asha":
        return Asha(**rungs, history=_history(states, resume_from))
    keys = later.keys if later else list(trials)
    if name == "sync":
        return SyncHalving(**rungs, keys=keys, ended=ended, history=_history(states, resume_from))
    promoting = Promotion if name == "promotion" else Pasha
    return promoting(**rungs, keys=keys, history=_all_reports(states))
