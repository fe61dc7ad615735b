"""The summary of a study as one dictionary: its plan, its results and its cost. Every output is made from it.

{
    "study": name, "created": ISO time, "metric": what trials are ranked by, "question": text | None,
    "smoke": whether it ran on generated images, so that its numbers mean nothing,
    "unlike_published": [how its images differ from those of the published benchmark, in words]; empty where they do
                        not, and of older studies, which did not record it,
    "plan": {"dataset", "num_trials", "num_grid_points" (trials that each of --num-trials stands for), "scheduler",
             "search_folds" (of the search), "searcher" (its name), "num_from_results" (searched trials that were drawn
             from results), "ended_by" (the limit that ended the search: time, budget, settled) | None, "eliminated":
             [options of a balanced choice that got no further trials], "epochs" (the longest trial's), "rungs":
             [epoch], "folds" (of the confirmation) | None, "seeds" | None,
             "refit": its settings {"top", "seeds", "epochs", "classes"} | None,
             "stages": [those planned], "finished": [those with a result]},
    "search":  [{"trial", "recipe" (method, loss, miner, regularisers in words), "best" | None,
                 "epoch_of_best" | None (on the first fold), "ended", "num_folds" (over so many "best" is the mean),
                 "pruned" (whether it was significantly worse than the best on the first fold)}], best first,
    "best_so_far": {"trial", "recipe", "best", "epoch_of_best", "num_folds"} of all searched trials | None, also while
                   they run,
    "confirm": [{"configuration" (fingerprint), "letter" (A was the best of the search), "label" (its recipe, and its
                 trial where two have the same one), "recipe", "from_trial", "mean" | None, "half_width" | None,
                 "num_runs", "runs": [{"trial", "fold", "seed", "value" | None, "ended"}]}], best first,
    "refit":   [{"configuration", "letter", "label", "recipe", "from_trial", "epochs", "best_epochs" (those whose median
                 "epochs" is), "classes" (development | all), "runs": [{"trial", "seed", "ended"}]}], best first,
    "comparisons": [fields of comparisons.Comparison, by letter, and "p_corrected": Holm's of the test corrected for
                 shared training classes | None with one fold], "ranking_in_words": [sentence],
    "stability": fields of rank_stability.SearchStability | None before the search has ended,
    "final":   [{"configuration", "letter", "label", "recipe", "from_trial", "dataset", "backbone", "embedding_dim",
                 "metrics": {name: {"mean", "half_width" | None}}, "untrained": the same, "validation": the same,
                 "untrained_validation": the same, "ensemble": the same (empty where none was computed),
                 "protocols": {name: who searched whom, in words}, "extra_tests": [name],
                 "runs": [{"trial", "fold", "seed", "test": {name: value}}],
                 "footprint": fields of footprint.Footprint, times are medians over all runs | None in older studies,
                 "refit": {"metrics", "untrained", "epochs", "classes", "num_runs",
                           "runs": [{"trial", "fold": None, "seed", "test": {name: value}}]} | None}]:
                 "metrics" are those of the test classes. Those beside "refit" are of the models that left classes out
                 for validation, and empty in a study without such models; those of a refit on all classes are empty,
    "test_comparisons", "test_ranking_in_words": as above, of the ranking metric on the test classes,
    "published": [{"system", "variant", "dataset", "metrics": {name: {"mean", "deviation" | None}}, "protocol",
                 "backbone" | None, "embedding_dim" | None, "source", "status", "chosen_on_test" | None,
                 "ours": [letters of the configurations that run this system]}]; None is not known,
    "cost": fields of cost.Cost, and "budget": the largest number of device hours that was allowed last | None,
    "importance": fields of importance.Importance,
    "forecast": {"seconds", "took_seconds", "device_hours", "unit"}, of a finished study that made one | None,
    "test_reads": [records of test_reads.jsonl],
    "extensions": [{"num_trials_before", "time" (UTC, ISO)}]: each time when the search was given more trials,
}
A stage that has not ended is an empty list. Intervals are 95 % t intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from raydml.analysis.comparisons import compare_all, ranking_in_words
from raydml.analysis.cost import cost_of
from raydml.analysis.importance import importance_of
from raydml.analysis.published import is_system, published_of
from raydml.analysis.rank_stability import search_stability
from raydml.analysis.trials import LIMITS, TrialState, parameters_of, varying
from raydml.config.recipe import recipe_of
from raydml.config.rules import WITHOUT_RESULTS
from raydml.data.benchmarks import BENCHMARKS, metric_prefix
from raydml.data.seal import TestReads
from raydml.inference.footprint import median_footprint
from raydml.search_space.shipped import heading_of
from raydml.study.events import StudyState, events_path, letter_of, letters_of, read_state
from raydml.study.folder import RESULT_FILES, StudyError, read_json, read_study, search_key, stages_of, without_some
from raydml.study.rungs import milestones
from raydml.study.shares import ELIMINATED

_Runs = dict[str, dict[tuple[Any, Any], float]]


def histories(folder: Path) -> list[TrialState]:
    """Return every trial that has started, in the order of the stages and of the keys."""
    return _started(read_state(folder))


def _started(state: StudyState) -> list[TrialState]:
    return [trial for stage in ("search", "confirm", "refit") for trial in state.of_stage(stage)]


def summarise(folder: Path) -> dict[str, Any]:
    """Return the dictionary that this module describes, from the result files and the events there are."""
    study, state = read_study(folder), read_state(folder)
    searched, trials = state.searched, _started(state)
    found = {stage: _result(folder / name) for stage, name in RESULT_FILES.items()}
    by_key = _ByTrial(folder, {trial.trial: trial for trial in trials})
    rows = [*found["confirm"], *found["refit"], *found["finalize"]]
    configs = _configs(folder, rows, by_key, study["trials"])
    names = _names(list({row["configuration"]: row for row in rows}.values()), configs, letters_of(state))
    ranked = [_ranked(row, configs) for row in found["search"]]
    confirmed = [_confirmed(row, names) for row in found["confirm"]]
    refits = [_refit(row, names) for row in found["refit"]]
    try:
        final = [_final(row, configs, names, by_key) for row in found["finalize"]]
    except KeyError as error:
        raise StudyError(
            f"{events_path(folder)} is damaged: the configuration of a trial has no {error}. Cure: put it back from a "
            "backup"
        ) from error
    published = _published({row["dataset"] for row in final}, final, configs)
    parameters, values = [parameters_of(trial.config) for trial in searched], [trial.best for trial in searched]
    cost = cost_of(trials, cpus=state.cpus, gpus=state.gpus)
    metric = study["select_on"]
    summary: dict[str, Any] = {
        "study": study["name"],
        "created": study["created"],
        "smoke": bool(study.get("smoke")),
        "unlike_published": [
            *study.get("unlike_published", ()),
            *(_left_out_of_test(found["finalize"]) if published else ()),
        ],
        "metric": metric,
        "question": question_of(_text(folder / "space.yaml")),
        "plan": _plan(study, found, state),
        "search": ranked,
        "best_so_far": _best_so_far(ranked, state),
        "confirm": confirmed,
        "refit": refits,
        "final": final,
        "stability": None,
        "published": published,
        "cost": cost._asdict()
        | {"stages": [stage._asdict() for stage in cost.stages], "budget": state.max_device_hours},
        "forecast": _forecast(state, stages_of(study["study"], study["trials"]), found),
        "importance": importance_of(parameters, values, varying(parameters))._asdict(),
        "extensions": [
            {"num_trials_before": one.num_trials_before, "time": _iso(one.time_s)} for one in state.extensions
        ],
        "test_reads": TestReads(folder / "test_reads.jsonl").read(),
    }
    summary |= _compared(_values(confirmed), "") | _compared(_tested(final, metric.removeprefix("val_")), "test_")
    if found["search"]:
        # What a limit ended before its first epoch is not known; other trials without a value found nothing.
        known = [trial for trial in searched if trial.best is not None or trial.ended not in LIMITS]
        stability = search_stability([t.best for t in known], [t.recipe for t in known], noun="recipes")
        summary["stability"] = stability._asdict()
    return summary


def _forecast(state: StudyState, planned: Sequence[str], found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was expected and how long it took, once all stages have a result."""
    took_s = state.active_s - state.forecast_s
    if state.forecast is None or took_s <= 0 or not all(found[stage] for stage in planned):
        return None
    return {
        "seconds": state.forecast.seconds,
        "took_seconds": took_s,
        "device_hours": state.forecast.device_hours,
        "unit": state.forecast.unit,
    }


