"""The weights of the five releases: equal to their own forward pass, refused where a layer is missing or too much."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raydml.inference.export import EmbeddingModel
from raydml.inference.released import describe_release, import_release
from raydml.models.network import build_network
from raydml.models.pretrained import WeightsError, read_weights
from raydml.models.releases import RELEASES
from tests.models.release_files import NETWORKS, as_imagenet, content_of, write_release

#: Sizes of the images that each release evaluates, its classes of embeddings, and the settings that its file decides.
EXPECTED = {
    "mdr": (256, 224, "squash", "lanczos", "bn_inception", 512, "average", 1),
    "deep_metric": (256, 227, "short_side", "bilinear", "bn_inception", 512, "max", 1),
    "divide_conquer": (256, 224, "short_side", "bilinear", "resnet18", 128, "average", 8),
    "classification": (256, 224, "squash", "bilinear", "resnet18", 512, "average", 1),
    "mic": (256, 224, "short_side", "bilinear", "resnet18", 128, "average", 1),
}


def assert_equals_the_release(model: EmbeddingModel, network: nn.Module) -> None:
    crop_px = model.preprocessing.crop_px
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, crop_px, crop_px, 3), dtype=np.uint8))
    with torch.inference_mode():
        expected = network(pixels).numpy()
    np.testing.assert_allclose(model.embed_crops(pixels), expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("key", NETWORKS)
def test_the_embeddings_are_those_of_the_releases_own_forward_pass(key: str, tmp_path: Path) -> None:
    made = write_release(key, tmp_path)
    model = import_release(made.path)  # recognised by its names
    assert_equals_the_release(model, made.network)
    card, preparation = model.card, model.preprocessing
    sizes = (preparation.resize_px, preparation.crop_px, preparation.resize, preparation.interpolation)
    network = card["network"]
    assert EXPECTED[key] == (
        *sizes, network["backbone"], network["embedding_dim"], network.get("pooling", "average"),
        network.get("num_slices", 1),
    )  # fmt: skip
    assert card["release"]["name"] == key
    assert card["release"]["file"] == made.path.name
    assert describe_release(model)[0].startswith(RELEASES[key].title)
    loaded = EmbeddingModel.load(model.save(tmp_path / "model"))
    assert_equals_the_release(loaded, made.network)
    assert loaded.card["release"] == json.loads(json.dumps(card["release"]))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["divide_conquer", "classification", "mic"])
def test_resnet50_as_the_releases_use_it(key: str, tmp_path: Path) -> None:
    made = write_release(key, tmp_path, resnet="resnet50")
    model = import_release(made.path, key)
    assert model.card["network"]["backbone"] == "resnet50"
    assert_equals_the_release(model, made.network)


def test_the_baseline_with_a_remap_has_its_matrix(tmp_path: Path) -> None:
    made = write_release("classification", tmp_path, remap_dim=64)
    model = import_release(made.path)
    assert model.embedding_dim == 64
    assert_equals_the_release(model, made.network)
    assert model.card["release"]["codes"] == ["float", "binary"]


def test_a_crop_and_a_normalisation_of_the_releases_options(tmp_path: Path) -> None:
    deep = write_release("deep_metric", tmp_path)
    assert import_release(deep.path, crop_px=224).preprocessing.crop_px == 224
    mdr = write_release("mdr", tmp_path)
    pixels = torch.zeros(2, 224, 224, 3, dtype=torch.uint8)
    lengths = np.linalg.norm(import_release(mdr.path, normalize="l2").embed_crops(pixels), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_the_baseline_of_divide_and_conquer_has_one_slice(tmp_path: Path) -> None:
    made = write_release("divide_conquer", tmp_path)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8))
    model = import_release(made.path, num_slices=1)
    with torch.inference_mode():
        pooled = made.network.features(as_imagenet(pixels)).mean(dim=(2, 3))
        expected = nn.functional.normalize(made.network.embedding(pooled), dim=1).numpy()
    np.testing.assert_allclose(model.embed_crops(pixels), expected, atol=1e-5)
    assert "in 8 slices" in describe_release(import_release(made.path))[0]


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("mic", {"num_slices": 4}, "--num-slices = 4: MIC .* has no such option"),
        ("divide_conquer", {"normalize": "none"}, "--normalize = none: Divide & Conquer .* has no such option"),
    ],
)
def test_an_option_of_another_release_is_refused_also_where_the_file_was_recognised(
    key: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        import_release(write_release(key, tmp_path).path, **options)  # type: ignore[arg-type]


FEW, SOP, VEHICLES = (
    (1, 2, 4, 8),
    (1, 10, 100, 1000),
    ("vehicleid", "vehicleid_small", "vehicleid_medium", "vehicleid_large"),
)


def test_each_release_prints_its_own_k_codes_and_groups() -> None:
    """By the evaluation code of each release."""
    deep = (1, 2, 4, 8, 16, 32)
    assert {key: dict(release.recall_at) for key, release in RELEASES.items()} == {
        "mdr": {"cub200": FEW, "cars196": FEW, "sop": SOP, "inshop": (1, 10, 20, 30, 40)},
        "deep_metric": {"cub200": deep, "cars196": deep, "sop": SOP, "inshop": (1, 10, 20, 30, 40, 50)},
        "divide_conquer": {"sop": FEW, "inshop": (1, 10, 20, 30, 50), **dict.fromkeys(VEHICLES, FEW)},
        "classification": {"cub200": FEW, "cars196": FEW, "sop": SOP, "inshop": (1, 10, 20, 30, 40, 50)},
        "mic": {
            "cub200": FEW,
            "cars196": FEW,
            "sop": SOP,
            "inshop": (1, 10, 20, 30, 50),
            **dict.fromkeys(VEHICLES, (1, 5)),
        },
    }
    assert {key for key, release in RELEASES.items() if release.codes == ("float", "binary")} == {"classification"}
    assert {key for key, release in RELEASES.items() if release.groups == ("retrieval", "clustering")} == {"mic"}


def changed(key: str, folder: Path, change: object) -> Path:
    """A checkpoint of a release whose state dict was changed by a function."""
    made = write_release(key, folder)
    state = dict(made.network.state_dict())
    change(state)  # type: ignore[operator]
    torch.save(content_of(key, state), made.path)
    return made.path


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("mdr", lambda s: s.pop("linear.bias"), "lacks linear.bias"),
        ("mdr", lambda s: s.pop("base.model.inception_4a_1x1.weight"), r"missing: base\.model\.inception_4a_1x1"),
        ("mdr", lambda s: s.update({"linear2.weight": torch.ones(2)}), "linear2.weight has no place"),
        ("mdr", lambda s: s.update({"base.model.last_linear.weight": torch.ones(512, 1024)}), "a trained layer"),
        ("deep_metric", lambda s: s.update({"extra.weight": torch.ones(2)}), "unexpected: extra.weight"),
        ("deep_metric", lambda s: s.update({"classifier.linear.bias": torch.ones(9)}), r"linear\.bias is \(9,\)"),
        ("divide_conquer", lambda s: s.update({"features.0.weight": torch.ones(64, 3, 7, 7)}), "not equal to conv1"),
        ("divide_conquer", lambda s: s.pop("embedding.bias"), "lacks embedding.bias"),
        ("divide_conquer", lambda s: s.update({"embedding.weight": torch.ones(100, 512)}), "8 equal slices.*--num-"),
        ("classification", lambda s: s.pop("feature.7.1.bn2.bias"), r"missing: feature\.7\.1\.bn2\.bias"),
        ("classification", lambda s: s.update({"fc.weight": torch.ones(2)}), "fc.weight has no place"),
        ("mic", lambda s: s.update({"layer_blocks.0.0.conv1.weight": torch.ones(1)}), r"not equal to model\.layer1\.0"),
        ("mic", lambda s: s.pop("model.bn1.running_mean"), r"missing: model\.bn1\.running_mean"),
        ("mic", lambda s: s.update({"model.conv1.weight": torch.ones(64, 3, 3, 3)}), r"model\.conv1\.weight is"),
    ],
)  # fmt: skip
def test_a_layer_that_is_missing_too_much_or_of_another_shape_is_refused(
    key: str, change: object, message: str, tmp_path: Path
) -> None:
    path = changed(key, tmp_path, change)
    with pytest.raises(WeightsError, match=message) as error:
        import_release(path, key)
    assert str(path) in str(error.value)


def test_a_file_of_another_release_and_of_none_is_refused_with_its_name(tmp_path: Path) -> None:
    mic = write_release("mic", tmp_path)
    with pytest.raises(WeightsError, match=r"MIC .*Cure: --from mic"):
        import_release(mic.path, "mdr")
    torch.save({"layers.0.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"no checkpoint of one of the releases.*layers\.0\.weight"):
        import_release(tmp_path / "x.pth")


@pytest.mark.parametrize("key", ["mdr", "deep_metric"])
def test_a_trained_network_is_no_backbone(key: str, tmp_path: Path) -> None:
    """Its embedding was thrown away in silence, because its name begins like that of an ImageNet classifier."""
    path = write_release(key, tmp_path).path
    settings = {"backbone": "bn_inception", "embedding_dim": 8, "layer_norm": False, "normalize": "l2"}
    with pytest.raises(WeightsError, match=f"launch.py import .* --from {key}"):
        build_network(**settings, freeze_batch_norm=False, weights=str(path), seed=0)


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


class Harmless:
    """An object of a module that torch does not know."""


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_no_code_in_a_file_runs_and_what_is_no_tensor_is_ignored(is_zip: bool, tmp_path: Path) -> None:
    state, file = {"module.a": torch.ones(2), "module.b": torch.zeros(3)}, tmp_path / "c.pth.tar"
    content = {"state_dict": state, "opt": Harmless(), "best": np.float64(0.5), "names": np.array(["x"])}
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    read = read_weights(file)
    assert {name: value.tolist() for name, value in read.items()} == {"a": [1, 1], "b": [0, 0, 0]}
    torch.save({"state_dict": state, "opt": Trap(tmp_path / "made")}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(WeightsError, match="could run code") as error:
        read_weights(file)
    assert "weights_only" not in str(error.value)
    torch.save({"state_dict": {"a": Harmless()}}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(WeightsError, match="no state dict"):
        read_weights(file)
    torch.save(nn.Linear(2, 2), file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(WeightsError, match="could run code"):
        read_weights(file)
    assert not (tmp_path / "made").exists()
