"""What every backbone of the table must do, and what the table says about each."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from raydml.models import backbones, pretrained
from raydml.models.backbones import BACKBONES, ModelError
from raydml.models.network import Network, preprocessing_for
from raydml.models.pooling import pooling_layer
from tests.models.networks import make

# Channels of stage1 to stage4, and what one of their pixels is to the image: at 64 px.
STAGES = {
    "convnet": ((32, 64, 128, 128), (2, 4, 8, 16)),
    "resnet18": ((64, 128, 256, 512), (4, 8, 16, 32)),
    "resnet50": ((256, 512, 1024, 2048), (4, 8, 16, 32)),
    "googlenet": ((192, 480, 832, 1024), (4, 8, 16, 32)),
    "bn_inception": ((192, 320, 608, 1024), (4, 8, 16, 32)),
    "convnext_tiny": ((96, 192, 384, 768), (4, 8, 16, 32)),
    "vit_b_16": ((768,) * 4, (16,) * 4),
}
LARGE = pytest.param("vit_b_16", marks=pytest.mark.slow)  # 86 million parameters
EVERY = [*(name for name in BACKBONES if name != "vit_b_16"), LARGE]
WITH_MAPS = [name for name, facts in BACKBONES.items() if facts.has_pooling]


def images_for(backbone: str, size: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    size = size or BACKBONES[backbone].minimum_crop_px
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture(scope="module", params=EVERY)
def built(request: pytest.FixtureRequest) -> tuple[str, Network]:
    """A backbone's name and a network of it, built once for all tests of it."""
    return request.param, make(request.param)


@pytest.fixture
def fresh(built: tuple[str, Network]) -> tuple[str, Network]:
    """The same, without what the test before left in it."""
    name, network = built
    network.train()
    network.zero_grad()
    return name, network


