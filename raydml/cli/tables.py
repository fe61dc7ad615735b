"""Tables of trials, and what the commands print about studies, scores and dry runs.

Every function takes plain values (the JSON files of a study) or a `StudyState` and returns something that rich prints.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raydml.analysis.trials import TrialState, folds_text
from raydml.config.recipe import value_text
from raydml.inference.footprint import footprint_text
from raydml.metrics.names import interval_text, metric_label
from raydml.ops.wording import counted
from raydml.study.events import StudyState, letters_of

#: Name of a state on the screen, and its colour.
STATES: dict[str, tuple[str, str]] = {
    "running": ("running", "cyan"),
    "retrying": ("retrying", "magenta"),
    "interrupted": ("paused", "yellow"),
    "finished": ("finished", "green"),
    "stopped_early": ("stopped", "yellow"),
    "time": ("time over", "yellow"),
    "budget": ("budget spent", "yellow"),
    "settled": ("settled", "yellow"),
    "non_finite_loss": ("NaN loss", "red"),
    "collapsed": ("collapsed", "red"),
    "out_of_memory": ("no memory", "red"),
    "stuck": ("stuck", "red"),
    "crashed": ("crashed", "bold red"),
}
WIDE_COLUMNS = 100  # from here on there is room for generous gaps
NARROW_COLUMNS = 72  # below it the confirmed runs have no recipe: their letter identifies it


def embedding_dim(trial: TrialState) -> Any:
    return (trial.config.get("model") or {}).get("embedding_dim")


def learning_rate(trial: TrialState) -> str:
    """Return ``3.1e-4``: two digits and no padded exponent, so that the column stays narrow."""
    value = (trial.config.get("optimizer") or {}).get("learning_rate")
    if value is None:
        return ""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def chosen_rows(trials: list[TrialState], limit: int) -> list[TrialState]:
    """Return the rows to show, in their order: all if they fit, else those that run, then the best that have ended."""
    if len(trials) <= limit:
        return trials
    running = [trial for trial in trials if not trial.ended][:limit]
    ended = sorted(
        (trial for trial in trials if trial.ended and trial.best is not None),
        key=lambda trial: trial.best or 0.0,
        reverse=True,
    )
    keep = {trial.trial for trial in (*running, *ended[: limit - len(running)])}
    return [trial for trial in trials if trial.trial in keep]


def run_name(trial: TrialState, letters: Mapping[str, str]) -> str:
    """Return ``search-003``, ``confirm-003 (A, fold 1, seed 0)`` or ``refit-003 (A, seed 0)``."""
    if trial.stage == "search":  # the key of a run on a further fold names that
        return trial.trial
    fold = [f"fold {trial.fold}"] if trial.stage == "confirm" else []
    letter = letters.get(trial.configuration)
    return f"{trial.trial} ({', '.join([*([letter] if letter else []), *fold, f'seed {trial.seed}'])})"


def confirmed_means(study: StudyState) -> str:
    """Return ``B MAP@R 0.7202, A 0.7146 (2 runs each, same folds and seeds)``, best first; empty before the first run.

    Means over the folds and seeds that all of them have: other folds may be easier. Where there are none, or only one
    configuration has a run, each has the number of its runs.
    """
    letters, values = letters_of(study), dict[str, dict[tuple[int | None, int | None], float]]()
    for trial in study.of_stage("confirm"):
        if trial.ended and trial.best is not None:
            values.setdefault(letters.get(trial.configuration, "?"), {})[trial.fold, trial.seed] = trial.best
    if not values:
        return ""
    common = set.intersection(*map(set, values.values())) if len(values) > 1 else set()
    means = {letter: fmean(found[run] for run in common or found) for letter, found in values.items()}
    label, parts = f" {metric_label(study.metric)}", list[str]()
    for letter, mean in sorted(means.items(), key=lambda item: -item[1]):
        own = "" if common else f" (mean of {counted(len(values[letter]), 'run')})"
        parts.append(f"{letter}{label if not parts else ''} {mean:.4f}{own}")
    return ", ".join(parts) + (f" ({counted(len(common), 'run')} each, same folds and seeds)" if common else "")


def trial_table(study: StudyState, stage: str, *, width: int, limit: int) -> Table:
    """Return one row for each trial of a stage; after the search with configuration, fold and seed instead of what the
    search varies. The best row is bold and has a ``*``. A refit has no validation: its training loss is shown."""
    confirming, refitting, letters = stage != "search", stage == "refit", letters_of(study)
    gap = 2 if width >= WIDE_COLUMNS else 1
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("trial", no_wrap=True)
    if confirming:
        table.add_column("config", no_wrap=True)
    if width >= NARROW_COLUMNS or not confirming:
        # Only this column is cut on a narrow terminal: the beginning of a recipe still identifies it.
        table.add_column("recipe", overflow="ellipsis", min_width=9)
    for title in ("seed",) if refitting else ("fold", "seed") if confirming else ("dim", "lr"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column("loss" if refitting else metric_label(study.metric), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("state", no_wrap=True)
    best = study.best_of_stage(stage)
    for trial in chosen_rows(study.of_stage(stage), limit):
        label, colour = STATES.get(trial.state, (trial.state, ""))
        varying = (trial.fold, trial.seed) if confirming else (embedding_dim(trial), learning_rate(trial))
        value = _last_loss(trial) if refitting else trial.best
        is_best = best is not None and trial.trial == best.trial
        recipe = Text(trial.recipe, no_wrap=True)  # as Text, or rich would read brackets as markup
        table.add_row(
            trial.trial,
            *([letters.get(trial.configuration, "")] if confirming else []),
            *([recipe] if width >= NARROW_COLUMNS or not confirming else []),
            *("" if one is None else str(one) for one in (varying[1:] if refitting else varying)),
            f"{trial.num_epochs}/{trial.num_planned_epochs}",
            "" if value is None else f"{value:.4f}",
            "*" if is_best else "",
            Text(label, style=colour),
            style="bold" if is_best else "",
        )
    return table


def _last_loss(trial: TrialState) -> float | None:
    """Return the training loss of the newest epoch; None before the first."""
    return next(iter(reversed(trial.curve("train_loss"))), (0, None))[1]


NUM_TOP = 5
FINAL_METRICS = ("recall_at_1", "r_precision", "map_at_r")


def short_path(path: str | Path) -> str:
    """The path relative to the working directory, if it is below that, else the absolute path."""
    full, here = Path(path).resolve(), Path.cwd()
    return os.path.relpath(full, here) if full.is_relative_to(here) else str(full)


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def summary(results: Mapping[str, Any]) -> RenderableType:
    """The outcome of a study: the winner and its refits, then the test numbers, then how the search ranked its trials.

    A study without a search has neither a winner nor a ranking.
    """
    label = metric_label(results["metric"])
    searched, refits = results.get("search") or [], results.get("refit") or []
    parts: list[RenderableType] = [_winner(results, label)] if searched or not refits else []
    parts += map(_refits, refits)
    for row in results.get("final") or []:
        parts += ["", Text(f"{row.get('letter', '')}  {row['recipe']}".strip(), style="bold"), _test_numbers(row)]
        if row.get("footprint"):  # results of older studies have none
            parts.append(Text(f"inference: {footprint_text(row['footprint'])}"))
    confirmed = results.get("confirm") or []
    if confirmed:
        table = _table("", "confirmed", "from", f"validation {label}", "runs", right=("runs",))
        for row in confirmed:
            score = interval_text(row["mean"], row["half_width"])
            table.add_row(row.get("letter", ""), Text(row["recipe"]), row["from_trial"], score, str(row["num_runs"]))
        parts += ["", table]
    if not searched:
        return Group(*parts)
    folds = ["folds"] if any(row.get("num_folds", 1) > 1 for row in searched) else []
    table = _table("search", "recipe", label, "epoch", "ended", *folds, right=(label, "epoch"))
    for row in searched[:NUM_TOP]:
        best = "-" if row["best"] is None else f"{row['best']:.4f}"
        ended, colour = STATES.get(row["ended"], (row["ended"], ""))
        epoch = "" if row["epoch_of_best"] is None else str(row["epoch_of_best"])
        over = [folds_text(row)] if folds else []
        table.add_row(row["trial"], Text(row["recipe"]), best, epoch, Text(ended, style=colour), *over)
    parts += ["", table]
    if len(searched) > NUM_TOP:
        parts.append(Text(f"... and {len(searched) - NUM_TOP} more", style="dim"))
    return Group(*parts)


def _winner(results: Mapping[str, Any], label: str) -> Text:
    searched = {row["trial"]: row for row in results.get("search") or []}
    confirmed = results.get("confirm") or []
    if confirmed:
        key = confirmed[0]["from_trial"]
        score = interval_text(confirmed[0]["mean"], confirmed[0]["half_width"])
        num_runs = confirmed[0]["num_runs"]
        how = f"on validation, mean and 95 % interval of {num_runs} runs" if num_runs > 1 else "on validation, one run"
    else:
        first = next(iter(searched.values()), None)
        if first is None or first["best"] is None:
            return Text("no trial has a value yet", style="yellow")
        num_folds = first.get("num_folds", 1)
        key, score = first["trial"], f"{first['best']:.4f}"
        how = f"on validation, mean over {num_folds} folds" if num_folds > 1 else "on validation, one run"
    what = searched.get(key, {}).get("recipe", "")
    return Text.assemble(
        ("winner  ", "bold green"), (f"{key} ({what})\n", "bold"), " " * 8, (f"{label} {score}", "bold"), f" {how}"
    )


def _refits(row: Mapping[str, Any]) -> Text:
    """The models that were trained on all development classes, or on all classes, from one configuration."""
    keys = ", ".join(run["trial"] for run in row["runs"])
    everything = "all classes, the test classes included: never scored"
    classes = everything if row["classes"] == "all" else "all development classes"
    on = f"trained on {classes}; {counted(row['epochs'], 'epoch')}, last weights"
    return Text.assemble(("refit   ", "bold green"), (f"{keys} ({row['recipe']})\n", "bold"), " " * 8, on)


def _test_numbers(row: Mapping[str, Any]) -> Table:
    """At most four columns, which fit 80 characters: refits and other models, on test and on validation classes."""
    refit = row.get("refit") or {"metrics": {}, "untrained": {}}  # results of older studies have none
    columns = {
        "refit": refit["metrics"],
        "fold models" if refit["metrics"] else "test": row["metrics"],
        "untrained": refit["untrained"] or row["untrained"],
        "validation": row["validation"],
    }
    if not refit["metrics"]:
        columns["untrained "] = row["untrained_validation"]  # the blank makes it a column of its own
    columns = {title: scores for title, scores in columns.items() if scores}
    measured = refit["metrics"] or row["metrics"]
    table = _table("", *columns)
    known = [name for name in FINAL_METRICS if name in measured]
    for name in known or measured:
        cells = [_interval(scores.get(name)) for scores in columns.values()]
        table.add_row(metric_label(name), Text(cells[0], style="bold"), *cells[1:])
    return table


def _interval(score: Mapping[str, Any] | None) -> str:
    return "-" if score is None else interval_text(score["mean"], score["half_width"], 3)


def locations(rows: Sequence[tuple[str, str]]) -> Table:
    """The locations of the results, from pairs (what, where)."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for what, where in rows:
        grid.add_row(Text(what, style="bold"), Text(where))
    return grid


