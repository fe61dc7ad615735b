"""The picture of a running study: what the events mean, and what is shown of them on wide, narrow and no terminals."""

import io
import json
import threading
import time

import pytest
from rich.console import Console

from raydml.cli.live_view import LiveStudy, duration, line, view
from raydml.cli.trial_table import chosen_rows, learning_rate_text, metric_label
from raydml.study.state import StudyProgress, fold, reduce


def started(number, *, loss="margin", miner="distance_weighted", epochs=9, stage="search", fold=None, seed=0):
    return {
        "event": "trial_started",
        "trial": f"{stage}-{number:03d}",
        "stage": stage,
        "fingerprint": "0123456789ab",
        "fold": fold,
        "seed": seed,
        "config": {
            "epochs": epochs,
            "loss": {"name": loss},
            "miner": {"name": miner} if miner else None,
            "model": {"embedding_dim": 64},
            "optimizer": {"name": "adamw", "learning_rate": 3.14e-4},
        },
    }


def epoch(number, epoch, value, *, stage="search", metric="val_map_at_r"):
    metrics = {metric: value, "train_loss": 1.0}
    return {"event": "epoch", "trial": f"{stage}-{number:03d}", "stage": stage, "epoch": epoch, "metrics": metrics}


def ended(number, reason, *, error=None, stage="search"):
    return {"event": "trial_ended", "trial": f"{stage}-{number:03d}", "stage": stage, "reason": reason, "error": error}


def study_started(select_on="val_map_at_r"):
    return {"event": "study_started", "study": "digits", "config": {"name": "digits", "select_on": select_on}}


def stage_started(num_trials, max_epochs=9, stage="search"):
    return {"event": "stage_started", "stage": stage, "num_trials": num_trials, "max_epochs": max_epochs}


def text_of(study, width, height, **arguments):
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, record=True)
    console.print(view(study, width=width, height=height, **arguments))
    return console.export_text()


# --- the state --------------------------------------------------------------------------------------------------------


def test_a_trial_from_start_to_end():
    study = fold([study_started(), stage_started(4), started(0), epoch(0, 1, 0.2), epoch(0, 2, 0.5), epoch(0, 3, 0.4)])
    trial = study.trials["search-000"]
    assert (trial.epoch, trial.best, trial.best_epoch, trial.state) == (3, 0.5, 2, "running")
    assert (trial.recipe, trial.embedding_dim, trial.learning_rate) == (
        "margin, distance_weighted",
        64,
        3.14e-4,
    )
    after = reduce(study, ended(0, "stopped_early"))
    assert after.trials["search-000"].ended
    assert study.trials["search-000"].state == "running", "reduce must not change the state it is given"


def test_the_study_says_which_metric_counts():
    events = [
        study_started("val_recall_at_1"),
        started(0),
        epoch(0, 1, 0.9),
        epoch(0, 2, 0.3, metric="val_recall_at_1"),
    ]
    assert fold(events).trials["search-000"].best == 0.3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_what_is_no_number_is_never_the_best(value):
    study = fold([stage_started(2), started(0), epoch(0, 1, value), started(1), epoch(1, 1, 0.1)])
    assert study.trials["search-000"].best is None
    assert study.best_of_stage("search").trial == "search-001"


def test_of_equal_trials_the_first_is_the_best():
    study = fold([started(1), started(0), epoch(1, 1, 0.5), epoch(0, 1, 0.5)])
    assert study.best_of_stage("search").trial == "search-000"


def test_settled_epochs_count_a_stopped_trial_with_its_whole_budget():
    study = fold(
        [stage_started(3), started(0), epoch(0, 1, 0.1), ended(0, "stopped_early"), started(1), epoch(1, 2, 0.1)]
    )
    assert study.settled("search") == (9 + 2, 27)
    assert reduce(study, {"event": "stage_finished", "stage": "search"}).settled("search") == (27, 27)
    assert study.settled("confirm") == (0, 0)


def test_a_resumed_trial_keeps_what_it_has_and_repeats_an_epoch():
    before = [
        stage_started(1),
        started(0),
        epoch(0, 1, 0.1),
        epoch(0, 2, 0.6),
        epoch(0, 3, 0.2),
        {"event": "interrupted"},
    ]
    assert fold(before).state == "interrupted"
    assert "interrupted, 0 of 1 ended" in text_of(fold(before), 80, 24)
    assert "paused" in text_of(fold(before), 80, 24)
    study = fold([*before, study_started(), stage_started(1), started(0), epoch(0, 2, 0.6)])
    trial = study.trials["search-000"]
    assert (trial.epoch, trial.best, trial.best_epoch, trial.state) == (2, 0.6, 2, "running")
    assert study.state == "running"


