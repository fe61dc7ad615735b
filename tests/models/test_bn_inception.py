"""BN-Inception against the released implementation's numbers, an explicit wiring, and its published file's names."""

import dataclasses
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raydml.models.backbones import BACKBONES, ModelError
from raydml.models.bn_inception import BNInception
from raydml.models.network import preprocessing_for
from raydml.models.pooling import pooling_layer
from raydml.models.pretrained import WeightsError, load_exactly
from tests.golden_vectors import golden_arrays, golden_case, golden_facts
from tests.models.networks import make

RELEASE = golden_facts("deep_metric_bninception")
make_large = partial(make, "bn_inception", embedding_dim=512, pooling="max")


def by_rule(key: str, shape: torch.Size, salt: int) -> Tensor:
    """The value of a parameter of the release's network, as the golden file's description says."""
    random = np.random.RandomState((zlib.crc32(key.encode()) + salt) % 2**32).standard_normal(tuple(shape))
    normal = torch.from_numpy(np.asarray(random))
    if key.endswith("running_var"):
        return 1 + 0.1 * normal.abs()
    if key.endswith("running_mean"):
        return 0.1 * normal
    if key.rsplit(".", 1)[0].endswith("_bn"):
        return (1 if key.endswith("weight") else 0) + 0.1 * normal
    if key.endswith("bias"):
        return 0.05 * normal
    return normal * (2 / shape[1:].numel()) ** 0.5 if len(shape) == 4 else normal / shape[1] ** 0.5


def filled(module: nn.Module, salt: int, prefix: str = "") -> None:
    state = module.state_dict()
    kept = {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}
    rule = {name: by_rule(prefix + name, value.shape, salt) for name, value in state.items() if name not in kept}
    module.load_state_dict({**rule, **kept})


@pytest.mark.parametrize("case", RELEASE["cases"], ids=lambda case: case["case"])
def test_it_is_the_release(case: dict) -> None:
    golden = golden_case("deep_metric_bninception", case["case"])
    network = make_large().double().eval()
    filled(network.trunk, case["salt"])
    filled(network.head.linear, case["salt"], "classifier.linear.")
    seen: dict[str, Tensor] = {}
    stages = [key.removeprefix("stage_").removesuffix("_shape") for key in golden if key.endswith("_shape")]
    for name in stages[1:]:
        network.trunk[name].register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
    images = golden["image_int"].double() / 64
    with torch.no_grad():
        embeddings = network(images)
        pooled = network.layer(images, "pooled")
        last = network.layer(images, "stage4")
    tolerance = RELEASE["tolerance"]
    torch.testing.assert_close(pooled, golden["pooled"], **tolerance)
    torch.testing.assert_close(embeddings, golden["embedding"], **tolerance)
    assert list(last.shape) == golden["final_map_shape"].tolist()
    assert len(seen) == 5
    for name, output in seen.items():
        assert list(output.shape) == golden[f"stage_{name}_shape"].tolist(), name
        found = torch.stack([output.mean(), output.std()])
        torch.testing.assert_close(found, golden[f"stage_{name}_meanstd"], rtol=1e-5, atol=1e-8, msg=name)


# Each block as the table of the MDR release writes it: 1x1 | 3x3 | double 3x3 | pooling.
BLOCKS = """
3a 192 | 64  | 64 64   | 64 96 96    | avg 32
3b 256 | 64  | 64 96   | 64 96 96    | avg 64
3c 320 | -   | 128 160 | 64 96 96    | stride
4a 576 | 224 | 64 96   | 96 128 128  | avg 128
4b 576 | 192 | 96 128  | 96 128 128  | avg 128
4c 576 | 160 | 128 160 | 128 160 160 | avg 128
4d 608 | 96  | 128 192 | 160 192 192 | avg 128
4e 608 | -   | 128 192 | 192 256 256 | stride
5a 1056 | 352 | 192 320 | 160 224 224 | avg 128
5b 1024 | 352 | 192 320 | 192 224 224 | max 128
"""


