"""Long steps report their progress; bars on a terminal show it, and lines in a log."""

import io
import logging
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from raydml.cli.live_view import StepBars
from raydml.evaluation.embed import embed
from raydml.evaluation.ranking import nearest_neighbours
from raydml.images.pixels import packed
from raydml.images.preprocessing import Preprocessing
from raydml.ops import progress
from raydml.ops.clustering import KMeans, cluster
from raydml.ops.progress import ProgressLines, StepProgress, report_progress


def test_searching_reports_each_chunk(reported):
    rows = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    nearest_neighbours(rows, k=1, working_bytes=(4 * 128 + 64) * 40)  # 40 queries against 128 columns at a time
    assert reported == [StepProgress("searching", done, 100, "queries") for done in (40, 80, 100)]


def test_embedding_reports_each_batch(reported):
    preprocessing = Preprocessing(resize_px=4, crop_px=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = packed(np.zeros((7, 4, 4, 3), dtype=np.uint8))
    embed(nn.Flatten(), pixels, preprocessing, device="cpu", batch_size=3)
    assert reported == [StepProgress("embedding", done, 7, "images") for done in (3, 6, 7)]


def test_clustering_reports_its_beginning_and_its_end(reported):
    cluster(np.array([[0.0], [0.1], [5.0], [5.1]]), 2, KMeans(iterations=50), torch.device("cpu"))
    assert reported == [
        StepProgress("clustering", 0, 50, "iterations"),
        StepProgress("clustering", 50, 50, "iterations"),
    ]


def test_without_a_handler_no_record_is_made(monkeypatch):
    monkeypatch.setattr(progress._progress_logger, "debug", lambda *_a, **_k: pytest.fail("a record was made"))
    logger = logging.getLogger("raydml.progress")
    before = logger.level
    logger.setLevel(logging.INFO)
    report_progress("embedding", 1, 2, "images")
    logger.setLevel(before)


def record_of(step):
    record = logging.LogRecord("raydml.progress", logging.DEBUG, "", 0, "", (), None)
    record.progress = step
    return record


def shown(seconds, *, terminal=True):
    """The text of a console within a step of three reports at these times, and the bars after it."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    bars = StepBars(console, clock=iter(seconds).__next__)
    middle = ""
    for done in (0, 600, 1200):
        bars.emit(record_of(StepProgress("embedding", done, 1200, "images")))
        if done == 600 and bars._bars is not None:
            bars._bars.refresh()
            middle = console.file.getvalue()
    return middle, bars


def test_a_bar_shows_what_how_far_and_how_fast():
    middle, bars = shown([0, 2, 4])
    assert "embedding" in middle
    assert "600 of 1,200" in middle
    assert "300 images/s" in middle
    assert bars._bars is None, "over"
    assert bars._tasks == {}


def test_bytes_are_shown_in_words_also_without_a_total():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    bars = StepBars(console, clock=iter([0, 2]).__next__)
    for done in (0, 3_000_000):
        bars.emit(record_of(StepProgress("downloading", done, None, "bytes")))
    bars._bars.refresh()
    assert "3.0 MB  1.5 MB/s" in console.file.getvalue()
    bars.close()


def test_no_bar_for_a_short_step_nor_without_a_terminal():
    assert (shown([0, 0.2, 0.4])[0], shown([0, 20, 40], terminal=False)[0]) == ("", "")


def test_lines_in_the_log_show_how_far_and_how_fast_where_there_is_no_terminal(caplog):
    caplog.set_level(logging.INFO, "raydml")
    lines = ProgressLines(clock=iter([0.0, 5.0, 12.0, 13.0, 24.0, 30.0, 31.0, 45.0]).__next__)
    for done in (0, 500, 1200, 1300, 2400, 3000):  # the last one ends the step
        lines.emit(record_of(StepProgress("embedding", done, 3000, "images")))
    for done in (0, 14):  # the next step of this name begins anew
        lines.emit(record_of(StepProgress("embedding", done, 20, "images")))
    assert [record.message for record in caplog.records] == [
        "embedding: 1,200 of 3,000 images (100/s)",
        "embedding: 2,400 of 3,000 images (100/s)",
        "embedding: 14 of 20 images (1/s)",
    ]


def test_no_lines_where_bars_are_shown(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "raydml")
    monkeypatch.setattr(sys, "stderr", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})())
    lines = ProgressLines(clock=iter([0.0, 99.0]).__next__)
    for done in (0, 500):
        lines.emit(record_of(StepProgress("embedding", done, 3000, "images")))
    assert not caplog.records