def test_a_crash_is_a_retry_and_then_an_end():
    study = fold([started(0), epoch(0, 1, 0.1), {"event": "trial_retried", "trial": "search-000", "error": "killed"}])
    assert (study.trials["search-000"].state, study.trials["search-000"].num_retries) == ("retrying", 1)
    study = reduce(study, epoch(0, 2, 0.1))
    assert study.trials["search-000"].state == "running"
    assert reduce(study, ended(0, "crashed", error="boom")).trials["search-000"].ended


def test_events_of_other_kinds_and_of_unknown_trials_do_no_harm():
    study = fold([{"event": "artifact", "path": "x"}, {"event": "from the future"}, epoch(7, 3, 0.3)])
    assert study.trials["search-007"].best == 0.3


# --- the picture ------------------------------------------------------------------------------------------------------


def large_study(num_trials, num_running):
    events = [study_started(), stage_started(num_trials)]
    for number in range(num_trials - num_running):
        # Every third is good, so that the best are spread over the list.
        value = 0.9 - number / 1000 if number % 3 == 0 else 0.1
        events += [started(number), epoch(number, 1, value), ended(number, "stopped_early")]
    return fold(events + [started(number) for number in range(num_trials - num_running, num_trials)])


def test_at_80_columns_no_line_is_cut_and_every_column_is_there():
    names = [("normalized_softmax", None), ("multi_similarity", "multi_similarity"), ("margin", "distance_weighted")]
    events = [study_started(), stage_started(3)]
    for number, (loss, miner) in enumerate(names):
        events += [started(number, loss=loss, miner=miner), epoch(number, 1, 0.61234)]
    text = text_of(fold([*events, ended(0, "non_finite_loss")]), 80, 24, eta_s=75)
    for word in (
        "trial",
        "recipe",
        "dim",
        "lr",
        "epoch",
        "MAP@R",
        "state",
        "NaN loss",
        "0.6123",
        "3.1e-4",
        "1/9",
    ):
        assert word in text
    assert "normalized_softmax" in text
    assert "ETA 1:15" in text
    assert "11/27 epochs" in text
    assert all(len(row) <= 80 for row in text.splitlines())


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 10), (60, 20)])
def test_200_trials_show_those_that_run_and_the_best_and_never_outgrow_the_screen(width, height):
    text = text_of(large_study(200, 3), width, height, eta_s=3600)
    assert len(text.splitlines()) <= height
    for number in (197, 198, 199, 0):
        assert f"search-{number:03d}" in text
    assert "search-001" not in text
    assert "more trials" in text


def test_chosen_rows_prefer_running_ones_and_keep_the_order():
    trials = list(large_study(30, 2).trials.values())
    assert [trial.trial for trial in chosen_rows(trials, 5)] == [f"search-{n:03d}" for n in (0, 3, 6, 28, 29)]
    assert chosen_rows(trials, 30) == trials


def test_confirm_shows_folds_and_seeds():
    events = [study_started(), stage_started(2, stage="confirm"), started(0, stage="confirm", fold=3, seed=17)]
    text = text_of(fold(events), 80, 24)
    assert "fold" in text
    assert "17" in text
    assert "lr" not in text


def test_names_from_the_outside_are_no_markup():
    text = text_of(fold([stage_started(1), started(0, loss="[bold]x[/bold]")]), 120, 24)
    assert "[bold]x[/bold]" in text


# --- without a terminal -----------------------------------------------------------------------------------------------


def lines_of(*events):
    study, lines = StudyProgress(), []
    for event in events:
        study = reduce(study, event)
        lines.append(line(study, event))
    return lines


