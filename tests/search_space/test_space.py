"""Search spaces: reading YAML, domains, overrides, the check of the whole space, sampling."""

import logging
import math
import textwrap
import time
from pathlib import Path

import pytest

from raydml.config.trial import fingerprint, parse_study
from raydml.search_space.domains import Range, num_configurations, published_point, resolve, to_plain, with_domains
from raydml.search_space.space import (
    MAX_CONFIGURATIONS,
    SpaceError,
    covering_picks,
    load_space,
    sample_trials,
    study_name_from,
)
from raydml.search_space.yaml_reader import read_yaml

# Line 1 is "trial:", each key below it has the line one counts here.
TRIAL = """\
trial:
  data: {name: digits, resize_px: 8, crop_px: 8}
  model: {backbone: convnet, weights: none}
  loss: {name: margin}
  miner: {name: distance_weighted}
  sampler: {name: class_balanced}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_space(*parts: str):
        (tmp_path / "space.yaml").write_text("".join(textwrap.dedent(part) for part in parts), encoding="utf-8")
        return "space.yaml"

    return write_space


def problems_of(path, overrides=()):
    with pytest.raises(SpaceError) as caught:
        load_space(path, overrides)
    return caught.value


def problem_of(path, overrides=()):
    """The only problem of a space."""
    (problem,) = problems_of(path, overrides).problems
    return problem


def read(text):
    node, problems = read_yaml(text, "x.yaml")
    return node and to_plain(node), problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-4", 0.0001), ("1E5", 100000.0), (".5e-3", 0.0005), ("-2.e+1", -20.0), ("3", 3), ("-3", -3), ("010", 10)),
        *(("true", True), ("null", None), ("~", None), ("none", "none"), ("no", "no"), ("on", "on"), ("1e", "1e")),
        *(("e5", "e5"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("'1e-4'", "1e-4")),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    found, problems = read(f"a: {text}")
    assert problems == []
    assert found == {"a": value}
    assert type(found["a"]) is type(value)
    infinite, _ = read("[.inf, -.inf, .nan]")
    assert infinite[:2] == [math.inf, -math.inf]
    assert math.isnan(infinite[2])


def test_a_key_written_twice_is_reported_with_both_lines():
    _, problems = read("a:\n  b: 1\n  c: 2\n  b: 3\n")
    assert str(problems[0]) == "x.yaml:4: a.b: is written twice, first at x.yaml:2\n    cure: keep one of the two"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system [x]", "tags are not used here"),
        ("a: !include b.yaml", "tags are not used here"),
        ("a: !!int abc", "tags are not used here"),
        ("a: &x {b: *x}", "contains itself"),
        ("3: 4", "is not a usable key"),
        ("a: {<<: {b: 1}}", "is not a usable key"),
        ("? [a, b]\n: 1", "is not a usable key"),
    ],
)
def test_what_is_refused(text, words):
    _, problems = read(text)
    assert [words in problem.message for problem in problems] == [True]
    assert problems[0].where == "x.yaml:1"


def test_broken_syntax_names_the_line(write):
    error = problems_of(write("trial:\n  a: [1, 2\n  b: 3\n"))
    assert str(error).startswith("1 problem in the configuration:\nspace.yaml:3: ")
    assert "is not YAML" in str(error)


def test_a_file_that_is_not_there_and_one_that_is_no_mapping(write):
    assert "cannot be read" in str(problems_of("nowhere.yaml"))
    assert "space.yaml:1: " in str(problems_of(write("- a\n- b\n")))
    assert {problem.path for problem in problems_of(write("")).problems} == {
        "trial.data", "trial.model", "trial.loss", "trial.sampler"
    }  # fmt: skip


TEN = """\
study: {search: {num_trials: 2, schedular: asha}}
trial:
  epochs: "10"
  data: {name: digits, resize_px: 8, crop_px: 12}
  model: {backbone: convnet, weights: none, embedding_dims: 64}
  loss:
    choice:
      - {name: multi_similarity}
      - {name: margin, beta: {uniform: [-1, 2]}}
  miner:
    choice:
      - {name: distance_weighted}
      - {name: multi_similarty}
  sampler: {name: class_balanced, images_per_class: 4, images_per_class: 8}
  optimizer:
    name: adamw
    learning_rate: {logunifrom: [1e-6, 1e-3]}
    weight_decay: {loguniform: [1e-3, 1e-6]}
    momentum: 0.9
"""
# The eleventh, a miner that does not fit the loss, is looked for when these are mended: it takes the plugins' code.
MESSAGES = [
    """\
space.yaml:1: study.search.schedular = 'asha': is an unknown key
    choices: num_trials, max_concurrent, scheduler, grace_epochs, reduction_factor, searcher, first, balance, \
generation, folds
    did you mean: scheduler
    cure: write scheduler""",
    """\
space.yaml:3: trial.epochs = '10': must be a whole number
    cure: write 10 without quotes""",
    """\
space.yaml:5: trial.model.embedding_dims = 64: is an unknown key
    choices: backbone, weights, embedding_dim, layer_norm, normalize, freeze_batch_norm, pooling, dropout, projection, \
head_init, train, drop_path, gradient_checkpointing, bn_neck
    did you mean: embedding_dim
    cure: write embedding_dim""",
    """\
