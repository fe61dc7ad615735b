"""Published numbers of the five systems and of comparisons, and which of them are of a configuration's system.

They are in published.yaml, whose head describes its format. Deep_Metric's script tests a checkpoint every 50 epochs on
the test classes, and its README does not say which one it reports. UNICOM's script prints the best of the epochs that
it tests; a network that was not trained has no epoch to choose. VehicleID has two protocols: MIC and Divide & Conquer
score it by leave-one-out, fast-reid and most other papers with one drawn gallery image of each vehicle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Published(NamedTuple):
    """One published number and the facts that decide how far ours can be compared with it.

    dataset: as ``trial.data.name``. metric: as in our results. deviation: standard deviation over runs, where given.
    embedding_dim, backbone: None where the source does not say. protocol: see ``evaluation/protocols.py``.
    status: how the number was checked. chosen_on_test: whether the source chooses the epoch on these test classes; None
    where this is not known.
    """

    system: str
    variant: str
    dataset: str
    metric: str
    value: float
    deviation: float | None
    embedding_dim: int | None
    backbone: str | None
    protocol: str
    source: str
    status: str
    chosen_on_test: bool | None


_BASELINES, _REVISITING = "MIC's baselines", "Revisiting Training Strategies"
# (loss, miner) -> (system, beginning of the variant) of a plain training
_PLAIN: dict[tuple[str, str | None], tuple[tuple[str, str], ...]] = {
    ("normalized_softmax", None): (("classification baseline", "normalised softmax"),),
    ("multi_similarity", "multi_similarity"): (("multi-similarity", ""), (_REVISITING, "Multisimilarity")),
    ("weight", "multi_similarity"): (("Deep_Metric", "weight loss"),),
    ("margin", "distance_weighted"): ((_BASELINES, "margin, distance-weighted"), ("Margin", "")),
    ("n_pair", "n_pair"): ((_BASELINES, "n-pair"), (_REVISITING, "N-Pair")),
    ("proxy_nca", None): ((_BASELINES, "proxy-NCA"), (_REVISITING, "ProxyNCA"), ("Proxy-NCA", "")),
    ("proxy_anchor", None): (("Proxy-Anchor", ""),),
    ("arcface", None): ((_REVISITING, "ArcFace"),),
    ("soft_triple", None): ((_REVISITING, "SoftTriple"), ("SoftTriple", "")),
    ("contrastive", "distance_weighted"): ((_REVISITING, "Contrastive (D)"),),
    ("snr_contrastive", "distance_weighted"): ((_REVISITING, "SNR (D)"),),
    ("triplet", "distance_weighted"): ((_REVISITING, "Triplet (D)"),),
    ("triplet", "semi_hard"): ((_REVISITING, "Triplet (semihard)"),),
    ("triplet", "soft_hard"): ((_BASELINES, "triplet, soft hard"), (_REVISITING, "Triplet (softhard)")),
}


@functools.cache
def published_numbers() -> tuple[Published, ...]:
    """Read all published numbers."""
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    return tuple(
        number for source in yaml.safe_load(text) for row in source["rows"] for number in _numbers(source, row)
    )


def _numbers(source: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Published]:
    """Yield the numbers of one row, as fractions."""
    facts = {"variant": "", "backbone": None, "embedding_dim": None, **source, **row}
    deviation = round(facts["deviation"] / 100, 6) if "deviation" in facts else None
    for metric in ("recall_at", "binary_recall_at"):
        for k, percent in facts.get(metric, {}).items():
            yield Published(
                metric=f"{metric}_{k}",
                value=round(percent / 100, 6),
                deviation=deviation,
                **{name: facts[name] for name in Published._fields if name not in ("metric", "value", "deviation")},
            )


def published_of(dataset: str, protocol: str) -> list[Published]:
    """Return the published numbers of this data set (``trial.data.name``) and protocol."""
    return [number for number in published_numbers() if (number.dataset, number.protocol) == (dataset, protocol)]


def is_system(config: Mapping[str, Any], system: str, variant: str) -> bool:
    """Return whether a configuration (plain values) runs the system and variant of a published number.

    The same system means the same method, loss and miner. Backbone, dimensions and data preparation may differ; the
    report prints them beside the numbers.
    """
    return any(system == name and variant.startswith(beginning) for name, beginning in _systems_of(config))


def _systems_of(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    method, loss, miner = ((config.get(block) or {}).get("name") for block in ("method", "loss", "miner"))
    if config.get("regularizers"):
        return ()
    if method == "divide_conquer":
        return (("Divide & Conquer", ""),)
    if method == "mic":
        auxiliary = (config["method"].get("auxiliary_loss") or {}).get("name", loss)
        return (("MIC", "margin loss"),) if loss == auxiliary == "margin" else ()
    if method not in (None, "plain"):
        return ()
    found = _PLAIN.get((str(loss), miner), ())
    if (loss, miner) == ("margin", "distance_weighted"):
        return (*found, (_REVISITING, f"Margin (D, beta {config['loss'].get('beta', 1.2)})"))
    return found
