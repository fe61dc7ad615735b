"""Queries and their nearest neighbours as pictures: drawn at random, the best, the worst, and two runs compared.

A green frame and a tick say that a neighbour is of the query's class, a red frame and a cross that it is not; the
number beside them is its distance. Which queries are shown depends on the numbers and a seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from raydml.images.pixels import DecodedPixels, Pixels
from raydml.images.preprocessing import Resizing
from raydml.inference.gallery import Gallery, Neighbour
from raydml.report.image_rows import Cell, ImageRow, LabelledImages, draw_image_rows
from raydml.report.ranked_queries import RankedQueries, rank_queries
from raydml.report.style import GREEN, INK, RED, counted

NUM_NEIGHBOURS = 4
FRAMES_IN_WORDS = "Green frame and tick: the query's class; red and a cross: another. The number is the distance."

_SHOWN_PX = 160  # short side of an image in a picture


def sample_retrievals(
    pixels: Pixels,
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    embeddings: NDArray[np.float32],
    path: Path,
    *,
    roles: Sequence[str] | None = None,
    num_queries: int = 6,
    num_neighbours: int = NUM_NEIGHBOURS,
    seed: int = 0,
) -> Path:
    """Draw some queries, one a row, with their nearest neighbours as a PNG: green frame = same class, red = another.

    Half of the queries are drawn from those whose nearest neighbour is wrong, as far as there are any, and the
    picture says so; within each half different classes come first. The choice depends on `seed` alone.

    Args:
        pixels: N images; their centre squares are drawn.
        labels: (N,) ids into class_names.
        embeddings: (N, D) float32.
        path: where the picture goes; its folder is made.
        roles: "query" | "gallery" of each image, where the data set has them: queries then search the gallery alone.

    Raises ValueError for arrays that do not fit together, RetrievalError for unusable embeddings.
    """
    if len(pixels) != len(labels):
        raise ValueError(f"{len(pixels)} images, {len(labels)} labels: the numbers must be equal")
    ranked = rank_queries(embeddings, labels, roles, num_neighbours=num_neighbours)
    places = random_queries(ranked, labels, num_queries, seed)
    title = f"Nearest neighbours of {len(places)} of {counted(len(ranked.queries), 'query', 'queries')}. "
    title += f"The nearest is right for {ranked.recall_at_1:.1%} of all."
    num_wrong = int((~ranked.right[places, 0]).sum())
    if num_wrong:
        title += f" Picked because theirs is wrong: the last {counted(num_wrong, 'row')}."
    images = LabelledImages(pixels, labels, class_names)
    return draw_queries(places, ranked, images, path, title=title, num_neighbours=num_neighbours)


# --- which queries ---------------------------------------------------------------------------------------------------
# Each returns places among the ranked queries, of different classes as far as there are.


def random_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int, seed: int) -> list[int]:
    """Those with a right nearest neighbour first, then as many with a wrong one, as far as there are of each."""
    order = np.random.default_rng(seed).permutation(len(ranked.queries))
    spread = _different_classes_first(order, labels[ranked.queries])
    is_good = ranked.right[spread, 0]
    good, bad = spread[is_good], spread[~is_good]
    num_bad = min(len(bad), max(num_queries // 2, num_queries - len(good)))
    return [int(place) for place in (*good[: num_queries - num_bad], *bad[:num_bad])]


def best_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int) -> list[int]:
    """The highest AP@R, above 0; of equals those with the most to find, then those with the nearest neighbour."""
    precision = np.nan_to_num(ranked.average_precision)
    order = np.lexsort((ranked.distances[:, 0], -ranked.num_relevant, -precision))
    return _taken(order[precision[order] > 0], ranked, labels, num_queries)


def worst_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int) -> list[int]:
    """The lowest AP@R, below 1; of equals those that lie nearest to what they are taken for.

    Queries without anything to find (R = 0) have no AP@R and are passed over.
    """
    precision = np.nan_to_num(ranked.average_precision, nan=1.0)
    order = np.lexsort((ranked.distances[:, 0], precision))
    return _taken(order[precision[order] < 1], ranked, labels, num_queries)


def changed_queries(
    first: RankedQueries, second: RankedQueries, labels: NDArray[np.int64], num_queries: int
) -> tuple[list[int], list[int]]:
    """(gained, lost): where the AP@R of the first run is most above, and most below, that of the second.

    Raises ValueError unless both have the same queries.
    """
    if not np.array_equal(first.queries, second.queries):
        raise ValueError("two runs are compared on the same queries, and these have others")
    change = np.nan_to_num(first.average_precision - second.average_precision)
    gained, lost = np.argsort(-change, kind="stable"), np.argsort(change, kind="stable")
    return (
        _taken(gained[change[gained] > 0], first, labels, num_queries),
        _taken(lost[change[lost] < 0], first, labels, num_queries),
    )


def _taken(order: NDArray[np.int64], ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int) -> list[int]:
    return [int(place) for place in _different_classes_first(order, labels[ranked.queries])[:num_queries]]


def _different_classes_first(order: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first place of every class, then the second of every class, and so on, each in this order."""
    seen: dict[int, int] = {}
    turns = np.empty(len(order), dtype=np.int64)
    for number, label in enumerate(labels[order].tolist()):
        turns[number] = seen[label] = seen.get(label, -1) + 1
    return order[np.argsort(turns, kind="stable")]


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw_queries(
    places: Sequence[int],
    ranked: RankedQueries,
    images: LabelledImages,
    path: Path,
    *,
    title: str,
    num_neighbours: int = NUM_NEIGHBOURS,
    within_r: bool = False,
) -> Path:
    """One row for each place among the queries. within_r: no neighbour beyond the R that there are to find."""
    rows = []
    for place in places:
        shown = min(num_neighbours, int(ranked.num_relevant[place])) if within_r else num_neighbours
        cells = [query_cell(place, ranked, images), *neighbour_cells(place, ranked, images, shown)]
        rows.append(ImageRow(in_words(place, ranked), cells))
    return draw_image_rows(rows, images.pixels, path, title=title)


