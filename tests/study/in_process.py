"""A study whose trials and tasks run in this process, with everything of raydml and without Ray's processes.

A worker of Ray takes seconds to start. Where only it matters that a study runs from its first trial to its report, this
saves nearly all the time.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from raydml.config.trial import fingerprint
from raydml.data.seal import TestReads
from raydml.search_space.space import load_space
from raydml.study import stages
from raydml.study.events import read_state, read_trials
from raydml.study.folder import create_study
from raydml.study.runner import StudyEvents
from raydml.training.trainer import Trainer
from tests.study.small import leave_pictures_out


class _Task:
    """A remote function that is called at once."""

    def __init__(self, remote_function):
        self._function = remote_function._function

    def options(self, **_resources):
        return self

    def remote(self, *arguments):
        return _Result(self._function(*arguments))


class _Result:
    """The reference to a value that is there."""

    def __init__(self, value):
        self.value = value


def _fetch(references):
    return [one.value for one in references] if isinstance(references, list) else references.value


def _with_drawn(trials, later):
    """The trials that are known, and then those that are drawn, each when all before have ended."""
    yield from list(trials.items())
    while later is not None and (drawn := later.next()) is not None:
        yield drawn


def _run_trials(session, stage, trials, configurations, scheduler, later=None):  # noqa: ARG001 - all run to their end
    record = StudyEvents(str(session.folder), stage, None, None)
    most = max(trial.epochs for trial in trials.values())
    by_class = stage == "search" and session.study.search.folds > 1
    before = {key: trial for key, trial in read_state(session.folder).trials.items() if key in trials and by_class}
    session.record(
        "stage_started", stage=stage, num_trials=len(trials), num_ended=0, max_epochs=most, reused=list(before)
    )
    for key, settings in _with_drawn(trials, later):
        if key in before and before[key].ended:
            continue
        run = {"key": key, "trial": settings.model_dump(mode="json"), "fingerprint": fingerprint(settings)}
        config = {"run": {**run, "configuration": configurations.get(key, fingerprint(settings)), "gpus": 0.0}}
        trial = SimpleNamespace(
            config=config,
            last_result=None,
            run_metadata=SimpleNamespace(num_failures=0),
            temporary_state=SimpleNamespace(ray_actor=None),
        )
        record.on_trial_start(0, [], trial)
        reads = TestReads(session.folder / "test_reads.jsonl")
        trainer = Trainer(settings, session.machine, device="cpu", reads=reads, by_class=by_class)
        for epoch in trainer.epochs():
            of_classes = {"class_values": trainer.best_class_values} if by_class and epoch["ended"] else {}
            trial.last_result = {"record": epoch, "device": "cpu", **of_classes}
            record.on_trial_result(0, [], trial, trial.last_result)
        trainer.save(session.folder / stage / "run-000" / key / "checkpoint_000000")
        record.on_trial_complete(0, [], trial)
    return read_trials(session.folder, stage)


def without_ray(monkeypatch):
    """Let `run_study` run everything in this process."""
    for name in ("evaluate_remotely", "evaluate_ensemble_remotely", "illustrate_remotely"):
        monkeypatch.setattr(stages, name, _Task(getattr(stages, name)))
    monkeypatch.setattr(stages, "run_trials", _run_trials)
    monkeypatch.setattr(stages, "connected", lambda _address, **_: nullcontext())
    monkeypatch.setattr(stages, "trial_resources", lambda *_, **__: {"cpu": 1.0, "gpu": 0.0})
    monkeypatch.setattr(stages, "_fetch", _fetch)
    monkeypatch.setattr(stages, "num_slots", lambda *_: 1)
    waiting = SimpleNamespace(wait=lambda pending, **_: (pending[:1], pending[1:]), exceptions=ray.exceptions)
    monkeypatch.setattr(stages, "ray", waiting)


def finished_here(space: Path, settings: Sequence[str], storage: Path) -> Path:
    """Run a study in this process from its first trial to its report, without pictures, and return its folder.

    Its scheduler has to be ``none``. Its numbers are those of the same study on Ray, bit for bit.
    """
    made = create_study(
        load_space(space, settings), storage=storage, tracking_uri="sqlite:///unused.db", space_text="text"
    )
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        assert stages.run_study(leave_pictures_out(made)).status == "finished"
    return made
