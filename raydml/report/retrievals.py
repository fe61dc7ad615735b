"""Queries with their nearest neighbours: ranked, chosen and drawn.

Pictures show queries drawn at random, the best, the worst, and those on which two runs differ. A green frame and a tick
mark a neighbour of the query's class, a red frame and a cross one of another class; the number is its distance. The
choice of the queries depends on the embeddings and a seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.evaluation.protocols import DISTRACTOR, protocols_of, retrieval_tasks
from raydml.evaluation.ranking import nearest_neighbours
from raydml.images.pixels import DecodedPixels
from raydml.images.preprocessing import Resizing
from raydml.inference.gallery import Gallery, Neighbour
from raydml.report.image_rows import (
    GREEN,
    INK,
    RED,
    ImageCell,
    ImageRow,
    LabelledImages,
    different_classes_first,
    draw_image_rows,
)
from raydml.report.text import counted

NUM_NEIGHBOURS = 4
FRAMES_IN_WORDS = "Green frame and tick: the query's class; red and a cross: another. The number is the distance."

_MAX_PAIRS = 2**23  # (query, neighbour) pairs ranked at once, about 50 bytes each
_SHOWN_PX = 160  # short side of an image in a picture


class RankedQueries(NamedTuple):
    """Q queries among N images with the K nearest images of each.

    queries: (Q,) row numbers among the N images. neighbours: (Q, K) row numbers among the N images, nearest first, the
    query itself left out. distances: (Q, K) Euclidean. right: (Q, K) whether the neighbour is of the query's class.
    num_relevant: (Q,) R, the number of images of its class that a query can find. num_right: (Q,) the number of right
    ones among its R nearest. average_precision: (Q,) AP@R, NaN where R = 0.
    """

    queries: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    distances: NDArray[np.float32]
    right: NDArray[np.bool_]
    num_relevant: NDArray[np.int64]
    num_right: NDArray[np.int64]
    average_precision: NDArray[np.float64]

    @property
    def map_at_r(self) -> float:
        """The mean AP@R of the queries with R > 0; NaN without any."""
        found = self.average_precision[self.num_relevant > 0]
        return float(found.mean()) if len(found) else float("nan")

    @property
    def recall_at_1(self) -> float:
        """The share of the queries whose nearest neighbour is right."""
        return float(self.right[:, 0].mean())


def rank_queries(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None = None,
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    device: str = "cpu",
) -> RankedQueries:
    """Find the R nearest images of every query, and at least num_neighbours where there are as many.

    Args:
        embeddings: (N, D) float32. labels: (N,), from 0.
        roles: "query" | "gallery" | "distractor" of each image, where the data set has them (see protocols.py);
            otherwise every image searches all others.
        num_neighbours: K, at most the size of the gallery. device: of the computation.

    AP@R is 1/R times the sum, over the right ones among the first R, of the precision at each; its mean is MAP@R
    (Musgrave, Belongie and Lim, "A Metric Learning Reality Check", 2020, section 3.1). Memory beyond the result does
    not grow with R.

    Raises ValueError for arrays of different lengths, ProtocolError for incomplete roles, RetrievalError for embeddings
    that cannot be searched.
    """
    if len(labels) != len(embeddings) or len(labels) < 2 or (roles is not None and len(roles) != len(labels)):
        also = "" if roles is None else f" and {len(roles)} roles"
        raise ValueError(
            f"{len(embeddings)} embeddings, {len(labels)} labels{also}: the numbers must be equal and at least 2"
        )
    # Distractors are of no class, whatever their labels are.
    classes = labels if roles is None else np.where(np.array(roles) == DISTRACTOR, -1, labels)
    search = retrieval_tasks(protocols_of(roles, ())[0], labels, roles)[0]
    gallery = search.queries if search.gallery is None else search.gallery
    is_in_gallery = search.gallery is None or search.own is not None
    num_of_class = np.bincount(classes[gallery][classes[gallery] >= 0], minlength=int(labels.max()) + 1)
    num_relevant = num_of_class[classes[search.queries]] - is_in_gallery
    k = min(max(num_neighbours, int(num_relevant.max())), search.num_found)
    own = np.arange(len(gallery)) if search.gallery is None else search.own
    searched = embeddings if len(search.queries) == len(embeddings) else embeddings[gallery]
    parts = []
    for start in range(0, len(search.queries), step := max(1, _MAX_PAIRS // k)):
        some = slice(start, start + step)
        rows, relevant = search.queries[some], num_relevant[some]
        places, distances = _nearest(embeddings[rows], searched, None if own is None else own[some], k, device)
        neighbours = gallery[places]
        right = classes[neighbours] == classes[rows][:, None]
        within = right & (np.arange(1, k + 1) <= relevant[:, None])
        shown = (neighbours[:, :num_neighbours], distances[:, :num_neighbours], right[:, :num_neighbours])
        parts.append((rows, *shown, relevant, within.sum(axis=1), _average_precision(within, relevant)))
    return RankedQueries(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _nearest(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    own: NDArray[np.int64] | None,
    k: int,
    device: str,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return (Q, k) rows of the gallery, nearest first, and their Euclidean distances.

    own: (Q,) the row of the query itself, which is left out, or None.
    """
    rows, squared = nearest_neighbours(queries, gallery, k=k + (own is not None), device=device)
    if own is not None:
        kept = rows != own[:, None]
        kept[kept.all(axis=1), -1] = False  # behind k duplicates of the query
        rows, squared = rows[kept].reshape(-1, k), squared[kept].reshape(-1, k)
    return rows, np.sqrt(squared)


