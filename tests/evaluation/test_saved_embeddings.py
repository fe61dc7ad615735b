"""Embeddings written and read again, files of other kinds, and ensembles by hand."""

import json
import zipfile

import numpy as np
import pytest

from raydml.evaluation.saved_embeddings import (
    SavedEmbeddings,
    SavedEmbeddingsError,
    concatenate,
    load_embeddings,
    save_embeddings,
)

ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)
LABELS = np.array([0, 1, 0])
REST = {
    "class_names": ("Äpfel", "pears"),
    "paths": ("a.jpg", "b c.jpg", "d.jpg"),
    "roles": None,
    "facts": {"part": "val", "k": [1, 2]},
}


@pytest.mark.parametrize("roles", [None, ("query", "gallery", "query")])
def test_everything_comes_back(tmp_path, roles):
    path = save_embeddings(tmp_path / "new" / "x.npz", SavedEmbeddings(ROWS, LABELS, **{**REST, "roles": roles}))
    assert [item.name for item in path.parent.iterdir()] == ["x.npz"]
    saved = load_embeddings(path)
    np.testing.assert_array_equal(saved.embeddings, ROWS)
    np.testing.assert_array_equal(saved.labels, LABELS)
    assert saved.embeddings.dtype == np.float32
    assert saved.class_names == ("Äpfel", "pears")
    assert saved.paths == ("a.jpg", "b c.jpg", "d.jpg")
    assert saved.roles == roles
    assert saved.facts == {"part": "val", "k": [1, 2]}


def test_the_file_holds_no_pickled_object(tmp_path):
    path = save_embeddings(tmp_path / "x.npz", SavedEmbeddings(ROWS, LABELS, **REST))
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
        ({"labels": np.array(0)}, r"integers \(N,\)"),
        ({"embeddings": np.where(ROWS == 3, np.nan, ROWS)}, "1 embeddings are not finite"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused_before_a_file_is_written(tmp_path, change, message):
    arguments = {"embeddings": ROWS, "labels": LABELS, **REST, **change}
    with pytest.raises(SavedEmbeddingsError, match=message):
        save_embeddings(tmp_path / "x.npz", SavedEmbeddings(**arguments))
    assert list(tmp_path.iterdir()) == []


def write_text(path):
    path.write_text("nothing")


def write_other_arrays(path):
    np.savez(path, a=np.zeros(2))


def write_damaged(path):
    save_embeddings(path, SavedEmbeddings(ROWS, LABELS, **REST))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def write_objects(path):
    arrays = {"embeddings": ROWS, "labels": LABELS, "facts": np.array(json.dumps({}))}
    np.savez(path, **arrays, class_names=np.array(["a", None], dtype=object), paths=np.array(["a", "b", "c"]))


def write_nothing(path):
    assert not path.exists()


def write_one_array(path):
    with open(path, "wb") as file:
        np.save(file, ROWS)


def written_with(path, **changes):
    arrays = {"embeddings": ROWS, "labels": LABELS, "class_names": np.array(["a", "b"]), "paths": np.array(["a"] * 3)}
    np.savez(path, **{**arrays, "facts": np.array("{}"), **changes})


def write_facts_without_names(path):
    written_with(path, facts=np.array("[1]"))


def write_deep_facts(path):
    written_with(path, facts=np.array("[" * 100_000))


def write_paths_in_a_table(path):
    written_with(path, paths=np.array([["a"], ["b"], ["c"]]))


def write_a_header_that_claims_petabytes(path):
    written_with(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = members["embeddings.npy"]
    shape = b"(3, 2), "
    members["embeddings.npy"] = header.replace(shape + b"}" + b" " * 13, b"(999999999999, 999), }", 1)
    assert members["embeddings.npy"] != header
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "write",
    [
        write_text, write_other_arrays, write_damaged, write_objects, write_nothing, write_one_array,
        write_facts_without_names, write_deep_facts, write_paths_in_a_table, write_a_header_that_claims_petabytes,
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, write):
    write(tmp_path / "x.npz")
    with pytest.raises(SavedEmbeddingsError, match="--save-embeddings"):
        load_embeddings(tmp_path / "x.npz")


def kept(rows, labels=(0, 1, 0), paths=("a", "b", "c"), roles=None):
    return SavedEmbeddings(
        np.array(rows, dtype=np.float32), np.array(labels), ("x", "y"), tuple(paths), roles, {"part": "test"}
    )


ONE = kept([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
TWO = kept([[10.0], [-1.0], [5.0]])


def test_each_network_weighs_the_same_and_rows_have_length_one():
    found = concatenate([ONE, TWO])
    half = 2**-0.5
    expected = [[0.6 * half, 0.8 * half, half], [0, half, -half], [0, 0, half]]
    np.testing.assert_allclose(found.embeddings, expected, rtol=1e-6)
    assert found.embeddings.dtype == np.float32
    assert found.labels.tolist() == [0, 1, 0]
    assert found.paths == ("a", "b", "c")
    assert found.facts == {"part": "test", "num_networks": 2}


def test_distances_are_the_mean_of_the_networks_own():
    """Squared distances of unit rows."""
    generator = np.random.default_rng(0)
    parts = [kept(generator.standard_normal((3, dim))) for dim in (4, 7, 2)]
    rows = concatenate(parts).embeddings.astype(np.float64)
    for one, two in ((0, 1), (0, 2), (1, 2)):
        each = []
        for part in parts:
            unit = part.embeddings / np.linalg.norm(part.embeddings, axis=1, keepdims=True)
            each.append(((unit[one] - unit[two]) ** 2).sum())
        assert ((rows[one] - rows[two]) ** 2).sum() == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        kept([[1.0], [1.0], [1.0]], labels=(0, 1, 1)),
        kept([[1.0], [1.0], [1.0]], paths=("a", "c", "b")),
        kept([[1.0], [1.0], [1.0]], roles=("query", "gallery", "query")),
    ],
)
def test_embeddings_of_other_images_are_refused(other):
    with pytest.raises(SavedEmbeddingsError, match="part 2 of the ensemble is not of the images of part 1"):
        concatenate([ONE, other])


def test_no_part_is_refused():
    with pytest.raises(SavedEmbeddingsError, match="at least one"):
        concatenate([])


def test_a_damaged_file_of_a_study_is_named_with_the_two_files_to_delete(tmp_path):
    whole = save_embeddings(tmp_path / "s" / "final" / "refit-000.npz", SavedEmbeddings(ROWS, LABELS, **REST))
    (tmp_path / "s" / "study.json").write_text("{}")
    content = whole.read_bytes()
    nan = np.full_like(ROWS, np.nan)
    for change in (lambda: whole.write_bytes(content[:-50]), lambda: written_with(whole, embeddings=nan)):
        change()
        with pytest.raises(SavedEmbeddingsError) as caught:
            load_embeddings(whole)
        assert str(caught.value).startswith(f"{whole} is damaged (")
        assert f"delete it and refit-000.json beside it, then launch.py resume {tmp_path / 's'}" in str(caught.value)
        assert "save-embeddings" not in str(caught.value)
