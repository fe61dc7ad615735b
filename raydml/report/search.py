"""Sections of the report about the search: was it enough, how the trials learned, what mattered, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from raydml.analysis.trials import ENDINGS, FAILURES, TrialState, by_stage
from raydml.metrics.names import metric_name
from raydml.report.charts import NUM_COLOURS, Line, Scale, line_chart
from raydml.report.choices import crossing_table, importance_charts
from raydml.report.markup import Markup, element, folded, joined, paragraph, table
from raydml.report.section import Section, legend, titled
from raydml.report.words import counted, findings, hours_text

_MAX_SMALL = 24  # curves in each small chart: of the best trials
_NOT_DRAWN = ("epoch_s", "clustering_s")  # times: the section about cost has them


def search_sections(summary: Mapping[str, Any], trials: Sequence[TrialState]) -> list[Section]:
    searched = by_stage(trials, "search")
    return [
        Section("settled", "Is the search settled", _stability(summary, searched)),
        Section("curves", "Learning curves", _curves(summary, searched, by_stage(trials, "confirm"))),
        Section("choices", "What each choice reached", crossing_table(searched)),
        Section("importance", "Which hyperparameters mattered", importance_charts(summary, searched)),
        Section("cost", "Cost", _cost(summary)),
    ]


# --- enough? ----------------------------------------------------------------------------------------------------------


def _stability(summary: Mapping[str, Any], searched: Sequence[TrialState]) -> Markup:
    judged = summary["stability"]
    if judged is None:
        return Markup()
    metric = metric_name(summary["metric"])
    values = [(number, trial.best) for number, trial in enumerate(searched, start=1) if trial.best is not None]
    best = [(n, value) for n, value in enumerate(judged["best_so_far"], start=1) if value is not None]
    so_far = [*best[:1], *(point for (_, before), now in pairwise(best) for point in ((now[0], before), now))]
    single = [
        Line([(number, value)], "series-5", f"{searched[number - 1].trial}: {value:.4f}") for number, value in values
    ]
    charts = [titled("Best so far, and every trial",
                      line_chart([*single, Line(so_far, "series-0 strong", "best so far", None)],
                                 x_label="trial", y_label=metric, height_px=220))]  # fmt: skip
    taus = [
        Line(judged["kendall_tau"], "series-0 strong", "first n trials against all"),
        Line(judged["subsample_tau"], "series-1 strong", "two random parts of n trials each"),
    ]
    if any(len(line.points) > 1 for line in taus):
        drawn = line_chart([line for line in taus if line.points], x_label="n trials", y_label="Kendall's tau",
                           up=_tau_scale(taus), height_px=220)  # fmt: skip
        keys = legend([("series-0", taus[0].title), *([("series-1", taus[1].title)] if taus[1].points else [])])
        charts.append(titled("Does the ranking still change", joined(drawn, keys)))
    ranked = element("ol", *(element("li", level) for level in judged["ranking"]))
    return joined(
        *(paragraph(sentence) for sentence in findings(summary).settled),
        element("div", *charts, class_="columns"),
        folded("The ranking by the best trial of each recipe", ranked),
    )


def _tau_scale(taus: Sequence[Line]) -> Scale:
    """Up to 1 and, unless a tau is negative, from 0: a flat line at 1 shall look like one."""
    return Scale(min([0.0, *(tau for line in taus for _, tau in line.points)]), 1.0)


# --- learning curves --------------------------------------------------------------------------------------------------


def _curves(summary: Mapping[str, Any], searched: Sequence[TrialState], confirmed: Sequence[TrialState]) -> Markup:
    metric = summary["metric"]
    if not any(trial.epochs for trial in searched):
        return Markup()
    styles = _coloured(list(dict.fromkeys(trial.recipe for trial in _by_value(searched))))
    rungs = summary["plan"]["rungs"]
    lines = [_curve(trial, metric, styles[trial.recipe]) for trial in reversed(_by_value(searched))]
    parts = [
        paragraph(_words_of_endings(searched, rungs)),
        line_chart(lines, x_label="epoch", y_label=metric_name(metric), rungs=rungs, height_px=360),
        legend([*_named(styles), ("mark-end", "ran to the end"), ("mark-cut", "stopped early"),
                 ("mark-failed", "failed")]),
    ]  # fmt: skip
    if confirmed:
        parts.append(_confirmed_curves(summary, confirmed))
    parts.append(_small_charts(metric, _by_value([*searched, *confirmed])[:_MAX_SMALL], styles))
    return joined(*parts)


def _confirmed_curves(summary: Mapping[str, Any], confirmed: Sequence[TrialState]) -> Markup:
    """The confirmed runs, a colour for each configuration (the recipes of two may be the same)."""
    metric = summary["metric"]
    letters = {run["trial"]: row["letter"] for row in summary["confirm"] for run in row["runs"]}
    styles = _coloured([row["letter"] for row in summary["confirm"]])
    lines = [_curve(trial, metric, styles.get(letters.get(trial.trial, ""), "series-rest")) for trial in confirmed]
    drawn = line_chart(lines, x_label="epoch", y_label=metric_name(metric), height_px=260)
    labels = {row["letter"]: f"{row['letter']} {row['label']}" for row in summary["confirm"]}
    keys = legend([(style, labels[letter]) for letter, style in styles.items()])
    return titled(f"The {counted(len(confirmed), 'confirmed run')}", joined(drawn, keys))


def _by_value(trials: Sequence[TrialState]) -> list[TrialState]:
    """Best first, those without a value last."""
    return sorted(trials, key=lambda trial: (trial.best is None, -(trial.best or 0.0)))


def _coloured(names: Sequence[str]) -> dict[str, str]:
    """Name -> class of its colour: the first ones have their own, where there are too many the others share one."""
    own = NUM_COLOURS if len(names) <= NUM_COLOURS else NUM_COLOURS - 1
    return {name: f"series-{place}" if place < own else "series-rest" for place, name in enumerate(names)}


def _named(styles: Mapping[str, str]) -> list[tuple[str, str]]:
    named = [(style, recipe) for recipe, style in styles.items() if style != "series-rest"]
    hidden = sum(style == "series-rest" for style in styles.values())
    return named + ([("series-rest", f"{hidden} other recipes")] if hidden else [])


def _curve(trial: TrialState, metric: str, style: str) -> Line:
    mark = "cut" if trial.ended == "stopped_early" else "failed" if trial.ended in FAILURES else "end"
    quiet = " quiet" if mark != "end" else ""
    ending = ENDINGS.get(trial.ended, trial.ended)
    reached = "" if trial.best is None else f", best {trial.best:.4f} at epoch {trial.epoch_of_best}"
    title = f"{trial.trial}: {trial.recipe}{reached}, {ending} after epoch {trial.num_epochs}"
    return Line(trial.curve(metric), style + quiet, title, mark)


def _words_of_endings(searched: Sequence[TrialState], rungs: Sequence[int]) -> str:
    counts = {reason: sum(trial.ended == reason for trial in searched) for reason in ENDINGS}
    told = ", ".join(f"{count} {ENDINGS[reason]}" for reason, count in counts.items() if count)
    text = f"Of {counted(len(searched), 'trial')}: {told}."
    if rungs:
        places = ", ".join(str(rung) for rung in rungs)
        text += f" Trials were compared at epoch {places} (dashed); a short upright bar is where one was stopped."
    return text


def _small_charts(shown: str, trials: Sequence[TrialState], styles: Mapping[str, str]) -> Markup:
    """Every other metric that the trials report, those of the clustering too."""
    names = dict.fromkeys(name for trial in trials for name in trial.metrics)
    wanted = [name for name in names if name != shown and name not in _NOT_DRAWN and not name.startswith("best_")]
    charts = []
    for name in wanted:
        lines = [
            _curve(trial, name, styles.get(trial.recipe, "series-rest")) for trial in trials if name in trial.metrics
        ]
        drawn = line_chart(lines, x_label="epoch", y_label="", height_px=130, description=metric_name(name))
        charts.append(titled(metric_name(name), drawn))
    if not charts:
        return Markup()
    title = f"Everything else that was measured while training: {counted(len(charts), 'chart')}"
    note = f"Of the {len(trials)} best trials; epochs.csv has those of all."
    return folded(title, paragraph(note, class_="muted"), element("div", *charts, class_="columns small"))


# --- cost -------------------------------------------------------------------------------------------------------------


def _cost(summary: Mapping[str, Any]) -> Markup:
    cost = summary["cost"]
    if not cost["stages"]:
        return Markup()
    time = f"{cost['unit'].removesuffix('-hours')} time"
    header = ["stage", "trials", "epochs run", "planned", time, "of it clustering", "stopped early",
              "epochs saved", f"{time} saved"]  # fmt: skip
    rows = [_cost_row(stage["stage"], [stage]) for stage in cost["stages"]]
    if len(rows) > 1:
        rows.append(_cost_row("together", cost["stages"]))
    held = f"Each trial held {cost['per_trial']:g} {cost['unit'].removesuffix('-hours')}. "
    note = (
        "Seconds of all epochs (training, clustering, validation) times what a trial holds. Saved: the epochs that "
        "trials stopped early did not run, each at its trial's mean time. Not counted: starting up, finalize, and "
        "epochs that were lost to an interruption."
    )
    return joined(
        table(header, rows, caption="Cost by stage", emphasised=(len(rows) - 1,) if len(rows) > 1 else ()),
        paragraph(held, note, class_="muted"),
    )


def _cost_row(title: str, stages: Sequence[Mapping[str, Any]]) -> list[object]:
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
