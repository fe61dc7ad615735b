"""An ONNX file: the same embeddings as the network for every backbone and head, from pixels before normalisation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from raydml.images.preprocessing import Preprocessing
from raydml.inference.export import EmbeddingModel, ExportError, export_onnx
from raydml.models.backbones import BACKBONES
from raydml.models.network import build_network, preprocessing_for

#: Of ONNX Runtime against torch, on embeddings of about unit length, both in float32: two programs' rounding.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CROPS = {"convnet": 16, "bn_inception": 63, "vit_b_16": 224}  # the others: 64
HEAD = {"embedding_dim": 12, "layer_norm": False, "normalize": "l2"}


def model_of(backbone="convnet", preprocessing=None, **head):
    """A model with random weights whose BatchNorm layers have seen images; else all its embeddings are the same."""
    settings = {"backbone": backbone, "freeze_batch_norm": False, **HEAD, **head}
    network = build_network(**settings, weights="none", seed=3)
    crop_px = CROPS.get(backbone, 64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()  # also where freeze_batch_norm holds it
    with torch.no_grad():
        network.trunk(torch.randn(4, 3, crop_px, crop_px, generator=torch.Generator().manual_seed(0)))
    preprocessing = preprocessing or preprocessing_for(backbone, resize_px=crop_px + 3, crop_px=crop_px)
    return EmbeddingModel(network, preprocessing, {"network": settings, "fingerprint": "0123456789ab"}, "cpu")


def resized_images(model, num_images, seed=0):
    side = model.preprocessing.resize_px
    return np.random.default_rng(seed).integers(0, 256, (num_images, side, side, 3), dtype=np.uint8)


def run(path, model, images):
    """The ONNX file's embeddings of resized images: the centre is cut out here, and that is all."""
    first = round((model.preprocessing.resize_px - model.preprocessing.crop_px) / 2)
    within = slice(first, first + model.preprocessing.crop_px)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {"images": np.ascontiguousarray(images[:, within, within])})
    return embeddings


def check_parity(model, path):
    difference = export_onnx(model, path)
    assert 0 <= difference < 1e-5
    for num_images in (1, 3):
        images = resized_images(model, num_images, seed=num_images)
        expected, found = model.embed(images), run(path, model, images)
        assert (found.dtype, found.shape) == (np.float32, (num_images, model.embedding_dim))
        np.testing.assert_allclose(found, expected, **CLOSE)
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max(), "to this network all images are the same"


@pytest.mark.slow
@pytest.mark.timeout(900)  # vit_b_16 on a core that others use, too
@pytest.mark.parametrize("backbone", sorted(BACKBONES.keys() - {"convnet"}))
def test_every_backbone_gives_the_same_embeddings(backbone, tmp_path):
    check_parity(model_of(backbone, layer_norm=True), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "head",
    [
        {"layer_norm": True, "num_slices": 4, "dropout": 0.5},
        {"normalize": "mean_distance", "projection": "linear_no_bias", "head_init": "kaiming_normal"},
        {"normalize": "none", "projection": "none", "embedding_dim": 128, "pooling": "max"},
        {"freeze_batch_norm": True, "head_init": "xavier_normal", "num_slices": 3},
    ],
    ids=lambda head: "-".join(head),
)
def test_every_head_gives_the_same_embeddings(head, tmp_path):
    check_parity(model_of(**head), tmp_path / "model.onnx")


def test_the_normalisation_is_inside(tmp_path):
    """BGR, 0..255, a mean and a deviation of its own for each channel; computed here from the definition."""
    preprocessing = Preprocessing(16, 16, (104.0, 117.0, 128.0), (1.0, 2.0, 4.0), channels="BGR", value_range=255.0)
    model = model_of(preprocessing=preprocessing)
    export_onnx(model, tmp_path / "model.onnx")
    pixels = resized_images(model, 2)
    blue, green, red = pixels[..., 2] - 104.0, (pixels[..., 1] - 117.0) / 2, (pixels[..., 0] - 128.0) / 4
    with torch.no_grad():
        expected = model.network(torch.from_numpy(np.stack([blue, green, red], axis=1)).float()).numpy()
    np.testing.assert_allclose(run(tmp_path / "model.onnx", model, pixels), expected, **CLOSE)


def test_the_file_says_what_it_wants_and_is_one_file(tmp_path):
    model = model_of()
    model.save(tmp_path / "model")
    assert export_onnx(tmp_path / "model", tmp_path / "new" / "m.onnx") < 1e-5, "from a folder"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.onnx"], "no weights beside it, nothing left"
    onnx.checker.check_model(str(tmp_path / "new" / "m.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "new" / "m.onnx"), providers=["CPUExecutionProvider"])
    (images,), (embeddings,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [16, 16, 3])
    assert (embeddings.name, embeddings.type, embeddings.shape[1:]) == ("embeddings", "tensor(float)", [12])
    said = session.get_modelmeta().custom_metadata_map
    expected = {"resize": "short_side", "resize_px": "19", "crop_px": "16", "interpolation": "bilinear"}
    expected |= {"embedding_dim": "12", "fingerprint": "0123456789ab", "max_aspect": "8"}
    assert {name: said[name] for name in expected} == expected


class TwoFaced(nn.Module):
    """A network that is another one while it is exported."""

    def forward(self, images):
        embeddings = images.mean(dim=(2, 3)).repeat(1, 4)
        return embeddings + 0.01 if torch.compiler.is_exporting() else embeddings


def test_a_file_that_gives_other_embeddings_is_not_kept(tmp_path):
    model = model_of()
    model.network = TwoFaced()
    with pytest.raises(ExportError, match="differ from the network's"):
        export_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(tmp_path):
    code = (
        "import sys\nfrom raydml.inference.export import export_onnx\n"
        "for missing in ('onnx', 'onnxscript', 'onnxruntime'):\n"
        "    sys.modules[missing] = None\n"
        "    try:\n        export_onnx('nowhere', 'model.onnx')\n"
        "    except ValueError as error:\n        print(error)\n"
        "    del sys.modules[missing]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 3
    for missing, line in zip(("onnx", "onnxscript", "onnxruntime"), said, strict=True):
        assert f"import of {missing} halted" in line
        assert "pip install 'raydml[onnx]'" in line
