"""What a registered model says about itself: a model card, its metrics, and whether it may be compared with another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raydml.config.recipe import recipe_of
from raydml.config.refit import trained_on, trains_on_test_classes, validates
from raydml.metrics.names import interval_text, metric_name
from raydml.ops.wording import counted
from raydml.report.comparability import epochs_rule
from raydml.report.text import markdown_text
from raydml.study.folder import read_json
from raydml.tracking.updates import MAX_DIGEST_CHARACTERS, grouped

_CARD = """\
# {name}: image embeddings of {embedding_dim} dimensions

{backbone} trained on {dataset} with {recipe}, {epochs}.{refit}{question}

## Scores

{scores}

## Limits

{limits}\
- Distances are Euclidean and mean "more or less alike"; a threshold for "the same" has to be chosen on your own images.

## How to call it

    import mlflow, pathlib
    model = mlflow.pyfunc.load_model("models:/{name}@challenger")
    embeddings = model.predict([pathlib.Path("one.jpg"), pathlib.Path("two.png")])  # (2, {embedding_dim}) float32

Images are `pathlib.Path`, encoded bytes, base64 texts, PIL images or uint8 arrays (height, width, 3), in a list or \
in a table with a column `image`; their preparation is inside the model. Over HTTP:

    mlflow models serve -m models:/{name}@challenger --env-manager local -p 5001
    curl localhost:5001/invocations -H 'Content-Type: application/json' \\
      -d "{{\\"inputs\\": [\\"$(base64 -w0 one.jpg)\\"]}}"
"""
_MAIN = ("map_at_r", "r_precision", "recall_at_1", "recall_at_10")


class ModelFacts(NamedTuple):
    """What MLflow stores with a model.

    metrics: by MLflow's name, of the winning configuration; test_data: name and digest of the test images, or None.
    score: the value by which the study chose it, on validation classes. protocol: what must be equal for two scores to
    be comparable. label: the score in words.
    """

    card: str
    params: dict[str, str]
    metrics: dict[str, float]
    test_data: tuple[str, str] | None
    score: float | None
    protocol: str
    label: str


def facts_of(name: str, model: Path, study: Path | None) -> ModelFacts:
    """Return the facts of an exported folder, with the scores of its study's summary if there is one."""
    card = json.loads((model / "config.json").read_text(encoding="utf-8"))
    file = None if study is None else study / "summary.json"
    summary: Mapping[str, Any] = read_json(file) if file and file.exists() else {}
    trial: Mapping[str, Any] = card.get("trial") or {}
    data: Mapping[str, Any] = trial.get("data") or {}
    final = (summary.get("final") or [{}])[0]
    confirmed = (summary.get("confirm") or [{}])[0]
    metric = str(summary.get("metric") or "val_map_at_r")
    searched = (summary.get("search") or [{}])[0]
    score = confirmed.get("mean", searched.get("best"))
    plan = summary.get("plan") or {}
    refit = final.get("refit") or {}
    chosen_by = data if validates(trial) else _searched_data(study)
    split = {key: value for key, value in (chosen_by.get("split") or {}).items() if key != "fold"}
    protocol = {"data": data.get("content"), "split": split, "metric": metric}
    over = searched.get("num_folds", 1)  # the score of a search on several folds is a mean
    of_search = {"search_folds": over} if over > 1 else {"fold": None}
    protocol |= {"folds": plan.get("folds"), "seeds": plan.get("seeds")} if confirmed else of_search
    # The score of a refit is that of its configuration; the refit itself has seen more classes than a fold model.
    protocol |= {} if validates(trial) else {"refit": "all" if trains_on_test_classes(trial) else "development"}
    content = str(data.get("content") or "")[:MAX_DIGEST_CHARACTERS]
    tested = bool(final.get("metrics") or refit.get("metrics")) and bool(content)
    network: Mapping[str, Any] = card["network"]
    return ModelFacts(
        card=_card(name, card, summary, final, confirmed),
        params={
            "backbone": str(network["backbone"]),
            "embedding_dim": str(network["embedding_dim"]),
            **({"recipe": recipe_of(trial), "dataset": str(data.get("name"))} if trial else {}),
            **({} if validates(trial) else {"trained_on": trained_on(trial)}),
        },
        metrics=_metrics(trial, final, confirmed, metric),
        test_data=(f"{data.get('name')} test", content) if tested else None,
        score=score,
        protocol=json.dumps(protocol, sort_keys=True),
        label=f"{metric_name(metric)} {score:.4f}" if score is not None else "no score",
    )


def _searched_data(study: Path | None) -> Mapping[str, Any]:
    """Return the data settings of a study's search, whose split a refit does not have; empty without the study."""
    file = None if study is None else study / "study.json"
    trials = read_json(file)["trials"] if file and file.exists() else []
    data: Mapping[str, Any] = trials[0]["data"] if trials else {}
    return data


