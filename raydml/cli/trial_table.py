"""Trials as a table, for the live view and for ``launch.py status``."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from raydml.analysis.trials import TrialState
from raydml.metrics.names import metric_label
from raydml.study.state import StudyState

#: Name of a state on the screen, and its colour.
STATES: dict[str, tuple[str, str]] = {
    "running": ("running", "cyan"),
    "retrying": ("retrying", "magenta"),
    "interrupted": ("paused", "yellow"),
    "finished": ("finished", "green"),
    "stopped_early": ("stopped", "yellow"),
    "non_finite_loss": ("NaN loss", "red"),
    "collapsed": ("collapsed", "red"),
    "crashed": ("crashed", "bold red"),
}
WIDE_COLUMNS = 100  # from here on there is room for generous gaps


def embedding_dim(trial: TrialState) -> int | None:
    dim: int | None = (trial.config.get("model") or {}).get("embedding_dim")
    return dim


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


def trial_table(study: StudyState, stage: str, *, width: int, limit: int, index_only: bool = False) -> Table:
    """Return one row for each trial of a stage; ``confirm`` shows fold and seed instead of what the search varies."""
    confirming = stage == "confirm"
    gap = 2 if width >= WIDE_COLUMNS else 1
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("trial", no_wrap=True)
    # Only this may give way when the terminal is narrow: a recipe is still known by its beginning.
    table.add_column("recipe", overflow="ellipsis", min_width=9)
    for title in ("fold", "seed") if confirming else ("dim", "lr"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column(metric_label(study.metric), justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    best = study.best_of_stage(stage)
    for trial in chosen_rows(study.of_stage(stage), limit):
        label, colour = STATES.get(trial.state, (trial.state, ""))
        varying = (trial.fold, trial.seed) if confirming else (embedding_dim(trial), learning_rate(trial))
        table.add_row(
            trial.trial.removeprefix(f"{stage}-") if index_only else trial.trial,
            Text(trial.recipe, no_wrap=True),  # as Text, or rich would read brackets as markup
            *("" if value is None else str(value) for value in varying),
            f"{trial.num_epochs}/{trial.num_planned_epochs}",
            "" if trial.best is None else f"{trial.best:.4f}",
            Text(label, style=colour),
            style="bold" if best is not None and trial.trial == best.trial else "",
        )
    return table
