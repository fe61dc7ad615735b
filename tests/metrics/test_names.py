"""What metrics are called, by hand."""

from __future__ import annotations

import pytest

from raydml.metrics.names import metric_label, metric_name


@pytest.mark.parametrize(
    ("metric", "name", "label"),
    [
        ("val_map_at_r", "validation MAP@R", "MAP@R"),
        ("recall_at_1", "Recall@1", "R@1"),
        ("test_recall_at_10", "test Recall@10", "R@10"),
        ("val_binary_recall_at_4", "validation binary Recall@4", "binary R@4"),
        ("r_precision", "R-precision", "R-precision"),
        ("precision_at_5", "Precision@5", "P@5"),
        ("nmi", "NMI", "NMI"),
        ("tar_at_far_1e-3", "TAR@FAR=1e-3", "TAR@FAR=1e-3"),
        ("fnmr_at_fmr_1e-4", "FNMR@FMR=1e-4", "FNMR@FMR=1e-4"),
        ("cmc_rank_5", "CMC rank-5", "CMC rank-5"),
        ("eer", "EER", "EER"),
        ("untrained_ari", "untrained ARI", "untrained ARI"),
        ("cluster_nmi", "cluster NMI", "cluster NMI"),
        ("nmi_geometric", "NMI (geometric mean)", "NMI (geometric mean)"),
        ("map_at_1000", "mAP@1000", "mAP@1000"),
        ("map", "mAP", "mAP"),
        ("test_group_map", "test group mAP", "group mAP"),
        ("one_gallery_image_int8_map_at_r", "one gallery image int8 MAP@R", "one gallery image int8 MAP@R"),
        ("untrained_recall_at_1", "untrained Recall@1", "untrained R@1"),
        ("recall_at_r", "recall_at_r", "recall_at_r"),
        ("val_something", "val_something", "val_something"),
        ("train_loss", "train_loss", "train_loss"),
    ],
)
def test_metrics_have_names_and_labels(metric, name, label):
    assert metric_name(metric) == name
    assert metric_label(metric) == label
