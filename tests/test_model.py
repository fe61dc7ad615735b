import hashlib
import io
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from raydml import model, pretrained
from raydml.model import BACKBONES, ModelError, Network, build_network, preprocessing_for
from raydml.pretrained import WeightsError

CONVNET = {
    "backbone": "convnet",
    "embedding_dim": 16,
    "layer_norm": False,
    "normalize": "l2",
    "freeze_batch_norm": False,
    "weights": "none",
    "seed": 0,
}


def make(**changes) -> Network:
    return build_network(**{**CONVNET, **changes})


LARGE = pytest.param("vit_b_16", marks=pytest.mark.slow)  # 86 million parameters


@pytest.mark.parametrize("backbone", [*sorted(BACKBONES.keys() - {"vit_b_16"}), LARGE])
def test_every_backbone_embeds_and_passes_gradients_to_every_parameter(backbone):
    network = make(backbone=backbone)
    facts = BACKBONES[backbone]
    size = facts.fixed_crop_px or max(facts.minimum_crop_px, 32)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert network.trunk(images).shape == (2, facts.feature_dim)
    embeddings = network(images)
    assert embeddings.shape == (2, 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    embeddings[:, 0].sum().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("size", [8, 11, 16, 28, 64])
def test_convnet_takes_small_and_odd_sizes(size):
    maps = []
    network = make()
    network.trunk.blocks[-1].register_forward_hook(lambda _module, _inputs, output: maps.append(output.shape))
    assert network(torch.randn(2, 3, size, size)).shape == (2, 16)
    assert min(maps[0][-2:]) >= 4  # never squeezed to a point


def test_facts_agree_with_torchvision():
    table = {
        "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
        "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
        "googlenet": torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1,
        "convnext_tiny": torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,
        "vit_b_16": torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1,
    }
    assert set(table) | {"convnet"} == set(BACKBONES)
    for name, weights in table.items():
        assert pretrained.DOWNLOAD_URL + str(BACKBONES[name].weights_file) == weights.url
        if name != "googlenet":
            assert BACKBONES[name].mean == tuple(weights.transforms().mean)
            assert BACKBONES[name].std == tuple(weights.transforms().std)


def test_googlenet_preprocessing_equals_torchvisions_input_transform():
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    ours = preprocessing_for("googlenet", resize_px=32, crop_px=32).normalise(pixels)
    theirs = torchvision.models.googlenet(aux_logits=False, transform_input=True, init_weights=False)
    imagenet = torchvision.transforms.Normalize(model.IMAGENET_MEAN, model.IMAGENET_STD)
    torch.testing.assert_close(ours, theirs._transform_input(imagenet(pixels.permute(0, 3, 1, 2) / 255)))


def test_same_seed_same_network_and_the_global_state_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.head.linear.weight, other.head.linear.weight)


def test_head_standardises_before_the_linear_layer_and_normalises_last():
    torch.manual_seed(0)
    features = torch.randn(3, 8) * 5 + 2
    head = model.Head(8, 4, layer_norm=True, normalize="l2")
    centred = features - features.mean(dim=1, keepdim=True)
    standard = centred / (centred.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
    expected = standard @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(features), expected / expected.norm(dim=1, keepdim=True))
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]


def test_head_maps_a_zero_vector_to_zero_and_can_leave_the_norm_alone():
    head = model.Head(4, 2, layer_norm=False, normalize="l2")
    torch.nn.init.zeros_(head.linear.bias)
    assert torch.equal(head(torch.zeros(1, 4)), torch.zeros(1, 2))
    bare = model.Head(4, 2, layer_norm=False, normalize="none")
    features = torch.randn(3, 4)
    torch.testing.assert_close(bare(features), bare.linear(features))


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("normalize", "training", "prefix"),
    [
        ("mean_distance", True, "train"),
        ("mean_distance", False, "eval"),
        ("none", True, "eval"),
        ("l2", True, "l2"),
        ("l2", False, "l2"),
    ],
)
def test_head_is_that_of_the_mdr_release(normalize, training, prefix):
    with np.load(GOLDEN / "mdr_embedding.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    head = model.Head(20, 12, layer_norm=False, normalize=normalize).double().train(training)
    head.linear.load_state_dict({"weight": golden["W"], "bias": golden["b"]})
    features = golden["feat"].requires_grad_()
    embeddings = head(features)
    (embeddings * golden["upstream"]).sum().backward()
    found = {"out": embeddings, "grad_feat": features.grad, "grad_W": head.linear.weight.grad}
    found["grad_b"] = head.linear.bias.grad
    for key, value in found.items():
        torch.testing.assert_close(value, golden[f"{prefix}__{key}"], rtol=1e-8, atol=1e-10)


def test_after_the_mean_distance_head_the_mean_distance_is_one():
    head = model.Head(6, 4, layer_norm=False, normalize="mean_distance").train()
    embeddings = head(torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) * 50)
    assert torch.pdist(embeddings).mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("features", [torch.ones(1, 6), torch.ones(5, 6), torch.zeros(3, 6)])
def test_the_mean_distance_head_leaves_a_batch_without_distances_alone(features):
    head = model.Head(6, 4, layer_norm=False, normalize="mean_distance").train()
    torch.testing.assert_close(head(features), head.linear(features))
    head(features).sum().backward()
    assert head.linear.weight.grad.isfinite().all()