def explicitly(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The last map, wired by hand from the functions: nothing happens in place."""

    def unit(name: str, maps: Tensor, padding: int = 0, stride: int = 1) -> Tensor:
        maps = functional.conv2d(maps, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)
        shift = state[f"{name}_bn.bias"] - state[f"{name}_bn.running_mean"] * (
            scale := state[f"{name}_bn.weight"] / (state[f"{name}_bn.running_var"] + 1e-5).sqrt()
        )
        return (maps * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    def halved(maps: Tensor) -> Tensor:
        return functional.max_pool2d(maps, 3, 2, ceil_mode=True)

    maps = halved(unit("conv1_7x7_s2", images, 3, 2))
    maps = halved(unit("conv2_3x3", unit("conv2_3x3_reduce", maps), 1))
    for line in BLOCKS.strip().splitlines():
        names, one, _, _, pool = (part.split() for part in line.split("|"))
        name, stride = f"inception_{names[0]}", 2 if pool == ["stride"] else 1
        assert maps.shape[1] == int(names[1])
        branches = [] if one == ["-"] else [unit(f"{name}_1x1", maps)]
        branches.append(unit(f"{name}_3x3", unit(f"{name}_3x3_reduce", maps), 1, stride))
        first = unit(f"{name}_double_3x3_1", unit(f"{name}_double_3x3_reduce", maps), 1)
        branches.append(unit(f"{name}_double_3x3_2", first, 1, stride))
        if stride == 2:
            branches.append(halved(maps))
        else:
            # The padding counts: the sum of nine, fewer at the border, over nine.
            ones = torch.ones(maps.shape[1], 1, 3, 3, dtype=maps.dtype) / 9
            averaged = functional.conv2d(maps, ones, padding=1, groups=maps.shape[1])
            pooled = averaged if pool[0] == "avg" else functional.max_pool2d(maps, 3, 1, 1)
            branches.append(unit(f"{name}_pool_proj", pooled))
        maps = torch.cat(branches, dim=1)
    return maps


@pytest.mark.parametrize(("pooling", "size"), [("average", 70), ("max", 38)])
def test_an_explicit_wiring_agrees(pooling: str, size: int) -> None:
    trunk = BNInception(pooling_layer(pooling)).double().eval()
    filled(trunk, salt=3)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        maps = explicitly(dict(trunk.state_dict()), images)
        expected = maps.mean(dim=(2, 3)) if pooling == "average" else maps.amax(dim=(2, 3))
        torch.testing.assert_close(trunk(images), expected, rtol=1e-9, atol=1e-9)


def test_it_has_as_many_parameters_as_the_published_one_without_its_classifier() -> None:
    trunk = BNInception(pooling_layer("average"))
    assert sum(value.numel() for value in trunk.parameters()) == 11_295_240 - (1024 * 1000 + 1000)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A state dict as in bn_inception-52deb4733.pth: BatchNorm's vectors as rows, no counters, the classifier."""
    trunk = BNInception(pooling_layer("average"))
    filled(trunk, salt=5)
    kept = {name: value for name, value in trunk.state_dict().items() if not name.endswith("num_batches_tracked")}
    state = {name: value[None] if "_bn." in name else value for name, value in kept.items()}
    assert state["inception_4e_double_3x3_2_bn.running_var"].shape == (1, 256)
    return {**state, "last_linear.weight": torch.zeros(1000, 1024), "last_linear.bias": torch.zeros(1000)}


def test_the_published_file_loads_by_its_path(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save(published, tmp_path / "bn_inception-52deb4733.pth")
    network = make_large(weights=str(tmp_path / "bn_inception-52deb4733.pth")).eval()
    state = {name: value.squeeze(0) if "_bn." in name else value for name, value in published.items()}
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = explicitly(state, images)
        torch.testing.assert_close(network.layer(images, "stage4"), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("inception_5a_1x1.bias"), r"missing: inception_5a_1x1\.bias"),
        (lambda state: state.update({"inception_6a_1x1.bias": torch.zeros(3)}), r"unexpected: inception_6a_1x1\.bias"),
        (
            lambda state: state.update({"conv1_7x7_s2_bn.weight": torch.zeros(1, 65)}),
            r"conv1_7x7_s2_bn\.weight is \(1, 65\), the network has \(64,\)",
        ),
        # One row too many is another network: only vectors may come as rows.
        (
            lambda state: state.update({"conv1_7x7_s2.weight": state["conv1_7x7_s2.weight"][None]}),
            r"conv1_7x7_s2\.weight is \(1, 64, 3, 7, 7\)",
        ),
    ],
)
def test_a_file_of_another_network_is_refused(published: dict[str, Tensor], change, message: str) -> None:
    state = {name: value for name, value in published.items() if not name.startswith("last_linear.")}
    change(state)
    with torch.device("meta"):  # nothing is loaded
        trunk = BNInception(pooling_layer("average"))
    with pytest.raises(WeightsError, match=message):
        load_exactly(trunk, state, "other.pth")


