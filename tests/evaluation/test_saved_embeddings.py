"""Embeddings written and read again, and files that are none."""

import json
import zipfile

import numpy as np
import pytest

from raydml.evaluation.saved_embeddings import SavedEmbeddingsError, load_embeddings, save_embeddings

ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)
LABELS = np.array([0, 1, 0])
REST = {
    "class_names": ["Äpfel", "pears"],
    "paths": ["a.jpg", "b c.jpg", "d.jpg"],
    "facts": {"part": "val", "k": [1, 2]},
}


@pytest.mark.parametrize("roles", [None, ("query", "gallery", "query")])
def test_everything_comes_back(tmp_path, roles):
    path = save_embeddings(tmp_path / "new" / "x.npz", ROWS, LABELS, roles=roles, **REST)
    assert [item.name for item in path.parent.iterdir()] == ["x.npz"]
    saved = load_embeddings(path)
    np.testing.assert_array_equal(saved.embeddings, ROWS)
    np.testing.assert_array_equal(saved.labels, LABELS)
    assert saved.embeddings.dtype == np.float32
    assert saved.class_names == ("Äpfel", "pears")
    assert saved.paths == ("a.jpg", "b c.jpg", "d.jpg")
    assert saved.roles == roles
    assert saved.facts == {"part": "val", "k": [1, 2]}


def test_nothing_in_the_file_is_pickled(tmp_path):
    path = save_embeddings(tmp_path / "x.npz", ROWS, LABELS, **REST)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            assert b"|O" not in archive.read(name)[:128], name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": ROWS[:2]}, "2 embeddings, 3 labels, 3 paths"),
        ({"embeddings": ROWS[0]}, r"float32 \(N, D\)"),
        ({"labels": np.array([0, 2, 0])}, "labels from 0 to 2 for 2 class names"),
        ({"labels": np.array([0, -1, 0])}, "labels from -1 to 0 for 2 class names"),
        ({"roles": ["query"]}, "1 roles"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_it_is_written(tmp_path, change, message):
    arguments = {"embeddings": ROWS, "labels": LABELS, **REST, **change}
    with pytest.raises(SavedEmbeddingsError, match=message):
        save_embeddings(tmp_path / "x.npz", **arguments)
    assert list(tmp_path.iterdir()) == []


def write_text(path):
    path.write_text("nothing")


def write_other_arrays(path):
    np.savez(path, a=np.zeros(2))


def write_damaged(path):
    save_embeddings(path, ROWS, LABELS, **REST)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def write_objects(path):
    arrays = {"embeddings": ROWS, "labels": LABELS, "facts": np.array(json.dumps({}))}
    np.savez(path, **arrays, class_names=np.array(["a", None], dtype=object), paths=np.array(["a", "b", "c"]))


def write_nothing(path):
    assert not path.exists()


@pytest.mark.parametrize("write", [write_text, write_other_arrays, write_damaged, write_objects, write_nothing])
def test_other_files_are_refused(tmp_path, write):
    write(tmp_path / "x.npz")
    with pytest.raises(SavedEmbeddingsError, match="--save-embeddings"):
        load_embeddings(tmp_path / "x.npz")
