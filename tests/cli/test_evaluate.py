"""`launch.py evaluate` on folders, kept embeddings and bare backbones: real images made here, real files."""

import hashlib
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raydml.cli.evaluate import _catalog, _opened, _Roots
from raydml.config.trial import parse_machine, parse_trial
from raydml.data.catalog import DataError, Groups
from raydml.data.miniatures import build
from raydml.data.seal import TestReads
from raydml.evaluation.saved_embeddings import SavedEmbeddings, load_embeddings, save_embeddings
from raydml.training import checkpoint
from raydml.training.trainer import Trainer
from tests.cli import commands
from tests.data.own_images import write_image, write_list

NUM_CLASSES, NUM_IMAGES = 3, 4

pytestmark = pytest.mark.usefixtures("own_folder")

NO_ROOTS = _Roots(None, None)


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
    assert {"mrr", "map_at_1000", "nmi_geometric", "ami", "ari", "pair_f1", "density"} <= set(report["metrics"])
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


def test_verification_is_beside_the_ranks_and_states_its_pairs(tmp_path):
    """On a line, queries 0 (a), 4 (b) and gallery 1 (a), 5 (b), 3.5 (a): 0 finds a, 4 finds a before b."""
    rows = np.array([[0.0], [4.0], [1.0], [5.0], [3.5]], dtype=np.float32)
    facts = {"part": "val", "recall_at": [1, 2]}
    roles = ("query",) * 2 + ("gallery",) * 3
    saved = SavedEmbeddings(rows, np.array([0, 1, 0, 1, 0]), ("a", "b"), tuple("12345"), roles, facts)
    save_embeddings(tmp_path / "kept.npz", saved)
    report = scored(tmp_path / "kept.npz", "--verification")
    found = report["verification"]
    assert found["pairs"] == (
        "verification: 3 genuine and 3 impostor pairs (2 queries and 3 gallery images), by Euclidean distance"
    )
    # Genuine: 1, 3.5, 1; impostor: 5, 3, 0.5.
    assert found["metrics"] == pytest.approx(
        {"cmc_rank_1": 0.5, "cmc_rank_2": 1, "roc_auc": (2 + 2 + 1) / 9, "eer": 1 / 3}
    )
    assert len(found["notes"]) == 4, "no rate has 30 impostor pairs"
    assert report["metrics"]["recall_at_1"] == 0.5
    shown = " ".join(commands.done("evaluate", tmp_path / "kept.npz", "--verification").output.split())
    assert "CMC rank-1 0.5000" in shown
    assert "the same as Recall@k here" in shown
    assert "verification" not in scored(tmp_path / "kept.npz")
    for name in ("curve.csv", "curve.png", "curve.svg"):
        file = tmp_path / "new" / name
        done = commands.done("evaluate", tmp_path / "kept.npz", "--verification", "--roc", file)
        assert "ROC curve: " in done.output
        assert file.stat().st_size > 0
    curve = pd.read_csv(tmp_path / "new" / "curve.csv")
    assert list(curve) == ["distance", "false_accept_rate", "true_accept_rate"]
    assert curve.to_numpy() == pytest.approx(np.array([[1, 1 / 3, 2 / 3], [3.5, 2 / 3, 1]]))
    refused = commands.refused("evaluate", tmp_path / "kept.npz", "--roc", tmp_path / "curve.csv")
    assert "goes with --verification. Cure: add --verification" in refused
    refused = commands.refused("evaluate", tmp_path / "kept.npz", "--verification", "--roc", tmp_path / "curve.txt")
    assert "name it *.csv, *.png or *.svg" in refused
    save_embeddings(tmp_path / "kept.npz", saved._replace(roles=None))
    assert "cmc_rank_1" not in scored(tmp_path / "kept.npz", "--verification")["verification"]["metrics"]


