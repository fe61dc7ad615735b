"""The sections of the report's page about the outcome, then those about the search.

Each function returns plain values for its macro in sections.html, or None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from raydml.analysis.importance import Importance, crossing_of
from raydml.analysis.trials import ENDINGS, FAILURES, TrialState, by_stage, parameters_of, searched_trials, varying
from raydml.metrics.names import metric_label, metric_name
from raydml.ops.wording import counted, hours_text
from raydml.report.charts import (
    NUM_SERIES,
    Curve,
    Scale,
    Whisker,
    WhiskerChart,
    axis_of,
    labels_of,
    line_chart,
    parallel_chart,
    whisker_chart,
)
from raydml.report.comparability import (
    HOW_TO_COMPARE,
    NONE_COMPARES,
    PublishedGroup,
    Values,
    comparability,
    epochs_rule,
    published_groups,
    published_name,
    published_text,
    source_text,
)
from raydml.report.tables import FoldedTable, TableCell, table
from raydml.report.text import (
    HOW_INTERVALS_ARE_MADE,
    HOW_INTERVALS_OF_SEEDS_ARE_MADE,
    all_metrics,
    comparison_text,
    final_models,
    findings,
    main_metrics,
    p_text,
    protocols_in_words,
    score_text,
)

_MAX_SMALL = 24  # curves in each small chart: those of the best trials
_MAX_AXES = 10
_LOSS = "train_loss"
_TIMES = ("epoch_s", "clustering_s")  # shown in the section about cost, not as curves


def findings_section(summary: Values) -> Values:
    """The findings in sentences, under headings."""
    found = findings(summary)
    groups = {
        "Question": found.question,
        "Winner": found.winner,
        "Refit": found.refit,
        "Test results": found.test,
        "Did the search converge?": found.settled,
        "Cost": found.cost,
    }
    return {"warnings": found.warnings, "groups": [(title, group) for title, group in groups.items() if group]}


def final_section(summary: Values) -> Values | None:
    """What was tested of each final configuration: one row for each kind of models, all metrics folded away."""
    if not summary["final"]:
        return None
    names, models = main_metrics(summary), final_models(summary)
    firsts = {one.row["letter"]: one for one in reversed(models)}
    rows = [
        [
            TableCell(one.row["letter"], strong=True),
            one.row["label"] if one is firsts[one.row["letter"]] else "",
            TableCell(one.title, tag=one.remark),
            one.num_runs,
            *(_score(one.scores.get(name)) for name in names),
        ]
        for one in models
    ]
    scored = [one for one in models if one.scores]
    every = [
        table(
            ["metric", *(f"{one.row['letter']}, {one.title}" for one in scored)],
            [[metric_name(name), *(_score(one.scores.get(name)) for one in scored)] for name in all_metrics(summary)],
            words=(0,),
            caption="All metrics",
        )
    ]
    intervals = (
        HOW_INTERVALS_ARE_MADE if any(row["runs"] for row in summary["final"]) else HOW_INTERVALS_OF_SEEDS_ARE_MADE
    )
    title = f"Pairwise comparisons of the fold models on the test classes, {metric_label(names[0])}" if names else ""
    return {
        "protocols": protocols_in_words(summary),
        "comparability": comparability(summary),
        "note": f"All rows are test scores unless noted. {intervals}" if scored else "",
        "whiskers": _test_whiskers(summary, names[0]) if names else None,
        "table": table(
            ["", "configuration", "models", "runs", *map(metric_label, names)],
            rows,
            words=(0, 1, 2),
            caption="Final configurations",
            emphasised=[number for number, one in enumerate(models) if one.kind == "refit"],
        ),
        "all_metrics": every if scored else [],
        "comparisons": _comparisons(summary["test_comparisons"], title),
    }


def _score(score: Values | None) -> TableCell | None:
    """Return a mean with its interval in small letters; tiny values get more decimals."""
    is_tiny = score is not None and score["mean"] is not None and 0 < abs(score["mean"]) < 0.01
    text = score_text(score, decimals=6 if is_tiny else 3)
    if text is None:
        return None
    mean, _, interval = text.partition(" ")
    return TableCell(mean, small=interval)


def _test_whiskers(summary: Values, name: str) -> WhiskerChart | None:
    rows, has_refits = [], any(one.kind == "refit" and one.scores for one in final_models(summary))
    for one in final_models(summary, ("refit", "metrics")):
        if name in one.scores:
            runs = one.row["refit"]["runs"] if one.kind == "refit" else one.row["runs"]
            values = {_run_name(run): run["test"].get(name) for run in runs}
            label = f"{one.row['label']}, {one.title}" if has_refits else one.row["label"]
            rows.append(_whisker({**one.row, "label": label}, one.scores[name], values))
    untrained = [one.scores[name]["mean"] for one in final_models(summary, ("untrained",)) if name in one.scores]
    reference = (min(untrained), "untrained") if untrained else None
    return whisker_chart(rows, x_label=f"{metric_name(name)}, test", reference=reference)


def _whisker(row: Values, score: Values, values: Mapping[str, float | None]) -> Whisker:
    measured = [(name, value) for name, value in values.items() if value is not None]
    text = score_text(score, decimals=3) or ""
    return Whisker(row["letter"], row["label"], score["mean"], score["half_width"], measured, text)


def _run_name(run: Values) -> str:
    fold = "" if run["fold"] is None else f", fold {run['fold']}"
    return f"{run['trial']}{fold}, seed {run['seed']}"


def published_section(summary: Values) -> Values | None:
    """The published numbers of each data set and protocol, beside ours where those compare."""
    groups = published_groups(summary)
    if not groups:
        return None
    has_ours = any(group.ours for group in groups)
    note = HOW_TO_COMPARE.replace("*", '"')
    if any(entry["ours"] for group in groups for entry in group.theirs):
        own = ", and its own" if has_ours else ""
        note += f" Highlighted rows are those of the systems that this study ran{own}."
    return {
        "groups": [_published_group(group) for group in groups],
        "has_ours": has_ours,
        "remark": "" if has_ours else NONE_COMPARES,
        "note": note,
    }


def _published_group(group: PublishedGroup) -> Values:
    """Return our comparable rows, then the published ones, best last, with a folded table of all."""
    mine: list[list[object]] = [
        [TableCell(f"this study: refit of {row['letter']}, {row['label']}", strong=True)]
        + [_score(scores.get(name)) for name in group.metrics]
        + [row["backbone"], row["embedding_dim"], f"configuration {row['configuration']}"]
        for row, scores in group.ours
    ]
    marked = [number for number, entry in enumerate(group.shown, start=len(mine)) if entry["ours"]]
    header = ["", *map(metric_label, group.metrics), "backbone", "dimensions", "source and status"]
    words = (0, len(group.metrics) + 1, len(group.metrics) + 3)
    rows = [*mine, *(_published_row(entry, group.metrics) for entry in group.shown)]
    shown = table(header, rows, words=words, caption=group.title, emphasised=(*range(len(mine)), *marked))
    theirs = [_published_row(entry, group.metrics) for entry in group.theirs]
    every = table(header, theirs, words=words, caption=group.title)
    is_shortened = len(group.shown) < len(group.theirs)
    folded = FoldedTable(f"All {len(theirs)} published rows of {group.title}", every) if is_shortened else None
    return {"shown": shown, "every": folded}


def _published_row(entry: Values, names: Sequence[str]) -> list[object]:
    tag = f"this study ran it: {', '.join(entry['ours'])}" if entry["ours"] else ""
    return [
        TableCell(published_name(entry), tag=tag),
        *(published_text(entry["metrics"].get(name)) for name in names),
        entry["backbone"],
        entry["embedding_dim"],
        source_text(entry),
    ]


def refit_section(summary: Values) -> Values | None:
    """The models that were trained on all development classes, or on all classes."""
    if not summary["refit"]:
        return None
    are_validated = any(row["best_epochs"] for row in summary["refit"])
    rows = [
        [
            TableCell(row["letter"], strong=True),
            row["label"],
            TableCell("all classes", tag="the test classes included: never scored")
            if row["classes"] == "all"
            else "all development classes",
            row["epochs"],
            *([", ".join(map(str, row["best_epochs"])) or None] if are_validated else []),
            ", ".join(run["trial"] for run in row["runs"]),
        ]
        for row in summary["refit"]
    ]
    best_epochs = ["best epochs in validation"] if are_validated else []
    header = ["", "configuration", "trained on", "epochs", *best_epochs, "models, one for each seed"]
    return {
        "table": table(header, rows, words=(0, 1, 2, 4, 5), caption="Models to take away"),
        "note": f"{epochs_rule(summary)} The last weights count: nothing validates a refit.",
    }


def confirmed_section(summary: Values) -> Values | None:
    confirmed, name = summary["confirm"], metric_name(summary["metric"])
    if not confirmed:
        return None
    rows = [_whisker(row, row, {_run_name(run): run["value"] for run in row["runs"]}) for row in confirmed]
    details = [
        [row["letter"], row["label"], row["configuration"], row["from_trial"], score_text(row), row["num_runs"]]
        for row in confirmed
    ]
    header = ["", "configuration", "fingerprint", "from", "mean ± 95 % interval", "runs"]
    return {
        "whiskers": whisker_chart(rows, x_label=name),
        "ranking": [f"{sentence}." for sentence in summary["ranking_in_words"]],
        "comparisons": _comparisons(summary["comparisons"], "Pairwise comparisons"),
        "as_table": FoldedTable("As a table", table(header, details, words=(0, 1, 2, 3), caption=f"Confirmed: {name}")),
        "note": HOW_INTERVALS_ARE_MADE,
    }


def _comparisons(comparisons: Sequence[Values], title: str) -> FoldedTable | None:
    if not comparisons:
        return None

    def p_cell(p: float | None) -> str | None:
        return None if p is None else p_text(p).removeprefix("= ")

    rows = [
        [f"{row['better']} leads {row['worse']}", comparison_text(row).partition(" (")[0], p_cell(row["p"]),
         p_cell(row["p_holm"]), p_cell(row.get("p_corrected")),
         "significant" if row["is_real"] else "not significant",
         row["num_pairs"]]
        for row in comparisons
    ]  # fmt: skip
    real = [number for number, row in enumerate(comparisons) if row["is_real"]]
    header = ["", "difference ± 95 % interval", "p", "p, Holm", "p, Holm, corrected for shared classes", "",
              "paired runs"]  # fmt: skip
    body = table(header, rows, words=(0, 5), caption=title, emphasised=real)
    return FoldedTable(f"{title}: {len(rows)}, {len(real) or 'none'} significant", body)


def settled_section(summary: Values, searched: Sequence[TrialState]) -> Values | None:
    stability = summary["stability"]
    if stability is None:
        return None
    best = [(n, value) for n, value in enumerate(stability["best_so_far"], start=1) if value is not None]
    steps = [*best[:1], *(point for (_, before), now in pairwise(best) for point in ((now[0], before), now))]
    single = [
        Curve([(number, trial.best)], "series-5", f"{trial.trial}: {trial.best:.4f}")
        for number, trial in enumerate(searched, start=1)
        if trial.best is not None
    ]
    found = line_chart([*single, Curve(steps, "series-0 strong", "best so far", None)], x_label="trial",
                       y_label=metric_name(summary["metric"]), height_px=220)  # fmt: skip
    charts: list[tuple[Any, ...]] = [("Best so far, and every trial", found, ())]
    taus = [
        Curve(stability["kendall_tau"], "series-0 strong", "first n trials against all"),
        Curve(stability["subsample_tau"], "series-1 strong", "two random parts of n trials each"),
    ]
    if any(len(curve.points) > 1 for curve in taus):
        shown = [curve for curve in taus if curve.points]
        # Up to 1 and, unless a tau is negative, from 0, so that a constant 1 is a line at the top.
        up = Scale(min([0.0, *(tau for curve in taus for _, tau in curve.points)]), 1.0)
        drawn = line_chart(shown, x_label="n trials", y_label="Kendall's tau", up=up, height_px=220)
        keys = [(curve.style.partition(" ")[0], curve.title) for curve in shown]
        charts.append(("Does the ranking still change?", drawn, keys))
    return {"sentences": findings(summary).settled, "charts": charts, "ranking": stability["ranking"]}


def curves_section(summary: Values, trials: Sequence[TrialState]) -> Values | None:
    """Every trial's ranking metric by epoch, the training loss of the refits, and small charts of all else."""
    searched = searched_trials(trials)
    confirmed, refits = (by_stage(trials, stage) for stage in ("confirm", "refit"))
    best_first = _by_value(searched)
    styles = _colours(list(dict.fromkeys(trial.recipe for trial in best_first or refits)))
    section = {
        "search": _searched_curves(summary, best_first, styles),
        "confirmed": _confirmed_curves(summary, confirmed) if confirmed else None,
        "refits": _refit_curves(summary, refits) if any(_LOSS in trial.metrics for trial in refits) else None,
        "small": _small_charts(summary["metric"], _by_value([*searched, *confirmed, *refits])[:_MAX_SMALL], styles),
    }
    return section if section["search"] or section["refits"] else None


