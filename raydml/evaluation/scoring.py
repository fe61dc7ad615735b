"""From embeddings to numbers: each query's ranking under a protocol, and the metrics made of them.

Groups of metrics, of which the first is what every epoch is scored by:

    retrieval   recall_at_<k>, r_precision, map_at_r
    ranking     mrr, map_at_1000 (not the same as map_at_r: see metrics/ranking.py)
    clustering  nmi_geometric, nmi_arithmetic, ami, pair_f1: of k-means with as many clusters as classes
    geometry    intra_distance, inter_distance, density, rho: see embedding_geometry.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raydml.evaluation.binary_codes import binary_codes, int8_codes, ranked_relevant_codes
from raydml.evaluation.protocols import DISTRACTOR, RetrievalTask, retrieval_tasks
from raydml.evaluation.ranking import Device, Ranks, nearest_neighbours, ranked_relevant
from raydml.metrics.clustering import ami, nmi, pair_f1
from raydml.metrics.geometry import class_distances, spectral_decay
from raydml.metrics.ranking import MetricError, average_precision, precision_at_r, recall, reciprocal_rank
from raydml.ops.clustering import KMeans, cluster

METRIC_GROUPS = ("retrieval", "ranking", "clustering", "geometry")
#: What is searched: the embeddings, their signs by Hamming distance, or their 8-bit integers.
CODES = ("float", "binary", "int8")
DEPTH = 1000  # of mAP@1000

# As MIC's release: 20 iterations over all points, one run.
_K_MEANS = KMeans(iterations=20, max_points_per_centroid=1_000_000_000)

# Collapse: the embeddings' spread, relative to their length, is at most this (float32 resolves 6e-8) ...
_SMALLEST_RELATIVE_SPREAD = 1e-4
# ... or this share of the images have one and the same image as their nearest neighbour. One point can be nearest
# to a handful of others by chance, so that small sets say nothing.
_LARGEST_SHARE = 0.99
_SMALLEST_SET = 20


class ScoringError(ValueError):
    """Embeddings that cannot be scored as asked."""


class QueryScores(NamedTuple):
    """The ranking of Q queries.

    rows: (Q,) of the embeddings. first: (Q,) rank of the nearest relevant image, 0 for none. num_relevant: (Q,).
    r_precision, average_precision (at R), average_precision_at_1000: (Q,), NaN where there is no relevant image; the
    last is None unless asked for. nearest: (Q,) row of the embeddings.
    """

    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    num_relevant: NDArray[np.int64]
    r_precision: NDArray[np.float64]
    average_precision: NDArray[np.float64]
    average_precision_at_1000: NDArray[np.float64] | None
    nearest: NDArray[np.int64]


def score_queries(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    search: RetrievalTask,
    *,
    codes: str = "float",
    to_1000: bool = False,
    device: Device = "cpu",
) -> QueryScores:
    """What one search finds, query by query.

    Args:
        embeddings: (N, D) float32. labels: (N,) int64. search: of `protocols.searches`; distractors in its
            gallery have a label that no query has.
        codes: what to compare, one of CODES. to_1000: also look at 1,000 neighbours (fewer where there are fewer).
        device: where distances are computed (binary codes: always the CPU).

    Raises RetrievalError for NaN, MetricError where no query has an image to find.
    """
    gallery = search.queries if search.gallery is None else search.gallery
    query_labels, gallery_labels = labels[search.queries], labels[gallery]
    num_relevant = _counts(gallery_labels, query_labels)
    if search.gallery is None or search.own is not None:
        num_relevant = num_relevant - 1
    if not num_relevant.any():
        raise MetricError(
            "no query has another image of its class, so R-precision and MAP@R are undefined; evaluate on classes with "
            "at least two images."
        )
    depth = min(max(int(num_relevant.max()), DEPTH if to_1000 else 1), search.num_found)
    first, nearest = (np.zeros(len(search.queries), dtype=np.int64) for _ in range(2))
    precision, average, at_1000 = (np.full(len(search.queries), np.nan) for _ in range(3))
    for rows, ranks in _ranked(embeddings, search, query_labels, gallery_labels, depth, codes, device):
        first[rows], nearest[rows], relevant = ranks.first, ranks.nearest, num_relevant[rows]
        if relevant.any():
            precision[rows] = precision_at_r(ranks.hits, relevant)
            average[rows] = average_precision(ranks.hits, relevant)
            if to_1000:
                at_1000[rows] = average_precision(ranks.hits, relevant, min(DEPTH, search.num_found))
    return QueryScores(
        search.queries, first, num_relevant, precision, average, at_1000 if to_1000 else None, gallery[nearest]
    )


def _counts(gallery_labels: NDArray[np.int64], query_labels: NDArray[np.int64]) -> NDArray[np.int64]:
    values, counts = np.unique(gallery_labels, return_counts=True)
    place = np.minimum(np.searchsorted(values, query_labels), len(values) - 1)
    return np.where(values[place] == query_labels, counts[place], 0)


def _ranked(
    embeddings: NDArray[np.float32],
    search: RetrievalTask,
    query_labels: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
    depth: int,
    codes: str,
    device: Device,
) -> Iterator[tuple[slice, Ranks]]:
    whole = len(search.queries) == len(embeddings)
    queries = embeddings if whole else embeddings[search.queries]
    gallery = None if search.gallery is None else embeddings[search.gallery]
    labels = None if search.gallery is None else gallery_labels
    if codes == "binary":
        bits = None if gallery is None else binary_codes(gallery)
        return ranked_relevant_codes(
            binary_codes(queries), bits, query_labels=query_labels, gallery_labels=labels, depth=depth, own=search.own
        )
    return ranked_relevant(
        queries,
        gallery,
        query_labels=query_labels,
        gallery_labels=labels,
        depth=depth,
        own=search.own,
        device=device,
    )


class Scores(NamedTuple):
    """metrics by name; queries: of the search that they come from, None where there was none, or several."""

    metrics: dict[str, float]
    queries: QueryScores | None


def _scored(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    recall_at: Sequence[int],
    protocol: str,
    roles: Sequence[str] | None,
    codes: str,
    groups: Sequence[str],
    device: Device,
) -> Scores:
    _check_names("groups", groups, METRIC_GROUPS)
    _check_names("codes", (codes,), CODES)
    rows = int8_codes(embeddings) if codes == "int8" else embeddings
    is_distractor = None if roles is None else np.array(roles) == DISTRACTOR
    if is_distractor is not None:
        labels = np.where(is_distractor, labels.min() - 1, labels)  # of no class, whatever they are called
    named: dict[str, float] = {}
    found: list[QueryScores] = []
    if {"retrieval", "ranking"} & set(groups):
        for search in retrieval_tasks(protocol, labels, roles):
            _refuse_large_k(recall_at if "retrieval" in groups else (1,), search)
            found.append(score_queries(rows, labels, search, codes=codes, to_1000="ranking" in groups, device=device))
        each = [{name: np.nanmean(values) for name, values in query_values(one, recall_at).items()} for one in found]
        kept = [name for name in each[0] if ("retrieval" in groups or name in ("mrr", "map_at_1000"))]
        named = {name: float(np.mean([one[name] for one in each])) for name in kept}
    if {"clustering", "geometry"} & set(groups):
        counted = slice(None) if is_distractor is None else ~is_distractor
        bits = np.where(embeddings > 0, np.float32(1), np.float32(-1)) if codes == "binary" else rows
        named |= _regardless_of_queries(bits[counted], labels[counted], groups, device)
    return Scores(named, found[0] if len(found) == 1 else None)


def _refuse_large_k(recall_at: Sequence[int], search: RetrievalTask) -> None:
    if max(recall_at) > search.num_found:
        raise ScoringError(
            f"recall_at: {max(recall_at)} neighbours, but a query has only {search.num_found} images to search: "
            "leave the larger k out of recall_at (--recall-at), or evaluate on more images"
        )


def query_values(found: QueryScores, recall_at: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Metric -> (Q,) its value for each query, NaN where it has none: what means and intervals are made of."""
    values = {f"recall_at_{k}": recall(found.first, k).astype(np.float64) for k in recall_at}
    values |= {"r_precision": found.r_precision, "map_at_r": found.average_precision}
    if found.average_precision_at_1000 is not None:
        values["mrr"] = reciprocal_rank(found.first)
        values["map_at_1000"] = found.average_precision_at_1000
    return values


