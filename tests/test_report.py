"""Pictures looked at through their axes and their pixels; curves and tables from files written by hand."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from raydml import report
from raydml.images.pixels import packed
from raydml.report import learning_curves, read_curves, sample_retrievals, summary_markdown


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, kept instead of becoming files."""
    kept = []
    monkeypatch.setattr(report, "_save", lambda figure, path: kept.append(figure) or path)
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
    curves, reasons = read_curves(path)
    assert curves == {"search-000": [(1, 0.1)], "search-001": [(1, 0.2), (2, 0.3)]}
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
    with caplog.at_level(logging.WARNING, logger="raydml.report"):
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


# On a line, classes 0 0 0 | 1 1 1, and one image of class 1 among those of class 0.
PLACES = np.array([[0.0], [1.0], [2.5], [10.0], [11.0], [1.25]], dtype=np.float32)
LABELS = np.array([0, 0, 0, 1, 1, 1])
NAMES = ["pears", "plums $ 2"]
GREEN, RED = "#1a9641", "#d7191c"


def squares(labels, size=16):
    pixels = np.zeros((len(labels), size, size, 3), dtype=np.uint8)
    pixels[..., 2] = np.arange(len(labels))[:, None, None] * 10 + 5
    return pixels


def rows_of(figure):
    """For each row: the numbers of the images shown (their shade says which), frames, titles and captions."""
    columns = figure.axes[0].get_gridspec().ncols
    cells = [
        (
            int(axes.images[0].get_array()[0, 0, 2]) // 10,
            to_hex(axes.spines["left"].get_edgecolor()),
            axes.get_title(),
            axes.get_xlabel(),
        )
        for axes in figure.axes
    ]
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def test_retrievals_show_the_true_neighbours_framed_by_class(tmp_path, figures):
    sample_retrievals(
        packed(squares(LABELS)), LABELS, NAMES, PLACES, tmp_path / "r.png", num_queries=6, num_neighbours=2
    )
    shown = {row[0][0]: row for row in rows_of(figures[0])}
    # By hand, nearest first.
    neighbours = {0: (1, 5), 1: (5, 0), 2: (5, 1), 3: (4, 2), 4: (3, 2), 5: (1, 0)}
    assert set(shown) == set(neighbours)
    for query, row in shown.items():
        assert tuple(cell[0] for cell in row[1:]) == neighbours[query]
        right = [LABELS[other] == LABELS[query] for other in neighbours[query]]
        assert [cell[1] for cell in row[1:]] == [GREEN if good else RED for good in right]
        assert [cell[2] for cell in row] == [NAMES[LABELS[number]] for number in (query, *neighbours[query])]
        assert row[0][3] == f"query: {sum(right)} of 2 right"
        assert [cell[3][0] for cell in row[1:]] == ["✓" if good else "✗" for good in right]
    assert shown[0][1][3] == "✓  distance 1.00"
    assert shown[1][1][3] == "✗  distance 0.250"
    # The nearest is right for 0, 3 and 4; the rows with a wrong one come last.
    assert {row[0][0] for row in rows_of(figures[0])[:3]} == {0, 3, 4}
    title = figures[0].get_suptitle()
    assert "50.0% of all" in title
    assert "the last 3 rows" in title


def test_the_frames_are_in_the_picture(tmp_path):
    sample_retrievals(packed(squares(LABELS)), LABELS, NAMES, PLACES, tmp_path / "r.png", num_queries=4)
    pixels = (imread(tmp_path / "r.png")[..., :3] * 255).round().astype(int)
    for colour in (GREEN, RED):
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=2) <= 2).sum() > 2000, colour


def clouds(noise, num_classes=8, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), 3)
    places = np.eye(num_classes)[labels] + noise * generator.standard_normal((len(labels), num_classes))
    return packed(squares(labels)), labels, [f"class {name}" for name in range(num_classes)], places.astype(np.float32)