def test_one_plain_line_an_event_and_none_an_epoch():
    assert lines_of(
        study_started(),
        stage_started(2),
        started(0),
        epoch(0, 1, 0.25),
        ended(0, "stopped_early"),
        started(1, loss="contrastive", miner=None),
        {"event": "trial_retried", "trial": "search-001", "error": "Traceback ...\nWorkerDied: killed"},
        ended(1, "non_finite_loss", error="loss is NaN"),
        {"event": "stage_finished", "stage": "search"},
    ) == [
        "study digits",
        "search: 2 trials of at most 9 epochs",
        "search-000 started: margin, distance_weighted, dim 64, lr 3.1e-4",
        None,
        "search-000 stopped early after epoch 1/9, best MAP@R 0.2500",
        "search-001 started: contrastive, dim 64, lr 3.1e-4",
        "search-001 failed after epoch 0, retry 1: WorkerDied: killed",
        "search-001 failed (non finite loss) after epoch 0/9: loss is NaN",
        "search finished, best search-000 MAP@R 0.2500",
    ]


def write(path, *events):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 30 s"
        time.sleep(0.02)


def test_a_pipe_gets_plain_lines_while_the_study_runs(tmp_path):
    path, out = tmp_path / "events.jsonl", io.StringIO()
    with LiveStudy(path, console=Console(file=out, width=40)):  # the file appears later
        write(path, study_started(), stage_started(1), started(0))
        wait_for(lambda: "search-000 started" in out.getvalue())
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"event":"epoch","trial":"sea')  # half a line is not an event yet
        time.sleep(0.3)
        with open(path, "a", encoding="utf-8") as file:
            file.write('rch-000","stage":"search","epoch":1,"metrics":{"val_map_at_r":0.5}}\n')
        write(path, ended(0, "finished"))
    text = out.getvalue()
    assert text.splitlines()[-1] == "search-000 finished after epoch 1/9, best MAP@R 0.5000"
    assert "\x1b" not in text
    assert len(text.splitlines()) == 4, "a line longer than the console must not be broken"


def test_on_resume_the_past_is_one_line(tmp_path):
    path, out = tmp_path / "events.jsonl", io.StringIO()
    write(path, study_started(), stage_started(2), started(0), epoch(0, 1, 0.5), ended(0, "finished"), started(1))
    with LiveStudy(path, from_offset=path.stat().st_size, console=Console(file=out, width=200)) as live:
        write(path, epoch(1, 1, 0.7), ended(1, "finished"))
    assert out.getvalue().splitlines() == [
        "resuming digits: 1 of 2 started trials have ended, 1 epochs are done",
        "search-001 finished after epoch 1/9, best MAP@R 0.7000",
    ]
    assert live.study.best_of_stage("search").trial == "search-001"


def test_a_terminal_gets_the_table_and_keeps_the_last_one(tmp_path):
    path, out = tmp_path / "events.jsonl", io.StringIO()
    write(path, study_started(), stage_started(1), started(0))
    with LiveStudy(path, console=Console(file=out, width=100, height=30, force_terminal=True)):
        write(path, epoch(0, 1, 0.5), ended(0, "finished"))
    last = out.getvalue()[out.getvalue().rindex("search-000") :]
    assert "0.5000" in last
    assert "finished" in last
    assert not [thread for thread in threading.enumerate() if thread.name == "live-study"]


def test_the_eta_follows_the_pace_seen_here_and_not_the_past(tmp_path):
    path, now = tmp_path / "events.jsonl", [100.0]
    write(path, study_started(), stage_started(4, 5), started(0, epochs=5), *(epoch(0, n, 0.1) for n in range(1, 5)))
    live = LiveStudy(path, from_offset=path.stat().st_size, console=Console(file=io.StringIO()), clock=lambda: now[0])
    with live:
        write(path, started(1, epochs=5))
        wait_for(lambda: "search-001" in live.study.trials)
        assert live.eta_s() is None
        now[0] = 110.0
        write(path, *(epoch(1, n, 0.1) for n in range(1, 5)))
        wait_for(lambda: live.study.trials["search-001"].epoch == 4)
        assert live.eta_s() == pytest.approx((20 - 8) * 10 / 4)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_small_texts():
    assert [duration(s) for s in (0, 59.6, 61, 3600, 36061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]
    assert [learning_rate_text(v) for v in (1e-4, 0.0123, 3.0, 1e-10, None)] == [
        "1.0e-4",
        "1.2e-2",
        "3.0e0",
        "1.0e-10",
        "",
    ]
    assert [metric_label(n) for n in ("val_map_at_r", "test_recall_at_10", "r_precision", "f1")] == [
        "MAP@R",
        "R@10",
        "R-precision",
        "f1",
    ]