def test_embeddings_are_float32_under_autocast():
    network = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = network(torch.randn(4, 3, 8, 8))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


def test_frozen_batch_norm_keeps_its_statistics_but_learns_scale_and_shift():
    network = make(freeze_batch_norm=True).train()
    norm = network.trunk.blocks[0][1]
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scale = norm.weight.detach().clone()
    network(torch.randn(4, 3, 8, 8))[:, 0].sum().backward()
    optimizer.step()
    assert torch.equal(norm.running_mean, statistics[0])
    assert torch.equal(norm.running_var, statistics[1])
    assert not torch.equal(norm.weight, scale)
    assert network.training
    assert not norm.training


def test_batch_norm_that_is_not_frozen_moves():
    network = make(freeze_batch_norm=False).train()
    before = network.trunk.blocks[0][1].running_mean.clone()
    network(torch.randn(4, 3, 8, 8))
    assert not torch.equal(network.trunk.blocks[0][1].running_mean, before)


def test_dropout_made_for_imagenet_classifiers_is_off():
    drops = [m.p for m in make(backbone="googlenet").modules() if isinstance(m, torch.nn.Dropout)]
    assert all(p == 0 for p in drops)


# --- weights ---------------------------------------------------------------------------------------------


def test_default_weights_of_a_backbone_without_any_are_refused_with_the_cure():
    with pytest.raises(WeightsError, match="weights: none"):
        make(weights="default")


def test_unknown_backbone_lists_the_choices():
    with pytest.raises(ModelError, match=r"'resnet19'.*resnet18"):
        make(backbone="resnet19")


def test_without_a_network_the_message_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    timeouts = []

    def refuse(url, timeout):
        timeouts.append((url, timeout))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(WeightsError) as caught:
        make(backbone="resnet18", weights="default")
    assert timeouts == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", 10.0)]
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in str(caught.value)
    assert "weights: none" in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_download_cut_off_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda _url, **_options: io.BytesIO(b"half a file"))
    with pytest.raises(WeightsError, match="sha256 differs"):
        make(backbone="resnet18", weights="default")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def published(tmp_path, monkeypatch, state) -> str:
    """A stand-in for a published file: named by its own digest, where torch keeps such files."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(state, folder / "draft")
    digest = hashlib.sha256((folder / "draft").read_bytes()).hexdigest()
    name = f"resnet18-{digest[:8]}.pth"
    (folder / "draft").rename(folder / name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    facts = BACKBONES["resnet18"]
    monkeypatch.setitem(BACKBONES, "resnet18", model.BackboneFacts(**{**vars(facts), "weights_file": name}))
    return name


def test_published_weights_are_taken_from_where_torch_keeps_them(tmp_path, monkeypatch):
    theirs = torchvision.models.resnet18()
    published(tmp_path, monkeypatch, theirs.state_dict())
    ours = make(backbone="resnet18", weights="default").eval()
    images = torch.randn(2, 3, 64, 64)
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(ours.trunk(images), theirs.eval()(images))


def test_a_damaged_published_file_is_named(tmp_path, monkeypatch):
    name = published(tmp_path, monkeypatch, torchvision.models.resnet18().state_dict())
    path = tmp_path / "checkpoints" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged") as caught:
        make(backbone="resnet18", weights="default")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", ["network", "trunk"])
def test_weights_of_a_network_or_its_trunk_load_from_a_path(tmp_path, ending, part):
    source = make(seed=3)
    state = source.state_dict() if part == "network" else source.trunk.state_dict()
    path = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    loaded = make(weights=str(path))
    assert torch.equal(loaded.trunk.blocks[2][0].weight, source.trunk.blocks[2][0].weight)
    assert torch.equal(loaded.head.linear.weight, source.head.linear.weight) == (part == "network")


def test_weights_that_do_not_fit_name_what_is_missing_unexpected_and_misshapen(tmp_path):
    state = make().state_dict()
    del state["trunk.blocks.0.0.weight"]
    state["trunk.extra"] = torch.zeros(1)
    state["head.linear.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(WeightsError) as caught:
        make(weights=str(tmp_path / "weights.pth"))
    message = str(caught.value)
    assert "missing: trunk.blocks.0.0.weight" in message
    assert "unexpected: trunk.extra" in message
    assert "head.linear.bias is (5,), the network wants (16,)" in message


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"trunk": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="cannot read"):
        make(weights=str(tmp_path / "weights.pth"))


def test_missing_file_and_strange_ending_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        make(weights=str(tmp_path / "nothing.pth"))
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"\.onnx"):
        make(weights=str(tmp_path / "weights.onnx"))


@pytest.mark.parametrize(
    ("backbone", "resize_px", "crop_px", "message"),
    [
        ("vit_b_16", 256, 192, "crop_px: 224"),
        ("convnet", 6, 6, "at least 8"),
    ],
)
def test_sizes_a_backbone_cannot_take_are_refused_with_the_cure(backbone, resize_px, crop_px, message):
    with pytest.raises(ModelError, match=message):
        preprocessing_for(backbone, resize_px=resize_px, crop_px=crop_px)
