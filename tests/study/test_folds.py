"""Several folds in a search: the paired test, who runs on further folds, and what is ranked by."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from raydml.analysis.trials import EpochReport, TrialState
from raydml.config.trial import fingerprint, parse_trial
from raydml.data.datasets import open_catalog
from raydml.data.splits import further_folds, make_split
from raydml.search_space.space import SpaceError
from raydml.study import events, runner
from raydml.study.budget import Budget
from raydml.study.events import StudyState, events_path, read_state, read_trials, reduce_events
from raydml.study.extension import extend_search
from raydml.study.folder import StudyError, newest_checkpoint, read_json
from raydml.study.folds import (
    further_trials,
    is_pruned,
    note_on_pruned,
    p_of_worse,
    p_values_of,
    rank_over_folds,
    runs_of_use,
)
from raydml.study.refit import configurations_to_refit
from raydml.study.results import find_winner
from raydml.study.retention import drop_checkpoints
from raydml.study.search_limit import Reached, SearchLimit
from raydml.study.stages import run_study
from raydml.study.summary import summarise
from raydml.study.warm_start import _points_of_study
from tests.study.in_process import without_ray
from tests.study.small import leave_pictures_out
from tests.study.study_events import epoch, stage_started, started, study_started
from tests.study.test_folder import make, space_at

METRIC = "val_map_at_r"


@pytest.mark.parametrize(
    ("fold", "num_folds", "expected"),
    [(0, 2, [1]), (2, 3, [3, 0]), (3, 4, [0, 1, 2]), (None, 2, [0]), (None, 4, [0, 1, 2]), (1, 1, [])],
)
def test_further_folds_go_on_from_the_own_one(fold, num_folds, expected):
    assert further_folds(fold, 4, num_folds) == expected


@pytest.mark.parametrize(
    ("values", "reference", "p"),
    [
        # All of n classes are worse: one of the 2^n ways to choose signs.
        ([0.1, 0.2, 0.3], [0.2, 0.4, 0.6], 1 / 8),
        ([0.1, 0.2, 0.3, 0.3], [0.2, 0.4, 0.6, 0.7], 1 / 16),
        # The smallest difference is a gain: of the sums of ranks, only 0 and its own 1 are as small.
        ([0.1, 0.2, 0.3, 0.8], [0.2, 0.4, 0.6, 0.75], 2 / 16),
        # The second largest is a gain, with rank 3: the sums of {}, 1, 2, 3 and 1 + 2 are as small.
        ([0.1, 0.2, 0.6, 0.1], [0.2, 0.4, 0.3, 0.7], 5 / 16),
        ([0.5, 0.5], [0.5, 0.5], 1.0),
        ([0.3] * 5, [0.1 + 0.2] * 5, 1.0),  # equal but for their last bits
    ],
)
def test_p_is_the_share_of_signs_with_as_small_a_sum_of_ranks_of_gains(values, reference, p):
    assert p_of_worse(values, reference) == pytest.approx(p)


def test_many_equal_classes_outvote_a_few_losses():
    reference = [1.0] * 40
    assert p_of_worse([0.9, 0.8, 0.7, 0.6] + [1.0] * 36, reference) > 0.1, "without the equal ones p would be 1/16"
    assert p_of_worse([0.5 + 0.01 * n for n in range(20)] + [1.0] * 20, reference) < 0.01


def state(key, value=None, *, ended="finished", class_values=(), fold=0, epoch=1):
    reports = {} if value is None else {epoch: EpochReport({METRIC: value})}
    config = {"data": {"split": {"fold": fold}}}
    return TrialState(
        key, "search", METRIC, config, f"print-{key}", reports=reports, num_epochs=epoch, state=ended,
        class_values=class_values,
    )  # fmt: skip


GOOD, CLOSE, BAD = (0.9, 0.8, 0.7, 0.6), (0.8, 0.9, 0.5, 0.65), (0.8, 0.6, 0.4, 0.2)
FIRST = [
    state("search-000", 0.50, class_values=BAD),
    state("search-001", 0.72, class_values=CLOSE),
    state("search-002", 0.99, ended="stopped_early"),
    state("search-003", 0.75, class_values=GOOD),
    state("search-004", 0.70),  # its values are not known
    state("search-005", ended="crashed"),
]


def test_each_trial_that_ran_to_its_end_is_compared_with_the_best_of_them():
    tested = p_values_of(FIRST)
    # By hand: the differences of CLOSE are -0.1, 0.1, -0.2 and 0.05; those of BAD are all losses, of 0.1 to 0.4.
    ways = sum(
        sum(rank for rank, sign in zip((2.5, 2.5, 4, 1), signs, strict=True) if sign) <= 2.5 + 1
        for signs in np.ndindex(2, 2, 2, 2)
    )
    assert list(tested) == ["search-003", "search-001", "search-004", "search-000"], "best first"
    assert [tested["search-003"], tested["search-004"]] == [None, None]
    assert tested["search-001"] == pytest.approx(ways / 16)
    assert tested["search-000"] == pytest.approx(1 / 16)
    assert [is_pruned(p) for p in tested.values()] == [False, False, False, True]
    assert note_on_pruned(tested) == (
        "1 of 4 configurations is significantly worse than the best on the first fold (Wilcoxon, p < 0.1) and is not "
        "trained on further folds"
    )
    assert note_on_pruned({}).endswith("none ran to its end on the first")
    assert note_on_pruned({"a": None, "b": 0.5}).startswith("none of the 2 configurations that ran to their end is ")


def test_trials_with_values_of_other_classes_are_not_compared():
    tested = p_values_of([state("search-000", 0.9, class_values=GOOD), state("search-001", 0.1, class_values=BAD[:3])])
    assert tested == {"search-000": None, "search-001": None}
    assert p_values_of([state("search-000", ended="crashed")]) == {}


def test_configurations_with_all_folds_come_first_by_their_mean():
    first = {
        one.trial: one
        for one in [
            state("search-000", 0.9),
            state("search-001", 0.8),
            state("search-002", 0.7),
            state("search-003", 0.6),
            state("search-004", 0.95, ended="stopped_early"),
            state("search-005", ended="crashed"),
        ]
    }
    tested = {"search-000": None, "search-001": 0.3, "search-002": 0.2, "search-003": 0.01}
    further = {
        one.trial: one
        for one in [
            state("search-000-fold-1", 0.2, fold=1),
            state("search-001-fold-1", 0.9, fold=1, epoch=3),
            state("search-002-fold-1", 0.99, fold=1, ended="non_finite_loss"),
        ]
    }
    rows = rank_over_folds(first, tested, further, 2)
    assert [(row["trial"], row["num_folds"], row["value"]) for row in rows] == [
        ("search-001", 2, pytest.approx(0.85)),
        ("search-000", 2, pytest.approx(0.55)),
        ("search-004", 1, 0.95),
        ("search-002", 1, 0.7),  # its second fold failed
        ("search-003", 1, 0.6),
        ("search-005", 1, None),
    ]
    assert [row["pruned"] for row in rows] == [False, False, False, False, True, False]
    assert [row["p"] for row in rows] == [0.3, None, None, 0.2, 0.01, None]
    assert rows[0]["runs"] == [
        {"trial": "search-001", "fold": 0, "value": 0.8, "epoch_of_best": 1, "ended": "finished"},
        {"trial": "search-001-fold-1", "fold": 1, "value": 0.9, "epoch_of_best": 3, "ended": "finished"},
    ]
    # With three folds a second one is not enough.
    assert [row["num_folds"] for row in rank_over_folds(first, tested, further, 3)] == [1] * 6
    assert runs_of_use(rows, 2) == {"search-001", "search-001-fold-1", "search-000", "search-000-fold-1"}
    assert runs_of_use(rows, 1) == {"search-001", "search-001-fold-1", "search-000"}


K2 = ("study.search.folds=2", "study.search.scheduler=none", "study.confirm=null", "trial.epochs=1")
#: An embedding of two numbers tells the digits apart less well.
SOME_ARE_WORSE = (
    "study.search.num_trials=5",
    "trial.model.embedding_dim={choice: [2, 32]}",
    "trial.optimizer.learning_rate={loguniform: [1e-4, 1.2e-4]}",
)
#: Four classes train and four validate.
FOUR = ("trial.data.split={order: sorted, test_fraction: 0.2, num_folds: 2, fold: 1}",)


def test_further_trials_are_the_trials_on_the_other_folds_best_first(tmp_path):
    space = space_at(tmp_path, overrides=["study.search.folds=3", "trial.data.split.num_folds=4", *FOUR_OF_TEN])
    base = {"data": {"name": "digits", "resize_px": 8, "crop_px": 8, "split": {"num_folds": 4, "fold": 3}}}
    base |= {"model": {"backbone": "convnet", "weights": "none", "embedding_dim": 8}, "loss": {"name": "contrastive"}}
    base |= {"sampler": {"name": "uniform", "batch_size": 8}}
    trials = {f"search-00{n}": parse_trial({**base, "seed": n}) for n in range(3)}
    tested = {"search-002": None, "search-001": 0.01, "search-000": 0.5}
    found = further_trials(tested, trials, space.study)
    assert [(key, first, one.data.split.fold, one.seed) for key, (first, one) in found.items()] == [
        ("search-002-fold-0", "search-002", 0, 2),
        ("search-002-fold-1", "search-002", 1, 2),
        ("search-000-fold-0", "search-000", 0, 0),
        ("search-000-fold-1", "search-000", 1, 0),
    ]
    same = [
        one.model_dump(exclude={"data"}) == trials[first].model_dump(exclude={"data"}) for first, one in found.values()
    ]
    assert all(same)


FOUR_OF_TEN = ("trial.data.split.test_fraction=0.2",)


@pytest.fixture
def here(monkeypatch):
    without_ray(monkeypatch)


def run(folder, **options):
    assert run_study(leave_pictures_out(folder), **options).status == "finished"
    return folder


def started_in(folder):
    return [event["trial"] for event in events.read(events_path(folder)) if event["event"] == "trial_started"]


def values_of(folder):
    """Key -> the best value of each trial, from the lines of the events alone."""
    found = {}
    for event in events.read(events_path(folder)):
        if event["event"] == "epoch":
            found[event["trial"]] = max(found.get(event["trial"], 0.0), event["metrics"][METRIC])
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Five trials on two folds, of which some are significantly worse than the best."""
    folder = make(tmp_path_factory.mktemp("whole"), overrides=[*K2, *FOUR, *SOME_ARE_WORSE])
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        return run(folder)


