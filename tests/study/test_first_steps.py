"""The first steps of each shape of trial: shares of GPUs and a forecast; a real study measures and keeps them."""

import json

import pytest
import ray

from raydml.config.sections import Sgd
from raydml.config.trial import Machine, fingerprint
from raydml.study import events
from raydml.study.drawing import trials_of_search
from raydml.study.events import events_path, read_state, reduce_events
from raydml.study.first_steps import (
    PROBE_FILE,
    _is_there,
    forecast_in_words,
    forecast_of,
    is_wanted,
    measure_shapes,
    shares,
    shares_in_words,
)
from raydml.study.folder import read_study, settings_of
from raydml.study.node import needs_of
from raydml.study.probe import by_shape, shape_key
from raydml.study.remote import StudyPlace
from raydml.study.runner import StudySession, num_slots, run_trials
from raydml.study.stages import run_study
from raydml.training.trial_images import Catalogs
from tests.study.small import leave_pictures_out
from tests.study.test_folder import make

GIB = 2**30


@pytest.mark.parametrize(
    ("settings", "gpus", "wanted"),
    [
        ({}, 1.0, True),
        ({}, 0.0, False),  # a CPU: only where somebody asks
        ({"probe": "on"}, 0.0, True),
        ({"probe": "off"}, 1.0, False),
        ({"gpus_per_trial": 0.5}, 0.5, False),
        ({"gpus_per_trial": 1}, 1.0, False),
        ({"ranks_per_trial": 2}, 2.0, False),
    ],
)
def test_the_first_steps_are_measured_where_they_decide_on_shares_or_somebody_asks(settings, gpus, wanted):
    assert is_wanted(Machine(**settings), {"cpu": 1.0, "gpu": gpus}) is wanted


def costs(**others):
    return {
        "seconds_per_step": 0.5, "validation_s": 1.0, "clustering_s": 0.0, "checkpoint_bytes": 10**8,
        "num_trials": 3, "device": "NVIDIA X", "device_bytes": 24 * GIB, "peak_memory_bytes": GIB, "busy": 0.2,
        **others,
    }  # fmt: skip


def test_each_shape_has_the_share_that_its_memory_needs_and_the_others_a_whole_gpu():
    known = {
        "small": costs(),
        "middle": costs(peak_memory_bytes=8 * GIB, num_trials=1),
        "large": costs(peak_memory_bytes=19 * GIB),
        "busy": costs(busy=0.9),
    }
    nodes = [{"Resources": {"GPU": 2.0, "CPU": 16.0}}, {"Resources": {"GPU": 1.0, "CPU": 4.0}}]
    found = shares(known, Machine(), 100, nodes)
    assert found == {"small": 0.25, "middle": 0.5}
    assert shares(known, Machine(), 3, nodes) == {}, "a GPU for each"
    assert shares(known, Machine(), 100, []) == {}, "no GPU has joined yet"
    assert shares(known, Machine(cpus_per_trial=3), 100, nodes) == {}, "the smaller node has CPUs for one trial"
    middle, small = sorted(shares_in_words(found, known), key=lambda text: text[0])
    assert "kept it busy for at most 20% of the time" in middle
    assert middle.startswith(
        "2 trials share a GPU: the first steps of one took at most 8 GiB of NVIDIA X, which has 24 GiB"
    )
    assert "(1 trial; machine.gpus_per_trial=1" in middle
    assert small.startswith("4 trials share a GPU: the first steps of one took at most 1 GiB")


