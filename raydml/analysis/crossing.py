"""Loss by method: the two choices that a search varied most, crossed, with what each pair reached."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from raydml.analysis.trial_history import CHOICES, TrialHistory, level_of


class Cell(NamedTuple):
    """What the trials of one pair reached."""

    best: float
    median: float
    num_trials: int


class Crossing(NamedTuple):
    """rows_of, columns_of: the choices; columns_of is None where only one choice varies. cells: (row, column) -> what
    was reached; a pair that no trial with a value ran is missing."""

    rows_of: str
    columns_of: str | None
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]


def crossing_of(trials: Sequence[TrialHistory]) -> Crossing | None:
    """The crossing, rows and columns by their best value; None where no choice varies or no trial has a value."""
    reached = [(trial, trial.best) for trial in trials if trial.best is not None]
    levels = {choice: {level_of(trial.config, choice) for trial, _ in reached} for choice in CHOICES}
    # The earlier choice wins where two vary equally.
    varied = sorted((choice for choice in CHOICES if len(levels[choice]) > 1), key=lambda c: -len(levels[c]))
    if not varied:
        return None
    rows_of, columns_of = varied[0], varied[1] if len(varied) > 1 else None
    values: dict[tuple[str, str], list[float]] = {}
    for trial, best in reached:
        column = level_of(trial.config, columns_of) if columns_of else ""
        values.setdefault((level_of(trial.config, rows_of), column), []).append(best)
    cells = {pair: Cell(max(them), median(them), len(them)) for pair, them in values.items()}
    order = sorted(cells, key=lambda pair: -cells[pair].best)
    rows, columns = (list(dict.fromkeys(pair[side] for pair in order)) for side in (0, 1))
    return Crossing(rows_of, columns_of, rows, columns, cells)
