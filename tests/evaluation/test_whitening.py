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
    with pytest.raises(RetrievalError, match=r"(have no variance|hold NaN or infinity)\. Cure: embeddings"):
        learn_whitening(rows, "some images")


def kept(names, part, dataset="cub200", seed=0, dim=3, **facts):
    rows = embeddings(4, dim, seed)
    labels = np.arange(4) % len(names)
    return SavedEmbeddings(rows, labels, names, tuple("abcd"), None, {"part": part, "dataset": dataset, **facts})


FILE = Path("val.npz")


def test_classes_that_are_scored_are_not_learned_on():
    scored = kept(("x", "y"), "test", seed=1)
    learned = learn_on_kept(kept(("a", "b"), "val"), scored, FILE)
    assert learned.learned_on == "val.npz: cub200, val, by an unknown model"
    for dataset in ("cub200", "cars196"):
        with pytest.raises(RetrievalError, match="1 of its 2 classes are to be scored, the first is 'x'"):
            learn_on_kept(kept(("x", "b"), "val", dataset), scored, FILE)
    with pytest.raises(RetrievalError, match="these are test classes"):
        learn_on_kept(kept(("a", "b"), "test", "cars196"), scored, FILE)
    with pytest.raises(RetrievalError, match=r"its embeddings have 5 dimensions, and those that are scored 3"):
        learn_on_kept(kept(("a", "b"), "val", dim=5), scored, FILE)
    with pytest.raises(RetrievalError, match=r"3 dimensions .* have 5"):
        learned.apply(embeddings(4, 5))


def test_the_class_of_distractors_is_no_shared_class():
    names, roles = ("x", "(distractor)"), ("", "distractor") * 2
    scored = kept(names, "all", seed=1)._replace(roles=roles)
    assert learn_on_kept(kept(("a", "(distractor)"), "all")._replace(roles=roles), scored, FILE).num_images == 4


@pytest.mark.parametrize(
    ("dim", "factor", "is_same"),
    [(8, 1, True), (8, 1 + 1e-6, True), (8, 1 + 1e-4, False), (3, 1, True), (3, 1 + 1e-6, False)],
)
def test_images_that_are_scored_are_not_learned_on_under_other_names(dim, factor, is_same):
    """One image of the two sets is the same one; a network may have rounded it differently."""
    scored = kept(("x", "y"), "test", seed=1, dim=dim)
    rows = embeddings(4, dim)
    rows[2] = (scored.embeddings[3].astype(np.float64) * factor).astype(np.float32)
    copy = kept(("a", "b"), "all", "image_folder", dim=dim)._replace(embeddings=rows, paths=("w", "x", "y", "z"))
    if is_same:
        with pytest.raises(
            RetrievalError, match=r"1 of its 4 embeddings are .* the first is y \(d among these\).*Cure"
        ):
            learn_on_kept(copy, scored, FILE)
    else:
        assert learn_on_kept(copy, scored, FILE).num_images == 4


@pytest.mark.parametrize(
    ("of_kept", "of_scored", "refused"),
    [
        ({"checkpoint": "m/a/checkpoint_3"}, {"checkpoint": "/elsewhere/m/a/checkpoint_3"}, ""),
        ({"checkpoint": "m/a/checkpoint_3"}, {"checkpoint": "m/a/checkpoint_4"}, "by m/a/checkpoint_3, and"),
        ({"checkpoint": "m/a/checkpoint_3"}, {}, "and those that are scored by an unknown model"),
        ({"checkpoint": "backbone:resnet18"}, {"checkpoint": "backbone:resnet50"}, "by backbone:resnet18, and"),
        ({"checkpoint": "a/c", "fingerprint": "p"}, {"checkpoint": "a/c", "fingerprint": "q"}, "fingerprint: 'p'"),
        ({"checkpoint": "a/c", "fingerprint": "p"}, {"checkpoint": "a/d", "fingerprint": "p"}, "by a/c, and"),
        ({"checkpoint": "a/c", "fingerprint": "p"}, {"checkpoint": "a/c"}, ""),
        ({"checkpoint": "a/c", "weights": "1"}, {"checkpoint": "runs:/1/model", "weights": "1"}, ""),
        ({"checkpoint": "a/c", "weights": "1"}, {"checkpoint": "a/c", "weights": "2"}, "weights: '1' and '2'"),
    ],
)
def test_another_model_s_embeddings_are_not_learned_on(of_kept, of_scored, refused):
    one, other = kept(("a", "b"), "val", **of_kept), kept(("x", "y"), "test", seed=1, **of_scored)
    if refused:
        with pytest.raises(RetrievalError, match=f"{refused}.* Cure: embeddings of other classes by"):
            learn_on_kept(one, other, FILE)
    else:
        assert learn_on_kept(one, other, FILE).num_images == 4
