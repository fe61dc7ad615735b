"""Backbones without a head: features against the libraries' own models, and names that do not exist."""

import huggingface_hub
import numpy as np
import pytest
import requests
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from raydml.inference.bare import open_bare
from raydml.models.backbones import ModelError
from raydml.models.pretrained import WeightsError


def test_features_are_the_librarys_own_and_of_length_one():
    bare = open_bare("backbone:resnet18:none", resize_px=40, crop_px=32)
    theirs = torchvision.models.resnet18()
    missing, unexpected = theirs.load_state_dict(bare.network.trunk.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    theirs.fc = torch.nn.Identity()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = theirs.eval()(images)
        found = bare.network(images)
    torch.testing.assert_close(found, features / features.norm(dim=1, keepdim=True))
    assert not bare.network.training
    assert bare.name == "backbone:resnet18:none"
    assert (bare.preprocessing.resize_px, bare.preprocessing.crop_px) == (40, 32)


def test_random_weights_are_the_same_each_time_and_leave_the_callers_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = [open_bare("backbone:convnet:none").network.state_dict() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_model_of_timm_sees_images_as_timm_prepares_them():
    bare = open_bare("timm:resnet10t.c3_in1k:none")
    config = resolve_model_data_config(timm.create_model("resnet10t.c3_in1k", num_classes=0))
    theirs = create_transform(**config, is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((30, 26)).resize((300, 260))  # smooth: filters differ in rounding
    ours = bare.preprocessing.for_evaluation(torch.tensor(bare.preprocessing.read(image))[None])[0]
    assert ours.shape == theirs(image).shape
    torch.testing.assert_close(ours, theirs(image), atol=0.05, rtol=0)
    with torch.inference_mode():
        found = bare.network(ours[None])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(1))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("backbone:resnet9", "no backbone 'resnet9'.*Choices: convnet, resnet18"),
        ("timm:resnet10t_nothing", "has no network 'resnet10t_nothing'.*Names like it: resnet10t"),
        ("timm:resnet10t:other", "no such file: other.*default or none"),
        ("elsewhere:resnet18", "backbone:NAME or timm:NAME"),
        ("backbone:", "backbone:NAME or timm:NAME"),
        ("backbone:convnet", "convnet has no published weights. Cure: one that has .backbone:resnet18, "),
        ("backbone:bn_inception", "get bn_inception-52deb4733.pth .* and write backbone:bn_inception:PATH"),
        ("backbone:resnet18:nowhere.pth", "no such file: nowhere.pth"),
    ],
)
def test_what_does_not_exist_is_explained(target, message):
    of_weights = ("backbone:convnet", "backbone:bn", "backbone:resnet18", "timm:resnet10t:other")
    error = WeightsError if target.startswith(of_weights) else ModelError
    with pytest.raises(error, match=message):
        open_bare(target)


def test_timm_without_a_network_is_refused_after_one_try_with_the_place_for_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    tried = []

    def refuse(url, **_):
        tried.append(url)
        raise requests.ConnectionError("HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded")

    monkeypatch.setattr(requests, "head", refuse)
    with pytest.raises(WeightsError) as caught:
        open_bare("timm:resnet10t.c3_in1k")
    assert tried == ["https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"]
    place = tmp_path / "checkpoints" / "timm--resnet10t.c3_in1k.safetensors"
    assert str(caught.value) == (
        f"weights: default: cannot fetch {tried[0]} (no connection). Without a network: fetch that file elsewhere and "
        f"put it at {place}, or timm:resnet10t.c3_in1k:none for random weights"
    )
    torch.manual_seed(1)
    theirs = timm.create_model("resnet10t.c3_in1k")
    place.parent.mkdir()
    save_file(theirs.state_dict(), place)
    ours = open_bare("timm:resnet10t.c3_in1k").network
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = theirs.eval().forward_head(theirs.forward_features(images), pre_logits=True)
        torch.testing.assert_close(ours(images), torch.nn.functional.normalize(features, dim=1))
    assert len(tried) == 1