def draw_two_rankings(
    places: Sequence[int],
    rankings: dict[str, RankedQueries],
    images: LabelledImages,
    path: Path,
    *,
    title: str,
    num_neighbours: int = NUM_NEIGHBOURS,
) -> Path:
    """For each place among the queries, one row for each named ranking of the same queries, one below the other."""
    rows = []
    for place in places:
        for number, (name, ranked) in enumerate(rankings.items()):
            first = None if number else query_cell(place, ranked, images)
            cells = [first, *neighbour_cells(place, ranked, images, num_neighbours)]
            rows.append(ImageRow(f"{name}: {in_words(place, ranked)}", cells, begins_group=not number))
    return draw_image_rows(rows, images.pixels, path, title=title)


def in_words(place: int, ranked: RankedQueries) -> str:
    """``AP@R 0.42, 9 of the 17 nearest are right``, 17 being R."""
    relevant = int(ranked.num_relevant[place])
    if not relevant:
        return "no other image of its class"
    found = int(ranked.num_right[place])
    which = "the nearest is right" if found else "the nearest is wrong"
    if relevant > 1:
        which = f"{found} of the {relevant} nearest are right"
    return f"AP@R {ranked.average_precision[place]:.2f}, {which}"


def query_cell(place: int, ranked: RankedQueries, images: LabelledImages) -> Cell:
    query = int(ranked.queries[place])
    return Cell(query, images.class_names[images.labels[query]], "query", INK)


def neighbour_cells(place: int, ranked: RankedQueries, images: LabelledImages, num_neighbours: int) -> list[Cell]:
    """The nearest neighbours of a query, nearest first, as far as they were ranked."""
    cells = []
    for other, right, distance in zip(
        ranked.neighbours[place, :num_neighbours].tolist(),
        ranked.right[place].tolist(),
        ranked.distances[place].tolist(),
        strict=False,
    ):
        caption = f"{'✓' if right else '✗'} {distance:#.3g}"
        cells.append(Cell(other, images.class_names[images.labels[other]], caption, GREEN if right else RED))
    return cells


def draw_neighbours(
    gallery: Gallery, paths: Sequence[Path | str], found: Sequence[Sequence[Neighbour]], picture: Path
) -> Path:
    """Draw each query beside its neighbours as one PNG: their distances below, their folders (classes) above.

    Raises UnreadableImage for an image that is no longer where it was indexed.
    """
    files: list[str] = []
    rows = []
    for path, neighbours in zip(paths, found, strict=True):
        first = len(files)
        files += [str(path), *(str(gallery.root / neighbour.name) for neighbour in neighbours)]
        cells = [Cell(first, name="query")]
        for number, neighbour in enumerate(neighbours, start=first + 1):
            name = PurePosixPath(neighbour.name).parent.name or neighbour.name  # in folders of classes: the class
            cells.append(Cell(number, name=name, caption=f"{neighbour.distance:.3f}"))
        rows.append(ImageRow(str(path), cells, begins_group=first > 0))
    shown = DecodedPixels(Path(), files, Resizing(_SHOWN_PX, "short_side", "lanczos"))
    return draw_image_rows(rows, shown, picture)
