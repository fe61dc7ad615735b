"""From embeddings to metrics, under one or more protocols.

Groups of metrics; every epoch is scored by the first:

    retrieval   recall_at_<k>, r_precision, map_at_r
    ranking     mrr, map_at_1000 (not the same as map_at_r: see metrics/ranking.py); map, over the whole ranking, for
                queries and gallery across groups (see Protocol.to_end)
    clustering  nmi_geometric, nmi_arithmetic, ami, ari, pair_f1: of k-means with as many clusters as classes
    geometry    intra_distance, inter_distance, density, rho: see metrics/geometry.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raydml.data.catalog import Groups
from raydml.evaluation.nearness import binary_codes, int8_codes
from raydml.evaluation.protocols import DISTRACTOR, PROTOCOLS, RetrievalTask, num_relevant, retrieval_tasks
from raydml.evaluation.ranking import Device, HiddenRows, nearest_neighbours, ranked_relevant, ranked_relevant_codes
from raydml.evaluation.reranking import KReciprocal, Rerank, expanded_queries, reranked_relevant
from raydml.metrics.clustering import ami, ari, nmi, pair_f1
from raydml.metrics.geometry import class_distances, spectral_decay, unit_rows
from raydml.metrics.names import CODES, METRIC_GROUPS
from raydml.metrics.ranking import average_precision, precision_at_r, recall, reciprocal_rank
from raydml.ops.clustering import KMeans, cluster

DEPTH = 1000  # of mAP@1000
MAX_CLASS_VALUES = 500  # of `class_values`, which go into one line of a file

# As the release of MIC: 20 iterations over all points, one run.
_K_MEANS = KMeans(iterations=20, max_points_per_centroid=1_000_000_000)

# Embeddings are collapsed if their spread, relative to their length, is at most this (float32 resolves 6e-8), or if
# more than this share of the images have the same nearest neighbour. The second rule needs a set of this size, because
# one image can be the neighbour of a few others by chance.
_SMALLEST_RELATIVE_SPREAD = 1e-4
_LARGEST_SHARE = 0.99
_SMALLEST_SET = 20


class ScoringError(ValueError):
    """Embeddings that cannot be scored in the requested way."""


class MetricSpec(NamedTuple):
    """What to measure: the k of Recall@k, kinds of codes, groups of metrics, and whether with intervals.

    rerank: how the order of the neighbours is changed before it is scored; None: not at all. verification: whether
    pairs of images are also verified, see verification.py.
    lone_misses: queries without an image of their class to find count as misses in Recall@k and MRR, as in the
    published scores of the benchmarks; otherwise they are left out of every mean.
    dims: lengths of prefixes of the embeddings that are scored too, by prefixes.py.
    """

    recall_at: tuple[int, ...]
    codes: tuple[str, ...] = ("float",)
    groups: tuple[str, ...] = ("retrieval",)
    intervals: bool = False
    rerank: Rerank | None = None
    verification: bool = False
    lone_misses: bool = False
    dims: tuple[int, ...] = ()


class QueryScores(NamedTuple):
    """The scores of Q queries.

    rows: (Q,) of the embeddings. first: (Q,) rank of the nearest relevant image, 0 for none. num_relevant: (Q,).
    r_precision, average_precision (at R), average_precision_at_1000, average_precision_of_all (over the whole ranking):
    (Q,), NaN without a relevant image; the last two are None if they were not requested. nearest: (Q,) row of the
    embeddings.
    """

    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    num_relevant: NDArray[np.int64]
    r_precision: NDArray[np.float64]
    average_precision: NDArray[np.float64]
    average_precision_at_1000: NDArray[np.float64] | None
    average_precision_of_all: NDArray[np.float64] | None
    nearest: NDArray[np.int64]


def score_queries(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    task: RetrievalTask,
    *,
    codes: str = "float",
    to_1000: bool = False,
    to_end: bool = False,
    rerank: Rerank | None = None,
    device: Device = "cpu",
) -> QueryScores:
    """Score each query of one retrieval task.

    Args:
        embeddings: (N, D) float32. labels: (N,) int64; distractors have a label that no query has.
        codes: what to compare, one of CODES.
        to_1000: also score the 1,000 nearest neighbours (fewer if there are fewer).
        to_end: also score the whole ranking, which sorts the gallery for each query.
        rerank: of float embeddings; None keeps the order of their distances.
        device: where distances are computed (binary codes: always the CPU).

    Raises RetrievalError for NaN, ScoringError if no query has an image to find.
    """
    is_leave_one_out = task.gallery is None
    gallery = task.searched
    query_labels, gallery_labels = labels[task.queries], labels[gallery]
    to_find = num_relevant(task, labels)
    if not to_find.any():
        raise ScoringError(
            "no query has another image of its class to find, so there is nothing to score. Cure: evaluate on classes "
            "with at least two images"
        )
    query_rows = embeddings if len(task.queries) == len(embeddings) else embeddings[task.queries]
    gallery_rows = None if is_leave_one_out else embeddings[gallery]
    settings: dict[str, Any] = {
        "query_labels": query_labels,
        "gallery_labels": None if is_leave_one_out else gallery_labels,
        "depth": task.num_others if to_end else min(max(int(to_find.max()), DEPTH if to_1000 else 1), task.num_others),
        "own": task.own,
        "hidden": None if task.codes is None else HiddenRows(task.codes[task.queries], task.codes[gallery]),
    }
    if codes == "binary":
        gallery_bits = None if gallery_rows is None else binary_codes(gallery_rows)
        parts = ranked_relevant_codes(binary_codes(query_rows), gallery_bits, **settings)
    elif isinstance(rerank, KReciprocal):
        hidden = settings.pop("hidden")
        excluded = None if hidden is None else lambda some, rows: hidden.contains(some[:, None], rows)
        parts = reranked_relevant(
            query_rows, gallery_rows, settings=rerank, excluded=excluded, device=device, **settings
        )
    elif rerank is not None:
        unit = [unit_rows(rows.astype(np.float64)).astype(np.float32) for rows in (query_rows, embeddings[gallery])]
        settings |= {"gallery_labels": gallery_labels, "own": np.arange(len(gallery)) if is_leave_one_out else task.own}
        expanded = expanded_queries(*unit, own=settings["own"], settings=rerank, device=device)
        parts = ranked_relevant(expanded, unit[1], device=device, **settings)
    else:
        parts = ranked_relevant(query_rows, gallery_rows, device=device, **settings)
    first, nearest = (np.zeros(len(task.queries), dtype=np.int64) for _ in range(2))
    precision, average, at_1000, of_all = (np.full(len(task.queries), np.nan) for _ in range(4))
    for rows, ranks in parts:
        first[rows], nearest[rows], relevant = ranks.first, ranks.nearest, to_find[rows]
        if relevant.any():
            precision[rows] = precision_at_r(ranks.hits, relevant)
            average[rows] = average_precision(ranks.hits, relevant)
            if to_1000:
                at_1000[rows] = average_precision(ranks.hits, relevant, min(DEPTH, task.num_others))
            if to_end:
                of_all[rows] = average_precision(ranks.hits, relevant, task.num_others)
    return QueryScores(
        rows=task.queries,
        first=first,
        num_relevant=to_find,
        r_precision=precision,
        average_precision=average,
        average_precision_at_1000=at_1000 if to_1000 else None,
        average_precision_of_all=of_all if to_end else None,
        nearest=gallery[nearest],
    )


class Scores(NamedTuple):
    """metrics: by name. queries: of the task that they are means over; None without one task, or with several."""

    metrics: dict[str, float]
    queries: QueryScores | None


def score_by_all(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocols: Sequence[str],
    spec: MetricSpec,
    device: Device = "cpu",
    groups: Groups | None = None,
) -> Scores:
    """Score embeddings by Euclidean distance, under each protocol and with each kind of codes.

    Args:
        embeddings: (N, D) float32, as the network gives them.
        labels: (N,) int64; images of one class are relevant to each other.
        roles: "query" | "gallery" | "distractor" of each image.
        protocols: see protocols.py.
        spec: codes: "float", "binary" (signs, by Hamming distance) or "int8". groups: of METRIC_GROUPS; clustering and
            geometry do not depend on the protocol and leave distractors out.
        device: where distances and k-means are computed.
        groups: of the N images, for protocols across groups.

    The metrics are fractions in [0, 1] except those of geometry. They are means over queries, and over the repetitions
    of a protocol that draws its gallery. Names have the protocol as a prefix, except for the first protocol, and the
    codes, except for floats: `binary_recall_at_1`, `one_gallery_image_int8_map_at_r`. Metrics that do not depend on the
    protocol are named as those of the first. The queries are those of the first protocol and of `primary_code`. Source
    of the signs: Zhai and Wu, BMVC 2019; their release returns the larger of the two Recall@1, here both are reported.

    Raises ScoringError for a k beyond the images to be found, an unknown name, or if no query has an image to find,
    ProtocolError for images that the protocol does not fit, RetrievalError for NaN.
    """
    for key, names, choices in (("groups", spec.groups, METRIC_GROUPS), ("codes", spec.codes, CODES)):
        if unknown := [name for name in names if name not in choices]:
            raise ScoringError(f"{key}: {unknown[0]!r}; one of {', '.join(choices)}")
    named: dict[str, float] = {}
    queries = None
    for place, protocol in enumerate(protocols):
        of_metrics = tuple(group for group in spec.groups if place == 0 or group in ("retrieval", "ranking"))
        for kind in spec.codes:
            prefix = (f"{protocol}_" if place else "") + ("" if kind == "float" else f"{kind}_")
            one = spec._replace(codes=(kind,), groups=of_metrics)
            scores = _score(embeddings, labels, roles, protocol, one, device, groups)
            named |= {f"{prefix}{name}": value for name, value in scores.metrics.items()}
            if place == 0 and kind == primary_code(spec.codes):
                queries = scores.queries
    return Scores(named, queries)


def _score(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocol: str,
    spec: MetricSpec,
    device: Device,
    of_images: Groups | None,
) -> Scores:
    """Score one kind of codes under one protocol. of_images: the groups of the images."""
    codes, groups = spec.codes[0], set(spec.groups)
    rows = int8_codes(embeddings) if codes == "int8" else embeddings
    is_distractor = np.zeros(len(labels), dtype=bool) if roles is None else np.array(roles) == DISTRACTOR
    labels = np.where(is_distractor, labels.min() - 1, labels)  # a class of their own
    named: dict[str, float] = {}
    found: list[QueryScores] = []
    if groups & {"retrieval", "ranking"}:
        for task in retrieval_tasks(protocol, labels, roles, of_images):
            largest_k = max(spec.recall_at) if "retrieval" in groups else 1
            if largest_k > task.num_found:
                raise ScoringError(
                    f"recall_at: {largest_k} neighbours, but a query has only {task.num_found} images to search: "
                    "leave the larger k out of recall_at (--recall-at), or evaluate on more images"
                )
            depths = {"to_1000": "ranking" in groups, "to_end": "ranking" in groups and PROTOCOLS[protocol].to_end}
            found.append(score_queries(rows, labels, task, codes=codes, **depths, rerank=spec.rerank, device=device))
        each = [{name: np.nanmean(of) for name, of in query_values(one, spec).items()} for one in found]
        kept = [name for name in each[0] if "retrieval" in groups or name in ("mrr", "map_at_1000", "map")]
        named = {name: float(np.mean([one[name] for one in each])) for name in kept}
    if groups & {"clustering", "geometry"}:
        points = np.where(embeddings > 0, np.float32(1), np.float32(-1)) if codes == "binary" else rows
        named |= _of_classes(points[~is_distractor], labels[~is_distractor], groups, device)
    return Scores(named, found[0] if len(found) == 1 else None)


def query_values(found: QueryScores, spec: MetricSpec) -> dict[str, NDArray[np.float64]]:
    """Return metric -> (Q,) its value for each query, NaN if it has none; means and intervals are made of these."""
    is_scored = (found.num_relevant > 0) | spec.lone_misses
    values = {f"recall_at_{k}": np.where(is_scored, recall(found.first, k), np.nan) for k in spec.recall_at}
    values |= {"r_precision": found.r_precision, "map_at_r": found.average_precision}
    if found.average_precision_at_1000 is not None:
        values["mrr"] = np.where(is_scored, reciprocal_rank(found.first), np.nan)
        values["map_at_1000"] = found.average_precision_at_1000
    if found.average_precision_of_all is not None:
        values["map"] = found.average_precision_of_all
    return values


def class_values(found: QueryScores, labels: NDArray[np.int64], spec: MetricSpec, metric: str) -> list[float]:
    """Return the mean of a metric over the queries of each class, in the order of the labels.

    Each metric by which trials are ranked is a mean over queries, so each has such values. A class without a query that
    has a value is left out. Of more than `MAX_CLASS_VALUES` classes, the means of so many groups of consecutive classes
    are returned, each class with the same weight in its group.

    labels: (N,) of the embeddings that were scored. metric: one of `query_values`, such as ``map_at_r``.
    """
    values, of_query = query_values(found, spec)[metric], labels[found.rows]
    has_value = np.isfinite(values)
    places = np.unique(of_query[has_value], return_inverse=True)[1]
    means = np.bincount(places, values[has_value]) / np.bincount(places)
    groups = np.array_split(means, min(len(means), MAX_CLASS_VALUES))
    return [float(group.mean()) for group in groups]


def _of_classes(
    embeddings: NDArray[np.float32], labels: NDArray[np.int64], groups: set[str], device: Device
) -> dict[str, float]:
    """Metrics of the classes as a whole; those that are not defined for these images are left out."""
    named: dict[str, float] = {}
    if "clustering" in groups:
        found = cluster(embeddings, len(np.unique(labels)), _K_MEANS, torch.device(device)).assignment
        named["nmi_geometric"] = nmi(labels, found, mean="geometric")
        named["nmi_arithmetic"] = nmi(labels, found, mean="arithmetic")
        named["ami"] = ami(labels, found)
        named["ari"] = ari(labels, found)
        named["pair_f1"] = pair_f1(labels, found)
    if "geometry" in groups:
        distances = class_distances(embeddings, labels)
        named |= {"intra_distance": distances.intra, "inter_distance": distances.inter, "density": distances.density}
        named["rho"] = spectral_decay(embeddings)
    return {name: value for name, value in named.items() if np.isfinite(value)}


def primary_code(codes: Sequence[str]) -> str:
    """Return the kind of codes whose queries are returned: floats if they are among them, else the first."""
    return "float" if "float" in codes else codes[0]


def is_collapsed(embeddings: NDArray[np.float32], *, device: Device = "cpu") -> str | None:
    """Return in words why embeddings (N, D) are collapsed, or None if they are not.

    They hold NaN or infinity; or their spread (root mean square distance from their mean) is at most 1e-4 of their
    length; or more than 99 % of at least 20 images have the same nearest neighbour.
    """
    if not np.isfinite(embeddings).all():
        return "the embeddings hold NaN or infinity"
    rows = embeddings.astype(np.float64)
    length = float(np.sqrt((rows**2).sum(axis=1).mean()))
    spread = float(np.sqrt(rows.var(axis=0).sum()))
    if spread <= _SMALLEST_RELATIVE_SPREAD * length:
        return f"all embeddings are the same: spread {spread:.2g} at length {length:.2g}"
    if len(rows) >= _SMALLEST_SET:
        most = _most_popular(embeddings, device)
        # The shared neighbour is not its own neighbour, hence N - 1.
        if most > _LARGEST_SHARE * (len(rows) - 1):
            return f"{most} of {len(rows)} images have the same nearest neighbour"
    return None


def _most_popular(embeddings: NDArray[np.float32], device: Device) -> int:
    """How many images have the most frequent nearest neighbour; 0 if fewer than 90 % of a sample of 512 share one.

    A search for all images costs as much as scoring, and the share in the sample is close to that of all images.
    """
    sample = np.unique(np.linspace(0, len(embeddings) - 1, 512).astype(np.int64))
    if len(sample) < len(embeddings):
        found, _ = nearest_neighbours(embeddings[sample], embeddings, k=2, device=device)
        other = np.where(found[:, 0] == sample, found[:, 1], found[:, 0])
        if np.bincount(other).max() < 0.9 * len(sample):
            return 0
    neighbours, _ = nearest_neighbours(embeddings, k=1, device=device)
    return int(np.bincount(neighbours[:, 0]).max())
