"""PCA whitening against scikit-learn and a formula; what it is never learned on."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from raydml.evaluation.nearness import RetrievalError
from raydml.evaluation.saved_embeddings import SavedEmbeddings
from raydml.evaluation.whitening import learn_on_kept, learn_whitening


def embeddings(num_images, dim, seed=0):
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((dim, dim)) * np.arange(1, dim + 1)
    return (generator.standard_normal((num_images, dim)) @ mixing + 3).astype(np.float32)


def test_whitened_rows_are_those_of_another_library():
    learned_on, rows = embeddings(300, 8), embeddings(40, 8, seed=1)
    found = learn_whitening(learned_on, "some images").apply(rows)
    pca = PCA(whiten=True, svd_solver="full").fit(learned_on.astype(np.float64))
    expected = pca.transform(rows.astype(np.float64))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    # The sign of a direction is arbitrary: the angles between rows are not.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_the_covariance_of_what_it_was_learned_on_is_the_identity():
    rows = embeddings(20_000, 4)  # in two blocks
    learned = learn_whitening(rows, "some images")
    whitened = (rows - learned.mean) @ learned.directions
    np.testing.assert_allclose(np.cov(whitened, rowvar=False, bias=True), np.eye(4), atol=1e-6)


def test_directions_without_variance_are_left_out_and_said():
    rows = embeddings(50, 6)
    rows[:, 4] = rows[:, 0]
    rows[:, 5] = 2.0
    learned = learn_whitening(rows, "the training images of its trial")
    assert learned.sentence == (
        "whitened by PCA to 4 of 6 dimensions, learned on 50 images (the training images of its trial)"
    )
    few = learn_whitening(embeddings(4, 6), "few")
    assert few.settings == {"num_images": 4, "learned_on": "few", "dimensions": 3, "dimensions_before": 6}


@pytest.mark.parametrize("rows", [np.ones((5, 3), np.float32), np.full((5, 3), np.nan, np.float32)])
def test_what_nothing_can_be_learned_on_is_refused(rows):
    with pytest.raises(RetrievalError, match=r"have no variance|hold NaN"):
        learn_whitening(rows, "some images")


def kept(names, part, dataset="cub200", dim=3):
    rows = embeddings(4, dim)
    labels = np.arange(4) % len(names)
    return SavedEmbeddings(rows, labels, names, tuple("abcd"), None, {"part": part, "dataset": dataset})


def test_classes_that_are_scored_are_not_learned_on():
    scored, file = kept(("x", "y"), "test"), Path("val.npz")
    learned = learn_on_kept(kept(("a", "b"), "val"), scored, file)
    assert learned.learned_on == "val.npz: cub200, val, by an unknown model"
    with pytest.raises(RetrievalError, match="1 of its 2 classes are to be scored, the first is 'x'"):
        learn_on_kept(kept(("x", "b"), "val"), scored, file)
    assert learn_on_kept(kept(("x", "b"), "val", "cars196"), scored, file), "another data set with a class of that name"
    with pytest.raises(RetrievalError, match="these are test classes"):
        learn_on_kept(kept(("a", "b"), "test", "cars196"), scored, file)
    with pytest.raises(RetrievalError, match=r"3 dimensions .* have 5"):
        learned.apply(embeddings(4, 5))
