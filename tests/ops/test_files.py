"""Whole files and digests."""

import hashlib

import pytest

from raydml.ops.files import digest_of, write_whole


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