def commands(rows: Sequence[tuple[str, str]]) -> Text:
    """Commands to copy, each on its own line below its purpose: a table would break long commands."""
    text = Text()
    for number, (command, purpose) in enumerate(rows):
        text.append("\n" if number else "").append(f"# {purpose}\n", "dim").append(command, "cyan")
    return text


class StudyRow(NamedTuple):
    """What the list of studies shows of one: its state, whether a process runs it (None: not known), and the seconds
    since its newest event."""

    name: str
    study: StudyState
    is_running: bool | None
    age_s: float


def studies(rows: Sequence[StudyRow], *, width: int) -> Table:
    """Return one row for each study: how far each stage is, its best configuration, and whether it runs."""
    labels = {metric_label(row.study.metric) for row in rows}
    shared = labels.pop() if len(labels) == 1 else ""
    # Few studies have the stage refit, and a narrow terminal has no room to spare.
    has_refit = any("refit" in row.study.planned or "refit" in row.study.stages for row in rows)
    stages = ("search", "confirm", *(["refit"] if has_refit else []), "finalize")
    table = _table("study", *stages, f"best {shared}".strip(), "state")
    table.padding = (0, 2 if width >= WIDE_COLUMNS else 1, 0, 0)
    for row in rows:
        label = "" if shared else f" {metric_label(row.study.metric)}"
        progress = (stage_progress(row.study, stage) for stage in stages)
        table.add_row(row.name, *progress, best_text(row.study, label), state_text(row))
    return table


