"""What a study ended with: the winner, the summary, the pictures and the model to take away."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from raydml.config import Machine, parse_trial
from raydml.data.benchmarks import BENCHMARKS
from raydml.evaluate import embed, load_network
from raydml.export import export_model
from raydml.published import comparable
from raydml.recipe import recipe_of
from raydml.report import learning_curves, read_curves, sample_retrievals, summary_markdown
from raydml.study import (
    StudyError,
    events_path,
    newest_checkpoint,
    read_json,
    read_records,
    read_study,
    write_json,
)
from raydml.trial_images import open_development

NUM_TOP_TRIALS = 3  # trials whose checkpoint, configuration and retrievals go to MLflow


class Winner(NamedTuple):
    """The checkpoint a study stands for: chosen on validation classes, never on the sealed ones."""

    trial: str  # key, confirm-001 or search-003
    configuration: str  # fingerprint of the searched configuration
    checkpoint: Path


def find_winner(folder: Path) -> Winner:
    """The best run of the best confirmed configuration, or the best searched trial of a study without a confirm
    stage. Raises StudyError while there is none."""
    metric = read_study(folder)["select_on"]
    if (folder / "confirmed.json").exists():
        best = read_json(folder / "confirmed.json")[0]
        run = max(best["runs"], key=lambda run: run["value"])
        key, stage, configuration = run["trial"], "confirm", best["configuration"]
    elif (folder / "ranking.json").exists():
        row = read_json(folder / "ranking.json")[0]
        key, stage, configuration = row["trial"], "search", row["fingerprint"]
    else:
        raise StudyError(
            f"study {folder.name!r} has not ended its search. Cure: launch.py resume {folder.name}, or name a "
            f"checkpoint below {folder / 'search'}"
        )
    found = newest_checkpoint(folder, stage, key)
    if found is None:
        raise StudyError(f"study {folder.name!r}: {key} is the best by {metric}, but it has no intact checkpoint left")
    return Winner(key, configuration, found)


def summarise(folder: Path) -> dict[str, Any]:
    """The study in one dictionary (described in raydml/report.py), from the result files there are."""
    study = read_study(folder)
    metric = study["select_on"]
    summary: dict[str, Any] = {
        "study": study["name"],
        "metric": metric,
        "search": [],
        "confirm": [],
        "final": [],
        "published": [],
    }
    records = read_records(folder, "search")
    configs = {key: record.config for key, record in records.items() if record.config}
    if (folder / "ranking.json").exists():
        for row in read_json(folder / "ranking.json"):
            config = configs[row["trial"]]
            summary["search"].append(
                {
                    "trial": row["trial"],
                    "recipe": recipe_of(config),
                    "loss": config["loss"]["name"],
                    "miner": config["miner"]["name"] if config["miner"] else None,
                    "best": row["value"],
                    "epoch_of_best": row["epoch_of_best"],
                    "ended": row["ended"],
                }
            )
    if (folder / "confirmed.json").exists():
        names = ("configuration", "from_trial", "mean", "half_width", "num_runs")
        summary["confirm"] = [
            {name: row[name] for name in names} | {"recipe": recipe_of(configs[row["from_trial"]])}
            for row in read_json(folder / "confirmed.json")
        ]
    if (folder / "final.json").exists():
        parts = ("configuration", "from_trial", "metrics", "untrained", "validation", "untrained_validation")
        for row in read_json(folder / "final.json"):
            config = configs[row["from_trial"]]
            network = {"backbone": config["model"]["backbone"], "embedding_dim": config["model"]["embedding_dim"]}
            known = {"recipe": recipe_of(config), "dataset": config["data"]["name"], **network}
            summary["final"].append({name: row[name] for name in parts} | known)
        summary["published"] = _published({row["dataset"] for row in summary["final"]})
    return summary


def _published(datasets: Collection[str]) -> list[dict[str, Any]]:
    """The published numbers of benchmarks, scored as `evaluate` scores first, one entry for each system and variant."""
    entries: dict[tuple[str, ...], dict[str, Any]] = {}
    for benchmark in BENCHMARKS.values():
        for dataset in sorted(set(benchmark.data_names) & set(datasets)):
            for number in comparable(dataset, benchmark.protocols[0]):
                facts = number._asdict()
                metric, value, deviation = (facts.pop(name) for name in ("metric", "value", "deviation"))
                entry = entries.setdefault((dataset, number.source, number.variant), {**facts, "metrics": {}})
                entry["metrics"][metric] = {"mean": value, "deviation": deviation}
    return list(entries.values())


def top_trials(folder: Path) -> dict[str, Path]:
    """Key -> checkpoint of the best searched trials and of the winner."""
    keys = [row["trial"] for row in read_json(folder / "ranking.json")[:NUM_TOP_TRIALS]]
    found = {key: newest_checkpoint(folder, "search", key) for key in keys}
    winner = find_winner(folder)
    return {key: path for key, path in found.items() if path is not None} | {winner.trial: winner.checkpoint}


def draw_retrievals(checkpoint_folder: Path, machine: Machine, device: str, path: Path) -> None:
    """A picture of queries and their nearest neighbours on the validation classes of a checkpoint."""
    network, preprocessing, card = load_network(checkpoint_folder)
    trial = parse_trial(card["trial"])
    opened = open_development(trial, machine, augmented=False)
    images = opened.val
    embeddings = embed(
        network.to(device),
        images.pixels,
        preprocessing,
        device=device,
        batch_size=machine.evaluation_batch,
        precision=trial.precision,
    )
    names = [opened.catalog.class_names[class_id] for class_id in opened.split.val]
    sample_retrievals(images.pixels, images.labels, names, embeddings, path, seed=trial.seed)


def write_results(folder: Path, announce: Callable[..., None]) -> None:
    """Summary, curves and the exported model; and the events that carry them, and the top trials, to MLflow."""
    summary = summarise(folder)
    write_json(folder / "summary.json", summary)
    (folder / "summary.md").write_text(summary_markdown(summary), encoding="utf-8")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    winner = find_winner(folder)
    curves, ended = read_curves(events_path(folder), metric=summary["metric"])
    searched = {key: rows for key, rows in curves.items() if key.startswith("search-")}
    best = summary["search"][0]["trial"] if summary["search"] else None
    learning_curves(searched, ended, best, summary["metric"], pictures / "learning_curves.png")
    for name in ("space.yaml", "summary.json", "summary.md", "split.json"):
        announce("artifact", trial=None, path=str(folder / name), artifact_path="study")
    if (folder / "test_reads.jsonl").exists():
        announce("artifact", trial=None, path=str(folder / "test_reads.jsonl"), artifact_path="study")
    announce("artifact", trial=None, path=str(pictures), artifact_path="pictures")
    for key, path in top_trials(folder).items():
        announce("artifact", trial=key, path=str(path), artifact_path="checkpoint")
        announce("artifact", trial=key, path=str(pictures / f"retrievals-{key}.png"), artifact_path="pictures")
    export_model(winner.checkpoint, folder / "model")
    announce(
        "model",
        trial=None,
        checkpoint=str(winner.checkpoint),
        folder=str(folder / "model"),
        name=f"raydml-{summary['study']}",
    )
    announce("summary", metrics=_summary_metrics(summary), tags={"winner": winner.trial})


def _summary_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The few numbers of a study for the parent run: flat and legal as MLflow metric names."""
    metrics: dict[str, float] = {}
    if summary["search"] and summary["search"][0]["best"] is not None:
        metrics[f"search_best_{summary['metric']}"] = summary["search"][0]["best"]
    if summary["confirm"] and summary["confirm"][0]["mean"] is not None:
        metrics[f"confirmed_{summary['metric']}"] = summary["confirm"][0]["mean"]
    for row in summary["final"][:1]:
        parts = {"test_": "metrics", "test_untrained_": "untrained"}
        parts |= {"val_": "validation", "val_untrained_": "untrained_validation"}
        for prefix, part in parts.items():
            metrics |= {f"{prefix}{name}": score["mean"] for name, score in row[part].items()}
    return metrics