def test_queries_are_of_different_classes_and_failures_only_where_there_are(tmp_path, figures):
    sample_retrievals(*clouds(noise=0.01), tmp_path / "r.png", num_neighbours=2)
    rows = rows_of(figures[0])
    assert len({row[0][2] for row in rows}) == 6
    assert all(cell[1] == GREEN for row in rows for cell in row[1:])
    assert "100.0% of all" in figures[0].get_suptitle()
    assert "wrong" not in figures[0].get_suptitle()
    pixels, _, _, places = clouds(noise=0.01)
    sample_retrievals(pixels, np.arange(24), [str(name) for name in range(24)], places, tmp_path / "r.png")
    assert all(cell[1] == RED for row in rows_of(figures[1]) for cell in row[1:])
    assert len(rows_of(figures[1])) == 6


def test_the_seed_decides_which_queries(tmp_path, figures):
    for seed in (1, 1, 2):
        sample_retrievals(*clouds(noise=0.5), tmp_path / "r.png", seed=seed)
    first, again, other = ([row[0][0] for row in rows_of(figure)] for figure in figures)
    assert first == again != other
    assert len(set(first)) == 6


def test_fewer_images_than_asked_for(tmp_path, figures):
    sample_retrievals(packed(squares(LABELS)[:3]), LABELS[:3], NAMES, PLACES[:3], tmp_path / "r.png")
    assert [len(row) for row in rows_of(figures[0])] == [3, 3, 3]
    with pytest.raises(ValueError, match="3 images, 6 labels"):
        sample_retrievals(packed(squares(LABELS)[:3]), LABELS, NAMES, PLACES, tmp_path / "r.png")


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
def test_long_class_names_stay_tellable(name, shown):
    found = report._shortened(name)
    if name.startswith("Japanese"):
        assert found.split("\n")[-1].endswith("character05")
        assert max(map(len, found.split("\n"))) <= 19
    else:
        assert found == shown


SUMMARY = {
    "study": "digits",
    "metric": "val_map_at_r",
    "search": [
        {"trial": "search-004", "recipe": "mic: margin, distance_weighted", "best": 0.81234, "epoch_of_best": 7}
        | {"ended": "finished"},
        {"trial": "search-001", "recipe": "odd|name", "best": None, "epoch_of_best": None}
        | {"ended": "non_finite_loss"},
    ],
    "confirm": [
        {"configuration": "0123456789ab", "from_trial": "search-004", "mean": 0.8, "half_width": 0.0123, "num_runs": 4}
        | {"recipe": "mic: margin, distance_weighted"}
    ],
    "published": [],
    "final": [
        {
            "configuration": "0123456789ab",
            "recipe": "mic: margin, distance_weighted",
            "dataset": "digits",
            "backbone": "convnet",
            "embedding_dim": 64,
            "metrics": {
                "recall_at_1": {"mean": 0.95, "half_width": None},
                "map_at_r": {"mean": 0.7, "half_width": 0.01},
            },
            "untrained": {"recall_at_1": {"mean": 0.6, "half_width": None}},
            "validation": {
                "recall_at_1": {"mean": 0.97, "half_width": None},
                "map_at_r": {"mean": 0.8, "half_width": 0.02},
            },
            "untrained_validation": {"map_at_r": {"mean": 0.4, "half_width": None}},
        }
    ],
}


def test_the_summary_in_markdown():
    assert summary_markdown(SUMMARY) == (
        "# Study digits\n\n"
        "## Test classes, configuration `0123456789ab`: mic: margin, distance_weighted\n\n"
        "| metric | test | test, untrained | validation | validation, untrained |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| Recall@1 | 0.9500 | 0.6000 | 0.9700 | – |\n"
        "| MAP@R | 0.7000 ± 0.0100 | – | 0.8000 ± 0.0200 | 0.4000 |\n\n"
        "## Confirmed: validation MAP@R over folds and seeds\n\n"
        "| configuration | recipe | from | mean ± 95 % interval | runs |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `0123456789ab` | mic: margin, distance_weighted | search-004 | 0.8000 ± 0.0123 | 4 |\n\n"
        "## Search: 2 trials\n\n"
        "|  | trial | recipe | best validation MAP@R | at epoch | ended |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 1 | search-004 | mic: margin, distance_weighted | 0.8123 | 7 | ran to the end |\n"
        "| 2 | search-001 | odd\\|name | – | – | non-finite loss |\n"
    )


