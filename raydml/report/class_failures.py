"""The classes that fail and the classes they are mistaken for, in numbers and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raydml.report.image_rows import (
    BLUE,
    DPI,
    GREY,
    INK,
    ORANGE,
    RED,
    WIDTH_IN,
    ImageCell,
    ImageRow,
    LabelledImages,
    draw_image_rows,
    one_line,
    save_picture,
)
from raydml.report.retrievals import RankedQueries
from raydml.report.text import counted

_NAME_LETTERS = 24


class ClassFailure(NamedTuple):
    """The results of the queries of one class.

    recall_at_1: mean of these queries. map_at_r: mean of those with R > 0, NaN without any. num_wrong: queries whose
    nearest neighbour is wrong. mistaken_for: the class that most of these neighbours are of, of equal ones the lowest
    label; None where none is wrong. num_mistaken: the number of neighbours of that class.
    """

    label: int
    num_queries: int
    recall_at_1: float
    map_at_r: float
    num_wrong: int
    mistaken_for: int | None
    num_mistaken: int


def class_failures(ranked: RankedQueries, labels: NDArray[np.int64]) -> list[ClassFailure]:
    """Return every class with queries, worst first: by Recall@1, then MAP@R, then label.

    labels: (N,) of the ranked images.
    """
    of_query = labels[ranked.queries]
    nearest = labels[ranked.neighbours[:, 0]]
    failures = []
    for label in np.unique(of_query).tolist():
        own = of_query == label
        wrong = nearest[own & (nearest != label)]
        others, counts = np.unique(wrong, return_counts=True)
        precision = ranked.average_precision[own & (ranked.num_relevant > 0)]
        failures.append(
            ClassFailure(
                label,
                int(own.sum()),
                float(ranked.right[own, 0].mean()),
                float(precision.mean()) if len(precision) else float("nan"),
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
        places = np.flatnonzero((labels[ranked.queries] == row.label) & ~ranked.right[:, 0])
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
