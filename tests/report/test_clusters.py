"""Galleries of clusters: of clusters made by hand, and of those that real checkpoints keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_digits

from raydml.config.trial import parse_machine, parse_trial
from raydml.images.pixels import packed
from raydml.report import image_rows
from raydml.report.clusters import (
    ShownCluster,
    central_images,
    draw_clusters,
    largest_clusters,
    read_clusters,
    sample_of_clusters,
)
from raydml.report.image_rows import LabelledImages
from raydml.training.trainer import Trainer
from tests.report.drawn_squares import rows_of, squares

ASSIGNMENT = np.array([2, 2, 2, 0, 0, -1, 7, 2, 0, 2])
LABELS = np.array([0, 0, 1, 1, 1, 0, 1, 0, 0, 1])


def test_the_largest_clusters_are_shown_in_order_of_their_numbers():
    assert largest_clusters(ASSIGNMENT) == [0, 2, 7]
    assert largest_clusters(ASSIGNMENT, 2) == [0, 2]
    assert largest_clusters(ASSIGNMENT, 1) == [2]
    assert largest_clusters(np.full(3, -1)) == []


def test_a_sample_has_at_most_the_given_number_of_images_of_each_cluster():
    rows = sample_of_clusters(ASSIGNMENT, [0, 2], 3, seed=0)
    assert np.bincount(ASSIGNMENT[rows]).tolist() == [3, 0, 3]
    assert rows.tolist() == sorted(set(rows.tolist()))
    whole = sample_of_clusters(ASSIGNMENT, [0, 2, 7], 9, seed=0)
    assert whole.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    chosen = {tuple(sample_of_clusters(ASSIGNMENT, [2], 2, seed=seed)) for seed in range(20)}
    assert len(chosen) > 3


def test_the_images_nearest_to_the_mean_are_shown_of_different_classes_first():
    # Cluster 2 on a line: images 0 1 2 7 9 at 0 4 5 7 9, mean 5; distances 5 1 0 2 4.
    sampled = np.array([0, 1, 2, 6, 7, 9])
    points = np.array([[0], [4], [5], [100], [7], [9]], dtype=np.float32)
    two, seven = central_images(ASSIGNMENT, LABELS, sampled, points, num_images=4)
    # The nearest of class 1 is 2, of class 0 it is 1; then 7 (class 0) and 9 (class 1).
    assert two == ShownCluster(2, num_images=5, num_classes=2, rows=[2, 1, 7, 9])
    assert seven == ShownCluster(7, num_images=1, num_classes=1, rows=[6])


def test_a_row_for_each_cluster_with_its_size(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(image_rows, "save_picture", lambda figure, path: figures.append(figure) or path)
    shown = [ShownCluster(2, 5, 2, [2, 1, 7]), ShownCluster(7, 1, 1, [6])]
    images = LabelledImages(packed(squares(10)), LABELS, ["pears", "plums"])
    draw_clusters(shown, images, tmp_path / "c.png", title="Clusters")
    assert [[cell.number for cell in row] for row in rows_of(figures[0])] == [[2, 1, 7], [6]]
    assert [cell.name for cell in rows_of(figures[0])[0]] == ["plums", "pears", "pears"]
    texts = [text.get_text() for text in figures[0].texts]
    assert texts == ["Clusters", "cluster 2: 5 images of 2 classes", "cluster 7: 1 image of 1 class"]


def trial_of(method):
    return parse_trial(
        {
            "epochs": 1,
            "data": {
                "name": "digits",
                "resize_px": 16,
                "crop_px": 16,
                "split": {"order": "sorted", "test_fraction": 0.5, "val_fraction": 0.4},
            },
            "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 16},
            "loss": {"name": "contrastive"},
            "sampler": {"name": "class_balanced", "classes_per_batch": 2, "images_per_class": 8},
            "method": method,
            "recall_at": [1],
        }
    )


def trained(method, folder):
    trainer = Trainer(trial_of(method), parse_machine({}), device="cpu")
    for _ in trainer.epochs():
        pass
    return trainer, trainer.save(folder)


DIVIDE_CONQUER = {"name": "divide_conquer", "num_learners": 2, "finetune_from": 1.0}
MIC = {"name": "mic", "num_clusters": 4}


@pytest.mark.parametrize(("method", "buffer"), [(DIVIDE_CONQUER, "clusters"), (MIC, "surrogate_labels")])
def test_a_checkpoint_keeps_the_clusters_and_their_space(method, buffer, tmp_path):
    trainer, folder = trained(method, tmp_path / "checkpoint_1")
    labels = np.array(trainer.train_images.labels)
    kept = read_clusters(folder, trainer.trial, labels)
    assert kept is not None
    assert len(labels) == int((load_digits().target < 3).sum())
    assert kept.assignment.tolist() == dict(trainer.method.named_buffers())[buffer].tolist()
    assert len(np.unique(kept.assignment)) > 1
    assert kept.is_auxiliary == (method is MIC)
    # The network as it was trained, not as it was initialised, in evaluation mode.
    for name, value in trainer.method.state_dict().items():
        assert torch.equal(kept.method.state_dict()[name], value), name
    assert not kept.method.training
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trainer.method.eval()
    with torch.inference_mode():
        points = kept.space(images)
        features = trainer.method.network.trunk(images)
        if method is MIC:
            features = trainer.method.auxiliary_head(features)
    torch.testing.assert_close(points, features / features.norm(dim=1, keepdim=True))


def test_clusters_of_other_images_are_refused(tmp_path):
    trainer, folder = trained(MIC, tmp_path / "checkpoint_1")
    with pytest.raises(ValueError, match=r"clusters 537 training images, but there are 536"):
        read_clusters(folder, trainer.trial, np.array(trainer.train_images.labels)[:-1])


def test_methods_that_cluster_nothing_keep_nothing(tmp_path):
    trainer, folder = trained({"name": "plain"}, tmp_path / "plain")
    assert read_clusters(folder, trainer.trial, np.array(trainer.train_images.labels)) is None
    baseline = {"name": "divide_conquer", "num_learners": 1}
    trainer, folder = trained(baseline, tmp_path / "baseline")
    assert read_clusters(folder, trainer.trial, np.array(trainer.train_images.labels)) is None


def test_the_gallery_is_written(tmp_path):
    images = LabelledImages(packed(squares(10)), LABELS, ["pears", "plums"])
    path = draw_clusters([ShownCluster(7, 1, 1, [6])], images, tmp_path / "new" / "c.png", title="Clusters")
    assert imread(path).shape[1] == 700