def test_a_study_on_two_folds_is_ranked_by_the_means_of_those_that_are_not_worse(whole):
    values, rows = values_of(whole), read_json(whole / "ranking.json")
    state = read_state(whole)
    searched = [f"search-00{n}" for n in range(5)]
    by_class = {key: np.array(state.trials[key].class_values) for key in searched}
    assert {len(one) for one in by_class.values()} == {4}
    best = max(searched, key=values.get)
    # Exactly: the share of the 16 ways to choose signs with a sum of the ranks of gains as small as the one found.
    worse = set()
    for key in searched:
        gains = np.round(by_class[key] - by_class[best], 12)
        ranks = np.abs(gains).argsort().argsort() + 1
        assert len(set(np.abs(gains))) == 4 or key == best, "no ties, or the ranks here are wrong"
        sums = [ranks[np.array(signs, dtype=bool)].sum() for signs in np.ndindex(2, 2, 2, 2)]
        if key != best and np.mean(np.array(sums) <= ranks[gains > 0].sum()) < 0.1:
            worse.add(key)
    assert 0 < len(worse) < 4, f"a study in which some are pruned and some are not: {worse}"
    assert {row["trial"] for row in rows if row["pruned"]} == worse
    kept = [key for key in searched if key not in worse]
    assert sorted(started_in(whole)) == sorted([*searched, *(f"{key}-fold-0" for key in kept)])
    means = {key: (values[key] + values[f"{key}-fold-0"]) / 2 for key in kept}
    expected = sorted(kept, key=lambda key: -means[key]) + sorted(worse, key=lambda key: -values[key])
    assert [row["trial"] for row in rows] == expected
    assert [row["value"] for row in rows] == pytest.approx([means.get(key, values[key]) for key in expected])
    notes = [text for text in state.notes if "significantly worse" in text]
    are = "is" if len(worse) == 1 else "are"
    assert notes == [
        f"{len(worse)} of 5 configurations {are} significantly worse than the best on the first fold (Wilcoxon, "
        f"p < 0.1) and {are} not trained on further folds"
    ]


