"""The spaces that come with raydml, and the schema that editors use for them."""

import json
import math
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from raydml import plugins
from raydml.config import Machine
from raydml.domains import to_plain
from raydml.space import json_schema, load_space, sample_trials
from raydml.train import Trainer
from raydml.yaml_reader import read_yaml

FOLDER = Path(__file__).parents[1] / "search_spaces"
SPACES = sorted(FOLDER.glob("*.yaml"))
REGENERATE = (
    'python -c "import json; from raydml.space import json_schema; '
    "open('search_spaces/schema.json', 'w').write(json.dumps(json_schema(), indent=1) + chr(10))\""
)


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


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_loads_and_samples(path):
    overrides = [] if path.stem == "digits" else ["machine.data_root=/images"]
    space = load_space(path, overrides)
    if path.stem == "loss_zoo":
        assert (space.study.confirm, space.study.finalize) == (None, None)
        return
    assert len(sample_trials(space)) == 16
    assert (space.study.confirm.top, space.study.confirm.folds, space.study.confirm.seeds) == (2, 2, 2)
    assert space.study.finalize.top == 1


def test_the_zoo_has_a_recipe_for_every_loss_miner_and_regulariser():
    trials = sample_trials(load_space(FOLDER / "loss_zoo.yaml", ["machine.data_root=/images"]))
    assert {trial.loss.name for trial in trials} == set(plugins.names("losses"))
    assert {trial.miner.name for trial in trials if trial.miner} == set(plugins.names("miners"))
    assert {name for trial in trials for name in trial.regularizers} == set(plugins.names("regularizers"))
    assert {trial.epochs for trial in trials} == {12}  # equal budget
    assert len({trial.sampler for trial in trials}) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_study_tries_four_loss_families_equally(seed):
    trials = sample_trials(load_space(FOLDER / "digits.yaml", [f"study.seed={seed}"]))
    names = [trial.loss.name for trial in trials]
    families = ("margin", "multi_similarity", "contrastive", "normalized_softmax")
    assert [names.count(name) for name in families] == [4, 4, 4, 4]
    assert {trial.sampler.name for trial in trials if trial.loss.name == "normalized_softmax"} == {"uniform"}
    assert len({trial.model.embedding_dim for trial in trials}) == 3


def test_digits_leaves_classes_for_every_batch():
    # 5 development classes: 3 train in the search, and in two folds (3 + 2 classes) 2 or 3 train.
    for trial in sample_trials(load_space(FOLDER / "digits.yaml")):
        split = trial.data.split
        assert (split.order, split.test_fraction, split.val_fraction, split.num_folds) == ("sorted", 0.5, 0.4, 2)
        assert trial.sampler.name == "uniform" or trial.sampler.classes_per_batch <= 2


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_the_schema_accepts_the_space(path, validator):
    assert [error.message for error in validator.iter_errors(content_of(path))] == []


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


def test_the_committed_schema_is_the_one_of_the_code():
    committed = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    # As JSON, where a tuple is a list.
    assert committed == json.loads(json.dumps(json_schema())), f"out of date; renew it with: {REGENERATE}"


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_editors_find_the_schema(path):
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
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
