"""`launch.py evaluate` on folders, kept embeddings and bare backbones: real images made here, real files."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from raydml.config.trial import parse_machine, parse_trial
from raydml.data.miniatures import build
from raydml.data.seal import TestReads
from raydml.evaluation.saved_embeddings import SavedEmbeddings, load_embeddings, save_embeddings
from raydml.training import checkpoint
from raydml.training.trainer import Trainer
from tests.cli import commands

NUM_CLASSES, NUM_IMAGES = 3, 4

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def folder(tmp_path):
    """Three classes of four images: one colour a class, with noise."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for image in range(NUM_IMAGES):
            pixels = generator.integers(0, 60, (40, 40, 3))
            pixels[:, :, 2 - number] += 150
            path = tmp_path / "images" / name / f"{image}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "images"


def run(*arguments):
    return commands.run("evaluate", *arguments)


def scored(*arguments):
    """The numbers of a successful command, as JSON."""
    return json.loads(commands.done("evaluate", *arguments, "--json").stdout)


def test_a_bare_backbone_on_a_folder_and_its_embeddings_again(folder, tmp_path):
    kept = tmp_path / "kept.npz"
    kinds = ("--recall-at", "2,1", "--metrics", "all", "--save-embeddings", kept)
    report = scored("backbone:convnet:none", "--data", folder, *kinds)
    assert report["protocols"] == {
        "leave_one_out": "leave one out: each of 12 images searches the 11 others; 3 classes"
    }
    assert report["untrained"] == {}
    saved = load_embeddings(kept)
    assert (saved.class_names, saved.paths[0]) == (("blue", "green", "red"), "blue/0.png")
    rows = saved.embeddings.astype(np.float64)
    distances = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    right = saved.labels[np.argsort(distances, axis=1)] == saved.labels[:, None]
    assert report["metrics"]["recall_at_1"] == pytest.approx(right[:, 0].mean())
    assert report["metrics"]["recall_at_2"] == pytest.approx(right[:, :2].any(axis=1).mean())
    assert report["metrics"]["r_precision"] == pytest.approx(right[:, : NUM_IMAGES - 1].mean())
    assert {"mrr", "map_at_1000", "nmi_geometric", "ami", "pair_f1", "density"} <= set(report["metrics"])
    low, high = report["intervals"]["map_at_r"]
    assert low <= report["metrics"]["map_at_r"] <= high
    assert scored(kept, "--metrics", "all")["metrics"] == report["metrics"], "the same k, kept with the embeddings"
    other = scored(kept, "--codes", "float,binary,int8", "--recall-at", "5")
    names = [name for name in other["metrics"] if "recall" in name]
    assert names == ["recall_at_5", "binary_recall_at_5", "int8_recall_at_5"]
    reads = [json.loads(line) for line in (tmp_path / "studies" / "test_reads.jsonl").read_text().splitlines()]
    assert [read["checkpoint"] for read in reads] == [f"backbone:convnet:none on --data {folder}"]
    again = [json.loads(line)["checkpoint"] for line in (tmp_path / "test_reads.jsonl").read_text().splitlines()]
    assert again == [str(kept)] * 2, "scoring them again may be a look at sealed classes"


def test_dims_score_prefixes_of_any_embedding(folder, tmp_path):
    kept = tmp_path / "kept.npz"
    plain = scored("backbone:convnet:none", "--data", folder, "--save-embeddings", kept)
    assert not any(name.startswith("dim_") for name in plain["metrics"])
    report = scored(kept, "--dims", "16,2")
    added = [name for name in report["metrics"] if name not in plain["metrics"]]
    assert added == ["dim_2_recall_at_1", "dim_2_map_at_r", "dim_16_recall_at_1", "dim_16_map_at_r"]
    rows = load_embeddings(kept).embeddings[:, :2].astype(np.float64)
    cosines = rows @ rows.T / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows, axis=1)[:, None]
    np.fill_diagonal(cosines, -2)
    labels = load_embeddings(kept).labels
    assert report["metrics"]["dim_2_recall_at_1"] == pytest.approx((labels[cosines.argmax(axis=1)] == labels).mean())
    for wrong, words in (("2,x", "whole numbers"), ("0,2", "at least 1"), ("2,4096", "the embeddings have")):
        assert words in run(kept, "--dims", wrong).stderr