def _average_precision(within: NDArray[np.bool_], num_relevant: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return AP@R (Q,). within: (Q, K) right ones among the first R."""
    total = (within * (within.cumsum(axis=1) / np.arange(1, within.shape[1] + 1))).sum(axis=1)
    return np.divide(total, num_relevant, out=np.full(len(within), np.nan), where=num_relevant > 0)


# --- choice of queries: places among the ranked ones, of different classes if there are enough ------------------------


def random_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int, seed: int) -> list[int]:
    """Draw queries: the first half with a right nearest neighbour, the second with a wrong one, if there are enough."""
    order = np.random.default_rng(seed).permutation(len(ranked.queries))
    mixed = different_classes_first(order, labels[ranked.queries])
    is_good = ranked.right[mixed, 0]
    good, bad = mixed[is_good], mixed[~is_good]
    num_bad = min(len(bad), max(num_queries // 2, num_queries - len(good)))
    return [int(place) for place in (*good[: num_queries - num_bad], *bad[:num_bad])]


def best_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int) -> list[int]:
    """Return those with the highest AP@R above 0; of equal ones the largest R, then the nearest neighbour, decides."""
    precision = np.nan_to_num(ranked.average_precision)
    order = np.lexsort((ranked.distances[:, 0], -ranked.num_relevant, -precision))
    return _first(order[precision[order] > 0], ranked, labels, num_queries)


def worst_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int) -> list[int]:
    """Return those with the lowest AP@R below 1; of equal ones the nearest neighbour decides.

    Queries with R = 0 have no AP@R and are left out.
    """
    precision = np.nan_to_num(ranked.average_precision, nan=1.0)
    order = np.lexsort((ranked.distances[:, 0], precision))
    return _first(order[precision[order] < 1], ranked, labels, num_queries)


def changed_queries(
    first: RankedQueries, second: RankedQueries, labels: NDArray[np.int64], num_queries: int
) -> tuple[list[int], list[int]]:
    """Return (gained, lost): where the AP@R of the first run is most above, and most below, that of the second.

    Raises ValueError unless both have the same queries.
    """
    if not np.array_equal(first.queries, second.queries):
        raise ValueError("two runs are compared on the same queries, but these have different ones")
    change = np.nan_to_num(first.average_precision - second.average_precision)
    gained, lost = np.argsort(-change, kind="stable"), np.argsort(change, kind="stable")
    return (
        _first(gained[change[gained] > 0], first, labels, num_queries),
        _first(lost[change[lost] < 0], first, labels, num_queries),
    )


def _first(order: NDArray[np.int64], ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int) -> list[int]:
    return [int(place) for place in different_classes_first(order, labels[ranked.queries])[:num_queries]]


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw_sample(
    ranked: RankedQueries,
    images: LabelledImages,
    path: Path,
    *,
    num_queries: int = 6,
    seed: int = 0,
) -> Path:
    """Draw some queries of `random_queries`, one in each row, with their nearest neighbours."""
    places = random_queries(ranked, images.labels, num_queries, seed)
    title = f"Nearest neighbours of {len(places)} of {counted(len(ranked.queries), 'query', 'queries')}. "
    title += f"The nearest is right for {ranked.recall_at_1:.1%} of all."
    num_wrong = int((~ranked.right[places, 0]).sum())
    if num_wrong:
        title += f" Chosen because theirs is wrong: the last {counted(num_wrong, 'row')}."
    return draw_queries(places, ranked, images, path, title=title)


def draw_queries(
    places: Sequence[int],
    ranked: RankedQueries,
    images: LabelledImages,
    path: Path,
    *,
    title: str,
    within_r: bool = False,
) -> Path:
    """Draw a row for each place among the queries. within_r: leave out neighbours beyond the first R."""
    rows = []
    for place in places:
        num_shown = int(ranked.num_relevant[place]) if within_r else None
        cells = [_query_cell(place, ranked, images), *_neighbour_cells(place, ranked, images)[:num_shown]]
        rows.append(ImageRow(_in_words(place, ranked), cells))
    return draw_image_rows(rows, images.pixels, path, title=title)


def draw_two_rankings(
    places: Sequence[int],
    rankings: dict[str, RankedQueries],
    images: LabelledImages,
    path: Path,
    *,
    title: str,
) -> Path:
    """Draw, for each place among the queries, a row for each named ranking of the same queries."""
    rows = []
    for place in places:
        for number, (name, ranked) in enumerate(rankings.items()):
            first = None if number else _query_cell(place, ranked, images)
            cells = [first, *_neighbour_cells(place, ranked, images)]
            rows.append(ImageRow(f"{name}: {_in_words(place, ranked)}", cells, begins_group=not number))
    return draw_image_rows(rows, images.pixels, path, title=title)


def _in_words(place: int, ranked: RankedQueries) -> str:
    """Return ``AP@R 0.42, 9 of the 17 nearest are right``, where R is 17."""
    relevant = int(ranked.num_relevant[place])
    if not relevant:
        return "no other image of its class"
    found = int(ranked.num_right[place])
    which = "the nearest is right" if found else "the nearest is wrong"
    if relevant > 1:
        which = f"{found} of the {relevant} nearest are right"
    return f"AP@R {ranked.average_precision[place]:.2f}, {which}"


def _query_cell(place: int, ranked: RankedQueries, images: LabelledImages) -> ImageCell:
    query = int(ranked.queries[place])
    return ImageCell(query, images.class_names[images.labels[query]], "query", INK)


def _neighbour_cells(place: int, ranked: RankedQueries, images: LabelledImages) -> list[ImageCell]:
    """Return the nearest neighbours of a query, nearest first."""
    cells = []
    of_query = (values[place].tolist() for values in (ranked.neighbours, ranked.right, ranked.distances))
    for other, right, distance in zip(*of_query, strict=True):
        caption = f"{'✓' if right else '✗'} {distance:#.3g}"
        cells.append(ImageCell(other, images.class_names[images.labels[other]], caption, GREEN if right else RED))
    return cells


def draw_neighbours(
    gallery: Gallery, paths: Sequence[Path | str], found: Sequence[Sequence[Neighbour]], picture: Path
) -> Path:
    """Draw each query beside its neighbours, with their folders (classes) above and their distances below.

    Raises UnreadableImage for an image that is not where it was indexed.
    """
    files: list[str] = []
    rows = []
    for path, neighbours in zip(paths, found, strict=True):
        first = len(files)
        files += [str(path), *(str(gallery.root / neighbour.name) for neighbour in neighbours)]
        cells = [ImageCell(first, name="query")]
        for number, neighbour in enumerate(neighbours, start=first + 1):
            name = PurePosixPath(neighbour.name).parent.name or neighbour.name  # in folders of classes: the class
            cells.append(ImageCell(number, name=name, caption=f"{neighbour.distance:.3f}"))
        rows.append(ImageRow(str(path), cells, begins_group=first > 0))
    shown = DecodedPixels(Path(), files, Resizing(_SHOWN_PX, "short_side", "lanczos"))
    return draw_image_rows(rows, shown, picture)