def test_cmc_across_cameras_leaves_out_queries_without_an_image_to_find(tmp_path):
    """On a line. Queries: a at 0 and b at 10 in camera 1, c at 20 without another camera, d at 30 without any image.

    Gallery: a at 1 in camera 1 (ignored), b at 2 and at 3 in camera 2, a at 4 in camera 2, c at 21 in camera 1
    (ignored). For query a, b comes twice before a: rank 3. For query b, a at 4 is nearest: rank 2.
    """
    places = (0, 10, 20, 30, 1, 2, 3, 4, 21)
    labels = np.array([0, 1, 2, 3, 0, 1, 1, 0, 2])
    cameras = Groups(tuple("111112221"), are_excluded=True)
    roles = ("query",) * 4 + ("gallery",) * 5
    facts = {"part": "all", "dataset": "image_list", "recall_at": [1, 2, 3]}
    rows = np.array(places, dtype=np.float32)[:, None]
    saved = SavedEmbeddings(rows, labels, tuple("abcd"), tuple(map(str, places)), roles, facts, cameras)
    save_embeddings(tmp_path / "kept.npz", saved)
    report = scored(tmp_path / "kept.npz", "--verification")
    assert list(report["protocols"]) == ["query_gallery_across_groups"]
    rates = {name: value for name, value in report["verification"]["metrics"].items() if name.startswith("cmc")}
    assert rates == {"cmc_rank_1": 0, "cmc_rank_2": 0.5, "cmc_rank_3": 1}
    assert report["num_lone_queries"] == 2


K_RECIPROCAL = "--rerank k_reciprocal:k1=20,k2=6,lambda=0.3"


def test_refinements_are_beside_the_plain_scores_and_named(folder, tmp_path):
    other = tmp_path / "other"
    generator = np.random.default_rng(2)
    for name in ("cyan", "pink"):
        (other / name).mkdir(parents=True)
        for image in range(6):
            Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(other / name / f"{image}.png")
    model = ("backbone:convnet:none", "--recall-at", "1")
    commands.done("evaluate", *model, "--data", other, "--save-embeddings", tmp_path / "other.npz")
    kept = tmp_path / "kept.npz"
    rerank = ("--rerank", "k_reciprocal:k1=4,k2=2")
    whiten = ("--whiten", "pca", "--whiten-on", tmp_path / "other.npz")
    report = scored(*model, "--data", folder, *rerank, *whiten, "--tta", "flip", "--save-embeddings", kept)
    refined = report.pop("refined")
    assert "refined" not in (plain := scored(kept))
    assert [report[name] for name in ("metrics", "protocols")] == [plain[name] for name in ("metrics", "protocols")]
    assert list(refined) == ["flip", "pca", "k_reciprocal", "flip+pca+k_reciprocal"]
    assert refined["k_reciprocal"]["settings"] == {"k_reciprocal": {"k1": 4, "k2": 2, "lambda": 0.3}}
    assert refined["k_reciprocal"]["protocols"] == {
        "leave_one_out": "leave one out: each of 12 images searches the 11 others; 3 classes; re-ranked by "
        "k-reciprocal neighbours among all queries and gallery images (k1 = 4, k2 = 2, lambda = 0.3)"
    }
    settings = refined["flip+pca+k_reciprocal"]["settings"]
    assert settings["pca"]["num_images"] == 12
    assert settings["pca"]["learned_on"] == "other.npz: image_folder, all, by backbone:convnet:none"
    # The same from the kept embeddings, which are the plain ones.
    again = scored(kept, *rerank, *whiten)["refined"]
    assert list(again) == ["pca", "k_reciprocal", "pca+k_reciprocal"]
    assert [again[name] for name in ("pca", "k_reciprocal")] == [refined[name] for name in ("pca", "k_reciprocal")]
    # The scored images themselves, in folders of other names.
    for name in ("blue", "green", "red"):
        shutil.copytree(folder / name, tmp_path / "renamed" / f"dark {name}")
    commands.done("evaluate", *model, "--data", tmp_path / "renamed", "--save-embeddings", tmp_path / "renamed.npz")
    said = commands.refused("evaluate", kept, "--whiten", "pca", "--whiten-on", tmp_path / "renamed.npz")
    assert "12 of its 12 embeddings are those of images that are to be scored, the first is dark blue/0.png" in said
    shown = commands.done("evaluate", kept, "--rerank", "query_expansion:n=3").output
    assert "each query expanded by its 3 nearest images (alpha = 3)" in " ".join(shown.split())
    assert "query_expansion: another protocol; its scores do not compare with plain ones" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rerank", "k_reciprocal"), "Cure: --rerank k_reciprocal:k1=11,k2=6, or more images"),
        (("--rerank", "reciprocal"), "'reciprocal' is not one of k_reciprocal, query_expansion; did you mean"),
        (("--rerank", "reciprocal"), f"Cure: {K_RECIPROCAL} or --rerank query_expansion:n=10,alpha=3"),
        (("--rerank", "k_reciprocal:k3=1"), f"not a setting of k_reciprocal: k1, k2, lambda. Cure: {K_RECIPROCAL}"),
        (("--rerank", "k_reciprocal:k1=x"), f"k1 = 'x' is not a whole number. Cure: {K_RECIPROCAL}"),
        (("--rerank", "k_reciprocal:lambda=2"), f"lambda = 2 is not between 0 and 1. Cure: {K_RECIPROCAL}"),
        (("--rerank", "query_expansion:n=3", "--metrics", "geometry"), "Cure: --metrics retrieval"),
        (("--rerank", "query_expansion:n=3", "--codes", "binary"), "Cure: --metrics retrieval --codes float"),
        (("--whiten", "pca"), "never learned on the images that are scored. Cure: --whiten-on FILE"),
        (("--whiten", "pca", "--whiten-on", "kept.npz"), "3 of its 3 classes are to be scored, the first is 'blue'"),
        (("--whiten-on", "kept.npz"), "has no effect without --whiten"),
        (("--tta", "flip"), "--tta: has no effect on saved embeddings"),
        (("--footprint",), "--footprint: has no effect on saved embeddings"),
    ],
)
def test_refinements_that_cannot_be_are_explained(tmp_path, arguments, message):
    kept = tmp_path / "kept.npz"
    rows = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    facts = {"part": "val", "dataset": "image_folder", "recall_at": [1]}
    paths, names = tuple(map(str, range(12))), ("blue", "green", "red")
    save_embeddings(kept, SavedEmbeddings(rows, np.arange(12) % 3, names, paths, None, facts))
    said = commands.refused("evaluate", kept, *(kept if one == "kept.npz" else one for one in arguments))
    assert message in said


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
    shown = commands.done("evaluate", model, "--data", unseen, "--save-embeddings", kept, "--footprint").output
    assert f"{MARK} image_folder" in shown
    assert re.search(r"footprint: [\d.]+ k parameters, .* 8 px\), 16 bytes an embedding", " ".join(shown.split()))
    assert scored(model, "--data", unseen)["every_class_of"] == "image_folder"
    assert f"{MARK} image_folder" in commands.done("evaluate", kept).output
    assert scored(kept)["every_class_of"] == "image_folder"


