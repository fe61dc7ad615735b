"""Searches of hyperparameters against each other, in simulated studies: how good a configuration after how many epochs.

    python benchmarks/search.py grocery --seeds 100 --json /tmp/search_grocery.json
    python benchmarks/search.py omniglot --only tpe+promotion --slots 4

A study is simulated event by event, without Ray and without training: a searcher of raydml is asked for the next
configuration when a slot is free, the scheduler that a study has decides after each epoch, and the epochs come from
benchmarks/search_surrogate.py. Every epoch takes the same time. An arm is a searcher and a scheduler, the latter with
the settings of the space, and perhaps `balance`; all of them run 60 trials with each seed.

- chosen: the value without noise (at its best epoch of all) of the configuration with the best report so far. top 3:
  the best such value of the three configurations with the best reports: what `confirm` can find. Median over the seeds
  after so many epochs of all trials, and with quartiles at the end.
- reached: epochs until that median is what random search with ASHA has after its last trial; in brackets, the share of
  the epochs that random search with ASHA takes in all. It may itself be there earlier.
- losses ranked: trials drawn until the best reported value of each loss ranks the losses as the whole space does, with
  Kendall's tau >= 0.8, from then on to the end; in brackets, the share of studies that end so. The whole space: the
  best of 3,000 random configurations, without noise.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from search_surrogate import Surrogate
from search_table import FOLDER
from simulated_study import Report, SimulatedStudy, draws_of, scheduler_of

from raydml.search_space.domains import Address, random_pick, resolve
from raydml.search_space.points import Point, Value, recording

REFERENCE = "random+asha"
ARMS = (
    *("random+none", "random+sync", "random+promotion", "random+pasha", "random+hyperband"),
    *("priors+asha", "priors+promotion"),
    *("tpe+asha", "tpe+promotion", "gp+asha", "gp+promotion"),
)
LOSS: Address = ("loss, miner",)  # where the spaces choose a loss
TAU = 0.8
NUM_OF_SPACE = 3000  # random configurations that stand for the whole space
BUDGET = 120  # epochs of a column
NUM_CONFIRMED = 3


@dataclass(frozen=True)
class Outcome:
    """One simulated study. chosen, top: after each epoch. ranked_after: trials; None where losses end in disorder."""

    chosen: NDArray[np.float64]
    top: NDArray[np.float64]
    ranked_after: int | None


def tau(values: Sequence[float], others: Sequence[float]) -> float:
    """Return Kendall's tau (a) of two rankings: a pair that is a tie in one of them counts as half right."""
    signs = [np.sign(np.subtract.outer(ranked, ranked)) for ranked in map(_without_infinity, (values, others))]
    above = np.triu_indices(len(values), 1)
    return float((signs[0] * signs[1])[above].mean())


def _without_infinity(values: Sequence[float]) -> NDArray[np.float64]:
    return np.nan_to_num(np.array(values, float), neginf=-1.0)


def outcome(
    reports: Sequence[Report], points: Sequence[Point], truths: Sequence[float], best: Sequence[float]
) -> Outcome:
    """Return what a study has found. truths: of its trials. best: of each loss in the whole space."""
    chosen, top = [], []
    found, reported = [-np.inf] * len(best), dict[int, float]()
    ranked_after: int | None = None
    for report in reports:
        reported[report.index] = max(report.value, reported.get(report.index, -np.inf))
        order = [truths[index] for index in sorted(reported, key=lambda index: -reported[index])]
        chosen.append(order[0])
        top.append(max(order[:NUM_CONFIRMED]))
        loss = int(points[report.index][LOSS])
        if report.value > found[loss]:
            found[loss] = report.value
            if tau(found, best) < TAU:
                ranked_after = None
            elif ranked_after is None:
                ranked_after = report.num_drawn
    return Outcome(np.array(chosen), np.array(top), ranked_after)


def best_of_losses(surrogate: Surrogate) -> list[float]:
    """Return the best value of each loss in the whole space."""
    found: dict[int, float] = {}
    for index in range(NUM_OF_SPACE):
        point: dict[Address, Value] = {}
        resolve(surrogate.space.trial, recording(random_pick(surrogate.space.study.seed, index, 1, {}), point))
        loss = int(point[LOSS])
        found[loss] = max(found.get(loss, 0.0), float(surrogate.truth(point).max()))
    return [found[loss] for loss in sorted(found)]