def test_the_runs_on_further_folds_are_the_same_trials_on_another_fold_without_early_stopping(whole):
    state = read_state(whole)
    further = [trial for trial in state.of_stage("search") if trial.is_further_fold]
    assert further
    assert [trial.trial for trial in state.searched] == [f"search-00{n}" for n in range(5)]
    for trial in further:
        first = state.trials[trial.searched]
        assert (first.fold, trial.fold, trial.ended) == (1, 0, "finished")
        assert trial.configuration == first.fingerprint
        assert trial.fingerprint == fingerprint(parse_trial(trial.config)) != first.fingerprint
        on_first = {**trial.config, "data": {**trial.config["data"], "split": first.config["data"]["split"]}}
        assert on_first == first.config
    (plan,) = [stage for name, stage in state.stages.items() if name == "search"]
    assert plan.num_trials == 5 + len(further)
    splits = read_json(whole / "split.json")
    assert sorted(name.rsplit(" ", 1)[0] for name in splits) == ["fold 0", "search"]


def test_the_class_values_of_a_study_are_those_of_the_validation_classes(whole):
    state = read_state(whole)
    labels = open_catalog("digits", None).labels
    split = make_split(open_catalog("digits", None), **state.trials["search-000"].config["data"]["split"])
    sizes = np.array([(labels == one).sum() for one in split.val])
    for trial in state.searched:
        # Every image is a query, so the metric is the mean over the classes, weighted with their images.
        assert sizes @ np.array(trial.class_values) / sizes.sum() == pytest.approx(trial.best, abs=1e-12)


