"""Whole files and digests."""

import errno
import hashlib
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raydml.ops import files
from raydml.ops.files import digest_of, folder_written_whole, require_space, write_whole
from tests.images.processes import run_children


@pytest.mark.parametrize("fsync", [False, True])
@pytest.mark.parametrize("content", ["a\nä\n", "a\nä\n".encode(), lambda path: path.write_text("a\nä\n", "utf-8")])
def test_a_file_has_its_content_and_nothing_else_is_left(tmp_path, content, fsync):
    (tmp_path / "name.json").write_text("old and much longer than what is new")
    assert write_whole(tmp_path / "name.json", content, fsync=fsync) == tmp_path / "name.json"
    assert (tmp_path / "name.json").read_bytes() == b"a\n\xc3\xa4\n"
    assert [path.name for path in tmp_path.iterdir()] == ["name.json"]


@pytest.mark.parametrize("several_writers", [False, True])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, several_writers):
    (tmp_path / "name").write_text("old")

    def fail(path):
        path.write_text("half")
        assert path.parent == tmp_path
        assert path.name != "name"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_whole(tmp_path / "name", fail, several_writers=several_writers)
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert (tmp_path / "name").read_text() == "old"


def test_several_writers_never_share_a_partial_file(tmp_path):
    names = []
    for _ in range(2):
        write_whole(tmp_path / "name", lambda path: (names.append(path), path.touch()), several_writers=True)
    assert names[0] != names[1]


def test_a_digest_is_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 9000  # more than two blocks
    (tmp_path / "file").write_bytes(content)
    assert digest_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


WRITERS = {
    "bytes": lambda path: path.write_bytes(bytes(100_000)),
    "torch": lambda path: torch.save({"a": torch.ones(25_000)}, path),  # RuntimeError: unexpected pos
    "safetensors": lambda path: save_file({"a": torch.ones(25_000)}, path),  # SafetensorError: I/O error
    "numpy": lambda path: np.ones(25_000).tofile(path),  # OSError without a number
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_without_room_is_an_error_of_the_system_that_names_the_file(tmp_path, writer):
    """A limit of the process makes a write in the middle of the file fail, as a full disk does."""

    def child(queue):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            write_whole(tmp_path / "file.npy", WRITERS[writer])
        except OSError as error:
            queue.put((error.errno, error.strerror, error.filename))

    assert run_children(child, 1) == [(0, (errno.EFBIG, "File too large", str(tmp_path / "file.npy")))]
    assert not list(tmp_path.iterdir())


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_whole(tmp_path / "file", fail)
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file", "text")


def test_space_is_required_before_a_file_or_folder_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: _Usage(3_000_000, place))
    require_space(tmp_path / "a" / "b", 1_900_000, "a checkpoint")  # a MiB stays in reserve
    with pytest.raises(OSError, match=r"a checkpoint needs 2\.0 MB, and 3\.0 MB are free") as refused:
        require_space(tmp_path / "a" / "b", 2_000_000, "a checkpoint")
    assert refused.value.errno == errno.ENOSPC
    assert refused.value.filename == str(tmp_path / "a" / "b")


class _Usage:
    def __init__(self, free, place):
        assert place.exists()
        self.free = free


@pytest.mark.parametrize("before", ["nothing", "empty", "files"])
def test_a_folder_appears_when_it_is_complete_and_leaves_nothing_when_it_fails(tmp_path, before):
    folder = tmp_path / "folder"
    if before != "nothing":
        folder.mkdir()
    if before == "files":
        (folder / "old").write_text("old")

    def write_half():
        with folder_written_whole(folder) as inside:
            (inside / "half").write_text("half")
            assert folder.exists() == (before != "nothing")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert {path.name for path in tmp_path.rglob("*")} - {"folder"} == ({"old", "half"} if before == "files" else set())
    with folder_written_whole(folder) as inside:
        (inside / "new").write_text("new")
    assert (folder / "new").read_text() == "new"
    assert (folder / "old").exists() == (before == "files")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_empty_folder_that_exists_keeps_its_place(tmp_path):
    """It may be a mount, or in a folder that cannot be written."""
    folder = tmp_path / "empty"
    folder.mkdir()
    inode = folder.stat().st_ino
    with pytest.raises(FileNotFoundError), folder_written_whole(folder) as place:
        (place / "a").replace(place / "b")
    assert list(folder.iterdir()) == []
    with folder_written_whole(folder) as place:
        (place / "a").write_text("1")
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert folder.stat().st_ino == inode