def test_distractors_are_searched_among_and_never_right(folder, tmp_path):
    plain = scored("backbone:convnet:none", "--data", folder)
    flat = tmp_path / "more"
    flat.mkdir()
    for path in sorted((folder / "red").iterdir()):  # exact copies: nearer than anything else to the red images
        (flat / path.name).write_bytes(path.read_bytes())
    report = scored("backbone:convnet:none", "--data", folder, "--distractors", flat, "--recall-at", "1")
    (sentence,) = report["protocols"].values()
    assert sentence == "leave one out: each of 12 images searches the 15 others, 4 of them distractors; 3 classes"
    assert plain["metrics"]["recall_at_1"] == 1.0
    assert report["metrics"]["recall_at_1"] == pytest.approx(8 / 12), "each red image finds its copy"


def test_kept_embeddings_of_test_classes_are_read_on_record(tmp_path):
    facts = {"part": "test", "dataset": "digits", "protocols": ["leave_one_out"], "recall_at": [1], "checkpoint": "c"}
    rows = np.array([[0.0], [0.1], [5.0], [5.1]], dtype=np.float32)
    saved = SavedEmbeddings(rows, np.array([0, 0, 1, 1]), ("a", "b"), ("1", "2", "3", "4"), None, facts)
    save_embeddings(tmp_path / "test.npz", saved)
    save_embeddings(tmp_path / "val.npz", saved._replace(facts={**facts, "part": "val"}))
    result = commands.done("evaluate", tmp_path / "val.npz")
    assert "R@1" in result.output
    assert "1.0000" in result.output
    assert not (tmp_path / "test_reads.jsonl").exists()
    assert run(tmp_path / "test.npz").exit_code == 0
    (read,) = [json.loads(line) for line in (tmp_path / "test_reads.jsonl").read_text().splitlines()]
    assert (read["purpose"], read["checkpoint"]) == ("evaluate", str(tmp_path / "test.npz"))


def test_kept_embeddings_are_scored_by_the_protocols_they_were_kept_with(tmp_path):
    rows = np.array([[0.0], [0.2], [1.0], [1.1], [5.0], [5.3]], dtype=np.float32)
    facts = {"part": "val", "protocols": ["one_gallery_image", "leave_one_out"], "recall_at": [1]}
    labels, paths = np.array([0, 0, 1, 1, 2, 2]), tuple("123456")
    save_embeddings(tmp_path / "kept.npz", SavedEmbeddings(rows, labels, ("a", "b", "c"), paths, None, facts))
    report = scored(tmp_path / "kept.npz")
    assert list(report["protocols"]) == ["one_gallery_image", "leave_one_out"]
    assert [name for name in report["metrics"] if "recall" in name] == ["recall_at_1", "leave_one_out_recall_at_1"]
    assert report["intervals"] == {}, "means over ten galleries have no queries of their own"