def _regardless_of_queries(
    embeddings: NDArray[np.float32], labels: NDArray[np.int64], groups: Sequence[str], device: Device
) -> dict[str, float]:
    named: dict[str, float] = {}
    if "clustering" in groups:
        found = cluster(embeddings, len(np.unique(labels)), _K_MEANS, torch.device(device)).assignment
        named["nmi_geometric"] = nmi(labels, found, mean="geometric")
        named["nmi_arithmetic"] = nmi(labels, found, mean="arithmetic")
        named["ami"] = ami(labels, found)
        named["pair_f1"] = pair_f1(labels, found)
    if "geometry" in groups:
        distances = class_distances(embeddings, labels)
        named |= {"intra_distance": distances.intra, "inter_distance": distances.inter, "density": distances.density}
        named["rho"] = spectral_decay(embeddings)
    # A metric that these images do not define is left out rather than told as NaN.
    return {name: value for name, value in named.items() if np.isfinite(value)}


def score_by_all(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocols: Sequence[str],
    *,
    recall_at: Sequence[int],
    codes: Sequence[str] = ("float",),
    groups: Sequence[str] = ("retrieval",),
    device: Device = "cpu",
) -> Scores:
    """Retrieval by Euclidean distance, every query against its gallery: by each protocol and each kind of codes.

    Args:
        embeddings: (N, D) float32, as the network gives them.
        labels: (N,) int64; images of one class are the ones to be found.
        roles: "query" | "gallery" | "distractor" of each image.
        protocols: who searches whom, see protocols.py.
        recall_at: the k of Recall@k.
        codes: "float", "binary" (signs, by Hamming distance) or "int8".
        groups: of METRIC_GROUPS. Clustering and geometry do not depend on the protocol and leave distractors out.
        device: where distances are computed, and k-means.

    The metrics are fractions in [0, 1] except those of geometry. They are means over queries, and over the repetitions
    of a protocol that draws its gallery. Names have the protocol as a prefix, except for the first protocol, and the
    codes, except for floats: `binary_recall_at_1`, `one_gallery_image_int8_map_at_r`. Metrics that do not depend on the
    protocol are named as those of the first. The queries are those of the first protocol and of `primary_code`. Source
    of the signs: Zhai and Wu, BMVC 2019; their release returns the larger of the two Recall@1, here both are reported.

    Raises ScoringError for a k beyond the images to be found or names that do not exist, ProtocolError for images the
    protocol does not fit, RetrievalError for NaN, MetricError where no query has an image to find. Uses as many threads
    as torch does.
    """
    named: dict[str, float] = {}
    queries = None
    for place, protocol in enumerate(protocols):
        asked = groups if place == 0 else [group for group in groups if group in ("retrieval", "ranking")]
        for kind in codes:
            prefix = (f"{protocol}_" if place else "") + ("" if kind == "float" else f"{kind}_")
            scored = _scored(embeddings, labels, recall_at, protocol, roles, kind, asked, device)
            named |= {f"{prefix}{name}": value for name, value in scored.metrics.items()}
            if place == 0 and kind == primary_code(codes):
                queries = scored.queries
    return Scores(named, queries)


