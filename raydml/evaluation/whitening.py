"""PCA whitening of embeddings, learned on other images than those that are scored."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.evaluation.nearness import Floats, RetrievalError
from raydml.evaluation.protocols import DISTRACTOR
from raydml.evaluation.ranking import Device, nearest_neighbours
from raydml.evaluation.saved_embeddings import SavedEmbeddings
from raydml.metrics.geometry import unit_rows

# Rows that are converted to float64 at a time.
_ROWS_AT_ONCE = 2**14
# Two embeddings are of the same image where their distance is at most this part of their length: a network rounds
# differently in a batch of another size. In few dimensions other images come as near by chance; there rows are equal.
_SAME_IMAGE = 1e-5
_FEWEST_DIMENSIONS = 8


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


def learn_on_kept(kept: SavedEmbeddings, scored: SavedEmbeddings, file: Path, device: Device = "cpu") -> Whitening:
    """Learn whitening from kept embeddings, for others of the same model that are to be scored.

    device: where kept and scored embeddings are compared.

    Raises RetrievalError where the kept ones are of another model, of test classes, of classes with the name of one
    that is to be scored (in any data set), or of an image that is to be scored.
    """
    refuse_test_classes(kept, file)
    _refuse_other_model(kept, scored, file)
    names = _class_names(kept)
    if shared := sorted(names & _class_names(scored)):
        raise RetrievalError(
            f"--whiten-on {file}: {len(shared)} of its {len(names)} classes are to be scored, the first is "
            f"{shared[0]!r}: whitening would have seen them. Cure: embeddings of other classes, such as those that "
            "trained the model; classes that only have the same name need other names (of their folders or labels)"
        )
    _refuse_scored_images(kept, scored, file, device)
    of_model = kept.facts.get("checkpoint", "an unknown model")
    dataset = kept.facts.get("dataset", "unknown data set")
    return learn_whitening(kept.embeddings, f"{file.name}: {dataset}, {kept.facts.get('part')}, by {of_model}")


def _class_names(saved: SavedEmbeddings) -> set[str]:
    """Return the names of the classes that have an image; distractors are of no class."""
    roles = [""] * len(saved.labels) if saved.roles is None else saved.roles
    labels = {label for label, role in zip(saved.labels.tolist(), roles, strict=True) if role != DISTRACTOR}
    return {saved.class_names[label] for label in labels}


def _refuse_other_model(kept: SavedEmbeddings, scored: SavedEmbeddings, file: Path) -> None:
    """Raise RetrievalError unless two files are by one model, as far as their facts say.

    The digest of the weights decides. Files without it have the fingerprint of a trial, the place of a checkpoint, or
    neither. A checkpoint may have been moved, so only its own name and that of its folder count.
    """
    of_models = (kept.facts, scored.facts)
    one, other = (str(facts.get("checkpoint") or "an unknown model") for facts in of_models)
    fact = "weights"
    if not all(facts.get(fact) for facts in of_models):
        fact = "fingerprint" if all(facts.get("fingerprint") for facts in of_models) else "checkpoint"
    is_same = kept.facts.get(fact) == scored.facts.get(fact)
    if fact == "checkpoint" or (is_same and fact == "fingerprint"):
        is_same = Path(one).parts[-2:] == Path(other).parts[-2:]
        fact = "checkpoint"
    if not is_same:
        by = "" if fact == "checkpoint" else f" ({fact}: {kept.facts[fact]!r} and {scored.facts[fact]!r})"
        raise RetrievalError(
            f"--whiten-on {file}: its embeddings are by {one}, and those that are scored by {other}{by}: the "
            "directions of one model mean nothing in the embeddings of another. Cure: embeddings of other classes by "
            f"{other} (evaluate ... --save-embeddings FILE)"
        )
    if kept.embeddings.shape[1] != scored.embeddings.shape[1]:
        raise RetrievalError(
            f"--whiten-on {file}: its embeddings have {kept.embeddings.shape[1]} dimensions, and those that are scored "
            f"{scored.embeddings.shape[1]}, so they are not of one model. Cure: embeddings of the same model"
        )


def _refuse_scored_images(kept: SavedEmbeddings, scored: SavedEmbeddings, file: Path, device: Device) -> None:
    """Raise RetrievalError where a kept embedding is that of an image that is to be scored, under any name."""
    rows = kept.embeddings
    if not np.isfinite(rows).all():
        return  # `learn_whitening` refuses them
    nearest, distances = nearest_neighbours(rows, scored.embeddings, k=1, device=device)
    tolerance = _SAME_IMAGE if rows.shape[1] >= _FEWEST_DIMENSIONS else 0.0
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    same = np.flatnonzero(np.sqrt(distances[:, 0].astype(np.float64)) <= tolerance * lengths)
    if len(same):
        first = int(same[0])
        raise RetrievalError(
            f"--whiten-on {file}: {len(same)} of its {len(rows)} embeddings are those of images that are to be scored, "
            f"the first is {kept.paths[first]} ({scored.paths[int(nearest[first, 0])]} among these): whitening would "
            "have seen them. Cure: embeddings of other images; where the file of one image is in both sets, keep "
            "them again without it"
        )


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
        raise RetrievalError(
            f"whitening: the embeddings to learn it on ({learned_on}) hold NaN or infinity. Cure: "
            "embeddings by a model that has not diverged, such as an earlier checkpoint"
        )
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