def test_the_forecast_is_that_of_the_measured_steps(tmp_path):
    """3 trials of 2 epochs and 4 confirmed runs of 2, with 2 steps in an epoch: all by hand."""
    folder = make(tmp_path, overrides=["study.search.scheduler=none"])
    study_json = read_study(folder)
    study, machine = settings_of(folder, study_json)
    trials = list(trials_of_search(study_json).values())
    planned = [
        {"stage": "search", "num_trials": 3, "max_epochs": 2},
        {"stage": "confirm", "num_trials": 4, "max_epochs": 2},
    ]
    state = reduce_events([{"event": "study_started", "time": 5.0, "planned": planned, "config": {"search": {}}}])
    (key,) = by_shape(trials)
    found = forecast_of(
        {key: costs()}, study, state, trials, Catalogs(machine), held=lambda _: ("GPU-hours", 0.5), num_slots=2
    )
    epoch_s = 2 * 0.5 + 1.0
    assert found.device_hours == pytest.approx((3 * 2 + 4 * 2) * epoch_s * 0.5 / 3600)
    # Two starts of a stage, and of each trial; seven trials of two epochs, two at a time; 10 s for the report.
    assert found.seconds == pytest.approx(10.0 + 2 * 7.0 + (3 + 4) / 2 * (0.4 + 2 * epoch_s), rel=1e-6)
    assert found.disk_bytes == 10**8 * (3 + 4 + 2 * 2)
    assert (found.num_shapes, found.num_all) == (1, 1)
    assert forecast_in_words(found).startswith(
        "forecast from the first steps of 1 shape of trial: 39 s, 0.00389 GPU-hours"
    )
    assert forecast_of({}, study, state, trials, Catalogs(machine), held=None, num_slots=2) is None


@pytest.mark.parametrize(
    ("device", "kinds", "has_gpus", "is_there"),
    [
        ("NVIDIA A100-SXM4-80GB", ["A100"], True, True),
        ("NVIDIA A100-SXM4-80GB", ["T4", "A100"], True, True),
        ("NVIDIA A100-SXM4-80GB", ["T4"], True, False),  # the study goes on elsewhere
        ("NVIDIA A100-SXM4-80GB", [None], True, True),  # Ray does not know it
        ("cpu", [None], True, False),
        ("cpu", [None], False, True),
        ("NVIDIA T4", ["T4"], False, False),
    ],
)
def test_what_was_measured_on_another_kind_of_device_does_not_count(device, kinds, has_gpus, is_there):
    nodes = [{"Labels": {} if kind is None else {"ray.io/accelerator-type": kind}} for kind in kinds]
    row = costs(device=device)
    assert _is_there(row, nodes, has_gpus) is is_there
    assert not _is_there({key: value for key, value in row.items() if key != "busy"}, nodes, has_gpus)


def test_a_shape_is_also_its_optimizer_and_its_regularizers_and_no_warm_up(tmp_path):
    first = next(iter(trials_of_search(read_study(make(tmp_path))).values()))
    memory = {"cross_batch_memory": {"size": 150, "start_step": 2}}
    others = [
        first.model_copy(update={"optimizer": Sgd(name="sgd")}),
        first.model_copy(update={"regularizers": memory}),
    ]
    assert len(by_shape([first, *others])) == 3
    schedule = first.schedule.model_copy(update={"new_layer_warmup_epochs": 1})
    assert len(by_shape([first, first.model_copy(update={"schedule": schedule})])) == 1, "the probe trains without it"


def with_dim(trial, dim):
    return trial.model_copy(update={"model": trial.model.model_copy(update={"embedding_dim": dim})})


def test_trials_are_grouped_by_shape_in_the_order_of_the_first_ones(tmp_path):
    first = next(iter(trials_of_search(read_study(make(tmp_path))).values()))
    trials = [with_dim(first, dim) for dim in (16, 8, 16, 4)]
    groups = by_shape(trials)
    assert [[trial.model.embedding_dim for trial in group] for group in groups.values()] == [[16, 16], [8], [4]]
    assert [shape_key(group[0]) for group in groups.values()] == list(groups)


