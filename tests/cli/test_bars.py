"""Long steps tell how far they are, and bars on a terminal show it."""

import io
import logging

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from raydml.cli.bars import StepBars
from raydml.evaluation.embed import embed
from raydml.evaluation.retrieval import nearest_neighbours
from raydml.images.pixels import packed
from raydml.images.preprocessing import Preprocessing
from raydml.ops import progress
from raydml.ops.clustering import KMeans, cluster
from raydml.ops.progress import Step, step_of, tell


class Kept(logging.Handler):
    """The steps that were told."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.steps = []

    def emit(self, record):
        self.steps.append(step_of(record))


@pytest.fixture
def told():
    """The steps told while a test runs."""
    logger, kept = logging.getLogger("raydml.steps"), Kept()
    before = logger.level, logger.propagate
    logger.addHandler(kept)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield kept.steps
    logger.removeHandler(kept)
    logger.setLevel(before[0])
    logger.propagate = before[1]


def test_searching_tells_each_chunk(told):
    rows = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    nearest_neighbours(rows, k=1, working_bytes=(4 * 128 + 64) * 40)  # 40 queries against 128 columns at a time
    assert told == [Step("searching", done, 100, "queries") for done in (40, 80, 100)]


def test_embedding_tells_each_batch(told):
    preprocessing = Preprocessing(resize_px=4, crop_px=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = packed(np.zeros((7, 4, 4, 3), dtype=np.uint8))
    embed(nn.Flatten(), pixels, preprocessing, device="cpu", batch_size=3)
    assert told == [Step("embedding", done, 7, "images") for done in (3, 6, 7)]


def test_clustering_reports_its_beginning_and_its_end(told):
    cluster(np.array([[0.0], [0.1], [5.0], [5.1]]), 2, KMeans(iterations=50), torch.device("cpu"))
    assert told == [Step("clustering", 0, 50, "iterations"), Step("clustering", 50, 50, "iterations")]


def test_nobody_listening_costs_no_record(monkeypatch):
    monkeypatch.setattr(progress._logger, "debug", lambda *_a, **_k: pytest.fail("a record was made"))
    logger = logging.getLogger("raydml.steps")
    before = logger.level
    logger.setLevel(logging.INFO)
    tell("embedding", 1, 2, "images")
    logger.setLevel(before)


def record_of(step):
    record = logging.LogRecord("raydml.steps", logging.DEBUG, "", 0, "", (), None)
    record.step = step
    return record


def shown(seconds, *, terminal=True):
    """What a console holds within a step of three records at these times, and the bars after it."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    bars = StepBars(console, clock=iter(seconds).__next__)
    middle = ""
    for done in (0, 600, 1200):
        bars.emit(record_of(Step("embedding", done, 1200, "images")))
        if done == 600 and bars._bars is not None:
            bars._bars.refresh()
            middle = console.file.getvalue()
    return middle, bars


def test_a_bar_shows_what_how_far_and_how_fast():
    middle, bars = shown([0, 2, 4])
    assert "embedding" in middle
    assert "600/1200" in middle
    assert "300 images/s" in middle
    assert bars._bars is None, "over"
    assert bars._tasks == {}


def test_no_bar_for_what_is_over_at_once_nor_where_there_is_no_terminal():
    assert shown([0, 0.2, 0.4])[0] == ""
    assert shown([0, 20, 40], terminal=False)[0] == ""
