"""Verification of embeddings: the distances of all pairs of images, genuine and impostor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.data.catalog import Groups
from raydml.evaluation.nearness import Floats, Integers
from raydml.evaluation.pair_distances import Distances, PairDistances, PairMask
from raydml.evaluation.protocols import DISTRACTOR, retrieval_tasks
from raydml.evaluation.ranking import WORKING_BYTES
from raydml.evaluation.scoring import ScoringError
from raydml.metrics.verification import (
    FALSE_ACCEPT_RATES,
    LEAST_ACCEPTED,
    PairCounts,
    RocPoints,
    equal_error_rate,
    is_measured,
    roc_auc,
    roc_points,
    tar_at_far,
)
from raydml.ops.progress import report_progress

# More pairs than these are not compared: 63,000 images, and 256 MiB of distances of genuine pairs.
MOST_PAIRS = 2_000_000_000
MOST_GENUINE = 2**25
_Mask = NDArray[np.bool_]
_SEED = 0  # of the images that are drawn where there are more


class Verification(NamedTuple):
    """metrics: by name. sentence: which pairs were compared. notes: which rates could not be measured, and why. roc:
    points of the ROC curve."""

    metrics: dict[str, float]
    sentence: str
    notes: tuple[str, ...]
    roc: RocPoints


def verify(
    embeddings: Floats,
    labels: Integers,
    roles: Sequence[str] | None,
    protocol: str,
    *,
    groups: Groups | None = None,
    excluded: PairMask | None = None,
    max_pairs: int = MOST_PAIRS,
    max_genuine: int = MOST_GENUINE,
    working_bytes: int = WORKING_BYTES,
) -> Verification:
    """Return verification metrics of embeddings (N, D), by Euclidean distance.

    Pairs: with the protocol query_gallery each query with each gallery image; with others every two images, counted
    once, and each image with each distractor. Exact: no pair is left out and no distance is put into bins. Only where
    there are more than max_pairs pairs, or more than max_genuine of them genuine, are images drawn, and all pairs of
    the drawn ones compared; the sentence says so.

    Args:
        labels: (N,). roles: as in `score_by_all`. protocol: of protocols.py.
        groups: of the images; under a protocol across groups, pairs of one class and one group do not count.
        excluded: further pairs that do not count (of one camera, say), by the numbers of two images in the embeddings.
        working_bytes: bound on the distances at a time.

    Raises ScoringError where there is no genuine or no impostor pair.
    """
    is_distractor = np.zeros(len(labels), dtype=bool) if roles is None else np.array(roles) == DISTRACTOR
    labels = np.where(is_distractor, labels.min() - 1, labels)
    codes = retrieval_tasks(protocol, labels, roles, groups)[0].codes
    more = ""
    if codes is not None:
        protocol, more = protocol.removesuffix("_across_groups"), ", without those of one class and group"
        given, excluded = excluded, _same(codes)
        assert given is None, "a protocol across groups says which pairs do not count"
    if protocol == "query_gallery":
        (task,) = retrieval_tasks(protocol, labels, roles)
        assert task.gallery is not None
        first, second = task.queries, task.gallery
        what = f"{len(first):,} queries and {len(second):,} gallery images"
    else:
        # Distractors come last: a pair counts once, where the second image comes after the first one.
        first = np.flatnonzero(~is_distractor)
        second = np.concatenate([first, np.flatnonzero(is_distractor)])
        others = f", and each with {is_distractor.sum():,} distractors" if is_distractor.any() else ""
        what = f"every two of {len(first):,} images{others}"
    pairs = _Pairs(PairDistances(embeddings), labels, first, second, protocol != "query_gallery", excluded)
    drawn = pairs.drawn(max_pairs, max_genuine)
    if drawn is not pairs:
        what = f"pairs of {len(drawn.first):,} and {len(drawn.second):,} images, drawn from {what}"
    counts = drawn.counts(working_bytes)
    found = {"roc_auc": roc_auc(counts), "eer": equal_error_rate(counts)}
    notes = []
    for rate in FALSE_ACCEPT_RATES:
        if is_measured(float(rate), counts.num_impostors):
            found[f"tar_at_far_{rate}"] = tar_at_far(counts, float(rate))
            found[f"fnmr_at_fmr_{rate}"] = 1 - found[f"tar_at_far_{rate}"]
        else:
            needed = round(LEAST_ACCEPTED / float(rate))
            notes.append(f"TAR@FAR={rate} is not measured: it needs {needed:,} impostor pairs (rule of 30)")
    sentence = (
        f"verification: {len(counts.distances):,} genuine and {counts.num_impostors:,} impostor pairs "
        f"({what}{more}), by Euclidean distance"
    )
    points = roc_points(counts)
    roc = points._replace(distances=np.sqrt(points.distances))  # pairs are compared by squared distances
    return Verification(found, sentence, tuple(notes), roc)


def _same(codes: Integers) -> PairMask:
    return lambda first, second: codes[first][:, None] == codes[second]


class _Pairs(NamedTuple):
    """Pairs of images first (n,) and second (m,), which are numbers of rows.

    is_once: first is the beginning of second, and a pair counts where the second image comes after the first one.
    """

    distances: PairDistances
    labels: Integers
    first: Integers
    second: Integers
    is_once: bool
    excluded: PairMask | None

    def drawn(self, max_pairs: int, max_genuine: int) -> _Pairs:
        """Return these pairs or, where they are too many, those of images that are drawn."""
        num_pairs = len(self.first) * len(self.second) / (2 if self.is_once else 1)
        counts = [dict(zip(*np.unique(self.labels[of], return_counts=True), strict=True)) for of in self[2:4]]
        num_genuine = sum(number * counts[1].get(label, 0) for label, number in counts[0].items())
        num_genuine /= 2 if self.is_once else 1
        share = math.sqrt(min(1.0, max_pairs / num_pairs, max_genuine / max(num_genuine, 1)))
        if share == 1:
            return self
        generator = np.random.default_rng(_SEED)
        kept = generator.random(len(self.labels)) < share
        return self._replace(first=self.first[kept[self.first]], second=self.second[kept[self.second]])

    def counts(self, working_bytes: int) -> PairCounts:
        """Count the impostor pairs that are nearer than each genuine pair."""
        genuine = np.concatenate([np.empty(0), *self._genuine()])
        genuine.sort()
        values = np.unique(genuine)
        nearer, within = (np.zeros(len(values), dtype=np.int64) for _ in range(2))
        num_impostors = 0
        for impostors in self._impostors(working_bytes):
            impostors.sort()
            num_impostors += len(impostors)
            nearer += np.searchsorted(impostors, values, "left")
            within += np.searchsorted(impostors, values, "right")
        if not len(genuine) or not num_impostors:
            kind = "impostor" if len(genuine) else "genuine"
            raise ScoringError(f"verification: there is no {kind} pair. Cure: two classes, one of them of two images")
        places = np.searchsorted(values, genuine)
        return PairCounts(genuine, nearer[places], within[places], num_impostors)

    def _genuine(self) -> Iterator[Distances]:
        """The distances of the genuine pairs, one class at a time."""
        order = [np.argsort(self.labels[of], kind="stable") for of in (self.first, self.second)]
        names = [self.labels[of][places] for of, places in zip((self.first, self.second), order, strict=True)]
        for label in np.unique(names[0]):
            places = [
                own[slice(*np.searchsorted(of, [label, label + 1]))] for own, of in zip(order, names, strict=True)
            ]
            at_once = max(1, 2**22 // max(1, len(places[1])))
            for start in range(0, len(places[0]), at_once):
                yield self._chosen(places[0][start : start + at_once], places[1], lambda same: same)

    def _impostors(self, working_bytes: int) -> Iterator[Distances]:
        """The distances of the impostor pairs, some images at a time."""
        at_once = max(1, working_bytes // (40 * len(self.second)))
        for start in range(0, len(self.first), at_once):
            stop = min(start + at_once, len(self.first))
            begin = start if self.is_once else 0
            yield self._chosen(np.arange(start, stop), np.arange(begin, len(self.second)), np.logical_not)
            report_progress("comparing pairs", stop, len(self.first), "images")

    def _chosen(self, first: Integers, second: Integers, choose: Callable[[_Mask], _Mask]) -> Distances:
        """The distances of pairs, by their places, that count and are chosen by whether they are of one class."""
        numbers, others = self.first[first], self.second[second]
        counted = choose(self.labels[numbers][:, None] == self.labels[others])
        if self.is_once:
            counted &= first[:, None] < second
        if self.excluded is not None:
            counted &= ~self.excluded(numbers, others)
        chosen: Distances = self.distances.block(numbers, others)[counted]
        return chosen