def test_intervals_are_those_of_floats_in_any_order_of_codes(folder):
    floats, both, binary = (
        scored("backbone:convnet:none", "--data", folder, "--codes", codes)["intervals"]
        for codes in ("float", "binary,float", "binary")
    )
    assert both == floats
    assert binary
    assert all(name.startswith("binary_") for name in binary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("backbone:resnet18",), "Cure: --data FOLDER"),
        (("backbone:resnet9", "--data", "images"), "no backbone 'resnet9'; did you mean 'resnet50'? Choices: convnet"),
        (("backbone:convnet:none", "--data", "nowhere"), "no such folder, and no data set of that name"),
        (("backbone:convnet:none", "--data", "images", "--metrics", "recall"), "'recall' is not one of retrieval"),
        (("backbone:convnet:none", "--data", "images", "--codes", "binary,int4"), "'int4' is not one of float"),
        (("backbone:convnet:none", "--data", "images", "--recall-at", "1,x"), "whole numbers separated by commas"),
        (("backbone:convnet:none", "--data", "images", "--recall-at", "0"), "k is at least 1"),
        (("backbone:convnet:none", "--data", "images", "--recall-at", "12"), "only 11 images to search"),
        (("backbone:convnet:none", "--data", "images", "--save-embeddings", "x.bin"), r"name it *.npz"),
        (("some", "--distractors", "images"), "goes with --data"),
        (("some", "--save-embeddings", "images/red/0.png/x.npz"), "Cure: a file that can be written"),
        (("nothing.npz",), "holds no embeddings"),
        (("nothing.npz", "--data", "images"), "--data: has no effect on saved embeddings"),
        (("nothing.npz", "--save-embeddings", "x.npz"), "--save-embeddings: has no effect"),
        (("nothing.npz", "--on", "val"), "--on: has no effect"),
        (("backbone:convnet:none", "--data", "images", "--no-untrained"), "--untrained: has no effect on other images"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_done_is_explained(arguments, message):
    assert message in commands.refused("evaluate", *arguments)


def network_of(name, root, to, test_fraction=0.0):
    """The checkpoint of an untrained network whose trial trains on all images of a data set, or on a part of them."""
    split = {"val_fraction": 0, "test_fraction": test_fraction}
    trial = {
        "data": {"name": name, "resize_px": 8, "crop_px": 8, "split": split},
        "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 4},
        "loss": {"name": "contrastive"},
        "sampler": {"name": "class_balanced", "classes_per_batch": 2, "images_per_class": 2},
    }
    machine = parse_machine({"data_root": str(root), "device": "cpu", "cache_dir": str(to / "cache")})
    reads = TestReads(to / "reads.jsonl")
    return Trainer(parse_trial(trial), machine, device="cpu", reads=reads).save(to / "checkpoint_000001")


MARK = "this model was trained on every class of"


def test_a_model_of_every_class_is_not_scored_on_another_list_of_its_benchmark(tmp_path):
    root = build("vehicleid", tmp_path / "trained")
    # Other files, so that only the name shows that the benchmark is the same.
    other = build("vehicleid", tmp_path / "other", size_px=24)
    for name, fraction in (("all", 0.0), ("part", 0.5)):
        (tmp_path / name).mkdir()
        network_of("vehicleid", root, tmp_path / name, fraction)
    asked = ("--data-root", other, "--recall-at", "1", "--data")
    for data in ("vehicleid_small", "vehicleid"):
        said = commands.refused("evaluate", tmp_path / "all" / "checkpoint_000001", *asked, data)
        assert f"{MARK} vehicleid, and {data} has images of it" in said
        assert "Cure: images of other classes" in said
    assert not (tmp_path / "all" / "test_reads.jsonl").exists(), "refused before it is recorded"
    assert "every_class_of" not in scored(tmp_path / "part" / "checkpoint_000001", *asked, "vehicleid_small")


def test_a_model_of_every_class_is_not_scored_on_files_that_it_trained_on(folder, tmp_path):
    generator = np.random.default_rng(1)
    unseen = tmp_path / "unseen"  # the same names of classes and files, other images
    for path in sorted(folder.glob("*/*.png")):
        (unseen / path.parent.name).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(unseen / path.parent.name / path.name)
    (tmp_path / "all").mkdir()
    model = network_of("image_folder", folder, tmp_path / "all")
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in folder.glob("*/*.png"))
    assert checkpoint.load_card(model)["trained_on_files"].split() == digests

    copied = tmp_path / "copied"
    shutil.copytree(unseen, copied)
    shutil.copy(folder / "red" / "2.png", copied / "blue" / "renamed.png")
    exported = tmp_path / "exported"
    assert commands.run("export", model, exported).exit_code == 0
    for target in (model, exported):
        said = commands.refused("evaluate", target, "--data", copied)
        assert f"{MARK} image_folder, and 1 of 13 images in {copied} are among them: blue/renamed.png" in said
    assert MARK in commands.refused("evaluate", model, "--data", unseen, "--distractors", copied)
    assert "has the same images" in commands.refused("evaluate", model, "--data", folder)
    assert not (tmp_path / "all" / "test_reads.jsonl").exists(), "refused before it is recorded"

    kept = tmp_path / "kept.npz"
    shown = commands.done("evaluate", model, "--data", unseen, "--save-embeddings", kept).output
    assert f"{MARK} image_folder" in shown
    assert scored(model, "--data", unseen)["every_class_of"] == "image_folder"
    assert f"{MARK} image_folder" in commands.done("evaluate", kept).output
    assert scored(kept)["every_class_of"] == "image_folder"
