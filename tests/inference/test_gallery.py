"""A gallery: which images are in it, that the nearest ones are found, and the commands index and search."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image

from raydml.images.pixels import UnreadableImage
from raydml.inference.export import EmbeddingModel, ExportError, load_checkpoint
from raydml.inference.gallery import Gallery, GalleryError, embed_images, image_names, write_gallery
from raydml.models.network import build_network, preprocessing_for
from raydml.report.retrievals import draw_neighbours
from raydml.study import events
from raydml.tracking import store
from raydml.training import checkpoint
from tests.cli.commands import done, refused, run

NETWORK = {"backbone": "convnet", "embedding_dim": 8, "layer_norm": True, "normalize": "l2", "freeze_batch_norm": False}
NUM_IMAGES = 7


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    card = {"network": NETWORK, "preprocessing": preprocessing_for("convnet", resize_px=20, crop_px=16).to_dict()}
    weights = build_network(**NETWORK, weights="none", seed=1).state_dict()
    return checkpoint.save(folder / "checkpoint", state={}, model_card=card, best_weights=weights)


@pytest.fixture(scope="module")
def model(checkpoint_folder):
    return load_checkpoint(checkpoint_folder)


def write_image(path, seed, size=(30, 24)):
    """Blots of colour, so that embeddings of different seeds lie far apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blots = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(blots).resize(size, Image.Resampling.BILINEAR).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Seven images in two classes, of different sizes, sorted as they are numbered."""
    root = tmp_path / "photos"
    for seed in range(NUM_IMAGES):
        write_image(root / ("apples" if seed < 3 else "pears") / f"{seed}.png", seed, size=(20 + 5 * seed, 30))
    return root


def indexed(model, root, folder):
    names = image_names(root)
    embeddings = np.concatenate([batch.embeddings for batch in embed_images(model, root, names)])
    return write_gallery(folder, model, root, names, embeddings)


def test_images_lie_flat_or_in_folders_of_any_depth(tmp_path):
    for name in ("b.JPG", "a.png", "fruit/apples/1.webp", "fruit/2.tif", "fruit/apples/._1.webp", "__MACOSX/3.png",
                 ".hidden/4.png", "fruit/list.csv", "fruit/apples/5.jpeg.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "elsewhere.d").mkdir()
    (tmp_path / "fruit" / "linked").symlink_to(tmp_path / "elsewhere.d")
    (tmp_path / "elsewhere.d" / "6.bmp").write_bytes(b"")
    (tmp_path / "fruit" / "round").symlink_to(tmp_path)
    found = image_names(tmp_path)
    assert found == sorted(found)
    assert found == ["a.png", "b.JPG", "elsewhere.d/6.bmp", "fruit/2.tif", "fruit/apples/1.webp"]


def test_a_folder_reached_by_a_link_alone_counts(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "1.png").write_bytes(b"")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "apples").symlink_to(tmp_path / "disk")
    assert image_names(tmp_path / "root") == ["apples/1.png"]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(GalleryError, match="is no folder"):
        image_names(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(GalleryError, match="hold no image"):
        image_names(tmp_path)


def test_every_decoded_format_is_indexed_and_the_others_are_counted(tmp_path, monkeypatch):
    for name in ("a/0.gif", "a/1.HEIC", "b/2.jfif", "b/3.cr2", "b/4.CR2", "b/5.unheard", "b/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"opened later")
    notes: list[str] = []
    monkeypatch.setattr("raydml.inference.gallery.log_notes", notes.extend)
    assert image_names(tmp_path) == ["a/0.gif", "a/1.HEIC", "b/2.jfif"]
    assert len(notes) == 1
    assert "3 files beside the images are left out" in notes[0]
    assert "2 .cr2, 1 .unheard" in notes[0]
    for name in ("a/0.gif", "a/1.HEIC", "b/2.jfif"):
        (tmp_path / name).unlink()
    with pytest.raises(GalleryError, match=r"they hold 2 \.cr2, 1 \.unheard\. Cure: convert them"):
        image_names(tmp_path)


def test_batches_hold_the_embeddings_in_order_and_name_what_is_unreadable(model, photos):
    (photos / "apples" / "1a.png").write_text("no image")
    (photos / "pears" / "4.png").write_bytes((photos / "pears" / "4.png").read_bytes()[:80])
    names = image_names(photos)
    batches = list(embed_images(model, photos, names, batch_size=3))
    assert [len(batch.names) + len(batch.unreadable) for batch in batches] == [3, 3, 2]
    assert [reason.path for batch in batches for reason in batch.unreadable] == ["apples/1a.png", "pears/4.png"]
    kept = [name for batch in batches for name in batch.names]
    assert kept == [name for name in names if name not in ("apples/1a.png", "pears/4.png")]
    expected = model.embed([photos / name for name in kept])
    np.testing.assert_allclose(np.concatenate([batch.embeddings for batch in batches]), expected, atol=1e-6)


def test_the_nearest_images_are_found_by_distance(model, photos, tmp_path):
    """Against distances computed one by one in float64, from embeddings of the files read in another way."""
    gallery = Gallery.load(indexed(model, photos, tmp_path / "index"))
    names = [f"{'apples' if seed < 3 else 'pears'}/{seed}.png" for seed in range(NUM_IMAGES)]
    points = model.embed([Image.open(photos / name) for name in names]).astype(np.float64)
    new = write_image(tmp_path / "new.png", 99)
    queries = [photos / names[5], new]
    (own, other) = model.embed([Image.open(query) for query in queries]).astype(np.float64)
    for query, found in zip((own, other), gallery.search(queries, k=4), strict=True):
        distances = [float(np.sqrt(((point - query) ** 2).sum())) for point in points]
        order = sorted(range(NUM_IMAGES), key=distances.__getitem__)[:4]
        assert [neighbour.name for neighbour in found] == [names[row] for row in order]
        np.testing.assert_allclose([n.distance for n in found], [distances[row] for row in order], atol=1e-4)
    assert gallery.search(queries, k=1)[0][0].distance < 1e-5, "an image of the gallery finds itself"
    assert len(gallery.search([new], k=100)[0]) == NUM_IMAGES, "all there are"
    with pytest.raises(GalleryError, match="at least 1"):
        gallery.search([new], k=0)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnreadableImage, match=r"text\.png: no JPEG"):
        gallery.search([tmp_path / "text.png"], k=1)


def test_many_queries_at_once_find_themselves_too(tmp_path):
    """For about 300 queries at once faiss expands the square, and an image would be 0.001 away from itself."""
    settings = {**NETWORK, "embedding_dim": 512}
    preprocessing = preprocessing_for("convnet", resize_px=8, crop_px=8)
    network = build_network(**settings, weights="none", seed=1)
    wide = EmbeddingModel(network, preprocessing, {"network": settings}, "cpu")
    files = [write_image(tmp_path / "photos" / f"{seed:03}.png", seed, size=(8, 8)) for seed in range(400)]
    gallery = Gallery.load(indexed(wide, tmp_path / "photos", tmp_path / "index"))
    found = gallery.search(files, k=1)
    assert [neighbours[0].name for neighbours in found] == [file.name for file in files]
    assert max(neighbours[0].distance for neighbours in found) < 1e-5


def test_the_folder_is_all_that_is_needed(model, photos, tmp_path):
    query = shutil.copy(photos / "pears" / "3.png", tmp_path / "query.png")
    folder = indexed(model, photos, tmp_path / "index")
    expected = Gallery.load(folder).search([query], k=3)
    shutil.rmtree(photos)
    moved = Gallery.load(folder.rename(tmp_path / "moved"))
    assert moved.search([query], k=3) == expected
    assert moved.names == tuple(f"{'apples' if seed < 3 else 'pears'}/{seed}.png" for seed in range(NUM_IMAGES))
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["gallery.json", "index.faiss", "model"]
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        draw_neighbours(moved, [query], expected, tmp_path / "picture.png")


def test_another_index_may_take_its_place(model, photos, tmp_path):
    """One that looks into a single cell finds fewer, and never names an image that it did not find."""
    folder = indexed(model, photos, tmp_path / "index")
    exact = Gallery.load(folder)
    rows = exact.index.reconstruct_n(0, NUM_IMAGES)
    cells = faiss.IndexIVFFlat(faiss.IndexFlatL2(8), 8, NUM_IMAGES)  # a cell for each
    cells.train(rows)
    cells.add(rows)
    faiss.write_index(cells, str(folder / "index.faiss"))
    query = photos / "apples" / "2.png"
    (found,) = Gallery.load(folder).search([query], k=3)
    assert [neighbour.name for neighbour in found] == ["apples/2.png"]


def test_what_does_not_belong_together_is_no_gallery(model, photos, tmp_path):
    folder = indexed(model, photos, tmp_path / "index")
    index = (folder / "index.faiss").read_bytes()
    with pytest.raises(GalleryError, match=r"is no gallery.*gallery\.json"):
        Gallery.load(tmp_path)
    (folder / "index.faiss").write_bytes(index[:50])
    with pytest.raises(GalleryError, match="is no gallery"):
        Gallery.load(folder)
    faiss.write_index(faiss.IndexFlatL2(8), str(folder / "index.faiss"))
    with pytest.raises(GalleryError, match="holds 0 x 8, but there are 7 names"):
        Gallery.load(folder)
    (folder / "index.faiss").write_bytes(index)
    (folder / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="not as it was written"):
        Gallery.load(folder)


def test_an_index_that_claims_more_vectors_than_its_file_has_takes_no_memory_for_them(model, photos, tmp_path):
    folder = indexed(model, photos, tmp_path / "index")
    index = bytearray((folder / "index.faiss").read_bytes())
    place = index.index((NUM_IMAGES * 8 * 4 // 4).to_bytes(8, "little"))  # the number of floats
    for claimed in (2**28, 2**36, 2**62):
        index[place : place + 8] = claimed.to_bytes(8, "little")
        (folder / "index.faiss").write_bytes(index)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(GalleryError, match="is no gallery"):
            Gallery.load(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    with pytest.raises(GalleryError, match=r"1 images have embeddings with NaN or infinity: b\.png"):
        write_gallery(tmp_path / "x", model, photos, ["a.png", "b.png"], np.array([[0.0] * 8, [np.nan] * 8], "f4"))
    assert not (tmp_path / "x").exists()


def test_a_picture_shows_queries_and_neighbours(model, photos, tmp_path):
    gallery = Gallery.load(indexed(model, photos, tmp_path / "index"))
    queries = [photos / "apples" / "0.png", photos / "pears" / "3.png"]
    pictures = []
    for k in (1, 4):
        found = gallery.search(queries, k=k)
        with Image.open(draw_neighbours(gallery, queries, found, tmp_path / f"{k}.png")) as opened:
            pictures.append(np.asarray(opened.convert("RGB")))
    assert len({picture.tobytes() for picture in pictures}) == 2
    assert all(picture.std() > 10 for picture in pictures)


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """Each test in a folder of its own, with the environment as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.usefixtures("apart")
def test_index_and_query(checkpoint_folder, model, photos, tmp_path):
    text = done("index", checkpoint_folder, photos, "my index").stdout
    assert "7 images, 8 dimensions" in text
    assert "launch.py query 'my index' IMAGE\n" in text
    queries = [photos / "pears" / "4.png", photos / "apples" / "1.png"]
    expected = Gallery.load(tmp_path / "my index").search(queries, k=3)
    answer = json.loads(run("query", "my index", *queries, "--k", 3, "--json").stdout)
    assert answer["root"] == str(photos)
    assert [query["image"] for query in answer["queries"]] == [str(query) for query in queries]
    for query, neighbours in zip(answer["queries"], expected, strict=True):
        assert [tuple(neighbour.values()) for neighbour in query["neighbours"]] == neighbours
    text = run("query", "my index", *queries, "-k", 3).stdout
    for query, neighbours in zip(queries, expected, strict=True):
        printed = text[text.index(f"{query}\n") :].splitlines()[1:4]
        assert [line.split() for line in printed] == [
            [str(rank), f"{distance:.4f}", name] for rank, (name, distance) in enumerate(neighbours, start=1)
        ]
    assert f"relative to {photos}" in text
    drawn = run("query", "my index", queries[0], "--picture", "found.png")
    assert "picture: found.png" in drawn.stdout
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert model.embedding_dim == 8


