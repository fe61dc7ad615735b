"""Scores of prefixes against a slow ranking by angle."""

import numpy as np
import pytest

from raydml.config.trial import parse_trial
from raydml.evaluation.prefixes import prefix_dims_of, score_prefixes
from raydml.evaluation.scoring import ScoringError

TRIAL = {
    "data": {"name": "digits", "resize_px": 8, "crop_px": 8},
    "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 64},
    "loss": {"name": "contrastive"},
    "sampler": {"name": "class_balanced"},
}


def _images(num_images: int = 30, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(num_images) % 4
    points = generator.normal(size=(4, dim))[labels] + generator.normal(size=(num_images, dim))
    return (points * generator.uniform(0.1, 9, size=(num_images, 1))).astype(np.float32), labels


def _slow(embeddings: np.ndarray, labels: np.ndarray, dim: int) -> tuple[float, float]:
    """Recall@1 and MAP@R by the angle between prefixes, one query at a time."""
    firsts, averages = [], []
    for query in range(len(labels)):
        one = embeddings[query, :dim].astype(float)
        cosines = {
            other: one @ embeddings[other, :dim] / np.linalg.norm(one) / np.linalg.norm(embeddings[other, :dim])
            for other in range(len(labels))
            if other != query
        }
        order = sorted(cosines, key=lambda other: -cosines[other])
        right = [labels[other] == labels[query] for other in order]
        num_right = sum(right)
        precisions = [sum(right[: rank + 1]) / (rank + 1) for rank in range(num_right) if right[rank]]
        firsts.append(right[0])
        averages.append(sum(precisions) / num_right)
    return float(np.mean(firsts)), float(np.mean(averages))


def test_prefixes_are_ranked_by_their_angle() -> None:
    embeddings, labels = _images()
    found = score_prefixes(embeddings, labels, None, "leave_one_out", (2, 4, 6))
    for dim in (2, 4, 6):
        recall, average = _slow(embeddings, labels, dim)
        assert found[f"dim_{dim}_recall_at_1"] == pytest.approx(recall, rel=1e-12)
        assert found[f"dim_{dim}_map_at_r"] == pytest.approx(average, rel=1e-12)
    assert len(found) == 6
    assert found["dim_2_map_at_r"] < found["dim_6_map_at_r"]


def test_queries_search_the_gallery_alone() -> None:
    embeddings, labels = _images()
    roles = ["query" if image < 12 else "gallery" for image in range(30)]
    found = score_prefixes(embeddings, labels, roles, "query_gallery", (3,))
    unit = embeddings[:, :3] / np.linalg.norm(embeddings[:, :3], axis=1, keepdims=True)
    nearest = (unit[:12] @ unit[12:].T).argmax(axis=1)
    assert found["dim_3_recall_at_1"] == pytest.approx((labels[12:][nearest] == labels[:12]).mean())


def test_a_longer_prefix_is_refused() -> None:
    embeddings, labels = _images()
    with pytest.raises(ScoringError, match="dims: 7, but the embeddings have 6 dimensions"):
        score_prefixes(embeddings, labels, None, "leave_one_out", (2, 7))


def test_the_prefixes_of_a_trial_are_those_of_its_regulariser() -> None:
    assert prefix_dims_of(parse_trial(TRIAL)) == ()
    trained = {**TRIAL, "regularizers": {"matryoshka": {"dims": [16, 32]}}}
    assert prefix_dims_of(parse_trial(trained)) == (16, 32)
