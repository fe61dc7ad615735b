"""Published numbers of the five systems and of two comparisons: what a study's own can be held against.

One table of facts. In it is only what was read in a README or a figure of the authors (or of a third party, which then
says so), and what later papers print of a paper without contradiction; what is merely remembered is not. Values are
fractions, as ours are.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """One number, and how far it can be compared.

    dataset: as ``trial.data.name``. metric: as in our results. deviation: standard deviation over runs, where given.
    embedding_dim, backbone: None where the source does not say. protocol: who searches whom, see protocols.py.
    status: how the number was checked. chosen_on_test: whether the source picks the epoch on these test classes; None:
    not known.
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


class _Origin(NamedTuple):
    """What the numbers of one source have in common."""

    system: str
    source: str
    status: str
    backbone: str | None
    embedding_dim: int | None
    chosen_on_test: bool | None


_README = "checked in the README"
_DIVIDE_CONQUER = _Origin("Divide & Conquer", "release README, CVPR 2019", _README, "resnet50", 128, True)
_CLASSIFICATION = _Origin("classification baseline", "release README, BMVC 2019", _README, "resnet50", 2048, False)
_RERUN = _Origin(
    "classification baseline", "README of leftthomas/NormSoftmax, a re-run", "third party's README", None, None, None
)
# Its script tests a checkpoint every 50 epochs on the test classes; which of them the README is about, nobody says.
_DEEP_METRIC = _Origin("Deep_Metric", "README of December 2018", _README, "bn_inception", 512, None)
_MULTI_SIMILARITY = _Origin("multi-similarity", "release README, CVPR 2019", _README, "bn_inception", 512, True)
_MIC = _Origin("MIC", "tables of later papers, ICCV 2019", "confirmed by secondary sources", "resnet50", 128, True)
_MIC_BASELINE = _Origin(
    "MIC's baselines", "the authors' baseline repository", "read in the repository", "resnet50", None, None
)
_REVISITING = _Origin(
    "Revisiting Training Strategies",
    "figures in the benchmark's repository, ICML 2020",
    "read from vector figures, mean of 5 seeds",
    "resnet50",
    128,
    True,
)

# variant -> dataset -> k -> percent, as printed
_Recalls = Mapping[str, Mapping[str, Mapping[int, float]]]


def _of(dataset_ks: tuple[int, ...], *percents: float) -> dict[int, float]:
    return dict(zip(dataset_ks, percents, strict=False))  # some sources print the smaller k only


_BIRDS, _PRODUCTS, _CLOTHES = (1, 2, 4, 8, 16, 32), (1, 10, 100, 1000), (1, 10, 20, 30, 40, 50)
_CLOTHES_50 = (1, 10, 20, 30, 50)

