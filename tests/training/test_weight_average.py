"""The average of the weights: a plain loop over the weights of every step, and what is done with it."""

import copy

import numpy as np
import pytest
import torch

from raydml.config.trial import fingerprint, parse_trial
from raydml.errors import ConfigError
from raydml.evaluation import embed
from raydml.inference.export import EmbeddingModel, export_model, load_checkpoint
from raydml.models.network import Head, Network
from raydml.models.random_weights import write_random_weights
from raydml.study.probe import shape_of
from raydml.training import checkpoint
from raydml.training.trainer import Trainer
from raydml.training.weight_average import WeightAverage
from tests.evaluation.scored import score
from tests.training.test_trainer import (
    AUGMENTED,
    BALANCED,
    MEMORY,
    assert_resume_is_exact,
    assert_same,
    trainer_of,
    trial_of,
    without_times,
)

DECAY = 0.8
ADAMW = {"name": "adamw", "learning_rate": 1e-2, "gradient_clip": 1.0}
AVERAGED = {"optimizer": {**ADAMW, "ema": DECAY}, "augmentation": AUGMENTED}


def weights_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in trainer.method.network.state_dict().items()}


def test_the_first_steps_follow_the_weights_more_quickly():
    network = Network(torch.nn.Flatten(), Head(3, 2, layer_norm=False, normalize="none"), freeze_batch_norm=False)
    average = WeightAverage(network, 0.9)
    assert [average.decay_of(step) for step in (1, 2, 8, 80, 81)] == [2 / 11, 3 / 12, 9 / 18, 81 / 90, 0.9]
    linear = network.head.linear
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([0.0, 1.0]))
    average = WeightAverage(network, 0.9)
    for bias in ([11.0, 1.0], [23.0, 5.0]):  # 2/11 * 0 + 9/11 * 11 = 9, then 3/12 * 9 + 9/12 * 23 = 19.5
        with torch.no_grad():
            linear.bias.copy_(torch.tensor(bias))
        average.update()
    with average.in_place():
        torch.testing.assert_close(linear.bias.detach(), torch.tensor([19.5, 4.0]))
    assert linear.bias.tolist() == [23.0, 5.0]


def test_the_average_is_that_of_a_plain_loop_and_is_what_is_validated_and_kept(tmp_path):
    trainer = trainer_of(MEMORY, **AVERAGED, epochs=2)
    expected = weights_of(trainer)
    step, results, validated = 0, [], []
    for result in trainer.steps():
        if result is not None:
            results.append(result)
            validated.append(copy.deepcopy(expected))
            continue
        step += 1
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in weights_of(trainer).items():
            is_whole = value.dtype == np.int64
            expected[name] = value if is_whole else decay * expected[name] + (1 - decay) * value
    assert step == 2 * BALANCED["batches_per_epoch"]
    assert expected["trunk.blocks.0.1.num_batches_tracked"] == step
    best = max((0, 1), key=lambda epoch: results[epoch]["val_map_at_r"])
    assert trainer.best_weights.keys() == expected.keys()
    for name, value in trainer.best_weights.items():
        np.testing.assert_allclose(value, validated[best][name], rtol=1e-5, atol=1e-6, err_msg=name)
    # The numbers of an epoch are those of a network with these weights, and not of the one that trains.
    network, images = trainer.method.network, trainer.val_images
    trained = copy.deepcopy(network.state_dict())
    found = {}
    for name, weights in (("average", validated[-1]), ("trained", trained)):
        network.load_state_dict({key: torch.as_tensor(value) for key, value in weights.items()})
        embeddings = embed.embed(network, images.pixels, trainer.preprocessing, device="cpu", batch_size=256)
        found[name] = score(embeddings, images.labels)["map_at_r"]
    assert found["average"] == pytest.approx(results[-1]["val_map_at_r"], abs=1e-4)
    assert abs(found["trained"] - results[-1]["val_map_at_r"]) > 1e-3
    # What is exported is the average, too.
    trainer.save(tmp_path / "c")
    assert_same(dict(load_checkpoint(tmp_path / "c").network.state_dict()), dict(trainer.best_weights))
    exported = EmbeddingModel.load(export_model(tmp_path / "c", tmp_path / "model"))
    assert_same(dict(exported.network.state_dict()), dict(trainer.best_weights))