def run_arm(
    arm: str, slots: int, surrogate: Surrogate, seeds: int, num_trials: int, best: Sequence[float]
) -> list[Outcome]:
    """Return the outcomes of an arm for each seed. best: of each loss."""
    searcher, scheduler, *others = arm.split("+")
    space = surrogate.space
    outcomes = []
    for seed in range(seeds):
        study = SimulatedStudy(
            draws=draws_of(space, searcher, seed, num_trials, is_balanced="balance" in others),
            curve_of=lambda point, seed=seed: surrogate.observed(point, seed).tolist(),
            scheduler=scheduler_of(scheduler, space, surrogate.num_epochs, num_trials),
            num_trials=num_trials,
            num_slots=slots,
            first_rung=math.inf if scheduler == "none" else space.study.search.grace_epochs,
        ).run()
        points = [trial.drawn.point for trial in study.trials]
        truths = [float(surrogate.truth(point).max()) for point in points]
        outcomes.append(outcome(study.reports, points, truths, best))
    return outcomes


def quartiles(curves: Sequence[NDArray[np.float64]]) -> list[list[float]]:
    """Return low quartile, median and high quartile after each epoch. A study that is over keeps its last value."""
    longest = max(map(len, curves))
    padded = np.stack([np.pad(curve, (0, longest - len(curve)), mode="edge") for curve in curves])
    return np.round(np.quantile(padded, [0.25, 0.5, 0.75], axis=0), 5).tolist()


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what the table shows of an arm, with the quartiles after each epoch."""
    ranked = [np.inf if one.ranked_after is None else one.ranked_after for one in outcomes]
    after = statistics.median(ranked)
    return {
        "epochs": statistics.median(len(one.chosen) for one in outcomes),
        "chosen": quartiles([one.chosen for one in outcomes]),
        "top": quartiles([one.top for one in outcomes]),
        "ranked_after": None if np.isinf(after) else after,
        "ranked_share": float(np.mean(np.isfinite(ranked))),
    }


def epochs_to(value: float, medians: Sequence[float]) -> int | None:
    """Return after how many epochs the median is first at least a value."""
    return next((epoch for epoch, median in enumerate(medians, 1) if median >= value), None)


def main() -> None:
    """Run the arms, print their table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(path.stem for path in FOLDER.glob("*.json")))
    parser.add_argument("--only", nargs="+", default=ARMS, help="arms; the reference is added")
    parser.add_argument("--slots", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    surrogate = Surrogate.of(arguments.table)
    best = best_of_losses(surrogate)
    print("best of each loss:", ", ".join(f"{value:.4f}" for value in best), flush=True)
    names = [f"{name} {what}" for name in ("chosen", "top 3") for what in (f"after {BUDGET}", "at the end", "reached")]
    table = Table("arm", "slots", "epochs", *names, "losses ranked", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows: list[dict[str, Any]] = []
    reference: dict[str, Any] = {}
    for slots in arguments.slots:
        for arm in dict.fromkeys([REFERENCE, *arguments.only]):
            row = summary(run_arm(arm, slots, surrogate, arguments.seeds, arguments.trials, best))
            if arm == REFERENCE:
                reference = row
            after = row["ranked_after"]
            cells = [arm, str(slots), f"{row['epochs']:.0f}"]
            for name in ("chosen", "top"):
                low, median, high = row[name]
                reached = epochs_to(reference[name][1][-1], median)
                row[f"{name}_reached"] = reached
                cells += [
                    f"{median[min(BUDGET, len(median)) - 1]:.4f}",
                    f"{median[-1]:.4f} ({low[-1]:.4f} to {high[-1]:.4f})",
                    "never" if reached is None else f"{reached} ({reached / reference['epochs']:.2f})",
                ]
            ranked = f"{'never' if after is None else f'{after:.0f}'} ({row['ranked_share']:.2f})"
            rows.append({"arm": arm, "slots": slots, **row})
            table.add_row(*cells, ranked)
            print(f"{arm}, {slots} slots: {' '.join(cells[2:])}", flush=True)
    Console(width=180).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({**vars(arguments), "json": None, "best_of_losses": best, "rows": rows}))


if __name__ == "__main__":
    main()