def test_the_summary_and_the_model_are_of_the_best_mean(whole):
    rows, summary = read_json(whole / "ranking.json"), summarise(whole)
    assert [(row["trial"], row["num_folds"], row["pruned"]) for row in summary["search"]] == [
        (row["trial"], row["num_folds"], row["pruned"]) for row in rows
    ]
    assert summary["best_so_far"] == {
        "trial": rows[0]["trial"], "best": rows[0]["value"], "num_folds": 2, "recipe": summary["search"][0]["recipe"],
        "epoch_of_best": rows[0]["epoch_of_best"],
    }  # fmt: skip
    assert summary["stability"]["best_so_far"][-1] == max(values_of(whole)[f"search-00{n}"] for n in range(5))
    assert summary["cost"]["stages"][0]["num_trials"] == len(started_in(whole))
    (model,) = [event for event in events.read(events_path(whole)) if event["event"] == "model"]
    assert model["checkpoint"].split("/")[-2] == rows[0]["trial"]


def test_a_study_that_is_killed_at_any_event_ends_as_the_unbroken_one(whole, tmp_path, here):  # noqa: ARG001
    lines = events_path(whole).read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line) for line in lines]
    begin = next(n for n, event in enumerate(kinds) if event["event"] == "trial_started" and "-fold-" in event["trial"])
    end = next(n for n, event in enumerate(kinds) if event["event"] == "stage_finished")
    ranking = read_json(whole / "ranking.json")
    noted = max(n for n, event in enumerate(kinds[:begin]) if event["event"] == "trial_ended")
    cuts = sorted({noted, begin, begin + 1, (begin + end) // 2, end})  # before, in and after the second pass
    for cut in cuts:
        folder = tmp_path / str(cut) / "mini"
        shutil.copytree(whole, folder)
        for name in ("ranking.json", "final.json", "summary.json", "summary.md"):
            (folder / name).unlink(missing_ok=True)
        events_path(folder).write_bytes(b"".join(lines[:cut]))
        ended = {event["trial"] for event in kinds[:cut] if event["event"] == "trial_ended"}
        run(folder)
        assert read_json(folder / "ranking.json") == ranking, cut
        again = [
            event["trial"] for event in events.read(events_path(folder))[cut:] if event["event"] == "trial_started"
        ]
        assert not ended & set(again), "what has ended is not repeated"


def test_a_longer_search_decides_again_and_repeats_no_run(whole, tmp_path, here):  # noqa: ARG001
    folder, longer = tmp_path / "mini", tmp_path / "longer"
    shutil.copytree(whole, folder)
    extend_search(folder, 7)
    state = read_state(folder)
    assert state.searched == state.of_stage("search"), "who has further folds is not known any more"
    assert len(state.searched) == 5
    run(folder)
    later = started_in(folder)[len(started_in(whole)) :]
    assert {"search-005", "search-006"} <= set(later)
    assert not set(started_in(whole)) & set(later), "none is repeated"
    counted = {run["trial"] for row in read_json(folder / "ranking.json") for run in row["runs"]}
    assert any("-fold-" in key for key in counted & set(started_in(whole))), "and those that there are count"
    longer.mkdir()
    from_the_start = make(longer, overrides=[*K2, *FOUR, *SOME_ARE_WORSE, "study.search.num_trials=7"])
    assert read_json(folder / "ranking.json") == read_json(run(from_the_start) / "ranking.json")


def test_the_first_fold_of_a_search_that_a_limit_has_ended_is_over(whole, tmp_path, here):  # noqa: ARG001
    folder = tmp_path / "mini"
    shutil.copytree(whole, folder)
    (folder / "ranking.json").unlink()
    last = f"search-00{max(int(key[7:10]) for key in started_in(whole))}"
    lines = events_path(folder).read_bytes().splitlines(keepends=True)
    end = next(n for n, line in enumerate(lines) if b"-fold-" in line and b'"epoch"' in line)
    kept = [line for line in lines[:end] if json.loads(line).get("trial") != last]  # it had not started
    events_path(folder).write_bytes(b"".join(kept))
    run(folder)
    assert last not in started_in(folder)
    assert sorted(row["trial"] for row in read_json(folder / "ranking.json")) == [f"search-00{n}" for n in range(4)]


def test_a_run_on_a_further_fold_whose_end_was_lost_is_made_anew(whole, tmp_path, here):  # noqa: ARG001
    folder = tmp_path / "mini"
    shutil.copytree(whole, folder)
    lost = next(key for key in reversed(started_in(whole)) if "-fold-" in key)
    lines = events_path(folder).read_bytes().splitlines(keepends=True)
    gone = [line for line in lines if b'"trial_ended"' in line and json.loads(line)["trial"] == lost]
    kept = [line for line in lines if line not in gone and b'"study_finished"' not in line]
    assert len(kept) == len(lines) - 2
    events_path(folder).write_bytes(b"".join(kept))
    run(folder)
    state = read_state(folder)
    assert state.trials[lost].ended == "finished"
    assert any(f"events.jsonl has lost {lost}" in note for note in state.notes)
    assert read_json(folder / "ranking.json") == read_json(whole / "ranking.json")


def test_trials_that_did_not_run_to_their_end_get_no_further_folds(tmp_path, here, monkeypatch):  # noqa: ARG001
    overrides = [*K2, *FOUR, *SOME_ARE_WORSE, "trial.optimizer.learning_rate={choice: [1e-4, 1e25]}"]
    folder = run(make(tmp_path, overrides=[*overrides, "study.search.num_trials=4"]))
    state, rows = read_state(folder), read_json(folder / "ranking.json")
    failed = [trial.trial for trial in state.searched if trial.ended != "finished"]
    assert 0 < len(failed) < 4
    assert not any(key.partition("-fold-")[0] in failed for key in started_in(folder) if "-fold-" in key)
    assert [row["trial"] for row in rows if row["ended"] != "finished"] == failed
    assert [(row["num_folds"], row["pruned"], row["p"]) for row in rows if row["trial"] in failed] == [
        (1, False, None)
    ] * len(failed)


@pytest.mark.parametrize(("reason", "num_further"), [("time", 0), ("budget", 0), ("settled", 1)])
def test_a_limit_that_leaves_no_time_ends_the_search_without_further_folds(
    tmp_path, here, monkeypatch, reason, num_further  # noqa: ARG001
):  # fmt: skip
    class ReachedLimit(SearchLimit):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            budget = arguments[1]
            self.reached = Reached(reason, "words") if budget.until_settled else None

    monkeypatch.setattr("raydml.study.stages.SearchLimit", ReachedLimit)
    monkeypatch.setattr("raydml.study.search_limit.SearchLimit", ReachedLimit)
    folder = make(tmp_path, overrides=[*K2, *FOUR, "study.search.num_trials=1"])
    run(folder, budget=Budget(until_settled=True))
    assert sum("-fold-" in key for key in started_in(folder)) == num_further
    (row,) = read_json(folder / "ranking.json")
    assert (row["num_folds"], len(row["runs"])) == (1 + num_further, 1 + num_further)
    notes = [note for note in read_state(folder).notes if "further folds" in note]
    assert [note.split(":")[0] for note in notes] == [
        "no configuration is trained on further folds"
        if not num_further
        else "the only configuration that ran to its end on the first fold is trained on further folds"
    ]
    # As for trials that a limit has kept from starting, the same number of trials goes on with what is missing.
    extend_search(folder, 1)
    run(folder)
    assert started_in(folder) == ["search-000", "search-000-fold-0"]


def test_a_settled_ranking_does_not_end_runs_on_further_folds_and_the_other_limits_do():
    limit = SearchLimit("folder", Budget(60.0, 2.0, True), 123.0)
    further = limit.of_further_folds()
    assert (further._budget, further._deadline_s) == (Budget(60.0, 2.0, False), 123.0)
    limit.reached = Reached("settled", "")
    assert limit.of_further_folds() is not None
    limit.reached = Reached("time", "")
    assert limit.of_further_folds() is None


def test_checkpoints_stay_of_the_best_and_of_what_a_longer_search_may_need(tmp_path, here):  # noqa: ARG001
    folder = run(make(tmp_path, overrides=[*K2, *FOUR, *SOME_ARE_WORSE, "study.keep_checkpoints=1"]))
    rows = read_json(folder / "ranking.json")
    kept = {key for key in started_in(folder) if newest_checkpoint(folder, "search", key) is not None}
    all_folds = [row for row in rows if row["num_folds"] == 2]
    assert len(all_folds) > 1
    assert kept == {rows[0]["trial"], f"{rows[0]['trial']}-fold-0", *(row["trial"] for row in all_folds)}
    # The model of a configuration whose first trial has lost its checkpoint is that of another fold.
    assert find_winner(folder).trial == rows[0]["trial"]
    drop_checkpoints(folder, "search", rows[0]["trial"])
    assert find_winner(folder).trial == f"{rows[0]['trial']}-fold-0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["study.search.folds=3"], r"study.search.folds: 3: trial.data.split.num_folds is 2"),
        (
            ["study.search.folds=2", "study.search.scheduler=pasha"],
            r"search.folds: 2: needs trials that have run to th",
        ),
        (["study.search.folds=2", "study.max_checkpoint_gib=1"], r"search.folds: 2: may need checkpoints that max_ch"),
        (["study.search.folds=0"], r"study.search.folds: 0"),
        (
            ["study.search.folds=2", "trial.data.split.val_fraction=0", "study.confirm=null", "study.refit={seeds: 1}"],
            r"study.search.folds: 2: compares trials on their validation classes, and no class validates",
        ),
    ],
)
def test_what_does_not_fit_several_folds_is_refused(tmp_path, overrides, message):
    with pytest.raises(SpaceError) as caught:
        space_at(tmp_path, overrides=overrides)
    assert re.search(message, str(caught.value).replace(" = ", ": ")), caught.value


