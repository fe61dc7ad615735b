"""Queries and their neighbours: ranked by hand and by a slow loop, and looked at in the axes and pixels of pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from raydml.evaluation.nearness import RetrievalError
from raydml.evaluation.protocols import ProtocolError
from raydml.images.pixels import packed
from raydml.ops.wording import counted
from raydml.report import retrievals
from raydml.report.image_rows import (
    DPI,
    WIDTH_IN,
    ImageCell,
    ImageRow,
    LabelledImages,
    draw_image_rows,
    one_line,
    two_lines,
)
from raydml.report.retrievals import (
    best_queries,
    changed_queries,
    draw_queries,
    draw_sample,
    random_queries,
    rank_queries,
    worst_queries,
)
from tests.evaluation.slow_ranking import slow_recall_and_map
from tests.report.drawn_squares import GREEN, RED, rows_of, squares, words_of

# On a line, classes 0 0 0 | 1 1 1, and one image of class 1 among those of class 0.
PLACES = np.array([[0.0], [1.0], [2.5], [10.0], [11.0], [1.25]], dtype=np.float32)
LABELS = np.array([0, 0, 0, 1, 1, 1])
NAMES = ["pears", "plums $ 2"]
IMAGES = LabelledImages(packed(squares(6)), LABELS, NAMES)
# The same with that image among its own: every query finds all of its class first.
SORTED = np.array([[0.0], [1.0], [2.5], [10.0], [11.0], [12.0]], dtype=np.float32)


def test_every_image_searches_all_others():
    ranked = rank_queries(PLACES, LABELS, num_neighbours=2)
    assert ranked.queries.tolist() == [0, 1, 2, 3, 4, 5]
    assert ranked.neighbours.tolist() == [[1, 5], [5, 0], [5, 1], [4, 2], [3, 2], [1, 0]]
    assert ranked.distances[:2].tolist() == [[1.0, 1.25], [0.25, 1.0]]
    assert ranked.right.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [1, 0], [0, 0]]
    assert ranked.num_relevant.tolist() == [2] * 6
    assert ranked.num_right.tolist() == [1, 1, 1, 1, 1, 0]
    # Half of the precision at each right one of the first two: 1/1, or 1/2.
    assert ranked.average_precision.tolist() == [0.5, 0.25, 0.25, 0.5, 0.5, 0.0]
    assert ranked.map_at_r == pytest.approx(1 / 3)
    assert ranked.recall_at_1 == 0.5


def test_queries_search_the_gallery_alone_where_images_have_roles():
    roles = ["query", "gallery", "gallery", "gallery", "gallery", "query"]
    ranked = rank_queries(PLACES, LABELS, roles, num_neighbours=3)
    assert ranked.queries.tolist() == [0, 5]
    assert ranked.neighbours.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert ranked.num_relevant.tolist() == [2, 2]
    assert ranked.average_precision.tolist() == [1.0, 0.0]
    with pytest.raises(ProtocolError, match="1 images without a role"):
        rank_queries(PLACES, LABELS, ["", *roles[1:]])


def test_distractors_are_found_and_never_right():
    # Image 1 is nearest to both of its class, and image 5 to image 1.
    ranked = rank_queries(PLACES, LABELS, ["", "distractor", "", "", "", ""], num_neighbours=3)
    assert ranked.queries.tolist() == [0, 2, 3, 4, 5]
    assert ranked.neighbours[:2].tolist() == [[1, 5, 2], [5, 1, 0]]
    assert ranked.distances[0].tolist() == [1.0, 1.25, 2.5]
    assert ranked.right[0].tolist() == [False, False, True]
    assert ranked.num_relevant.tolist() == [1, 1, 2, 2, 2]
    with_roles = rank_queries(
        PLACES, LABELS, ["query", "distractor", "gallery", "gallery", "gallery", "query"], num_neighbours=2
    )
    assert with_roles.neighbours.tolist() == [[1, 2], [1, 2]]
    assert with_roles.average_precision.tolist() == [0.0, 0.0]


def test_a_query_behind_its_own_duplicates_does_not_find_itself():
    places = np.zeros((7, 1), dtype=np.float32)
    labels = np.array([0, 0, 1, 1, 2, 2, 0])
    for roles in (None, [""] * 6 + ["distractor"]):
        ranked = rank_queries(places, labels, roles, num_neighbours=2)
        assert ranked.neighbours[:6].tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]


def test_the_number_of_neighbours_kept_and_the_size_of_a_part_change_no_number(monkeypatch):
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 4, 50)
    rows = generator.standard_normal((50, 3)).astype(np.float32)
    whole = rank_queries(rows, labels, num_neighbours=30)
    assert whole.neighbours.shape == (50, 30)
    monkeypatch.setattr(retrievals, "_MAX_PAIRS", 100)
    parts = rank_queries(rows, labels, num_neighbours=3)
    assert parts.neighbours.tolist() == whole.neighbours[:, :3].tolist()
    for one, other in zip(parts[4:], whole[4:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    right = [whole.right[query, :relevant].sum() for query, relevant in enumerate(whole.num_relevant)]
    assert whole.num_right.tolist() == right


def test_the_only_image_of_its_class_has_nothing_to_find():
    ranked = rank_queries(PLACES[:3], np.array([0, 0, 1]))
    assert ranked.num_relevant.tolist() == [1, 1, 0]
    assert ranked.average_precision[:2].tolist() == [1.0, 1.0]
    assert math.isnan(ranked.average_precision[2])
    assert ranked.map_at_r == 1.0
    alone = rank_queries(PLACES[:3], np.array([0, 1, 2]))
    assert math.isnan(alone.map_at_r)
    assert alone.neighbours.shape == (3, 2)


def test_neighbours_beyond_r_do_not_count():
    # Class 1 has one other image, and it comes second: AP@1 is 0 however many neighbours are ranked.
    ranked = rank_queries(np.array([[0.0], [1.0], [3.0]], dtype=np.float32), np.array([1, 0, 1]))
    assert ranked.right[0].tolist() == [False, True]
    assert ranked.average_precision[0] == 0.0


def test_the_means_are_those_of_a_slow_loop():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 9, 120)
    rows = (generator.standard_normal((9, 5))[labels] + generator.standard_normal((120, 5))).astype(np.float32)
    ranked = rank_queries(rows, labels, num_neighbours=119)
    assert 0.05 < ranked.map_at_r < 0.95
    recall, average = slow_recall_and_map(torch.from_numpy(rows), labels)
    assert ranked.map_at_r == pytest.approx(average, abs=1e-12)
    assert ranked.recall_at_1 == pytest.approx(recall, abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "labels", "roles"),
    [(PLACES[:1], LABELS[:1], None), (PLACES, LABELS[:3], None), (PLACES, LABELS, ["query"])],
)
def test_what_does_not_fit_together_is_refused(rows, labels, roles):
    with pytest.raises(ValueError, match="the numbers must be equal and at least 2"):
        rank_queries(rows, labels, roles)


def test_embeddings_that_hold_nan_are_refused():
    with pytest.raises(RetrievalError, match="NaN"):
        rank_queries(PLACES * np.nan, LABELS)


def test_retrievals_show_the_true_neighbours_framed_by_class(tmp_path, figures):
    draw_sample(rank_queries(PLACES, LABELS, num_neighbours=2), IMAGES, tmp_path / "r.png", num_queries=6)
    shown = {row[0].number: row for row in rows_of(figures[0])}
    # By hand, nearest first.
    neighbours = {0: (1, 5), 1: (5, 0), 2: (5, 1), 3: (4, 2), 4: (3, 2), 5: (1, 0)}
    assert set(shown) == set(neighbours)
    for query, row in shown.items():
        assert tuple(cell.number for cell in row[1:]) == neighbours[query]
        right = [LABELS[other] == LABELS[query] for other in neighbours[query]]
        assert [cell.frame for cell in row[1:]] == [GREEN if good else RED for good in right]
        assert [cell.name for cell in row] == [NAMES[LABELS[number]] for number in (query, *neighbours[query])]
        assert row[0].caption == "query"
        assert [cell.caption[0] for cell in row[1:]] == ["✓" if good else "✗" for good in right]
    assert shown[0][1].caption == "✓ 1.00"
    assert shown[1][1].caption == "✗ 0.250"
    # The nearest is right for 0, 3 and 4; the rows with a wrong one come last.
    assert {row[0].number for row in rows_of(figures[0])[:3]} == {0, 3, 4}
    title = words_of(figures[0])
    assert "50.0% of all" in title
    assert "the last 3 rows" in title
    assert "AP@R 0.50, 1 of the 2 nearest are right" in title


def test_the_frames_are_in_the_picture(tmp_path):
    draw_sample(rank_queries(PLACES, LABELS), IMAGES, tmp_path / "r.png", num_queries=4)
    picture = imread(tmp_path / "r.png")
    assert picture.shape[1] == WIDTH_IN * DPI
    pixels = (picture[..., :3] * 255).round().astype(int)
    for colour in (GREEN, RED):
        expected = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(pixels - expected).max(axis=2) <= 2).sum() > 2000, colour
    assert [file.name for file in tmp_path.iterdir()] == ["r.png"]


def clouds(noise, num_classes=8, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), 3)
    places = np.eye(num_classes)[labels] + noise * generator.standard_normal((len(labels), num_classes))
    names = [f"class {name}" for name in range(num_classes)]
    return LabelledImages(packed(squares(len(labels))), labels, names), places.astype(np.float32)


def test_queries_are_of_different_classes_and_failures_only_where_there_are(tmp_path, figures):
    images, places = clouds(noise=0.01)
    draw_sample(rank_queries(places, images.labels, num_neighbours=2), images, tmp_path / "r.png")
    rows = rows_of(figures[0])
    assert len({row[0].name for row in rows}) == 6
    assert all(cell.frame == GREEN for row in rows for cell in row[1:])
    assert "100.0% of all" in words_of(figures[0])
    assert "wrong" not in words_of(figures[0])
    alone = LabelledImages(images.pixels, np.arange(24), [str(name) for name in range(24)])
    draw_sample(rank_queries(places, alone.labels), alone, tmp_path / "r.png")
    assert all(cell.frame == RED for row in rows_of(figures[1]) for cell in row[1:])
    assert len(rows_of(figures[1])) == 6
    assert "no other image of its class" in words_of(figures[1])


def test_the_seed_decides_which_queries():
    images, places = clouds(noise=0.5)
    ranked = rank_queries(places, images.labels)
    first, again, other = (random_queries(ranked, images.labels, 6, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 6


def test_a_set_of_fewer_images_than_neighbours(tmp_path, figures):
    draw_sample(rank_queries(PLACES[:3], LABELS[:3]), IMAGES, tmp_path / "r.png")
    assert [len(row) for row in rows_of(figures[0])] == [3, 3, 3]


def test_queries_search_the_gallery_alone(tmp_path, figures):
    roles = ["query", "gallery", "gallery", "gallery", "gallery", "query"]
    draw_sample(rank_queries(PLACES, LABELS, roles, num_neighbours=2), IMAGES, tmp_path / "r.png")
    # Image 5 is between 1 and 2, but is itself a query.
    assert [[cell.number for cell in row] for row in rows_of(figures[0])] == [[0, 1, 2], [5, 1, 2]]


def test_the_best_and_the_worst_are_those_of_the_highest_and_lowest_precision():
    ranked = rank_queries(PLACES, LABELS)  # AP@R 1/2, 1/4, 1/4, 1/2, 1/2, 0
    assert best_queries(ranked, LABELS, 2) == [0, 3]
    # Of different classes, then the second of each; the last has found nothing and is not among the best.
    assert best_queries(ranked, LABELS, 9) == [0, 3, 4, 1, 2]
    # Of equal ones first the one nearest to a wrong image.
    assert worst_queries(ranked, LABELS, 4) == [5, 1, 2, 3]
    perfect = rank_queries(SORTED, LABELS)
    assert worst_queries(perfect, LABELS, 4) == []
    nothing = rank_queries(PLACES, np.arange(6))
    assert best_queries(nothing, np.arange(6), 4) == worst_queries(nothing, np.arange(6), 4) == []


def test_of_perfect_queries_the_one_with_most_to_find_comes_first():
    places = np.array([[0.0], [0.1], [5.0], [6.0], [7.0]], dtype=np.float32)
    labels = np.array([0, 0, 1, 1, 1])
    assert best_queries(rank_queries(places, labels), labels, 2) == [2, 0]


def test_changed_queries_are_those_with_the_largest_difference_either_way():
    worse, better = rank_queries(PLACES, LABELS), rank_queries(SORTED, LABELS)
    # Gains 1/2, 3/4, 3/4, 1/2, 1/2, 1.
    assert changed_queries(better, worse, LABELS, 4) == ([5, 1, 2, 3], [])
    assert changed_queries(worse, better, LABELS, 4) == ([], [5, 1, 2, 3])
    assert changed_queries(worse, worse, LABELS, 4) == ([], [])
    with pytest.raises(ValueError, match="the same queries"):
        changed_queries(better, rank_queries(PLACES[:4], LABELS[:4]), LABELS, 2)


def test_two_rankings_are_below_each_other(tmp_path, figures):
    rankings = {
        "run A": rank_queries(SORTED, LABELS, num_neighbours=2),
        "run B": rank_queries(PLACES, LABELS, num_neighbours=2),
    }
    draw_queries([5, 1], rankings, IMAGES, tmp_path / "r.png", title="Better in A")
    rows = rows_of(figures[0])
    assert [[cell.number for cell in row] for row in rows] == [[5, 4, 3], [1, 0], [1, 0, 2], [5, 0]]
    assert [[cell.frame for cell in row][-2:] for row in rows] == [[GREEN] * 2, [RED] * 2, [GREEN] * 2, [RED, GREEN]]
    # The second row leaves the place of the query empty.
    assert [cell.left for cell in rows[1]] == [cell.left for cell in rows[0][1:]]
    texts = [text.get_text() for text in figures[0].texts]
    assert texts == [
        "Better in A",
        "run A: AP@R 1.00, 2 of the 2 nearest are right",
        "run B: AP@R 0.00, 0 of the 2 nearest are right",
        "run A: AP@R 1.00, 2 of the 2 nearest are right",
        "run B: AP@R 0.25, 1 of the 2 nearest are right",
    ]
    assert len(figures[0].artists) == 1  # one line between the two queries


def test_neighbours_beyond_those_to_be_found_can_be_left_out(tmp_path, figures):
    ranked = rank_queries(SORTED, LABELS, num_neighbours=4)
    for within_r in (True, False):
        draw_queries([0], {"": ranked}, IMAGES, tmp_path / "r.png", title="", within_r=within_r)
    assert [len(rows_of(figure)[0]) for figure in figures] == [3, 5]


def test_only_the_images_shown_are_read(tmp_path):
    class Counting:
        read_rows = ()

        def __len__(self):
            return 6

        def read(self, rows):
            self.read_rows = (*self.read_rows, *rows)
            return [squares(6)[row] for row in rows]

    pixels = Counting()
    rows = [ImageRow("", [ImageCell(4), None, ImageCell(1)]), ImageRow("again", [ImageCell(1)])]
    draw_image_rows(rows, pixels, tmp_path / "r.png")
    assert pixels.read_rows == (1, 4)


def test_rows_without_an_image_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 rows without an image"):
        draw_image_rows([ImageRow("empty", [None])], IMAGES.pixels, tmp_path / "r.png")


def test_texts_do_not_overlap_images_or_one_another(tmp_path, figures):
    long = "Mediterranean-Vegetable-Soup with a very long name indeed"
    rows = [
        ImageRow(
            " ".join(["a heading of many words"] * 6), [ImageCell(0, long, "✓ 0.123"), ImageCell(1, long, "query")] * 2
        ),
        ImageRow("a heading as wide as the caption above it", [ImageCell(2, "x", "✗ 1.00", RED)]),
    ]
    draw_image_rows(rows, IMAGES.pixels, tmp_path / "r.png", title=" ".join(["title"] * 30))
    figure = figures[0]
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    for axes in figure.axes:
        boxes += [part.get_window_extent() for part in (axes.patch, axes.title, axes.xaxis.label)]
    whole = figure.bbox
    for number, box in enumerate(boxes):
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1  # noqa: PT018
        for other in boxes[number + 1 :]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert width <= 1 or height <= 1, (box, other)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("short", "short"),
        ("x" * 19, "x" * 19),
        ("Royal-Gala-Apples from Italy", "Royal-Gala-Apples\nfrom Italy"),
        ("Japanese_(hiragana)/character05", "Japanese_\n(hiragana)/character05"),
        ("a" * 30, "a" * 19 + "\n" + "a" * 11),
        ("b" * 30 + "c" * 30, "b" * 18 + "…\n" + "c" * 19),
    ],
)
def test_long_class_names_keep_both_ends(name, shown):
    found = two_lines(name, 19)
    if name.startswith("Japanese"):
        assert found.split("\n")[-1].endswith("character05")
        assert max(map(len, found.split("\n"))) <= 19
    else:
        assert found == shown


def test_names_on_one_line_and_counted_words():
    assert one_line("short", 8) == "short"
    assert one_line("b" * 9 + "c" * 9, 8) == "bbbb…ccc"
    assert [counted(number, "row") for number in (0, 1, 1234)] == ["0 rows", "1 row", "1,234 rows"]
    assert counted(2, "class", "classes") == "2 classes"


def test_an_ink_frame_is_neither_green_nor_red(tmp_path, figures):
    draw_queries([0], {"": rank_queries(PLACES, LABELS)}, IMAGES, tmp_path / "r.png", title="")
    frame = rows_of(figures[0])[0][0].frame
    assert frame not in (GREEN, RED)
