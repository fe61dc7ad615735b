"""The actor of a trial, called as Tune calls it: step, save, restore, reset."""

import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raydml.config.trial import Machine, parse_machine
from raydml.ops import files
from raydml.study import actor as trial_module
from raydml.study.actor import TrialActor, assigned_device
from raydml.study.faults import MachineFault
from raydml.study.folder import fingerprinted_trials
from raydml.study.remote import StudyPlace
from raydml.training import checkpoint
from raydml.training.trial_images import Catalogs
from tests.study.test_folder import space_at

METRIC = "val_map_at_r"


@pytest.fixture
def configs(tmp_path):
    space = space_at(tmp_path, overrides=["trial.epochs=4"])
    machine = Machine(device="cpu").model_dump(mode="json")
    return [
        {"run": {"key": f"search-{i:03d}", "trial": t.model_dump(mode="json"), "machine": machine, "metric": METRIC,
                 "by_class": False, "place": StudyPlace(str(tmp_path)), "resume_from": None, "gpus": 0.0,
                 "checkpoints": str(tmp_path / f"search-{i:03d}"), "rungs": [2]}}
        for i, t in enumerate(fingerprinted_trials(space, Catalogs(space.machine)))
    ]  # fmt: skip


def rows(actor, number):
    return [(row["epoch"], row[METRIC], row["done"]) for row in (actor.step() for _ in range(number))]


def checkpoints_of(config):
    return sorted(path.name for path in Path(config["run"]["checkpoints"]).iterdir())


def test_a_crashed_trial_goes_on_from_the_newest_intact_checkpoint(configs):
    unbroken = rows(TrialActor(configs[0]), 4)
    assert [epoch for epoch, _, _ in unbroken] == [1, 2, 3, 4]
    assert [done for _, _, done in unbroken] == [False, False, False, True]
    actor = TrialActor(configs[0])
    for _ in range(3):
        actor.step()
        newest = Path(actor.save().checkpoint.path)
    assert checkpoints_of(configs[0]) == ["checkpoint_000002", "checkpoint_000003"], "the newest two"
    (newest / "state.pt").write_bytes(b"cut off")
    again = TrialActor(configs[0])
    again.restore(None)
    first = again.step()
    assert [(first["epoch"], first[METRIC], first["done"]), *rows(again, 1)] == unbroken[2:]
    assert [note.partition(" ")[0] for note in first["notes"]] == [str(newest / "state.pt"), "it"]
    assert first["notes"][1].endswith("checkpoint_000002")


def test_checkpoints_are_written_while_the_next_epoch_trains(configs, monkeypatch):
    config = {"run": {**configs[0]["run"], "machine": {**configs[0]["run"]["machine"], "checkpoint_every_s": 0}}}
    unbroken = rows(TrialActor(configs[0]), 4)
    actor, go, save = TrialActor(config), threading.Event(), checkpoint.save

    def slow(*arguments, **names):
        assert go.wait(60)
        return save(*arguments, **names)

    monkeypatch.setattr(checkpoint, "save", slow)
    assert rows(actor, 3) == unbroken[:3], "two epochs were trained while the first checkpoint was held up"
    go.set()
    actor._writer.wait()
    assert "checkpoint_000002" in checkpoints_of(config) or "checkpoint_000001" in checkpoints_of(config)
    assert "checkpoint_000003" not in checkpoints_of(config), "the driver may not have its result yet"
    again = TrialActor(config)
    epoch = again._trainer.epoch
    assert epoch in (1, 2)
    assert rows(again, 4 - epoch) == unbroken[epoch:], "bit for bit, and the saved epoch is not reported again"


def test_a_trial_that_is_stopped_in_the_middle_is_saved(configs):
    unbroken = rows(TrialActor(configs[0]), 4)
    actor = TrialActor(configs[0])
    actor.step()
    actor.step()
    actor.stop()
    assert checkpoints_of(configs[0]) == ["checkpoint_000002"]
    assert rows(TrialActor(configs[0]), 2) == unbroken[2:]