def test_trials_with_different_validation_classes_are_refused(tmp_path):
    overrides = ["study.search.folds=2", "study.confirm=null", "trial.data.split.fold={choice: [0, 1]}"]
    with pytest.raises(StudyError, match=r"study\.search\.folds = 2: the trials have 2 different splits"):
        make(tmp_path, overrides=overrides)


def test_one_fold_changes_nothing_about_a_study(tmp_path):
    plain, one = space_at(tmp_path), space_at(tmp_path, overrides=["study.search.folds=1"])
    assert "folds" not in plain.study.model_dump(mode="json")["search"]
    assert plain.study == one.study


def test_an_event_has_its_class_values_or_not_and_a_damaged_one_is_none():
    ended = {"event": "trial_ended", "trial": "search-000", "stage": "search", "reason": "finished"}
    assert reduce_events([ended]).trials["search-000"].class_values == ()
    assert reduce_events([{**ended, "class_values": [0.5, 1]}]).trials["search-000"].class_values == (0.5, 1)
    for damaged in ("0.5", [0.5, "1"], [None], {"0": 0.5}):
        assert events.parse_line(json.dumps({**ended, "class_values": damaged}).encode()) is None


@pytest.mark.slow
def test_without_a_confirmation_the_refit_follows_all_folds_and_the_first_ones_model_is_tested(tmp_path, here):  # noqa: ARG001
    stages = ["study.refit={seeds: 1}", "study.finalize={top: 1}", "study.search.num_trials=2", "trial.epochs=3"]
    stages += ["machine.device=cpu"]
    stages += ["trial.sampler.batches_per_epoch=4", "trial.optimizer.learning_rate={loguniform: [1e-4, 1e-2]}"]
    folder = run(make(tmp_path, overrides=[*K2, *FOUR, *stages]))
    (best, *_), (refit,), (final,) = (read_json(folder / name) for name in ("ranking.json", "refit.json", "final.json"))
    assert best["num_folds"] == 2
    curves = {}
    for event in events.read(events_path(folder)):
        if event["event"] == "epoch" and event["stage"] == "search":
            curves.setdefault(event["trial"], []).append(event["metrics"][METRIC])
    epochs = [np.argmax(curves[key]) + 1 for key in (best["trial"], f"{best['trial']}-fold-0")]
    assert refit["best_epochs"] == epochs
    assert refit["epochs"] == int(sum(epochs) / 2 + 0.5), "of two the mean, with a half rounded up"
    listed = ", ".join(map(str, sorted(epochs)))
    assert any(f"the median of the best epochs {listed} of {best['trial']} on its folds" in note
               for note in read_state(folder).notes)  # fmt: skip
    assert list(final["runs"]) == [best["trial"]]


