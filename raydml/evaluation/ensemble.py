"""The networks of all folds as one: their embeddings of the same images, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raydml.evaluation.saved_embeddings import SavedEmbeddings


class EnsembleError(ValueError):
    """Embeddings that are not of the same images."""


def concatenated(parts: Sequence[SavedEmbeddings]) -> SavedEmbeddings:
    """Embeddings (N, D_i) of the same N images by several networks -> (N, sum D_i), rows of length 1.

    Each network's rows are scaled to length 1 first, so that all have the same say; a row of zeros stays one.

    Source: Musgrave, Belongie, Lim 2020, "A Metric Learning Reality Check", section 3.2: "concatenated", where four
    folds of 128 dimensions make 512; "separated" is the mean over the folds' own scores.

    Raises EnsembleError for other images, labels or roles than the first part's, and for no part.
    """
    if not parts:
        raise EnsembleError("an ensemble needs at least one network's embeddings")
    first = parts[0]
    for number, part in enumerate(parts[1:], start=2):
        same = part.paths == first.paths and part.roles == first.roles and np.array_equal(part.labels, first.labels)
        if not same:
            raise EnsembleError(f"part {number} of the ensemble is not of the images of part 1, in their order")
    rows = np.concatenate([_unit(part.embeddings) for part in parts], axis=1) / np.sqrt(len(parts))
    return first._replace(embeddings=rows.astype(np.float32), facts={**first.facts, "num_networks": len(parts)})


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros(rows.shape), where=lengths > 0)
