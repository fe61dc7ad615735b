"""Checkpoints that are written while a trial goes on: when, of which moment, how many, and what a failure leads to."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from raydml.training import checkpoint
from raydml.training.checkpoint_writer import CheckpointWriter


class Trained:
    """A trainer after some epochs, whose weights are the number of the epoch."""

    def __init__(self):
        self.weights = torch.zeros(3)
        self.best_weights = {"w": torch.zeros(3)}
        self.epoch = self.best_epoch = 0

    def train(self, *, improves=True):
        self.epoch += 1
        self.weights += 1
        if improves:
            self.best_epoch, self.best_weights = self.epoch, {"w": self.weights.clone()}

    def contents(self, snapshots):
        state = snapshots.take({"weights": self.weights, "epoch": self.epoch})
        return {"state": state, "model_card": {"epoch": self.epoch}, "best_weights": self.best_weights, "history": []}


@pytest.fixture
def trained():
    return Trained()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def held(monkeypatch):
    """Hold the writing thread until ``go`` is set; ``begun`` counts."""
    held, save = SimpleNamespace(go=threading.Event(), begun=[]), checkpoint.save

    def waiting(folder, **contents):
        held.begun.append(folder.name)
        assert held.go.wait(30)
        return save(folder, **contents)

    monkeypatch.setattr(checkpoint, "save", waiting)
    return held


def test_a_checkpoint_holds_the_moment_at_which_it_was_begun(tmp_path, trained, held):
    writer = CheckpointWriter(tmp_path / "trial", every_s=0)
    trained.train()
    writer.begin_if_due(trained)
    trained.train()  # at once: nothing waits for the thread
    writer.begin_if_due(trained)
    assert held.begun == ["checkpoint_000001"], "one at a time"
    held.go.set()
    writer.wait()
    first = tmp_path / "trial" / "checkpoint_000001"
    assert checkpoint.is_intact(first)
    assert torch.equal(checkpoint.load_state(first)["weights"], torch.ones(3))
    assert torch.equal(checkpoint.load_weights(first)["w"], torch.ones(3))
    writer.begin_if_due(trained)
    writer.wait()
    assert held.begun == ["checkpoint_000001", "checkpoint_000002"]
    assert checkpoint.load_state(tmp_path / "trial" / "checkpoint_000002")["weights"].tolist() == [2, 2, 2]


def test_one_is_begun_only_when_the_time_has_come_and_there_is_something_new(tmp_path, trained, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr("raydml.training.checkpoint_writer.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    writer = CheckpointWriter(tmp_path / "trial", every_s=60)
    trained.train()
    for seconds, expected in ((59.9, []), (0.2, ["checkpoint_000001"]), (100, ["checkpoint_000001"])):
        now_s[0] += seconds
        writer.begin_if_due(trained)
        writer.wait()
        assert (names(tmp_path / "trial") if (tmp_path / "trial").exists() else []) == expected
    trained.train()
    now_s[0] += 1
    writer.begin_if_due(trained)
    writer.wait()
    assert names(tmp_path / "trial") == ["checkpoint_000001", "checkpoint_000002"]
    trained.train()
    assert writer.write(trained).name == "checkpoint_000003", "one that is asked for is written at once"
    assert names(tmp_path / "trial") == ["checkpoint_000002", "checkpoint_000003"], "the newest two stay"


def test_the_best_weights_are_written_when_they_have_changed(tmp_path, trained):
    writer = CheckpointWriter(tmp_path / "trial", every_s=0)
    inodes = []
    for improves in (True, False, True):
        trained.train(improves=improves)
        folder = writer.write(trained)
        assert checkpoint.is_intact(folder)
        assert checkpoint.load_weights(folder)["w"].tolist() == [trained.best_epoch] * 3
        inodes.append(os.stat(folder / "weights.safetensors").st_ino)
    assert inodes[0] == inodes[1] != inodes[2]


@pytest.mark.parametrize("trouble", ["no links", "gone"])
def test_weights_that_cannot_be_shared_are_written(tmp_path, trained, monkeypatch, trouble):
    writer = CheckpointWriter(tmp_path / "trial", every_s=0)
    trained.train()
    first = writer.write(trained)
    if trouble == "gone":
        (first / "weights.safetensors").unlink()
    else:

        def refuse(*_paths):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    trained.train(improves=False)
    second = writer.write(trained)
    assert checkpoint.is_intact(second)
    assert checkpoint.load_weights(second)["w"].tolist() == [1, 1, 1]


def test_what_could_not_be_written_is_raised_and_written_later(tmp_path, trained, monkeypatch):
    def full(*_arguments, **_names):
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(tmp_path / "trial", every_s=0)
    trained.train()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "require_space", full)
        writer.begin_if_due(trained)
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    assert checkpoint.is_intact(writer.write(trained))


def test_a_trial_that_starts_over_keeps_what_it_writes(tmp_path, trained):
    """Its damaged checkpoints have higher numbers."""
    for number in (8, 9):
        (tmp_path / f"checkpoint_{number:06d}").mkdir()
        (tmp_path / f"checkpoint_{number:06d}" / "state.pt").write_bytes(b"cut off")
    writer = CheckpointWriter(tmp_path, every_s=0)
    for expected in (["checkpoint_000001"], ["checkpoint_000001", "checkpoint_000002"]):
        trained.train()
        assert checkpoint.is_intact(writer.write(trained))
        assert names(tmp_path) == expected


def test_damaged_weights_are_not_shared(tmp_path, trained):
    writer = CheckpointWriter(tmp_path, every_s=0)
    trained.train()
    file = writer.write(trained) / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    trained.train(improves=False)
    assert checkpoint.is_intact(writer.write(trained))


def test_a_trial_that_goes_on_writes_into_its_new_folder(tmp_path, trained):
    old = CheckpointWriter(tmp_path / "run-000" / "trial", every_s=0)
    trained.train()
    begun_from = old.write(trained)
    cut_off = tmp_path / "run-001" / "trial" / ".checkpoint_000007.0123.partial"
    cut_off.mkdir(parents=True)
    writer = CheckpointWriter(tmp_path / "run-001" / "trial", every_s=60)
    writer.goes_on_from(begun_from, trained)
    assert not writer.begin_if_due(trained)
    assert names(cut_off.parent) == [cut_off.name], "another process may be writing it: this one only looks so far"
    first = writer.write(trained)
    assert first.parent != begun_from.parent, "in the folder of this run"
    trained.train(improves=False)
    after = writer.write(trained)
    assert names(cut_off.parent) == [first.name, after.name], "what a killed process has left is removed"
    assert os.path.samefile(after / "weights.safetensors", begun_from / "weights.safetensors")