def test_a_stage_that_was_not_run_has_no_table():
    bare = {"study": "s", "metric": "val_recall_at_1", "search": [], "confirm": [], "final": [], "published": []}
    assert summary_markdown(bare) == "# Study s\n"


def published(variant, metrics, **facts):
    known = {"system": "S", "variant": variant, "dataset": "inshop", "protocol": "query_gallery", "backbone": None}
    known |= {"embedding_dim": None, "source": "a README", "status": "checked", "chosen_on_test": False}
    return {**known, "metrics": {name: {"mean": mean, "deviation": None} for name, mean in metrics.items()}, **facts}


def test_published_numbers_stand_below_ours_with_their_source_and_standing():
    (final,) = SUMMARY["final"]
    theirs = [
        published("strong", {"recall_at_1": 0.9}, backbone="resnet50", embedding_dim=128, chosen_on_test=True),
        published("weak", {"recall_at_1": 0.8, "recall_at_50": 0.97}),
        published("other k", {"recall_at_50": 0.99}),
        published("re-run", {"recall_at_1": 0.85}, chosen_on_test=None),
    ]
    theirs[1]["metrics"]["recall_at_1"]["deviation"] = 0.004
    text = summary_markdown({**SUMMARY, "final": [{**final, "dataset": "inshop"}], "published": theirs})
    section = text.partition("## Published numbers: ")[2].partition("\n\n## ")[0]
    # MAP@R is of ours alone, Recall@50 of theirs alone: neither can be compared.
    assert section == (
        "inshop, query gallery\n\n"
        "|  | backbone | dimensions | Recall@1 | source and standing |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| **this study**: mic: margin, distance_weighted | convnet | 64 | 0.9500 | configuration `0123456789ab` |\n"
        "| S: weak | – | – | 0.8000 (deviation 0.0040) | a README; checked |\n"
        "| S: re-run | – | – | 0.8500 | a README; checked; not known whether chosen on test |\n"
        "| S: strong | resnet50 | 128 | 0.9000 | a README; checked; chosen on test |\n\n"
        "Published numbers come from training on all training classes, where ours leave some out to validate on. Those "
        "marked *chosen on test* are of the epoch that was best on these very test classes; of those marked *not known "
        "whether chosen on test* the source does not say how the epoch was chosen; those without a mark were not "
        "chosen on them. Ours were chosen on validation classes, and the test classes were opened once."
    )


def test_published_recalls_of_binary_embeddings_stand_only_beside_ours():
    (final,) = SUMMARY["final"]
    theirs = [published("float", {"recall_at_1": 0.8}), published("bits", {"binary_recall_at_1": 0.7})]
    final = {**final, "dataset": "inshop"}
    text = summary_markdown({**SUMMARY, "final": [final], "published": theirs})
    assert "S: float" in text
    assert "S: bits" not in text
    ours = {"recall_at_1": {"mean": 0.9, "half_width": None}, "binary_recall_at_1": {"mean": 0.6, "half_width": None}}
    text = summary_markdown({**SUMMARY, "final": [{**final, "metrics": ours}], "published": theirs})
    assert "|  | backbone | dimensions | Recall@1 | binary Recall@1 | source and standing |" in text
    assert "| S: float | – | – | 0.8000 | – | a README; checked |" in text
    assert "| S: bits | – | – | – | 0.7000 | a README; checked |" in text


def test_published_numbers_of_another_data_set_or_metric_are_not_shown():
    other = [
        published("x", {"recall_at_1": 0.9}, dataset="sop"),
        published("y", {"recall_at_30": 0.9}, dataset="digits"),
    ]
    text = summary_markdown({**SUMMARY, "published": other})
    assert "Published" not in text