def best_text(study: StudyState, label: str = "") -> str:
    """Return ``search-010, 0.7202 ± 0.2096`` of a confirmed study, else ``search-010, 0.8262 (1 run)``, or ``(mean of 2
    folds)`` where the search has ended and had several.

    A single run of the confirmation is not shown: the best of them is the luckiest fold and seed.
    """
    plan = study.stages.get("confirm")
    if plan is not None and plan.ranking:
        first = plan.ranking[0]
        return f"{first['from_trial']},{label} {interval_text(first['mean'], first['half_width'])}"
    best = best_searched(study)
    return "" if best is None else f"{best.trial},{label} {best.value:.4f} ({best.runs})"


class BestSearched(NamedTuple):
    """The best configuration of a search: its trial, its value, and what that is of: ``1 run``, ``mean of 2 folds``."""

    trial: str
    value: float
    runs: str


def best_searched(study: StudyState) -> BestSearched | None:
    """Return the best of a search by its result or, while it has none, on the first fold; None without a value."""
    ranking = study.stages["search"].ranking if "search" in study.stages else None
    for row in (ranking or ())[:1]:
        if (num_folds := row.get("num_folds", 1)) > 1:
            return BestSearched(str(row["trial"]), float(row["value"]), f"mean of {num_folds} folds")
    best = study.best_of_stage("search")
    return None if best is None or best.best is None else BestSearched(best.trial, best.best, "1 run")


