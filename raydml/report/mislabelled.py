"""Images whose label is probably wrong: most of their nearest neighbours are of one other class.

Northcutt, Jiang and Chuang, "Confident Learning", JAIR 2021, with the shares of the nearest neighbours as
probabilities: an image counts where the share of another class reaches the mean share of that class among its own
images. A network that tells classes apart badly has low means, so two further limits hold: `LEAST_SHARE` and
`LARGEST_OWN`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.evaluation.ranking import nearest_neighbours
from raydml.ops.files import write_whole

MAX_NEIGHBOURS, _FEWEST_NEIGHBOURS = 10, 3
#: Of the neighbours: at least of the other class, and at most of the image's own.
LEAST_SHARE, LARGEST_OWN = 0.6, 0.0


class Suspect(NamedTuple):
    """An image whose label is probably wrong.

    row: its number. label: the one that it has. likely: that of most of its neighbours. share, own_share: how many of
    its neighbours are of the likely class, and of its own.
    """

    row: int
    label: int
    likely: int
    share: float
    own_share: float


def suspects(embeddings: NDArray[np.float32], labels: NDArray[np.int64], *, device: str = "cpu") -> list[Suspect]:
    """Return the images whose label is probably wrong, the clearest first.

    The nearest k others of each image are looked at: k is 10, or one less than the median number of images of a class
    where that is smaller, and at least 3.

    Args:
        embeddings: (N, D) float32. labels: (N,), from 0. device: of the computation.

    Raises RetrievalError for embeddings with NaN.
    """
    sizes = np.bincount(labels)
    k = min(MAX_NEIGHBOURS, max(_FEWEST_NEIGHBOURS, int(np.median(sizes[sizes > 0])) - 1), len(labels) - 1)
    if k < _FEWEST_NEIGHBOURS:
        return []
    places, _ = nearest_neighbours(embeddings, embeddings, k=k + 1, device=device)
    # The image itself is among them, unless so many others are the same.
    is_own = places == np.arange(len(labels))[:, None]
    order = np.argsort(is_own, axis=1, kind="stable")[:, :k]
    found = labels[np.take_along_axis(places, order, 1)]
    own_share = (found == labels[:, None]).mean(axis=1)
    mean_share = np.bincount(labels, weights=own_share, minlength=len(sizes)) / np.maximum(sizes, 1)
    suspected = []
    for row in np.flatnonzero(own_share <= LARGEST_OWN):
        likely, number = max(zip(*np.unique(found[row], return_counts=True), strict=True), key=lambda pair: pair[1])
        share = float(number / k)
        if likely != labels[row] and share >= max(LEAST_SHARE, mean_share[likely]):
            suspected.append(Suspect(int(row), int(labels[row]), int(likely), share, float(own_share[row])))
    return sorted(suspected, key=lambda one: (one.own_share - one.share, one.row))


def write_suspects(found: Sequence[Suspect], paths: Sequence[str], class_names: Sequence[str], file: Path) -> Path:
    """Write a CSV table of the images: path, label, likely label, and both shares."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "likely_label", "share_of_likely", "share_of_label"])
    for one in found:
        shares = [f"{one.share:.2f}", f"{one.own_share:.2f}"]
        writer.writerow([paths[one.row], class_names[one.label], class_names[one.likely], *shares])
    write_whole(file, text.getvalue())
    return file