def test_training_goes_on_with_the_weights_themselves():
    plain, averaged = trainer_of(MEMORY, **{**AVERAGED, "optimizer": ADAMW}), trainer_of(MEMORY, **AVERAGED)
    losses = [[result["train_loss"] for result in trainer.epochs()] for trainer in (plain, averaged)]
    assert losses[0] == losses[1]
    states = plain.state_dict(), averaged.state_dict()
    for part in ("method", "optimizer", "randomness"):
        assert_same(states[1][part], states[0][part])
    assert "average" not in states[0]


def test_resume_is_exact_with_an_average(tmp_path):
    assert_resume_is_exact(lambda: trainer_of(MEMORY, **AVERAGED), tmp_path / "c")


def test_an_epoch_with_an_average_continues_from_its_middle(tmp_path):
    unbroken = trainer_of(MEMORY, **AVERAGED, epochs=2)
    steps = unbroken.steps()
    first = next(result for result in steps if result is not None)
    assert [next(steps), next(steps)] == [None, None]
    unbroken.save(tmp_path / "c")
    torch.load(tmp_path / "c" / "state.pt", weights_only=True)
    after = [result for result in steps if result is not None]
    resumed = trainer_of(MEMORY, **AVERAGED, epochs=2)
    assert resumed.restore(tmp_path / "c") == first
    assert without_times(resumed.epochs()) == without_times(after)
    assert_same(resumed.state_dict(), unbroken.state_dict())


def test_without_validation_the_average_of_the_last_epoch_is_kept(tmp_path):
    trial = trial_of(**AVERAGED, epochs=2).model_dump(mode="json")
    trial["data"]["split"]["val_fraction"] = 0
    trainer = Trainer(parse_trial(trial), trainer_of().machine, device="cpu")
    list(trainer.epochs())
    trainer.save(tmp_path / "c")
    kept = checkpoint.load_weights(tmp_path / "c")
    assert_same(kept, dict(trainer.average.state_dict()["weights"]))
    assert not torch.equal(kept["head.linear.weight"], trainer.method.network.head.linear.weight)


def test_weights_that_do_not_learn_are_not_copied(tmp_path):
    write_random_weights("convnet", tmp_path / "convnet.pth")
    model = {"backbone": "convnet", "weights": str(tmp_path / "convnet.pth"), "embedding_dim": 16}
    names = {}
    for train in ("head", {"last_blocks": 1}):
        trainer = trainer_of(**AVERAGED, model={**model, "train": train}, epochs=1)
        list(trainer.epochs())
        names[str(train)] = set(trainer.average.state_dict()["weights"])
        first = trainer.method.network.trunk.blocks[0][0].weight
        assert torch.equal(trainer.best_weights["trunk.blocks.0.0.weight"], first)
    assert {name for name in names["head"] if "running" not in name and "num_" not in name} == {
        "head.linear.weight",
        "head.linear.bias",
    }
    assert names["{'last_blocks': 1}"] - names["head"] == {
        f"trunk.blocks.3.{at}" for at in ("0.weight", "1.weight", "1.bias")
    }


def test_a_network_that_diverges_under_an_average_ends_its_trial():
    absurd = {"name": "sgd", "learning_rate": 1e38, "ema": 0.999}
    trainer = trainer_of(optimizer=absurd, sampler={**BALANCED, "batches_per_epoch": 1})
    (result,) = trainer.epochs()
    assert result["ended"] == "non_finite_loss"
    assert trainer.best_epoch == 0


def test_the_key_is_checked_and_changes_no_fingerprint_where_it_is_off():
    plain, off = trial_of(optimizer=ADAMW), trial_of(optimizer={**ADAMW, "ema": None})
    assert fingerprint(plain) == fingerprint(off)
    assert "ema" not in off.model_dump(mode="json")["optimizer"]
    on = trial_of(optimizer={**ADAMW, "ema": 0.999})
    assert parse_trial(on.model_dump(mode="json")) == on
    assert fingerprint(on) != fingerprint(plain)
    assert shape_of(on) != shape_of(plain), "it takes more memory"
    for value in (0, 1, 1.5):
        with pytest.raises(ConfigError, match=r"optimizer\.ema"):
            trial_of(optimizer={**ADAMW, "ema": value})
