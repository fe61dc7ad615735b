"""Stop decisions against rungs worked out by hand, without a cluster: schedulers only see trials and results."""

from types import SimpleNamespace

import pytest

from raydml.study.scheduler import Asha, SyncHalving

METRIC = "val_map_at_r"


def tune_trial(key, trial_id=None, status="RUNNING", epoch=0):
    return SimpleNamespace(
        trial_id=trial_id or f"id-{key}",
        config={"run": {"key": key}},
        status=status,
        PAUSED="PAUSED",
        last_result={"epoch": epoch},
    )


def result(epoch, value):
    return {"epoch": epoch, METRIC: value}


def asha(history=None):
    return Asha(metric=METRIC, max_epochs=9, grace_epochs=1, reduction_factor=3, history=history or {})


def sync(keys, history=None, ended=()):
    return SyncHalving(
        metric=METRIC,
        keys=keys,
        max_epochs=9,
        grace_epochs=1,
        reduction_factor=3,
        history=history or {},
        ended=list(ended),
    )


def test_asha_stops_what_falls_below_the_top_third_of_its_rung():
    scheduler = asha()
    decisions = []
    for key, value in [("a", 0.9), ("b", 0.5), ("c", 0.95)]:
        trial = tune_trial(key)
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, result(1, value)))
    # a is alone in its rung; b is below a; c is above the cutoff of {0.9, 0.5}, their 66.7 % quantile 0.767.
    assert decisions == ["CONTINUE", "STOP", "CONTINUE"]


def test_asha_stops_a_trial_whose_metric_is_nan():
    scheduler = asha()
    trial = tune_trial("a")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, result(2, float("nan"))) == "STOP"
    scheduler.on_trial_complete(None, trial, result(2, float("nan")))
    other = tune_trial("b")
    scheduler.on_trial_add(None, other)
    assert scheduler.on_trial_result(None, other, result(1, 0.1)) == "CONTINUE"  # the NaN is in no rung


def test_asha_decides_after_a_restart_as_it_would_have_without():
    history = {"search-000": [(1, 0.9), (2, 0.91)], "search-001": [(1, 0.8)]}
    fresh, resumed = asha(), asha(history)
    for key, rows in history.items():
        trial = tune_trial(key)
        fresh.on_trial_add(None, trial)
        for epoch, value in rows:
            fresh.on_trial_result(None, trial, result(epoch, value))
    for value, decision in [(0.5, "STOP"), (0.95, "CONTINUE")]:
        trial = tune_trial(f"search-00{value}")
        for scheduler in (fresh, resumed):
            scheduler.on_trial_add(None, trial)
            assert scheduler.on_trial_result(None, trial, result(1, value)) == decision


def _added(scheduler, key):
    trial = tune_trial(key)
    scheduler.on_trial_add(None, trial)
    return trial


def test_asha_counts_a_resumed_trial_once():
    scheduler = asha({"search-000": [(1, 0.9)], "search-001": [(1, 0.2)]})
    trial = _added(scheduler, "search-000")
    scheduler.on_trial_result(None, trial, result(2, 0.9))
    rung = dict(scheduler._brackets[0]._rungs)[1]
    assert sorted(rung.values()) == [0.2, 0.9]


def test_sync_halving_waits_for_everybody_and_keeps_the_best_third():
    keys = [f"t{i}" for i in range(6)]
    scheduler = sync(keys)
    values = [0.1, 0.6, 0.3, 0.6, 0.2, 0.5]
    for key, value in list(zip(keys, values, strict=True))[:5]:
        assert scheduler.on_trial_result(None, tune_trial(key), result(1, value)) == "PAUSE"
        assert scheduler.survivors(0) is None
    scheduler.on_trial_result(None, tune_trial("t5"), result(1, values[5]))
    assert scheduler.survivors(0) == ["t1", "t3"]  # 6 // 3 = 2 pass
    assert scheduler.on_trial_result(None, tune_trial("t1"), result(2, 0.7)) == "CONTINUE"  # no rung at 2


def test_a_trial_that_ends_at_a_rung_counts_live_as_it_does_after_a_restart():
    live = sync(["t0", "t1", "t2"])
    live.on_trial_complete(None, tune_trial("t0"), result(1, 0.9))  # its only epoch: done, so no on_trial_result
    restarted = sync(["t0", "t1", "t2"], {"t0": [(1, 0.9)]}, ended=["t0"])
    for scheduler in (live, restarted):
        scheduler.on_trial_result(None, tune_trial("t1"), result(1, 0.2))
        scheduler.on_trial_result(None, tune_trial("t2"), result(1, 0.3))
        assert scheduler.survivors(0) == ["t0"]