def _searched_curves(summary: Values, best_first: Sequence[TrialState], styles: Mapping[str, str]) -> Values | None:
    if not any(trial.epochs for trial in best_first):
        return None
    metric, rungs = summary["metric"], summary["plan"]["rungs"]
    curves = [_curve(trial, metric, styles[trial.recipe]) for trial in reversed(best_first)]
    counts = {reason: sum(trial.ended == reason for trial in best_first) for reason in ENDINGS}
    endings = ", ".join(f"{count} {ENDINGS[reason]}" for reason, count in counts.items() if count)
    sentence = f"Of {counted(len(best_first), 'trial')}: {endings}."
    if rungs:
        epochs = f"epoch{'s' if len(rungs) > 1 else ''} {', '.join(map(str, rungs))}"
        sentence += f" Trials were compared at {epochs} (dashed). A short vertical bar marks a stopped trial."
    keys = [(style, recipe) for recipe, style in styles.items() if style != "series-rest"]
    num_others = len(styles) - len(keys)
    keys += [("series-rest", f"{num_others} other recipes")] if num_others else []
    keys += [("mark-end", "ran to the end"), ("mark-cut", "stopped early"), ("mark-failed", "failed")]
    return {
        "sentence": sentence,
        "chart": line_chart(curves, x_label="epoch", y_label=metric_name(metric), rungs=rungs, height_px=360),
        "legend": keys,
    }