@pytest.mark.parametrize(("is_stored", "is_resumed"), [(True, False), (True, True), (False, True)])
def test_a_process_that_never_trains_a_trial_leaves_the_files_of_the_one_that_does(
    configs, tmp_path, monkeypatch, is_stored, is_resumed
):
    """Tune prepares a trial in a new process, and drops that process when another one is free for the trial first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    place = StudyPlace(str(tmp_path), f"file://{tmp_path}/store" if is_stored else None)
    machine = {**configs[0]["run"]["machine"], "checkpoint_every_s": 0}
    config = {"run": {**configs[0]["run"], "place": place, "machine": machine}}
    files = place.files_of_node()
    if is_resumed:
        before = TrialActor(config)
        before.step()
        before.stop()
        names = {"resume_from": f"{tmp_path}/search-000/checkpoint_000001", "checkpoints": f"{tmp_path}/run-001"}
        config = {"run": {**config["run"], **names}}
    here = files.local(config["run"]["checkpoints"], place)
    unused, actor = TrialActor(config), TrialActor(config)
    assert (files.root / "search-000").exists() == is_resumed, "fetched, and needed until the trial trains"
    assert rows(actor, 2)[-1][0] == 2
    actor.save()
    found = sorted(here.iterdir())
    assert found
    unused.stop()
    assert sorted(here.iterdir()) == found
    actor.step()
    actor.stop()
    if is_stored:
        assert not here.exists()
        assert not list(files.root.glob("search-000/*"))
    assert TrialActor(config)._trainer.epoch == 3


def test_a_trial_is_saved_where_it_is_compared(configs):
    """One that goes on from there must not come back with another value, which a GPU may give it."""
    actor = TrialActor(configs[0])
    assert [actor.step()["should_checkpoint"] for _ in range(4)] == [False, True, False, False]


def test_what_cannot_be_saved_is_not_charged_to_the_next_trial(configs, monkeypatch, caplog):
    actor = TrialActor(configs[0])
    actor.step()

    def broken(*_arguments, **_names):
        raise RuntimeError("of the old trial")

    monkeypatch.setattr(checkpoint, "save", broken)
    assert actor.reset_config(configs[1])
    assert "the last epochs of the trial are not saved: RuntimeError: of the old trial" in caplog.text
    assert actor.step()["epoch"] == 1


def test_a_trial_that_fails_within_an_epoch_is_not_saved(configs, monkeypatch):
    actor = TrialActor(configs[0])
    actor.step()
    actor.step()

    def fails(*_arguments):
        raise ValueError("in the middle")

    monkeypatch.setattr(actor._trainer, "_step", fails)
    with pytest.raises(ValueError, match="in the middle"):
        actor.step()
    actor.stop()
    assert not Path(configs[0]["run"]["checkpoints"]).exists()


def test_a_storage_without_room_for_a_checkpoint_is_a_fault_of_the_machine(configs, tmp_path, monkeypatch):
    config = {"run": {**configs[0]["run"], "machine": {**configs[0]["run"]["machine"], "checkpoint_every_s": 0}}}
    actor = TrialActor(config)
    actor.step()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _place: SimpleNamespace(free=1_200_000))
    fault = r"search-000.*: No space left on device: a checkpoint needs \d+\.\d MB, and 1\.2 MB are free\. Cure: free"
    with pytest.raises(MachineFault, match=fault):
        actor.save()
    actor.step()  # begins to write epoch 1
    with pytest.raises(MachineFault, match=fault):
        actor.save()
    actor.stop()  # what cannot be saved does not keep it from ending
    assert not list(tmp_path.glob("search-000/*"))


def test_without_any_intact_checkpoint_a_crashed_trial_starts_over(configs):
    actor = TrialActor(configs[0])
    first = rows(actor, 1)
    newest = Path(actor.save().checkpoint.path)
    (newest / "manifest.json").unlink()
    again = TrialActor(configs[0])
    row = again.step()
    assert (row["epoch"], row[METRIC], row["done"]) == first[0]
    assert row["notes"][-1] == "it starts over: no checkpoint is intact"
    again.step()
    assert checkpoint.is_intact(Path(again.save().checkpoint.path))


def test_a_trial_resumed_from_an_earlier_run_reports_its_epoch_a_second_time(configs, tmp_path):
    actor = TrialActor(configs[0])
    reported = rows(actor, 2)
    folder = actor.save().checkpoint.path
    reported += rows(actor, 1)
    config = {"run": {**configs[0]["run"], "resume_from": str(folder), "checkpoints": str(tmp_path / "run-001")}}
    resumed = TrialActor(config)
    assert rows(resumed, 1) == reported[1:2]
    resumed.save()
    assert checkpoints_of(config) == ["checkpoint_000002"], "in the folder of this run, from which it is not repeated"
    assert rows(resumed, 1) == rows(TrialActor(config), 1) == reported[2:]


def test_a_trial_that_died_after_its_last_epoch_reports_it_again(configs):
    actor = TrialActor(configs[0])
    reported = rows(actor, 4)
    saved = actor.save().checkpoint.path
    again = TrialActor(configs[0])
    assert rows(again, 1) == reported[3:]
    assert again.save().checkpoint.path == saved, "it is whole, and not written again"


def test_the_values_of_the_classes_come_with_the_last_result_also_from_a_checkpoint(configs):
    config = {"run": {**configs[0]["run"], "by_class": True}}
    actor = TrialActor(config)
    results = [actor.step() for _ in range(4)]
    assert ["class_values" in result for result in results] == [False, False, False, True]
    assert len(results[3]["class_values"]) == 2
    actor.save()
    assert TrialActor(config).step()["class_values"] == results[3]["class_values"]
    plain = TrialActor({"run": {**configs[1]["run"], "by_class": False}})
    assert not any("class_values" in plain.step() for _ in range(4))


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


def test_a_trial_that_leaves_is_saved_and_trains_no_further_epoch_meanwhile(configs, monkeypatch):
    monkeypatch.setattr(trial_module, "_LEAVE_S", 1.0)
    actor = TrialActor(configs[0])
    actor.save_between_epochs()  # there is nothing to save yet
    actor.step()
    actor.save_between_epochs()
    folder = Path(configs[0]["run"]["checkpoints"])
    assert checkpoint.load_card(checkpoint.newest_intact(folder))["epoch"] == 1
    begin = time.monotonic()
    assert actor.step()["epoch"] == 2
    assert time.monotonic() - begin >= 1.0
    actor.stop()
