import math
import mmap
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from raydml import registry
from raydml.config.trial import fingerprint, parse_machine, parse_trial
from raydml.data.catalog import DataError
from raydml.data.seal import TestReads
from raydml.evaluation import embed
from raydml.evaluation.scoring import Scores
from raydml.inference.export import load_checkpoint
from raydml.methods._base import Objective
from raydml.models.backbones import BACKBONES, BackboneFacts
from raydml.models.network import Head, Network
from raydml.samplers._base import make_plan
from raydml.training import checkpoint, parts
from raydml.training import trainer as trainer_module
from raydml.training.trainer import Trainer
from tests.evaluation.scored import score
from tests.golden_vectors import golden_arrays, golden_facts

MARGIN = {"loss": {"name": "margin", "beta": 1.0}, "miner": {"name": "distance_weighted"}}
MULTI_SIMILARITY = {"loss": {"name": "multi_similarity"}, "miner": {"name": "multi_similarity"}}
CONTRASTIVE = {"loss": {"name": "contrastive"}}
SOFTMAX = {"loss": {"name": "normalized_softmax"}}
MDR_AND_RHO = {
    "loss": {"name": "triplet", "squared": False},
    "miner": {"name": "distance_weighted", "variant": "mdr"},
    "regularizers": {"mdr": {"weight": 0.6}, "rho": {"probability": 0.3}},
    "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 16, "normalize": "mean_distance"},
}
MEMORY = {  # wraps round in the second epoch
    "loss": {"name": "multi_similarity"},
    "miner": {"name": "multi_similarity"},
    "regularizers": {"cross_batch_memory": {"size": 150, "start_step": 2}},
}
MATRYOSHKA = {"loss": {"name": "normalized_softmax"}, "regularizers": {"matryoshka": {"dims": [2, 8]}}}
FAMILIES = {
    "margin": MARGIN,
    "multi_similarity": MULTI_SIMILARITY,
    "contrastive": CONTRASTIVE,
    "normalized_softmax": SOFTMAX,
    "mdr_and_rho": MDR_AND_RHO,
    "memory": MEMORY,
    "matryoshka": MATRYOSHKA,
}
BALANCED = {"name": "class_balanced", "classes_per_batch": 3, "images_per_class": 8, "batches_per_epoch": 4}
UNIFORM = {"name": "uniform", "batch_size": 128}
AUGMENTED = {
    "random_resized_crop": [0.5, 1.0],
    "flip": True,
    "color_jitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1},
    "grayscale": 0.2,
    "erasing": {"probability": 0.3},
}
TIMES = ("epoch_s", "images_per_s", "clustering_s", "seconds", "peak_memory_bytes")  # differ from run to run


def trial_of(family=CONTRASTIVE, *, augmentation=None, **changes):
    """A trial on digits: 0-2 train, 3-4 validate."""
    return parse_trial(
        {
            "epochs": 4,
            "data": {
                "name": "digits",
                "resize_px": 8,
                "crop_px": 8,
                "split": {"order": "sorted", "test_fraction": 0.5, "val_fraction": 0.4},
                "augmentation": augmentation or {},
            },
            "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 16},
            "sampler": BALANCED,
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            **family,
            **changes,
        }
    )


def trainer_of(family=CONTRASTIVE, **changes) -> Trainer:
    return Trainer(trial_of(family, **changes), parse_machine({}), device="cpu")


def without_times(results):
    return [{key: value for key, value in result.items() if key not in TIMES} for result in results]


