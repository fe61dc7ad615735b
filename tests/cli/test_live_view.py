"""The picture of a running study: what the events mean, and what is shown of them on wide, narrow and no terminals."""

import io
import json
import logging
import os
import re
import signal
import threading
import time

import pytest
from rich.console import Console

from raydml.analysis.trials import TrialState
from raydml.cli.live_view import (
    STOPPING,
    STOPPING_NOW,
    LiveStudy,
    StepBars,
    duration,
    line,
    rough_time,
    search_text,
    view,
)
from raydml.cli.tables import chosen_rows, confirmed_means, learning_rate, metric_label
from raydml.ops.progress import report_progress
from raydml.study.events import StudyState, reduce_event, reduce_events
from tests.study.study_events import ended, epoch, stage_started, started, study_started


def text_of(study, width, height, **arguments):
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, record=True)
    console.print(view(study, width=width, height=height, **arguments))
    return console.export_text()


def large_study(num_trials, num_running):
    events = [study_started(), stage_started(num_trials)]
    for number in range(num_trials - num_running):
        # Every third is good, so that the best are spread over the list.
        value = 0.9 - number / 1000 if number % 3 == 0 else 0.1
        events += [started(number), epoch(number, 1, value), ended(number, "stopped_early")]
    return reduce_events(events + [started(number) for number in range(num_trials - num_running, num_trials)])


def test_at_80_columns_no_line_is_cut_and_every_column_is_there():
    names = [("normalized_softmax", None), ("multi_similarity", "multi_similarity"), ("margin", "distance_weighted")]
    events = [study_started(), stage_started(3)]
    for number, (loss, miner) in enumerate(names):
        events += [started(number, loss=loss, miner=miner), epoch(number, 1, 0.61234)]
    study = reduce_events([*events, ended(0, "non_finite_loss")])
    text = text_of(study, 80, 24, elapsed_s=62, left_s=75, browse="launch.py ui digits")
    for word in (
        *("trial", "recipe", "dim", "lr", "epoch", "MAP@R", "state", "NaN loss", "0.6123 *", "3.1e-4", "1/9"),
        *("normalized_softmax", "1:02 elapsed, about 80 s left", "search 1/3, 2 running, 1 failed"),
        *("confirm waiting | finalize waiting", "MLflow launch.py ui digits"),
        "digits: 3 train / 2 validation / 5 test classes (test sealed)",
    ):
        assert word in text
    assert all(len(row) <= 80 for row in text.splitlines())
    assert len(text.splitlines()[-1].rstrip()) <= 76, "the ^C ^C of the terminal must not wrap the last line"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 12), (60, 20)])
def test_200_trials_show_those_that_run_and_the_best_and_never_outgrow_the_screen(width, height):
    shown = {"left_s": 3600, "browse": "launch.py ui x", "doing": "loading Ray", "stopping": STOPPING}
    text = text_of(large_study(200, 3), width, height, **shown)
    assert len(text.splitlines()) <= height
    for number in (197, 198, 199, 0):
        assert f"search-{number:03d}" in text
    assert "search-001" not in text
    assert "more trials" in text


def test_chosen_rows_prefer_running_ones_and_keep_the_order():
    trials = list(large_study(30, 2).trials.values())
    assert [trial.trial for trial in chosen_rows(trials, 5)] == [f"search-{n:03d}" for n in (0, 3, 6, 28, 29)]
    assert chosen_rows(trials, 30) == trials


def test_an_interrupted_study_shows_its_trials_as_paused():
    study = reduce_events([stage_started(1), started(0), epoch(0, 1, 0.1), {"event": "interrupted"}])
    text = text_of(study, 80, 24)
    assert "search 0/1, interrupted" in text
    assert "paused" in text


