"""Names and values of metrics for readers: `val_map_at_r` -> "validation MAP@R", and 0.6125 ± 0.0129."""

from __future__ import annotations

import re

#: Groups of metrics; see evaluation/scoring.py.
METRIC_GROUPS = ("retrieval", "ranking", "clustering", "geometry")
#: What is compared: the embeddings, their signs by Hamming distance, or their 8-bit integers.
CODES = ("float", "binary", "int8")

_NAMES = {
    "map_at_r": "MAP@R",
    "r_precision": "R-precision",
    "mrr": "MRR",
    "map": "mAP",
    "nmi_geometric": "NMI (geometric mean)",
    "nmi_arithmetic": "NMI (arithmetic mean)",
    "nmi": "NMI",
    "ami": "AMI",
    "ari": "ARI",
    "pair_f1": "pair F1",
    "intra_distance": "distance within classes",
    "inter_distance": "distance between classes",
    "density": "density",
    "rho": "rho",
    "roc_auc": "ROC AUC",
    "eer": "EER",
}
_AT_K = {"recall": "Recall", "precision": "Precision", "map": "mAP"}
_AT_RATE = {"tar_at_far": "TAR@FAR", "fnmr_at_fmr": "FNMR@FMR"}
_PARTS = {"val": "validation", "test": "test"}
# A prefix (the part, the protocol, the code), and a name or a metric at a k.
_METRIC = re.compile(rf"(?:(\w+)_)??(?:({'|'.join(_NAMES)})|({'|'.join(_AT_K)})_at_(\d+))")
_RATE = re.compile(rf"({'|'.join(_AT_RATE)})_(1e-\d+)")


def metric_name(metric: str) -> str:
    """Return "validation MAP@R" for `val_map_at_r`, "binary Recall@1" for `binary_recall_at_1`; others as they are."""
    if (rate := _RATE.fullmatch(metric)) is not None:
        return f"{_AT_RATE[rate[1]]}={rate[2]}"
    if metric.startswith("cmc_rank_"):
        return f"CMC rank-{metric.removeprefix('cmc_rank_')}"
    found = _METRIC.fullmatch(metric)
    if found is None:
        return metric
    prefix, name, ranked, k = found.groups()
    words = [_PARTS.get(word, word) for word in prefix.split("_")] if prefix else []
    return " ".join([*words, _NAMES[name] if name else f"{_AT_K[ranked]}@{k}"])


def metric_label(metric: str) -> str:
    """Return a short name without the part, for narrow columns: "R@10" for `val_recall_at_10`."""
    name = metric_name(metric)
    for part in _PARTS.values():
        name = name.removeprefix(f"{part} ")
    return name.replace("Recall@", "R@").replace("Precision@", "P@")


def interval_text(mean: float | None, half_width: float | None, decimals: int = 4) -> str:
    """Return "0.6125 ± 0.0129", "0.6125" without an interval, and "-" without a mean."""
    if mean is None:
        return "-"
    return f"{mean:.{decimals}f}" if half_width is None else f"{mean:.{decimals}f} ± {half_width:.{decimals}f}"