space.yaml:4: trial.data.crop_px = 12: is larger than resize_px, 8: the crop is cut out of the resized image
    cure: write at most 8, or raise resize_px""",
    """\
space.yaml:9: trial.loss.beta = -1: must be > 0
    cure: give a number > 0""",
    """\
    did you mean: multi_similarity
    cure: write multi_similarity""",
    """\
space.yaml:14: trial.sampler.images_per_class: is written twice, first at space.yaml:14
    cure: keep one of the two""",
    """\
space.yaml:17: trial.optimizer.learning_rate = {logunifrom: [1e-06, 0.001]}: logunifrom is not a domain
    choices: choice, grid, uniform, loguniform, randint, quniform
    did you mean: loguniform
    cure: write loguniform""",
    """\
space.yaml:18: trial.optimizer.weight_decay = {loguniform: [0.001, 1e-06]}: its bounds are reversed
    cure: write {loguniform: [1e-06, 0.001]}""",
    """\
space.yaml:19: trial.optimizer.momentum = 0.9: is not used by adamw; it is by sgd, rmsprop
    choices: learning_rate, backbone_learning_rate, loss_learning_rate, weight_decay, loss_weight_decay, \
gradient_clip, layer_decay, ema
    cure: remove momentum, or set name to sgd or rmsprop""",
]


def test_the_ten_commonest_mistakes_at_once(write):
    error = problems_of(write(TEN))
    text = str(error)
    for message in MESSAGES:
        assert message in text
    assert "space.yaml:13: trial.miner.name = 'multi_similarty': is not one of the miners\n    choices: " in text
    assert len(error.problems) == len(MESSAGES)
    assert text.startswith(f"{len(MESSAGES)} problems in the configuration:\n")


def test_a_miner_that_does_not_fit_is_found_when_nothing_else_is_wrong(write):
    mended = {"schedular": "scheduler", '"10"': "10", "crop_px: 12": "crop_px: 8", "embedding_dims": "embedding_dim"}
    mended |= {"[-1, 2]": "[1, 2]", "multi_similarty": "multi_similarity", ", images_per_class: 8": ""}
    mended |= {"logunifrom": "loguniform", "[1e-3, 1e-6]": "[1e-6, 1e-3]", "    momentum: 0.9\n": ""}
    text = TEN
    for wrong, right in mended.items():
        assert wrong in text
        text = text.replace(wrong, right)
    message = str(problems_of(write(text)))
    expected = (
        "space.yaml:12: trial.miner.name = 'distance_weighted': yields triplets, and loss multi_similarity takes pairs"
    )
    assert f"{expected}\n    choices: deep_metric_semi_hard, inverse_gaussian, multi_similarity, n_pair" in message


CANNOT = "first cannot be drawn"


def tree(text):
    node, problems = read_yaml(text, "x.yaml")
    assert problems == []
    found = []
    return with_domains(node, "trial", found), found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{choice: []}", "choice is empty"),
        ("{choice: 3}", "choice needs a list"),
        *((f"{{uniform: {ends}}}", "uniform needs 2 numbers") for ends in ("[1]", "[1, true]", "[0, .inf]", "[a, b]")),
        ("{uniform: [2, 1]}", "bounds are reversed"),
        ("{loguniform: [0, 1]}", "lower bound must be > 0"),
        ("{loguniform: [-1, 1]}", "lower bound must be > 0"),
        ("{randint: [1.5, 3]}", "randint needs whole numbers"),
        ("{randint: [3, 3]}", "is empty: the upper end is excluded"),
        ("{quniform: [0, 1]}", "quniform needs 3 numbers"),
        ("{quniform: [0, 1, 0]}", "its step q must be > 0"),
        ("{quniform: [0, 1, 0.3]}", "steps of 0.3 from 0 do not reach 1"),
        ("{choice: [1, {grid: [2, 3]}]}", "a grid inside a choice"),
        ("{choise: [1, 2]}", "choise is not a domain"),
        ("{QUniform: [1, 2, 1]}", "QUniform is not a domain"),
        *((f"{{uniform: [1, 2], first: {first}}}", CANNOT) for first in ("2.5", "true", "many", "[1]")),
        *((f"{{randint: [1, 5], first: {first}}}", CANNOT) for first in ("5", "2.0")),
        ("{loguniform: [1e-3, 1], first: 0}", CANNOT),
        ("{quniform: [0.1, 0.5, 0.1], first: 0.25}", CANNOT),
        ("{choice: [1, 2], first: 3}", "first is none of its items"),
        ("{choice: [1, 2], first: true}", "first is none of its items"),
        ("{grid: [1, 2], first: 2}", "a grid runs all its items"),
        ("{uniform: [1, 2], frist: 1}", "frist is beside uniform"),
        ("{uniform: [1, 2], choice: [1]}", "is beside"),
        ("{unifrom: [1, 2], first: 1}", "unifrom is not a domain"),
    ],
)
def test_mistakes_in_domains(text, words):
    _, problems = tree(f"a: {text}")
    assert len(problems) == 1
    assert problems[0].path == "trial.a" or (problems[0].path.startswith("trial.a.") and "first" not in text)
    assert words in problems[0].message
    assert problems[0].where == "x.yaml:1"
    assert problems[0].cure


def test_a_block_with_one_key_is_not_a_domain():
    found, problems = tree("{schedule: {milestones: [2, 3]}, model: {weights: none}}")
    assert problems == []
    assert to_plain(found) == {"schedule": {"milestones": [2, 3]}, "model": {"weights": "none"}}


def draw_many(text, field, number=200):
    import numpy as np

    node, problems = tree(f"a: {text}")
    assert problems == []
    generator = np.random.default_rng(0)
    assert field is None or isinstance(node.value["a"].value, field)
    return [node.value["a"].value.draw(generator) for _ in range(number)]


def test_quniform_has_no_float_noise_and_all_steps():
    assert sorted(set(draw_many("{quniform: [0.1, 0.7, 0.1]}", Range))) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    drawn = set(draw_many("{quniform: [32, 96, 16]}", Range))
    assert drawn == {32, 48, 64, 80, 96}
    assert all(isinstance(number, int) for number in drawn)


def test_randint_excludes_its_upper_end():
    drawn = draw_many("{randint: [2, 5]}", Range)
    assert set(drawn) == {2, 3, 4}
    assert all(isinstance(number, int) for number in drawn)


def test_uniform_and_loguniform_stay_inside_and_have_six_digits():
    drawn = draw_many("{uniform: [-0.25, 0.5]}", Range, 2000)
    assert -0.25 <= min(drawn) < -0.24
    assert 0.49 < max(drawn) <= 0.5
    logs = draw_many("{loguniform: [1e-6, 1e-2]}", Range, 2000)
    assert all(1e-6 <= number <= 1e-2 for number in logs)
    # A quarter of the draws in each of the four decades: 500, with a standard deviation of 19.4.
    for decade in range(-6, -2):
        assert abs(sum(10**decade <= number < 10 ** (decade + 1) for number in logs) - 500) < 80
    assert all(len(f"{number:e}".split("e")[0].rstrip("0").replace(".", "")) <= 6 for number in logs)


def test_ends():
    assert Range("uniform", 0.1, 0.4).ends() == (0.1, 0.4)
    assert Range("randint", 1, 5).ends() == (1, 4)
    assert Range("randint", 1, 2).ends() == (1,)
    assert Range("quniform", 0.0, 0.3, 0.1).ends() == (0.0, 0.3)


SHARED = """\
trial:
  data: {name: digits, resize_px: 8, crop_px: 8}
  model: {backbone: convnet, weights: none}
  loss, miner:
    choice:
      - loss: {name: margin, beta: {uniform: [0.6, 1.2]}}
        miner: {name: distance_weighted}
      - loss: {name: normalized_softmax}
  sampler: {name: class_balanced}
