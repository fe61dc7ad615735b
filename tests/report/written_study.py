"""A study's folder written by hand: four trials of a search with ASHA, two configurations confirmed and tested."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

METRIC = "val_map_at_r"
ERROR = 'ValueError: <script>alert("1 & 2")</script>'
SPACE = """# yaml-language-server: $schema=schema.json
#
# Question: is <MIC> better than the margin loss alone,
#   on birds & cars?
#
# Command: launch.py sweep birds.yaml
"""
# search-000 wins the search, search-002 the confirmation.
CURVES = {
    "search-000": [0.30, 0.50, 0.55, 0.54],
    "search-001": [0.20, 0.25],
    "search-002": [0.25, 0.45, 0.52, 0.53],
    "search-003": [0.10],
}
SECONDS = {"search-000": 10.0, "search-001": 20.0, "search-002": 30.0, "search-003": 10.0}
ENDED = {"search-000": "finished", "search-001": "stopped_early", "search-002": "finished", "search-003": "crashed"}
# (fold, seed) -> value; the differences of the pairs are 0.10, 0.09, 0.09, 0.08.
MIC = {(0, 0): 0.60, (0, 1): 0.62, (1, 0): 0.58, (1, 1): 0.64}
# Seed -> MAP@R of the refits of MIC on the test classes: mean 0.34, deviation 0.01, so ± 4.3027 * 0.01 / sqrt(3).
REFITS = {0: 0.33, 1: 0.35, 2: 0.34}
MARGIN = {(0, 0): 0.50, (0, 1): 0.53, (1, 0): 0.49, (1, 1): 0.56}


def config_of(trial: str, *, fold: int | None = None, seed: int = 0) -> dict[str, object]:
    loss, miner, method = {
        "search-000": ("margin", "distance_weighted", "plain"),
        "search-001": ("multi_similarity", "multi_similarity", "plain"),
        "search-002": ("margin", "distance_weighted", "mic"),
        "search-003": ("contrastive", None, "plain"),
    }[trial]
    return {
        "seed": seed,
        "epochs": 4,
        "data": {"name": "cub200", "split": {"fold": fold}},
        "model": {"backbone": "resnet50", "embedding_dim": 128},
        "method": {"name": method},
        "loss": {"name": loss, "beta": 1.2},
        "miner": {"name": miner} if miner else None,
        "regularizers": {},
        "sampler": {"name": "class_balanced"},
        "optimizer": {"name": "adamw", "learning_rate": {"search-000": 1e-4, "search-003": 1e-3}.get(trial, 1e-5)},
    }


def write_study(folder: Path, *, stages: int = 3) -> Path:
    """The folder after this number of stages (0: the search is running), with its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    study = {
        "name": "birds <1>",
        "created": "2026-01-02T03:04:05+00:00",
        "select_on": METRIC,
        "machine": {"device": "auto", "gpus_per_trial": 0.5, "cpus_per_trial": 4},
        "trials": [config_of(trial) for trial in CURVES],
        "study": {
            "search": {"num_trials": 4, "scheduler": "asha", "grace_epochs": 2, "reduction_factor": 2},
            "confirm": {"top": 2, "folds": 2, "seeds": 2},
            "finalize": {"top": 2},
        },
    }
    (folder / "study.json").write_text(json.dumps(study))
    (folder / "space.yaml").write_text(SPACE)
    _write_lines(folder / "events.jsonl", _events(stages))
    if stages >= 1:
        (folder / "ranking.json").write_text(json.dumps(_ranking()))
    if stages >= 2:
        (folder / "confirmed.json").write_text(json.dumps(_confirmed()))
    if stages >= 3:
        (folder / "final.json").write_text(json.dumps(_final()))
        reads = [read("finalize", key) for key in confirmed_runs()] + [read("evaluate", "confirm-000")]
        _write_lines(folder / "test_reads.jsonl", reads)
        write_illustrations(folder)
    return folder


