"""Embeddings of several networks side by side, by hand."""

import numpy as np
import pytest

from raydml.evaluation.ensemble import EnsembleError, concatenated
from raydml.evaluation.saved_embeddings import SavedEmbeddings


def kept(rows, labels=(0, 1, 0), paths=("a", "b", "c"), roles=None):
    return SavedEmbeddings(
        np.array(rows, dtype=np.float32), np.array(labels), ("x", "y"), tuple(paths), roles, {"part": "test"}
    )


ONE = kept([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
TWO = kept([[10.0], [-1.0], [5.0]])


def test_each_network_has_the_same_say_and_rows_have_length_one():
    found = concatenated([ONE, TWO])
    half = 2**-0.5
    expected = [[0.6 * half, 0.8 * half, half], [0, half, -half], [0, 0, half]]
    np.testing.assert_allclose(found.embeddings, expected, rtol=1e-6)
    assert found.embeddings.dtype == np.float32
    assert found.labels.tolist() == [0, 1, 0]
    assert found.paths == ("a", "b", "c")
    assert found.facts == {"part": "test", "num_networks": 2}


def test_distances_are_the_mean_of_the_networks_own():
    """Squared, of unit rows: what makes a concatenation a vote."""
    generator = np.random.default_rng(0)
    parts = [kept(generator.standard_normal((3, dim))) for dim in (4, 7, 2)]
    rows = concatenated(parts).embeddings.astype(np.float64)
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
    with pytest.raises(EnsembleError, match="part 2 of the ensemble is not of the images of part 1"):
        concatenated([ONE, other])


def test_no_part_is_refused():
    with pytest.raises(EnsembleError, match="at least one"):
        concatenated([])
