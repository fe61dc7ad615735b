"""The spaces that come with raydml, and the schema that editors use for them."""

import math
from contextlib import closing
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from raydml.config.trial import Machine
from raydml.data.benchmarks import BENCHMARKS
from raydml.search_space.domains import to_plain
from raydml.search_space.json_schema import json_schema
from raydml.search_space.space import load_space, sample_trials
from raydml.search_space.yaml_reader import read_yaml
from raydml.training.trainer import Trainer

FOLDER = Path(__file__).parents[1] / "search_spaces"
SPACES = sorted(FOLDER.glob("*.yaml"))


def content_of(path):
    node, problems = read_yaml(path.read_text(encoding="utf-8"), path.name)
    assert problems == []
    return to_plain(node)


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_header_says_question_command_expectation_cost_and_source(path):
    header = path.read_text(encoding="utf-8").split("\nstudy:")[0]
    assert all(line.startswith("#") or not line for line in header.splitlines())
    for word in ("# Question:", "# Command: uv run launch.py sweep", "# expected:", "# cost:", "# Source:"):
        assert word in header


def space_of(name, overrides=()):
    return load_space(FOLDER / f"{name}.yaml", ["machine.data_root=/images", *overrides])


SYSTEMS = {
    "divide_conquer": ("sop", "inshop", "vehicleid"),
    "classification": ("cub200", "cars196", "sop", "inshop"),
    "deep_metric": ("cub200", "cars196", "sop", "inshop"),
    "multi_similarity": ("cub200",),
    "mdr": ("cub200", "cars196", "sop", "inshop"),
    "mic": ("cub200", "cars196", "sop", "inshop", "vehicleid"),
}
PUBLISHED_POINTS = [f"{system}_{dataset}" for system, datasets in SYSTEMS.items() for dataset in datasets]
REALITY_CHECKS = [f"reality_check_{dataset}" for dataset in ("cub200", "cars196", "sop", "inshop", "vehicleid")]
FOUNDATIONS = [f"foundation_{dataset}" for dataset in ("cub200", "cars196", "sop", "inshop", "vehicleid")]
COMPARISONS = {"method_x_loss_cub200": (15, 5, 2, 2, 5), "methods_digits": (6, 6, 2, 2, 6)}
COMPARISONS |= {
    "methods_image_folder": (6, 6, 2, 3, 6),
    "foundation_image_folder": (12, 2, 2, 2, 1),
    **dict.fromkeys(REALITY_CHECKS, (192, 8, 2, 3, 8)),
    **dict.fromkeys(FOUNDATIONS, (24, 6, 2, 2, 6)),
}
USUAL = (16, 2, 2, 2, 1)  # trials; configurations, folds and seeds confirmed; configurations tested


def test_every_space_is_known_here():
    names = {"digits", "glyphs", "image_folder", "loss_zoo", *PUBLISHED_POINTS, *COMPARISONS}
    assert {path.stem for path in SPACES} == names


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_loads_and_samples(path):
    space = space_of(path.stem)
    trials, study = sample_trials(space), space.study
    if path.stem == "loss_zoo":
        assert (len(trials), study.confirm, study.finalize) == (44, None, None)
        return
    stages = (study.confirm.top, study.confirm.folds, study.confirm.seeds, study.finalize.top)
    assert (len(trials), *stages) == COMPARISONS.get(path.stem, (8, 2, 2, 2, 1) if path.stem == "glyphs" else USUAL)


def test_the_zoo_compares_many_losses_miners_and_regularisers_at_one_budget():
    trials = sample_trials(load_space(FOLDER / "loss_zoo.yaml", ["machine.data_root=/images"]))
    assert len({trial.loss.name for trial in trials}) > 20
    assert len({trial.miner.name for trial in trials if trial.miner}) > 8
    assert len({name for trial in trials for name in trial.regularizers}) > 4
    assert {trial.epochs for trial in trials} == {12}  # equal budget
    assert len({trial.sampler for trial in trials}) == 1


