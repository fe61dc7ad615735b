"""The picture of a running study: what the events mean, and what is shown of them on wide, narrow and no terminals."""

import io
import json
import threading
import time

import pytest
from rich.console import Console

from raydml.analysis.trials import TrialState
from raydml.cli.live_view import LiveStudy, duration, line, view
from raydml.cli.tables import chosen_rows, learning_rate, metric_label
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
    text = text_of(reduce_events([*events, ended(0, "non_finite_loss")]), 80, 24, eta_s=75)
    for word in (
        *("trial", "recipe", "dim", "lr", "epoch", "MAP@R", "state", "NaN loss", "0.6123", "3.1e-4", "1/9"),
        *("normalized_softmax", "ETA 1:15", "11/27 epochs"),
    ):
        assert word in text
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


def test_an_interrupted_study_shows_its_trials_as_paused():
    study = reduce_events([stage_started(1), started(0), epoch(0, 1, 0.1), {"event": "interrupted"}])
    text = text_of(study, 80, 24)
    assert "interrupted, 0 of 1 ended" in text
    assert "paused" in text


def test_confirm_shows_folds_and_seeds():
    events = [study_started(), stage_started(2, stage="confirm"), started(0, stage="confirm", fold=3, seed=17)]
    text = text_of(reduce_events(events), 80, 24)
    assert "fold" in text
    assert "17" in text
    assert "lr" not in text


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
        wait_for(lambda: live.study.trials["search-001"].num_epochs == 4)
        assert live.eta_s() == pytest.approx((20 - 8) * 10 / 4)


def test_small_texts():
    assert [duration(s) for s in (0, 59.6, 61, 3600, 36061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]
    texts = {1e-4: "1.0e-4", 0.0123: "1.2e-2", 3.0: "3.0e0", 1e-10: "1.0e-10", None: ""}
    for value, text in texts.items():
        assert learning_rate(TrialState("search-000", "search", config={"optimizer": {"learning_rate": value}})) == text
    labels = {"val_map_at_r": "MAP@R", "test_recall_at_10": "R@10", "r_precision": "R-precision", "f1": "f1"}
    assert {name: metric_label(name) for name in labels} == labels
