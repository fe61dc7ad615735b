"""The pictures of real checkpoints: which are drawn, of what, and what their index says; and those of saved numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from raydml.config.trial import parse_machine, parse_trial
from raydml.evaluation.saved_embeddings import SavedEmbeddings, SavedEmbeddingsError, load_embeddings, save_embeddings
from raydml.inference.evaluate import evaluate_checkpoint
from raydml.report import illustrations
from raydml.report.illustrations import INDEX, draw_illustrations, draw_test_illustrations, open_run
from raydml.report.page import PICTURE_SECTIONS
from raydml.training.checkpoint import CheckpointError
from raydml.training.trainer import Trainer

#: Its pictures are drawn once, in one process.
pytestmark = pytest.mark.xdist_group("illustrations")

CLASSES = [f"kind-{letter}" for letter in "abcdefgh"]
NUM_EACH = 6
PLAIN, MIC = {"name": "plain"}, {"name": "mic", "num_clusters": 3, "images_per_cluster": 2}


def write_images(root):
    """Coarse coloured pictures, a class for each colour."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        colour = generator.integers(90, 166, 3)
        for number in range(NUM_EACH):
            coarse = np.clip(colour + generator.integers(-90, 91, (4, 4, 3)), 0, 255).astype(np.uint8)
            picture = Image.fromarray(coarse).resize((40, 36 + 2 * label), Image.Resampling.BICUBIC)
            picture.save(root / name / f"{number}.png")


def trial_of(method=PLAIN, *, seed=0, **data):
    split = {"test_fraction": 0.25, "num_folds": 2, "fold": data.pop("fold", 0), "order": "sorted"}
    settings = {"name": "image_folder", "resize_px": 32, "crop_px": 32, "split": split, **data}
    return parse_trial(
        {
            "epochs": 1,
            "seed": seed,
            "data": settings,
            "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 8},
            "loss": {"name": "contrastive"},
            "sampler": {"name": "class_balanced", "classes_per_batch": 2, "images_per_class": 4},
            "method": method,
            "recall_at": [1],
        }
    )


