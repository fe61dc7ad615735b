"""Trials that are drawn while a search runs: the same ones, whenever the driver is killed and whoever comes first."""

import random

import pytest
from ray.tune.experiment import Experiment

from raydml.config.trial import fingerprint
from raydml.study import events, runner
from raydml.study.drawing import DrawnSearch, trials_of_search
from raydml.study.events import events_path, read_state
from raydml.study.extension import extend_search
from raydml.study.folder import create_study, read_study, specification_of
from raydml.study.listed_trials import ListedTrials
from tests.searchers.spaces import space_at
from tests.study.study_events import ended, epoch

OVERRIDES = ("study.search.num_trials=9", "study.search.searcher={name: tpe, num_random: 2}")
SYNC = (*OVERRIDES, "study.search.scheduler=sync", "study.search.generation=3", "trial.epochs=3")


def made(folder, *overrides):
    folder.mkdir(exist_ok=True)
    return create_study(
        space_at(folder, *overrides), storage=folder / "studies", tracking_uri="sqlite:///x.db", space_text="text"
    )


def value_of(trial):
    """A result that depends on the configuration alone, as that of a trial on a CPU does."""
    return int(fingerprint(trial), 16) % 1000 / 1000


def run(folder, order):
    """Let all trials reach the first rung, each time the waiting one that `order` picks; return them by key."""
    search, path = DrawnSearch(folder, read_study(folder)), events_path(folder)
    state = read_state(folder)
    running = [key for key in search.trials if key not in state.trials or not state.trials[key].num_epochs]
    while running or not search.is_over:
        while (drawn := search.next(is_slot_free=not running)) is not None:
            running.append(drawn[0])
        assert running, "nothing runs, and no trial is drawn"
        key = running.pop(order.randrange(len(running)))
        number = int(key.rpartition("-")[2])
        trial = search.trials[key]
        config = trial.model_dump(mode="json")
        events.append(path, {"event": "trial_started", "trial": key, "stage": "search", "config": config,
                             "fingerprint": fingerprint(trial), "configuration": "", "gpus": 0.0})  # fmt: skip
        if number == 1:  # it diverges
            events.append(path, ended(number, "non_finite_loss"))
        else:
            events.append(path, epoch(number, 1, value_of(trial)))
    return search.trials


def names(trials):
    return {key: fingerprint(trial) for key, trial in trials.items()}


def test_with_sync_the_trials_are_the_same_in_any_order_of_arrival(tmp_path):
    found = [names(run(made(tmp_path / str(seed), *SYNC), random.Random(seed))) for seed in range(2)]
    assert len(found[0]) == 9
    assert found[0] == found[1]


def test_with_sync_they_are_the_same_after_a_kill_at_any_event(tmp_path):
    folder = made(tmp_path / "whole", *SYNC)
    expected = names(run(folder, random.Random(0)))
    lines = events_path(folder).read_bytes().splitlines(keepends=True)
    assert sum(b'"trial_drawn"' in line for line in lines) == 7
    for number in range(1, len(lines), 4):  # each takes a second
        events_path(folder).write_bytes(b"".join(lines[:number]))
        assert names(run(folder, random.Random(number))) == expected, number


def test_results_change_what_is_drawn_later(tmp_path, monkeypatch):
    expected = names(run(made(tmp_path / "a", *SYNC), random.Random(0)))
    monkeypatch.setattr(
        "tests.study.test_drawing.value_of", lambda trial: 1 - int(fingerprint(trial), 16) % 1000 / 1000
    )
    found = names(run(made(tmp_path / "b", *SYNC), random.Random(0)))
    assert [expected[key] == found[key] for key in sorted(expected)] == [True] * 3 + [False] * 6, "the first generation"


def test_without_sync_a_trial_is_drawn_when_a_slot_is_free(tmp_path):
    folder = made(tmp_path / "a", *OVERRIDES)
    search = DrawnSearch(folder, read_study(folder))
    assert list(search.trials) == ["search-000", "search-001"]
    assert search.next(is_slot_free=False) is None
    key, trial = search.next()
    assert key == "search-002"
    state = read_state(folder)
    assert state.drawn[key].config == trial.model_dump(mode="json")
    known = trials_of_search(read_study(folder), state.drawn)
    assert names(known) == names(search.trials)