"""


def test_one_choice_supplies_two_keys(write):
    path = write(SHARED)
    trials = sample_trials(load_space(path, ["study.search.num_trials=8", "trial.seed={randint: [0, 1000]}"]))
    pairs = {(trial.loss.name, trial.miner and trial.miner.name) for trial in trials}
    assert pairs == {("margin", "distance_weighted"), ("normalized_softmax", None)}


def test_independent_choices_that_clash_are_reported_and_cured_by_one_choice(write):
    independent = SHARED.replace(SHARED[SHARED.index("  loss, miner") : SHARED.index("  sampler")], "") + (
        "  loss: {choice: [{name: margin}, {name: normalized_softmax}]}\n"
        "  miner: {choice: [null, {name: distance_weighted}]}\n"
    )
    problem = problem_of(write(independent))
    assert problem.where == "space.yaml:6"
    assert problem.message == "loss normalized_softmax learns from labels alone and takes no miner"
    assert "put them into one choice of blocks (key `loss, miner" in problem.cure


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("{'a, b': {choice: [{a: 1, c: 2}]}}", "trial.c", "is not among the keys"),
        ("{'a, b': {choice: [{a: 1}]}, b: 3}", "trial.b", "a second time"),
        ("{'a, a': {choice: [{a: 1}]}}", "trial.a", "a second time"),
        ("{'a, b': {choice: [3]}}", "trial.a, b", "needs a choice of blocks"),
        ("{'a, b': 3}", "trial.a, b", "needs a choice of blocks"),
        ("{'a, b': {choice: [{choice: [{a: 1}, {d: 2}]}]}}", "trial.d", "is not among the keys"),
    ],
)
def test_mistakes_in_shared_keys(text, path, words):
    _, problems = tree(text)
    assert problems
    assert {problem.path for problem in problems} == {path}
    assert all(words in problem.message for problem in problems)


def test_a_mistake_in_a_block_has_its_line(write):
    problem = problem_of(write(SHARED.replace("name: margin,", "name: margin, nuu: 0.1,")))
    assert (problem.where, problem.path, problem.nearest) == ("space.yaml:6", "trial.loss.nuu", "nu")


def test_every_alternative_both_ends_and_every_pair_are_looked_at():
    node, _ = tree("{a: {choice: [1, {choice: [2, 3]}]}, b: {uniform: [0, 1]}, c: [{grid: [x, y]}, {randint: [5, 9]}]}")
    seen = [resolve(node, pick)[0] for pick in covering_picks(node)]
    for a in (1, 2, 3):
        for b in (0, 1):
            assert any(config["a"] == a and config["b"] == b for config in seen)
        for c in ("x", "y"):
            assert any(config["a"] == a and config["c"][0] == c for config in seen)
        for d in (5, 8):
            assert any(config["a"] == a and config["c"][1] == d for config in seen)


def test_the_check_is_bounded():
    keys = ", ".join(f"k{number}: {{choice: [1, 2, 3, 4, 5]}}" for number in range(40))
    node, _ = tree(f"{{{keys}}}")
    number = sum(1 for _ in covering_picks(node))
    assert number == 1 + 40 * 5 + MAX_CONFIGURATIONS


def test_an_invalid_alternative_deep_inside_is_found(write):
    inner = "{choice: [{name: margin, nu: {choice: [0, -3]}}]}"
    deep = TRIAL.replace("{name: margin}", f"{{choice: [{{name: margin}}, {inner}]}}")
    problem = problem_of(write(deep))
    assert (problem.where, problem.path, problem.value) == ("space.yaml:4", "trial.loss.nu", -3)


def test_the_study_must_fit_the_trials_and_takes_no_domains(write):
    study = """\
    study:
      search: {grace_epochs: 30}
      confirm: {folds: 9}
    """
    found = {problem.path: problem for problem in problems_of(write(study, TRIAL)).problems}
    assert found["study.confirm.folds"].where == "space.yaml:3"
    assert found["study.search.grace_epochs"].where == "space.yaml:2"
    (problem,) = problems_of(write("machine:\n  device: {choice: [cpu, cuda]}\n", TRIAL)).problems
    assert (problem.where, problem.path) == ("space.yaml:2", "machine.device")
    assert "only values below trial are" in problem.message


def test_images_in_a_folder_need_the_folder(write):
    path = write(TRIAL.replace("name: digits", "name: image_folder"))
    (problem,) = problems_of(path).problems
    assert problem.path == "machine.data_root"
    assert "--data-root FOLDER" in problem.cure
    assert str(load_space(path, ["machine.data_root=/images"]).machine.data_root) == "/images"


def test_overrides_are_yaml_and_may_be_domains(write):
    overrides = ["study.name=mine", "study.search.num_trials=3", "trial.optimizer={name: sgd, momentum: 0.9}"]
    overrides += ["trial.optimizer.learning_rate={loguniform: [1e-4, 1e-2]}", "trial.miner=null"]
    space = load_space(write(TRIAL), overrides)
    trials = sample_trials(space)
    assert space.study.name == "mine"
    assert load_space("space.yaml").study.name == "space", "the name of its file"
    assert len({trial.optimizer.learning_rate for trial in trials}) == 3
    assert all(trial.miner is None and trial.optimizer.momentum == 0.9 for trial in trials)


def test_an_override_takes_the_place_of_what_a_choice_of_blocks_says(write):
    space = load_space(write(SHARED), ["trial.miner=null"])
    assert all(trial.miner is None for trial in sample_trials(space))


def test_domains_and_overrides_inside_the_blocks_of_a_method(write):
    loss = "auxiliary_loss: {name: margin, beta: {uniform: [0.5, 0.9], first: 0.6}}"
    miner = "auxiliary_miner: {choice: [null, {name: all}]}"
    path = write(TRIAL + f"  method:\n    name: mic\n    {loss}\n    {miner}\n")
    first, *others = sample_trials(load_space(path, ["study.search.num_trials=6"]))
    assert first.method.settings["auxiliary_loss"]["beta"] == 0.6
    assert all(0.5 <= trial.method.settings["auxiliary_loss"]["beta"] <= 0.9 for trial in others)
    assert {trial.method.settings.get("auxiliary_miner", {}).get("name") for trial in others} == {None, "all"}
    (only,) = sample_trials(load_space(path, ["trial.method.auxiliary_loss.beta=0.8"]))
    assert only.method.settings["auxiliary_loss"]["beta"] == 0.8
    problem = problem_of(path, ["trial.method.auxiliary_loss.bta=0.8"])
    assert (problem.path, problem.nearest, problem.where) == ("trial.method.auxiliary_loss.bta", "beta", "--set")
    problem = problem_of(path, ["trial.method.auxiliary_loss.beta={uniform: [-0.5, 0.9]}"])
    assert (problem.path, problem.message) == ("trial.method.auxiliary_loss.beta", "must be > 0")


def test_mistakes_in_overrides_name_set(write):
    overrides = [
        "epochs=3",
        "tria.epochs=3",
        "trial.epochs",
        "trial.loss.beta.x=3",
        "trial.epoch=3",
        "trial.model=[",
        ".a=1",
    ]
    found = {problem.path: problem for problem in problems_of(write(TRIAL), overrides).problems}
    assert all(problem.where == "--set" for problem in found.values())
    assert (found["epochs"].cure, found["tria.epochs"].cure) == ("write trial.epochs", "write trial.epochs")
    assert "has no =" in found["trial.epochs"].message
    assert found["trial.epoch"].nearest == "epochs"
    assert "is not YAML" in found["trial.model"].message
    assert set(found) == {
        "epochs",
        "tria.epochs",
        "trial.epochs",
        "trial.loss.beta",
        "trial.epoch",
        "trial.model",
        ".a=1",
    }


BLOCKS = """\
trial:
  data: {name: digits, resize_px: 8, crop_px: 8}
  model: {backbone: convnet, weights: none}
  loss, miner, sampler:
    choice:
      - loss: {name: margin, beta: 0.7}
        miner: {name: distance_weighted}
        sampler: {name: class_balanced, classes_per_batch: {choice: [8, 16]}, images_per_class: 2}
      - loss: {choice: [{name: contrastive}, {name: margin}]}
        miner: {choice: [null, {name: multi_similarity, epsilon: 0.1}]}
        sampler: {name: class_balanced}
      - loss: {name: normalized_softmax}
        sampler: {name: uniform, batch_size: 64}