def trained(trial, machine, folder):
    trainer = Trainer(trial, machine, device="cpu")
    for _ in trainer.epochs():
        pass
    return trainer.save(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three runs, the second on another fold than the others, and their pictures."""
    root = tmp_path_factory.mktemp("study")
    write_images(root / "images")
    machine = parse_machine({"data_root": str(root / "images"), "cache_dir": str(root / "cache")})
    trials = {"best": trial_of(), "mic": trial_of(MIC, fold=1), "other": trial_of(seed=1)}
    checkpoints = {key: trained(trial, machine, root / key / "checkpoint_1") for key, trial in trials.items()}
    draw_illustrations(checkpoints, machine, "cpu", root / "pictures", [saved_test(root / "best.npz")])
    return root, machine, checkpoints, json.loads((root / "pictures" / INDEX).read_text(encoding="utf-8"))


def test_every_picture_has_its_entry_and_every_entry_its_picture(study):
    root, _, checkpoints, entries = study
    assert all(set(entry) == {"file", "section", "title", "caption", "trial"} for entry in entries)
    assert all(entry["title"] and entry["caption"].endswith(".") for entry in entries)
    files = [entry["file"] for entry in entries]
    assert len(files) == len(set(files))
    numbers = {f"embeddings-{key}.npz" for key in checkpoints}
    assert {path.name for path in (root / "pictures").iterdir()} == {INDEX, *files, *numbers, "mislabelled-best.csv"}
    for file in files:
        assert imread(root / "pictures" / file).shape[1] == 700
    order = [list(PICTURE_SECTIONS).index(entry["section"]) for entry in entries]
    assert order == sorted(order)


def test_the_best_run_has_all_the_pictures_and_the_others_theirs(study):
    _, _, _, entries = study
    files = [(entry["section"], entry["file"], entry["trial"]) for entry in entries]
    assert {
        ("retrievals", "retrievals-best.png", "best"),
        ("retrievals", "retrievals-mic.png", "mic"),
        ("retrievals", "retrievals-other.png", "other"),
        ("retrievals", "retrievals-best-best.png", "best"),
        ("retrievals", "retrievals-worst-best.png", "best"),
        ("classes", "classes-best.png", "best"),
        ("map", "map-best.png", "best"),
        ("map", "map-of-images-best.png", "best"),
        ("clusters", "clusters-mic.png", "mic"),
        ("classes", "test-classes-best.png", "best"),
        ("map", "test-map-best.png", "best"),
    } <= set(files)
    assert {trial for section, _, trial in files if section in ("classes", "map")} == {"best"}
    assert {trial for section, _, trial in files if section == "clusters"} == {"mic"}


def test_only_runs_that_validate_on_the_same_classes_are_compared(study):
    _, _, _, entries = study
    changed = [entry for entry in entries if entry["section"] == "changed"]
    assert changed
    # `mic` comes before `other`, but has trained on what validates `best`.
    assert all("mic" not in entry["file"] for entry in changed)
    allowed = {"changed-better-best-than-other.png", "changed-better-other-than-best.png"}
    assert {entry["file"] for entry in changed} <= allowed


def test_runs_of_one_fold_validate_on_the_same_images(study):
    _, machine, checkpoints, _ = study
    opened = {}
    runs = {key: open_run(key, folder, machine, "cpu", opened) for key, folder in checkpoints.items()}
    assert runs["best"].validates_as(runs["other"])
    assert not runs["best"].validates_as(runs["mic"])
    assert len(opened) == 2  # the images of a fold are opened once
    assert set(runs["best"].train.class_names) == set(runs["mic"].val.class_names)
    assert runs["mic"].name == "mic (mic: contrastive)"


def test_the_saved_numbers_are_those_of_the_evaluation(study):
    root, machine, checkpoints, _ = study
    for key, folder in checkpoints.items():
        saved = load_embeddings(root / "pictures" / f"embeddings-{key}.npz")
        expected = ["kind-a", "kind-b", "kind-c"] if key != "mic" else ["kind-d", "kind-e", "kind-f"]
        assert list(saved.class_names) == expected
        assert [Path(path).parts[0] for path in saved.paths] == np.repeat(expected, NUM_EACH).tolist()
        assert (saved.facts["part"], saved.facts["trial"]) == ("val", key)
        run = open_run(key, folder, machine, "cpu", {})
        assert np.array_equal(run.embeddings, saved.embeddings)
        scores = evaluate_checkpoint(folder, "val", machine, device="cpu", untrained=False).metrics
        assert run.ranked.recall_at_1 == scores["recall_at_1"]
        assert run.ranked.map_at_r == pytest.approx(scores["map_at_r"], abs=1e-12)


def test_the_index_comes_last_and_whole(study, tmp_path, monkeypatch):
    _, machine, checkpoints, _ = study
    for name in ("_best_and_worst", "_confusions", "_maps"):  # the first run has many pictures, which are drawn above
        monkeypatch.setattr(illustrations, name, lambda *_: [])
    broken = tmp_path / "checkpoint_2"
    broken.mkdir()
    with pytest.raises(CheckpointError):
        draw_illustrations({"mic": checkpoints["mic"], "broken": broken}, machine, "cpu", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "retrievals-mic.png").exists()
    assert not (tmp_path / "pictures" / INDEX).exists()


def test_roles_decide_which_images_are_searched(study, tmp_path):
    root, _, _, _ = study
    part_of = (
        dict.fromkeys(CLASSES[:3], "train") | dict.fromkeys(CLASSES[3:6], "val") | dict.fromkeys(CLASSES[6:], "test")
    )
    with open(root / "images" / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split", "role"])
        for name, part in part_of.items():
            for number in range(NUM_EACH):
                role = "" if part == "train" else "query" if number < 2 else "gallery"
                rows.writerow([f"{name}/{number}.png", name, part, role])
    machine = parse_machine({"data_root": str(root / "images"), "cache_dir": str(tmp_path / "cache")})
    trial = trial_of(name="image_list", list_file="list.csv", fold=None)
    folder = trained(trial, machine, tmp_path / "checkpoint_1")
    run = open_run("r", folder, machine, "cpu", {})
    is_query = np.arange(18) % NUM_EACH < 2
    assert run.ranked.queries.tolist() == np.flatnonzero(is_query).tolist()
    assert not is_query[run.ranked.neighbours].any()
    assert run.ranked.num_relevant.tolist() == [4] * 6


def saved_test(path, roles=None):
    """Three classes of 20 on a circle; `plums` are among `figs`."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    centres = np.array([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
    rows = centres[labels] + generator.standard_normal((60, 2))
    names, paths = ("pears", "plums", "figs"), tuple(f"{number}.jpg" for number in range(60))
    return save_embeddings(
        path, SavedEmbeddings(rows.astype(np.float32), labels, names, paths, roles, {"part": "test"})
    )


@pytest.fixture
def drawn(monkeypatch):
    """The arguments with which the bars and the map were drawn."""
    kept = {}
    bars, points = illustrations.draw_class_failures, illustrations.draw_embedding_map

    def draw_bars(failures, *arguments, **named):
        kept["failures"] = failures
        return bars(failures, *arguments, **named)

    def draw_points(found, labels, names, path, **named):
        kept["roles"] = named["roles"]
        return points(found, labels, names, path, **named)

    monkeypatch.setattr(illustrations, "draw_class_failures", draw_bars)
    monkeypatch.setattr(illustrations, "draw_embedding_map", draw_points)
    return kept


def test_a_saved_test_embedding_is_drawn_from_its_numbers(tmp_path, drawn):
    pictures = draw_test_illustrations(saved_test(tmp_path / "confirm-003.npz"), tmp_path / "pictures")
    assert [(picture.section, picture.path.name, picture.trial) for picture in pictures] == [
        ("classes", "test-classes-confirm-003.png", "confirm-003"),
        ("map", "test-map-confirm-003.png", "confirm-003"),
    ]
    assert all(picture.path.exists() for picture in pictures)
    assert not (tmp_path / "pictures" / INDEX).exists()
    assert "of 3; 1 have no wrong nearest neighbour" in pictures[0].caption
    assert pictures[1].caption.startswith("All 60 test images")
    by_label = {row.label: row for row in drawn["failures"]}
    assert (by_label[0].recall_at_1, by_label[1].mistaken_for, by_label[2].mistaken_for) == (1.0, 2, 1)
    assert all(row.num_queries == 20 for row in drawn["failures"])


def test_a_saved_embedding_with_roles_is_searched_by_them(tmp_path, drawn):
    roles = ["query" if number % 20 < 5 else "gallery" for number in range(60)]
    pictures = draw_test_illustrations(saved_test(tmp_path / "r.npz", roles), tmp_path / "pictures")
    assert all(row.num_queries == 5 for row in drawn["failures"])
    assert list(drawn["roles"]) == roles
    assert "hollow ones the gallery" in pictures[1].caption


def test_a_file_without_embeddings_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(SavedEmbeddingsError):
        draw_test_illustrations(tmp_path / "x.npz", tmp_path)
