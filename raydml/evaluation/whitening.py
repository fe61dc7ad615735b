"""PCA whitening of embeddings, learned on other images than those that are scored."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.evaluation.nearness import Floats, RetrievalError
from raydml.evaluation.saved_embeddings import SavedEmbeddings
from raydml.metrics.geometry import unit_rows

# Rows that are converted to float64 at a time.
_ROWS_AT_ONCE = 2**14


class Whitening(NamedTuple):
    """What was learned: x -> (x - mean) @ directions, scaled to length 1.

    mean: (D,). directions: (D, d) float64, the principal directions divided by the standard deviation along them. A
    direction without variance is left out, so d <= D. num_images: it was learned on. learned_on: them in words.
    """

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]
    num_images: int
    learned_on: str

    def apply(self, rows: Floats) -> Floats:
        """Return whitened rows (N, d) float32 of length 1. Raises RetrievalError for rows of another dimension."""
        if rows.shape[1] != len(self.mean):
            raise RetrievalError(
                f"whitening was learned on embeddings of {len(self.mean)} dimensions ({self.learned_on}), and these "
                f"have {rows.shape[1]}. Cure: embeddings of the same model"
            )
        whitened = np.empty((len(rows), self.directions.shape[1]), dtype=np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            whitened[part] = unit_rows((rows[part].astype(np.float64) - self.mean) @ self.directions)
        return whitened

    @property
    def sentence(self) -> str:
        return (
            f"whitened by PCA to {self.directions.shape[1]:,} of {len(self.mean):,} dimensions, learned on "
            f"{self.num_images:,} images ({self.learned_on})"
        )

    @property
    def settings(self) -> dict[str, int | str]:
        """What is stored with the result."""
        return {
            "num_images": self.num_images,
            "learned_on": self.learned_on,
            "dimensions": self.directions.shape[1],
            "dimensions_before": len(self.mean),
        }


def learn_on_kept(kept: SavedEmbeddings, scored: SavedEmbeddings, file: Path) -> Whitening:
    """Learn whitening from kept embeddings, for others of the same model that are to be scored.

    Raises RetrievalError where the kept ones are of test classes, or of classes that are to be scored.
    """
    refuse_test_classes(kept, file)
    dataset = kept.facts.get("dataset", "unknown data set")
    shared = sorted(set(kept.class_names) & set(scored.class_names))
    if shared and dataset == scored.facts.get("dataset"):
        raise RetrievalError(
            f"--whiten-on {file}: {len(shared)} of its {len(kept.class_names)} classes are to be scored, the first is "
            f"{shared[0]!r}: whitening would have seen them. Cure: embeddings of other classes, such as those that "
            "trained the model"
        )
    of_model = kept.facts.get("checkpoint", "an unknown model")
    return learn_whitening(kept.embeddings, f"{file.name}: {dataset}, {kept.facts.get('part')}, by {of_model}")


def refuse_test_classes(kept: SavedEmbeddings, file: Path) -> None:
    """Raise RetrievalError for kept embeddings of the test classes of a data set: nothing is learned on them."""
    if kept.facts.get("part") == "test":
        raise RetrievalError(
            f"--whiten-on {file}: these are test classes, and nothing is learned on them. Cure: embeddings of training "
            "or validation classes (evaluate ... --on val --save-embeddings FILE)"
        )


def learn_whitening(rows: Floats, learned_on: str) -> Whitening:
    """Learn PCA whitening from embeddings (N, D).

    The covariance divides by N. A direction whose standard deviation is at most 10^-6 of the largest is left out:
    float32 embeddings have only rounding there. Source: Jegou and Chum, "Negative evidences and co-occurences in image
    retrieval: the benefit of PCA and whitening", ECCV 2012, section 3.

    Raises RetrievalError for fewer than two different rows, and for rows that are not finite.
    """
    if not np.isfinite(rows).all():
        raise RetrievalError(f"whitening: the embeddings to learn it on ({learned_on}) hold NaN or infinity")
    mean = rows.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        centred = rows[start : start + _ROWS_AT_ONCE] - mean
        covariance += centred.T @ centred
    variances, directions = np.linalg.eigh(covariance / len(rows))
    deviations = np.sqrt(np.maximum(variances, 0))
    kept = np.flatnonzero(deviations > 1e-6 * deviations.max())[::-1]
    if not len(kept):
        raise RetrievalError(
            f"whitening: all {len(rows)} embeddings to learn it on ({learned_on}) are the same, so they have no "
            "variance. Cure: embeddings of more images, by a model that has not collapsed"
        )
    return Whitening(mean, directions[:, kept] / deviations[kept], len(rows), learned_on)