def _metrics(
    trial: Mapping[str, Any], final: Mapping[str, Any], confirmed: Mapping[str, Any], metric: str
) -> dict[str, float]:
    """Return the scores that belong to a model: of a refit, none of the models that left classes out."""
    parts = {"test_": "metrics", "test_untrained_": "untrained", "test_ensemble_": "ensemble", "val_": "validation"}
    if not validates(trial):
        parts, final = {"test_refit_": "metrics", "test_refit_untrained_": "untrained"}, final.get("refit") or {}
    found = {
        f"{prefix}{name}": score["mean"]
        for prefix, part in parts.items()
        for name, score in (final.get(part) or {}).items()
    }
    if confirmed.get("mean") is not None:
        found[f"confirmed_{metric}"] = confirmed["mean"]
    return grouped(found)


def _card(
    name: str,
    card: Mapping[str, Any],
    summary: Mapping[str, Any],
    final: Mapping[str, Any],
    confirmed: Mapping[str, Any],
) -> str:
    trial: Mapping[str, Any] = card.get("trial") or {}
    dataset = markdown_text((trial.get("data") or {}).get("name") or "unknown images")
    return _CARD.format(
        name=name,
        embedding_dim=card["network"]["embedding_dim"],
        backbone=markdown_text(card["network"]["backbone"]),
        dataset=dataset,
        recipe=markdown_text(recipe_of(trial) or "an unknown loss"),
        epochs=f"weights of epoch {card['best_epoch']}" if card.get("best_epoch") else "at an unknown epoch",
        refit=_origin_of_refit(card, summary),
        question=f"\n\nThe study's question: {markdown_text(summary['question'])}" if summary.get("question") else "",
        scores=_scores(summary, final, confirmed),
        limits="".join(f"- {limit}\n" for limit in _limits(trial, dataset, final, confirmed)),
    )


def _origin_of_refit(card: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return a paragraph that says how a refit was trained; empty for another model."""
    trial: Mapping[str, Any] = card.get("trial") or {}
    if validates(trial):
        return ""
    num_classes = len((card.get("split") or {}).get("train") or ())
    classes = f"all {num_classes} development classes"
    if trains_on_test_classes(trial):
        classes = f"all {num_classes} classes, the test classes included"
    plan: Mapping[str, Any] = summary.get("plan") or {}
    rule = f" {epochs_rule(summary)}" if plan else ""
    if (plan.get("refit") or {}).get("seeds", 1) > 1:
        rule += " Of several seeds it is the first, because there is nothing to choose by."
    return (
        f"\n\nIt is a refit: trained on {classes} for {counted(int(trial['epochs']), 'epoch')}. No class validated it, "
        f"and its last weights count.{rule}"
    )


def _limits(
    trial: Mapping[str, Any], dataset: str, final: Mapping[str, Any], confirmed: Mapping[str, Any]
) -> list[str]:
    """Return what the scores say of this network, and what they do not."""
    runs, refit = final.get("runs") or confirmed.get("runs") or [], final.get("refit") or {}
    if trains_on_test_classes(trial):
        return [
            "This network was trained on the test classes as well, so nothing can be measured on them and it is never "
            "scored. The scores, if there are any, are those of other networks of its configuration that were trained "
            "without these classes."
        ]
    unseen = f"The scores are of classes of {dataset} that this network was not trained on. On images of another kind "
    limits = [f"{unseen}it has not been tested."]
    if not validates(trial):
        if refit.get("num_runs", 0) > 1:
            limits.append(
                f"The scores of refits are means over {refit['num_runs']} seeds"
                f"{' with 95 % t intervals' if refit['num_runs'] > 2 else ''}; this network is one of them."
            )
        if final.get("metrics"):
            limits.append("The columns test and validation are of networks that left classes out for validation.")
    elif len(runs) > 1:
        limits.append(
            f"The scores are means over {len(runs)} training runs (folds and seeds) of this configuration with 95 % "
            "t intervals; this network is the run that was best on its validation classes."
        )
    return limits


def _scores(summary: Mapping[str, Any], final: Mapping[str, Any], confirmed: Mapping[str, Any]) -> str:
    metric, refit = str(summary.get("metric") or "val_map_at_r"), final.get("refit") or {}
    columns = {
        "refit, test": refit.get("metrics") or {},
        "test": final.get("metrics") or {},
        "untrained": final.get("untrained") or refit.get("untrained") or {},
        "validation": final.get("validation") or {},
    }
    columns = {title: scores for title, scores in columns.items() if scores}
    if not columns:
        if confirmed.get("mean") is None:
            return "This study has neither confirmed nor tested it."
        return f"{metric_name(metric).capitalize()}: {_interval(confirmed)}. The test classes have not been opened."
    # MLflow's page has no space between two columns.
    rows = [f"| metric&emsp; | {'&emsp; | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for one in (name for name in _MAIN if any(name in scores for scores in columns.values())):
        cells = [_interval(scores.get(one)) for scores in columns.values()]
        rows.append(f"| {metric_name(one)}&emsp; | {'&emsp; | '.join(cells)} |")
    sentences = (final.get("protocols") or {}).values()
    protocols = "\n".join(f"Protocol: {markdown_text(sentence)}." for sentence in sentences)
    return "\n".join([*rows, "", protocols])


def _interval(score: Mapping[str, Any] | None) -> str:
    return "" if score is None else interval_text(score["mean"], score.get("half_width"))
