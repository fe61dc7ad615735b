"""Maps of an embedding: images as points in two dimensions, near each other where their embeddings are."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raydml.images.pixels import Pixels
from raydml.images.preprocessing import centre_crop
from raydml.report.image_rows import DPI, INK, WIDTH_IN, one_line, save_picture

MAX_POINTS = 3000
_NUM_CLASSES = 12  # classes with a colour
_NUM_COLUMNS = 12  # of a map made of images
_NUM_COMPONENTS, _ITERATIONS, _PERPLEXITY = 50, 500, 30.0
_FEWEST_FOR_TSNE = 10
# Colours that remain distinct with the usual kinds of colour blindness, each with two marks.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKS = ("o", "^")
_OTHERS = "#cfcfcf"
_logger = logging.getLogger("raydml")


class EmbeddingMap(NamedTuple):
    """Images as points. rows: (P,) their row numbers, ascending. points: (P, 2). method: its name in words."""

    rows: NDArray[np.int64]
    points: NDArray[np.float64]
    method: str


def embedding_map(
    embeddings: NDArray[np.float32], labels: NDArray[np.int64], *, seed: int = 0, max_points: int = MAX_POINTS
) -> EmbeddingMap:
    """Place images by PCA to 50 dimensions, then t-SNE (van der Maaten and Hinton, JMLR 2008) to two.

    Args:
        embeddings: (N, D) float32, finite. labels: (N,).
        seed: of the sample and of t-SNE; the same numbers and seed give the same map on one machine.
        max_points: of more images a sample is taken, with the same share of each class. This and a fixed number of
            iterations bound the time (about 15 s for 3,000 points on one core).

    Fewer than 10 images are placed by PCA alone. Raises ValueError for arrays of different lengths.
    """
    if len(embeddings) != len(labels) or not len(labels):
        raise ValueError(f"{len(embeddings)} embeddings, {len(labels)} labels: equal numbers of at least 1 are needed")
    rows = stratified_sample(labels, max_points, seed)
    start_s = time.monotonic()
    if len(rows) >= _FEWEST_FOR_TSNE:
        _logger.info("places %s of %s images on a map by t-SNE", f"{len(rows):,}", f"{len(labels):,}")
    flat = _principal_components(embeddings[rows].astype(np.float64))
    if len(rows) < _FEWEST_FOR_TSNE:
        points = np.zeros((len(rows), 2))
        points[:, : flat.shape[1]] = flat[:, :2]
        return EmbeddingMap(rows, points, "the first two principal components")
    points = _tsne(flat, seed)
    _logger.info("placed them in %.1f s", time.monotonic() - start_s)
    return EmbeddingMap(rows, points, f"PCA to {flat.shape[1]} dimensions, then t-SNE")


def stratified_sample(labels: NDArray[np.int64], max_rows: int, seed: int) -> NDArray[np.int64]:
    """Return at most max_rows row numbers, ascending; each class has its share of them to within one image."""
    if len(labels) <= max_rows:
        return np.arange(len(labels))
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # Evenly spaced places in a list sorted by class give every class its share, rounded up or down.
    places = np.floor((np.arange(max_rows) + 0.5) * len(labels) / max_rows).astype(np.int64)
    return np.sort(by_class[places])


def _principal_components(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    from sklearn.decomposition import PCA  # slow to import

    num = min(_NUM_COMPONENTS, *rows.shape)
    with warnings.catch_warnings():
        # scikit-learn divides by the variance, which is 0 where all embeddings are equal.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="sklearn")
        found: NDArray[np.float64] = PCA(n_components=num, svd_solver="full").fit_transform(rows)
    return found


def _tsne(rows: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE  # slow to import

    settings = {"perplexity": min(_PERPLEXITY, (len(rows) - 1) / 3), "max_iter": _ITERATIONS}
    start = "pca" if rows.std() > 0 else "random"
    points: NDArray[np.float64] = TSNE(init=start, random_state=seed, n_jobs=1, **settings).fit_transform(rows)
    return points.astype(np.float64)


def draw_embedding_map(
    found: EmbeddingMap,
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    path: Path,
    *,
    title: str,
    roles: Sequence[str] | None = None,
) -> Path:
    """Draw the points of the 12 largest classes in colours, the others in grey, with the names below.

    labels: (N,) of all images, ids into class_names. roles: of all images; points of the gallery are drawn hollow.
    """
    of_point = labels[found.rows]
    largest = largest_classes(of_point, _NUM_CLASSES)
    size_in = (WIDTH_IN, WIDTH_IN + 0.35 + 0.17 * ((len(largest) + 2) // 2))
    figure = Figure(figsize=size_in, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    hollow = np.zeros(len(of_point), bool) if roles is None else np.array(roles)[found.rows] == "gallery"
    size = float(np.clip(9000 / max(len(of_point), 1), 7, 30))
    is_other = ~np.isin(of_point, largest)
    groups = [(is_other, _OTHERS, "o", "other classes")] if is_other.any() else []
    for number, label in enumerate(largest):
        mark = _MARKS[number // len(_COLOURS) % len(_MARKS)]
        groups.append((of_point == label, _COLOURS[number % len(_COLOURS)], mark, one_line(class_names[label], 34)))
    for order, (members, colour, mark, name) in enumerate(groups):
        for kind, face in ((~hollow, colour), (hollow, "none")):
            xy = found.points[members & kind]
            axes.scatter(xy[:, 0], xy[:, 1], s=size, marker=mark, facecolors=face, edgecolors=colour, linewidths=0.7,
                         alpha=0.85, zorder=order)  # fmt: skip
        axes.scatter([], [], s=24, marker=mark, color=colour, label=name)
    axes.set_box_aspect(1)
    _frame(axes, title)
    legend = figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=7.5, handletextpad=0.2)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return save_picture(figure, path)


def draw_image_map(
    found: EmbeddingMap, pixels: Pixels, path: Path, *, title: str, num_columns: int = _NUM_COLUMNS
) -> Path:
    """Draw the same map made of images: each square of a grid shows the image nearest to its middle.

    pixels: N images, of which only the shown ones are read.
    """
    places = grid_of(found.points, num_columns)
    rows = found.rows[list(places.values())].tolist()
    figure = Figure(figsize=(WIDTH_IN, WIDTH_IN + 0.25), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for (column, line), image in zip(places, pixels.read(rows), strict=True):
        square = centre_crop(image, min(image.shape[:2]))
        axes.imshow(
            square, extent=(column + 0.02, column + 0.98, line + 0.02, line + 0.98), interpolation="antialiased"
        )
    axes.set_xlim(0, num_columns)
    axes.set_ylim(0, num_columns)
    axes.set_aspect("equal")
    _frame(axes, title)
    return save_picture(figure, path)


def _frame(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#cccccc")
    axes.set_title(title, fontsize=9.5, color=INK, loc="left", parse_math=False)


def grid_of(points: NDArray[np.float64], num_columns: int) -> dict[tuple[int, int], int]:
    """Return (column, line) of a grid over the points (P, 2) -> the point nearest to the middle of that square."""
    low, high = points.min(axis=0), points.max(axis=0)
    extent = np.maximum(high - low, 1e-12)  # along each axis separately, as the map is drawn
    scaled = ((points - (low + high) / 2) / extent + 0.5) * num_columns
    squares = np.clip(np.floor(scaled), 0, num_columns - 1).astype(np.int64)
    off = ((scaled - squares - 0.5) ** 2).sum(axis=1)
    nearest: dict[tuple[int, int], int] = {}
    for number in np.argsort(off, kind="stable").tolist():
        nearest.setdefault((int(squares[number, 0]), int(squares[number, 1])), number)
    return nearest


def largest_classes(labels: NDArray[np.int64], num_classes: int) -> list[int]:
    """Return the labels of the largest classes, largest first; where sizes are equal, the lower label comes first."""
    found, counts = np.unique(labels, return_counts=True)
    return [int(label) for label in found[np.lexsort((found, -counts))][:num_classes]]