TWO_SHAPES = [
    "trial.model.embedding_dim={choice: [8, 16]}",
    "study.search={num_trials: 4, scheduler: none}",
    "study.confirm={top: 1, folds: 2, seeds: 1}",
    "machine.device=cpu",
]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_study_measures_its_shapes_once_and_says_how_far_the_forecast_was_off(tmp_path):
    folder = leave_pictures_out(make(tmp_path, overrides=[*TWO_SHAPES, "machine.probe=on"]))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        assert run_study(folder).status == "finished"
        known = json.loads((folder / PROBE_FILE).read_text())["shapes"]
        assert sorted(row["num_trials"] for row in known.values()) == [2, 2]
        for row in known.values():
            assert row["device"] == "cpu"
            assert 0 < row["seconds_per_step"] < 5
            assert 1e8 < row["peak_memory_bytes"] < 1e10
            assert 1e4 < row["checkpoint_bytes"] < 1e8
        state = read_state(folder)
        assert state.forecast.unit == "CPU-hours"
        assert {trial.device for trial in state.trials.values()} == {"cpu"}
        assert any("forecast from the first steps of 2 shapes of trial" in note for note in state.notes)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["forecast"]["seconds"] == state.forecast.seconds
        begun = next(event["time"] for event in events.read(events_path(folder)) if event["event"] == "forecast")
        assert summary["forecast"]["took_seconds"] == pytest.approx(state.time_s - begun, abs=5)
        assert "the forecast was" in (folder / "summary.md").read_text()
        # What is known is not measured again, and another shape is.
        third = with_dim(next(iter(trials_of_search(read_study(folder)).values())), 4)
        place = StudyPlace.of(folder)
        again = measure_shapes(
            folder, [*trials_of_search(read_study(folder)).values(), third], settings_of(folder, read_study(folder))[1],
            needs_of(place, None, joined=False), place, {"num_cpus": 1}, [],
            is_stopping=lambda: False, note=pytest.fail,
        )  # fmt: skip
        assert {key: again[key] for key in known} == known
        assert again.keys() - known.keys() == {shape_key(third)}
        # What fails, or takes too long, or is broken off by a signal is not kept.
        notes, before = [], (folder / PROBE_FILE).read_text()
        broken = with_dim(third, 6).model_copy(update={"data": third.data.model_copy(update={"name": "nowhere"})})
        other = with_dim(third, 7)
        rest = folder, needs_of(place, None, joined=False), place
        machine = settings_of(folder, read_study(folder))[1]
        for trial, options in ((broken, {}), (other, {"patience_s": 0.0}), (other, {"is_stopping": lambda: True})):
            settings = {"is_stopping": lambda: False, "note": notes.append, **options}
            found = measure_shapes(rest[0], [trial], machine, *rest[1:], {"num_cpus": 1}, [], **settings)
            assert shape_key(trial) not in found
        assert [note.partition(" could")[0] for note in notes] == ["the first steps of 1 trial"] * 2
        assert notes[0].endswith("could not be measured: cure: write one of the choices"), "the end of its error"
        assert notes[1].endswith("no answer within 0 s")
        assert json.loads((folder / PROBE_FILE).read_text()) == json.loads(before)
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_small_and_large_trials_share_a_gpu_as_their_shares_allow(tmp_path):
    """The GPU is one that Ray only counts, and the trials train on the CPU."""
    folder = make(tmp_path, overrides=[*TWO_SHAPES, "trial.epochs=50"])  # longer than a second process takes to start
    study_json = read_study(folder)
    study, machine = settings_of(folder, study_json)
    trials = dict(sorted(trials_of_search(study_json).items(), key=lambda pair: pair[1].model.embedding_dim))
    small = {key for key, trial in trials.items() if trial.model.embedding_dim == 8}
    assert len(small) == 2
    share = {shape_key(trials[key]): 0.5 for key in small}
    place = StudyPlace.of(folder)
    ray.init(
        address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False
    )
    try:
        session = StudySession(
            folder, place, study, machine, "val_map_at_r", {"cpu": 1.0, "gpu": 1.0},
            needs_of(place, None, joined=False), {}, set(), shares=share,
        )  # fmt: skip
        assert num_slots(session, [trials[key] for key in small]) == 2
        assert num_slots(session, list(trials.values())) == 1
        states = run_trials(session, "search", trials, {key: fingerprint(one) for key, one in trials.items()}, "none")
    finally:
        ray.shutdown()
    assert {state.ended for state in states.values()} == {"finished"}
    assert {key: state.gpus for key, state in states.items()} == {key: 0.5 if key in small else 1.0 for key in states}
    held, most, together = {}, 0.0, False
    for event in events.read(events_path(folder)):
        if event["event"] == "trial_started":
            held[event["trial"]] = event["gpus"]
        elif event["event"] == "trial_ended":
            del held[event["trial"]]
        most = max(most, sum(held.values()))
        together |= held.keys() == small
    assert most <= 1.0
    assert together, "the two small ones never ran at the same time"