def test_a_killed_study_goes_on_from_the_same_results_with_the_same_trial(tmp_path):
    """Also where trials stop at different moments, as with asha: events are all that a draw depends on."""
    folder = made(tmp_path / "a", *OVERRIDES)
    search = DrawnSearch(folder, read_study(folder))
    for number in range(4):
        trial = search.trials.get(f"search-{number:03d}") or search.next()[1]
        events.append(events_path(folder), epoch(number, 1, value_of(trial)))
        if number != 2:
            events.append(events_path(folder), ended(number, "stopped_early"))
    before = events_path(folder).read_bytes()
    _, expected = search.next()
    events_path(folder).write_bytes(before)
    _, again = DrawnSearch(folder, read_study(folder)).next()
    assert fingerprint(again) == fingerprint(expected)


def test_a_space_without_a_further_configuration_ends_the_search_with_a_note(tmp_path):
    text = """
study: {name: few, search: {num_trials: 6, searcher: {name: tpe, num_random: 2}}}
trial:
  data: {name: digits, resize_px: 16, crop_px: 16}
  model: {backbone: convnet, weights: none, embedding_dim: 16}
  loss: {choice: [{name: contrastive}, {name: triplet}, {name: margin}]}
  sampler: {name: class_balanced, classes_per_batch: {choice: [2, 64]}, images_per_class: 4}
  optimizer: {name: adamw, learning_rate: 1.0e-3}
"""
    tmp_path.joinpath("a").mkdir()
    space = space_at(tmp_path / "a", text=text)
    folder = create_study(space, storage=tmp_path / "studies", tracking_uri="sqlite:///x.db", space_text="text")
    search = DrawnSearch(folder, read_study(folder))
    # Digits have 5 classes to train on: batches of 2 and of 64 classes differ by no more than 2 and 3 or so.
    while search.next() is not None:
        pass
    assert search.is_over
    assert search.num_trials == len(search.trials) <= 6


def test_checkpoints_of_a_trial_whose_draw_was_lost_are_not_taken_for_those_of_the_next_one(tmp_path):
    folder = made(tmp_path / "a", *OVERRIDES)
    left = folder / "search" / "run-000" / "search-002" / "checkpoint_000000"
    kept = folder / "search" / "run-000" / "search-001" / "checkpoint_000000"
    for path in (left, kept):
        path.mkdir(parents=True)
    started_and_at(folder, 1, 1, 0.5)
    DrawnSearch(folder, read_study(folder))
    assert not left.exists()
    assert kept.exists()


@pytest.mark.parametrize("name", ["random", "grid"])
def test_a_searcher_without_results_leaves_the_study_as_it_was_before_there_were_any(tmp_path, name):
    study = read_study(made(tmp_path / "a", "study.search.num_trials=3", f"study.search.searcher={{name: {name}}}"))
    assert "points" not in study
    assert len(study["trials"]) == 3


def test_a_longer_search_keeps_the_trials_that_were_drawn_and_draws_the_others(tmp_path):
    folder = made(tmp_path / "a", *SYNC)
    before = names(run(folder, random.Random(0)))
    extend_search(folder, 12)
    study = read_study(folder)
    assert (len(study["trials"]), len(study["points"]), study["num_known"]) == (12, 12, 2)
    after = names(run(folder, random.Random(1)))
    assert len(after) == 12
    assert {key: after[key] for key in before} == before
    straight = names(run(made(tmp_path / "b", *SYNC, "study.search.num_trials=12"), random.Random(2)))
    assert after == straight, "as if it had been that long from the start"


