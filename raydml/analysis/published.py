"""Published numbers of the five systems and of two comparisons, and which of them are of a configuration's system.

published.csv has a row for each source, variant and data set: recalls in percent, as printed, at the k they are printed
for, and their standard deviation over runs. Of a variant ", binary" the embeddings are their signs, compared by Hamming
distance. It holds what was read in a README or a figure of the authors, or of a third party where the status says so,
and what later papers print of a paper without contradiction: MIC lacks k = 100 on SOP, where they disagree (95.6 and
94.6). published_sources.csv has what all numbers of a source share. Deep_Metric's script tests a checkpoint every 50
epochs on the test classes, and its README does not say which one it reports.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


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


def _rows_of(file_name: str) -> list[dict[str, str]]:
    with Path(__file__).with_name(file_name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _all_numbers() -> Iterator[Published]:
    sources = {source.pop("key"): source for source in _rows_of("published_sources.csv")}
    for row in _rows_of("published.csv"):
        facts: dict[str, Any] = {**sources[row["source"]], "variant": row["variant"], "dataset": row["dataset"]}
        facts["backbone"] = facts["backbone"] or None
        facts["embedding_dim"] = int(facts["embedding_dim"]) if facts["embedding_dim"] else None
        facts["chosen_on_test"] = {"yes": True, "no": False, "": None}[facts["chosen_on_test"]]
        # None of them scores VehicleID by its usual protocol, one gallery image of each vehicle.
        facts["protocol"] = "query_gallery" if row["dataset"] == "inshop" else "leave_one_out"
        facts["deviation"] = round(float(row["deviation"]) / 100, 6) if row["deviation"] else None
        name = "binary_recall_at" if row["variant"].endswith(", binary") else "recall_at"
        for k, percent in zip(row["k"].split(), row["percent"].split(), strict=True):
            yield Published(metric=f"{name}_{k}", value=round(float(percent) / 100, 6), **facts)


PUBLISHED: tuple[Published, ...] = tuple(_all_numbers())


def comparable(dataset: str, protocol: str) -> list[Published]:
    """Return the published numbers of this data set (``trial.data.name``) and protocol."""
    return [number for number in PUBLISHED if (number.dataset, number.protocol) == (dataset, protocol)]


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
        return (("MIC", "margin loss"),) if loss == "margin" else ()
    if method not in (None, "plain"):
        return ()
    found = _PLAIN.get((str(loss), miner), ())
    if (loss, miner) == ("margin", "distance_weighted"):
        return (*found, (_REVISITING, f"Margin (D, beta {config['loss'].get('beta', 1.2)})"))
    return found
