"""The actor of a trial, called as Tune calls it: step, save, restore, reset."""

from types import SimpleNamespace

import pytest
import torch
from ray import tune
from ray.tune.trainable.trainable import (
    _TrainingResult,
)  # Tune hands this to restore(); our override must understand it

from raydml.config.trial import Machine, parse_machine
from raydml.ops import files
from raydml.study import actor as trial_module
from raydml.study.actor import TrialActor, assigned_device
from raydml.study.faults import MachineFault
from raydml.study.folder import fingerprinted_trials
from raydml.training.trial_images import Catalogs
from tests.study.test_folder import space_at

METRIC = "val_map_at_r"


@pytest.fixture
def configs(tmp_path):
    space = space_at(tmp_path, overrides=["trial.epochs=4"])
    machine = Machine(device="cpu").model_dump(mode="json")
    return [
        {"run": {"key": f"search-{i:03d}", "trial": t.model_dump(mode="json"), "machine": machine, "metric": METRIC,
                 "reads": str(tmp_path / "test_reads.jsonl"), "resume_from": None}}
        for i, t in enumerate(fingerprinted_trials(space, Catalogs(space.machine)))
    ]  # fmt: skip


def rows(actor, number):
    return [(row["epoch"], row[METRIC], row["done"]) for row in (actor.step() for _ in range(number))]


def result_at(folder, epoch):
    return _TrainingResult(tune.Checkpoint.from_directory(str(folder)), {"training_iteration": epoch})


def saved(actor, parent, number):
    folder = parent / f"checkpoint_{number:06d}"
    folder.mkdir(parents=True)
    actor.save_checkpoint(str(folder))
    return folder


def test_a_crashed_trial_goes_on_from_the_newest_intact_checkpoint(configs, tmp_path):
    unbroken = rows(TrialActor(configs[0]), 4)
    assert [epoch for epoch, _, _ in unbroken] == [1, 2, 3, 4]
    assert [done for _, _, done in unbroken] == [False, False, False, True]
    actor = TrialActor(configs[0])
    for number in range(3):
        actor.step()
        newest = saved(actor, tmp_path / "trial", number)
    (newest / "weights.safetensors").write_bytes(b"cut off")
    again = TrialActor(configs[0])
    again.restore(result_at(newest, 3))
    assert rows(again, 2) == unbroken[2:]  # from epoch 2, whose checkpoint is whole


def test_a_storage_without_room_for_a_checkpoint_is_a_fault_of_the_machine(configs, tmp_path, monkeypatch):
    """Ray copies a checkpoint from the worker's own disk to the storage; there is room on the first alone."""
    actor = TrialActor(configs[0])
    (tmp_path / "worker").mkdir()
    free = {tmp_path: 1_200_000, tmp_path / "worker": 10**9}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    fault = rf"{tmp_path}: No space left on device: a checkpoint needs \d+\.\d MB, and 1\.2 MB are free\. Cure: free"
    with pytest.raises(MachineFault, match=fault):
        actor.save_checkpoint(str(tmp_path / "worker" / "checkpoint_000000"))


def test_without_any_intact_checkpoint_a_crashed_trial_starts_over(configs, tmp_path):
    actor = TrialActor(configs[0])
    first = rows(actor, 1)
    newest = saved(actor, tmp_path / "trial", 0)
    (newest / "manifest.json").unlink()
    again = TrialActor(configs[0])
    again.restore(result_at(newest, 1))
    assert rows(again, 1) == first


def test_a_trial_resumed_from_an_earlier_run_reports_its_epoch_a_second_time(configs, tmp_path):
    actor = TrialActor(configs[0])
    reported = rows(actor, 2)
    folder = saved(actor, tmp_path / "trial", 0)
    reported += rows(actor, 1)
    resumed = TrialActor({"run": {**configs[0]["run"], "resume_from": str(folder)}})
    assert rows(resumed, 2) == reported[1:]


def test_a_trial_that_died_after_its_last_epoch_reports_it_again(configs, tmp_path):
    actor = TrialActor(configs[0])
    reported = rows(actor, 4)
    folder = saved(actor, tmp_path / "trial", 0)
    again = TrialActor(configs[0])
    again.restore(result_at(folder, 4))
    assert rows(again, 1) == reported[3:]


def test_a_reused_actor_gives_the_numbers_of_a_fresh_one(configs):
    reused = TrialActor(configs[0])
    reused.step()
    assert reused.reset_config(configs[1])
    assert rows(reused, 2) == rows(TrialActor(configs[1]), 2)


@pytest.mark.parametrize(
    ("machine", "assigned", "device"),
    [
        ({"device": "auto"}, [0], "cuda:0"),
        ({"device": "auto"}, [], "cpu"),
        ({"device": "cpu"}, [0], "cpu"),
        ({"device": "cuda"}, [3], "cuda:0"),
    ],
)
def test_the_device_is_what_ray_assigned_and_not_what_the_node_has(monkeypatch, machine, assigned, device):
    monkeypatch.setattr(trial_module.ray, "get_gpu_ids", lambda: assigned)
    assert assigned_device(parse_machine(machine)) == device


def test_system_metrics_are_reported_where_they_are_switched_on(configs):
    machine = {**configs[0]["run"]["machine"], "system_metrics": "on"}
    record = TrialActor({"run": {**configs[0]["run"], "machine": machine}}).step()["record"]
    assert record["system_cpu_percent"] > 0
    assert "system_cpu_percent" not in TrialActor(configs[0]).step()["record"]  # auto: only where a GPU is


@pytest.mark.parametrize("switch", ["auto", "on"])
def test_a_gpu_that_cannot_be_read_ends_a_trial_only_on_request(switch, monkeypatch, caplog):
    def broken(_device):
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(trial_module, "SystemUse", broken)
    if switch == "on":
        with pytest.raises(RuntimeError, match="Not Supported"):
            trial_module._system_use(switch, torch.device("cuda:0"))
    else:
        assert trial_module._system_use(switch, torch.device("cuda:0")) is None
        assert "system metrics are left out: Not Supported" in caplog.text