@pytest.mark.parametrize(("name", "each", "num_dims"), [("glyphs", 2, 2), ("digits", 4, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_small_studies_try_four_loss_families_equally(name, each, num_dims, seed):
    trials = sample_trials(load_space(FOLDER / f"{name}.yaml", [f"study.seed={seed}"]))
    names = [trial.loss.name for trial in trials]
    families = ("margin", "multi_similarity", "contrastive", "normalized_softmax")
    assert [names.count(family) for family in families] == [each] * 4
    assert {trial.sampler.name for trial in trials if trial.loss.name == "normalized_softmax"} == {"uniform"}
    assert len({trial.model.embedding_dim for trial in trials}) == num_dims


def test_digits_leaves_classes_for_every_batch():
    # 5 development classes: 3 train in the search, and in two folds (3 + 2 classes) 2 or 3 train.
    for trial in sample_trials(load_space(FOLDER / "digits.yaml")):
        split = trial.data.split
        assert (split.order, split.test_fraction, split.val_fraction, split.num_folds) == ("sorted", 0.5, 0.4, 2)
        assert trial.sampler.name == "uniform" or trial.sampler.classes_per_batch <= 2


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_the_schema_accepts_the_space(path, validator):
    assert [error.message for error in validator.iter_errors(content_of(path))] == []


def test_the_schema_has_the_blocks_of_a_method(validator):
    space = content_of(FOLDER / "mic_cub200.yaml")
    space["trial"]["method"] |= {
        "auxiliary_loss": {"name": "margin", "beta": {"uniform": [0.5, 0.9]}},
        "auxiliary_miner": {"choice": [None, {"name": "all"}]},
    }
    assert [error.message for error in validator.iter_errors(space)] == []
    space["trial"]["method"]["auxiliary_loss"]["bta"] = 1.0
    assert list(validator.iter_errors(space)) != []


@pytest.mark.parametrize(
    "change",
    [
        lambda space: space.update(trail={}),
        lambda space: space["study"].update(sed=0),
        lambda space: space["study"]["search"].update(num_trials="16"),
        lambda space: space["trial"].update(epoch=3),
        lambda space: space["trial"]["data"].update(crop=8),
        lambda space: space["trial"]["data"].update(name="digitz"),
        lambda space: space["trial"]["model"].update(backbone="resnet-18"),
        lambda space: space["trial"]["model"].update(embedding_dim={"choise": [1, 2]}),
        lambda space: space["trial"]["model"].update(embedding_dim={"choice": [16, "many"]}),
        lambda space: space["trial"]["optimizer"].update(learning_rate={"loguniform": [1e-6]}),
        lambda space: space["trial"]["optimizer"].update(momentum=0.9),
        lambda space: space["trial"]["loss, miner, sampler"]["choice"][0]["loss"].update(bta=1.0),
        lambda space: space["trial"]["loss, miner, sampler"]["choice"][0]["loss"].update(name="margn"),
    ],
)
def test_the_schema_refuses_what_is_misspelt(change, validator):
    space = content_of(FOLDER / "digits.yaml")
    change(space)
    assert not validator.is_valid(space)


def test_the_schema_takes_domains_anywhere(validator):
    space = content_of(FOLDER / "digits.yaml")
    space["trial"]["data"] = {"choice": [space["trial"]["data"], {"choice": [space["trial"]["data"]]}]}
    space["trial"]["optimizer"] = {"grid": [{"name": "sgd", "momentum": {"uniform": [0.5, 0.9]}}]}
    space["trial"]["epochs"] = {"randint": [3, 9]}
    space["trial"]["method"] = {"name": {"choice": ["plain"]}}
    assert [error.message for error in validator.iter_errors(space)] == []


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_editors_find_the_schema(path):
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
    assert "`uv run launch.py schema --write` makes that file" in path.read_text(encoding="utf-8")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))  # other readers of YAML understand the file, too


ON_DIGITS = [
    "trial.data={name: digits, resize_px: 16, crop_px: 16, split: {order: sorted, val_fraction: 0.4, num_folds: 2}}",
    "trial.sampler={name: class_balanced, classes_per_batch: 2, images_per_class: 4, batches_per_epoch: 4}",
    "trial.epochs=1",
]


@pytest.mark.slow
def test_every_recipe_of_the_zoo_trains(tmp_path):
    machine = Machine(cache_dir=tmp_path, device="cpu")
    for trial in sample_trials(load_space(FOLDER / "loss_zoo.yaml", ON_DIGITS)):
        trainer = Trainer(trial, machine, device="cpu")
        before = {name: value.clone() for name, value in trainer.method.network.state_dict().items()}
        (result,) = trainer.epochs()
        what = f"{trial.loss} {trial.miner} {trial.regularizers}"
        assert math.isfinite(result["train_loss"]), what
        assert result["gradient_norm"] > 0, what
        assert result["ended"] == "finished", what
        after = trainer.method.network.state_dict()
        assert any(not torch.equal(value, after[name]) for name, value in before.items()), what


RESNET = {"model.backbone": "resnet50", "model.weights": "default", "data.resize_px": 256, "data.crop_px": 224}
ADAM = {"optimizer.name": "adam", "schedule.new_layer_warmup_epochs": 0}
FROM_FILE = {"data.cache": "off", "data.augmentation.random_resized_crop": (0.08, 1.0), "data.resize": "short_side"}
INCEPTION = {"model.backbone": "bn_inception", "model.weights": "bn_inception-52deb4733.pth"}
INCEPTION |= {"model.embedding_dim": 512, "model.freeze_batch_norm": True, "data.augmentation.flip": True}
INCEPTION |= {"data.augmentation.random_resized_crop": (0.16, 1.0), "data.cache": "on"}

BY_SYSTEM = {
    "divide_conquer": RESNET
    | ADAM
    | FROM_FILE
    | {"epochs": 200, "model.embedding_dim": 128, "model.dropout": 0.01, "model.head_init": "xavier_normal"}
    | {"model.freeze_batch_norm": True, "model.normalize": "l2", "data.augmentation.flip": True}
    | {"method.name": "divide_conquer", "method.num_learners": 8, "method.recluster_every": 2}
    | {"method.finetune_from": 0.95, "method.full_embedding_from": 8 / 19, "method.kmeans_iterations": 100}
    | {"loss.name": "margin", "loss.margin": 0.2, "loss.beta": 1.2, "loss.nu": 0.0}
    | {"loss.class_beta": False, "loss.trainable_beta": False}
    | {"miner.name": "nearest_beyond_cutoff", "miner.cutoff": 0.5}
    | {"sampler.classes_per_batch": 20, "sampler.images_per_class": 4}
    | {"optimizer.learning_rate": 1e-5, "optimizer.weight_decay": 1e-4, "schedule.name": "constant"},
    "classification": RESNET
    | {"epochs": 31, "model.embedding_dim": 2048, "model.layer_norm": True, "model.projection": "none"}
    | {"model.freeze_batch_norm": False, "model.pooling": "average", "model.normalize": "l2"}
    | {"data.resize": "squash", "data.augmentation.random_crop": True, "data.augmentation.flip": True}
    | {"data.augmentation.random_resized_crop": None, "method.name": "plain"}
    | {"loss.name": "normalized_softmax", "loss.temperature": 0.05}
    | {"sampler.name": "balanced_with_replacement", "sampler.batch_size": 75}
    | {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.weight_decay": 1e-4}
    | {"optimizer.loss_weight_decay": 1e-4, "schedule.name": "step", "schedule.milestones": (16,)}
    | {"schedule.gamma": 0.1, "schedule.new_layer_warmup_epochs": 1, "schedule.new_layer_factor": 1.0},
    "deep_metric": INCEPTION
    | ADAM
    | {"model.pooling": "max", "data.resize_px": 256, "data.crop_px": 224, "data.resize": "short_side"}
    | {"loss.name": "weight", "loss.alpha": 2.0, "loss.beta": 40.0, "loss.base": 0.5}
    | {"miner.name": "multi_similarity", "miner.epsilon": 0.1, "method.name": "plain"}
    | {"sampler.name": "random_identity", "sampler.images_per_class": 5, "schedule.name": "constant"}
    | {"optimizer.learning_rate": 1e-5, "optimizer.weight_decay": 2e-4},
    "multi_similarity": INCEPTION
    | ADAM
    | {"model.pooling": "max", "model.head_init": "kaiming_normal", "data.crop_px": 227, "epochs": 15}
    | {"loss.name": "multi_similarity", "loss.alpha": 2.0, "loss.beta": 40.0, "loss.base": 0.5}
    | {"miner.name": "multi_similarity", "miner.epsilon": 0.1, "sampler.name": "identity_chunks"}
    | {"sampler.batch_size": 80, "sampler.images_per_class": 5, "sampler.batches_per_epoch": 200}
    | {"optimizer.learning_rate": 3e-5, "optimizer.weight_decay": 5e-4}
    | {"schedule.name": "step", "schedule.milestones": (6, 12), "schedule.gamma": 0.1},
    "mdr": INCEPTION
    | ADAM
    | {"model.pooling": "average", "model.normalize": "mean_distance", "epochs": 100}
    | {"data.resize": "squash", "data.interpolation": "lanczos", "data.crop_px": 224}
    | {"loss.name": "triplet", "loss.margin": 0.2, "loss.squared": False, "loss.average_over": "all"}
    | {"miner.name": "distance_weighted", "miner.variant": "mdr", "miner.cutoff": 0.5}
    | {"regularizers.mdr.level_weight": 0.01, "regularizers.mdr.num_levels": 3, "regularizers.mdr.momentum": 0.9}
    | {"sampler.name": "random_classes", "sampler.batches_per_epoch": 100}
    | {"optimizer.weight_decay": 1e-5, "optimizer.loss_weight_decay": 1e-5, "optimizer.loss_learning_rate": None}
    | {"schedule.name": "step", "schedule.milestones": (40, 60, 80), "schedule.gamma": 0.2},
    "mic": RESNET
    | ADAM
    | FROM_FILE
    | {"model.embedding_dim": 128, "model.freeze_batch_norm": True, "data.augmentation.flip": True}
    | {"method.name": "mic", "method.recluster_every": 4, "method.class_probability": 1.0, "method.label_noise": 0.2}
    | {"method.standardise": "mean", "method.images_per_cluster": 4, "method.adversary_dim": 512}
    | {"method.adversary_weight_decay": 1e-6, "method.auxiliary_flip": False, "method.initial_layer": "stage1"}
    | {"method.direction": "auxiliary_to_class", "method.auxiliary_dim": None, "method.kmeans_iterations": 25}
    | {"loss.name": "margin", "loss.margin": 0.2, "loss.beta": 1.2, "loss.class_beta": True}
    | {"loss.trainable_beta": True, "miner.name": "distance_weighted", "miner.variant": "wu", "miner.cutoff": 0.5}
    | {"sampler.name": "class_groups", "sampler.batch_size": 112, "sampler.images_per_class": 4}
    | {"optimizer.learning_rate": 1e-5, "optimizer.loss_learning_rate": 5e-4, "optimizer.weight_decay": 4e-4}
    | {"optimizer.loss_weight_decay": 0.0, "schedule.name": "step", "schedule.gamma": 0.3},
}


def rows(names, *table):
    """{space: {key: value}} of lines (space, values in the order of the names)."""
    return {line[0]: dict(zip(names.split(), line[1:], strict=True)) for line in table}


BY_DATASET = {
    **rows(
        "data.name recall_at",
        ("divide_conquer_sop", "sop", (1, 2, 4, 8)),
        ("divide_conquer_inshop", "inshop", (1, 10, 20, 30, 50)),
        ("divide_conquer_vehicleid", "vehicleid_large", (1, 2, 4, 8)),
        ("multi_similarity_cub200", "cub200", (1, 2, 4, 8, 16, 32)),
    ),
    **rows(
        "optimizer.learning_rate sampler.images_per_class recall_at",
        ("classification_cub200", 1e-3, 25, (1, 2, 4, 8)),
        ("classification_cars196", 1e-2, 25, (1, 2, 4, 8)),
        ("classification_sop", 1e-2, 5, (1, 10, 100, 1000)),
        ("classification_inshop", 1e-2, 5, (1, 10, 20, 30, 40, 50)),
    ),
    **rows(
        "epochs sampler.batch_size recall_at",
        ("deep_metric_cub200", 400, 80, (1, 2, 4, 8, 16, 32)),
        ("deep_metric_cars196", 400, 80, (1, 2, 4, 8, 16, 32)),
        ("deep_metric_sop", 100, 240, (1, 10, 100, 1000)),
        ("deep_metric_inshop", 200, 240, (1, 10, 20, 30, 40, 50)),
    ),
    **rows(
        "optimizer.learning_rate sampler.batch_size sampler.images_per_class regularizers.mdr.weight recall_at",
        ("mdr_cub200", 5e-5, 128, 4, 0.6, (1, 2, 4, 8)),
        ("mdr_cars196", 5e-5, 128, 4, 0.2, (1, 2, 4, 8)),
        ("mdr_sop", 1e-4, 256, 3, 0.1, (1, 10, 100, 1000)),
        ("mdr_inshop", 1e-4, 256, 3, 0.1, (1, 10, 20, 30, 40)),
    ),
    **rows(
        "method.num_clusters method.adversarial_weight method.auxiliary_probability "
        "schedule.milestones epochs recall_at",
        ("mic_cub200", 30, 2500.0, 0.8, (50,), 100, (1, 2, 4, 8)),
        ("mic_cars196", 150, 500.0, 0.8, (60,), 110, (1, 2, 4, 8)),
        ("mic_sop", 50, 250.0, 0.5, (20, 35), 45, (1, 10, 100, 1000)),
        ("mic_inshop", 150, 250.0, 0.8, (50,), 70, (1, 10, 20, 30, 50)),
        ("mic_vehicleid", 50, 250.0, 0.5, (20, 35), 45, (1, 5)),
    ),
}


def value_at(trial, path):
    value = trial.model_dump()
    for step in path.split("."):
        value = value[step]
    return value


@pytest.mark.parametrize("name", PUBLISHED_POINTS)
def test_the_first_trial_is_the_published_point(name):
    system, _, dataset = name.rpartition("_")
    expected = {**BY_SYSTEM[system], **BY_DATASET[name], "select_on": "val_recall_at_1"}
    first, *others = sample_trials(space_of(name))
    assert {path: value_at(first, path) for path in expected} == expected
    assert first.data.name in BENCHMARKS[dataset].data_names
    # The others are around it: each differs in something, and all from each other.
    assert len({trial.optimizer.learning_rate for trial in others}) == len(others)


@pytest.mark.parametrize("name", [*PUBLISHED_POINTS, *COMPARISONS])
def test_validation_classes_select_in_a_quarter_as_large_as_a_fold(name):
    for trial in sample_trials(space_of(name)):
        split = trial.data.split
        assert trial.select_on.startswith("val_")
        assert split.val_fraction == (0.4 if name == "methods_digits" else 0.25)
        assert split.num_folds == (2 if name == "methods_digits" else 4)


@pytest.mark.parametrize("dataset", SYSTEMS["divide_conquer"])
def test_divide_and_conquer_stands_beside_its_baseline_that_clusters_nothing(dataset):
    trials = sample_trials(space_of(f"divide_conquer_{dataset}"))
    methods = [trial.method.settings for trial in trials]
    numbers = [settings["num_learners"] for settings in methods]
    assert sorted(numbers.count(number) for number in (8, 4, 1)) == [5, 5, 6]
    assert {(s["num_learners"], s["recluster_every"]) for s in methods} == {(8, 2), (8, 5), (4, 2), (4, 5), (1, 2)}


NO_MDR = ("trial.regularizers={}", "trial.optimizer.loss_weight_decay=0")


@pytest.mark.parametrize(
    ("system", "overrides"),
    [("mdr", NO_MDR), ("mdr", (*NO_MDR, "trial.model.normalize=l2")), ("mic", ("trial.method={name: plain}",))],
)
def test_the_baselines_that_headers_name_load(system, overrides):
    for dataset in SYSTEMS[system]:
        header = (FOLDER / f"{system}_{dataset}.yaml").read_text(encoding="utf-8").split("\nstudy:")[0]
        assert all(f"--set {text}" in header or f"--set '{text}'" in header for text in overrides)
    first, *_ = sample_trials(space_of(f"{system}_cub200", overrides))
    assert (first.method.name, first.regularizers) == ("plain", {})


@pytest.mark.parametrize("name", REALITY_CHECKS)
def test_the_reality_check_gives_every_loss_the_same(name):
    trials = sample_trials(space_of(name))
    assert len({trial.loss.name for trial in trials}) > 20
    assert len({(trial.model, trial.epochs, trial.data) for trial in trials}) == 1
    assert {(t.optimizer.name, t.optimizer.learning_rate, t.optimizer.weight_decay) for t in trials} == {
        ("rmsprop", 1e-6, 1e-4)
    }
    for trial in trials:
        sampler = trial.sampler
        assert sampler.classes_per_batch * sampler.images_per_class == 32


def test_the_comparisons_hold_six_recipes_at_equal_epochs():
    for name in ("methods_digits", "methods_image_folder"):
        trials = sample_trials(space_of(name))
        recipes = [(t.method.name, t.loss.name, *t.regularizers) for t in trials]
        assert recipes == [
            *(("plain", "margin"), ("divide_conquer", "margin"), ("mic", "margin"), ("plain", "margin", "mdr")),
            *(("plain", "normalized_softmax"), ("plain", "multi_similarity")),
        ]
        rates = {(t.optimizer.learning_rate, t.optimizer.weight_decay) for t in trials}
        assert len({(t.epochs, t.sampler, t.schedule, t.model.backbone, t.model.embedding_dim) for t in trials}) == 1
        assert len(rates) == 1


def first_epoch(trial, machine):
    """(trainer, number of batches, result) of the first epoch."""
    trainer = Trainer(trial, machine, device="cpu")
    num_batches = 0
    with closing(trainer.steps()) as steps:
        for result in steps:
            if result is not None:
                return trainer, num_batches, result
            num_batches += 1
    raise AssertionError("the trial ended without a result")


@pytest.mark.slow
@pytest.mark.parametrize("fold", [None, 0, 1])
@pytest.mark.parametrize("index", range(6))
def test_each_recipe_of_the_small_comparison_learns_on_every_fold(index, fold, tmp_path):
    trial = sample_trials(space_of("methods_digits"))[index]
    split = trial.data.split.model_copy(update={"fold": fold})
    trial = trial.model_copy(update={"data": trial.data.model_copy(update={"split": split})})
    _, num_batches, result = first_epoch(trial, Machine(cache_dir=tmp_path, device="cpu"))
    assert num_batches > 0
    assert math.isfinite(result["train_loss"])
    assert 0 < result["val_map_at_r"] <= 1
