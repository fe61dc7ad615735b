"""Wrong labels that were planted are found, and right ones are not."""

import csv

import numpy as np
import pytest

from raydml.report.mislabelled import suspects, write_suspects


def clusters(num_classes=5, num_each=12, spread=0.1, seed=0):
    generator = np.random.default_rng(seed)
    centres = 3 * np.eye(num_classes, 8)
    labels = np.repeat(np.arange(num_classes), num_each)
    return (centres[labels] + spread * generator.normal(size=(len(labels), 8))).astype(np.float32), labels


def test_planted_labels_are_found_and_no_others():
    embeddings, right = clusters()
    given = right.copy()
    planted = {3: 4, 20: 0, 41: 1}
    for row, label in planted.items():
        given[row] = label
    found = suspects(embeddings, given)
    assert {one.row: (one.label, one.likely) for one in found} == {
        row: (label, right[row]) for row, label in planted.items()
    }
    # Ten neighbours of the true class, but for the one other image of it that got another label: at most one.
    assert all(one.share >= 0.9 and one.own_share == 0 for one in found)
    assert suspects(embeddings, right) == []


def test_the_clearest_come_first():
    """On a line, with five neighbours: those of the second suspect are four of class 1 and one of class 0."""
    places = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 5.0, 5.1, 5.2, 5.3, 5.15, 0.25, 20.0, 20.1, 20.2, 20.3, 20.4]
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2])
    found = suspects(np.array(places, np.float32)[:, None], labels)
    assert [(one.row, one.likely, one.share) for one in found] == [(11, 0, 1.0), (10, 1, pytest.approx(0.8))]


def test_a_class_that_is_not_together_suspects_nobody():
    """The neighbours of its own images are of other classes as well: to be among them says nothing."""
    generator = np.random.default_rng(0)
    embeddings, labels = generator.normal(size=(200, 4)).astype(np.float32), generator.integers(0, 4, 200)
    assert len(suspects(embeddings, labels)) <= 2


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 1], [0, 1, 2, 3]])
def test_very_few_images_suspect_nobody(labels):
    embeddings = np.arange(len(labels), dtype=np.float32)[:, None]
    assert suspects(embeddings, np.array(labels)) == []


def test_identical_images_are_each_others_neighbours():
    embeddings = np.zeros((12, 2), np.float32)
    labels = np.array([0] * 11 + [1])
    (found,) = suspects(embeddings, labels)
    assert (found.row, found.likely, found.share) == (11, 0, 1.0)


def test_the_table_has_paths_and_names(tmp_path):
    embeddings, labels = clusters(2, 6)
    labels[2] = 1
    file = write_suspects(
        suspects(embeddings, labels), [f"a/{row}.jpg" for row in range(12)], ["pears, ripe", "figs"], tmp_path / "x.csv"
    )
    (row,) = csv.DictReader(file.read_text().splitlines())
    assert row == {
        "path": "a/2.jpg", "label": "figs", "likely_label": "pears, ripe", "share_of_likely": "1.00",
        "share_of_label": "0.00",
    }  # fmt: skip