def test_a_classifier_under_another_name_is_refused(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save({**published, "fc.weight": torch.zeros(1000, 1024)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"unexpected: fc\.weight$"):
        make_large(weights=str(tmp_path / "other.pth"))


def test_the_sizes_of_the_papers_are_taken_and_their_neighbours_are_not() -> None:
    expected = {size for first in range(31, 288, 32) for size in range(first, first + 8)}  # 31 to 38, ..., 287 to 294
    assert {size for size in range(300) if BACKBONES["bn_inception"].takes_crop(size)} == expected


def test_the_sizes_it_says_it_takes_are_those_that_run() -> None:
    with torch.device("meta"):  # shapes alone
        trunk = BNInception(pooling_layer("max")).eval()
        for size in (16, 30, 31, 38, 39, 62, 63, 70, 71, 222, 223, 230, 231):
            try:
                trunk(torch.zeros(1, 3, size, size))
            except RuntimeError:
                assert not BACKBONES["bn_inception"].takes_crop(size), size
            else:
                assert BACKBONES["bn_inception"].takes_crop(size), size


@pytest.mark.parametrize(("crop_px", "nearest"), [(8, 31), (39, 38), (60, 63), (222, 223), (256, 256), (240, 230)])
def test_a_crop_it_cannot_take_names_the_nearest(crop_px: int, nearest: int) -> None:
    assert BACKBONES["bn_inception"].nearest_crop_px(crop_px) == nearest
    if crop_px == nearest:
        assert preprocessing_for("bn_inception", resize_px=256, crop_px=crop_px).crop_px == crop_px
    else:
        with pytest.raises(ModelError, match=f"crop_px: {crop_px};.*set crop_px: {nearest} "):
            preprocessing_for("bn_inception", resize_px=256, crop_px=crop_px)


def test_an_image_is_prepared_as_in_the_mdr_release() -> None:
    stored = golden_arrays("mdr_transform")
    image, expected = stored["image"], stored["bninception__out_stride8"]
    settings = {"resize_px": 256, "crop_px": 224, "resize": "squash", "interpolation": "lanczos"}
    preprocessing = preprocessing_for("bn_inception", **settings)
    read = torch.from_numpy(preprocessing.read(image).copy())
    found = preprocessing.for_evaluation(read[None])[0, :, ::8, ::8].numpy()
    np.testing.assert_allclose(found, expected, atol=1.5)  # Pillow rounds between the two passes of a filter


def test_an_image_is_prepared_as_in_the_deep_metric_release() -> None:
    """Its images are smaller than any crop the network takes: the sizes are the file's, the rest is the table's."""
    case = golden_facts("deep_metric_transform")["cases"][0]
    stored = golden_arrays("deep_metric_transform")
    image, expected = stored["c0__image"], stored["c0__center_crop"]
    ours = preprocessing_for("bn_inception", resize_px=64, crop_px=64)
    preprocessing = dataclasses.replace(ours, resize_px=case["origin_width"], crop_px=case["width"])
    read = torch.from_numpy(preprocessing.read(image).copy())
    found = preprocessing.for_evaluation(read[None])[0].numpy()
    np.testing.assert_allclose(found, expected, atol=case["tolerance"])