@pytest.mark.usefixtures("apart")
def test_index_and_query_refuse_with_a_cure(checkpoint_folder, photos, tmp_path):
    (photos / "pears" / "9.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    for arguments, words in (
        (["index", checkpoint_folder, photos, "out"], ["1 file cannot be decoded", "pears/9.jpg: no JPEG", "--skip"]),
        (["index", checkpoint_folder, photos, "used"], ["exists and is not empty", "Cure"]),
        (["index", checkpoint_folder, "empty", "out"], ["hold no image"]),
        (["index", "empty", photos, "out"], ["no checkpoint and no exported model", "Cure"]),
        (["query", "used", photos / "pears" / "9.jpg"], ["is no gallery", "Cure"]),
        (["query", "runs:/none", photos / "pears" / "9.jpg"], ["there is no MLflow store", "Cure"]),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert [word for word in words if word not in result.stderr] == []
    assert not (tmp_path / "out").exists()
    skipped = done("index", checkpoint_folder, photos, "out", "--skip-unreadable")
    assert "7 images" in skipped.stdout
    assert "left out, 1 file cannot be decoded:\n  pears/9.jpg: no JPEG" in skipped.stderr
    unreadable = run("query", "out", photos / "pears" / "9.jpg")
    assert (unreadable.exit_code, unreadable.stdout) == (2, "")
    assert "9.jpg: no JPEG" in unreadable.stderr
    for name in image_names(photos):
        (photos / name).write_text("no image")
    none = refused("index", checkpoint_folder, photos, "nothing", "--skip-unreadable")
    assert "8 files cannot be decoded" in none
    assert not (tmp_path / "nothing").exists()


@pytest.mark.usefixtures("apart")
def test_the_index_of_a_study_is_an_artifact_of_its_run(checkpoint_folder, photos, tmp_path):
    storage = tmp_path / "studies"
    uri = store.default_uri(storage)
    study = storage / "digits"
    shutil.copytree(checkpoint_folder, study / "search" / "checkpoint")
    about = {"study": "digits", "study_id": "0" * 32, "storage": str(storage), "config": {}, "commit": "c0ffee"}
    facts = {"name": "digits", "study_id": "0" * 32, "tracking_uri": uri, "machine": {}, "trials": []}
    (study / "study.json").write_text(json.dumps({**facts, "storage": str(storage), "study": {"name": "digits"}}))
    events.append(study / "events.jsonl", {"event": "study_started", **about})
    events.append(study / "events.jsonl", {"event": "study_finished"})
    target = study / "search" / "checkpoint"
    done("index", target, photos, "quiet", "--no-log")
    assert [event["event"] for event in events.read(study / "events.jsonl")] == ["study_started", "study_finished"]
    alone = done("index", target, photos, "alone").stderr
    assert "MLflow gets the gallery later" in alone
    assert "there is no MLflow store" in alone
    assert not (storage / "mlflow.db").exists(), "index made a store"
    store.prepare_store(uri, storage)
    text = done("index", target, photos, "fruit").stdout
    assert "in MLflow, with the run of study 'digits': galleries/fruit" in text
    client = store.connect(uri)
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert found.info.status == "FINISHED"
    stored = client.list_artifacts(found.info.run_id, "galleries/fruit")
    assert sorted(Path(item.path).name for item in stored) == ["gallery.json", "index.faiss", "model"]
    shutil.rmtree(tmp_path / "fruit")
    query = photos / "pears" / "4.png"
    answer = json.loads(run("query", f"runs:/{found.info.run_id}/galleries/fruit", query, "--json").stdout)
    assert answer["queries"][0]["neighbours"][0]["name"] == "pears/4.png"
    # A store that cannot be used: the index is there, and MLflow gets it later.
    broken = json.loads((study / "study.json").read_text()) | {"tracking_uri": f"sqlite:///{tmp_path}/no/where.db"}
    (study / "study.json").write_text(json.dumps(broken))
    (tmp_path / "no").write_text("a file, where the store's folder would be")
    assert "MLflow gets the gallery later" in done("index", target, photos, "late").stderr
    assert Gallery.load(tmp_path / "late").names == tuple(image_names(photos))


@pytest.mark.usefixtures("apart")
def test_export_with_onnx(checkpoint_folder, tmp_path):
    text = done("export", checkpoint_folder, "model", "--onnx").stdout
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        *("README.md", "config.json", "model.onnx", "model.safetensors")
    ]
    for words in ("model/model.onnx", "checked in ONNX Runtime", "EmbeddingModel.load('model')"):
        assert words in text
    done("export", "model", "copy")
    image = write_image(tmp_path / "image.png", 1)
    copies = [EmbeddingModel.load(name).embed([image]) for name in ("model", "copy")]
    np.testing.assert_array_equal(*copies)
