"""Any network of timm as a backbone: features against timm's own, poolings by hand, weights, and what learns."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from raydml.config.trial import fingerprint, parse_trial
from raydml.errors import ConfigError
from raydml.models.backbones import ModelError
from raydml.models.lookup import facts_of
from raydml.models.network import build_network
from raydml.models.pooling import GeM
from raydml.models.pretrained import WeightsError
from raydml.models.trunk_parts import block_ends
from tests.models.networks import make

SHARED = Path(__file__).parents[2].parent / "shared"
LITE0 = SHARED / "data" / "weights" / "tf_efficientnet_lite0.safetensors"
VIT, LITE, CONVNEXT = "timm:vit_tiny_patch16_224", "timm:tf_efficientnet_lite0", "timm:convnext_atto"


def images_of(size, number=2):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def theirs(network, name, size, **settings):
    """Timm's own network with the weights of a trunk, in evaluation mode."""
    model = timm.create_model(name.removeprefix("timm:"), num_classes=0, **settings)
    model.load_state_dict(network.trunk.model.state_dict())
    return model.eval()(images_of(size))


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        (VIT, 32, {"img_size": 32}),
        (LITE, 64, {}),
        ("timm:eva02_tiny_patch14_224", 42, {"img_size": 42}),
        (CONVNEXT, 64, {}),
    ],
)
def test_features_are_those_of_timm_at_other_sizes_of_images(name, size, settings):
    network = make(name, crop_px=size, pooling=facts_of(name).own_pooling).eval()
    features = network.features(images_of(size))
    assert features.shape[1] == facts_of(name).feature_dim
    torch.testing.assert_close(features, theirs(network, name, size, **settings))
    assert network(images_of(size)).shape == (2, 16)


def test_what_is_known_of_a_network_is_what_timm_says():
    dino = facts_of("timm:vit_small_patch14_dinov2")
    assert (dino.feature_dim, dino.own_pooling, dino.mean[0]) == (384, "cls", 0.485)
    assert dino.pooling_names == ("average", "max", "gem", "cls", "cls_mean")
    assert dino.features("cls_mean") == 768
    assert [dino.takes_crop(size) for size in (14, 224, 225, 518)] == [True, True, False, True]
    assert facts_of("timm:vit_base_patch16_siglip_224").own_pooling == "attention"
    swin = facts_of("timm:swin_tiny_patch4_window7_224")
    assert (swin.fixed_crop_px, swin.takes_crop(256), swin.own_pooling) == (224, False, "average")
    assert "cls" not in swin.pooling_names
    mobile = facts_of("timm:mobilenetv3_small_100")  # its last layer comes after its own pooling
    assert (mobile.feature_dim, mobile.features("max")) == (1024, 576)
    assert facts_of(LITE).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("pooling", ["average", "max", "gem", "cls", "cls_mean"])
def test_tokens_are_pooled_as_they_say(pooling):
    network = make(VIT, crop_px=48, pooling=pooling).eval()
    with torch.no_grad():
        tokens = network.trunk.model.forward_features(images_of(48))
        cls, patches = tokens[:, 0], tokens[:, 1:]
        expected = {
            "average": patches.mean(1),
            "max": patches.max(1).values,
            "gem": patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3),
            "cls": cls,
            "cls_mean": torch.cat((cls, patches.mean(1)), 1),
        }[pooling]
        torch.testing.assert_close(network.features(images_of(48)), expected)


def test_maps_with_the_channels_last_are_pooled_over_their_places():
    network = make("timm:swin_tiny_patch4_window7_224", crop_px=224, pooling="max").eval()
    with torch.no_grad():
        maps = network.trunk.model.forward_features(images_of(224, 1))
        assert maps.shape == (1, 7, 7, 768)
        torch.testing.assert_close(network.features(images_of(224, 1)), maps.amax(dim=(1, 2)))
        assert network.layer(images_of(224, 1), "stage4").shape == (1, 768, 7, 7)