def add_refits(folder: Path, *, classes: str = "development", epochs: int | str = "confirmed") -> Path:
    """Give the written study a stage that refits its winner, MIC, with three seeds for three epochs."""
    study = json.loads((folder / "study.json").read_text())
    study["study"]["refit"] = {"top": 1, "seeds": 3, "epochs": epochs, "classes": classes}
    (folder / "study.json").write_text(json.dumps(study))
    _write_refits(folder, "search-002", classes, [4, 3, 2, 3] if epochs == "confirmed" else [])
    final = json.loads((folder / "final.json").read_text())
    final[0]["refit"] = _tested_refits(classes)
    final[1]["refit"] = None
    (folder / "final.json").write_text(json.dumps(final))
    purpose = "finalize" if classes == "development" else "training on all classes"
    with (folder / "test_reads.jsonl").open("a") as file:
        file.writelines(json.dumps(read(purpose, f"refit-00{seed}")) + "\n" for seed in REFITS)
    return folder


def write_published_study(folder: Path) -> Path:
    """The folder of a study that trains MIC on all development classes, without a search, and tests it."""
    folder.mkdir(parents=True)
    config = _refit_config("search-002", 0, "development")
    study = {
        "name": "as published",
        "created": "2026-01-02T03:04:05+00:00",
        "select_on": METRIC,
        "machine": {"device": "auto", "gpus_per_trial": 0.5, "cpus_per_trial": 4},
        "trials": [config],
        "study": {
            "search": {"num_trials": 1, "scheduler": "none", "grace_epochs": 1, "reduction_factor": 3},
            "confirm": None,
            "refit": {"top": 1, "seeds": 3, "epochs": "confirmed", "classes": "development"},
            "finalize": {"top": 1},
        },
    }
    (folder / "study.json").write_text(json.dumps(study))
    (folder / "space.yaml").write_text("# Question: what does MIC reach as published?\n")
    (folder / "events.jsonl").write_text(json.dumps({"event": "study_started", "study": "as published"}) + "\n")
    _write_refits(folder, "search-002", "development", [])
    empty = {key: {} for key in ("metrics", "untrained", "validation", "untrained_validation", "ensemble", "runs")}
    row = {
        "configuration": "print-search-002",
        "from_trial": "search-002",
        **empty,
        "refit": _tested_refits("development"),
    }
    row["protocols"] = {"leave_one_out": "leave one out: so & so"}
    (folder / "final.json").write_text(json.dumps([row]))
    _write_lines(folder / "test_reads.jsonl", [read("finalize", f"refit-00{seed}") for seed in REFITS])
    return folder


def add_prefixes(folder: Path) -> Path:
    """Scores of the first 2, 8 and 32 dimensions of the tested embeddings of MIC, and of the first 32 of the other."""
    path = folder / "final.json"
    rows = json.loads(path.read_text())
    for row, dims in zip(rows, ({2: 0.2, 8: 0.52, 32: 0.6}, {32: 0.63}), strict=True):
        for dim, value in dims.items():
            row["metrics"][f"dim_{dim}_recall_at_1"] = score(value, 0.03)
            row["metrics"][f"dim_{dim}_map_at_r"] = score(value / 2, 0.02)
    path.write_text(json.dumps(rows))
    return folder


def _write_refits(folder: Path, trial: str, classes: str, best_epochs: list[int]) -> None:
    """Write the events and the result file of the refits."""
    events: list[dict[str, object]] = [
        {"event": "stage_started", "stage": "refit", "resources": {"cpu": 4.0, "gpu": 0.5}}
    ]
    for seed in REFITS:
        key = f"refit-00{seed}"
        events.append(_started("refit", key, _refit_config(trial, seed, classes)))
        for number in (1, 2, 3):
            metrics = {"train_loss": 1 / number, "epoch_s": 40.0}
            events.append(_event("epoch", "refit", key, epoch=number, metrics=metrics))
        events.append(_event("trial_ended", "refit", key, reason="finished", error=None))
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    runs = [{"trial": f"refit-00{seed}", "seed": seed, "ended": "finished"} for seed in REFITS]
    row = {"configuration": f"print-{trial}", "from_trial": trial, "epochs": 3, "best_epochs": best_epochs}
    row |= {"classes": classes, "runs": runs}
    (folder / "refit.json").write_text(json.dumps([row]))


