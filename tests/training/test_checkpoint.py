import hashlib
import json
import os
import shutil

import pytest
import torch

from raydml.training import checkpoint
from raydml.training.checkpoint import CheckpointError

FILES = ("state.pt", "weights.safetensors", "model.json", "history.json", "manifest.json")


def write(folder, epoch=1):
    weights = {"w": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(())}  # w is not contiguous
    state = {"epoch": epoch, "best": None, "generator": 2**127 - 1, "nested": [{"x": torch.ones(2)}]}
    return checkpoint.save(folder, state=state, model_card={"epoch": epoch}, best_weights=weights)


def test_what_was_saved_comes_back(tmp_path):
    folder = write(tmp_path / "checkpoint_000000", epoch=7)
    state = checkpoint.load_state(folder)
    assert (state["epoch"], state["best"], state["generator"]) == (7, None, 2**127 - 1)
    assert torch.equal(state["nested"][0]["x"], torch.ones(2))
    weights = checkpoint.load_weights(folder)
    assert torch.equal(weights["w"], torch.arange(6.0).view(2, 3).T)
    assert checkpoint.load_card(folder)["epoch"] == 7
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000000"]


def test_the_manifest_states_the_digests_of_the_files(tmp_path):
    folder = write(tmp_path / "c")
    stated = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(stated) == set(FILES[:4])
    for name, facts in stated.items():
        content = (folder / name).read_bytes()
        assert facts == {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_state_is_no_pickle_that_runs_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("code ran",))

    folder = write(tmp_path / "c")
    torch.load(folder / "state.pt", weights_only=True)
    checkpoint.save(tmp_path / "d", state={"trap": Trap()}, model_card={}, best_weights={})
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        checkpoint.load_state(tmp_path / "d")
    assert "weights_only" not in str(error.value)


def signed(folder):
    """Make the manifest fit the files, as in a checkpoint that somebody else has made."""
    files = {name: (folder / name).read_bytes() for name in FILES[:3]}
    facts = {name: {"size_bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for name, b in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"files": facts}))


def test_what_cannot_be_read_is_refused_with_a_manifest_that_fits(tmp_path):
    """More in tests/fuzz."""
    folder = write(tmp_path / "c")
    (folder / "model.json").write_text("[" * 100_000)
    signed(folder)
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read"):
        checkpoint.load_card(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "missing", "empty"])
def test_a_harmed_file_is_noticed(tmp_path, name, harm):
    folder = write(tmp_path / "c")
    assert checkpoint.is_intact(folder)
    path = folder / name
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if harm == "empty" else path.read_bytes()[:-1].rstrip()[:-1])
    assert not checkpoint.is_intact(folder)
    loader = {"weights.safetensors": checkpoint.load_weights, "model.json": checkpoint.load_card}
    loader["history.json"] = checkpoint.load_history
    with pytest.raises(CheckpointError, match=str(folder)):
        loader.get(name, checkpoint.load_state)(folder)
    damaged_folders = []
    assert checkpoint.newest_intact(tmp_path, damaged_folders) is None
    assert str(folder) in damaged_folders[0]


def test_the_history_is_that_of_all_epochs_and_older_checkpoints_have_none(tmp_path):
    folder = write(tmp_path / "c")
    assert checkpoint.load_history(folder) == []
    epochs = [{"epoch": 1, "val_map_at_r": 0.5}, {"epoch": 2, "val_map_at_r": 0.25}]
    (folder / "history.json").write_text(json.dumps({"epochs": epochs}))
    with pytest.raises(CheckpointError, match="not as it was written"):
        checkpoint.load_history(folder)
    stated = json.loads((folder / "manifest.json").read_text())["files"]
    text = (folder / "history.json").read_bytes()
    stated["history.json"] = {"size_bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": stated}))
    assert checkpoint.load_history(folder) == epochs
    for broken in ('{"epochs": 3}', '{"epochs": [3]}', '{"epochs": [{}]}', "[]"):
        (folder / "history.json").write_text(broken)
        facts = {"size_bytes": len(broken), "sha256": hashlib.sha256(broken.encode()).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps({"files": {**stated, "history.json": facts}}))
        with pytest.raises(CheckpointError):
            checkpoint.load_history(folder)
    (folder / "history.json").unlink()
    del stated["history.json"]
    (folder / "manifest.json").write_text(json.dumps({"files": stated}))
    assert checkpoint.is_intact(folder), "as an older version wrote it"
    assert checkpoint.load_history(folder) == []


@pytest.mark.parametrize("name", FILES[:3])
def test_one_changed_bit_is_noticed(tmp_path, name):
    folder = write(tmp_path / "c")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert not checkpoint.is_intact(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 3}', '{"files": {"state.pt": 1}}', "not json"])
def test_a_strange_manifest_is_not_intact_and_does_not_crash(tmp_path, content):
    folder = write(tmp_path / "c")
    (folder / "manifest.json").write_text(content)
    assert not checkpoint.is_intact(folder)


def test_newest_intact_goes_back_past_harmed_ones_and_counts_in_numbers(tmp_path):
    for number in ("000002", "9", "000010", "000011"):
        write(tmp_path / f"checkpoint_{number}")
    (tmp_path / "checkpoint_000011" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint_000012").mkdir()
    (tmp_path / "result_99.json").write_text("{}")
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "checkpoint_000010"
    shutil.rmtree(tmp_path / "checkpoint_000010")
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "checkpoint_9"


def test_newest_intact_of_nothing_is_none(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None
    assert checkpoint.newest_intact(tmp_path / "not there") is None


def test_a_new_folder_appears_only_when_complete(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "checkpoint_000000")
    assert list(tmp_path.iterdir()) == []  # what was written would keep a full disk full


def test_rewriting_a_folder_is_never_seen_half_done(tmp_path, monkeypatch):
    folder = write(tmp_path / "c", epoch=1)

    def full(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        write(folder, epoch=2)
    assert not checkpoint.is_intact(folder)  # new state beside old weights
    monkeypatch.undo()
    write(folder, epoch=2)
    assert checkpoint.load_state(folder)["epoch"] == 2
    assert checkpoint.is_intact(folder)


def test_a_card_holds_version_and_commit_and_only_real_json(tmp_path):
    card = checkpoint.load_card(write(tmp_path / "c"))
    assert card["raydml_version"] == checkpoint.version()
    assert card["git_commit"] == checkpoint.git_commit()
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path / "d", state={}, model_card={"loss": float("nan")}, best_weights={})
    assert not (tmp_path / "d").exists()


def test_the_commit_is_none_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert checkpoint.git_commit.__wrapped__() is None


def test_the_commit_is_that_of_our_sources_and_says_when_they_were_changed(tmp_path, monkeypatch):
    source = tmp_path / "checkpoint.py"
    source.write_text("one")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]

    def run(*arguments):
        import subprocess

        return subprocess.run([*git, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    run("init")
    monkeypatch.setattr(checkpoint, "__file__", str(source))
    assert checkpoint.git_commit.__wrapped__() is None  # in a repository, but not part of it
    run("add", "checkpoint.py")
    run("commit", "--no-verify", "-m", "one")
    commit = run("rev-parse", "HEAD")
    assert checkpoint.git_commit.__wrapped__() == commit
    source.write_text("two")
    os.utime(source)
    assert checkpoint.git_commit.__wrapped__() == f"{commit}-dirty"
    monkeypatch.setattr(checkpoint.subprocess, "run", lambda *_a, **_k: (_ for _ in ()).throw(FileNotFoundError()))
    assert checkpoint.git_commit.__wrapped__() is None
