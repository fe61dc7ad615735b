"""Published numbers of the five systems and of two comparisons, and which of them are of a configuration's system.

The table holds what was read in a README or a figure of the authors, or of a third party where the status says so, and
what later papers print of a paper without contradiction. Values are fractions, as ours are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


class _SourceFacts(NamedTuple):
    """The facts that all numbers of one source share."""

    system: str
    source: str
    status: str
    backbone: str | None
    embedding_dim: int | None
    chosen_on_test: bool | None


_BASELINES, _REVISITING = "MIC's baselines", "Revisiting Training Strategies"
_README = "checked in the README"
_DIVIDE_CONQUER = _SourceFacts("Divide & Conquer", "release README, CVPR 2019", _README, "resnet50", 128, True)
_CLASSIFICATION = _SourceFacts("classification baseline", "release README, BMVC 2019", _README, "resnet50", 2048, False)
_RERUN = _SourceFacts(
    "classification baseline", "README of leftthomas/NormSoftmax, a re-run", "third party's README", None, None, None
)
# Its script tests a checkpoint every 50 epochs on the test classes; the README does not say which one it reports.
_DEEP_METRIC = _SourceFacts("Deep_Metric", "README of December 2018", _README, "bn_inception", 512, None)
_MULTI_SIMILARITY = _SourceFacts("multi-similarity", "release README, CVPR 2019", _README, "bn_inception", 512, True)
_MIC = _SourceFacts("MIC", "tables of later papers, ICCV 2019", "confirmed by secondary sources", "resnet50", 128, True)
_MIC_BASELINE = _SourceFacts(
    _BASELINES, "the authors' baseline repository", "read in the repository", "resnet50", None, None
)
_BENCHMARK_FIGURES = _SourceFacts(
    _REVISITING,
    "figures in the benchmark's repository, ICML 2020",
    "read from vector figures, mean of 5 seeds",
    "resnet50",
    128,
    True,
)

# The k of the recalls below, by data set. Some sources print only the first of them; MIC's baselines have no k = 40.
_KS = {
    "cub200": (1, 2, 4, 8, 16, 32),
    "cars196": (1, 2, 4, 8, 16, 32),
    "sop": (1, 10, 100, 1000),
    "inshop": (1, 10, 20, 30, 40, 50),
    "vehicleid_small": (1,),
    "vehicleid_large": (1,),
}
_CLOTHES_WITHOUT_40 = (1, 10, 20, 30, 50)

# (source, variant, {data set: recalls in percent, as printed}); of a variant ", binary" the embeddings are their signs,
# compared by Hamming distance
_RECALLS: tuple[tuple[_SourceFacts, str, Mapping[str, tuple[float, ...]]], ...] = (
    (_DIVIDE_CONQUER, "8 learners", {"sop": (76.40,), "inshop": (87.36,), "vehicleid_large": (91.54,)}),
    (
        _CLASSIFICATION,
        "normalised softmax",
        {
            "cub200": (65.36, 76.76, 85.42, 91.51),
            "cars196": (89.50, 94.18, 96.84, 98.41),
            "sop": (79.55, 91.54, 96.66, 98.95),
            "inshop": (89.35, 97.81, 98.61, 98.87, 99.05, 99.13),
        },
    ),
    (
        _CLASSIFICATION,
        "normalised softmax, binary",
        {
            "cub200": (63.67, 75.37, 84.54, 90.99),
            "cars196": (89.29, 93.95, 96.61, 98.14),
            "sop": (78.03, 90.71, 96.24, 98.72),
            "inshop": (88.76, 97.65, 98.47, 98.73, 98.94, 99.05),
        },
    ),
    (
        _RERUN,
        "normalised softmax, re-run",
        {
            "cub200": (64.1, 75.4, 83.6, 90.6),
            "cars196": (86.1, 91.9, 95.4, 97.4),
            "sop": (78.7, 91.1, 96.5, 98.9),
            "inshop": (88.4, 97.5, 98.3, 98.7, 98.9, 99.0),
        },
    ),
    (
        _RERUN,
        "normalised softmax, re-run, binary",
        {
            "cub200": (62.7, 74.4, 82.8, 90.0),
            "cars196": (85.2, 91.6, 95.2, 97.3),
            "sop": (77.8, 90.7, 96.3, 98.8),
            "inshop": (87.6, 97.4, 98.3, 98.6, 98.7, 98.9),
        },
    ),
    (
        _DEEP_METRIC,
        "weight loss",
        {
            "cub200": (66.85, 77.84, 85.80, 91.29, 94.94, 97.42),
            "cars196": (83.69, 90.27, 94.53, 97.16, 98.65, 99.36),
            "sop": (78.18, 90.47, 96.0, 98.74),
            "inshop": (89.64, 97.87, 98.47, 98.84, 99.05, 99.20),
        },
    ),
    (_MULTI_SIMILARITY, "512 dimensions", {"cub200": (65.7, 77.0, 86.3, 91.2, 95.0, 97.3)}),
    (
        _MULTI_SIMILARITY._replace(embedding_dim=64),
        "64 dimensions",
        {"cub200": (57.4, 69.8, 80.0, 87.8, 93.2, 96.4)},
    ),
    (
        _MIC,
        "margin loss",
        {
            "cub200": (66.1, 76.8, 85.6),
            "cars196": (82.6, 89.1, 93.2),
            "sop": (77.2, 89.4),  # for k = 100 later papers print 95.6 and 94.6
            "inshop": (88.2, 97.0),
            "vehicleid_small": (86.9,),
        },
    ),
    (
        _MIC_BASELINE,
        "margin, distance-weighted",
        {
            "cub200": (63.4, 74.9, 86.0, 90.4),
            "cars196": (79.3, 87.1, 92.1, 95.4),
            "sop": (76.1, 88.7, 95.1, 98.3),
            "inshop": (84.5, 96.1, 97.4, 97.9, 98.5),
        },
    ),
    (
        _MIC_BASELINE,
        "triplet, soft hard",
        {
            "cub200": (61.2, 73.2, 82.4, 89.5),
            "cars196": (75.4, 84.2, 90.1, 94.1),
            "sop": (74.3, 87.6, 94.9, 98.5),
            "inshop": (83.9, 96.3, 97.6, 98.4, 98.8),
        },
    ),
    (
        _MIC_BASELINE,
        "n-pair",
        {
            "cub200": (59.0, 71.3, 81.1, 88.8),
            "cars196": (69.5, 80.2, 87.3, 92.1),
            "sop": (70.9, 85.2, 93.8, 98.2),
            "inshop": (80.9, 95.0, 96.6, 97.5, 98.2),
        },
    ),
    (_MIC_BASELINE, "proxy-NCA", {"cub200": (64.0, 75.4, 84.2, 90.5), "cars196": (80.0, 87.2, 91.8, 95.1)}),
)

# R@1 in percent, mean and standard deviation over 5 seeds: CUB, Cars, SOP
_BENCHMARK: dict[str, tuple[tuple[float, float] | None, ...]] = {
    "Angular": ((62.10, 0.27), (78.00, 0.32), (73.22, 0.07)),
    "ArcFace": ((62.67, 0.67), (79.16, 0.97), (77.71, 0.15)),
    "Contrastive (D)": ((61.50, 0.17), (75.78, 0.39), (73.21, 0.04)),
    "GenLifted": ((59.59, 0.60), (72.17, 0.38), (75.21, 0.12)),
    "Histogram": ((60.55, 0.26), (76.47, 0.38), (71.30, 0.10)),
    "Margin (D, beta 0.6)": ((62.50, 0.24), (77.70, 0.32), (77.38, 0.11)),
    "Margin (D, beta 1.2)": ((63.09, 0.46), (79.86, 0.33), (78.43, 0.07)),
    "Multisimilarity": ((62.80, 0.70), (81.68, 0.19), (77.99, 0.09)),
    "N-Pair": ((61.63, 0.58), (77.48, 0.28), (75.86, 0.08)),
    "ProxyNCA": ((62.80, 0.48), (78.48, 0.58), None),
    "Quadruplet (D)": ((61.71, 0.63), (76.34, 0.27), (76.95, 0.10)),
    "SNR (D)": ((62.88, 0.18), (78.69, 0.19), (77.61, 0.34)),
    "SoftTriple": ((60.83, 0.47), (75.66, 0.46), None),
    "Softmax": ((61.66, 0.33), (78.91, 0.27), (76.92, 0.64)),
    "Triplet (D)": ((62.87, 0.35), (79.13, 0.27), (77.39, 0.15)),
    "Triplet (random)": ((58.48, 0.31), (70.63, 0.43), (67.86, 0.14)),
    "Triplet (semihard)": ((60.09, 0.49), (72.51, 0.47), (73.61, 0.14)),
    "Triplet (softhard)": ((61.61, 0.21), (77.60, 0.33), (73.50, 0.09)),
    "R-Contrastive": ((63.57, 0.66), (81.06, 0.41), (74.36, 0.11)),
    "R-Margin (beta 0.6)": ((64.93, 0.42), (82.37, 0.13), (77.58, 0.11)),
    "R-Margin (beta 1.2)": ((63.32, 0.33), (81.11, 0.49), (78.52, 0.10)),
    "R-SNR": ((62.97, 0.32), (80.38, 0.35), (77.69, 0.25)),
    "R-Triplet": ((63.28, 0.18), (81.17, 0.11), (77.33, 0.14)),
}


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


def _number(
    facts: _SourceFacts, variant: str, dataset: str, metric: str, percent: float, deviation: float | None = None
) -> Published:
    return Published(
        facts.system,
        variant,
        dataset,
        metric,
        round(percent / 100, 6),
        None if deviation is None else round(deviation / 100, 6),
        facts.embedding_dim,
        facts.backbone,
        # None of them scores VehicleID by its usual protocol, one gallery image of each vehicle.
        "query_gallery" if dataset == "inshop" else "leave_one_out",
        facts.source,
        facts.status,
        facts.chosen_on_test,
    )


def _all_numbers() -> Iterator[Published]:
    for facts, variant, datasets in _RECALLS:
        name = "binary_recall_at" if variant.endswith(", binary") else "recall_at"
        for dataset, percents in datasets.items():
            ks = _CLOTHES_WITHOUT_40 if (facts, dataset) == (_MIC_BASELINE, "inshop") else _KS[dataset]
            for k, percent in zip(ks, percents, strict=False):
                yield _number(facts, variant, dataset, f"{name}_{k}", percent)
    for variant, cells in _BENCHMARK.items():
        for dataset, cell in zip(("cub200", "cars196", "sop"), cells, strict=True):
            if cell is not None:
                yield _number(_BENCHMARK_FIGURES, variant, dataset, "recall_at_1", *cell)


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
