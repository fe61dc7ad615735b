"""Low-rank adapters: where they go, what they compute, and how they become part of the weights again."""

import re

import pytest
import torch

from raydml.models import adapters
from raydml.models.adapters import is_of_adapter
from raydml.models.backbones import ModelError
from raydml.models.lookup import facts_of
from raydml.models.network import Network, build_network

VIT = "timm:test_vit"
LORA = {"rank": 4, "alpha": 6.0, "targets": "attention"}


def make(backbone=VIT, *, train=None, seed=0, **settings) -> Network:
    head = {"embedding_dim": 8, "layer_norm": False, "normalize": "l2", "freeze_batch_norm": False}
    crop = {"crop_px": 32} if backbone == VIT else {}
    train = {"train": train} if train else {}
    return build_network(backbone=backbone, weights="none", seed=seed, **{**head, **crop, **train, **settings})


def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def moved(network):
    """The network with adapters that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def test_at_the_start_the_network_is_the_plain_one_and_only_adapters_and_head_learn():
    plain, network = make().eval(), make(train={"lora": LORA}).eval()
    assert torch.equal(network(images()), plain(images()))
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    of_trunk = {name for name in learning if name.startswith("trunk.")}
    assert learning - of_trunk == {"head.linear.weight", "head.linear.bias"}
    layers = {re.sub(r"\.lora_[AB]\.default\.weight", "", name) for name in of_trunk}
    assert layers == {f"trunk.model.blocks.{i}.attn.{layer}" for i in range(6) for layer in ("qkv", "proj")}
    assert {id(parameter) for parameter in network.trained_parameters()} == {
        id(parameter) for name, parameter in network.named_parameters() if name in of_trunk
    }
    with_mlp = make(train={"lora": {**LORA, "targets": "attention_mlp"}})
    more = {name for name, parameter in with_mlp.named_parameters() if parameter.requires_grad} - learning
    assert {name.split(".")[4] for name in more} == {"mlp"}
    assert len(more) == 6 * 2 * 2


def test_every_adapter_gets_a_gradient_and_the_seed_alone_decides_it():
    first, second, other = (make(train={"lora": LORA}, seed=seed) for seed in (0, 0, 1))
    states = [
        {name: value for name, value in one.state_dict().items() if "lora_A" in name} for one in (first, second, other)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(torch.equal(value, states[2][name]) for name, value in states[0].items())
    network = moved(first).train()
    network(images()).square()[:, 0].sum().backward()
    for name, parameter in network.named_parameters():
        if is_of_adapter(name) or name.startswith("head."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_a_layer_with_an_adapter_computes_the_formula_of_the_paper():
    network = moved(make(train={"lora": LORA}))
    layer = network.trunk.model.blocks[2].attn.qkv
    values = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert low.shape == (4, layer.in_features)
    expected = values @ weight.T + bias + 6.0 / 4 * (values @ low.T @ high.T)
    torch.testing.assert_close(layer(values), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", ["attention", "attention_mlp"])
def test_the_merged_weights_are_those_of_a_plain_network_with_the_same_embeddings(targets):
    network = moved(make(train={"lora": {**LORA, "targets": targets}}))
    plain = make(seed=5).eval()
    state = network.plain_state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    expected = network(images())
    torch.testing.assert_close(plain(images()), expected, rtol=0, atol=1e-6)
    assert (make().eval()(images()) - expected).abs().max() > 1e-2, "the adapters do nothing"
    layer = network.trunk.model.blocks[1].attn.proj
    delta = 6.0 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = state["trunk.model.blocks.1.attn.proj.weight"]
    torch.testing.assert_close(merged, layer.base_layer.weight + delta, rtol=1e-6, atol=1e-6)
    assert not merged.requires_grad
    assert torch.equal(make().plain_state_dict()["head.linear.weight"], make().head.linear.weight)


def test_only_timms_transformers_whose_layers_an_adapter_reaches_have_adapters():
    vit = facts_of(VIT).adaptable
    assert len(vit["attention"]) == 12
    assert len(vit["attention_mlp"]) == 24
    siglip = facts_of("timm:vit_base_patch16_siglip_224").adaptable["attention_mlp"]
    assert len(siglip) == 12 * 4
    assert not [name for name in siglip if "attn_pool" in name]
    # BEiT and Swin 2 multiply by the weights of qkv themselves, so an adapter there would do nothing.
    for backbone, reason in (
        ("timm:beit_base_patch16_224", "reads the weights of blocks.0.attn.qkv itself"),
        ("timm:swinv2_tiny_window8_256", "reads the weights of layers.0.blocks.0.attn.qkv itself"),
        ("timm:convnext_tiny", "has no attention"),
        ("resnet50", "is not one of timm's transformers"),
    ):
        facts = facts_of(backbone)
        assert not facts.adaptable
        assert reason in facts.why_not_adaptable
    with pytest.raises(ModelError, match=r"train: lora: backbone convnet is not one of timm's"):
        make("convnet", train={"lora": LORA})


def test_statistics_of_batch_norm_stay_with_adapters():
    """MobileViT has both."""
    network = make("timm:mobilevit_xxs", train={"lora": LORA})
    norms = [module for module in network.trunk.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(module.training for module in norms)
    assert network.trunk.training


def test_without_peft_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"needs the package peft.*Cure: pip install 'raydml\[lora\]'"):
        make(train={"lora": LORA})
    assert isinstance(make(), Network), "only adapters need it"
