"""Squared Euclidean distances between any two of N embeddings, in float64, a block at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raydml.evaluation.nearness import Floats, Integers

Distances = NDArray[np.float64]
#: A function of queries (n,) and gallery rows (m,), both as numbers, to (n, m): whether a pair does not count.
PairMask = Callable[[Integers, Integers], NDArray[np.bool_]]

_BITS = 40


class PairDistances:
    """Squared distances of rows (N, D), rounded to 2^-40 of the largest squared length.

    A matrix product rounds the distances of two identical rows differently. After this rounding they are equal, so that
    ties are ties, and their order is that of the index. Distances are resolved to about 10^-12 of the squared length;
    float32 embeddings resolve 10^-7. Memory: 8 N (D + 1) bytes.
    """

    def __init__(self, rows: Floats) -> None:
        self._rows = rows.astype(np.float64)
        self._squares = np.einsum("nd,nd->n", self._rows, self._rows)
        self._unit = float(np.ldexp(1.0, int(np.frexp(self._squares.max())[1]) - _BITS))

    def block(self, first: Integers, second: Integers) -> Distances:
        """Return the distances (n, m) of every pair of rows with these numbers, (n,) and (m,)."""
        begin = int(second[0]) if len(second) else 0
        follow = np.array_equal(second, np.arange(begin, begin + len(second)))  # then nothing has to be copied
        others = self._rows[begin : begin + len(second)] if follow else self._rows[second]
        found = self._rows[first] @ others.T
        found *= -2
        found += self._squares[first][:, None]
        found += self._squares[second]
        return self._rounded(found)

    def pairs(self, first: Integers, second: Integers) -> Distances:
        """Return the distances (P,) of pairs of rows with these numbers, (P,) each."""
        found = np.empty(len(first))
        at_once = max(1, 2**21 // self._rows.shape[1])
        for start in range(0, len(first), at_once):
            part = slice(start, start + at_once)
            found[part] = np.square(self._rows[first[part]] - self._rows[second[part]]).sum(axis=1)
        return self._rounded(found)

    def _rounded(self, found: Distances) -> Distances:
        found /= self._unit
        np.rint(found, out=found)
        found *= self._unit
        return np.maximum(found, 0, out=found)