def test_the_smallest_crop_is_embedded_and_gradients_reach_every_parameter(fresh) -> None:
    name, network = fresh
    images = images_for(name)
    features = network.layer(images, "pooled")
    assert features.shape == (2, BACKBONES[name].feature_dim)
    torch.testing.assert_close(features, network.trunk(images))
    embeddings = network(images)
    assert embeddings.shape == (2, 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    embeddings[:, 0].sum().backward()
    assert [key for key, value in network.named_parameters() if value.grad is None] == []


def test_stages_are_maps_that_shrink(fresh) -> None:
    name, network = fresh
    size = BACKBONES[name].fixed_crop_px or 64
    channels, strides = STAGES[name]
    with torch.no_grad():
        shapes = [tuple(network.layer(images_for(name, size), f"stage{n}").shape) for n in (1, 2, 3, 4)]
    assert shapes == [(2, c, size // s, size // s) for c, s in zip(channels, strides, strict=True)]


def test_looking_at_a_stage_leaves_no_trace(fresh) -> None:
    name, network = fresh
    images = images_for(name)
    with torch.random.fork_rng(devices=[]):  # stochastic depth
        torch.manual_seed(0)
        before = network(images)
        with torch.inference_mode():
            seen = network.layer(images, "stage2")
        assert seen.is_inference()
        for _ in range(2):
            network.layer(images, "stage4").sum().backward()
        torch.manual_seed(0)
        after = network(images)
    assert torch.equal(before, after)
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_embeddings_are_float32_under_autocast(fresh) -> None:
    name, network = fresh
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        embeddings = network(images_for(name))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_frozen_batch_norm_keeps_its_statistics_in_training(fresh) -> None:
    name, network = fresh
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert bool(norms) == (name not in ("convnext_tiny", "vit_b_16"))
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    network(images_for(name))
    for norm, (mean, variance) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.running_var, variance)
        assert not norm.training
        assert norm.weight.requires_grad


def test_the_seed_alone_decides(built) -> None:
    name, network = built
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        again, other = make(name), make(name, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
    state = network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert not all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("backbone", WITH_MAPS)
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_the_feature_is_the_last_stage_pooled(backbone: str, pooling: str) -> None:
    network = make(backbone, pooling=pooling).eval()
    images = images_for(backbone, 64)
    with torch.no_grad():
        maps, features = network.layer(images, "stage4"), network.layer(images, "pooled")
        expected = maps.mean(dim=(2, 3)) if pooling == "average" else maps.amax(dim=(2, 3))
        if backbone == "convnext_tiny":  # whose layer norm comes after
            expected = nn.functional.layer_norm(expected, (768,), eps=1e-6)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("backbone", sorted(BACKBONES.keys() - {"convnet", "bn_inception"}))
def test_names_and_shapes_are_torchvisions(backbone: str) -> None:
    extra = {"init_weights": False} if backbone == "googlenet" else {}
    pooling = "max" if BACKBONES[backbone].has_pooling else "average"
    with torch.device("meta"):
        theirs = torchvision.models.get_model(backbone, **extra).state_dict()
        ours = BACKBONES[backbone].build(pooling_layer(pooling)).state_dict()
    left_out = "heads." if backbone == "vit_b_16" else BACKBONES[backbone].classifier
    expected = {key: value.shape for key, value in theirs.items() if not key.startswith(left_out)}
    assert {key: value.shape for key, value in ours.items()} == expected
    assert backbone != "vit_b_16" or list(ours) == list(expected)


def test_names_of_the_convnet_stay_as_they_are() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = ["0.weight", *(f"1.{name}" for name in norm)]
    expected = [f"trunk.blocks.{block}.{layer}" for block in range(4) for layer in layers]
    assert list(make("convnet").state_dict()) == [*expected, "head.linear.weight", "head.linear.bias"]


def test_facts_agree_with_torchvision() -> None:
    # The weights of the first release, V1: what all five published systems started from.
    table = {
        "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
        "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
        "googlenet": torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1,
        "convnext_tiny": torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,
        "vit_b_16": torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1,
    }
    assert set(table) | {"convnet", "bn_inception"} == set(BACKBONES)
    for name, weights in table.items():
        facts = BACKBONES[name]
        assert pretrained.DOWNLOAD_URL + str(facts.weights_file) == weights.url
        assert (facts.channels, facts.value_range) == ("RGB", 1.0)
        if name != "googlenet":
            assert facts.mean == tuple(weights.transforms().mean)
            assert facts.std == tuple(weights.transforms().std)


def test_googlenet_preprocessing_equals_torchvisions_input_transform() -> None:
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = preprocessing_for("googlenet", resize_px=32, crop_px=32).normalise(pixels)
    theirs = torchvision.models.googlenet(aux_logits=False, transform_input=True, init_weights=False)
    imagenet = torchvision.transforms.Normalize(backbones.IMAGENET_MEAN, backbones.IMAGENET_STD)
    torch.testing.assert_close(ours, theirs._transform_input(imagenet(pixels.permute(0, 3, 1, 2) / 255)))


@pytest.mark.parametrize("name", ["resnet18", "convnet", "vit_b_16"])
def test_the_crops_it_says_it_takes_are_in_its_words(name: str) -> None:
    facts = BACKBONES[name]
    assert facts.takes_crop(facts.minimum_crop_px)
    assert not facts.takes_crop(facts.minimum_crop_px - 1)
    assert facts.takes_crop(facts.minimum_crop_px + 1) == (facts.fixed_crop_px is None)
    assert facts.crops == ("exactly 224" if name == "vit_b_16" else f"at least {facts.minimum_crop_px}")
    assert facts.nearest_crop_px(1) == facts.minimum_crop_px
    assert facts.nearest_crop_px(1000) == (224 if name == "vit_b_16" else 1000)


@pytest.mark.parametrize("size", [8, 11, 16, 28, 64])
def test_convnet_takes_small_and_odd_sizes(size: int) -> None:
    network = make("convnet")
    images = torch.randn(2, 3, size, size)
    assert network(images).shape == (2, 16)
    assert min(network.layer(images, "stage4").shape[2:]) >= 4  # never squeezed to a point


def test_a_stage_of_a_resnet_is_what_its_layers_make() -> None:
    network = make("resnet18").eval()
    images, trunk = images_for("resnet18", 48), network.trunk
    with torch.no_grad():
        stem = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
        assert torch.equal(network.layer(images, "stage2"), trunk.layer2(trunk.layer1(stem)))


def test_tokens_are_laid_out_row_by_row_without_the_class_token() -> None:
    class Tokens(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            numbers = torch.arange(1.0, 10).repeat(len(images), 1)
            return torch.stack([torch.cat([torch.zeros(len(images), 1), numbers], dim=1)] * 2, dim=2)

    network = Network(nn.Sequential(Tokens()), make("convnet").head, freeze_batch_norm=False, stages=("0",))
    maps = network.layer(torch.zeros(2, 3, 3, 3), "stage1")
    expected = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).expand(2, 2, 3, 3)
    assert torch.equal(maps, expected)


def test_a_hook_goes_also_where_the_trunk_fails_and_an_unknown_layer_lists_the_choices() -> None:
    network = make("convnet")
    with pytest.raises(RuntimeError):
        network.layer(torch.zeros(1, 4, 8, 8), "stage1")
    assert not network.trunk.blocks[0]._forward_hooks
    with pytest.raises(ModelError, match="'layer1'; one of stage1, stage2, stage3, stage4, pooled"):
        network.layer(torch.zeros(1, 3, 8, 8), "layer1")


def test_the_maximum_is_that_of_torch_with_its_gradient() -> None:
    maps = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    others = maps.detach().clone().requires_grad_()
    weight = torch.randn(2, 5, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pooled = pooling_layer("max")(maps)
    expected = nn.functional.adaptive_max_pool2d(others, 1)
    assert torch.equal(pooled, expected)
    (pooled * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(maps.grad, others.grad)


def test_every_setting_of_the_head_arrives() -> None:
    settings = {"projection": "linear_no_bias", "head_init": "kaiming_normal", "dropout": 0.25, "layer_norm": True}
    network = make("convnet", embedding_dim=128, num_slices=4, **settings)
    head = network.head
    assert (head.embedding_dim, head.num_slices, head.linear.bias) == (128, 4, None)
    assert head.dropout.p == 0.25
    assert isinstance(head.standardise, nn.LayerNorm)
    assert head.linear.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    embeddings = network(torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(embeddings.unflatten(1, (4, 32)).norm(dim=2), torch.ones(3, 4))