def primary_code(codes: Sequence[str]) -> str:
    """Of several codes the one whose queries are handed out: floats, or else the first."""
    return "float" if "float" in codes else codes[0]


def is_collapsed(embeddings: NDArray[np.float32], *, device: Device = "cpu") -> str | None:
    """Why these embeddings (N, D) cannot tell images apart any more, in words, or None while they can.

    They hold NaN or infinity; or their spread (root mean square distance from their mean) is within 1e-4 of nothing,
    compared with their length; or more than 99 % of at least 20 images share one nearest neighbour.
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
    """How many images have the most frequent nearest neighbour; 0 where a sample of them already says: not nearly all.

    Asking all of them costs as much as scoring does. Of 512 drawn evenly, 99 % share a neighbour wherever 99 % of all
    do, give or take; where fewer than 90 % of the sample do, nobody needs to ask the others.
    """
    sample = np.unique(np.linspace(0, len(embeddings) - 1, 512).astype(np.int64))
    if len(sample) < len(embeddings):
        found, _ = nearest_neighbours(embeddings[sample], embeddings, k=2, device=device)
        other = np.where(found[:, 0] == sample, found[:, 1], found[:, 0])
        if np.bincount(other).max() < 0.9 * len(sample):
            return 0
    neighbours, _ = nearest_neighbours(embeddings, k=1, device=device)
    return int(np.bincount(neighbours[:, 0]).max())


def _check_names(key: str, names: Sequence[str], choices: Sequence[str]) -> None:
    for name in names:
        if name not in choices:
            raise ScoringError(f"{key}: {name!r}; one of {', '.join(choices)}")
