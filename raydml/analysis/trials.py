"""What one trial did, as plain values: its configuration, its epochs and how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from raydml.config.recipe import flatten

#: How a trial ended, in words.
ENDINGS = {
    "finished": "ran to the end",
    "stopped_early": "stopped early",
    "non_finite_loss": "non-finite loss",
    "collapsed": "collapsed",
    "crashed": "crashed",
    "": "not ended",
}
#: Blocks of a configuration that are chosen by name.
CHOICES = ("loss", "method", "miner", "sampler", "regularizers")
FAILURES = ("non_finite_loss", "collapsed", "crashed")


class TrialHistory(NamedTuple):
    """epochs: number of the epoch -> its metrics, in order; best: of the metric that trials are ranked by."""

    trial: str
    stage: str
    recipe: str
    config: Mapping[str, Any]
    epochs: Mapping[int, Mapping[str, float]]
    best: float | None
    epoch_of_best: int | None
    ended: str
    error: str | None = None
    fingerprint: str = ""

    @property
    def num_epochs(self) -> int:
        return max(self.epochs, default=0)

    @property
    def num_planned_epochs(self) -> int:
        return int(self.config.get("epochs") or self.num_epochs)

    @property
    def fold(self) -> int | None:
        fold: int | None = self.config.get("data", {}).get("split", {}).get("fold")
        return fold

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def metrics(self) -> list[str]:
        """Names of what its epochs report, in order of appearance."""
        return list(dict.fromkeys(name for metrics in self.epochs.values() for name in metrics))

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(epoch, value) of the epochs that have this metric."""
        return [(epoch, metrics[metric]) for epoch, metrics in sorted(self.epochs.items()) if metric in metrics]


def level_of(config: Mapping[str, Any], choice: str) -> str:
    """The name of what a trial chose for a block of `CHOICES`: ``margin``; ``none`` without one; ``mdr + rho``."""
    block = config.get(choice) or {}
    if choice == "regularizers":
        return " + ".join(sorted(block)) or "none"
    return str(block.get("name", "none"))


def parameters_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as parameters that mean the same in every trial: ``loss`` and ``loss.margin.beta``.

    The names of the choices are parameters of their own, and the settings of a choice carry its name: the beta of one
    loss is not that of another. The seed is none.
    """
    flat: dict[str, Any] = {choice: level_of(config, choice) for choice in CHOICES}
    for name, value in flatten({key: block for key, block in config.items() if key != "seed"}).items():
        block, _, rest = name.partition(".")
        if block == "regularizers":
            flat[name] = value
        elif block in CHOICES:
            if rest and rest != "name":
                flat[f"{block}.{flat[block]}.{rest}"] = value
        else:
            flat[name] = value
    return flat


def varying(parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the parameters that differ among the trials that have them, in order of appearance."""
    names = dict.fromkeys(name for one in parameters for name in one)
    return [name for name in names if len({repr(one[name]) for one in parameters if name in one}) > 1]


def by_stage(trials: Iterable[TrialHistory], stage: str) -> list[TrialHistory]:
    return [trial for trial in trials if trial.stage == stage]
