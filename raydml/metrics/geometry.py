"""Geometry of embeddings: distances within and between classes, and the number of directions in use.

Source: Roth, Milbich, Sinha, Gupta, Ommer, Cohen, "Revisiting Training Strategies and Generalization Performance in
Deep Metric Learning", ICML 2020, section 5. There the density (pi_ratio) and the spectral decay
(rho) of the training data are related to how well embeddings generalise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]


class ClassDistances(NamedTuple):
    """Mean cosine distances.

    intra: within a class, mean over the classes of at least two images; NaN without any. inter: between the normalised
    means of the classes; NaN with one class. density: intra / inter (pi_ratio).
    """

    intra: float
    inter: float
    density: float


def class_distances(embeddings: _Floats, labels: NDArray[np.int64]) -> ClassDistances:
    """Return the mean distances within and between the classes of embeddings (N, D), over all pairs.

    labels: (N,). A row of length 0 has cosine 0 with every other. The mean over the ordered pairs i != j of a class of
    n unit vectors is (|sum|^2 - n) / (n (n - 1)), so no cost grows with the number of pairs.
    """
    unit = unit_rows(embeddings.astype(np.float64))
    _, ids, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), embeddings.shape[1]))
    np.add.at(sums, ids, unit)
    squares = np.bincount(ids, weights=(unit**2).sum(axis=1))
    several = counts > 1
    intra = inter = float("nan")
    if several.any():
        pairs = counts[several] * (counts[several] - 1.0)
        intra = float(1 - (((sums[several] ** 2).sum(axis=1) - squares[several]) / pairs).mean())
    if len(counts) > 1:
        means = unit_rows(sums)
        own = (means**2).sum()
        inter = float(1 - ((means.sum(axis=0) ** 2).sum() - own) / (len(counts) * (len(counts) - 1.0)))
    # As in the authors' code: coinciding class means would divide by zero.
    return ClassDistances(intra, inter, intra / max(inter, 1e-8))


def spectral_decay(embeddings: _Floats) -> float:
    """Return rho of embeddings (N, D): KL(uniform || singular values without the largest one, normalised to sum 1).

    Lower means that more directions carry the data; 0 is a flat spectrum. The matrix is not centred; its largest
    singular value, mostly the mean, is left out (m = 2 in the authors' code). NaN if D < 3 or N < 3; infinite if a
    direction is not used at all.
    """
    if min(embeddings.shape) < 3:
        return float("nan")
    # min(N, D) singular values through a small square matrix in float64.
    rows = embeddings.astype(np.float64)
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0))
    # Values below the rounding of the product are zero.
    values[values < values[0] * np.sqrt(len(values) * np.finfo(np.float64).eps)] = 0
    spectrum = values / values.sum() if values.sum() else values
    spectrum = spectrum[1:]
    total = spectrum.sum()
    if not total or (spectrum == 0).any():
        return float("inf")
    spectrum = spectrum / total
    uniform = 1 / len(spectrum)
    return float((uniform * np.log(uniform / spectrum)).sum())


def unit_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale the rows (N, D) to length 1; a row of zeros stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