def state_text(row: StudyRow) -> str:
    """Return ``finished``, ``running``, ``not started`` or ``interrupted 12 min ago``.

    A study that was killed has no event that says so; it is interrupted if no process runs it. Where that cannot be
    found out, as on another machine, an unfinished one has its age.
    """
    if row.study.state == "finished":
        return "finished"
    if row.is_running:
        return "running"
    if row.study.state == "waiting":
        return "not started"
    return f"{'unfinished, last event' if row.is_running is None else 'interrupted'} {age_text(row.age_s)}"


def age_text(seconds: float) -> str:
    """``12 min ago``."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} ago"
    return f"{int(seconds)} s ago"


def stage_progress(study: StudyState, stage: str) -> str:
    """``done``, ``9/16`` or, for a stage that has not begun or is not planned, ``-``."""
    plan = study.stages.get(stage)
    if plan is None:
        return "-"
    if plan.finished:
        return "done"
    ended = study.num_tested if stage == "finalize" else sum(bool(t.ended) for t in study.of_stage(stage))
    return f"{ended}/{plan.num_trials}"


def trials(study: StudyState, *, width: int) -> Group:
    """Every trial of every stage that has any."""
    parts: list[RenderableType] = []
    for stage in study.stages:
        if study.of_stage(stage):
            parts += [trial_table(study, stage, width=width, limit=len(study.trials)), ""]
    return Group(*parts[:-1])


def scores(
    trained: Mapping[str, float],
    untrained: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    *,
    title: str,
) -> Table:
    """Metrics of one evaluation with their intervals, beside those of the network before training if there are any."""
    columns = ["score", "95 % interval", *(["untrained"] if untrained else [])]
    table = _table(title, *columns, right=tuple(columns))
    for name, value in trained.items():
        low, high = intervals.get(name, (None, None))
        between = "" if low is None else f"{low:.4f} to {high:.4f}"
        bare = [f"{untrained[name]:.4f}" if name in untrained else "-"] if untrained else []
        table.add_row(metric_label(name), Text(f"{value:.4f}", style="bold"), between, *bare)
    return table


EPOCH_COLUMNS: dict[str, tuple[str, str]] = {
    "epoch": ("epoch", "d"),
    "train_loss": ("loss", ".4f"),
    "val_recall_at_1": ("val R@1", ".4f"),
    "val_r_precision": ("R-prec", ".4f"),
    "val_map_at_r": ("MAP@R", ".4f"),
    "best": ("best", ".4f"),
    "learning_rate": ("lr", ".1e"),
    "images_per_s": ("images/s", ".0f"),
    "epoch_s": ("s", ".1f"),
}


def epoch_header() -> str:
    return " ".join(f"{title:>8}" for title, _ in EPOCH_COLUMNS.values())


def epoch_line(result: Mapping[str, Any]) -> str:
    """One epoch of a trainer as a line of fixed columns; what was not measured (after a NaN) is ``-``.

    ``best`` is the best value so far of the metric that the trial is selected on.
    """
    result = {"best" if name.startswith("best_val_") else name: value for name, value in result.items()}
    return " ".join(
        f"{format(result[name], style) if name in result else '-':>8}" for name, (_, style) in EPOCH_COLUMNS.items()
    )


def forecast(plan: Mapping[str, Any]) -> Group:
    """What a study would do (see `study/forecast.py`): the images and facts first, then what is sampled."""
    parts: list[RenderableType] = [Text(f"{plan['study']}: a forecast; nothing was started", style="bold")]
    for data in plan["data"]:
        parts += ["", *_split_table(data)]
    facts = Table.grid(padding=(0, 2, 0, 0))
    for title, text in [*_facts(plan), ("cache", _cache_text(plan["cache"]))]:
        facts.add_row(Text(title, style="bold"), text)
    for row in plan["weights"]:
        colour = "yellow" if row["found"] is False else ""
        facts.add_row(Text("weights", style="bold"), Text(f"{row['backbone']}: {row['in_words']}", style=colour))
    parts += ["", facts, *(_probe_table(plan) if plan["probe"] else []), "", _sampled_title(plan)]
    for row in plan["keys"]:
        parts.append(Text.assemble((row["key"], "cyan"), f"  {row['domain']}"))
        absent = plan["num_trials"] - len(row["values"])
        some = f" ({len(row['values'])} of {plan['num_trials']} trials)" if absent else ""
        values = Text(_values_text(row["values"]) + some, style="dim")
        parts.append(Padding(values, (0, 0, 0, 4), expand=False))
    return Group(*parts)


def _probe_table(plan: Mapping[str, Any]) -> list[RenderableType]:
    """The cost of each shape of trial, and the hours of all, with how they are estimated."""
    columns = ("trials", "memory", "s per step", "s per epoch")
    table = _table(*columns, f"10 steps each on {plan['device']}", right=columns)
    for row in plan["probe"]:
        shape = ", ".join(f"{key} {value_text(value)}" for key, value in row["shape"].items())
        memory, step_s, epoch_s = row["peak_memory_bytes"], row["seconds_per_step"], row["epoch_s"]
        numbers = (bytes_text(memory), value_text(step_s), value_text(epoch_s))
        table.add_row(str(row["num_trials"]), *numbers, Text(shape or "all trials"))
    epochs = " + ".join(f"{stage['epochs']:,.0f} ({stage['stage']})" for stage in plan["stages"] if stage["epochs"])
    number = max(1, plan["slots"]["num_slots"])
    how = (
        f"{epochs} epochs at the mean of these times, {number} at a time that do not slow each other; of ASHA's epochs"
    )
    how += " the mean over random orders of the trials; without finalize"
    return ["", table, Text.assemble(("about ", "bold"), (_hours_text(plan["hours"]), "bold"), f": {how}")]


def _hours_text(hours: float) -> str:
    """``2 min``, ``3.5 hours``, ``4.2 days``."""
    for unit, size in (("days", 48.0), ("hours", 1.0)):
        if hours >= size:
            return f"{hours / (24 if unit == 'days' else 1):.3g} {unit}"
    return f"{max(1, round(hours * 60))} min"


def _facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    steps, slots = plan["steps"], plan["slots"]
    about = "about " if steps["are_expected"] else ""
    epoch = f"{about}{_range(steps['per_epoch'])} per epoch with {_range(steps['batch'])} images each"
    trial = f"{about}{_range(steps['per_trial'])} per trial of {_range(steps['epochs'])} epochs"
    number = slots["num_slots"]
    at_once = counted(number, "trial") if number else "no trial"
    return [
        ("steps", f"{epoch} ({_range(steps['images_per_epoch'])} images)"),
        ("", f"{trial} ({_range(steps['images_per_trial'])} images)"),
        *((stage["stage"], stage["in_words"]) for stage in plan["stages"]),
        ("at a time", f"{at_once}: {slots['in_words']}"),
    ]


def _split_table(data: Mapping[str, Any]) -> list[RenderableType]:
    published = ", published counts" if data["as_published"] else ""
    title = f"{data['name']}: {data['num_images']:,} images of {data['num_classes']:,} classes{published}"
    columns = {"train": "train", "val": "validate", "test": "test (sealed)"}
    table = _table("images of classes", *columns.values(), right=tuple(columns.values()))
    for row in data["splits"]:
        cells = (f"{row[part]['num_images']:,} of {row[part]['num_classes']:,}" for part in columns)
        table.add_row(row["split"], *cells)
    return [Text(title), table]


def _range(ends: Sequence[int]) -> str:
    low, high = ends
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _cache_text(cache: Mapping[str, Any] | None) -> str:
    if cache is None:
        return "none: no image files"
    sizes = [bytes_text(cache[f"{part}_bytes"]) for part in ("development", "test")]
    needed = cache["development_bytes"] + cache["test_bytes"]
    short = "; too little: what does not fit is decoded at each use" if needed > cache["free_bytes"] else ""
    free = bytes_text(cache["free_bytes"])
    return (
        f"about {sizes[0]} (train, validate) + {sizes[1]} (test) in {short_path(cache['folder'])}; {free} free{short}"
    )


def bytes_text(num_bytes: float) -> str:
    """``1.5 GB``: powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def _sampled_title(plan: Mapping[str, Any]) -> Text:
    number = plan["num_trials"]
    first = "; trial 0 is the published point" if plan["published_point"] else ""
    if num_first := plan["num_first"]:
        first += f"; {counted(num_first, 'point')} of study.search.first"
    if num_later := plan["num_later"]:
        first += f"; {num_later} are random here, and drawn by {plan['searcher']} from results in a study"
    if not plan["keys"]:
        return Text(f"sampled: nothing varies{first}", style="bold")
    return Text(f"sampled in {counted(number, 'trial')}{first}", style="bold")


MAX_LISTED = 32  # different numbers of one key


def _values_text(values: Sequence[Any]) -> str:
    """Return the sampled values and how often each occurs, numbers in ascending order; of very many, their range."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        given.sort()
        if len(set(given)) > MAX_LISTED:
            low, high, median = (value_text(given[place]) for place in (0, -1, len(given) // 2))
            return f"{low} to {high}, median {median}"
    counts = Counter(value_text(value) for value in [*given, *[None] * (len(values) - len(given))])
    return ", ".join(f"{text} ({count}x)" if count > 1 else text for text, count in counts.items())
