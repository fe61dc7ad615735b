"""Scores of the first dimensions of embeddings, for those that were trained to be cut: regularizers/matryoshka.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raydml.config.trial import Trial
from raydml.data.catalog import Groups
from raydml.evaluation.ranking import Device
from raydml.evaluation.scoring import MetricSpec, ScoringError, score_by_all
from raydml.metrics.geometry import unit_rows


def prefix_dims_of(trial: Trial) -> tuple[int, ...]:
    """Return the lengths of the prefixes that a trial trains beside the whole embedding; most train none."""
    return tuple(trial.regularizers.get("matryoshka", {}).get("dims", ()))


def score_prefixes(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocol: str,
    dims: Sequence[int],
    device: Device = "cpu",
    *,
    groups: Groups | None = None,
    lone_misses: bool = False,
) -> dict[str, float]:
    """Return Recall@1 and MAP@R of prefixes, brought to length 1, under one protocol: ``dim_32_recall_at_1`` and so on.

    embeddings: (N, D); labels, roles, device and groups: as for ``score_by_all``. dims: lengths of the prefixes, at
    most D. lone_misses: of `MetricSpec`.
    Raises ScoringError for a longer one.
    """
    if longer := [dim for dim in dims if dim > embeddings.shape[1]]:
        raise ScoringError(
            f"dims: {longer[0]}, but the embeddings have {embeddings.shape[1]} dimensions: leave the longer prefixes "
            "out (--dims)"
        )
    found: dict[str, float] = {}
    for dim in dims:
        prefix = unit_rows(embeddings[:, :dim].astype(np.float64)).astype(np.float32)
        spec = MetricSpec((1,), lone_misses=lone_misses)
        metrics = score_by_all(prefix, labels, roles, (protocol,), spec, device, groups).metrics
        found |= {f"dim_{dim}_{name}": metrics[name] for name in ("recall_at_1", "map_at_r")}
    return found
