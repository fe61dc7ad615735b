"""Queries with their nearest neighbours: ranked, chosen and drawn; and the classes whose queries fail most.

Pictures show queries drawn at random, the best, the worst, and those on which two runs differ. A green frame and a tick
mark a neighbour of the query's class, a red frame and a cross one of another class; the number is its distance. The
choice of the queries depends on the embeddings and a seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raydml.data.catalog import Groups
from raydml.evaluation.protocols import DISTRACTOR, protocols_of, retrieval_tasks
from raydml.evaluation.protocols import num_relevant as num_relevant_of
from raydml.evaluation.ranking import nearest_neighbours
from raydml.images.pixels import DecodedPixels
from raydml.images.preprocessing import Resizing
from raydml.inference.gallery import Gallery, Neighbour
from raydml.ops.wording import counted
from raydml.report.image_rows import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    WIDTH_IN,
    ImageCell,
    ImageRow,
    LabelledImages,
    different_classes_first,
    draw_image_rows,
    one_line,
    save_picture,
)

NUM_NEIGHBOURS = 4
FRAMES_IN_WORDS = "Green frame and tick: the query's class; red and a cross: another. The number is the distance."

_MAX_PAIRS = 2**23  # (query, neighbour) pairs ranked at once, about 50 bytes each
_NAME_LETTERS = 24  # of a class name in a chart
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
        """The share of the queries with R > 0 whose nearest neighbour is right; NaN without any."""
        found = self.right[self.num_relevant > 0, 0]
        return float(found.mean()) if len(found) else float("nan")


def rank_queries(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None = None,
    *,
    groups: Groups | None = None,
    num_neighbours: int = NUM_NEIGHBOURS,
    device: str = "cpu",
) -> RankedQueries:
    """Find the R nearest images of every query, and at least num_neighbours where there are as many.

    Args:
        embeddings: (N, D) float32. labels: (N,), from 0.
        roles: "query" | "gallery" | "distractor" of each image, where the data set has them (see protocols.py);
            otherwise every image searches all others. groups: of each image, where the data set has them.
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
    search = retrieval_tasks(protocols_of(roles, (), groups)[0], labels, roles, groups)[0]
    gallery, num_relevant = search.searched, num_relevant_of(search, classes)
    k = min(max(num_neighbours, int(num_relevant.max())), search.num_others)
    # Each image is hidden from itself, and with groups from those of its class and group.
    own = np.arange(len(labels)) if search.codes is None else search.codes
    num_hidden = len(gallery) - search.num_found
    searched = embeddings if len(search.queries) == len(embeddings) else embeddings[gallery]
    parts = []
    for start in range(0, len(search.queries), step := max(1, _MAX_PAIRS // k)):
        some = slice(start, start + step)
        rows, relevant = search.queries[some], num_relevant[some]
        places, distances = nearest_neighbours(
            embeddings[rows], searched, k=min(k + num_hidden, len(gallery)), device=device
        )
        is_found = own[gallery[places]] != own[rows][:, None]
        order = np.argsort(~is_found, axis=1, kind="stable")[:, :k]  # hidden ones last
        places, distances, is_found = (np.take_along_axis(of, order, 1) for of in (places, distances, is_found))
        neighbours, distances = gallery[places], np.sqrt(distances)
        right = is_found & (classes[neighbours] == classes[rows][:, None])
        within = right & (np.arange(1, k + 1) <= relevant[:, None])
        shown = (neighbours[:, :num_neighbours], distances[:, :num_neighbours], right[:, :num_neighbours])
        parts.append((rows, *shown, relevant, within.sum(axis=1), _average_precision(within, relevant)))
    return RankedQueries(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _average_precision(within: NDArray[np.bool_], num_relevant: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return AP@R (Q,). within: (Q, K) right ones among the first R."""
    total = (within * (within.cumsum(axis=1) / np.arange(1, within.shape[1] + 1))).sum(axis=1)
    return np.divide(total, num_relevant, out=np.full(len(within), np.nan), where=num_relevant > 0)


def random_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int, seed: int) -> list[int]:
    """Draw queries: the first half with a right nearest neighbour, the second with a wrong one, if there are enough."""
    order = np.random.default_rng(seed).permutation(len(ranked.queries))
    mixed = different_classes_first(order, labels[ranked.queries])
    is_good = ranked.right[mixed, 0]
    good, bad = mixed[is_good], mixed[~is_good]
    num_bad = min(len(bad), max(num_queries // 2, num_queries - len(good)))
    return [int(place) for place in (*good[: num_queries - num_bad], *bad[:num_bad])]


def best_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int) -> list[int]:
    """Return those with the highest AP@R above 0; among equals, a larger R comes first, then a nearer neighbour."""
    precision = np.nan_to_num(ranked.average_precision)
    order = np.lexsort((ranked.distances[:, 0], -ranked.num_relevant, -precision))
    return _first(order[precision[order] > 0], ranked, labels, num_queries)


def worst_queries(ranked: RankedQueries, labels: NDArray[np.int64], num_queries: int) -> list[int]:
    """Return those with the lowest AP@R below 1; among equals, a nearer neighbour comes first.

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


def draw_sample(
    ranked: RankedQueries, images: LabelledImages, path: Path, *, num_queries: int = 6, seed: int = 0
) -> Path:
    """Draw some queries of `random_queries`, one in each row, with their nearest neighbours."""
    places = random_queries(ranked, images.labels, num_queries, seed)
    title = f"Nearest neighbours of {len(places)} of {counted(len(ranked.queries), 'query', 'queries')}. "
    title += f"The nearest is right for {ranked.recall_at_1:.1%} of all."
    num_wrong = int((~ranked.right[places, 0]).sum())
    if num_wrong:
        title += f" In the last {counted(num_wrong, 'row')} it is wrong; these were chosen for that."
    return draw_queries(places, {"": ranked}, images, path, title=title)


def draw_queries(
    places: Sequence[int],
    rankings: Mapping[str, RankedQueries],
    images: LabelledImages,
    path: Path,
    *,
    title: str,
    within_r: bool = False,
) -> Path:
    """Draw, for each place among the queries, a row for each named ranking of them; a single one needs no name.

    within_r: leave out neighbours beyond the first R.
    """
    rows = []
    for place in places:
        for number, (name, ranked) in enumerate(rankings.items()):
            first = None if number else _query_cell(place, ranked, images)
            num_shown = int(ranked.num_relevant[place]) if within_r else None
            heading = f"{name}: {_in_words(place, ranked)}" if name else _in_words(place, ranked)
            cells = [first, *_neighbour_cells(place, ranked, images)[:num_shown]]
            rows.append(ImageRow(heading, cells, begins_group=len(rankings) > 1 and not number))
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


class ClassFailure(NamedTuple):
    """The results of the queries of one class.

    Queries without an image of their class to find are left out. recall_at_1, map_at_r: means. num_wrong: queries whose
    nearest neighbour is wrong. mistaken_for: the class of most of these neighbours, the lowest label among equals; None
    where none is wrong. num_mistaken: the number of neighbours of that class.
    """

    label: int
    num_queries: int
    recall_at_1: float
    map_at_r: float
    num_wrong: int
    mistaken_for: int | None
    num_mistaken: int


def class_failures(ranked: RankedQueries, labels: NDArray[np.int64]) -> list[ClassFailure]:
    """Return every class with queries that have something to find, worst first: by Recall@1, then MAP@R, then label.

    labels: (N,) of the ranked images.
    """
    of_query = labels[ranked.queries]
    nearest = labels[ranked.neighbours[:, 0]]
    failures = []
    has_more = ranked.num_relevant > 0
    for label in np.unique(of_query[has_more]).tolist():
        own = (of_query == label) & has_more
        wrong = nearest[own & (nearest != label)]
        others, counts = np.unique(wrong, return_counts=True)
        failures.append(
            ClassFailure(
                label,
                int(own.sum()),
                float(ranked.right[own, 0].mean()),
                float(ranked.average_precision[own].mean()),
                len(wrong),
                int(others[counts.argmax()]) if len(wrong) else None,
                int(counts.max()) if len(wrong) else 0,
            )
        )
    return sorted(failures, key=lambda row: (row.recall_at_1, np.nan_to_num(row.map_at_r), row.label))


def draw_class_failures(
    failures: Sequence[ClassFailure],
    class_names: Sequence[str],
    path: Path,
    *,
    title: str,
    mean_recall_at_1: float,
    num_classes: int = 12,
) -> Path:
    """Draw bars of Recall@1 and MAP@R for the worst classes, with the class that each is most often mistaken for.

    mean_recall_at_1: of all queries, drawn as a line.
    """
    shown = list(failures[:num_classes])
    figure = Figure(figsize=(WIDTH_IN, 0.42 * len(shown) + 1.05), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    recalls, means = [row.recall_at_1 for row in shown], [np.nan_to_num(row.map_at_r) for row in shown]
    axes.barh(places - 0.17, recalls, height=0.32, color=ORANGE, label="Recall@1")
    axes.barh(places + 0.17, means, height=0.32, color=BLUE, label="MAP@R")
    for values, offset in ((recalls, -0.17), (means, 0.17)):
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.01, place + offset, f"{value:.2f}", va="center", fontsize=7, color=INK,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # fmt: skip
    axes.axvline(mean_recall_at_1, color=GREY, linewidth=1, linestyle="--", zorder=0.5)
    axes.text(
        mean_recall_at_1, -0.72, f"Recall@1 of all: {mean_recall_at_1:.2f}", fontsize=7, color=GREY,
        ha="right" if mean_recall_at_1 > 0.5 else "left", va="bottom",
    )  # fmt: skip
    axes.set_yticks(places, [_described(row, class_names) for row in shown], fontsize=7.5, color=INK, parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.65)
    axes.set_xlim(0, 1.1)
    axes.set_xticks(np.arange(0, 1.01, 0.25))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9.5, color=INK, x=0.02, ha="left", parse_math=False)
    return save_picture(figure, path)


def _described(row: ClassFailure, class_names: Sequence[str]) -> str:
    """Return two lines: the class with its number of queries, and the class it is mistaken for."""
    name = f"{one_line(class_names[row.label], _NAME_LETTERS)} ({row.num_queries})"
    if row.mistaken_for is None:
        return name
    return f"{name}\n→ {one_line(class_names[row.mistaken_for], _NAME_LETTERS)}: {row.num_mistaken} of {row.num_wrong}"


def draw_confusions(
    failures: Sequence[ClassFailure],
    ranked: RankedQueries,
    images: LabelledImages,
    path: Path,
    *,
    title: str,
    num_classes: int = 5,
    num_pairs: int = 2,
) -> Path:
    """Draw a row for each of the worst classes: queries, each beside its wrong nearest neighbour.

    Neighbours of the class that it is most often mistaken for come first, the nearest of them first.

    Raises ValueError if no query has a wrong nearest neighbour.
    """
    labels, rows = images.labels, []
    for row in [row for row in failures if row.mistaken_for is not None][:num_classes]:
        assert row.mistaken_for is not None
        is_wrong = (ranked.num_relevant > 0) & ~ranked.right[:, 0]
        places = np.flatnonzero((labels[ranked.queries] == row.label) & is_wrong)
        cells: list[ImageCell | None] = []
        for place in _typical_mistakes_first(places, ranked, labels, row.mistaken_for)[:num_pairs]:
            query, other = int(ranked.queries[place]), int(ranked.neighbours[place, 0])
            distance = f"✗ {float(ranked.distances[place, 0]):#.3g}"
            cells.append(ImageCell(query, images.class_names[row.label], "query", INK))
            cells.append(ImageCell(other, images.class_names[labels[other]], distance, RED))
        names = [one_line(images.class_names[label], 2 * _NAME_LETTERS) for label in (row.label, row.mistaken_for)]
        mistakes = counted(row.num_wrong, "mistake")
        of_all = f"{row.num_mistaken} of {mistakes} in {counted(row.num_queries, 'query', 'queries')}"
        rows.append(ImageRow(f"{' → '.join(names)}: {of_all}", [*cells, *[None] * (2 * num_pairs - len(cells))]))
    return draw_image_rows(rows, images.pixels, path, title=title)


def _typical_mistakes_first(
    places: NDArray[np.int64], ranked: RankedQueries, labels: NDArray[np.int64], mistaken_for: int
) -> list[int]:
    """Sort queries: first those with a neighbour of this class, by distance; repeated neighbours come last."""
    nearest = ranked.neighbours[places, 0]
    order = places[np.lexsort((ranked.distances[places, 0], labels[nearest] != mistaken_for))]
    is_first = np.zeros(len(order), dtype=bool)
    is_first[np.unique(ranked.neighbours[order, 0], return_index=True)[1]] = True
    return [int(place) for place in (*order[is_first], *order[~is_first])]
