"""All numbers of a study as two CSV files: one row a trial, one row an epoch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raydml.analysis.trials import TrialState
from raydml.config.recipe import flatten

_TRIAL_COLUMNS = (
    "trial", "stage", "fingerprint", "configuration", "recipe", "fold", "seed", "ended", "error", "epochs_run",
    "epochs_planned", "seconds", "best", "epoch_of_best",
)  # fmt: skip


def trials_csv(trials: Sequence[TrialState], summary: Mapping[str, Any]) -> str:
    """One row a trial: how it ended, all metrics of its best epoch (``best.``), those of the test classes where it was
    tested (``test.``), and every parameter by its path in the search space (``loss.name``). Lists are JSON; a cell
    without a value is empty."""
    configurations = {run["trial"]: row["configuration"] for row in summary["confirm"] for run in row["runs"]}
    tested = {run["trial"]: run["test"] for row in summary["final"] for run in row["runs"]}
    rows = []
    for trial in trials:
        at_best = trial.epochs.get(trial.epoch_of_best, {}) if trial.epoch_of_best is not None else {}
        row: dict[str, Any] = {
            "trial": trial.trial,
            "stage": trial.stage,
            "fingerprint": trial.fingerprint,
            # A searched trial is its own configuration; a confirmed one repeats it on other folds and seeds.
            "configuration": configurations.get(trial.trial, trial.fingerprint if trial.stage == "search" else None),
            "recipe": trial.recipe,
            "fold": trial.fold,
            "seed": trial.seed,
            "ended": trial.ended,
            "error": trial.error,
            "epochs_run": trial.num_epochs,
            "epochs_planned": trial.num_planned_epochs,
            "seconds": sum(metrics.get("epoch_s", 0.0) for metrics in trial.epochs.values()),
            "best": trial.best,
            "epoch_of_best": trial.epoch_of_best,
        }
        row |= {f"best.{name}": value for name, value in at_best.items()}
        row |= {f"test.{name}": value for name, value in tested.get(trial.trial, {}).items()}
        row |= {name: value for name, value in flatten(trial.config).items() if name != "seed"}
        rows.append(row)
    return _csv(_TRIAL_COLUMNS, rows)


def epochs_csv(trials: Sequence[TrialState]) -> str:
    """One row an epoch with every metric that it reported, those of the clustering too."""
    rows = [
        {"trial": trial.trial, "stage": trial.stage, "epoch": epoch, **metrics}
        for trial in trials
        for epoch, metrics in sorted(trial.epochs.items())
    ]
    return _csv(("trial", "stage", "epoch"), rows)


def _csv(first: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns: those given, then the others in order of appearance."""
    columns = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return text.getvalue()


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | tuple | dict | bool) else value