@pytest.mark.parametrize(("p", "expected"), [(1.0, 2.5), (2.0, 7.5**0.5), (60.0, 4.0)])
def test_gem_lies_between_the_mean_and_the_maximum(p, expected):
    maps = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
    assert GeM(p)(maps).item() == pytest.approx(expected, rel=0.03 if p == 60 else 1e-5)
    layer = GeM(3.0).double()
    assert torch.autograd.gradcheck(layer, maps.double().requires_grad_())
    layer(maps.double()).sum().backward()
    assert layer.p.grad is not None
    assert layer.p.grad.item() > 0, "a larger p is nearer to the maximum"
    half = GeM()(300 * maps.half())
    assert torch.isfinite(half).all(), "the third power of 1200 is no half"


@pytest.mark.parametrize("backbone", ["convnet", "resnet18"])
def test_the_backbones_of_the_table_have_gem_too(backbone):
    network = make(backbone, pooling="gem").eval()
    size = facts_of(backbone).nearest_crop_px(32)
    with torch.no_grad():
        last = network.layer(images_of(size), "stage4").clamp(min=1e-6)
        torch.testing.assert_close(network.features(images_of(size)), last.pow(3).mean((2, 3)).pow(1 / 3))


def test_published_weights_have_no_exponent_of_gem_and_it_begins_at_3(tmp_path):
    weights = tmp_path / "convnet.safetensors"
    save_file(make("convnet", seed=1).trunk.state_dict(), weights)
    network = make("convnet", seed=2, pooling="gem", weights=str(weights))
    (layer,) = (module for module in network.trunk.modules() if isinstance(module, GeM))
    assert layer.p.item() == 3.0
    ours, published = network.trunk.state_dict(), make("convnet", seed=1).trunk.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in published.items())