def test_the_last_to_arrive_and_a_resumed_winner_go_straight_on():
    scheduler = sync(["t0", "t1", "t2"])
    decisions = [
        scheduler.on_trial_result(None, tune_trial(key), result(1, value))
        for key, value in [("t0", 0.1), ("t1", 0.2), ("t2", 0.9), ("t2", 0.9), ("t0", 0.1)]
    ]
    assert decisions == ["PAUSE", "PAUSE", "CONTINUE", "CONTINUE", "PAUSE"]


def test_sync_halving_gives_ties_to_the_earlier_trial_in_any_order_of_arrival():
    keys = ["t0", "t1", "t2"]
    for order in (keys, keys[::-1]):
        scheduler = sync(keys)
        for key in order:
            scheduler.on_trial_result(None, tune_trial(key), result(1, 0.5))
        assert scheduler.survivors(0) == ["t0"]


def test_a_trial_that_died_below_the_rung_does_not_block_it():
    scheduler = sync(["t0", "t1", "t2", "t3"])
    for key, value in [("t0", 0.1), ("t1", 0.2), ("t2", 0.3)]:
        scheduler.on_trial_result(None, tune_trial(key), result(1, value))
    assert scheduler.survivors(0) is None
    scheduler.on_trial_error(None, tune_trial("t3"))
    assert scheduler.survivors(0) == ["t2"]
    scheduler.on_trial_add(None, tune_trial("t3"))  # Tune retries it: the rung is open again
    assert scheduler.survivors(0) is None


def test_trials_that_never_start_do_not_block_a_rung():
    scheduler = sync(["t0", "t1", "t2", "t3"])
    for key, value in [("t0", 0.1), ("t1", 0.2)]:
        scheduler.on_trial_result(None, tune_trial(key), result(1, value))
    assert scheduler.survivors(0) is None
    scheduler.leave_out(["t2", "t3"])
    assert scheduler.survivors(0) == ["t1"]


def test_trials_that_wait_at_a_rung_are_found_when_it_is_decided_a_second_time():
    scheduler, trials = sync(["t0", "t1", "t2"]), [tune_trial(key) for key in ("t0", "t1", "t2")]
    stopped = []
    controller = SimpleNamespace(get_trials=lambda: trials, stop_trial=stopped.append)
    for trial, value in zip(trials[:2], [0.1, 0.2], strict=True):
        scheduler.on_trial_result(None, trial, result(1, value))
    scheduler.on_trial_error(None, trials[2])
    assert scheduler.survivors(0) == ["t1"]
    scheduler.on_trial_add(None, trials[2])
    trials[0].status = trials[1].status = "PAUSED"
    assert (scheduler.choose_trial_to_run(controller), stopped) == (None, [])
    assert scheduler.on_trial_result(None, trials[2], result(1, 0.15)) == "PAUSE"
    assert (scheduler.choose_trial_to_run(controller), stopped) == (trials[1], [trials[0]])


def test_sync_halving_stops_losers_and_resumes_winners_in_trial_order():
    keys = ["t0", "t1", "t2", "t3", "t4", "t5"]
    scheduler = sync(keys)
    trials = {key: tune_trial(key) for key in keys}
    for key, value in zip(keys[::-1], [0.5, 0.2, 0.8, 0.3, 0.9, 0.1], strict=True):
        scheduler.on_trial_result(None, trials[key], result(1, value))
        trials[key].status = "PAUSED"
    stopped = []
    controller = SimpleNamespace(stop_trial=lambda trial: stopped.append(trial.config["run"]["key"]))
    chosen = scheduler.choose_trial_to_run(controller)
    assert chosen.config["run"]["key"] == "t1"
    assert stopped == ["t0"]  # the winner is handed out as soon as it is met; later losers go on the next call
    chosen.status = "RUNNING"
    assert scheduler.choose_trial_to_run(controller).config["run"]["key"] == "t3"


def test_sync_halving_knows_after_a_restart_what_was_decided():
    history = {"t0": [(1, 0.9)], "t1": [(1, 0.1)], "t2": [(1, 0.2)]}
    scheduler = sync(["t0", "t1", "t2"], history, ended=["t1", "t2"])
    assert scheduler.survivors(0) == ["t0"]


@pytest.mark.parametrize("make", [asha, lambda: sync(["a", "b"])])
def test_schedulers_are_plain_data_for_tune_to_pickle(make):
    import pickle

    assert pickle.loads(pickle.dumps(make()))
