"""Networks of the Hugging Face hub: a cache as the hub's own library writes it, with what timm's own exporter wrote."""

import json

import huggingface_hub
import pytest
import requests
import timm
import torch
from timm.models import save_for_hf

from raydml.config.recipe import recipe_of
from raydml.config.trial import parse_trial
from raydml.errors import ConfigError
from raydml.inference.bare import open_bare, parse_target
from raydml.models import timm_source, timm_trunk
from raydml.models.backbones import ModelError
from raydml.models.lookup import facts_of
from raydml.models.network import fetch_weights
from raydml.models.pretrained import WeightsError
from tests.models.networks import make
from tests.models.test_timm_trunk import images_of, trial

NAME = "timm:hf-hub:wild-life/turtles"
SMALL = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, on a machine without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    for cached in (timm_source.source_of, timm_source._description_of, timm_trunk.facts_of_timm, timm_trunk._look_at):
        cached.cache_clear()
    return tmp_path


def publish(hub, revision="main", seed=0, safetensors=True):
    """A ViT with other settings than timm's, and eight classes; return the folder of its files."""
    digest = f"{seed:040x}"
    folder = hub / "models--wild-life--turtles"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(digest)
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=8, **SMALL)
    own = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 64, 64)}
    model.pretrained_cfg = own
    save_for_hf(model, folder / "snapshots" / digest, model_args=SMALL, safe_serialization=safetensors)
    return folder / "snapshots" / digest


def test_a_network_of_the_hub_has_the_features_that_timm_gives_it(hub):
    folder = publish(hub)
    facts = facts_of(NAME)
    assert (facts.mean, facts.feature_dim, facts.num_blocks) == ((0.1, 0.2, 0.3), 48, 4)
    file = fetch_weights(NAME, "default")
    assert file == folder / "model.safetensors"
    network = make(backbone=NAME, weights=str(file), crop_px=64, pooling="cls").eval()
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(network.features(images_of(64)), theirs(images_of(64)), rtol=0, atol=0)


def test_a_revision_is_a_network_of_its_own(hub):
    folders = {name: publish(hub, name, seed) for seed, name in enumerate(("main", "v1"), 1)}
    assert folders["main"] != folders["v1"]
    assert fetch_weights(NAME, "default") == folders["main"] / "model.safetensors"
    assert fetch_weights(f"{NAME}@v1", "default") == folders["v1"] / "model.safetensors"


def test_weights_of_the_older_form_are_found(hub):
    folder = publish(hub, safetensors=False)
    assert fetch_weights(NAME, "default") == folder / "pytorch_model.bin"


def test_what_is_not_here_and_cannot_be_fetched_is_said_with_the_cure(hub, monkeypatch):
    tried = []

    def refuse(url, **_):
        tried.append(url)
        raise requests.ConnectionError("Max retries exceeded")

    monkeypatch.setattr(requests, "head", refuse)
    with pytest.raises(ConfigError, match=r"config\.json is not in this machine's cache .* hf download "):
        parse_trial(trial(backbone=NAME))
    assert tried == ["https://huggingface.co/wild-life/turtles/resolve/main/config.json"], "once, not for half a minute"
    (publish(hub) / "model.safetensors").unlink()
    timm_source._description_of.cache_clear()
    with pytest.raises(WeightsError, match=r"wild-life--turtles\.safetensors"):
        fetch_weights(NAME, "default")


@pytest.mark.parametrize("name", ["turtles/and/frogs", "wild life/turtles", "@v1", ""])
def test_what_is_no_name_of_a_repository_is_refused(hub, name):  # noqa: ARG001
    with pytest.raises(ModelError, match="Names are timm:hf-hub:OWNER/NAME"):
        facts_of(f"timm:hf-hub:{name}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model_type": "bert"}, "does not describe a network of timm"),
        ([], "does not describe a network of timm"),
        ({"architecture": "vit_giga_turtle"}, "has no network 'vit_giga_turtle'"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"no_such": 1}}, "cannot be a backbone"),
    ],
)
def test_a_description_of_something_else_is_refused(hub, content, reason):
    (publish(hub) / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=reason):
        facts_of(NAME)


def test_an_older_description_has_the_facts_at_the_top(hub):
    file = publish(hub) / "config.json"
    content = json.loads(file.read_text())
    flat = {**content["pretrained_cfg"], "architecture": "vit_tiny_patch16_224", "labels": ["a", "b"]}
    file.write_text(json.dumps(flat))
    assert facts_of(NAME).std == (0.4, 0.5, 0.6)


def test_the_prefix_of_timm_is_proposed():
    with pytest.raises(ConfigError, match="did you mean: timm:hf-hub:wild-life/turtles"):
        parse_trial(trial(backbone="hf-hub:wild-life/turtles"))


def test_a_bare_network_of_the_hub(hub):
    publish(hub)
    assert parse_target(NAME)[1:] == ("hf-hub:wild-life/turtles", "default")
    assert parse_target(f"{NAME}:none")[1:] == ("hf-hub:wild-life/turtles", "none")
    bare = open_bare(f"{NAME}:none")
    assert (bare.preprocessing.crop_px, bare.preprocessing.std) == (64, (0.4, 0.5, 0.6))


def test_a_recipe_names_the_network_without_its_owner():
    config = trial(backbone="timm:hf-hub:BVRA/MegaDescriptor-T-224")
    assert recipe_of({**config, "loss": {"name": "margin"}}).endswith("MegaDescriptor-T-224")