def test_a_configuration_that_lacks_a_fold_is_refitted_by_its_first_one(tmp_path):
    runs = [{"trial": "search-000", "epoch_of_best": 3}, {"trial": "search-000-fold-1", "epoch_of_best": 9}]
    row = {"trial": "search-000", "fingerprint": "a", "value": 0.5, "epoch_of_best": 3, "num_folds": 1, "runs": runs}
    older = {name: row[name] for name in ("trial", "fingerprint", "value", "epoch_of_best")}
    (tmp_path / "ranking.json").write_text(json.dumps([row, {**row, "num_folds": 2}, older]))
    validates = {"data": {"split": {"val_fraction": 0.5}}}
    found = configurations_to_refit(tmp_path, StudyState(), {"search-000": validates})
    assert [row["best_epochs"] for row in found] == [[3], [3, 9], [3]]


def test_a_search_that_starts_from_a_study_takes_the_best_means(tmp_path):
    rows = [{"trial": f"search-00{n}", "fingerprint": f"print-{n}", "value": 0.5, "num_folds": 2} for n in (1, 0)]
    found = [{**started(n), "fingerprint": f"print-{n}"} for n in range(3)]
    found += [{**started(2), "trial": "search-002-fold-1", "fingerprint": "another"}]
    found += [epoch(0, 1, 0.9), epoch(1, 1, 0.8), epoch(2, 1, 0.7), {**epoch(2, 1, 0.99), "trial": "search-002-fold-1"}]
    for event in [
        study_started(),
        stage_started(4),
        *found,
        {"event": "stage_finished", "stage": "search", "ranking": rows},
    ]:
        events.append(events_path(tmp_path), event)
    assert [name for name, _ in _points_of_study(tmp_path)] == ["search-001", "search-000", "search-002"]