def _refit_config(trial: str, seed: int, classes: str) -> dict[str, object]:
    split = {"fold": None, "val_fraction": 0.0} | ({"test_fraction": 0.0} if classes == "all" else {})
    return config_of(trial, seed=seed) | {"epochs": 3, "data": {"name": "cub200", "split": split}}


def _tested_refits(classes: str) -> dict[str, object]:
    if classes == "all":
        return {"runs": {}, "epochs": 3, "classes": "all", "num_runs": 3, "metrics": {}, "untrained": {}}
    return {
        "runs": {f"refit-00{seed}": {"test": {"map_at_r": value}} for seed, value in REFITS.items()},
        "epochs": 3,
        "classes": "development",
        "num_runs": 3,
        "metrics": {"map_at_r": score(0.34, 0.0248), "recall_at_1": score(0.672, 0.011)},
        "untrained": {"map_at_r": score(0.11, 0.01), "recall_at_1": score(0.31, 0.02)},
    }


def read(purpose: str, key: str) -> dict[str, str]:
    return {"time": "2026-01-02T04:00:00", "purpose": purpose, "checkpoint": f"/far/away/{key}/checkpoint_000003"} | {
        "commit": "abc",
        "host": "node-7",
    }


def confirmed_runs() -> dict[str, tuple[str, int, int, float]]:
    """Key -> searched trial, fold, seed, value."""
    rows = [("search-000", MARGIN), ("search-002", MIC)]
    runs = [(trial, fold, seed, value) for trial, values in rows for (fold, seed), value in values.items()]
    return {f"confirm-{number:03d}": run for number, run in enumerate(runs)}


def _events(stages: int) -> list[dict[str, object]]:
    held = {"resources": {"cpu": 4.0, "gpu": 0.5}}
    events: list[dict[str, object]] = [
        {"event": "study_started", "study": "birds <1>"},
        {"event": "stage_started", "stage": "search", **held},
    ]
    for trial, values in CURVES.items():
        events.append(_started("search", trial, config_of(trial)))
        events += [_epoch("search", trial, n, value, SECONDS[trial]) for n, value in enumerate(values, start=1)]
        if stages or trial != "search-002":
            error = ERROR if ENDED[trial] == "crashed" else None
            events.append(_event("trial_ended", "search", trial, reason=ENDED[trial], error=error))
    if stages >= 2:
        events.append({"event": "stage_started", "stage": "confirm", **held})
        for key, (trial, fold, seed, value) in confirmed_runs().items():
            events.append(_started("confirm", key, config_of(trial, fold=fold, seed=seed)))
            events += [_epoch("confirm", key, n, value - 0.01 * (4 - n), 36.0) for n in (1, 2, 3, 4)]
            events.append(_event("trial_ended", "confirm", key, reason="finished", error=None))
    return events


def _event(kind: str, stage: str, trial: str, **fields: object) -> dict[str, object]:
    return {"event": kind, "stage": stage, "trial": trial, **fields}


def _started(stage: str, key: str, config: dict[str, object]) -> dict[str, object]:
    return _event("trial_started", stage, key, fingerprint=f"print-{key}", config=config)


def _epoch(stage: str, key: str, number: int, value: float, seconds: float) -> dict[str, object]:
    metrics = {METRIC: value, "val_recall_at_1": value + 0.2, "train_loss": 1.0 / number, "epoch_s": seconds}
    if key == "search-002" and number in (1, 3):
        metrics |= {"clustering_s": 6.0, "cluster_nmi": 0.25}
    return _event("epoch", stage, key, epoch=number, metrics=metrics)