def confirming():
    """Two configurations on two folds; of the first (A) both runs have ended, of the second (B) one."""
    events = [study_started(), stage_started(4, stage="confirm") | {"configurations": ["a1", "b2"]}]
    for number, (configuration, fold, value) in enumerate([("a1", 0, 0.5), ("a1", 1, 0.7), ("b2", 0, 0.65)]):
        events.append(started(number, stage="confirm", fold=fold, seed=17) | {"configuration": configuration})
        events += [epoch(number, 9, value, stage="confirm"), ended(number, "finished", stage="confirm")]
    return [*events, started(3, stage="confirm", fold=1, seed=17) | {"configuration": "b2"}]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_confirm_shows_configurations_folds_and_seeds(width):
    text = text_of(reduce_events(confirming()), width, 24)
    rows = [row.split() for row in text.splitlines() if "confirm-" in row]
    recipe = [] if width == 60 else ["margin,"]
    assert [[word for word in row if word not in ("distance_weighted", "distance_weigh…")] for row in rows] == [
        ["confirm-000", "A", *recipe, "0", "17", "9/9", "0.5000", "finished"],
        ["confirm-001", "A", *recipe, "1", "17", "9/9", "0.7000", "*", "finished"],
        ["confirm-002", "B", *recipe, "0", "17", "9/9", "0.6500", "finished"],
        ["confirm-003", "B", *recipe, "1", "17", "0/9", "running"],
    ]
    # On fold 0, which both have: B is the better one, although A's mean over two folds is 0.6 and its best run 0.7.
    assert "B MAP@R 0.6500, A 0.5000 (1 run each" in text
    assert "lr" not in text
    assert all(len(row) <= width for row in text.splitlines())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_refits_show_their_seeds_and_their_training_loss(width):
    events = [study_started(), stage_started(2, 9, "refit") | {"configurations": ["a1"]}]
    for number in (0, 1):
        events += [started(number, stage="refit", seed=number + 5) | {"configuration": "a1"}]
    refit_epoch = epoch(0, 9, 0.0, stage="refit") | {"metrics": {"train_loss": 0.25}}
    study = reduce_events([*events, refit_epoch, ended(0, "finished", stage="refit")])
    text = text_of(study, width, 24)
    rows = [row.split() for row in text.splitlines() if "refit-" in row]
    recipe = [] if width == 60 else ["margin,"]
    assert [[word for word in row if word not in ("distance_weighted", "distance_weigh…")] for row in rows] == [
        ["refit-000", "A", *recipe, "5", "9/9", "0.2500", "finished"],
        ["refit-001", "A", *recipe, "6", "0/9", "running"],
    ]
    assert "refit 1/2, 1 running" in text
    assert "MAP@R" not in text
    assert line(study, ended(0, "finished", stage="refit")) == "refit-000 (A, seed 5) finished after epoch 9/9"
    finished = {"event": "stage_finished", "stage": "refit", "ranking": []}
    assert line(reduce_event(study, finished), finished) == "refit finished"


def test_means_are_over_the_runs_that_the_configurations_have_in_common():
    events = confirming()
    # confirming() has two events of the start, then three for each run.
    assert confirmed_means(reduce_events(events[:2])) == ""
    assert confirmed_means(reduce_events(events[:8])) == "A MAP@R 0.6000 (mean of 2 runs)"
    assert confirmed_means(reduce_events(events)) == "B MAP@R 0.6500, A 0.5000 (1 run each, same folds and seeds)"
    assert confirmed_means(reduce_events(events[:2] + events[5:])) == (
        "A MAP@R 0.7000 (mean of 1 run), B 0.6500 (mean of 1 run)"
    ), "A has fold 1 only, B fold 0"


def test_steps_are_numbered_and_show_for_how_long_they_last():
    study = reduce_events([*confirming(), {"event": "step", "name": "drawing the pictures", "number": 4, "total": 6}])
    assert "step 4 of 6: drawing the pictures (12 s)" in text_of(study, 80, 24, now_s=12.4)
    assert "stopping" not in text_of(study, 80, 24)
    assert STOPPING in text_of(study, 80, 24, stopping=STOPPING)


def test_names_from_the_outside_are_no_markup():
    text = text_of(reduce_events([stage_started(1), started(0, loss="[bold]x[/bold]")]), 120, 24)
    assert "[bold]x[/bold]" in text


