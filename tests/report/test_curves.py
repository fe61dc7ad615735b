"""Learning curves: read from events written by hand, drawn and looked at through their axes."""

from __future__ import annotations

import json
import logging
import math

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from raydml.report import curves
from raydml.report.curves import learning_curves, read_curves


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, kept instead of becoming files."""
    kept = []
    monkeypatch.setattr(curves, "save_picture", lambda figure, path: kept.append(figure) or path)
    return kept


def epoch(trial, number, **metrics):
    return {"event": "epoch", "trial": trial, "stage": "search", "epoch": number, "metrics": metrics}


def ended(trial, reason):
    return {"event": "trial_ended", "trial": trial, "stage": "search", "reason": reason, "error": None}


def write(path, *events, tail=""):
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return path


def test_curves_are_read_from_the_events(tmp_path):
    path = write(
        tmp_path / "events.jsonl",
        {"event": "study_started", "study": "s"},
        {"event": "trial_started", "trial": "search-000"},
        {"event": "trial_started", "trial": "search-001"},
        epoch("search-001", 2, val_map_at_r=0.3, val_recall_at_1=0.6),
        epoch("search-000", 1, val_map_at_r=0.1, val_recall_at_1=0.5),
        epoch("search-001", 1, val_map_at_r=0.2),
        epoch("search-001", 3, train_loss=0.2),
        ended("search-001", "non_finite_loss"),
        {"event": "study_finished"},
    )
    found, reasons = read_curves(path)
    assert found == {"search-000": [(1, 0.1)], "search-001": [(1, 0.2), (2, 0.3)]}
    assert reasons == {"search-001": "non_finite_loss"}
    assert read_curves(path, metric="val_recall_at_1")[0] == {"search-000": [(1, 0.5)], "search-001": [(2, 0.6)]}


def test_after_a_resume_the_last_report_counts_and_the_trial_runs_again(tmp_path):
    path = write(
        tmp_path / "events.jsonl",
        epoch("search-000", 1, val_map_at_r=0.1),
        epoch("search-000", 2, val_map_at_r=0.2),
        ended("search-000", "crashed"),
        {"event": "trial_retried", "trial": "search-000", "error": "killed"},
        epoch("search-000", 2, val_map_at_r=0.25),
    )
    assert read_curves(path) == ({"search-000": [(1, 0.1), (2, 0.25)]}, {})


@pytest.mark.parametrize("tail", ['{"event": "epoch", "tri', '{"event": "study_fini', "{", '{"a": "ü'[:-1]])
def test_a_line_being_written_is_left_for_later(tmp_path, tail, caplog):
    path = write(tmp_path / "events.jsonl", epoch("search-000", 1, val_map_at_r=0.1), tail=tail)
    assert read_curves(path)[0] == {"search-000": [(1, 0.1)]}
    assert not caplog.records


def test_a_line_cut_off_by_a_kill_is_passed_over_and_reported(tmp_path, caplog):
    path = write(tmp_path / "events.jsonl", epoch("search-000", 1, val_map_at_r=0.1), tail='{"event": "epo\n')
    with path.open("a") as file:
        file.write(json.dumps(epoch("search-000", 2, val_map_at_r=0.2)) + "\n")
    with caplog.at_level(logging.WARNING, logger="raydml.report.curves"):
        assert read_curves(path)[0] == {"search-000": [(1, 0.1), (2, 0.2)]}
    assert "events.jsonl:2 is not a whole event" in caplog.text


CURVES = {
    "search-000": [(1, 0.2), (2, 0.5), (3, 0.4)],
    "search-001": [(1, 0.3)],
    "search-002": [(1, 0.1), (2, math.nan)],
    "search-003": [(1, 0.2), (2, 0.3), (3, 0.45)],
    "search-004": [(1, 0.15), (2, 0.2)],
}
ENDED = {
    "search-000": "finished",
    "search-001": "stopped_early",
    "search-002": "non_finite_loss",
    "search-003": "finished",
    "search-004": "stopped_early",
}


def test_learning_curves_set_the_winner_apart(tmp_path, figures):
    learning_curves(CURVES, ENDED, "search-000", "val_map_at_r", tmp_path / "curves.png")
    axes = figures[0].axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1 or line.get_linestyle() != "None"]
    by_values = {tuple(line.get_ydata()): line for line in lines}
    winner = by_values[0.2, 0.5, 0.4]
    others = [line for line in lines if line is not winner]
    assert len(others) == 4
    assert winner.get_linewidth() > 2 * max(line.get_linewidth() for line in others)
    assert winner.get_zorder() > max(line.get_zorder() for line in others)
    grey = to_hex(by_values[0.15, 0.2].get_color())
    assert grey == to_hex(by_values[(0.3,)].get_color())
    red, green, blue = (int(grey[place : place + 2], 16) for place in (1, 3, 5))
    assert red == green == blue
    assert to_hex(by_values[0.2, 0.3, 0.45].get_color()) not in (grey, to_hex(winner.get_color()))
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [
        "winner: search-000\n0.5000 at epoch 2",
        "ran to the end (1)",
        "non-finite loss (1)",
        "stopped early (2)",
    ]
    assert axes.get_title(loc="left") == "validation MAP@R of 5 trials"


def test_curves_become_a_picture_in_a_new_folder(tmp_path):
    path = learning_curves(CURVES, ENDED, "search-000", "val_map_at_r", tmp_path / "new" / "curves.png")
    assert imread(path).shape[:2] == (728, 1260)
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_learning_curves_of_a_study_that_has_hardly_begun(tmp_path, figures):
    learning_curves({}, {}, None, "val_map_at_r", tmp_path / "a.png")
    learning_curves({"search-000": []}, {}, "search-000", "val_map_at_r", tmp_path / "b.png")
    learning_curves({"search-000": [(1, math.nan)]}, {}, None, "val_map_at_r", tmp_path / "c.png")
    for figure in figures:
        assert [text.get_text() for text in figure.axes[0].texts] == ["no epoch has ended yet"]
    learning_curves({"search-000": [(1, 0.3)]}, {}, None, "val_recall_at_8", tmp_path / "d.png")
    assert figures[-1].axes[0].get_title(loc="left") == "validation Recall@8 of 1 trial"
    assert [text.get_text() for text in figures[-1].axes[0].get_legend().get_texts()] == ["not ended (1)"]


def test_a_winner_without_a_curve_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'search-009' has no curve; curves of search-000, search-001"):
        learning_curves(CURVES, ENDED, "search-009", "val_map_at_r", tmp_path / "a.png")
