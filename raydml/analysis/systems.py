"""Which published numbers are of the system that a configuration runs.

Same system means same method, loss and miner: backbone, dimensions and data preparation are told beside the numbers
and may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BASELINES = "MIC's baselines"
_REVISITING = "Revisiting Training Strategies"

# (loss, miner) -> (system, beginning of the variant) of a plain training
_PLAIN: dict[tuple[str, str | None], tuple[tuple[str, str], ...]] = {
    ("normalized_softmax", None): (("classification baseline", "normalised softmax"),),
    ("multi_similarity", "multi_similarity"): (("multi-similarity", ""), (_REVISITING, "Multisimilarity")),
    ("weight", "multi_similarity"): (("Deep_Metric", "weight loss"),),
    ("margin", "distance_weighted"): ((_BASELINES, "margin, distance-weighted"),),
    ("n_pair", "n_pair"): ((_BASELINES, "n-pair"), (_REVISITING, "N-Pair")),
    ("proxy_nca", None): ((_BASELINES, "proxy-NCA"), (_REVISITING, "ProxyNCA")),
    ("arcface", None): ((_REVISITING, "ArcFace"),),
    ("soft_triple", None): ((_REVISITING, "SoftTriple"),),
    ("contrastive", "distance_weighted"): ((_REVISITING, "Contrastive (D)"),),
    ("snr_contrastive", "distance_weighted"): ((_REVISITING, "SNR (D)"),),
    ("triplet", "distance_weighted"): ((_REVISITING, "Triplet (D)"),),
    ("triplet", "semi_hard"): ((_REVISITING, "Triplet (semihard)"),),
    ("triplet", "soft_hard"): ((_BASELINES, "triplet, soft hard"), (_REVISITING, "Triplet (softhard)")),
}


def is_system(config: Mapping[str, Any], system: str, variant: str) -> bool:
    """Whether a configuration (plain values) runs the system and variant of a published number."""
    return any(system == name and variant.startswith(beginning) for name, beginning in _systems_of(config))


def _systems_of(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    method, loss, miner = ((config.get(block) or {}).get("name") for block in ("method", "loss", "miner"))
    if config.get("regularizers"):
        return ()
    if method == "divide_conquer":
        return (("Divide & Conquer", ""),)
    if method == "mic":
        return (("MIC", "margin loss"),) if loss == "margin" else ()
    if method not in (None, "plain"):
        return ()
    found = _PLAIN.get((str(loss), miner), ())
    if (loss, miner) == ("margin", "distance_weighted"):
        return (*found, (_REVISITING, f"Margin (D, beta {config['loss'].get('beta', 1.2)})"))
    return found
