"""Gradient caching: the gradients of a batch in chunks are those of the batch at once, in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from raydml import registry
from raydml.config.trial import fingerprint, parse_machine, parse_trial
from raydml.errors import ConfigError
from raydml.methods._base import Batch
from raydml.models.backbones import ModelError
from raydml.models.network import Head, Network
from raydml.models.random_weights import write_random_weights
from raydml.training import gradient_cache, parts
from raydml.training.gradient_cache import train_in_chunks
from raydml.training.rank_group import RankGroup
from raydml.training.trainer import Trainer
from tests.training.test_distributed import AT_WORK, METHODS, fitting_miner
from tests.training.test_trainer import assert_resume_is_exact, assert_same, forbid_waiting, without_times

TOLERANCE = 1e-9  # of a gradient, absolute where it is below 1; 1e-6 was asked for
NUM_IMAGES, CHUNK = 18, 4  # the last chunk has two images
LABELS = np.repeat(np.arange(3), 6)
VIT = {"backbone": "timm:test_vit", "weights": "none", "embedding_dim": 16}


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    """A backbone whose BatchNorm has statistics, to be frozen."""
    file = tmp_path_factory.mktemp("weights") / "convnet.pth"
    write_random_weights("convnet", file)
    return {"backbone": "convnet", "weights": str(file), "embedding_dim": 16, "dropout": 0.2}


def trial_of(model, *, crop_px=8, **changes):
    return {
        "data": {"name": "digits", "resize_px": crop_px, "crop_px": crop_px},
        "model": model,
        "loss": {"name": "contrastive"},
        "sampler": {"name": "class_balanced", "classes_per_batch": 3, "images_per_class": 6, "batches_per_epoch": 2},
        **changes,
    }


def gradients(trial, chunk_size, *, epoch=0, learner=0, num_steps=3, scale=1.0):
    """The loss and the gradients of all parameters in some steps, and the buffers after them."""
    size_px = trial["data"]["crop_px"]
    method = parts.build_method(
        parse_trial({**trial, "chunk_size": chunk_size}), np.tile(LABELS, 20), torch.device("cpu")
    )
    method.double().train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_steps, NUM_IMAGES, 3, size_px, size_px, generator=generator, dtype=torch.float64)
    found: dict[str, Any] = {}
    for step in range(num_steps):
        method.zero_grad(set_to_none=True)
        with torch.random.fork_rng():
            torch.manual_seed(step)
            loss = method.batch_loss(Batch(images[step], torch.from_numpy(LABELS), epoch, learner), generator)
            (scale * loss).backward()
        found[f"loss {step}"] = loss.detach()
        found |= {f"{name} {step}": p.grad / scale for name, p in method.named_parameters() if p.grad is not None}
    return {**found, **{name: buffer.clone() for name, buffer in method.named_buffers()}}


def assert_equal_gradients(trial, **given):
    whole, chunked = gradients(trial, None, **given), gradients(trial, CHUNK, **given)
    assert whole.keys() == chunked.keys()
    trunk = [
        value.abs().max() for name, value in whole.items() if name.startswith("network.trunk.") and name[-1] == "0"
    ]
    assert sum(trunk) > 0, "nothing to compare"
    for name, value in whole.items():
        torch.testing.assert_close(
            chunked[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("loss", registry.names("losses"))
def test_gradients_are_those_of_the_batch_for_every_loss(loss, convnet):
    miner = fitting_miner(loss, registry.names("losses").index(loss))
    assert_equal_gradients(trial_of(convnet, loss={"name": loss}, miner=miner))


@pytest.mark.parametrize("name", registry.names("regularizers"))
def test_gradients_are_those_of_the_batch_for_every_regulariser(name, convnet):
    miner = {"name": "distance_weighted"} if name == "rho" else {"name": "multi_similarity"}
    model = {**convnet, "normalize": {"embedding_norm": "none", "mdr": "mean_distance"}.get(name, "l2")}
    settings = {"loss": {"name": "margin"}, "miner": miner, "regularizers": {name: AT_WORK[name]}}
    assert_equal_gradients(trial_of(model, **settings))


@pytest.mark.parametrize("name", registry.names("methods"))
@pytest.mark.parametrize(("epoch", "learner"), [(0, 0), (0, 1), (9, 1)])
def test_gradients_are_those_of_the_batch_for_every_method(name, epoch, learner, convnet):
    own = {key: value for key, value in METHODS[name].items() if key in ("loss", "miner", "method")}
    if name == "mic":
        own["method"] = {**own["method"], "direction": "both", "images_per_cluster": 3}
    if name == "divide_conquer":
        own["method"] = {**own["method"], "full_embedding_from": 0.5}
        own["sampler"] = {"name": "class_balanced", "classes_per_batch": 3, "images_per_class": 6}
    settings = {"epochs": 10, "loss": {"name": "proxy_anchor"}, **own}
    assert_equal_gradients(trial_of(convnet, **settings), epoch=epoch, learner=learner)


@pytest.mark.parametrize(
    "model",
    [VIT, {**VIT, "gradient_checkpointing": True}, {**VIT, "pooling": "gem"}, {**VIT, "train": {"last_blocks": 2}}],
    ids=["vit", "checkpointed", "gem", "last_blocks"],
)
def test_gradients_of_a_transformer_are_those_of_the_batch(model):
    assert_equal_gradients(trial_of(model, crop_px=32), num_steps=1)


def test_with_a_scaled_loss_the_gradients_are_scaled_alike(convnet):
    assert_equal_gradients(trial_of(convnet), scale=2.0**16)


def test_a_batch_that_is_one_chunk_is_the_batch():
    trial = trial_of({**VIT, "drop_path": 0.5}, crop_px=32)
    assert_same(gradients(trial, None, num_steps=1), gradients(trial, NUM_IMAGES, num_steps=1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_drops_at_random_drops_the_same_in_both_passes(checkpointing, monkeypatch):
    """The reference keeps the graph of every chunk: the gradients of one forward pass with these random numbers."""
    model = {**VIT, "drop_path": 0.4, "gradient_checkpointing": checkpointing, "dropout": 0.3}
    trial = trial_of(model, crop_px=32)
    chunked = gradients(trial, CHUNK, num_steps=2)
    monkeypatch.setattr(gradient_cache, "checkpoint", lambda run, *inputs, **_settings: run(*inputs))
    kept = gradients(trial, CHUNK, num_steps=2)
    monkeypatch.undo()
    for name, value in kept.items():
        torch.testing.assert_close(chunked[name], value, rtol=TOLERANCE, atol=TOLERANCE)
    without = gradients(trial_of({**model, "drop_path": 0.0}, crop_px=32), CHUNK, num_steps=1)
    assert (without["loss 0"] - kept["loss 0"]).abs() > 1e-3, "nothing was dropped"


class RandomMask(torch.nn.Module):
    """Dropout that remembers its masks, or takes given ones."""

    def __init__(self):
        super().__init__()
        self.masks, self.given = [], None

    def forward(self, values):
        mask = (torch.rand_like(values) < 0.5) if self.given is None else self.given
        self.masks.append(mask)
        return values * mask


def network_of(*layers):
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), *layers
    )
    head = Head(5, 4, layer_norm=False, normalize="l2", dropout=0.5)
    return Network(trunk, head, freeze_batch_norm=False).double().train()


def loss_of(network, images):
    return (network(images) @ torch.linspace(-1, 1, 4, dtype=images.dtype)).square().mean()


def test_each_chunk_has_its_own_random_numbers_and_the_head_those_it_has_without_chunks():
    """Against one pass of the batch at once with the masks of all chunks, and whatever happens in between."""
    images = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer = RandomMask()
    network = network_of(layer)
    whole = copy.deepcopy(network)
    train_in_chunks(network, 4, RankGroup())
    torch.manual_seed(3)
    loss = loss_of(network, images)
    torch.manual_seed(99)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), torch.random.manual_seed(99).get_state())
    first, again = layer.masks[:3], layer.masks[3:]
    assert [len(mask) for mask in first] == [4, 4, 2]
    assert_same(sorted(mask.tolist() for mask in again), sorted(mask.tolist() for mask in first))
    assert not torch.equal(first[0], first[1])
    whole.trunk[-1].given = torch.cat(first)
    torch.manual_seed(3)
    expected = loss_of(whole, images)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for found, want in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad, want.grad, rtol=0, atol=1e-12)


def test_the_backbone_sees_a_chunk_at_a_time_and_holds_the_activations_of_one():
    sizes, held, most = [], [], []

    class Watch(torch.nn.Module):
        def forward(self, values):
            sizes.append(len(values))
            held.append((len(values), StorageWeakRef(values.untyped_storage())))
            most.append(sum(number for number, storage in held if not storage.expired()))
            return values.square()  # keeps its input for backward

    images = torch.randn(10, 3, 6, 6, dtype=torch.float64)
    network = network_of(Watch())
    loss_of(network, images).backward()
    assert (sizes, most) == ([10], [10])
    network = network_of(Watch())
    train_in_chunks(network, 4, RankGroup())
    for record in (sizes, held, most):
        record.clear()
    loss = loss_of(network, images)
    assert sizes == [4, 4, 2]
    loss.backward()
    assert sorted(sizes) == [2, 2, 4, 4, 4, 4], "each chunk twice"
    assert max(most) == 4
    sizes.clear()
    network.eval()
    network(images)
    assert sizes == [10], "evaluation has batches of its own"


def test_a_frozen_backbone_sees_each_image_once(convnet):
    trial = parse_trial(trial_of({**convnet, "train": "head", "freeze_batch_norm": False}, chunk_size=CHUNK))
    method = parts.build_method(trial, np.tile(LABELS, 20), torch.device("cpu")).train()
    sizes = []
    method.network.trunk.blocks[0].register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    images = torch.randn(NUM_IMAGES, 3, 8, 8)
    method.batch_loss(Batch(images, torch.from_numpy(LABELS), 0, 0), torch.Generator()).backward()
    assert sizes == [4, 4, 4, 4, 2]
    assert all(parameter.grad is not None for parameter in method.network.head.parameters())


DROPPED = {**VIT, "drop_path": 0.3, "dropout": 0.2}


def trainer_of(device="cpu", **changes):
    split = {"order": "sorted", "test_fraction": 0.5, "val_fraction": 0.4}
    data = {"name": "digits", "resize_px": 32, "crop_px": 32, "split": split}
    settings = {"data": data, "epochs": 4, "chunk_size": CHUNK, "precision": "bf16", **changes}
    return Trainer(parse_trial(trial_of(DROPPED, crop_px=32, **settings)), parse_machine({}), device=device)


def test_resume_is_exact_with_chunks(tmp_path):
    settings = {"schedule": {"name": "cosine", "new_layer_warmup_epochs": 1}}
    settings["optimizer"] = {"name": "adamw", "gradient_clip": 0.5}
    assert_resume_is_exact(lambda: trainer_of(**settings), tmp_path / "c")


def test_an_epoch_with_chunks_continues_from_its_middle(tmp_path):
    unbroken = trainer_of(epochs=1)
    steps = unbroken.steps()
    next(steps)
    unbroken.save(tmp_path / "c")
    (expected,) = (result for result in steps if result is not None)
    resumed = trainer_of(epochs=1)
    resumed.restore(tmp_path / "c")
    assert without_times(resumed.epochs()) == without_times([expected])
    assert_same(resumed.state_dict(), unbroken.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_chunks_and_an_average_wait_for_nothing_and_drop_the_same_in_both_passes(precision, monkeypatch):
    def losses():
        trainer = trainer_of(device="cuda:0", epochs=2, precision=precision, optimizer={"name": "adamw", "ema": 0.9})
        epochs = trainer.epochs()
        first = next(epochs)
        forbid_waiting(trainer)
        return first["train_loss"], next(epochs)["train_loss"]

    chunked = losses()
    monkeypatch.setattr(gradient_cache, "checkpoint", lambda run, *inputs, **_settings: run(*inputs))
    assert chunked == pytest.approx(losses(), rel=1e-3)


def test_batch_norm_that_learns_is_refused_with_the_cure(convnet):
    for model in ({**convnet, "freeze_batch_norm": False}, {"backbone": "convnet", "weights": "none"}):
        with pytest.raises(ConfigError) as refusal:
            parse_trial(trial_of(model, chunk_size=64))
        (problem,) = refusal.value.problems
        assert (problem.path, problem.value) == ("chunk_size", 64)
        assert "freeze_batch_norm: true" in problem.cure
        parse_trial(trial_of(model))
    parse_trial(trial_of({"backbone": "convnext_tiny", "weights": "none"}, crop_px=32, chunk_size=64))
    with pytest.raises(ConfigError, match="chunk_size = 0"):
        parse_trial(trial_of(convnet, chunk_size=0))


@pytest.mark.parametrize(
    "layer", [torch.nn.BatchNorm1d(5), torch.nn.BatchNorm1d(5, track_running_stats=False)], ids=["running", "never"]
)
def test_layers_with_statistics_of_a_batch_are_refused_whatever_the_facts_say(layer):
    network = network_of(layer)
    with pytest.raises(ModelError, match=r"chunk_size: 4; .*\(4\)"):
        train_in_chunks(network, 4, RankGroup())
    if layer.track_running_stats:
        layer.eval()
        train_in_chunks(network, 4, RankGroup())


def test_the_key_changes_no_fingerprint_where_it_is_off(convnet):
    plain = trial_of({"backbone": "convnet", "weights": "none"})
    assert "chunk_size" not in parse_trial({**plain, "chunk_size": None}).model_dump(mode="json")
    assert fingerprint(parse_trial({**plain, "chunk_size": None})) == fingerprint(parse_trial(plain))
    chunked = parse_trial(trial_of(convnet, chunk_size=4))
    assert parse_trial(chunked.model_dump(mode="json")) == chunked
    assert fingerprint(chunked) != fingerprint(parse_trial(trial_of(convnet)))
