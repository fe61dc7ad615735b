"""Trials that several ranks train: the actor, called as Tune calls it, and a study on a real (embedded) Ray."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from raydml.config.trial import Machine
from raydml.data.catalog import DataError
from raydml.study import actor as trial_module
from raydml.study import cluster, events
from raydml.study.actor import TrialActor, devices_of_ranks
from raydml.study.events import events_path, read_trials
from raydml.study.faults import MachineFault, is_without_memory
from raydml.study.folder import StudyError, fingerprinted_trials
from raydml.study.stages import run_study
from raydml.training import checkpoint
from raydml.training.rank_processes import RankError
from raydml.training.trial_images import Catalogs
from tests.study.test_folder import space_at
from tests.study.test_stages import new_study

METRIC = "val_map_at_r"
pytestmark = pytest.mark.xdist_group("ray")


def config_of(folder, num_ranks, key="search-000", epochs=3):
    space = space_at(folder, overrides=[f"trial.epochs={epochs}"])
    trial = fingerprinted_trials(space, Catalogs(space.machine))[0]
    machine = Machine(device="cpu", cpus_per_trial=2, ranks_per_trial=num_ranks)
    return {
        "run": {
            "key": key,
            "trial": trial.model_dump(mode="json"),
            "machine": machine.model_dump(mode="json"),
            "metric": METRIC,
            "by_class": False,
            "place": (str(folder), None),
            "checkpoints": str(folder / key),
            "rungs": [],
            "resume_from": None,
            "gpus": 0.0,
        }
    }


def test_each_rank_has_one_of_the_gpus_that_ray_has_assigned(monkeypatch):
    monkeypatch.setattr(trial_module.ray, "get_gpu_ids", lambda: [4, 6])
    assert devices_of_ranks(Machine()) == ["cuda:0", "cuda:1"]
    assert devices_of_ranks(Machine(device="cpu")) == ["cpu"]
    monkeypatch.setattr(trial_module.ray, "get_gpu_ids", list)
    assert devices_of_ranks(Machine()) == ["cpu"]
    assert devices_of_ranks(Machine(ranks_per_trial=3)) == ["cpu"] * 3


def test_a_trial_gets_a_gpu_for_each_rank_or_is_refused(monkeypatch):
    resources, notes = {"CPU": 8.0, "GPU": 4.0}, []
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(cluster, "note_of_room", lambda _held, _labels: "")

    def held_by(joined=False, **settings):
        return cluster.trial_resources(Machine(**settings), notes.append, joined=joined)["gpu"]

    assert held_by(gpus_per_trial=4) == held_by(ranks_per_trial=4) == 4
    assert held_by(joined=True, gpus_per_trial=8) == 8, "a node with as many may start"
    with pytest.raises(StudyError, match=r"machine\.ranks_per_trial = 8, but this machine has 4 GPUs"):
        held_by(ranks_per_trial=8)
    with pytest.raises(StudyError, match=r"machine\.gpus_per_trial = 8, but this machine has 4 GPUs"):
        held_by(gpus_per_trial=8)
    assert not notes
    del resources["GPU"]
    assert held_by(ranks_per_trial=8) == 0, "processes on the CPU"


def children_of(actor):
    return [process.pid for process in actor._ranks._processes]


def is_gone(pid):
    return not Path(f"/proc/{pid}").exists()


def rows(actor, number):
    return [(row["epoch"], row[METRIC], row["record"]["train_loss"]) for row in (actor.step() for _ in range(number))]


def assert_close(found, expected):
    assert [epoch for epoch, *_ in found] == [epoch for epoch, *_ in expected]
    assert [values for _, *values in found] == [pytest.approx(values, rel=1e-4) for _, *values in expected]


def test_a_trial_on_two_ranks_is_resumed_by_one_and_the_reverse(tmp_path):
    expected = rows(TrialActor(config_of(tmp_path, 1)), 3)
    two = TrialActor(config_of(tmp_path, 2, "two"))
    (pid,) = children_of(two)
    assert_close(rows(two, 1), expected[:1])
    two.save()
    two.stop()
    assert is_gone(pid)
    one = TrialActor(config_of(tmp_path, 1, "two"))
    assert_close(rows(one, 1), expected[1:2])
    one.save()
    again = TrialActor(config_of(tmp_path, 2, "two"))
    assert_close(rows(again, 1), expected[2:])
    assert again.reset_config(config_of(tmp_path, 1, "next")), "another trial takes over the actor"
    assert again._ranks is None
    assert checkpoint.load_card(tmp_path / "two" / "checkpoint_000002")["epoch"] == 2


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_try(tmp_path):
    actor = TrialActor(config_of(tmp_path, 2))
    (pid,) = children_of(actor)
    actor.step()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankError, match="rank-1 of the trial has died: its process has ended: -9"):
        rows(actor, 2)
    actor.cleanup()


def _missing_images(_ranks, _device, _config):
    raise DataError("the images are gone. Cure: restore them")


@pytest.mark.slow
def test_a_fault_that_a_rank_has_found_is_one_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_module, "_train_rank", _missing_images)
    actor = TrialActor(config_of(tmp_path, 2))
    with pytest.raises(MachineFault, match=r"the images are gone\. Cure: restore them"):
        actor.step()
    actor.cleanup()


@pytest.mark.parametrize(("cause", "is_so"), [(MemoryError("no"), True), (ValueError("memory"), False), (None, False)])
def test_a_rank_without_memory_is_a_trial_without_memory(cause, is_so):
    error = RankError("rank-1 of the trial has died")
    error.__cause__ = cause
    assert is_without_memory(error) == is_so


def ranks_of_actors():
    """Return the processes of ranks that are children of Ray's workers: their pids -> the pids of the workers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            command = folder.joinpath("cmdline").read_text()
            if "spawn_main" in command and "ray::" in Path(f"/proc/{parent}/cmdline").read_text():
                found[int(folder.name)] = parent
        except (OSError, ValueError):  # it has ended
            continue
    return found