def test_position_embeddings_of_weights_are_interpolated_to_the_images(tmp_path):
    donor = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    with torch.no_grad():
        donor.pos_embed.copy_(torch.linspace(0, 1, 197)[None, :, None].expand(1, 197, 192))
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    network = make(VIT, weights=str(tmp_path / "w.safetensors"), crop_px=64)
    found = network.trunk.model.pos_embed
    assert found.shape == (1, 17, 192)
    assert (found[0, 1:, 0].diff() > 0).all(), "a ramp stays one"
    for name, value in donor.state_dict().items():
        if name != "pos_embed" and not name.startswith("head."):
            assert torch.equal(network.trunk.model.state_dict()[name], value), name


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(tmp_path, damage):
    state = timm.create_model("resnet10t", num_classes=0).state_dict()
    number = sum(not name.endswith("num_batches_tracked") for name in state)
    if damage == "missing":
        del state["layer1.0.conv1.weight"]
    elif damage == "unexpected":
        state["layer9.weight"] = torch.zeros(1)
    else:
        state["layer1.0.conv1.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "w.safetensors")
    named = {"missing": "missing: layer1.0", "unexpected": "unknown to it: layer9", "shape": "of another shape: layer1"}
    with pytest.raises(WeightsError, match=rf"resnet10t: it has {number} tensors; {named[damage]}"):
        make("timm:resnet10t", weights=str(tmp_path / "w.safetensors"))


def test_a_network_of_raydml_is_loaded_whole(tmp_path):
    first = make(VIT, crop_px=32, seed=1)
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    again = make(VIT, crop_px=32, seed=2, weights=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in first.state_dict().items())


def learning(network):
    """Names of the parameters of the trunk that have a gradient after a step."""
    network.train()
    network(images_of(32)).square().sum().backward()
    return {name for name, value in network.trunk.model.named_parameters() if value.grad is not None}


def test_only_the_head_learns_and_nothing_else_moves():
    network = make(LITE, train="head", freeze_batch_norm=False)
    before = {name: value.clone() for name, value in network.trunk.state_dict().items()}
    assert learning(network) == set()
    assert network.trained_parameters() == []
    assert network.head.linear.weight.grad is not None
    after = network.trunk.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "also the statistics of BatchNorm"


def test_the_last_blocks_learn_with_what_follows_them():
    network = make(VIT, crop_px=32, train={"last_blocks": 2})
    blocks = {
        name for name, _ in network.trunk.model.named_parameters() if name.startswith(("blocks.10.", "blocks.11."))
    }
    assert learning(network) == blocks | {"norm.weight", "norm.bias"}
    assert len(network.trained_parameters()) == len(blocks) + 2
    training = {name for name, module in network.trunk.model.named_modules() if module.training}
    assert {"blocks.10", "blocks.11.attn", "norm"} <= training
    assert not {"patch_embed", "blocks.0", "blocks.9", "blocks.9.mlp"} & training
    with pytest.raises(ModelError, match="last_blocks: 13; this backbone has 12 blocks"):
        make(VIT, crop_px=32, train={"last_blocks": 13})


def test_the_last_stage_of_a_backbone_of_the_table_learns():
    network = make("resnet18", train={"last_blocks": 1}, freeze_batch_norm=False)
    network.train()
    frozen = network.trunk.layer3[0].bn1.running_mean.clone()
    network(images_of(32)).square().sum().backward()
    found = {name for name, value in network.trunk.named_parameters() if value.grad is not None}
    assert found == {name for name, _ in network.trunk.named_parameters() if name.startswith("layer4.")}
    assert torch.equal(network.trunk.layer3[0].bn1.running_mean, frozen)
    assert network.trunk.layer4[0].bn1.running_mean.abs().max() > 0


@pytest.mark.parametrize(
    ("backbone", "size", "number", "begins"),
    [
        ("bn_inception", 63, 1, "inception_4e"),
        ("googlenet", 32, 1, "inception5a"),
        ("convnext_tiny", 32, 1, "features.6"),
        ("timm:densenet121", 32, 1, "model.features.transition3"),
        ("timm:repvgg_a0", 32, 1, "model.stages.3"),
        ("timm:efficientnet_lite0", 32, 2, "model.blocks.5"),
        ("timm:deit3_small_patch16_224", 32, 3, "model.blocks.9"),
    ],
)
def test_the_last_blocks_are_whole_and_everything_after_them_learns(backbone, size, number, begins):
    """The first module that learns is the one after the last of the block before."""
    network = make(backbone, train={"last_blocks": number}, **({"crop_px": size} if "timm" in backbone else {}))
    network(images_of(size)).square().sum().backward()
    names = [name for name, _ in network.trunk.named_parameters()]
    grads = [value.grad is not None for _, value in network.trunk.named_parameters()]
    first = next(index for index, name in enumerate(names) if name.startswith(begins))
    assert grads == [index >= first for index in range(len(names))]
    assert sum(value.numel() for value in network.trained_parameters()) > 0.1 * sum(
        value.numel() for value in network.trunk.parameters()
    )


@pytest.mark.parametrize("backbone", ["resnet18", "vit_b_16", "bn_inception", "googlenet", "convnext_tiny", "convnet"])
def test_the_table_has_the_number_of_blocks(backbone):
    with torch.device("meta"):
        trunk = facts_of(backbone).build(nn.AdaptiveAvgPool2d(1))
    assert len(block_ends(trunk, facts_of(backbone).stages)) == facts_of(backbone).num_blocks


def test_all_blocks_are_all_of_a_backbone():
    network = make("resnet18", train={"last_blocks": 4})
    assert len(network.trained_parameters()) == len(list(network.trunk.parameters()))


def test_gradient_checkpointing_leaves_statistics_alone():
    """A second forward pass would move those of BatchNorm twice."""
    with pytest.raises(ModelError, match="would move the statistics of BatchNorm twice a step"):
        make("timm:resnet10t", gradient_checkpointing=True, freeze_batch_norm=False)
    network = make("timm:resnet10t", gradient_checkpointing=True, freeze_batch_norm=True)
    before = network.trunk.model.layer1[0].bn1.running_mean.clone()
    network(images_of(64)).square().sum().backward()
    assert torch.equal(network.trunk.model.layer1[0].bn1.running_mean, before)


def test_gradient_checkpointing_changes_no_gradient():
    """Exactly the same operations, twice."""
    gradients = []
    for is_on in (False, True):
        network = make(VIT, crop_px=32, gradient_checkpointing=is_on, drop_path=0.0)
        network(images_of(32)).square().sum(1).mul(torch.arange(2)).sum().backward()
        gradients.append([value.grad for value in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert network.trunk.model.grad_checkpointing
    with pytest.raises(ModelError, match="gradient_checkpointing: this backbone does not have it"):
        make("convnet", gradient_checkpointing=True)


def test_drop_path_leaves_out_blocks_in_training_only():
    network = make(VIT, crop_px=32, drop_path=0.5)
    rates = [
        block.drop_path1.drop_prob for block in network.trunk.model.blocks if hasattr(block.drop_path1, "drop_prob")
    ]
    assert rates == pytest.approx([0.5 * n / 11 for n in range(1, 12)])
    network.train()
    torch.manual_seed(0)
    assert not torch.equal(network(images_of(32)), network(images_of(32)))
    network.eval()
    assert torch.equal(network(images_of(32)), network(images_of(32)))


BASE = {
    "data": {"name": "cub200", "resize_px": 256, "crop_px": 224},
    "model": {"backbone": VIT},
    "loss": {"name": "contrastive"},
    "sampler": {"name": "class_balanced", "classes_per_batch": 8, "images_per_class": 4},
    "optimizer": {"name": "adamw", "learning_rate": 1e-4},
}


def trial(data=None, optimizer=None, schedule=None, **model):
    sections = {"data": {**BASE["data"], **(data or {})}, "model": {**BASE["model"], **model}}
    sections["optimizer"] = {**BASE["optimizer"], **(optimizer or {})}
    return {**BASE, **sections, **({"schedule": schedule} if schedule else {})}


def test_a_trial_has_the_pooling_and_the_size_of_its_network():
    model = parse_trial(trial(embedding_dim=None, projection="none")).model
    assert (model.pooling, model.embedding_dim) == ("cls", 192)
    assert parse_trial(trial(embedding_dim=None, projection="none", pooling="cls_mean")).model.embedding_dim == 384
    assert parse_trial(trial(backbone="resnet50", embedding_dim=None)).model.embedding_dim == 2048
    written = parse_trial(trial(train={"last_blocks": 3}, drop_path=0.1))
    assert parse_trial(written.model_dump(mode="json")) == written
    assert written.model_dump(mode="json")["model"]["train"] == {"last_blocks": 3}


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"backbone": "timm:vit_tiny_patch16"}, "model.backbone", "Names like it: vit_tiny_patch16"),
        ({"backbone": "timm:resnet18", "pooling": "cls"}, "model.pooling", "does not have it"),
        ({"data": {"crop_px": 230}}, "data.crop_px", "takes crops of multiples of 16 px"),
        ({"backbone": "timm:swin_tiny_patch4_window7_224", "data": {"crop_px": 128}}, "data.crop_px", "exactly 224"),
        ({"backbone": "resnet50", "drop_path": 0.1}, "model.drop_path", "does not have it; many networks of timm do"),
        ({"backbone": "timm:vgg11", "drop_path": 0.1}, "model.drop_path", "does not have it"),
        ({"backbone": "resnet50", "gradient_checkpointing": True}, "model.gradient_checkpointing", "does not have it"),
        ({"backbone": "timm:hrnet_w18_small", "gradient_checkpointing": True}, "model.gradient_checkpointing",
         "does not have it"),
        ({"backbone": "timm:resnet18", "gradient_checkpointing": True, "freeze_batch_norm": False},
         "model.gradient_checkpointing", "would move the statistics of BatchNorm twice"),
        ({"train": {"last_blocks": 13}}, "model.train.last_blocks", "has 12 blocks"),
        ({"backbone": "resnet50", "train": {"last_blocks": 5}}, "model.train.last_blocks", "has 4 blocks"),
        ({"backbone": "timm:levit_128s", "train": {"last_blocks": 1}}, "model.train.last_blocks", "has 0 blocks"),
        ({"train": "head", "projection": "none", "embedding_dim": None}, "model.train", "nothing of the network learn"),
        ({"train": "head", "weights": "none"}, "model.train", "leaves random weights as they are"),
        ({"train": "head", "optimizer": {"backbone_learning_rate": 1e-5}}, "optimizer.backbone_learning_rate",
         "has no effect"),
        ({"train": "head", "schedule": {"name": "constant", "new_layer_warmup_epochs": 1}},
         "schedule.new_layer_warmup_epochs", "no effect"),
        ({"train": {"last_blocks": 0}}, "model.train", "must be >= 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_key(changes, key, message):
    with pytest.raises(ConfigError) as refusal:
        parse_trial(trial(**changes))
    found = [problem for problem in refusal.value.problems if problem.path.startswith(key)]
    assert found, refusal.value
    assert message in str(refusal.value)


def test_settings_that_came_later_change_no_fingerprint_at_their_defaults():
    """The number is that of the commit before them."""
    raw = trial(backbone="resnet50", weights="none")
    written = trial(backbone="resnet50", weights="none", train="all", drop_path=0.0, gradient_checkpointing=False)
    assert {fingerprint(parse_trial(one)) for one in (raw, written)} == {"5ed1a66c2c64"}
    assert (
        fingerprint(parse_trial(trial(backbone="resnet50", weights="none", train={"last_blocks": 1}))) != "5ed1a66c2c64"
    )


#: One network of each of 21 families, the smallest or nearly, and the side of the smallest images that are tried.
FAMILIES = {
    "resnet10t": 64, "resnetv2_18": 64, "regnety_002": 64, "densenet121": 64, "hrnet_w18_small": 64, "ghostnet_050": 64,
    "repvgg_a0": 64, "mobilenetv3_small_050": 64, "efficientnet_lite0": 64, "convnext_atto": 64, "poolformer_s12": 64,
    "edgenext_xx_small": 64, "fastvit_t8": 64, "tiny_vit_5m_224": 224, "mobilevit_xxs": 64, "vit_tiny_patch16_224": 32,
    "deit3_small_patch16_224": 32, "eva02_tiny_patch14_224": 28, "swin_tiny_patch4_window7_224": 224,
    "levit_128s": 224, "mixer_s32_224": 224,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_built_trained_for_a_step_and_built_again(family):
    name, size = f"timm:{family}", FAMILIES[family]
    facts = facts_of(name)
    settings = {"pooling": facts.own_pooling, "crop_px": size, "freeze_batch_norm": False}
    network = make(name, **settings)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = images_of(size, 4)
    (network(images) @ torch.arange(16.0)).square().sum().backward()
    optimizer.step()
    after = network.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert len(changed) > 0.5 * len(before)
    assert facts.feature_dim == network.eval().features(images).shape[1]
    again = make(name, **settings, seed=5).eval()
    again.load_state_dict(after)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))
    with torch.no_grad():
        shapes = [network.layer(images, stage).shape for stage in network.stages]
    assert all(len(shape) == 4 for shape in shapes)
    assert [shape[2] for shape in shapes] == sorted((shape[2] for shape in shapes), reverse=True)


@pytest.mark.skipif(not LITE0.exists(), reason=f"needs {LITE0.name} in ../shared/data/weights")
def test_published_weights_of_timm_give_timms_own_features():
    network = build_network(
        backbone=LITE,
        embedding_dim=8,
        layer_norm=False,
        normalize="l2",
        freeze_batch_norm=True,
        weights=str(LITE0),
        seed=0,
    ).eval()
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0, pretrained=True,
                              pretrained_cfg_overlay={"file": str(LITE0)}).eval()  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(network.features(images_of(224, 1)), model(images_of(224, 1)), rtol=0, atol=0)
    assert isinstance(network.trunk.model.conv_stem, nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "meant"), [("resnet10t", "timm:resnet10t"), ("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224")]
)
def test_a_network_of_timm_without_its_prefix_is_understood(name, meant):
    with pytest.raises(ConfigError, match=f"did you mean: {meant}\n"):
        parse_trial(trial(backbone=name))


def test_a_pooling_of_null_is_the_networks_own():
    assert parse_trial(trial(pooling=None)).model.pooling == "cls"
    assert parse_trial(trial(backbone="resnet50", pooling=None)).model.pooling == "average"