def test_other_images_may_be_a_list_with_groups(tmp_path):
    """Paths are relative to the folder of the list."""
    rows = [(f"{label}/{number}.png", label, "hall") for label in "ab" for number in range(2)]
    for path, *_ in rows:
        write_image(tmp_path / path)
    write_list(tmp_path, [list(row) for row in rows], ("path", "label", "camera"))
    settings = {"group": "camera", "exclude_same": "group"}
    catalog = _catalog(str(tmp_path / "list.csv"), NO_ROOTS, settings)
    assert catalog.groups == Groups(("hall",) * 4, are_excluded=True)
    assert catalog.root == tmp_path
    with pytest.raises(DataError, match="those of an image_folder are the folders above its classes: parent"):
        _catalog(str(tmp_path), NO_ROOTS, settings)
    with pytest.raises(DataError, match="--group camera: digits has no groups"):
        _catalog("digits", NO_ROOTS, settings)


def test_paths_of_a_list_are_never_looked_for_among_the_images_of_the_study(folder, tmp_path):
    """The folder of the study has files of the same names, of other classes."""
    listed = tmp_path / "more"
    for label in ("a", "b"):
        (listed / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16), (60 * number, 200, 30)).save(listed / label / f"{number}.png")
    rows = "".join(f"{label}/{number}.png,{label}\n" for label in ("a", "b") for number in range(2))
    (listed / "list.csv").write_text("path,label\n" + rows)
    settings = {"group": None, "exclude_same": "nothing"}
    catalog = _opened(str(listed / "list.csv"), _Roots(None, folder), settings)
    assert catalog.root == listed.resolve()
    catalog = _opened(str(listed / "list.csv"), _Roots(listed, folder), settings)
    assert catalog.root == listed
