"""The trials of one Tune run, which are all known before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ray.tune.experiment import Experiment, Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search.basic_variant import BasicVariantGenerator


class ListedTrials(BasicVariantGenerator):
    """Gives Tune one trial for each configuration, in their order, when Tune asks for the next one.

    A trial costs the same however many there are. Tune's own grid search copies all configurations for each trial:
    of 1,000 trials that takes minutes, of 10,000 hours.

    configs: of the trials; each is the value ``config["run"]`` of its trial. max_concurrent: how many run at once at
    most, 0 for no bound. Deriving from Tune's generator keeps how many trials Tune asks for in advance.
    """

    def __init__(self, configs: Sequence[dict[str, Any]], max_concurrent: int = 0) -> None:
        super().__init__(max_concurrent=max_concurrent)
        self._configs = configs

    def add_configurations(self, experiments: list[Experiment]) -> None:
        """Take the one experiment of the run, whose settings each trial gets. Raises ValueError for several."""
        (experiment,) = experiments
        self._total_samples = len(self._configs)
        self._trial_generator = self._trials(experiment.spec)

    def _trials(self, spec: dict[str, Any]) -> Iterator[Trial]:
        parser = _make_parser()
        for number, config in enumerate(self._configs):
            yield _create_trial_from_spec(
                {**spec, "config": {"run": config}},
                parser,
                trial_id=f"{self._uuid_prefix}{number:05d}",
                experiment_tag=str(number),
            )

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Save nothing: a restart is a new Tune run over the trials that have not ended."""