"""


def test_an_override_reaches_every_block_whose_plugin_has_the_key(write, caplog):
    with caplog.at_level(logging.INFO, "raydml"):
        space = load_space(write(BLOCKS), ["trial.sampler.classes_per_batch=4", "trial.loss.beta={uniform: [1, 2]}"])
    first, second, third = to_plain(space.trial)["loss, miner, sampler"]["choice"]
    assert first["sampler"] == {"name": "class_balanced", "classes_per_batch": 4, "images_per_class": 2}
    assert (second["sampler"]["classes_per_batch"], third["sampler"]) == (4, {"name": "uniform", "batch_size": 64})
    assert first["loss"]["beta"] == {"uniform": [1, 2]}
    assert second["loss"] == {"choice": [{"name": "contrastive"}, {"name": "margin", "beta": {"uniform": [1, 2]}}]}
    notes = [record.getMessage() for record in caplog.records]
    assert notes == [
        f"note: --set trial.{key}: set in 2 blocks of `loss, miner, sampler`; {lacking} no such key"
        for key, lacking in (
            ("sampler.classes_per_batch", "uniform has"),
            ("loss.beta", "contrastive, normalized_softmax have"),
        )
    ]


def test_an_override_reaches_the_blocks_of_a_choice_and_its_first(write):
    choice = "{choice: [{name: margin, beta: 0.5}, {name: triplet}], first: {name: margin, beta: 0.5}}"
    space = load_space(write(TRIAL.replace("{name: margin}", choice)), ["trial.loss.beta=0.9"])
    assert sample_trials(space)[0].loss.settings["beta"] == 0.9
    optimizers = f"{TRIAL}  optimizer: {{choice: [{{name: sgd}}, {{name: adamw}}]}}\n"
    space = load_space(write(optimizers), ["trial.optimizer.weight_decay=0.5"])
    assert {trial.optimizer.weight_decay for trial in sample_trials(space)} == {0.5}


def test_a_key_that_no_block_has_is_refused(write):
    problem = problem_of(write(BLOCKS), ["trial.sampler.clases_per_batch=4"])
    assert problem.message == "no block of `loss, miner, sampler` has this key (class_balanced, uniform)"
    assert (problem.nearest, problem.where) == ("classes_per_batch", "--set")
    assert problem.cure.startswith("set trial.sampler as a whole")
    assert "no block" in problem_of(write(BLOCKS), ["trial.miner.nothing=1"]).message
    named = problem_of(write(BLOCKS), ["trial.loss.name=triplet"])
    assert named.cure.startswith("set trial.loss as a whole")
    plain = write(TRIAL.replace("{name: margin}", "{name: margin, beta: {choice: [1.0, 2.0]}}"))
    assert problem_of(plain, ["trial.loss.beta.x=1.0"]).message == "trial.loss.beta is a choice"


RANDOM = f"""{TRIAL}\
  optimizer: {{name: adamw, learning_rate: {{loguniform: [1e-5, 1e-2]}}}}
  epochs: {{randint: [1, 100]}}