_RECALLS: tuple[tuple[_Origin, _Recalls], ...] = (
    (
        _DIVIDE_CONQUER,
        {"8 learners": {"sop": {1: 76.40}, "inshop": {1: 87.36}, "vehicleid_large": {1: 91.54}}},
    ),
    (
        _CLASSIFICATION,
        {
            "normalised softmax": {
                "cub200": _of(_BIRDS, 65.36, 76.76, 85.42, 91.51),
                "cars196": _of(_BIRDS, 89.50, 94.18, 96.84, 98.41),
                "sop": _of(_PRODUCTS, 79.55, 91.54, 96.66, 98.95),
                "inshop": _of(_CLOTHES, 89.35, 97.81, 98.61, 98.87, 99.05, 99.13),
            }
        },
    ),
    (
        _RERUN,
        {
            "normalised softmax, re-run": {
                "cub200": _of(_BIRDS, 64.1, 75.4, 83.6, 90.6),
                "cars196": _of(_BIRDS, 86.1, 91.9, 95.4, 97.4),
                "sop": _of(_PRODUCTS, 78.7, 91.1, 96.5, 98.9),
                "inshop": _of(_CLOTHES, 88.4, 97.5, 98.3, 98.7, 98.9, 99.0),
            }
        },
    ),
    (
        _DEEP_METRIC,
        {
            "weight loss": {
                "cub200": _of(_BIRDS, 66.85, 77.84, 85.80, 91.29, 94.94, 97.42),
                "cars196": _of(_BIRDS, 83.69, 90.27, 94.53, 97.16, 98.65, 99.36),
                "sop": _of(_PRODUCTS, 78.18, 90.47, 96.0, 98.74),
                "inshop": _of(_CLOTHES, 89.64, 97.87, 98.47, 98.84, 99.05, 99.20),
            }
        },
    ),
    (_MULTI_SIMILARITY, {"512 dimensions": {"cub200": _of(_BIRDS, 65.7, 77.0, 86.3, 91.2, 95.0, 97.3)}}),
    (
        _MULTI_SIMILARITY._replace(embedding_dim=64),
        {"64 dimensions": {"cub200": _of(_BIRDS, 57.4, 69.8, 80.0, 87.8, 93.2, 96.4)}},
    ),
    (
        _MIC,
        {
            "margin loss": {
                "cub200": _of(_BIRDS, 66.1, 76.8, 85.6),
                "cars196": _of(_BIRDS, 82.6, 89.1, 93.2),
                "sop": _of(_PRODUCTS, 77.2, 89.4),  # for k = 100 later papers print 95.6 and 94.6
                "inshop": _of(_CLOTHES, 88.2, 97.0),
                "vehicleid_small": {1: 86.9},
            }
        },
    ),
    (
        _MIC_BASELINE,
        {
            "margin, distance-weighted": {
                "cub200": _of(_BIRDS, 63.4, 74.9, 86.0, 90.4),
                "cars196": _of(_BIRDS, 79.3, 87.1, 92.1, 95.4),
                "sop": _of(_PRODUCTS, 76.1, 88.7, 95.1, 98.3),
                "inshop": _of(_CLOTHES_50, 84.5, 96.1, 97.4, 97.9, 98.5),
            },
            "triplet, soft hard": {
                "cub200": _of(_BIRDS, 61.2, 73.2, 82.4, 89.5),
                "cars196": _of(_BIRDS, 75.4, 84.2, 90.1, 94.1),
                "sop": _of(_PRODUCTS, 74.3, 87.6, 94.9, 98.5),
                "inshop": _of(_CLOTHES_50, 83.9, 96.3, 97.6, 98.4, 98.8),
            },
            "n-pair": {
                "cub200": _of(_BIRDS, 59.0, 71.3, 81.1, 88.8),
                "cars196": _of(_BIRDS, 69.5, 80.2, 87.3, 92.1),
                "sop": _of(_PRODUCTS, 70.9, 85.2, 93.8, 98.2),
                "inshop": _of(_CLOTHES_50, 80.9, 95.0, 96.6, 97.5, 98.2),
            },
            "proxy-NCA": {
                "cub200": _of(_BIRDS, 64.0, 75.4, 84.2, 90.5),
                "cars196": _of(_BIRDS, 80.0, 87.2, 91.8, 95.1),
            },
        },
    ),
)

# the same of the signs of the embeddings, compared by Hamming distance
_BINARY_RECALLS: tuple[tuple[_Origin, _Recalls], ...] = (
    (
        _CLASSIFICATION,
        {
            "normalised softmax, binary": {
                "cub200": _of(_BIRDS, 63.67, 75.37, 84.54, 90.99),
                "cars196": _of(_BIRDS, 89.29, 93.95, 96.61, 98.14),
                "sop": _of(_PRODUCTS, 78.03, 90.71, 96.24, 98.72),
                "inshop": _of(_CLOTHES, 88.76, 97.65, 98.47, 98.73, 98.94, 99.05),
            }
        },
    ),
    (
        _RERUN,
        {
            "normalised softmax, re-run, binary": {
                "cub200": _of(_BIRDS, 62.7, 74.4, 82.8, 90.0),
                "cars196": _of(_BIRDS, 85.2, 91.6, 95.2, 97.3),
                "sop": _of(_PRODUCTS, 77.8, 90.7, 96.3, 98.8),
                "inshop": _of(_CLOTHES, 87.6, 97.4, 98.3, 98.6, 98.7, 98.9),
            }
        },
    ),
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


def _number(
    origin: _Origin, variant: str, dataset: str, metric: str, percent: float, deviation: float | None = None
) -> Published:
    return Published(
        origin.system,
        variant,
        dataset,
        metric,
        round(percent / 100, 6),
        None if deviation is None else round(deviation / 100, 6),
        origin.embedding_dim,
        origin.backbone,
        # None of them scores VehicleID by its usual protocol, one gallery image a vehicle.
        "query_gallery" if dataset == "inshop" else "leave_one_out",
        origin.source,
        origin.status,
        origin.chosen_on_test,
    )


def _all_numbers() -> Iterator[Published]:
    for metric, table in (("recall_at", _RECALLS), ("binary_recall_at", _BINARY_RECALLS)):
        for origin, variants in table:
            for variant, datasets in variants.items():
                for dataset, percents in datasets.items():
                    for k, percent in percents.items():
                        yield _number(origin, variant, dataset, f"{metric}_{k}", percent)
    for variant, cells in _BENCHMARK.items():
        for dataset, cell in zip(("cub200", "cars196", "sop"), cells, strict=True):
            if cell is not None:
                yield _number(_REVISITING, variant, dataset, "recall_at_1", *cell)


PUBLISHED: tuple[Published, ...] = tuple(_all_numbers())


def comparable(dataset: str, protocol: str) -> list[Published]:
    """The published numbers of this data set (``trial.data.name``) that were scored by this protocol."""
    return [number for number in PUBLISHED if (number.dataset, number.protocol) == (dataset, protocol)]
