"""The exported folder: the same embeddings as the checkpoint's network, whatever the images come as."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import raydml.export
from raydml.images.pixels import UnreadableImage
from raydml.images.preprocessing import PreprocessingError
from raydml.inference.export import EmbeddingModel, ExportError, export_model, is_exported, load_checkpoint
from raydml.models.network import build_network, preprocessing_for
from raydml.models.pretrained import WeightsError
from raydml.training import checkpoint

NETWORK = {
    "backbone": "convnet",
    "embedding_dim": 12,
    "layer_norm": True,
    "normalize": "l2",
    "freeze_batch_norm": False,
}


@pytest.fixture
def network():
    built = build_network(**NETWORK, weights="none", seed=3)
    for name, buffer in built.named_buffers():  # running statistics that are not the initial ones
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    return built.eval()


@pytest.fixture
def checkpoint_folder(tmp_path, network):
    card = {
        "network": NETWORK,
        "preprocessing": preprocessing_for("convnet", resize_px=20, crop_px=16).to_dict(),
        "fingerprint": "0123456789ab",
        "epoch": 4,
        "best_epoch": 3,
        "metrics": {"val_map_at_r": 0.5},
    }
    weights = network.state_dict()
    return checkpoint.save(tmp_path / "checkpoint", state={}, model_card=card, best_weights=weights)


@pytest.fixture
def model(checkpoint_folder, tmp_path):
    return EmbeddingModel.load(export_model(checkpoint_folder, tmp_path / "model"))


def image(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_same_embeddings_as_the_network_it_was_made_from(model, network):
    pixels = np.stack([image(20, 20, seed) for seed in range(5)])
    # By hand: the centre 16 of 20 pixels, scaled from 0..255 to -1..1, channels first.
    prepared = torch.from_numpy(pixels[:, 2:18, 2:18].astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network(prepared).numpy()
    found = model.embed(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (found.dtype, found.shape) == (np.float32, (5, 12))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-3, "the images should not all look the same to this network"


def test_paths_pil_images_and_arrays_of_mixed_sizes_agree(model, tmp_path):
    first, second = image(31, 23, 1), image(14, 50, 2)
    Image.fromarray(first).save(tmp_path / "first.png")
    mixed = model.embed([tmp_path / "first.png", str(tmp_path / "first.png"), Image.fromarray(second), first, second])
    np.testing.assert_array_equal(mixed[0], mixed[1])
    np.testing.assert_allclose(mixed[0], mixed[3], atol=1e-6)
    np.testing.assert_allclose(mixed[2], mixed[4], atol=1e-6)
    assert np.abs(mixed[3] - mixed[4]).max() > 1e-4


def test_the_batch_size_has_no_effect(model):
    images = [image(20 + seed, 30, seed) for seed in range(7)]
    whole = model.embed(images)
    for batch_size in (1, 3, 7):
        np.testing.assert_allclose(model.embed(images, batch_size=batch_size), whole, atol=1e-5)
    assert model.embed([]).shape == (0, 12)


def test_the_folder_needs_nothing_else(model, checkpoint_folder, tmp_path):
    images = [image(20, 20)]
    before = model.embed(images)
    for file in checkpoint_folder.iterdir():
        file.unlink()
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    np.testing.assert_array_equal(EmbeddingModel.load(str(moved)).embed(images), before)
    assert sorted(file.name for file in moved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "EmbeddingModel.load" in (moved / "README.md").read_text()
    assert "weights of epoch 3)" in (moved / "README.md").read_text()
    card = json.loads((moved / "config.json").read_text())
    assert (card["fingerprint"], card["epoch"], card["metrics"]) == ("0123456789ab", 4, {"val_map_at_r": 0.5})
    assert str(tmp_path) not in (moved / "config.json").read_text() + (moved / "README.md").read_text()
    modes = {file.name: file.stat().st_mode & 0o777 for file in moved.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "the same users can read both"


def test_an_exported_model_is_recognised_by_its_files(model, checkpoint_folder, tmp_path):
    assert model.card["epoch"] == 4
    assert is_exported(tmp_path / "model")
    assert not is_exported(checkpoint_folder)
    assert not is_exported(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_exported(tmp_path), "a stranger's configuration"
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="weights_sha256"):
        EmbeddingModel.load(tmp_path)


def test_a_checkpoint_is_the_model_that_would_be_exported(model, checkpoint_folder):
    images = [image(20, 20), image(25, 20, 1)]
    np.testing.assert_array_equal(load_checkpoint(checkpoint_folder).embed(images), model.embed(images))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", ["short_side", "squash"])
def test_the_readme_prepares_an_image_as_the_model_does(resize, interpolation, checkpoint_folder, tmp_path):
    """Its functions, taken from the text and run without torch, against `Preprocessing.read`, bit for bit."""
    loaded = load_checkpoint(checkpoint_folder)
    loaded.preprocessing = replace(loaded.preprocessing, resize=resize, interpolation=interpolation, resize_px=21)
    text = (loaded.save(tmp_path / "out") / "README.md").read_text()
    (block,) = re.findall(r"^    import numpy.*?(?=^    session)", text, flags=re.DOTALL | re.MULTILINE)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image(50, 31)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(image(90, 30)[:, :, 0]).save(tmp_path / "grey.png")
    steps = np.random.default_rng(0).integers(0, 2, (19, 13, 3), dtype=np.uint8) * 255  # overshoots where enlarged
    Image.fromarray(steps).save(tmp_path / "small.png")
    Image.fromarray(image(700, 600)).save(tmp_path / "large.png")
    names = ["turned.jpg", "grey.png", "small.png", "large.png"]
    (tmp_path / "prepare.py").write_text(
        f"import sys\nsys.modules['torch'] = None\n{textwrap.dedent(block).replace(', onnxruntime', '')}"
        f"numpy.save('out.npy', numpy.stack([prepared(name) for name in {names}]))\n"
    )
    subprocess.run([sys.executable, "prepare.py"], cwd=tmp_path, check=True, timeout=60)
    expected = np.stack([loaded.preprocessing.read(tmp_path / name) for name in names])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.usefixtures("model")
def test_exporting_again_replaces_the_model(network, tmp_path, checkpoint_folder):
    other = build_network(**NETWORK, weights="none", seed=4)
    card = checkpoint.load_card(checkpoint_folder) | {"epoch": 9}
    newer = checkpoint.save(tmp_path / "newer", state={}, model_card=card, best_weights=other.state_dict())
    replaced = EmbeddingModel.load(export_model(newer, tmp_path / "model"))
    assert replaced.card["epoch"] == 9
    assert torch.equal(replaced.network.head.linear.weight, other.head.linear.weight)
    assert not torch.equal(replaced.network.head.linear.weight, network.head.linear.weight)


@pytest.mark.usefixtures("model")
def test_damage_is_noticed(checkpoint_folder, tmp_path):
    folder = tmp_path / "model"
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.safetensors is not as it was written"):
        EmbeddingModel.load(folder)
    weights.unlink()
    with pytest.raises(ExportError, match="is no exported model"):
        EmbeddingModel.load(folder)
    with pytest.raises(ExportError, match=r"is no exported model.*config\.json"):
        EmbeddingModel.load(tmp_path)
    (checkpoint_folder / "weights.safetensors").write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError):
        export_model(checkpoint_folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_network_that_does_not_fit_its_card_is_not_exported(tmp_path, checkpoint_folder):
    card = checkpoint.load_card(checkpoint_folder)
    weights = load_file(checkpoint_folder / "weights.safetensors")
    wrong = card | {"network": NETWORK | {"embedding_dim": 13}}
    folder = checkpoint.save(tmp_path / "wrong", state={}, model_card=wrong, best_weights=weights)
    with pytest.raises(WeightsError, match="wrong shape"):
        export_model(folder, tmp_path / "out")
    del card["preprocessing"]
    folder = checkpoint.save(tmp_path / "bare", state={}, model_card=card, best_weights=weights)
    with pytest.raises(ExportError, match="lacks preprocessing"):
        load_checkpoint(folder)


def test_one_image_without_a_list_is_refused(model, tmp_path):
    for one in ("photo.jpg", tmp_path / "photo.jpg", Image.new("RGB", (20, 20)), image(20, 20)):
        with pytest.raises(ExportError, match=r"write \[image\]"):
            model.embed(one)
    with pytest.raises(PreprocessingError, match="uint8"):
        model.embed([image(20, 20).astype(np.float32)])
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(UnreadableImage, match=r"text\.jpg"):
        model.embed([tmp_path / "text.jpg"])


def test_a_path_is_decoded_by_the_rules_of_a_trial(model, tmp_path):
    """A damaged EXIF block and a large colour profile are no faults, and HEIC is a format (tests/images)."""
    Image.fromarray(image(20, 20)).save(tmp_path / "a.png", icc_profile=bytes(2_000_000))
    (tmp_path / "a.png").rename(tmp_path / "a.heic")  # the content decides
    assert np.array_equal(model.embed([tmp_path / "a.heic"]), model.embed([image(20, 20)]))


def test_training_and_serving_need_little_more_than_torch():
    """Ray and MLflow are not absent here, so that an import which does without them would be seen as well."""
    absent = ["faiss", "safetensors", "sklearn", "scipy", "pandas", "matplotlib", "typer", "rich", "yaml", "jinja2"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import raydml.training.trainer, raydml.evaluation.embed, raydml.export\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'ray', 'mlflow'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_exported_before_the_packages_were_ordered_loads_and_embeds_alike(tmp_path):
    """Commit 518891d trained a convnet for an epoch, exported it and embedded the two images below; its weights were
    replaced before the export by a tile of 97 numbers, repeated, so that the file compresses."""
    before = Path(__file__).parents[1] / "golden" / "exported_before"
    folder = shutil.copytree(before, tmp_path / "model")
    with gzip.open(before / "model.safetensors.gz") as weights:
        (folder / "model.safetensors").write_bytes(weights.read())
    model = raydml.export.EmbeddingModel.load(folder)
    first = (np.arange(20 * 17 * 3) * 29 % 256).astype(np.uint8).reshape(20, 17, 3)
    second = (np.arange(9 * 30 * 3) * 53 % 251).astype(np.uint8).reshape(9, 30, 3)
    expected = np.array(json.loads((before / "embeddings.json").read_text(encoding="utf-8")))
    np.testing.assert_allclose(model.embed([first, second]), expected, atol=1e-5)
    assert np.linalg.norm(expected[0] - expected[1]) > 0.1
    assert model.card["fingerprint"] == "f84919c48073"