"""


def test_same_seed_same_trials_and_fewer_trials_are_the_first_ones(write):
    path = write(RANDOM)
    sixteen, again, eight, other = (
        sample_trials(load_space(path, [f"study.search.num_trials={number}", f"study.seed={seed}"]))
        for number, seed in ((16, 5), (16, 5), (8, 5), (16, 6))
    )
    assert sixteen == again
    assert sixteen[:8] == eight
    assert not {fingerprint(trial) for trial in sixteen} & {fingerprint(trial) for trial in other}
    assert len({fingerprint(trial) for trial in sixteen}) == 16


def test_the_seed_of_a_trial_is_that_of_the_study_unless_said_otherwise(write):
    path = write(RANDOM)
    assert sample_trials(load_space(path, ["study.seed=7"]))[0].seed == 7
    assert sample_trials(load_space(path, ["study.seed=7", "trial.seed=3"]))[0].seed == 3


def test_choices_are_dealt_so_that_each_alternative_gets_its_share(write):
    choice = "trial.model.embedding_dim={choice: [4, 8, 16, 32]}"
    for seed in range(5):
        path = write(RANDOM)
        trials = sample_trials(load_space(path, [choice, "study.search.num_trials=16", f"study.seed={seed}"]))
        dims = [trial.model.embedding_dim for trial in trials]
        assert [dims.count(dim) for dim in (4, 8, 16, 32)] == [4, 4, 4, 4]


def test_a_grid_is_a_product_each_point_num_trials_times(write):
    grids = ["trial.model.embedding_dim={grid: [4, 8, 16]}", "trial.recall_at={grid: [[1], [1, 2]]}"]
    trials = sample_trials(load_space(write(RANDOM), [*grids, "study.search.num_trials=2"]))
    points = [(trial.model.embedding_dim, trial.recall_at) for trial in trials]
    expected = [(dim, ks) for dim in (4, 8, 16) for ks in ((1,), (1, 2))]
    assert sorted(points) == sorted(expected * 2)
    assert points[:6] == points[6:]  # round by round
    assert len({trial.optimizer.learning_rate for trial in trials}) == 12


def test_duplicates_are_drawn_again_until_all_are_different(write):
    small = TRIAL + "  epochs: {randint: [1, 4]}\n"
    space = load_space(write(small), ["trial.recall_at={choice: [[1], [2]]}", "study.search.num_trials=6"])
    trials = sample_trials(space)
    assert {(trial.epochs, trial.recall_at) for trial in trials} == {(e, (k,)) for e in (1, 2, 3) for k in (1, 2)}


@pytest.mark.parametrize(
    ("overrides", "distinct"),
    [
        (["trial.epochs={randint: [1, 4]}"], 3),
        (["trial.epochs={choice: [5, 5]}", "trial.model.embedding_dim={choice: [8, 8, 8]}"], 1),
        (["trial.epochs={grid: [1, 2]}"], 2),
    ],
)
def test_too_few_configurations_is_an_error_that_counts_them(write, overrides, distinct):
    space = load_space(write(TRIAL), [*overrides, "study.search.num_trials=4"])
    with pytest.raises(SpaceError) as caught:
        sample_trials(space)
    assert f"only {distinct} distinct configuration(s)" in str(caught.value)
    assert caught.value.problems[0].path == "study.search.num_trials"


def test_counting_configurations():
    node, _ = tree("{a: {choice: [1, {choice: [2, 3]}, {b: {randint: [0, 4]}}]}, c: {quniform: [0, 1, 0.25]}, d: 3}")
    assert num_configurations(node) == (1 + 2 + 4) * 5
    node, _ = tree("{a: {choice: [1, {uniform: [0, 1]}]}}")
    assert num_configurations(node) == math.inf


def test_to_dict_is_the_space_as_written(write):
    space = load_space(write(RANDOM), ["study.name=x"])
    written = space.to_dict()
    assert written["study"]["name"] == "x"
    assert written["trial"]["optimizer"] == {"name": "adamw", "learning_rate": {"loguniform": [1e-5, 1e-2]}}
    assert written["trial"]["epochs"] == {"randint": [1, 100]}


FIRSTS = """\
trial:
  data: {name: digits, resize_px: 8, crop_px: 8}
  model: {backbone: convnet, weights: none, embedding_dim: {choice: [8, 16, 32], first: 32}}
  loss, miner:
    choice:
      - loss: {name: margin, beta: {uniform: [0.6, 1.2], first: 1}}
        miner: {name: distance_weighted}
      - loss: {name: normalized_softmax, temperature: {loguniform: [0.01, 0.1]}}
  sampler: {name: class_balanced}
  recall_at: {choice: [[1, 2], [1]]}
  optimizer: {name: adamw, learning_rate: {loguniform: [1e-5, 1e-2], first: 1e-4}}
  epochs: {randint: [1, 100], first: 99}
