"""A learning rate that falls with the depth, against timm's own and against lists by hand."""

import re

import numpy as np
import pytest
import torch
from timm.optim import param_groups_layer_decay

from raydml.config.trial import fingerprint, parse_trial
from raydml.errors import ConfigError
from raydml.models.random_weights import write_random_weights
from raydml.training import parts
from tests.training.test_trainer import BALANCED, MARGIN, assert_resume_is_exact, trainer_of, trial_of

LABELS = np.repeat(np.arange(3), 8)


def method_and_optimizer(backbone, crop_px, *, decay=0.5, pooling=None, train="all", weights="none", rate=None):
    data = {**trial_of().data.model_dump(mode="json"), "resize_px": crop_px, "crop_px": crop_px}
    model = {"backbone": backbone, "weights": weights, "embedding_dim": 8, "train": train}
    if pooling:
        model["pooling"] = pooling
    optimizer = {"name": "adamw", "learning_rate": 1e-3, "layer_decay": decay, "backbone_learning_rate": rate}
    trial = trial_of(MARGIN, data=data, model=model, optimizer=optimizer)
    method = parts.build_method(trial, LABELS, torch.device("cpu"))
    return method, parts.build_trial_optimizer(trial, method)


def rates_of(method, optimizer):
    """Name -> learning rate; every parameter is in one group."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    found = [(names[id(p)], group["base_lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(dict(found))
    assert all(group["lr"] == group["base_lr"] for group in optimizer.param_groups)
    return dict(found)


@pytest.mark.parametrize(("backbone", "crop_px"), [("test_vit", 32), ("test_convnext", 32), ("test_efficientnet", 32)])
def test_the_rates_of_a_network_of_timm_are_those_of_timm(backbone, crop_px):
    method, optimizer = method_and_optimizer(f"timm:{backbone}", crop_px, decay=0.7, rate=1e-4)
    found = rates_of(method, optimizer)
    model = method.network.trunk.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in param_groups_layer_decay(model, layer_decay=0.7):
        for parameter in group["params"]:
            rate = found.pop(f"network.trunk.model.{names[id(parameter)]}")
            assert rate == pytest.approx(1e-4 * group["lr_scale"], rel=1e-12)
    assert found == {"network.head.linear.weight": 1e-3, "network.head.linear.bias": 1e-3, "objective.loss.beta": 1e-3}


BY_HAND = {  # the pattern of a name -> how many layers it is below the last; the first that fits counts
    "timm:test_vit": (32, "gem", {r"blocks\.(\d)\.": None, r"model\.norm|gem": 0, "": 6}),
    "resnet18": (32, "gem", {"layer4|avgpool": 0, "layer3": 1, "layer2": 2, "layer1": 3, r"\.(conv1|bn1)": 4}),
    "convnet": (8, "gem", {r"blocks\.3|pooling": 0, r"blocks\.2": 1, r"blocks\.1": 2, r"blocks\.0": 3}),
    "googlenet": (32, None, {"inception5": 0, "inception4": 1, "inception3": 2, r"\.conv3": 3, r"\.conv[12]": 4}),
    "convnext_tiny": (
        32,
        None,
        {r"features\.[67]|classifier": 0, r"features\.[45]": 1, r"features\.[23]": 2, r"features\.1": 3, "": 4},
    ),
}


@pytest.mark.parametrize("backbone", [*BY_HAND])
def test_the_rates_are_those_of_a_list_by_hand(backbone):
    crop_px, pooling, patterns = BY_HAND[backbone]
    method, optimizer = method_and_optimizer(backbone, crop_px, decay=0.5, pooling=pooling)
    seen = set()
    for name, rate in rates_of(method, optimizer).items():
        if not name.startswith("network.trunk."):
            assert rate == 1e-3
            continue
        pattern, below = next((p, n) for p, n in patterns.items() if re.search(p, name))
        if below is None:
            below = 5 - int(re.search(pattern, name)[1])
        seen.add(pattern)
        assert rate == pytest.approx(1e-3 * 0.5**below), name
    assert seen == set(patterns)


def test_the_blocks_of_torchvisions_transformer_are_its_layers():
    """Built without memory, because it has 86 million parameters."""
    from torchvision.models import vit_b_16

    from raydml.models.trunk_parts import layers_of

    with torch.device("meta"):
        layers = layers_of(vit_b_16(), ())
    assert {layers[name] for name in ("class_token", "conv_proj.weight", "encoder.pos_embedding")} == {0}
    assert [layers[f"encoder.layers.encoder_layer_{i}.mlp.0.weight"] for i in range(12)] == list(range(1, 13))
    assert layers["encoder.ln.weight"] == 12


def test_the_last_blocks_keep_the_rates_of_the_whole_network(tmp_path):
    write_random_weights("timm:test_vit", tmp_path / "vit.pth")
    method, optimizer = method_and_optimizer(
        "timm:test_vit", 32, train={"last_blocks": 2}, weights=str(tmp_path / "vit.pth")
    )
    rates = rates_of(method, optimizer)
    assert rates["network.trunk.model.blocks.5.mlp.fc2.bias"] == 1e-3
    assert rates["network.trunk.model.blocks.4.mlp.fc2.bias"] == 5e-4
    assert not [name for name in rates if "blocks.3" in name]


def test_a_step_moves_each_layer_by_its_own_rate():
    optimizer = {"name": "sgd", "learning_rate": 0.1, "layer_decay": 0.5}
    schedule = {"name": "constant", "warmup_epochs": 1}
    trainer = trainer_of(epochs=2, optimizer=optimizer, schedule=schedule, sampler={**BALANCED, "batches_per_epoch": 2})
    before = {name: value.detach().clone() for name, value in trainer.method.network.named_parameters()}
    next(trainer.steps())  # the first of two of the warm-up
    for name, value in trainer.method.network.named_parameters():
        block = re.match(r"trunk\.blocks\.(\d)", name)
        rate = 0.1 * 0.5 * (0.5 ** (3 - int(block[1])) if block else 1)
        torch.testing.assert_close(value.detach(), before[name] - rate * value.grad, rtol=1e-6, atol=1e-7)


def test_without_decay_the_groups_are_those_of_older_checkpoints():
    for decay, names in ((1.0, ["backbone", "head", "loss"]), (0.9, ["backbone"] * 4 + ["head", "loss"])):
        _, optimizer = method_and_optimizer("convnet", 8, decay=decay)
        assert [group["name"] for group in optimizer.param_groups] == names
    method, optimizer = method_and_optimizer("convnet", 8, decay=1.0)
    assert optimizer.param_groups[0]["params"] == list(method.network.trunk.parameters())


def test_resume_is_exact_with_a_decay_and_a_warm_up_of_the_head(tmp_path):
    optimizer = {"name": "adamw", "learning_rate": 1e-3, "layer_decay": 0.6}
    schedule = {"name": "cosine", "warmup_epochs": 1, "new_layer_warmup_epochs": 1}
    assert_resume_is_exact(lambda: trainer_of(MARGIN, optimizer=optimizer, schedule=schedule), tmp_path / "c")


def test_what_has_no_effect_is_refused_and_the_default_changes_no_fingerprint(tmp_path):
    adamw = {"name": "adamw", "learning_rate": 1e-3}
    assert fingerprint(trial_of(optimizer=adamw)) == fingerprint(trial_of(optimizer={**adamw, "layer_decay": 1.0}))
    decayed = trial_of(optimizer={**adamw, "layer_decay": 0.75})
    assert parse_trial(decayed.model_dump(mode="json")) == decayed
    assert fingerprint(decayed) != fingerprint(trial_of(optimizer=adamw))
    file = tmp_path / "convnet.pth"
    file.touch()
    frozen = {"backbone": "convnet", "weights": str(file), "train": "head"}
    data = {**trial_of().data.model_dump(mode="json"), "resize_px": 32, "crop_px": 32}
    unordered = {"backbone": "timm:poolformer_s12", "weights": "none"}
    for changes, message in (
        ({"model": unordered, "data": data}, "no order of layers in timm"),
        ({"model": frozen}, "nothing of the backbone learns"),
        ({"optimizer": {**adamw, "layer_decay": 0}}, "must be > 0"),
        ({"optimizer": {**adamw, "layer_decay": 1.1}}, "must be <= 1"),
    ):
        with pytest.raises(ConfigError, match=rf"optimizer\.layer_decay[^:]*: (.|\n)*{message}"):
            trial_of(**{"optimizer": {**adamw, "layer_decay": 0.75}, **changes})