def test_weights_and_images_are_prepared_once_also_for_what_no_planned_trial_has(tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr(
        "raydml.study.drawing.prepare_images", lambda _machine, trials, _catalogs: prepared.append(trials)
    )
    folder = made(tmp_path / "a", *OVERRIDES)
    study = read_study(folder)
    for trial in study["trials"]:
        trial["data"]["resize_px"] = 20  # no drawn trial has this size
    search = DrawnSearch(folder, {**study, **specification_of(study["study"], study["trials"])})
    drawn = [search.next()[1] for _ in range(3)]
    assert prepared == [[drawn[0]]]


def started_and_at(folder, number, epoch_number, value):
    key = f"search-{number:03d}"
    events.append(events_path(folder), {"event": "trial_started", "trial": key, "stage": "search", "config": {}})
    events.append(events_path(folder), epoch(number, epoch_number, value))


def test_with_sync_only_values_at_the_first_rung_count_and_memory_is_not_waited_for(tmp_path):
    """Later epochs may or may not be there yet; a trial without memory runs again after all others."""
    folder = made(tmp_path / "a", *SYNC)
    search = DrawnSearch(folder, read_study(folder))
    search.next()
    for number, value in ((0, 0.2), (1, 0.3)):
        started_and_at(folder, number, 1, value)
    assert search.next() is None, "the third of the generation has no result"
    retried = {
        "event": "trial_retried",
        "trial": "search-002",
        "stage": "search",
        "reason": "out_of_memory",
        "error": "x",
    }
    events.append(events_path(folder), retried)
    known = events_path(folder).read_bytes()
    _, expected = search.next()
    events_path(folder).write_bytes(known)
    events.append(events_path(folder), epoch(0, 2, 0.9))
    _, again = DrawnSearch(folder, read_study(folder)).next()
    assert fingerprint(again) == fingerprint(expected), "an epoch after the first rung changes nothing"


def test_values_of_trials_that_wait_at_a_rung_change_what_is_drawn(tmp_path):
    drawn = []
    for turned in (False, True):
        folder = made(
            tmp_path / str(turned), *OVERRIDES, "study.search.scheduler=promotion", "study.search.num_trials=20"
        )
        search = DrawnSearch(folder, read_study(folder))
        for number in range(12):
            trial = search.trials.get(f"search-{number:03d}") or search.next()[1]
            value = value_of(trial)
            started_and_at(folder, number, 1, 1 - value if turned else value)
        drawn.append(list(names(search.trials).values()))
    assert drawn[0][:2] == drawn[1][:2]
    assert drawn[0] != drawn[1]


def test_a_study_whose_file_was_lost_is_made_again_with_its_drawn_trials(tmp_path):
    folder = made(tmp_path / "a", *SYNC)
    run(folder, random.Random(0))
    events.append(events_path(folder), {"event": "study_started", "study": "spaces", "study_id": "abc", "config": {}})
    (folder / "study.json").unlink()
    again = create_study(
        space_at(tmp_path / "a", *SYNC), storage=folder.parent, tracking_uri="sqlite:///x.db", space_text="text"
    )
    assert read_study(again)["study_id"] == "abc"


def test_an_eliminated_option_stays_without_trials(tmp_path):
    """Also where a trial that runs on would let it win: the note and the report have said so."""
    folder = made(tmp_path / "a", *OVERRIDES, "study.search.balance=loss", "study.search.num_trials=30")
    text = "search.balance: margin + distance_weighted gets no further trials after 5: by their values at epoch 1, ..."
    events.append(events_path(folder), {"event": "note", "text": text})
    search = DrawnSearch(folder, read_study(folder))
    while search.next() is not None:
        pass
    losses = [trial.loss.name for trial in search.trials.values()]
    assert losses.count("margin") == 5, "its fair share"
    assert "margin" not in losses[15:]


def test_slots_are_counted_with_the_shares_of_the_trials_and_not_at_every_step(monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "num_slots", lambda session, trials: asked.append((session, trials)) or 4)
    slots = runner._Slots("session", {"a": 1, "b": 2})
    assert [slots.number() for _ in range(3)] == [4, 4, 4]
    assert asked == [("session", [1, 2])]
    monkeypatch.setattr(runner, "_SLOTS_EVERY_S", -1.0)
    slots.number()
    assert len(asked) == 2


def test_a_trial_is_drawn_for_a_free_slot_and_a_waiting_one_holds_none():
    """`ListedTrials` counts what runs or is about to: with room for two, the third is drawn when one pauses or ends."""
    drawn = []

    def later(num_running):
        if num_running >= 2 or len(drawn) == 4:
            return None, len(drawn) == 4
        drawn.append(num_running)
        return {"key": f"t{len(drawn)}"}, False

    listed = ListedTrials([], later=later)
    listed.add_configurations([Experiment("x", lambda _: None)])
    first, second = listed.next_trial(), listed.next_trial()
    assert (listed.next_trial(), listed.is_finished()) == (None, False)
    first.set_status("RUNNING")
    first.set_status("PAUSED")
    third = listed.next_trial()
    assert third.config["run"]["key"] == "t3"
    assert listed.next_trial() is None
    second.set_status("TERMINATED")
    assert listed.next_trial().config["run"]["key"] == "t4"
    third.set_status("TERMINATED")
    assert (listed.next_trial(), listed.is_finished()) == (None, True)
    limited = ListedTrials([{"key": "a"}, {"key": "b"}], max_concurrent=1)
    limited.add_configurations([Experiment("x", lambda _: None)])
    waiting = limited.next_trial()
    assert limited.next_trial() is None
    waiting.set_status("PAUSED")
    assert limited.next_trial().config["run"]["key"] == "b"