"""
WITHOUT_FIRSTS = FIRSTS.replace(", first: 32", "").replace(", first: 1e-4", "").replace(", first: 99", "")
WITHOUT_FIRSTS = WITHOUT_FIRSTS.replace(", first: 1", "")


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_trial_0_is_the_published_point_and_all_others_are_drawn_as_without(write, seed):
    overrides = ["study.search.num_trials=12", f"study.seed={seed}"]
    plain = sample_trials(load_space(write(WITHOUT_FIRSTS), overrides))
    first, *others = sample_trials(load_space(write(FIRSTS), overrides))
    assert (first.model.embedding_dim, first.loss.name, first.loss.settings["beta"]) == (32, "margin", 1.0)
    assert (first.optimizer.learning_rate, first.epochs) == (1e-4, 99)
    assert first.recall_at == (1, 2)  # the first item
    assert (first.miner.name, first.seed) == ("distance_weighted", seed)
    assert others == plain[1:]
    assert first != plain[0]


def test_a_choice_of_blocks_may_name_its_block(write):
    blocks = "{choice: [{name: margin, beta: 1.0}, {name: margin, beta: 0.5}, {name: triplet}], first: %s}"
    path = write(TRIAL.replace("{name: margin}", blocks % "{beta: 0.5, name: margin}"))
    assert sample_trials(load_space(path))[0].loss.settings["beta"] == 0.5
    (problem,) = problems_of(write(TRIAL.replace("{name: margin}", blocks % "{name: margin}"))).problems
    assert problem.message == "first is none of its items"


def test_with_grids_trial_0_is_the_first_point_with_the_published_values(write):
    overrides = ["trial.epochs={grid: [5, 6]}", "study.search.num_trials=3"]
    plain = sample_trials(load_space(write(WITHOUT_FIRSTS), overrides))
    first, *others = sample_trials(load_space(write(FIRSTS), overrides))
    assert (first.epochs, first.optimizer.learning_rate, first.model.embedding_dim) == (5, 1e-4, 32)
    assert [trial.epochs for trial in others] == [6, 5, 6, 5, 6]
    assert others == plain[1:]


def test_the_published_point_is_not_drawn_a_second_time(write):
    small = TRIAL + "  epochs: {randint: [1, 4], first: 3}\n"
    for seed in range(6):
        trials = sample_trials(load_space(write(small), ["study.search.num_trials=3", f"study.seed={seed}"]))
        assert trials[0].epochs == 3
        assert {trial.epochs for trial in trials} == {1, 2, 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{uniform: [1, 2], first: 1}", 1),
        ("{uniform: [1, 2], first: 2}", 2),
        ("{loguniform: [1e-5, 1], first: 1e-5}", 1e-5),
        ("{randint: [1, 5], first: 4}", 4),
        ("{quniform: [0.1, 0.7, 0.1], first: 0.3}", 0.3),
        ("{choice: [0, 1, 2], first: 0}", 0),
        ("{choice: [null, true], first: null}", None),
    ],
)
def test_the_ends_and_all_steps_may_be_published(text, value):
    node, problems = tree(f"a: {text}")
    assert problems == []
    assert resolve(node, published_point)[0] == {"a": value}
    assert to_plain(node)["a"]["first"] == value


def test_a_range_without_first_beside_domains_with_one_is_named_with_place_and_cure(write):
    problem = problem_of(write(FIRSTS.replace(", first: 99", "")))
    assert (problem.where, problem.path) == ("space.yaml:12", "trial.epochs")
    assert problem.message.startswith("names no first")
    assert problem.cure == "write {randint: [1, 100], first: VALUE}, or remove every first"


def test_a_first_that_the_published_point_does_not_pass_is_refused(write):
    problem = problem_of(write(FIRSTS.replace("[0.01, 0.1]}", "[0.01, 0.1], first: 0.05}")))
    assert (problem.where, problem.path) == ("space.yaml:8", "trial.loss.temperature")
    assert "has no effect" in problem.message


def test_a_block_named_first_is_passed_and_the_others_need_no_first(write):
    space = FIRSTS.replace("beta: {uniform: [0.6, 1.2], first: 1}", "beta: {uniform: [0.6, 1.2]}")
    space = space.replace("loguniform: [0.01, 0.1]", "loguniform: [0.01, 0.1], first: 0.05")
    named = space.replace("  sampler:", "    first: {loss: {name: normalized_softmax, temperature: %s}}\n  sampler:")
    path = write(named % "{loguniform: [0.01, 0.1], first: 0.05}")
    assert sample_trials(load_space(path))[0].loss.settings == {"temperature": 0.05}


def test_set_replaces_first_alone_or_what_needed_one(write):
    path = write(FIRSTS)
    space = load_space(path, ["trial.optimizer.learning_rate.first=1e-3", "trial.epochs=7"])
    first = sample_trials(space)[0]
    assert (first.optimizer.learning_rate, first.epochs) == (1e-3, 7)
    # What takes the place of a block's key takes its first with it.
    replaced = load_space(path, ["trial.loss={name: triplet}", "trial.miner={name: random}"])
    assert sample_trials(replaced)[0].loss.name == "triplet"
    (problem,) = problems_of(path, ["trial.epochs={randint: [1, 5]}"]).problems
    assert (problem.where, problem.path) == ("--set", "trial.epochs")


def test_the_published_point_is_checked_before_anything_starts(write):
    # 8 learners divide both ends of the range, and not the published value between them.
    space = TRIAL.replace("weights: none", "weights: none, embedding_dim: {quniform: [8, 16, 4], first: 12}")
    space += "  method: {name: divide_conquer, num_learners: 8}\n"
    assert "12" in str(problems_of(write(space)))
    assert load_space(write(space.replace("first: 12", "first: 16")))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 10)}]\n" for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: " + "[" * 400 + "]" * 400, "more than 50 levels"),
        ("a: " + "{a: " * 100 + "1" + "}" * 100, "more than 50 levels"),
    ],
    ids=["aliases", "lists", "blocks"],
)
def test_documents_that_no_configuration_is_are_refused_in_bounded_time(text, part):
    started = time.process_time()
    node, (problem,) = read_yaml(text, "x.yaml")
    assert node is None
    assert part in problem.message
    assert problem.where.startswith("x.yaml:")
    assert time.process_time() - started < 10


@pytest.mark.parametrize("text", ["1" * 30_000 + "x", "1." + "1" * 30_000 + "x", "1e" + "1" * 30_000 + "x"])
def test_a_long_text_that_begins_like_a_number_takes_no_time(text):
    started = time.process_time()
    assert read(f"a: {text}") == ({"a": text}, [])
    assert time.process_time() - started < 3


@pytest.mark.parametrize("num_levels", [60, 400])
def test_lists_inside_lists_are_refused_with_their_line(num_levels):
    _, (problem,) = read_yaml("a: 1\nb: [2]\nc: " + "[" * num_levels + "]" * num_levels + "\nd: 3\n", "x.yaml")
    assert problem.where == "x.yaml:3"


@pytest.mark.parametrize("text", ["1" * 5000, "-" + "9" * 19, "99999999999999999999"])
def test_a_number_of_too_many_digits_is_called_one(text):
    _, (problem,) = read_yaml(f"b: 1\na: {text}", "x.yaml")
    assert str(problem).startswith(f"x.yaml:2: a: is a whole number of {len(text.lstrip('-')):,} digits")
    assert "tag" not in str(problem)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"\\ud83d\\ude00"', "😀"),  # as JSON files and json.dumps write it
        ("😀 𠮷", "😀 𠮷"),
        ("caf\udce9", "caf\udce9"),  # a byte of a command line or a file name that is not UTF-8
        ('"caf\\udce9"', "caf\udce9"),
    ],
)
def test_letters_beyond_u_ffff_and_names_outside_utf_8(text, value):
    assert read(f"a: {text}") == ({"a": value}, [])


@pytest.mark.parametrize(("text", "part"), [('"\\ud83d"', "half of a letter"), ("\0", "U+0000")])
def test_what_is_no_text_is_refused_with_its_line(text, part):
    _, (problem,) = read_yaml(f"b: 1\na: {text}", "x.yaml")
    assert str(problem).startswith("x.yaml:2: ")
    assert part in problem.message


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(write):
    path = write(TEN)
    with open(path, "ab") as handle:
        handle.write(b"# two\n# caf\xe9\n")
    message = str(problems_of(path))
    assert f"space.yaml:{TEN.count(chr(10)) + 2}: is not UTF-8: byte 0xe9\n    cure: save the file in UTF-8" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [("my photos", "my-photos"), ("cache", "cache-study"), ("MLflow.db", "MLflow.db-study"), ("..", "study")],
)
def test_a_study_named_after_a_file_or_folder_has_a_usable_name(name, expected):
    assert study_name_from(name) == expected
    parse_study({"name": study_name_from("ü" * 300)})
    parse_study({"name": study_name_from("cache" + "x" * 300)})


def test_what_needs_validation_classes_is_refused_where_none_validates_all_at_once_with_its_line(write):
    study = """\
        study:
          search: {scheduler: asha}
          confirm: {top: 2, folds: 2}
          finalize: {top: 2}
        """
    path = write(study, TRIAL + "  select_on: val_recall_at_1\n")
    unvalidated = "trial.data.split={val_fraction: 0}"
    found = {p.path: p for p in problems_of(path, [unvalidated]).problems}
    assert {path: (problem.where, problem.cure) for path, problem in found.items()} == {
        "study.search.scheduler": ("space.yaml:2", "remove it, or write none"),
        "study.confirm": ("space.yaml:3", "--set study.confirm=null"),
        "study.refit": ("space.yaml:1", "--set 'study.refit={seeds: 3}'"),
        "study.finalize.top": ("space.yaml:4", "--set study.finalize.top=1"),
        "trial.select_on": ("space.yaml:11", "remove it, or write a val_fraction above 0 such as 0.25"),
    }
    assert all("val_fraction is 0" in problem.message for problem in found.values())
    # The epochs of a trial are its own, and each configuration is trained.
    overrides = [unvalidated, "study.search.scheduler=none", "study.confirm=null", "study.refit={top: 2, epochs: 40}"]
    found = {p.path: p.cure for p in problems_of(path, overrides).problems}
    assert set(found) == {"study.refit.top", "study.refit.epochs", "study.finalize.top", "trial.select_on"}
    assert "trial.epochs=40" in found["study.refit.epochs"]


def test_defaults_that_have_no_use_without_validation_are_not_refused(write):
    path = write(TRIAL)
    overrides = ["trial.data.split.val_fraction=0", "study.refit={seeds: 2}", "study.finalize={top: 1}"]
    space = load_space(path, overrides)
    assert (space.study.search.scheduler, sample_trials(space)[0].select_on) == ("asha", "val_map_at_r")
    assert problem_of(path, [*overrides, "study.search.scheduler=sync"]).path == "study.search.scheduler"
    assert problem_of(path, [*overrides, "study.refit.classes=all"]).path == "study.finalize"
    varying = ["trial.data.split.val_fraction={choice: [0, 0.25]}", *overrides[1:]]
    problem = problem_of(path, varying)
    assert (problem.path, problem.where) == ("trial.data.split.val_fraction", "--set")
    assert "cannot be ranked" in problem.message
    # A single trial has no stages.
    load_space(path, overrides[:1], bare_trial=True)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_space_in_utf_16_is_refused_by_the_name_of_its_encoding(write, encoding):
    path = Path(write(TRIAL))
    path.write_bytes(path.read_text().encode(encoding))
    (problem,) = problems_of(path).problems
    assert (problem.where, problem.message) == (f"{path}:1", "is text in UTF-16, not in UTF-8")
    assert problem.cure.startswith("save the file in UTF-8")


def test_a_space_in_utf_8_with_a_byte_order_mark_is_read(write):
    path = Path(write(TRIAL))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert sample_trials(load_space(path))


def test_a_huge_file_is_refused_before_it_is_parsed(write):
    path = Path(write(TRIAL))
    with path.open("a") as file:
        file.write("# " + "x" * 2_000_000)
    started = time.process_time()
    assert "and a configuration at most 1,000,000" in str(problems_of(path))
    assert time.process_time() - started < 1


def test_a_zero_character_in_a_value_is_refused_with_its_line(write):
    path = write(TRIAL, 'machine:\n  cache_dir: "a\\0b"\n')
    (problem,) = problems_of(path).problems
    assert problem.path == "machine.cache_dir"
    assert problem.where.startswith("space.yaml:")
    assert problem.message == "holds the character U+0000, which no name or path has"
    (problem,) = problems_of(write(TRIAL), ['machine.cache_dir="a\\0b"']).problems
    assert (problem.where, "U+0000" in problem.message) == ("--set", True)