def _refit_curves(summary: Values, refits: Sequence[TrialState]) -> tuple[Any, ...]:
    """Return (title, chart, legend) of the training loss: nothing validates a refit."""
    letters = {run["trial"]: row["letter"] for row in summary["refit"] for run in row["runs"]}
    labels = {trial.trial: letters.get(trial.trial) or trial.recipe for trial in refits}
    styles = _colours(list(dict.fromkeys(labels.values())))
    curves = [_curve(trial, _LOSS, styles[labels[trial.trial]]) for trial in refits]
    return (
        f"The training loss of {counted(len(refits), 'refit')}; nothing validates them",
        line_chart(curves, x_label="epoch", y_label="training loss", height_px=260),
        [(style, label) for label, style in styles.items()],
    )


def _confirmed_curves(summary: Values, confirmed: Sequence[TrialState]) -> tuple[Any, ...]:
    """Return (title, chart, legend); colours are by configuration, because two may have the same recipe."""
    letters = {run["trial"]: row["letter"] for row in summary["confirm"] for run in row["runs"]}
    styles = _colours([row["letter"] for row in summary["confirm"]])
    metric = summary["metric"]
    curves = [_curve(trial, metric, styles.get(letters.get(trial.trial, ""), "series-rest")) for trial in confirmed]
    labels = {row["letter"]: f"{row['letter']} {row['label']}" for row in summary["confirm"]}
    return (
        f"The {counted(len(confirmed), 'confirmed run')}",
        line_chart(curves, x_label="epoch", y_label=metric_name(metric), height_px=260),
        [(style, labels[letter]) for letter, style in styles.items()],
    )