def _ranking() -> list[dict[str, object]]:
    best = {trial: max(values) for trial, values in CURVES.items()}
    return [
        {"trial": trial, "fingerprint": f"print-{trial}", "value": best[trial], "ended": ENDED[trial]}
        | {"epoch_of_best": CURVES[trial].index(best[trial]) + 1, "epochs": len(CURVES[trial])}
        for trial in sorted(best, key=lambda key: -best[key])
    ]


def _confirmed() -> list[dict[str, object]]:
    runs = confirmed_runs()
    means = {"search-002": (0.61, 0.0411), "search-000": (0.52, 0.0504)}
    return [
        {"configuration": f"print-{trial}", "from_trial": trial, "mean": mean, "half_width": half_width, "num_runs": 4}
        | {
            "runs": [
                {"trial": key, "fold": fold, "seed": seed, "value": value, "ended": "finished"}
                for key, (source, fold, seed, value) in runs.items()
                if source == trial
            ]
        }
        for trial, (mean, half_width) in means.items()
    ]


def _final() -> list[dict[str, object]]:
    """On the test classes MIC has 0.3 less than on validation, the margin loss 0.2 less."""
    rows = []
    for trial, mean, lost in (("search-002", 0.31, 0.3), ("search-000", 0.32, 0.2)):
        tested = {key: value - lost for key, (source, _, _, value) in confirmed_runs().items() if source == trial}
        rows.append(
            {
                "configuration": f"print-{trial}",
                "from_trial": trial,
                "metrics": {"map_at_r": score(mean, 0.04), "recall_at_1": score(0.65, 0.03)},
                "untrained": {"map_at_r": score(0.1, 0.01), "recall_at_1": score(0.3, 0.02)},
                "validation": {"map_at_r": score(0.6, 0.04), "recall_at_1": score(0.8, 0.03)},
                "untrained_validation": {"map_at_r": score(0.2, 0.01)},
                "ensemble": {"map_at_r": score(0.36, None)} if trial == "search-002" else {},
                "protocols": {"leave_one_out": "leave one out: so & so"},
                "runs": {
                    key: {"val": {}, "test": {"map_at_r": value}, "footprint": footprint(trial, place)}
                    for place, (key, value) in enumerate(tested.items())
                },
            }
        )
    return rows


def footprint(trial: str, place: int) -> dict[str, object]:
    """What the networks of a configuration take: MIC is slower; its four runs took 6, 7, 8 and 9 ms in batches of 1."""
    times = {"search-002": (6.0 + place, 0.5), "search-000": (3.0, 0.25)}[trial]
    return {
        "parameters": 25_600_000 if trial == "search-002" else 23_600_000,
        "macs": 4_090_000_000,
        "embedding_bytes": 512,
        "ms_batch_1": times[0],
        "ms_batch_64": times[1],
        "device": "NVIDIA H200",
        "threads": 0,
        "precision": "fp32",
        "crop_px": 224,
    }


def score(mean: float, half_width: float | None) -> dict[str, float | None]:
    return {"mean": mean, "half_width": half_width}


def write_illustrations(folder: Path) -> None:
    (folder / "illustrations").mkdir(exist_ok=True)
    entries = []
    for section, width_px in (("retrievals", 1200), ("classes", 700), ("map", 700)):
        (folder / "illustrations" / f"{section}.png").write_bytes(png(width_px, 40))
        entries.append(
            {"file": f"{section}.png", "section": section, "title": f"Of {section}", "trial": "confirm-004"}
            | {"caption": 'The class "<i>Black & White</i>" fails.'}
        )
    (folder / "illustrations" / "illustrations.json").write_text(json.dumps(entries))


def png(width_px: int, height_px: int) -> bytes:
    """A black picture, by the book (W3C PNG, sections 5 and 11)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    rows = (b"\x00" + bytes(width_px)) * height_px
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _write_lines(path: Path, rows: list[dict[str, object]] | list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