@pytest.mark.slow
def test_a_rank_and_an_actor_that_die_are_retries_and_leave_no_process(tmp_path):
    settings = {"study.search.num_trials": 1, "study.confirm": None, "study.search.scheduler": "none"}
    settings |= {"trial.epochs": 60, "trial.sampler.batches_per_epoch": 20, "machine.checkpoint_every_s": 0}
    settings |= {"machine.device": "cpu", "machine.cpus_per_trial": 2, "machine.ranks_per_trial": 2}
    folder = new_study(tmp_path, **settings)
    seen = []

    def kill():
        for victim in (lambda pids: pids[0], lambda pids: pids[1]):  # a rank, then an actor
            epochs = num_epochs(folder)
            until_s = time.monotonic() + 200
            while time.monotonic() < until_s and (num_epochs(folder) < epochs + 3 or not ranks_of_actors()):
                time.sleep(0.05)
            (pids,) = ranks_of_actors().items()
            seen.extend(pids)
            os.kill(victim(pids), signal.SIGKILL)
            while time.monotonic() < until_s and pids[0] in ranks_of_actors():
                time.sleep(0.05)

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert run_study(folder).status == "finished"
    finally:
        killer.join()
        ray.shutdown()
    first, second = (event for event in events.read(events_path(folder)) if event["event"] == "trial_retried")
    assert "RankError: rank-1 of the trial has died: its process has ended: -9" in first["error"]
    assert "died" in second["error"]
    (state,) = read_trials(folder, "search").values()
    assert (state.num_epochs, state.state) == (60, "finished")
    until_s = time.monotonic() + 30
    while not all(map(is_gone, seen)) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert len(seen) == 4
    assert all(map(is_gone, seen))


def num_epochs(folder):
    return sum(event["event"] == "epoch" for event in events.read(events_path(folder)))


@pytest.mark.slow
def test_a_study_on_two_ranks_has_the_curves_of_one(tmp_path):
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        curves = {}
        for num_ranks in (1, 2):
            settings = {"study.search.num_trials": 2, "study.confirm": None, "study.search.scheduler": "none"}
            settings |= {"machine.device": "cpu", "machine.cpus_per_trial": 2, "machine.ranks_per_trial": num_ranks}
            folder = tmp_path / str(num_ranks)
            folder.mkdir()
            study = new_study(folder, **settings)
            assert run_study(study).status == "finished"
            curves[num_ranks] = {key: state.curve(METRIC) for key, state in read_trials(study, "search").items()}
            assert not [state.retry_reasons for state in read_trials(study, "search").values() if state.retry_reasons]
    finally:
        ray.shutdown()
    assert curves[1].keys() == curves[2].keys() == {"search-000", "search-001"}
    for key, curve in curves[1].items():
        assert_close(curves[2][key], curve)