def _left_out_of_test(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on test images that could not be read; none where every one was. rows: of final.json."""
    runs = [run for row in rows for group in (row, row.get("refit") or {"runs": {}}) for run in group["runs"].values()]
    return without_some("test", max((run.get("num_left_out", 0) for run in runs), default=0))


def question_of(space_text: str) -> str | None:
    """Return the question at the head of a search space."""
    return heading_of(space_text, "Question")


def _iso(time_s: float) -> str:
    """Return a time as test_reads.jsonl has it, so that the two can be compared as texts."""
    return datetime.fromtimestamp(time_s, timezone.utc).isoformat(timespec="milliseconds")


def _result(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(path) if path.exists() else []
    return rows


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _plan(study: Mapping[str, Any], found: Mapping[str, Any], state: StudyState) -> dict[str, Any]:
    settings, trials = study["study"], study["trials"]
    search, confirm = settings["search"], settings["confirm"]
    searcher = search.get("searcher", {"name": "random"})["name"]
    epochs = max((trial["epochs"] for trial in trials if "epochs" in trial), default=0)
    rungs = milestones(
        max_epochs=epochs, grace_epochs=search["grace_epochs"], reduction_factor=search["reduction_factor"]
    )
    planned = stages_of(settings, trials)
    return {
        "dataset": trials[0]["data"]["name"] if trials else None,
        "num_trials": len(trials),
        "num_grid_points": max(len(trials) // search.get("num_trials", 1), 1),
        "scheduler": search["scheduler"],
        "search_folds": search.get("folds", 1),
        "searcher": searcher,
        "num_from_results": len(state.drawn) if searcher not in WITHOUT_RESULTS else 0,
        "ended_by": next((trial.ended for trial in state.of_stage("search") if trial.ended in LIMITS), None),
        "eliminated": list(dict.fromkeys(name for note in state.notes for name in ELIMINATED.findall(note))),
        "epochs": epochs,
        "rungs": rungs if search["scheduler"] != "none" else [],
        "folds": confirm["folds"] if confirm else None,
        "seeds": confirm["seeds"] if confirm else None,
        "refit": settings.get("refit"),
        "stages": planned,
        "finished": [stage for stage in planned if found[stage]],
    }


def _ranked(row: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "trial": row["trial"],
        "recipe": recipe_of(configs[row["trial"]]),
        "best": row["value"],
        "epoch_of_best": row["epoch_of_best"],
        "ended": row["ended"],
        "num_folds": row.get("num_folds", 1),
        "pruned": row.get("pruned", False),
    }


def _best_so_far(ranked: Sequence[Mapping[str, Any]], state: StudyState) -> dict[str, Any] | None:
    """Return the best of the search by its result or, while it has none, on the first fold."""
    names = ("trial", "recipe", "best", "epoch_of_best")
    if ranked and ranked[0]["best"] is not None:
        return {name: ranked[0][name] for name in (*names, "num_folds")}
    best = state.best_of_stage("search")
    return None if best is None else {**{name: getattr(best, name) for name in names}, "num_folds": 1}


class _ByTrial(dict[str, Any]):
    """What is stated of each trial; a trial of a result that the events do not have is an error with its cure."""

    def __init__(self, folder: Path, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self._folder = folder

    def __missing__(self, key: str) -> Any:
        raise StudyError(
            f"{events_path(self._folder)} is damaged: it has no trial {key}, which a result of the study names. Cure: "
            f"put it back from a backup, or delete {', '.join(RESULT_FILES.values())} there and resume: what is "
            "missing is run again"
        )


def _configs(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    trials: Mapping[str, TrialState],
    searched: Sequence[Mapping[str, Any]],
) -> Mapping[str, Mapping[str, Any]]:
    """Return the configuration of each trial; a row whose trial did not run itself has that of its first run.

    searched: the trials of the search, of study.json, for those whose events have none.
    """
    configs = _ByTrial(folder, {search_key(number): config for number, config in enumerate(searched)})
    configs.update({key: trial.config for key, trial in trials.items() if trial.config})
    for row in rows:
        runs = row["runs"] or (row.get("refit") or {}).get("runs", {})
        keys = list(runs) if isinstance(runs, dict) else [run["trial"] for run in runs]
        if row["from_trial"] not in configs:
            configs[row["from_trial"]] = configs[next((key for key in keys if key in configs), row["from_trial"])]
    return configs


def _names(
    rows: Sequence[Mapping[str, Any]], configs: Mapping[str, Any], letters: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Return for each configuration its letter (see `letters_of`), its recipe, and a label: the recipe, with the trial
    that it comes from where several configurations have the same one. Without a confirmation A is the first row."""
    recipes = [recipe_of(configs[row["from_trial"]]) for row in rows]
    counts = Counter(recipes)
    return {
        row["configuration"]: {
            "letter": letters.get(row["configuration"], letter_of(number)),
            "label": recipe + (f", {row['from_trial']}" if counts[recipe] > 1 else ""),
            "recipe": recipe,
        }
        for number, (row, recipe) in enumerate(zip(rows, recipes, strict=True))
    }


def _confirmed(row: Mapping[str, Any], names: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    kept = ("configuration", "from_trial", "mean", "half_width", "num_runs", "runs")
    return {**names[row["configuration"]], **{name: row[name] for name in kept}}


def _refit(row: Mapping[str, Any], names: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    kept = ("configuration", "from_trial", "epochs", "best_epochs", "classes", "runs")
    return {**names[row["configuration"]], **{name: row[name] for name in kept}}


def _final(
    row: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, Mapping[str, str]],
    trials: Mapping[str, TrialState],
) -> dict[str, Any]:
    def tested(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"trial": key, "fold": trials[key].fold, "seed": trials[key].seed, "test": scores["test"]}
            for key, scores in runs.items()
        ]

    parts = ("configuration", "from_trial", "metrics", "untrained", "validation", "untrained_validation")
    config, refit = configs[row["from_trial"]], row.get("refit")
    kept = ("metrics", "untrained", "epochs", "classes", "num_runs")
    measured = [run for group in (row, refit) if group for run in group["runs"].values()]
    return {
        **names[row["configuration"]],
        **{name: row[name] for name in parts},
        "dataset": config["data"]["name"],
        "backbone": config["model"]["backbone"],
        "embedding_dim": config["model"]["embedding_dim"],
        "ensemble": row["ensemble"],
        "protocols": row["protocols"],
        "extra_tests": [one["name"] for one in config["data"].get("extra_tests", ())],
        "runs": tested(row["runs"]),
        "footprint": median_footprint([run["footprint"] for run in measured if run.get("footprint")]),
        "refit": refit and {**{name: refit[name] for name in kept}, "runs": tested(refit["runs"])},
    }


def _values(confirmed: Sequence[Mapping[str, Any]]) -> _Runs:
    return {row["letter"]: {(run["fold"], run["seed"]): run["value"] for run in row["runs"]} for row in confirmed}


def _tested(final: Sequence[Mapping[str, Any]], name: str) -> _Runs:
    return {
        row["letter"]: {(run["fold"], run["seed"]): run["test"][name] for run in row["runs"] if name in run["test"]}
        for row in final
    }


def _compared(values: _Runs, prefix: str) -> dict[str, Any]:
    """Return comparisons and their sentences; empty where there are no two configurations to compare."""
    if len(values) < 2 or not all(values.values()):
        return {f"{prefix}comparisons": [], f"{prefix}ranking_in_words": []}
    comparisons = compare_all(values)
    folds = {fold for runs in values.values() for fold, _seed in runs}
    corrected = {}
    if len(folds) > 1:  # each of k folds tests on 1 part and trains on k - 1
        again = compare_all(values, test_train_ratio=1 / (len(folds) - 1))
        corrected = {frozenset((row.better, row.worse)): row.p_holm for row in again}
    return {
        f"{prefix}comparisons": [
            {**row._asdict(), "p_corrected": corrected.get(frozenset((row.better, row.worse)))} for row in comparisons
        ],
        f"{prefix}ranking_in_words": ranking_in_words(values, comparisons),
    }


def _published(
    datasets: Collection[str], final: Sequence[Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the published numbers of these data sets and of their test lists, one entry for each protocol, source and
    network."""
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for benchmark in BENCHMARKS.values():
        for dataset in benchmark.data_names:
            if all(metric_prefix(one, dataset) is None for one in datasets):
                continue
            for number in (one for protocol in benchmark.protocols for one in published_of(dataset, protocol)):
                facts = number._asdict()
                metric, value, deviation = (facts.pop(name) for name in ("metric", "value", "deviation"))
                entry = entries.setdefault(tuple(facts.values()), {**facts, "metrics": {}})
                entry["metrics"][metric] = {"mean": value, "deviation": deviation}
    for entry in entries.values():
        entry["ours"] = [
            row["letter"]
            for row in final
            if metric_prefix(row["dataset"], entry["dataset"]) is not None
            and is_system(configs[row["from_trial"]], entry["system"], entry["variant"])
        ]
    return list(entries.values())
