"""The trials of a Tune run: each configuration once, in order, at a cost that does not grow with their number."""

from ray import tune
from ray.tune.experiment import Experiment

from raydml.study.listed_trials import ListedTrials
from raydml.study.scheduler import trial_key


class Trainable(tune.Trainable):
    """A trial that is never run."""


class Config(dict):
    """A configuration that must not be copied for another trial."""

    def __deepcopy__(self, memo):
        raise AssertionError("a configuration was copied")


def experiment(folder):
    return Experiment("run-000", run=Trainable, storage_path=str(folder), trial_name_creator=trial_key)


def listed(folder, num_trials, **options):
    trials = ListedTrials([Config(key=f"search-{number:03d}") for number in range(num_trials)], **options)
    trials.add_configurations([experiment(folder)])
    return trials


def test_each_configuration_is_one_trial_in_order_and_copied_by_none(tmp_path):
    trials = listed(tmp_path, 20)
    assert trials.total_samples == 20
    found = [trials.next_trial() for _ in range(20)]
    assert [trial_key(trial) for trial in found] == [f"search-{number:03d}" for number in range(20)]
    assert [str(trial) for trial in found] == [trial_key(trial) for trial in found]
    assert len({trial.trial_id for trial in found}) == 20
    assert not trials.is_finished()
    assert trials.next_trial() is None
    assert trials.is_finished()


def test_no_more_trials_than_allowed_are_handed_out_before_one_ends(tmp_path):
    trials = listed(tmp_path, 3, max_concurrent=2)
    first, _ = trials.next_trial(), trials.next_trial()
    assert trials.next_trial() is None
    assert not trials.is_finished()
    first.set_status("TERMINATED")
    assert trial_key(trials.next_trial()) == "search-002"