def assert_same(first, second, path=""):
    """Two states, to the last bit."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, path
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            if key not in TIMES:
                assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, items in enumerate(zip(first, second, strict=True)):
            assert_same(*items, f"{path}/{index}")
    else:
        assert first == second, path


def assert_resume_is_exact(make, folder):
    unbroken = make()
    epochs = unbroken.epochs()
    before = [next(epochs), next(epochs)]
    unbroken.save(folder)
    after = list(epochs)
    resumed = make()
    assert resumed.restore(folder) == before[-1]
    assert without_times(resumed.epochs()) == without_times(after)
    assert [result["ended"] for result in before + after] == ["", "", "", "finished"]
    assert_same(resumed.state_dict(), unbroken.state_dict())


BOTH_SAMPLERS = pytest.mark.parametrize(
    "sampler",
    [pytest.param(BALANCED, id="class_balanced"), pytest.param(UNIFORM, id="uniform", marks=pytest.mark.slow)],
)


@BOTH_SAMPLERS
@pytest.mark.parametrize("family", FAMILIES)
def test_four_epochs_are_two_and_a_resume_and_two(tmp_path, family, sampler):
    assert_resume_is_exact(
        lambda: trainer_of(
            FAMILIES[family],
            sampler=sampler,
            augmentation=AUGMENTED,
            schedule={"name": "cosine", "warmup_epochs": 3, "new_layer_warmup_epochs": 1},
        ),
        tmp_path / "checkpoint_000001",
    )
    torch.load(tmp_path / "checkpoint_000001" / "state.pt", weights_only=True)
    assert checkpoint.is_intact(tmp_path / "checkpoint_000001")


@BOTH_SAMPLERS
def test_an_epoch_continues_from_its_middle(tmp_path, sampler):
    """Saved after the first batch of epoch 2: the batches left, their crops and the epochs after are the same."""

    def make():
        return trainer_of(MDR_AND_RHO, sampler=sampler, augmentation=AUGMENTED)

    unbroken = make()
    steps = unbroken.steps()
    first = next(result for result in steps if result is not None)
    assert next(steps) is None
    unbroken.save(tmp_path / "checkpoint_000001")
    after = [result for result in steps if result is not None]
    resumed = make()
    assert resumed.restore(tmp_path / "checkpoint_000001") == first
    left = sum(result is None for result in resumed.steps())
    assert left == 3 * len(resumed.method.plan_epoch(0, np.random.default_rng(0)).batches) - 1
    assert resumed.epoch == 4
    again = make()
    again.restore(tmp_path / "checkpoint_000001")
    assert without_times(again.epochs()) == without_times(after)
    assert_same(again.state_dict(), unbroken.state_dict())
    torch.load(tmp_path / "checkpoint_000001" / "state.pt", weights_only=True)


def test_training_that_is_broken_off_leaves_no_thread():
    trainer = trainer_of(augmentation=AUGMENTED)
    before = threading.active_count()
    steps = trainer.steps()
    next(steps)
    steps.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["sgd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adam", "rmsprop"))])
def test_resume_is_exact_for_every_optimiser(tmp_path, name):
    momentum = {} if name == "adam" else {"momentum": 0.9}
    optimizer = {"name": name, "learning_rate": 1e-3, "weight_decay": 1e-4, **momentum}
    step = {"name": "step", "milestones": [3]}
    assert_resume_is_exact(lambda: trainer_of(MARGIN, optimizer=optimizer, schedule=step), tmp_path / "c")


def test_resume_is_exact_with_layers_that_draw_random_numbers(tmp_path, monkeypatch):
    facts = BACKBONES["convnet"]

    def build(pooling):
        return torch.nn.Sequential(facts.build(pooling), torch.nn.Dropout(0.5))

    monkeypatch.setitem(BACKBONES, "convnet", BackboneFacts(**{**vars(facts), "build": build}))

    def make():
        torch.manual_seed(np.random.default_rng().integers(2**31))  # whatever the process did before
        return trainer_of()

    assert_resume_is_exact(make, tmp_path / "c")


@pytest.mark.parametrize("train", ["all", {"last_blocks": 2}])
def test_resume_is_exact_for_a_network_of_timm(tmp_path, train):
    model = {"backbone": "timm:test_vit", "weights": "none", "embedding_dim": 8, "train": train}
    model |= {"drop_path": 0.3, "gradient_checkpointing": True, "pooling": "gem"}
    data = {**trial_of().data.model_dump(mode="json"), "resize_px": 32, "crop_px": 32}
    assert_resume_is_exact(lambda: trainer_of(model=model, data=data), tmp_path / "c")


def test_resume_is_exact_with_a_neck_and_its_scale_learns(tmp_path):
    model = {"backbone": "convnet", "weights": "none", "embedding_dim": 8, "bn_neck": True}
    assert_resume_is_exact(lambda: trainer_of(model=model), tmp_path / "c")
    trainer = trainer_of(model=model, epochs=1)
    list(trainer.epochs())
    neck = trainer.method.network.head.neck
    assert (neck.weight != 1).all()
    assert not neck.bias.any()


def test_saving_changes_nothing_and_a_state_in_memory_is_a_copy(tmp_path):
    saving, plain = trainer_of(MARGIN), trainer_of(MARGIN)
    states = []
    for _ in saving.epochs():
        saving.save(tmp_path / "c")
        states.append(saving.state_dict())
    assert without_times([saving.last_result]) == without_times([*plain.epochs()][-1:])
    assert_same(saving.state_dict(), plain.state_dict())
    resumed = trainer_of(MARGIN)
    resumed.load_state_dict(states[1])
    assert len(list(resumed.epochs())) == 2
    again = trainer_of(MARGIN)
    again.load_state_dict(states[1])  # training on did not write into it
    list(again.epochs())
    assert_same(again.state_dict(), plain.state_dict())


def by_class(**changes) -> Trainer:
    return Trainer(trial_of(**changes), parse_machine({}), device="cpu", by_class=True)


@pytest.mark.parametrize("select_on", ["val_map_at_r", "val_recall_at_2"])
def test_the_values_of_the_classes_are_those_of_the_best_epoch_also_after_a_resume(tmp_path, select_on):
    assert_resume_is_exact(lambda: by_class(select_on=select_on), tmp_path / "exact")
    trainer = by_class(select_on=select_on)
    epochs = trainer.epochs()
    results = [next(epochs), next(epochs)]
    best = max(result[select_on] for result in results)
    sizes = np.bincount(trainer.val_images.labels)
    # Every image is a query: the metric is the mean over the classes, weighted with their images.
    assert sizes @ np.array(trainer.best_class_values) / sizes.sum() == pytest.approx(best, abs=1e-12)
    trainer.save(tmp_path / "c")
    kept = list(trainer.best_class_values)
    resumed = by_class(select_on=select_on)
    resumed.restore(tmp_path / "c")
    assert resumed.best_class_values == kept
    resumed.best_metrics[select_on] = 2.0  # no later epoch is better
    assert [result["epoch"] for result in resumed.epochs()] == [3, 4]
    assert resumed.best_class_values == kept


def test_the_values_of_the_classes_are_kept_only_on_request(tmp_path):
    trainer = trainer_of(epochs=1)
    list(trainer.epochs())
    assert trainer.best_class_values == []
    assert "best_class_values" not in trainer.state_dict()
    folder = trainer.save(tmp_path / "c")
    resumed = by_class(epochs=1)
    resumed.restore(folder)  # as of a study that was made before there were any
    assert resumed.best_class_values == []


def test_an_ended_trial_stays_ended(tmp_path):
    trainer = trainer_of(epochs=1)
    (result,) = trainer.epochs()
    trainer.save(tmp_path / "c")
    again = trainer_of(epochs=1)
    assert again.restore(tmp_path / "c") == result
    assert list(again.epochs()) == []


def test_the_state_of_another_trial_is_refused():
    with pytest.raises(ValueError, match="belongs to trial"):
        trainer_of(seed=1).load_state_dict(trainer_of(seed=0).state_dict())


def test_same_seed_same_numbers_and_another_seed_others():
    def run(seed):
        trainer = trainer_of(MARGIN, seed=seed, augmentation=AUGMENTED, epochs=2)
        return without_times(trainer.epochs()), trainer.method.network.state_dict()

    first, second, other = run(0), run(0), run(1)
    assert_same(dict(first[1]), dict(second[1]))
    assert first[0] == second[0]
    assert first[0][0]["train_loss"] != other[0][0]["train_loss"]


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = without_times(trainer_of(MARGIN, epochs=1, augmentation=AUGMENTED).epochs())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    torch.manual_seed(6)
    assert without_times(trainer_of(MARGIN, epochs=1, augmentation=AUGMENTED).epochs()) == first


@pytest.mark.parametrize(("family", "name"), [(MARGIN, "beta"), (SOFTMAX, "weight")])
def test_every_entry_of_the_losss_parameters_moves(family, name):
    trainer = trainer_of(family, epochs=1)
    before = {key: value.detach().clone() for key, value in trainer.method.objective.loss.named_parameters()}
    assert name in str(list(before))
    list(trainer.epochs())
    for key, value in trainer.method.objective.loss.named_parameters():
        assert (value != before[key]).all(), key


def test_every_parameter_of_the_network_moves():
    trainer = trainer_of(epochs=1)
    before = {key: value.detach().clone() for key, value in trainer.method.network.named_parameters()}
    list(trainer.epochs())
    still = [k for k, v in trainer.method.network.named_parameters() if torch.equal(v, before[k])]
    assert still == []


def test_a_parameter_that_no_group_holds_is_refused_by_name():
    trainer = trainer_of()
    trainer.method.projection = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"projection\.weight, projection\.bias"):
        parts.build_trial_optimizer(trainer.trial, trainer.method)


def test_each_group_has_its_own_learning_rate_and_the_loss_its_own_decay():
    settings = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1}
    own = {**settings, "backbone_learning_rate": 1e-4, "loss_learning_rate": 0.5}
    groups = {group["name"]: group for group in trainer_of(MARGIN, optimizer=own).optimizer.param_groups}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"backbone": (1e-4, 0.1), "head": (1e-3, 0.1), "loss": (0.5, 0.0)}
    decayed = trainer_of(MARGIN, optimizer={**own, "loss_weight_decay": 0.02}).optimizer.param_groups
    assert [group["weight_decay"] for group in decayed] == [0.1, 0.1, 0.02]
    shared = trainer_of(MARGIN, optimizer=settings).optimizer.param_groups
    assert [group["lr"] for group in shared] == [1e-3] * 3


def test_during_the_warm_up_of_new_layers_only_they_move():
    trainer = trainer_of(
        MARGIN,
        epochs=2,
        optimizer={"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
        schedule={"name": "constant", "new_layer_warmup_epochs": 1},
    )

    def of_groups():
        groups = trainer.method.parameter_groups()
        return {name: [p.detach().clone() for p in parameters] for name, parameters in groups.items()}

    start = of_groups()
    epochs = trainer.epochs()
    next(epochs)
    warm = of_groups()
    next(epochs)
    after = of_groups()
    assert all(torch.equal(a, b) for a, b in zip(start["backbone"], warm["backbone"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(warm["backbone"], after["backbone"], strict=True))
    for name in ("head", "loss"):
        assert not any(torch.equal(a, b) for a, b in zip(start[name], warm[name], strict=True))


def test_the_gradient_is_clipped_to_a_norm_over_all_parameters():
    def moved(clip):
        optimizer = {"name": "sgd", "learning_rate": 1.0, "gradient_clip": clip}
        trainer = trainer_of(epochs=1, optimizer=optimizer, sampler={**BALANCED, "batches_per_epoch": 1})
        before = [p.detach().clone() for p in trainer.method.parameters()]
        (result,) = trainer.epochs()
        pairs = zip(trainer.method.parameters(), before, strict=True)
        return math.sqrt(sum(float((a.detach() - b).double().square().sum()) for a, b in pairs)), result

    distance, result = moved(0.01)
    assert distance == pytest.approx(0.01, rel=1e-3)
    assert result["gradient_norm"] > 0.02  # reported as it was before
    assert moved(None)[0] == pytest.approx(result["gradient_norm"], rel=1e-3)


# Six training classes: of three, a network learns little that holds for others.
SIX_CLASSES = {
    "name": "digits",
    "resize_px": 16,
    "crop_px": 16,
    "split": {"order": "sorted", "test_fraction": 0.2, "val_fraction": 0.25},
    "augmentation": {"random_resized_crop": [0.5, 1.0]},
}


def test_learning_is_visible_on_digits_never_seen():
    trainer = trainer_of(
        MARGIN,
        epochs=5,
        data=SIX_CLASSES,
        sampler={"name": "class_balanced", "classes_per_batch": 6, "images_per_class": 8},
    )
    embeddings = embed.embed(
        trainer.method, trainer.val_images.pixels, trainer.preprocessing, device="cpu", batch_size=256
    )
    untrained = score(embeddings, trainer.val_images.labels)
    list(trainer.epochs())
    assert trainer.best_metrics["val_map_at_r"] > untrained["map_at_r"] + 0.1
    assert trainer.best_metrics["val_r_precision"] > untrained["r_precision"] + 0.05


def test_a_result_holds_plain_finite_numbers_under_the_promised_names():
    (result,) = trainer_of(epochs=1, recall_at=[1, 3]).epochs()
    assert set(result) == {
        *("epoch", "train_loss", "val_recall_at_1", "val_recall_at_3", "val_r_precision", "val_map_at_r"),
        *("best_val_map_at_r", "learning_rate", "gradient_norm", "sampler_coverage", "sampler_duplicates"),
        *("epoch_s", "images_per_s", "peak_memory_bytes", "ended"),
    }
    assert result.pop("ended") == "finished"
    assert all(type(value) in (int, float) and math.isfinite(value) for value in result.values())
    assert result["sampler_coverage"] == pytest.approx(4 * 24 / 537, rel=1e-6)  # 537 images of 0, 1 and 2


def test_the_best_weights_are_those_of_the_best_epoch_and_the_card_says_which(tmp_path, monkeypatch):
    trainer = trainer_of(epochs=4)
    given = iter([0.5, 0.7, 0.7, 0.6])
    monkeypatch.setattr(
        trainer_module,
        "score_by_all",
        lambda *_a, **_k: Scores({"map_at_r": next(given), "r_precision": 0.1, "recall_at_1": 0.2}, None),
    )
    weights, bests = [], []
    for result in trainer.epochs():
        weights.append({k: v.clone() for k, v in trainer.method.network.state_dict().items()})
        bests.append(result["best_val_map_at_r"])
    assert bests == [0.5, 0.7, 0.7, 0.7]
    trainer.save(tmp_path / "c")
    card = checkpoint.load_card(tmp_path / "c")
    assert (card["epoch"], card["best_epoch"]) == (4, 2)  # an equal later epoch is no improvement
    assert card["metrics"]["val_map_at_r"] == 0.7
    assert_same(checkpoint.load_weights(tmp_path / "c"), weights[1])
    model = load_checkpoint(tmp_path / "c")
    assert model.preprocessing == trainer.preprocessing
    assert_same(dict(model.network.state_dict()), weights[1])


def without_validation(family=CONTRASTIVE, *, test_fraction=0.5, reads=None, machine=(), **changes):
    """A trial on digits of which 0-4 train, or all ten digits with test_fraction 0."""
    trial = trial_of(family, **changes).model_dump(mode="json")
    trial["data"]["split"] |= {"val_fraction": 0, "test_fraction": test_fraction}
    return Trainer(parse_trial(trial), parse_machine(dict(machine)), device="cpu", reads=reads)


def test_the_batch_of_evaluation_does_not_decide_whether_a_trial_without_validation_has_collapsed():
    (result, *_) = without_validation(machine={"evaluation_batch": 1}, epochs=1).epochs()
    assert result["ended"] == "finished"


def test_without_validation_the_last_epoch_is_kept_and_a_resume_is_exact(tmp_path):
    assert_resume_is_exact(without_validation, tmp_path / "c")
    trainer = without_validation()
    assert sorted(set(np.array(trainer.train_images.labels))) == [0, 1, 2, 3, 4]
    assert trainer.split.to_dict() == {"train": [0, 1, 2, 3, 4], "val": [], "test": [5, 6, 7, 8, 9]}
    results = list(trainer.epochs())
    assert not [name for result in results for name in result if name.startswith(("val_", "best_"))]
    trainer.save(tmp_path / "d")
    card = checkpoint.load_card(tmp_path / "d")
    assert (card["epoch"], card["best_epoch"], card["metrics"]) == (4, 4, {})
    assert_same(checkpoint.load_weights(tmp_path / "d"), dict(trainer.method.network.state_dict()))


@pytest.mark.parametrize("reason", ["collapsed", "non_finite_loss"])
def test_without_validation_the_training_images_show_that_a_trial_has_diverged(reason):
    if reason == "collapsed":
        trainer = without_validation(optimizer={"name": "sgd", "learning_rate": 1e-30})
        torch.nn.init.zeros_(trainer.method.network.head.linear.weight)
    else:  # the last step of the epoch breaks the weights
        one_batch = {**BALANCED, "classes_per_batch": 5, "batches_per_epoch": 1}
        trainer = without_validation(optimizer={"name": "sgd", "learning_rate": 1e38}, sampler=one_batch)
    (result,) = trainer.epochs()
    assert math.isfinite(result["train_loss"])
    assert result["ended"] == reason
    assert trainer.best_epoch == 0


def test_training_on_every_class_is_recorded_as_a_read_of_the_test_classes(tmp_path):
    with pytest.raises(DataError, match="each read of them is recorded"):
        without_validation(test_fraction=0)
    reads = TestReads(tmp_path / "test_reads.jsonl")
    trainer = without_validation(test_fraction=0, reads=reads)
    assert trainer.split.to_dict() == {"train": list(range(10)), "val": [], "test": []}
    (record,) = reads.read()
    assert record["purpose"] == "training on all classes"
    assert record["checkpoint"] == f"trial {fingerprint(trainer.trial)}"
    assert trainer.model_card()["trained_on_files"] == "", "digits has no files"
    assert "trained_on_files" not in without_validation().model_card()
    assert without_validation(reads=reads).split.test == (5, 6, 7, 8, 9)
    assert len(reads.read()) == 1


class Broken(torch.nn.Module):
    def forward(self, embeddings, labels, tuples=None):  # noqa: ARG002
        return embeddings.sum() * math.nan


def assert_no_number_is_strange(result):
    assert all(math.isfinite(value) for key, value in result.items() if key != "ended")


def test_a_loss_that_is_not_finite_ends_the_trial_and_leaves_the_best_weights(tmp_path):
    trainer = trainer_of()
    epochs = trainer.epochs()
    first = next(epochs)
    best = {key: value.clone() for key, value in trainer.method.network.state_dict().items()}
    trainer.method.objective.loss = Broken()
    second = next(epochs)
    assert (first["ended"], second["ended"]) == ("", "non_finite_loss")
    assert_no_number_is_strange(second)
    assert "train_loss" not in second
    assert "val_map_at_r" not in second
    assert second["best_val_map_at_r"] == first["val_map_at_r"]
    assert list(epochs) == []
    trainer.save(tmp_path / "c")
    assert_same(checkpoint.load_weights(tmp_path / "c"), best)


def test_one_bad_batch_among_good_ones_is_noticed():
    trainer = trainer_of()
    true, calls = trainer.method.objective.loss, []

    class Once(torch.nn.Module):
        def forward(self, embeddings, labels, tuples=None):
            calls.append(1)
            return true(embeddings, labels, tuples) * (math.inf if len(calls) == 2 else 1.0)

    trainer.method.objective.loss = Once()
    assert next(trainer.epochs())["ended"] == "non_finite_loss"


def test_an_absurd_learning_rate_ends_the_trial_in_its_first_epoch(tmp_path):
    trainer = trainer_of(optimizer={"name": "sgd", "learning_rate": 1e30})
    (result,) = trainer.epochs()
    assert result["ended"] == "non_finite_loss"
    assert_no_number_is_strange(result)
    assert "best_val_map_at_r" not in result
    trainer.save(tmp_path / "c")  # the network as it was built
    weights = checkpoint.load_weights(tmp_path / "c")
    assert all(value.isfinite().all() for value in weights.values())
    assert checkpoint.load_card(tmp_path / "c")["best_epoch"] == 0


def test_weights_broken_by_the_last_step_of_an_epoch_are_noticed():
    trainer = trainer_of(optimizer={"name": "sgd", "learning_rate": 1e38}, sampler={**BALANCED, "batches_per_epoch": 1})
    (result,) = trainer.epochs()
    assert math.isfinite(result["train_loss"])
    assert result["ended"] == "non_finite_loss"
    assert trainer.best_epoch == 0


def test_collapsed_embeddings_end_the_trial_without_a_score():
    trainer = trainer_of(optimizer={"name": "sgd", "learning_rate": 1e-30})
    torch.nn.init.zeros_(trainer.method.network.head.linear.weight)  # every image: the bias
    (result,) = trainer.epochs()
    assert result["ended"] == "collapsed"
    assert "val_recall_at_1" not in result
    assert "best_val_map_at_r" not in result


def test_images_other_than_those_of_the_trial_are_refused():
    trainer = trainer_of()
    assert trainer.trial.data.content  # filled in
    raw = trainer.trial.model_dump(mode="json")
    Trainer(parse_trial(raw), parse_machine({}), device="cpu")
    raw["data"]["content"] = "0" * len(raw["data"]["content"])
    with pytest.raises(DataError, match=r"data\.content"):
        Trainer(parse_trial(raw), parse_machine({}), device="cpu")


def test_the_numbers_of_bf16_and_channels_last_are_close_to_fp32():
    (plain,) = trainer_of(epochs=1).epochs()
    (last,) = trainer_of(epochs=1, channels_last=True).epochs()
    (half,) = trainer_of(epochs=1, precision="bf16").epochs()
    assert last["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
    assert half["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05)
    assert half["train_loss"] != plain["train_loss"]


def test_resume_is_exact_in_bf16_and_channels_last(tmp_path):
    assert_resume_is_exact(lambda: trainer_of(precision="bf16", channels_last=True), tmp_path / "c")


@pytest.mark.slow
def test_a_compiled_trial_gives_the_same_checkpoint_names_and_close_numbers():
    compiled = trainer_of(epochs=1, compile=True)
    (result,) = compiled.epochs()
    (plain,) = trainer_of(epochs=1).epochs()
    assert result["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-2)
    assert set(compiled.best_weights) == set(trainer_of().best_weights)


def test_a_folder_of_images_trains_from_its_cache(tmp_path):
    generator = np.random.default_rng(0)
    for label in range(6):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for index in range(8):
            pixels = np.clip(generator.normal(40 * label, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"class{label}" / f"{index}.png")
    data = {"name": "image_folder", "resize_px": 16, "crop_px": 12, "split": {"test_fraction": 0.33}}
    machine = parse_machine(
        {"data_root": str(tmp_path / "images"), "cache_dir": str(tmp_path / "cache"), "cpus_per_trial": 1}
    )
    sampler = {"name": "class_balanced", "classes_per_batch": 2, "images_per_class": 4}
    trainer = Trainer(trial_of(MARGIN, data=data, sampler=sampler, epochs=2), machine, device="cpu")
    memory = trainer.train_images.pixels.flat
    while isinstance(memory, np.ndarray):
        memory = memory.base
    assert isinstance(memory, mmap.mmap)
    assert trainer.train_images.pixels.sizes.tolist() == [[16, 19]] * 16  # 20 x 24: the aspect ratio is kept
    assert [result["ended"] for result in trainer.epochs()] == ["", "finished"]
    assert torch.get_num_threads() == 1


def forbid_waiting(trainer):
    """From now on a step of this trainer that waits for its GPU raises RuntimeError."""
    step = trainer._step

    def watched(images, plan, position):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(images, plan, position)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer._step = watched


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_no_step_waits_for_the_device_and_the_numbers_are_close(family, precision):
    changes = {"precision": precision, "augmentation": AUGMENTED, "epochs": 2}
    trainer = Trainer(trial_of(FAMILIES[family], **changes), parse_machine({}), device="cuda:0")
    epochs = trainer.epochs()
    first = next(epochs)
    forbid_waiting(trainer)
    assert next(epochs)["ended"] == "finished"
    on_cpu = next(trainer_of(FAMILIES[family], **changes).epochs())
    assert first["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=0.05)


def test_the_steps_that_must_not_wait_for_a_gpu_are_those_of_the_trainer(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    trainer = trainer_of(epochs=2)
    epochs = trainer.epochs()
    next(epochs)
    forbid_waiting(trainer)
    second = next(epochs)
    assert modes == ["error", "default"] * BALANCED["batches_per_epoch"]
    _, unwatched = trainer_of(epochs=2).epochs()
    assert without_times([second]) == without_times([unwatched])


def test_the_memory_mines_with_the_miner_of_the_trial_and_the_seed_reaches_the_loss():
    trainer = trainer_of(MEMORY)
    assert trainer.method.objective.regularizers["cross_batch_memory"]._chosen == (
        trainer.method.objective.loss,
        trainer.method.objective.miner,
    )
    weights = [trainer_of(SOFTMAX, seed=seed).method.objective.loss.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_class_vectors_of_prefixes_learn_with_those_of_the_loss():
    trainer = trainer_of(MATRYOSHKA)
    prefixes = list(trainer.method.objective.regularizers["matryoshka"].parameters())
    assert [parameter.shape[1] for parameter in prefixes] == [2, 8]
    (group,) = (group for group in trainer.optimizer.param_groups if group["name"] == "loss")
    own = [trainer.method.objective.loss.weight, *prefixes]
    assert set(map(id, group["params"])) == set(map(id, own))
    # What stands beside the loss leaves the loss and the network as they begin without it.
    plain = trainer_of(SOFTMAX)
    assert torch.equal(own[0], plain.method.objective.loss.weight)
    before = [parameter.detach().clone() for parameter in own]
    list(trainer.epochs())
    assert not any(torch.equal(old, new) for old, new in zip(before, own, strict=True))


class GivenBatches:
    """In the place of a loader: the same batches of images each epoch."""

    def __init__(self, images):
        self.images = images

    def batches(self, plan, seeds, flip):  # noqa: ARG002
        yield from self.images


class GivenPlan:
    """In the place of a sampler: batch b is images b * n to (b + 1) * n."""

    def __init__(self, shape):
        self.rows = list(np.arange(np.prod(shape)).reshape(shape))

    def plan(self, generator):  # noqa: ARG002
        return make_plan(self.rows, int(sum(map(len, self.rows))))


@pytest.mark.parametrize("case", [0, 1])
def test_new_layers_first_and_then_all_with_a_new_optimiser_as_the_classification_baseline(case):
    """Its released loop with a 1x1 convolution as backbone: learning rates, losses and weights of both phases."""
    facts = golden_facts("classification_training_trace")["cases"][case]
    arrays = golden_arrays("classification_training_trace")
    value = {name: torch.from_numpy(arrays[f"case{case}__{name}"]) for name in facts["arrays"]}
    warmup, main = facts["pretrain_epochs"], facts["epochs_per_step"] * facts["num_steps"]
    trainer = trainer_of(
        {"loss": {"name": "normalized_softmax", "temperature": facts["temperature"]}},
        epochs=warmup + main,
        optimizer={
            "name": "sgd",
            "learning_rate": facts["lr"],
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "loss_weight_decay": 1e-4,
        },
        schedule={
            "name": "step",
            "milestones": [warmup + facts["epochs_per_step"] * step for step in range(1, facts["num_steps"])],
            "gamma": facts["gamma"],
            "new_layer_warmup_epochs": warmup,
            "new_layer_factor": facts["lr_mult"],
        },
    )
    trunk = torch.nn.Sequential(
        torch.nn.Conv2d(facts["cin"], facts["mid"], 1, bias=False), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    projection = "linear_no_bias" if "remap0" in value else "none"
    head = Head(facts["mid"], facts["dout"], layer_norm=True, normalize="l2", projection=projection)
    loss = registry.build(
        "losses",
        "normalized_softmax",
        num_classes=facts["classes"],
        embedding_dim=facts["dout"],
        temperature=facts["temperature"],
    )
    trainer.method = registry.build(
        "methods",
        "plain",
        network=Network(trunk, head, freeze_batch_norm=False),
        train_labels=value["labels"].flatten().numpy(),
        num_epochs=trainer.trial.epochs,
        make_objective=lambda num_classes, embedding_dim: Objective(loss),  # noqa: ARG005
        make_sampler=lambda labels: GivenPlan(value["labels"].shape),  # noqa: ARG005
    ).double()
    with torch.no_grad():
        trunk[0].weight.copy_(value["conv0"])
        loss.weight.copy_(value["class_weight0"])
        if projection != "none":
            head.linear.weight.copy_(value["remap0"])
    trainer.optimizer = parts.build_trial_optimizer(trainer.trial, trainer.method)
    trainer.loader = GivenBatches(value["images"])
    trainer.train_labels = value["labels"].flatten()
    losses, rates = [], []
    step = trainer._step

    def noted(*arguments):
        stepped = step(*arguments)
        losses.append(stepped[0].item())
        rates.append({group["lr"] for group in trainer.optimizer.param_groups})
        return stepped

    trainer._step = noted
    for epoch in range(trainer.trial.epochs):
        for _ in trainer._train():
            pass
        trainer.epoch, trainer.epoch_state = epoch + 1, None
        if trainer.epoch == warmup:
            np.testing.assert_allclose(trunk[0].weight.detach(), value["conv_after_warmup"], rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(loss.weight.detach(), value["class_weight_after_warmup"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(losses, value["losses"], rtol=1e-6, atol=1e-9)
    assert [len(each) for each in rates] == [1] * len(rates)
    np.testing.assert_allclose([each.pop() for each in rates], value["lrs"], rtol=1e-9)
    np.testing.assert_allclose(trunk[0].weight.detach(), value["conv_final"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(loss.weight.detach(), value["class_weight_final"], rtol=1e-6, atol=1e-9)
    if projection != "none":
        np.testing.assert_allclose(head.linear.weight.detach(), value["remap_final"], rtol=1e-6, atol=1e-9)


def test_idle_parameters_move_only_where_a_method_says_so():
    """Adam's momentum moves what has learned before; what never had a gradient stays, in both cases."""

    class Idle(torch.nn.Module):
        """A loss of which one part is used in the first step alone, and one never."""

        def __init__(self):
            super().__init__()
            self.once, self.never = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
            self.calls = 0

        def forward(self, embeddings, labels):  # noqa: ARG002
            self.calls += 1
            return embeddings.sum() + (self.once.sum() if self.calls == 1 else 0)

    def after_an_epoch(moves):
        trainer = trainer_of(optimizer={"name": "adam", "learning_rate": 0.1})
        trainer.method.objective.loss = loss = Idle()
        trainer.method.idle_parameters_move = moves
        trainer.optimizer = parts.build_trial_optimizer(trainer.trial, trainer.method)
        trainer.optimizer.param_groups[-1]["weight_decay"] = 0.1  # a gradient of 0 would let it move what never learned
        next(trainer.epochs())
        assert trainer.optimizer.param_groups[-1]["name"] == "loss"
        assert torch.equal(loss.never, torch.ones(3))
        return loss.once.detach()

    torch.testing.assert_close(after_an_epoch(False), torch.full((3,), 0.9))
    # Adam by hand: three more steps with gradient 0, but for the decay, after one with gradient 1.
    value, first, second = 1.0, 0.0, 0.0
    for step in range(1, 5):
        gradient = (1.0 if step == 1 else 0.0) + 0.1 * value
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        value -= 0.1 * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
    torch.testing.assert_close(after_an_epoch(True), torch.full((3,), value))
