import hashlib

import pytest
import requests
import torch
import torchvision
from safetensors.torch import save_file

from raydml.models import pretrained
from raydml.models.backbones import BACKBONES, BackboneFacts, ModelError
from raydml.models.network import preprocessing_for
from raydml.models.pretrained import WeightsError
from tests.data.file_server import Answer, file_server
from tests.models.networks import make


def test_batch_norm_that_is_not_frozen_moves():
    network = make(freeze_batch_norm=False).train()
    before = network.trunk.blocks[0][1].running_mean.clone()
    network(torch.randn(4, 3, 8, 8))
    assert not torch.equal(network.trunk.blocks[0][1].running_mean, before)


def test_dropout_made_for_imagenet_classifiers_is_off():
    drops = [m.p for m in make(backbone="googlenet").modules() if isinstance(m, torch.nn.Dropout)]
    assert all(p == 0 for p in drops)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [("convnet", "weights: none"), ("bn_inception", r"bn_inception-52deb4733\.pth.*weights: PATH")],
)
def test_default_weights_of_a_backbone_without_any_are_refused_with_the_cure(backbone, message):
    with pytest.raises(WeightsError, match=message):
        make(backbone, weights="default")
    with pytest.raises(ModelError, match=r"'resnet19'.*resnet18"):
        make("resnet19")


def test_without_a_network_the_message_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    timeouts = []

    def refuse(url, timeout, **_):
        timeouts.append((url, timeout))
        raise requests.ConnectionError("HTTPSConnectionPool(host='download.pytorch.org', port=443): Max retries")

    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(WeightsError) as caught:
        make(backbone="resnet18", weights="default")
    assert timeouts == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", 10.0)]
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in str(caught.value)
    assert "weights: none" in str(caught.value)
    assert "(no connection)" in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [(Answer(b"half a file"), "sha256 differs"), (Answer(status=404), "the server answered 404 Not Found")],
)
def test_a_download_that_fails_leaves_nothing_behind(answer, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with file_server(monkeypatch) as server:
        server.answers = [answer]
        monkeypatch.setattr(pretrained, "DOWNLOAD_URL", f"{server.url}/")
        with pytest.raises(WeightsError, match=message):
            make(backbone="resnet18", weights="default")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_download_is_taken_if_its_digest_is_in_its_name(tmp_path, monkeypatch):
    file = tmp_path / "checkpoints" / published(tmp_path, monkeypatch, torchvision.models.resnet18().state_dict())
    body = file.read_bytes()
    file.unlink()
    with file_server(monkeypatch) as server:
        server.answers = [Answer(body)]
        monkeypatch.setattr(pretrained, "DOWNLOAD_URL", f"{server.url}/")
        make(backbone="resnet18", weights="default")
    assert file.read_bytes() == body


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
    monkeypatch.setitem(BACKBONES, "resnet18", BackboneFacts(**{**vars(facts), "weights_file": name}))
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
    (torch.save if ending == ".pth" else save_file)(state, path)
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
    shapes = "head.linear.bias is (5,), the network has (16,)"
    for part in ("missing: trunk.blocks.0.0.weight", "unexpected: trunk.extra", shapes):
        assert part in str(caught.value)


def test_missing_files_strange_endings_and_pickles_that_would_run_code_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"trunk": Trap()}, tmp_path / "weights.pth")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    for name, message in {"weights.pth": "could run code", "x.pth": "no such file", "weights.onnx": r"\.onnx"}.items():
        with pytest.raises(WeightsError, match=message):
            make(weights=str(tmp_path / name))


@pytest.mark.parametrize(
    ("backbone", "resize_px", "crop_px", "message"),
    [
        ("vit_b_16", 256, 192, "exactly 224 px: set crop_px: 224 "),
        ("convnet", 6, 6, "at least 8 px: set crop_px: 8 "),
        ("bn_inception", 256, 200, "such as 63 to 70 or 223 to 230.*: set crop_px: 198 "),
    ],
)
def test_sizes_a_backbone_cannot_take_are_refused_with_the_cure(backbone, resize_px, crop_px, message):
    with pytest.raises(ModelError, match=message):
        preprocessing_for(backbone, resize_px=resize_px, crop_px=crop_px)
