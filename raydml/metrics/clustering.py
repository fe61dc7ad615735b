"""Metrics of a clustering: agreement with classes (NMI, AMI, ARI, pair F1), balance, and change.

labels and clusters are the class and the cluster of each image, any integers (N,), N >= 1; -1 is a cluster like any
other, except in `cluster_metrics`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raydml.metrics.ranking import AnyIntegers
from raydml.ops.clustering import match_to_previous


def nmi(labels: AnyIntegers, clusters: AnyIntegers, *, mean: Literal["geometric", "arithmetic"]) -> float:
    """Return the normalised mutual information of two partitions: I(labels, clusters) / mean(H, H).

    mean: of the two entropies. Papers before 2019 report the geometric one, the default of scikit-learn up to 0.21;
    since then its default is the arithmetic one, which is never larger.

    1.0 if the partitions agree up to names, also if both are one single set; 0.0 if only one of them is. The value
    grows with the number of clusters: it is not corrected for chance.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(labels, clusters, average_method=mean))


def ami(labels: AnyIntegers, clusters: AnyIntegers) -> float:
    """Return the adjusted mutual information of two partitions: NMI (arithmetic mean) corrected for chance.

    1.0 if the partitions agree up to names, 0.0 on average if they are independent, for any number of clusters; it can
    be negative. The expectation depends only on the sizes of classes and clusters, so equal sizes are computed once:
    2 s for 60,502 images in 11,316 classes, where scikit-learn visits all pairs of a class and a cluster in 98 s.
    Source: Vinh, Epps, Bailey 2010, JMLR 11, equation 24a and table 2 (AMI_sum).
    """
    from sklearn.metrics import mutual_info_score

    sizes = [np.unique(ids, return_counts=True)[1] for ids in (labels, clusters)]
    if len(sizes[0]) == len(sizes[1]) and len(sizes[0]) in (1, len(labels)):
        return 1.0
    expected = _expected_mutual_information(sizes[0], sizes[1])
    shares = [counts / len(labels) for counts in sizes]
    entropies = [float(-(share * np.log(share)).sum()) for share in shares]
    smallest = np.finfo(np.float64).eps
    beyond_chance = sum(entropies) / 2 - expected
    beyond_chance = min(beyond_chance, -smallest) if beyond_chance < 0 else max(beyond_chance, smallest)
    return float((mutual_info_score(labels, clusters) - expected) / beyond_chance)


def _expected_mutual_information(class_sizes: AnyIntegers, cluster_sizes: AnyIntegers) -> float:
    """In nats, of two random partitions with these sizes."""
    from scipy.stats import hypergeom

    num_images = int(class_sizes.sum())
    total = 0.0
    for a, times_a in zip(*np.unique(class_sizes, return_counts=True), strict=True):
        for b, times_b in zip(*np.unique(cluster_sizes, return_counts=True), strict=True):
            shared = np.arange(max(1, a + b - num_images), min(a, b) + 1)
            terms = shared / num_images * np.log(num_images * shared / (float(a) * float(b)))
            total += times_a * times_b * float((terms * hypergeom.pmf(shared, num_images, a, b)).sum())
    return total


def ari(labels: AnyIntegers, clusters: AnyIntegers) -> float:
    """Return the adjusted Rand index of two partitions: pairs of images in one class and one cluster, beyond chance.

    (TP - E) / ((P + Q) / 2 - E), with P pairs in one class, Q in one cluster, TP in both, and E = P Q / all pairs. 1.0
    if the partitions agree up to names, 0.0 on average if they are independent; it can be negative. Source: Hubert and
    Arabie 1985, "Comparing Partitions", Journal of Classification 2, equation 5.
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(labels, clusters))


def pair_f1(labels: AnyIntegers, clusters: AnyIntegers) -> float:
    """Return the F1 over pairs of images: the pairs in one cluster as a prediction of the pairs in one class.

    2 TP / (pairs in one class + pairs in one cluster), with TP the pairs that are in both; 0.0 without such a pair.
    Source: Manning, Raghavan, Schuetze 2008, "Introduction to Information Retrieval", section 16.3; Oh Song et al.
    2016, section 6.
    """
    _, label_ids = np.unique(labels, return_inverse=True)
    cluster_values, cluster_ids = np.unique(clusters, return_inverse=True)
    both = _num_pairs(label_ids * np.int64(len(cluster_values)) + cluster_ids)
    return 2 * both / (_num_pairs(label_ids) + _num_pairs(cluster_ids)) if both else 0.0


def _num_pairs(ids: AnyIntegers) -> int:
    """The number of pairs of equal ids."""
    counts = np.unique(ids, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def cluster_metrics(
    clusters: NDArray[np.integer], labels: NDArray[np.integer], previous: NDArray[np.integer] | None, num_clusters: int
) -> dict[str, float]:
    """Return the metrics that are logged for a clustering; images in no cluster (-1) do not count.

    num_clusters: clusters with an image. cluster_balance: entropy of the cluster sizes divided by log K, 1 if all K are
    of the same size and if K = 1. cluster_nmi: with the labels, arithmetic mean, 0 for clusters that are independent of
    the classes. cluster_changed: share of the images in another cluster than before, after `match_to_previous`, among
    those that are in a cluster both times; absent if there are none, or no `previous`.

    clusters, previous: (N,) ids in 0..K-1, or -1; some image is in a cluster. labels: (N,). num_clusters: K.
    """
    inside = clusters >= 0
    sizes = np.bincount(clusters[inside], minlength=num_clusters)
    shares = sizes[sizes > 0] / sizes.sum()
    entropy = -float((shares * np.log(shares)).sum())
    found = {
        "num_clusters": float(len(shares)),
        "cluster_balance": entropy / float(np.log(num_clusters)) if num_clusters > 1 else 1.0,
        "cluster_nmi": nmi(labels[inside], clusters[inside], mean="arithmetic"),
    }
    if previous is not None:
        both = inside & (previous >= 0)
        if both.any():
            renamed = match_to_previous(clusters[both], previous[both], num_clusters)
            found["cluster_changed"] = float(np.mean(renamed != previous[both]))
    return found