def lines_of(*events):
    study, lines = StudyState(), []
    for event in events:
        study = reduce_event(study, event)
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
        "study digits  digits: 3 train / 2 validation / 5 test classes (test sealed)",
        "search: 2 trials of at most 9 epochs",
        "search-000 started: margin, distance_weighted, dim 64, lr 3.1e-4",
        None,
        "search-000 stopped early after epoch 1/9, best MAP@R 0.2500",
        "search-001 started: contrastive, dim 64, lr 3.1e-4",
        "search-001 failed after epoch 0, retry 1: WorkerDied: killed",
        "search-001 failed (non finite loss) after epoch 0/9: loss is NaN",
        "search finished, best search-000 MAP@R 0.2500",
    ]
    assert lines_of(
        *confirming()[-1:],
        {"event": "step", "name": "starting Ray"},
        {"event": "step", "name": "testing the networks", "number": 1, "total": 6},
        ended(3, "time", stage="confirm"),
    ) == [
        "confirm-003 (A, fold 1, seed 17) started: margin, distance_weighted",
        "starting Ray",
        "step 1 of 6: testing the networks",
        "confirm-003 (A, fold 1, seed 17) ended by the time limit after epoch 0/9",
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
    assert re.fullmatch(r"\[0:0\d\] search-000 finished after epoch 1/9, best MAP@R 0.5000", text.splitlines()[-1])
    assert "\x1b" not in text
    assert len(text.splitlines()) == 4, "a line longer than the console must not be broken"


def test_the_search_says_who_proposes_its_trials_and_how_many_are_to_come():
    config = {"select_on": "val_map_at_r", "search": {"searcher": {"name": "tpe"}, "scheduler": "promotion"}}
    begun = [{**study_started(), "config": config}, stage_started(3), started(0)]
    assert search_text(reduce_events(begun[:2])) == ""
    assert search_text(reduce_events(begun)) == "tpe with promotion: 2 trials to come"
    found = search_text(reduce_events([*begun, epoch(0, 1, 0.5)]))
    assert found == "tpe with promotion: best MAP@R 0.5000, 2 trials to come"
    over = [*begun, *(started(number) for number in (1, 2)), epoch(2, 1, 0.6)]
    assert search_text(reduce_events(over)) == "tpe with promotion: best MAP@R 0.6000, no trial to come"


def test_on_resume_the_past_is_one_line(tmp_path):
    path, out = tmp_path / "events.jsonl", io.StringIO()
    write(path, study_started(), stage_started(2), started(0), epoch(0, 1, 0.5), ended(0, "finished"), started(1))
    console, clock = Console(file=out, width=200), lambda: 5.0
    with LiveStudy(path, from_offset=path.stat().st_size, console=console, clock=clock) as live:
        write(path, epoch(1, 1, 0.7), ended(1, "finished"))
    assert out.getvalue().splitlines() == [
        "resuming digits: 1 of 2 started trials have ended, 1 epochs are done",
        "[0:00] search-001 finished after epoch 1/9, best MAP@R 0.7000",
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


def test_a_signal_is_acknowledged_while_the_main_thread_is_busy(tmp_path):
    """A handler in Python would run only when `sort` returns; the line is there before."""
    out, handler = io.StringIO(), signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with LiveStudy(tmp_path / "events.jsonl", console=Console(file=out)):
            for words in (STOPPING, STOPPING_NOW):
                os.kill(os.getpid(), signal.SIGINT)
                wait_for(lambda words=words: words in out.getvalue())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [text.partition("] ")[2] for text in out.getvalue().splitlines()] == [STOPPING, STOPPING_NOW]
    assert signal.set_wakeup_fd(-1) == -1, "the descriptor was not given back"


def test_long_steps_of_the_driver_are_lines_of_the_live_view_and_no_bars(tmp_path):
    out, logger = io.StringIO(), logging.getLogger("raydml.progress")
    before = list(logger.handlers)
    bars, level = StepBars(Console(file=io.StringIO(), force_terminal=True)), logger.level
    logger.addHandler(bars)
    logger.setLevel(logging.DEBUG)
    with LiveStudy(tmp_path / "events.jsonl", console=Console(file=out)) as live:
        assert not [handler for handler in logger.handlers if isinstance(handler, StepBars)]
        live.doing("checking the images")
        for done in (10, 20):
            report_progress("decoding", done, 3000, "images")
    assert [text.partition("] ")[2] for text in out.getvalue().splitlines()] == ["checking the images", "decoding"]
    assert set(logger.handlers) == {*before, bars}
    logger.removeHandler(bars)
    logger.setLevel(level)


def test_small_texts():
    assert [duration(s) for s in (0, 59.6, 61, 3600, 36061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]
    assert [rough_time(s) for s in (3, 44, 94, 96, 1740, 3590, 5000, 36000)] == [
        *("about 10 s", "about 40 s", "about 90 s", "about 2 min", "about 29 min", "about 1 h", "about 1 h 20 min"),
        "about 10 h",
    ]
    texts = {1e-4: "1.0e-4", 0.0123: "1.2e-2", 3.0: "3.0e0", 1e-10: "1.0e-10", None: ""}
    for value, text in texts.items():
        assert learning_rate(TrialState("search-000", "search", config={"optimizer": {"learning_rate": value}})) == text
    labels = {"val_map_at_r": "MAP@R", "test_recall_at_10": "R@10", "r_precision": "R-precision", "f1": "f1"}
    assert {name: metric_label(name) for name in labels} == labels