def _small_charts(shown: str, trials: Sequence[TrialState], styles: Mapping[str, str]) -> Values | None:
    """Return charts of every other metric that the trials report."""
    names = dict.fromkeys(name for trial in trials for name in trial.metrics)
    charts = []
    for name in names:
        if name != shown and name not in _TIMES and not name.startswith("best_"):
            curves = [_curve(one, name, styles.get(one.recipe, "series-rest")) for one in trials if name in one.metrics]
            chart = line_chart(curves, x_label="epoch", y_label="", height_px=130, description=metric_name(name))
            charts.append((metric_name(name), chart))
    title = f"Everything else that was measured while training: {counted(len(charts), 'chart')}"
    note = f"Of the {len(trials)} best trials; epochs.csv has the epochs of all trials."
    return {"title": title, "note": note, "charts": charts} if charts else None


def _by_value(trials: Sequence[TrialState]) -> list[TrialState]:
    """Sort trials: best first, those without a value last."""
    return sorted(trials, key=lambda trial: (trial.best is None, -(trial.best or 0.0)))


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Return name -> class of its colour; where there are too many, all but the first share one."""
    num_own = NUM_SERIES if len(names) <= NUM_SERIES else NUM_SERIES - 1
    return {name: f"series-{place}" if place < num_own else "series-rest" for place, name in enumerate(names)}


def _curve(trial: TrialState, metric: str, style: str) -> Curve:
    mark = "cut" if trial.ended == "stopped_early" else "failed" if trial.ended in FAILURES else "end"
    ending = ENDINGS.get(trial.ended, trial.ended)
    reached = "" if trial.best is None else f", best {trial.best:.4f} at epoch {trial.epoch_of_best}"
    title = f"{trial.trial}: {trial.recipe}{reached}, {ending} after epoch {trial.num_epochs}"
    return Curve(trial.curve(metric), style + (" quiet" if mark != "end" else ""), title, mark)


def choices_section(searched: Sequence[TrialState]) -> Values | None:
    """Return a table of the two choices that vary most, often losses by methods; None where none varies."""
    crossing = crossing_of(searched)
    if crossing is None:
        return None
    bests = [cell.best for cell in crossing.cells.values()]
    strength = Scale(min(bests), max(bests))
    shown = {
        pair: {
            "best": f"{cell.best:.3f}",
            "words": f"median {cell.median:.3f}, {counted(cell.num_trials, 'trial')}",
            "strength": strength.share(cell.best) if len(set(bests)) > 1 else 0.0,
        }
        for pair, cell in crossing.cells.items()
    }
    title = f"{crossing.rows_of} × {crossing.columns_of}" if crossing.columns_of else crossing.rows_of
    return {
        "header": [title, *(column or "value" for column in crossing.columns)],
        "rows": [(row, [shown.get((row, column)) for column in crossing.columns]) for row in crossing.rows],
    }


def importance_section(summary: Values, searched: Sequence[TrialState]) -> Values | None:
    if summary["stability"] is None:
        return None
    found = Importance(**summary["importance"])
    shown = {name: share for name, share in found.shares.items() if share >= 0.01}
    num_hidden = len(found.shares) - len(shown)
    words = f"Hyperparameter importance is not shown: {found.reason}."
    if found.reason is None:
        words = (
            f"A random forest over {found.num_trials} trials explains {max(found.r2 or 0.0, 0.0):.0%} of the variance "
            "of the trials that its trees were not fitted to. A bar shows how much worse the forest predicts when one "
            "parameter is shuffled, as a share of the total. This holds for the ranges searched here. Parameters that "
            "were sampled together share their weight. A trial stopped early counts with the value that it had reached."
        )
        words += f" {counted(num_hidden, 'parameter')} below 1 % left out." if num_hidden else ""
    longest = max(found.shares.values(), default=1.0)
    return {
        "words": words,
        "bars": [(name, share / longest, f"{share:.0%}") for name, share in shown.items()],
        "parallel": _parallel(searched, found, metric_name(summary["metric"])),
    }


def _parallel(searched: Sequence[TrialState], found: Importance, metric: str) -> Values | None:
    reached = [(trial, trial.best) for trial in searched if trial.best is not None]
    parameters = [parameters_of(trial.config) for trial, _ in reached]
    varied = varying(parameters)
    # A parameter that most trials do not have says little about them.
    shared = [name for name in varied if sum(name in one for one in parameters) * 2 > len(parameters)]
    names = sorted(shared, key=lambda name: -found.shares.get(name, 0.0))[:_MAX_AXES]
    if len(reached) < 2 or not names:
        return None
    labels, values = labels_of(names), [value for _, value in reached]
    axes = [axis_of(labels[name], [one.get(name) for one in parameters]) for name in names]
    axes.append(axis_of(metric.removeprefix("validation "), values))
    num_left_out = len(varied) - len(names)
    note = f" {counted(num_left_out, 'parameter')} of few trials or little weight left out." if num_left_out else ""
    titles = [f"{trial.trial}: {value:.4f}, {trial.recipe}" for trial, value in reached]
    words = ("worst fifth", "", "", "", "best fifth of the trials")
    return {
        "title": f"Parameters of the trials, by {metric}.{note}",
        "chart": parallel_chart(axes, values, titles),
        "legend": [(f"grade-{grade}", text) for grade, text in enumerate(words)],
    }


def cost_section(cost: Values) -> Values | None:
    if not cost["stages"]:
        return None
    device = cost["unit"].removesuffix("-hours")
    header = ["stage", "trials", "epochs run", "planned", f"{device} time", "of which clustering", "stopped early",
              "epochs saved", f"{device} time saved"]  # fmt: skip
    rows = [_cost_row(stage["stage"], [stage]) for stage in cost["stages"]]
    if len(rows) > 1:
        rows.append(_cost_row("total", cost["stages"]))
    note = (
        f"Each trial used {_range(cost)} {device}. The time is that of all epochs (training, clustering, "
        f"validation) times the {device}s per trial. Saved epochs are those that trials stopped early did not run, "
        "each at the mean epoch time of its trial. Not counted: startup, finalize, and epochs lost to an interruption."
    )
    emphasised = (len(rows) - 1,) if len(rows) > 1 else ()
    return {"table": table(header, rows, caption="Cost by stage", emphasised=emphasised), "note": note}


def _range(cost: Values) -> str:
    """Return ``1``, or ``0.25 to 1`` where trials hold different shares."""
    least, most = cost.get("least_per_trial", cost["per_trial"]), cost["per_trial"]
    return f"{most:g}" if least == most else f"{least:g} to {most:g}"


def _cost_row(title: str, stages: Sequence[Values]) -> list[object]:
    total = {key: sum(stage[key] for stage in stages) for key in stages[0] if key != "stage"}
    share = total["hours_clustering"] / total["hours"] if total["hours"] else 0.0
    return [
        title,
        total["num_trials"],
        total["epochs_run"],
        total["epochs_planned"],
        hours_text(total["hours"]),
        f"{share:.1%}" if total["hours_clustering"] else None,
        total["num_stopped"] or None,
        total["epochs_saved"] or None,
        hours_text(total["hours_saved"]) if total["hours_saved"] else None,
    ]
