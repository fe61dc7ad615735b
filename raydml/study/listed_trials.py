"""The trials of one Tune run: those that are known before it starts, and those that are drawn while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.experiment import Experiment, Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search.basic_variant import BasicVariantGenerator


class ListedTrials(BasicVariantGenerator):
    """Gives Tune one trial for each configuration, in their order, when Tune asks for the next one.

    A trial costs the same however many there are. Tune's own grid search copies all configurations for each trial:
    of 1,000 trials that takes minutes, of 10,000 hours.

    configs: of the trials; each is the value ``config["run"]`` of its trial. max_concurrent: how many run at once at
    most, 0 for no bound. later: number of the trials that run, or wait for a slot -> the next config, or None while
    there is none; and whether none comes any more. Deriving from Tune's generator keeps how many trials Tune asks for
    at once.
    """

    def __init__(
        self,
        configs: Sequence[dict[str, Any]],
        max_concurrent: int = 0,
        later: Callable[[int], tuple[dict[str, Any] | None, bool]] | None = None,
    ) -> None:
        super().__init__(max_concurrent=max_concurrent)
        self._configs, self._later = configs, later
        self._number = 0
        self._running: list[Trial] = []  # those that have not ended

    def add_configurations(self, experiments: list[Experiment]) -> None:
        """Take the one experiment of the run, whose settings each trial gets. Raises ValueError for several."""
        (experiment,) = experiments
        self._total_samples = len(self._configs)
        self._spec, self._parser = experiment.spec, _make_parser()

    def next_trial(self) -> Trial | None:
        """Return the next trial, None where it has to wait or there is none."""
        self._running = [trial for trial in self._running if not trial.is_finished()]
        num_running = sum(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in self._running)
        # One that waits at a rung does not run: if it counted, the trials that it waits for would never start.
        if self.is_finished() or 0 < self.max_concurrent <= num_running:
            return None
        config = self._next_config(num_running)
        if config is None:
            return None
        trial = _create_trial_from_spec(
            {**self._spec, "config": {"run": config}},
            self._parser,
            trial_id=f"{self._uuid_prefix}{self._number:05d}",
            experiment_tag=str(self._number),
        )
        self._number += 1
        self._running.append(trial)
        return trial

    def _next_config(self, num_running: int) -> dict[str, Any] | None:
        if self._number < len(self._configs):
            return self._configs[self._number]
        config, is_over = None, True
        if self._later is not None:
            config, is_over = self._later(num_running)
        if config is None and is_over:
            self.set_finished()
        return config

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Save nothing: a restart is a new Tune run over the trials that have not ended."""
