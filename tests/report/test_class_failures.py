"""The classes that fail and what they are mistaken for: by hand, and as bars and rows of images."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from raydml.images.pixels import packed
from raydml.report.image_rows import DPI, WIDTH_IN, LabelledImages
from raydml.report.retrievals import ClassFailure, class_failures, draw_class_failures, draw_confusions, rank_queries
from tests.report.drawn_squares import RED, rows_of, squares

# On a line. The pears are together; two of the plums are beside figs, and one is beside a pear.
PLACES = np.array([[0.0], [0.1], [0.2], [5.0], [6.0], [0.45], [5.2], [6.1]], dtype=np.float32)
LABELS = np.array([0, 0, 0, 1, 1, 1, 2, 2])
NAMES = ["pears", "plums $", "figs"]
RANKED = rank_queries(PLACES, LABELS)


def test_the_classes_with_the_lowest_recall_come_first():
    figs, plums, pears = class_failures(RANKED, LABELS)
    # Nearest: 6 -> 3, 7 -> 4 (plums); R = 1.
    assert figs == ClassFailure(2, 2, 0.0, 0.0, num_wrong=2, mistaken_for=1, num_mistaken=2)
    # Nearest: 3 -> 6, 4 -> 7 (figs), 5 -> 2 (a pear). R = 2: 3 finds 4 second, 1/2 * 1/2, and the others none.
    assert plums._replace(map_at_r=0.0) == ClassFailure(1, 3, 0.0, 0.0, num_wrong=3, mistaken_for=2, num_mistaken=2)
    assert plums.map_at_r == pytest.approx(0.25 / 3)
    assert pears == ClassFailure(0, 3, 1.0, 1.0, num_wrong=0, mistaken_for=None, num_mistaken=0)


def test_of_equally_frequent_mistakes_the_lower_label_is_named():
    """The two images alone in their class have nothing to find, and fail at nothing."""
    places = np.array([[0.0], [10.0], [0.1], [10.1]], dtype=np.float32)
    (found,) = class_failures(rank_queries(places, np.array([0, 0, 2, 1])), np.array([0, 0, 2, 1]))
    assert (found.label, found.mistaken_for, found.num_mistaken, found.num_wrong) == (0, 1, 1, 2)


def test_classes_without_queries_are_left_out():
    """A plum searches two others, pears and figs; a kiwi has no other kiwi to find."""
    roles = ["query", *["gallery"] * 7]
    labels = np.array([3, 0, 0, 1, 1, 1, 2, 2])
    assert class_failures(rank_queries(PLACES, labels, roles), labels) == []
    roles[3] = "query"
    (only,) = class_failures(rank_queries(PLACES, labels, roles), labels)
    assert (only.label, only.num_queries, only.recall_at_1, only.mistaken_for) == (1, 1, 0.0, 2)


def test_the_bars_are_the_numbers_and_the_names_say_what_is_confused(tmp_path, figures):
    failures = class_failures(RANKED, LABELS)
    draw_class_failures(failures, NAMES, tmp_path / "c.png", title="Failing", mean_recall_at_1=3 / 8)
    axes = figures[0].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["figs (2)\n→ plums $: 2 of 2", "plums $ (3)\n→ figs: 2 of 3", "pears (3)"]
    recalls, precisions = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert recalls == [0.0, 0.0, 1.0]
    np.testing.assert_allclose(precisions, [0.0, 0.25 / 3, 1.0])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the worst is on top
    assert [line.get_xdata()[0] for line in axes.lines] == [3 / 8]
    draw_class_failures(failures, NAMES, tmp_path / "c.png", title="", mean_recall_at_1=0.4, num_classes=2)
    assert len(figures[1].axes[0].get_yticklabels()) == 2


def test_nothing_in_the_bars_overlaps_with_many_long_names(tmp_path, figures):
    names = [f"Mediterranean_{number}/a-very-long-class-name-$-indeed" for number in range(30)]
    failures = [ClassFailure(label, 1000, 0.1, 0.05, 900, 29 - label, 100) for label in range(30)]
    draw_class_failures(failures, names, tmp_path / "c.png", title="Failing", mean_recall_at_1=0.9)
    figure = figures[0]
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).draw()
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) == 12
    boxes = [label.get_window_extent() for label in labels]
    assert min(box.x0 for box in boxes) >= 0
    heights = sorted((box.y0, box.y1) for box in boxes)
    assert all(lower[1] <= upper[0] + 1 for lower, upper in pairwise(heights))
    assert figure.axes[0].get_window_extent().width > 0.35 * WIDTH_IN * DPI


def test_confusions_show_queries_beside_the_wrong_neighbour(tmp_path, figures):
    images = LabelledImages(packed(squares(8)), LABELS, NAMES)
    draw_confusions(class_failures(RANKED, LABELS), RANKED, images, tmp_path / "c.png", title="Confused", num_pairs=2)
    figs, plums = rows_of(figures[0])
    # The nearer mistake first: 7 is 0.1 from 4, 6 is 0.2 from 3.
    assert [cell.number for cell in figs] == [7, 4, 6, 3]
    assert [cell.number for cell in plums] == [4, 7, 3, 6]
    assert [cell.frame == RED for cell in figs] == [False, True, False, True]
    assert [cell.name for cell in plums] == ["plums $", "figs", "plums $", "figs"]
    assert figs[1].caption == "✗ 0.100"
    draw_confusions(class_failures(RANKED, LABELS), RANKED, images, tmp_path / "c.png", title="", num_pairs=3)
    # The plum mistaken for a pear comes after those mistaken for figs.
    assert [(cell.number, cell.name) for cell in rows_of(figures[1])[1][4:]] == [(5, "plums $"), (2, "pears")]
    headings = [text.get_text() for text in figures[0].texts]
    assert headings == [
        "Confused",
        "figs → plums $: 2 of 2 mistakes in 2 queries",
        "plums $ → figs: 2 of 3 mistakes in 3 queries",
    ]


def test_a_second_query_of_the_same_wrong_neighbour_comes_last(tmp_path, figures):
    places = np.array([[0.0], [0.3], [9.0], [0.1], [9.5]], dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 1])
    ranked = rank_queries(places, labels)
    images = LabelledImages(packed(squares(5)), labels, ["a", "b"])
    draw_confusions(class_failures(ranked, labels), ranked, images, tmp_path / "c.png", title="", num_pairs=3)
    row = next(row for row in rows_of(figures[0]) if row[0].name == "a")
    # 0 and 1 have the same nearest neighbour, 3; 2 has 4.
    assert [cell.number for cell in row] == [0, 3, 2, 4, 1, 3]


def test_the_picture_is_written(tmp_path):
    path = draw_class_failures(
        class_failures(RANKED, LABELS), NAMES, tmp_path / "new" / "c.png", title="Failing", mean_recall_at_1=0.4
    )
    assert imread(path).shape[1] == WIDTH_IN * DPI
    assert [file.name for file in path.parent.iterdir()] == ["c.png"]