def test_a_trial_without_value_leaves_no_configuration_to_compare(here, tmp_path):  # noqa: ARG001
    folder = make(tmp_path, overrides=[*K2, *FOUR, "study.search.num_trials=1", "trial.optimizer.learning_rate=1e25"])
    with pytest.raises(StudyError, match="no trial of the search has a value"):
        run(folder)


def test_a_limit_of_the_first_fold_ends_no_run_on_a_further_one(tmp_path):
    """After resume --retry-crashed, a trial of the first fold runs while a run on a further fold has yet to go on."""
    path = events_path(tmp_path)
    for key in ("search-000", "search-000-fold-1", "search-001"):
        events.append(path, {**started(0), "trial": key})
    events.append(path, {"event": "trial_ended", "stage": "search", "trial": "search-000", "reason": "finished"})
    noted = []
    session = SimpleNamespace(
        folder=tmp_path,
        record=lambda event, **fields: events.append(path, {"event": event, **fields}),
        note=noted.append,
    )
    runner._end_by_limit(session, Reached("settled", "the ranking is settled"), ["search-000", "search-001"], 4)
    ended = {key: trial.ended for key, trial in read_trials(tmp_path, "search").items()}
    assert ended == {"search-000": "finished", "search-000-fold-1": "", "search-001": "settled"}
    assert noted == ["the ranking is settled: 2 of 4 trials started"]
