"""Trial, Machine and StudySettings: what they accept, what they refuse, and how they say so."""

import copy
import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from raydml import registry
from raydml.config import rules
from raydml.config.trial import (
    Machine,
    StudySettings,
    Trial,
    fingerprint,
    parse_machine,
    parse_study,
    parse_trial,
    parse_values,
)
from raydml.errors import ConfigError
from raydml.training.parts import OPTIMIZERS
from tests.config.problems import problems_of

BASE = {
    "data": {"name": "digits", "resize_px": 8, "crop_px": 8},
    "model": {"backbone": "convnet", "weights": "none"},
    "loss": {"name": "margin"},
    "miner": {"name": "distance_weighted"},
    "sampler": {"name": "class_balanced"},
}


def trial_with(**changes):
    """BASE with values put at dotted paths: ``trial_with(**{"loss.name": "margin"})``; a block replaces a block."""
    raw = copy.deepcopy(BASE)
    for path, value in changes.items():
        *parents, key = path.split(".")
        here = raw
        for parent in parents:
            here = here.setdefault(parent, {})
        here[key] = value
    return raw


def problems_with(**changes):
    return problems_of(parse_trial, trial_with(**changes))


def test_defaults_are_filled_in_also_those_of_plugins_and_blocks_dump_flat():
    trial = parse_trial(BASE)
    assert trial.miner is not None
    assert (trial.loss.name, trial.loss.settings["margin"]) == ("margin", 0.2)
    assert trial.loss.settings["beta"] == 1.2  # Wu et al. 2017, the default of the loss's signature
    assert (trial.method.name, trial.optimizer.name, trial.recall_at) == ("plain", "adamw", (1, 2, 4, 8))
    dumped = trial.model_dump(mode="json")["loss"]
    assert (dumped["name"], dumped["margin"]) == ("margin", 0.2)


def test_json_there_and_back_is_the_same_trial():
    trial = parse_trial(trial_with(**{"data.augmentation": {"random_resized_crop": [0.2, 1]}, "recall_at": [1, 10]}))
    again = parse_trial(json.loads(json.dumps(trial.model_dump(mode="json"))))
    assert again == trial
    assert fingerprint(again) == fingerprint(trial)


def test_a_trial_cannot_be_changed():
    trial = parse_trial(BASE)
    with pytest.raises(ValueError, match="frozen"):
        trial.epochs = 3
    with pytest.raises(ValueError, match="frozen"):
        trial.loss.name = "contrastive"


def test_fingerprint_is_the_sha256_of_the_sorted_json():
    trial = parse_trial(BASE)
    text = json.dumps(json.loads(trial.model_dump_json()), sort_keys=True, separators=(",", ":"))
    assert fingerprint(trial) == hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def test_fingerprint_ignores_spelling_and_notices_meaning():
    same = [
        *(BASE, dict(reversed(BASE.items())), trial_with(**{"loss.margin": 0.2})),
        trial_with(optimizer={"name": "adamw"}, epochs=10),
        trial_with(optimizer={"name": "adamw", "weight_decay": 0}),  # an int where a float belongs
    ]
    changes = [{"seed": 1}, {"loss.margin": 0.3}, {"miner": None}, {"data.split.fold": 1}, {"data.content": "abc"}]
    (one,) = {fingerprint(parse_trial(raw)) for raw in same}
    assert len({one, *(fingerprint(parse_trial(trial_with(**change))) for change in changes)}) == 1 + len(changes)


def test_a_setting_that_was_added_later_changes_no_fingerprint_at_its_default():
    """The first number is that of the release before MIC got its auxiliary blocks."""
    old = trial_with(method={"name": "mic", "direction": "both"})
    written = trial_with(method={**old["method"], "auxiliary_loss": None, "class_to_auxiliary_weight": None})
    assert {fingerprint(parse_trial(raw)) for raw in (old, written)} == {"3992edd3efbd"}
    new = parse_trial(trial_with(method={**old["method"], "auxiliary_loss": MARGIN}))
    assert fingerprint(new) != "3992edd3efbd"
    assert new.method.settings["auxiliary_loss"]["beta"] == 1.2
    assert parse_trial(new.model_dump(mode="json")) == new


def test_settings_of_the_images_that_were_added_later_change_no_fingerprint_at_their_defaults():
    """The number is that of the release before they were added."""
    folder = trial_with(**{"data.name": "image_folder"})
    written = trial_with(**{"data.name": "image_folder", "data.min_images_per_class": 1})
    assert {fingerprint(parse_trial(raw)) for raw in (folder, written)} == {"be623f7f38cf"}
    cut = parse_trial(trial_with(**{"data.name": "image_folder", "data.min_images_per_class": 3}))
    assert fingerprint(cut) != "be623f7f38cf"
    assert parse_trial(cut.model_dump(mode="json")) == cut
    message = problems_with(**{"data.min_images_per_class": 3})["data.min_images_per_class"].message
    grouped = {"data.group": "parent", "data.exclude_same": "group"}
    assert parse_trial(trial_with(**{"data.name": "image_folder"}, **grouped)).data.exclude_same == "group"
    assert set(problems_with(**grouped)) == {"data.group"}
    assert set(problems_with(**{"data.name": "image_folder", "data.group": "camera"})) == {"data.group"}
    assert set(problems_with(**{"data.name": "image_folder", "data.exclude_same": "group"})) == {"data.exclude_same"}
    assert message.startswith("is not used by digits, whose classes are fixed; it is by image_folder")


def test_an_auxiliary_loss_with_parameters_is_enough_for_their_learning_rate():
    changes = {"loss": {"name": "contrastive"}, "optimizer": {"name": "adam", "loss_learning_rate": 0.1}}
    message = problems_with(**changes, method=MIC)["optimizer.loss_learning_rate"].message
    assert message == "has no effect: loss contrastive has no parameters of its own"
    parse_trial(trial_with(**changes, miner={"name": "all"}, method=MIC | {"auxiliary_loss": MARGIN}))


def test_an_int_will_do_for_a_float_and_a_bool_never_for_a_number():
    rate = parse_trial(trial_with(optimizer={"name": "sgd", "learning_rate": 1})).optimizer.learning_rate
    assert rate == 1.0
    assert isinstance(rate, float)
    found = problems_with(
        epochs=True, optimizer={"name": "sgd", "learning_rate": True, "momentum": False}, **{"loss.margin": True}
    )
    assert set(found) == {"epochs", "optimizer.learning_rate", "optimizer.momentum", "loss.margin"}
    assert found["epochs"].message == "must be a whole number"
    assert found["loss.margin"].message == "must be a number"


@pytest.mark.parametrize("bad", ["1e-4", float("nan"), float("inf"), None, [1.0], 0, -1])
def test_a_learning_rate_is_a_positive_finite_number(bad):
    assert set(problems_with(optimizer={"name": "adamw", "learning_rate": bad})) == {"optimizer.learning_rate"}


def test_all_problems_at_once_each_with_what_one_needs_to_cure_it():
    wrong = {"epoch": 3, "precision": "fp8", "compile": 1, "recall_at": [4, 1], "data.resize_px": 8.0}
    wrong |= {"loss": {"name": "margn"}, "sampler": {"name": "class_balanced", "images_per_clas": 3}}
    wrong |= {"schedule": {"name": "stpe"}, "data.split.fold": 7, "model.backbone": "resnet-50"}
    found = problems_with(**wrong)
    nearest = {"epoch": "epochs", "loss.name": "margin", "sampler.images_per_clas": "images_per_class"}
    nearest |= {"schedule.name": "step", "model.backbone": "resnet50"}
    assert {path: found[path].nearest for path in nearest} == nearest
    assert found["epoch"].value == 3
    assert found["precision"].choices == ("fp32", "bf16", "fp16")
    assert found["compile"].message == "must be true or false"
    assert found["schedule.name"].choices == ("constant", "cosine", "step", "exponential")
    assert found["data.resize_px"].cure == "write 8"
    assert set(found["loss.name"].choices) == set(registry.names("losses"))
    # The section `data` is broken, so that fold 7 of 4 cannot be seen; recall_at is checked all the same.
    assert found["recall_at"].message == "must rise"
    assert set(found) == {*nearest, "precision", "compile", "data.resize_px", "recall_at"}


def test_missing_keys_are_named_also_after_pickling():
    with pytest.raises(ConfigError) as caught:
        parse_trial({})
    again = pickle.loads(pickle.dumps(caught.value))
    for error in (caught.value, again):
        assert {problem.path for problem in error.problems} == {"data", "model", "loss", "sampler"}
        assert str(error).startswith("4 problems in the configuration:\n")
    assert str(again) == str(caught.value)


def test_a_plugin_block_is_no_name_and_an_unknown_name_gives_the_choices():
    assert problems_with(loss="margin")["loss"].cure == "write {name: margin}"
    assert problems_with(loss={"margin": 0.2})["loss.name"].choices == registry.names("losses")
    for block in ({}, {"name": "p_times_k"}):
        assert problems_with(sampler=block)["sampler.name"].choices == registry.names("samplers")


def test_settings_of_a_plugin_are_checked_by_its_signature():
    found = problems_with(loss={"name": "margin", "bta": 1.0, "margin": -1, "class_beta": "yes"})
    assert (found["loss.bta"].nearest, found["loss.margin"].message) == ("beta", "must be > 0")
    assert found["loss.class_beta"].message == "must be true or false"
    assert problems_with(method={"name": "plain", "clusters": 3})["method.clusters"].message == "is an unknown key"


@pytest.mark.parametrize("loss", registry.names("losses"))
@pytest.mark.parametrize("miner", [None, *registry.names("miners")])
def test_a_miner_is_accepted_where_the_loss_takes_what_it_yields(loss, miner):
    raw = trial_with(loss={"name": loss}, miner=miner and {"name": miner})
    if miner is None or registry.build("miners", miner).yields in registry.load("losses", loss).accepts:
        assert parse_trial(raw).loss.name == loss
    else:
        assert set(problems_of(parse_trial, raw)) == {"miner.name"}


def test_a_miner_that_does_not_fit_is_refused_with_those_that_do():
    problem = problems_with(loss={"name": "multi_similarity"})["miner.name"]
    assert problem.message == "yields triplets, and loss multi_similarity takes pairs"
    assert "multi_similarity" in problem.choices
    assert "distance_weighted" not in problem.choices
    assert "loss, miner" in problem.cure
    problem = problems_with(loss={"name": "normalized_softmax"})["miner.name"]
    assert problem.message == "loss normalized_softmax learns from labels alone and takes no miner"
    assert "miner: null" in problem.cure


def test_a_setting_that_nothing_uses_is_refused():
    problem = problems_with(optimizer={"name": "adamw", "momentum": 0.9})["optimizer.momentum"]
    assert problem.message == "is not used by adamw; it is by sgd, rmsprop"
    assert problem.cure == "remove momentum, or set name to sgd or rmsprop"
    problem = problems_with(schedule={"name": "constant", "gamma": 0.5})["schedule.gamma"]
    assert problem.message == "is not used by constant; it is by step, exponential"
    problem = problems_with(sampler={"name": "uniform", "images_per_class": 4})["sampler.images_per_class"]
    assert problem.message.startswith("is not used by uniform; it is by balanced_with_replacement, class_balanced")
    problem = problems_with(sampler={"name": "uniform", "classes_per_batch": 4})["sampler.classes_per_batch"]
    assert problem.message == "is not used by uniform; it is by class_balanced"
    assert "data.list_file" in problems_with(**{"data.list_file": "a.csv"})
    assert "schedule.milestones" in problems_with(epochs=5, schedule={"name": "step", "milestones": [2, 5]})
    contrastive = {"loss": {"name": "contrastive"}, "optimizer": {"name": "adam", "loss_learning_rate": 0.1}}
    assert "no parameters of its own" in problems_with(**contrastive)["optimizer.loss_learning_rate"].message
    assert parse_trial(trial_with(optimizer={"name": "adam", "loss_learning_rate": 0.1})).loss.name == "margin"


MARGIN = {"name": "margin"}
DC, MIC = {"name": "divide_conquer"}, {"name": "mic"}
FIVE_BATCHES, NINE_IMAGES = {"batch_size": 32, "batches_per_epoch": 5}, {"name": "uniform", "batch_size": 9}
MARGINS = {"positive_margin": 0.9, "negative_margin": 0.2}
PADDED, RESIZED = {"random_crop": True, "padding_px": 8}, "data.augmentation.random_resized_crop"


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("data.crop_px", {"data.crop_px": 9}, "larger than resize_px, 8"),
        ("data.split.fold", {"data.split.fold": 4}, "there are 4 folds"),
        ("data.split.fold", {"data.split.fold": 1, "data.split.val_fraction": 0}, "nothing validates"),
        ("data.split.test_fraction", {"data.split.test_fraction": 0}, "cannot be tested"),
        ("data.list_file", {"data.name": "image_list"}, "required by image_list"),
        ("data.augmentation.padding_px", {"data.augmentation": PADDED}, "without a pixel"),
        (RESIZED, {RESIZED: [1.0, 0.2]}, "smallest and the largest"),
        ("model.weights", {"model": {"backbone": "convnet"}}, "no published weights"),
        ("model.freeze_batch_norm", {"model.freeze_batch_norm": True}, "were never trained"),
        ("sampler.images_per_class", {"sampler.images_per_class": 1}, "no positive pair"),
        ("schedule.warmup_epochs", {"schedule": {"name": "cosine", "warmup_epochs": 10}}, "10 epochs"),
        ("schedule.milestones", {"schedule": {"name": "step", "milestones": [5, 2]}}, "must rise"),
        ("schedule.new_layer_factor", {"schedule": {"name": "constant", "new_layer_factor": 5.0}}, "no effect"),
        ("model.embedding_dim", {"method": DC | {"num_learners": 3}, "model.embedding_dim": 64}, "3 equal slices"),
        ("method", {"method": MIC | {"standardise": "none", "standardise_updates": True}}, "nothing to standardise"),
        ("method", {"method": DC, "sampler": {"name": "class_balanced", "batches_per_epoch": 5}}, "no effect"),
        *(
            ("method", {"method": DC, "sampler": {"name": name, **FIVE_BATCHES}}, "batches_per_epoch = 5 has no effect")
            for name in ("identity_chunks", "random_classes")
        ),
        ("method", {"method": DC | {"num_learners": 1, "recluster_every": 5}}, "recluster_every = 5 has no effect"),
        ("method", {"method": DC | {"finetune_from": 0.0, "kmeans_seed": 5}}, "kmeans_seed = 5 has no effect"),
        ("method", {"method": MIC | {"adversarial_weight": 0, "direction": "both"}}, "direction = both has no effect"),
        (
            "method",
            {"method": MIC | {"class_to_auxiliary_weight": 2.0}},
            "class_to_auxiliary_weight = 2.0 has no effect",
        ),
        ("method.auxiliary_loss.margn", {"method": MIC | {"auxiliary_loss": MARGIN | {"margn": 1}}}, "unknown key"),
        ("method.auxiliary_loss.name", {"method": MIC | {"auxiliary_loss": {"name": "margn"}}}, "one of the losses"),
        ("method.auxiliary_loss.beta", {"method": MIC | {"auxiliary_loss": MARGIN | {"beta": 0}}}, "must be > 0"),
        ("method.auxiliary_loss", {"method": MIC | {"auxiliary_loss": "margin"}}, "must be a block of keys"),
        ("method.auxiliary_miner.name", {"method": MIC | {"auxiliary_miner": {"cutoff": 0.5}}}, "required and missing"),
        (
            "method.auxiliary_miner.name",
            {
                "method": MIC
                | {"auxiliary_loss": {"name": "multi_similarity"}, "auxiliary_miner": {"name": "semi_hard"}}
            },
            "takes pairs",
        ),
        ("method.auxiliary_miner", {"method": MIC | {"auxiliary_loss": {"name": "multi_similarity"}}}, "of the trial"),
        (
            "method.auxiliary_miner.name",
            {"method": MIC | {"auxiliary_loss": {"name": "proxy_nca"}, "auxiliary_miner": {"name": "all"}}},
            "labels alone",
        ),
        (
            "method.auxiliary_loss",
            {
                "method": MIC
                | {"auxiliary_loss": {"name": "contrastive", **MARGINS}, "auxiliary_miner": {"name": "all"}}
            },
            "below the negative_margin",
        ),
        ("method.auxiliary_flip", {"method": MIC | {"auxiliary_flip": True}}, "no batch is mirrored"),
        ("method", {"method": MIC | {"images_per_cluster": 5}, "sampler": NINE_IMAGES}, "two groups"),
        ("loss.margin", {"loss.margin": -0.1}, "must be > 0"),
        ("loss.temperature", {"loss": {"name": "normalized_softmax", "temperature": 0}, "miner": None}, "must be > 0"),
        ("loss", {"loss": {"name": "contrastive", **MARGINS}}, "below the negative_margin"),
        ("loss", {"loss": {"name": "snr_contrastive", "positive_margin": 2.0}}, "below the negative_margin"),
        ("loss", {"loss": {"name": "multi_similarity", "alpha": 40.0, "beta": 2.0}, "miner": None}, "alpha"),
    ],
)
def test_what_must_fit_together(path, changes, words):
    found = problems_with(**changes)
    assert list(found) == [path]
    assert words in found[path].message
    assert found[path].cure or path in ("loss", "method.auxiliary_loss")  # a constructor names the cure in its message


def test_what_does_fit_together():
    single = {"sampler.images_per_class": 1, "loss": {"name": "normalized_softmax"}, "miner": None}
    assert parse_trial(trial_with(**single)).sampler.name == "class_balanced"
    big = {"data.resize_px": 256, "data.crop_px": 224, "model": {"backbone": "vit_b_16"}}
    assert parse_trial(trial_with(**big)).model.freeze_batch_norm is True
    assert parse_trial(BASE).model.freeze_batch_norm is False
    sliced = {"method": DC | {"num_learners": 3}, "model.embedding_dim": 63}
    assert parse_trial(trial_with(**sliced)).method.settings["num_learners"] == 3
    # The 100 batches that this sampler has by default are no setting of the user's.
    by_clusters = {"method": DC, "sampler": {"name": "random_classes", "batches_per_epoch": 100}}
    assert parse_trial(trial_with(**by_clusters)).sampler.name == "random_classes"
    own_number = {"method": {"name": "divide_conquer", "num_learners": 1}, "sampler.batches_per_epoch": 5}
    assert parse_trial(trial_with(**own_number)).sampler.batches_per_epoch == 5
    mirrored = {"method": {"name": "mic", "auxiliary_flip": True}, "data.augmentation": {"flip": True}}
    assert parse_trial(trial_with(**mirrored)).method.settings["auxiliary_flip"] is True


def test_rules_between_the_settings_of_a_plugin_are_found_in_its_constructor(monkeypatch):
    def refuse(kind, name, **settings):  # noqa: ARG001 - called like plugins.build
        raise ValueError(f"{kind}/{name}: these two exclude each other")

    monkeypatch.setattr(registry, "build", refuse)
    rules._construct_once.cache_clear()
    try:
        found = problems_with(**{"loss.margin": 0.123})
    finally:
        rules._construct_once.cache_clear()
    assert found["loss"].message == "losses/margin: these two exclude each other"
    assert found["miner"].message == "miners/distance_weighted: these two exclude each other"


def test_regularizers_are_blocks_by_name_with_defaults_filled_in():
    assert parse_trial(BASE).regularizers == {}
    trial = parse_trial(trial_with(regularizers={"mdr": {"weight": 0.3}, "rho": None}))
    assert set(trial.regularizers) == {"mdr", "rho"}
    assert trial.regularizers["mdr"]["weight"] == 0.3
    assert trial.regularizers["mdr"]["momentum"] == 0.9  # spec of the release: 0.9 old + 0.1 new
    assert parse_trial(trial.model_dump(mode="json")) == trial
    turned = trial_with(regularizers={"rho": {}, "mdr": {"weight": 0.3}})
    assert fingerprint(parse_trial(turned)) == fingerprint(trial)
    other = trial_with(regularizers={"mdr": {"weight": 0.4}, "rho": {}})
    assert fingerprint(parse_trial(other)) != fingerprint(trial)


@pytest.mark.parametrize(
    ("block", "path", "words"),
    [
        ({"mrd": {}}, "regularizers.mrd", "is not one of the regularizers"),
        ({"mdr": {"weigth": 1.0}}, "regularizers.mdr.weigth", "is an unknown key"),
        ({"mdr": {"weight": -1.0}}, "regularizers.mdr.weight", "must be"),
        ({"mdr": 0.6}, "regularizers.mdr", "block of settings"),
        ("mdr", "regularizers", "block of regularisers by name"),
        (None, "regularizers", "block of regularisers by name"),
    ],
)
def test_wrong_regularizers_are_refused_with_their_path(block, path, words):
    problem = problems_with(regularizers=block)[path]
    assert words in problem.message
    assert problem.cure
    assert problem.nearest == "mdr" or path != "regularizers.mrd"


def test_the_name_of_a_regularizer_is_its_key():
    problem = problems_with(regularizers={"name": "mdr"})["regularizers.name"]
    assert problem.cure == "write the name as the key: {mdr: {...}}"


def test_regularizers_need_what_they_work_on():
    lists = {"name": "semi_hard", "negatives": "all"}
    found = problems_with(regularizers={"rho": {}}, loss={"name": "triplet"}, miner=lists)["regularizers.rho"]
    assert "yields triplet_ranges" in found.message
    assert "distance_weighted" in found.choices
    assert "no miner" in problems_with(regularizers={"rho": {}}, miner=None)["regularizers.rho"].message
    assert parse_trial(trial_with(regularizers={"rho": {}})).regularizers["rho"]
    found = problems_with(regularizers={"cross_batch_memory": {}}, loss={"name": "triplet"})
    assert "pairs" in found["regularizers.cross_batch_memory"].message
    assert "contrastive" in found["regularizers.cross_batch_memory"].choices
    assert "triplet" not in found["regularizers.cross_batch_memory"].choices
    assert parse_trial(trial_with(regularizers={"cross_batch_memory": {}}, loss={"name": "contrastive"}, miner=None))


def test_a_memory_holds_a_batch():
    memory = {"regularizers": {"cross_batch_memory": {"size": 31}}, "loss": {"name": "contrastive"}, "miner": None}
    (problem,) = problems_with(**memory).values()  # 8 classes x 4 images
    assert problem.path == "regularizers.cross_batch_memory.size"
    assert "32 images of a batch" in problem.message
    memory["regularizers"] = {"cross_batch_memory": {"size": 32}}
    assert parse_trial(trial_with(**memory)).regularizers["cross_batch_memory"]["size"] == 32
    assert problems_with(**memory, sampler={"name": "uniform", "batch_size": 33})


@pytest.mark.parametrize(
    ("dims", "message", "cure"),
    [
        ([64, 32], "must rise", r"write \[32, 64\]"),
        ([32, 64, 256], "longer than the embedding", r"write \[32, 64\], or raise embedding_dim"),
        ([256], "whose model.embedding_dim is 128", "write shorter ones"),
        ([128], "it is the whole embedding", "add shorter prefixes"),
    ],
)
def test_prefixes_are_of_the_embedding(dims, message, cure):
    model = {"model.embedding_dim": 128}
    (problem,) = problems_with(regularizers={"matryoshka": {"dims": dims}}, **model).values()
    assert problem.path == "regularizers.matryoshka.dims"
    assert message in problem.message
    assert re.search(cure, problem.cure)
    trial = parse_trial(trial_with(regularizers={"matryoshka": {"dims": [32, 64, 128]}}, **model))
    assert trial.regularizers["matryoshka"] == {"dims": (32, 64, 128), "weight": 1.0}
    assert parse_trial(trial.model_dump(mode="json")) == trial


def test_slices_have_no_common_prefix():
    divided = {"method": {"name": "divide_conquer", "num_learners": 4}, "regularizers": {"matryoshka": {}}}
    problem = problems_with(**divided)["regularizers.matryoshka"]
    assert "divide_conquer trains 4 slices" in problem.message


def test_a_length_that_is_always_one_is_not_regularised():
    (problem,) = problems_with(regularizers={"embedding_norm": {}}).values()
    assert "every embedding has length 1" in problem.message
    assert parse_trial(trial_with(**{"regularizers": {"embedding_norm": {}}, "model.normalize": "none"}))


def test_what_a_miner_yields_may_hang_on_its_settings():
    pairs = {"loss": {"name": "multi_similarity"}, "miner": {"name": "all", "tuples": "pairs"}}
    assert parse_trial(trial_with(**pairs)).miner.name == "all"
    problem = problems_with(**{**pairs, "miner": {"name": "all", "tuples": "triplets"}})["miner.name"]
    assert problem.message == "yields triplet_ranges, and loss multi_similarity takes pairs"
    problem = problems_with(loss={"name": "triplet"}, miner={"name": "multi_similarity"})["miner.name"]
    assert problem.message == "yields pairs, and loss triplet takes triplets or triplet_ranges"


def test_the_decay_of_loss_parameters_needs_some():
    decay = {"optimizer": {"name": "adam", "loss_weight_decay": 1e-4}, "loss": {"name": "contrastive"}}
    assert "no parameters" in problems_with(**decay)["optimizer.loss_weight_decay"].message
    # the levels of MDR are parameters too
    assert parse_trial(trial_with(**decay, regularizers={"mdr": {}})).optimizer.loss_weight_decay == 1e-4


def test_checking_leaves_the_random_state_alone():
    import torch

    before = torch.random.get_rng_state()
    parse_trial(trial_with(loss={"name": "normalized_softmax", "temperature": 0.0717}, miner=None))
    assert torch.equal(before, torch.random.get_rng_state())


def test_there_is_a_settings_class_for_every_optimizer():
    for name in OPTIMIZERS:
        assert parse_trial(trial_with(optimizer={"name": name})).optimizer.name == name
    assert problems_with(optimizer={"name": "lion"})["optimizer.name"].choices == tuple(OPTIMIZERS)


def test_trial_constructed_directly_is_checked_as_well():
    with pytest.raises(ValueError, match="larger than resize_px"):
        Trial.model_validate(trial_with(**{"data.crop_px": 9}))


def test_machine():
    machine = parse_machine({"data_root": "/data", "gpus_per_trial": 0.5})
    assert (machine.data_root, machine.gpus_per_trial) == (Path("/data"), 0.5)
    assert parse_machine(machine.model_dump(mode="json")) == machine
    found = problems_of(parse_machine, {"gpus_per_trial": "all", "cpus_per_trial": 0, "device": "gpu"})
    assert found["gpus_per_trial"].message == "is not one of the choices, or must be a number"
    assert (found["gpus_per_trial"].choices, found["cpus_per_trial"].message) == (("auto",), "must be >= 1")
    assert found["device"].choices == ("auto", "cpu", "cuda")


def test_study():
    study = parse_study({"name": "a", "confirm": {"top": 2, "folds": 2, "seeds": 2}, "finalize": {"top": 1}})
    assert (study.search.num_trials, study.confirm.folds, study.finalize.top) == (1, 2, 1)
    assert parse_study({}).confirm is None  # a search alone is a legal study
    found = problems_of(parse_study, {"name": "a/b", "confirm": {"top": 1}, "finalize": {"top": 2}})
    assert set(found) == {"name", "finalize.top"}
    assert found["finalize.top"].cure == "write at most 1, or raise confirm.top"


def test_the_metric_that_selects_is_one_of_the_validation_classes_and_is_measured():
    assert problems_with(select_on="test_map_at_r")["select_on"].nearest == "val_map_at_r"
    unmeasured = problems_with(select_on="val_recall_at_5")["select_on"]
    assert unmeasured.message == "is not measured: recall_at is [1, 2, 4, 8]"
    assert parse_trial(trial_with(select_on="val_recall_at_8")).select_on == "val_recall_at_8"


@pytest.mark.parametrize(
    ("study", "path"),
    [
        ({"finalize": {"top": 4}}, "finalize.top"),  # three checkpoints are kept
        ({"finalize": {"top": 2}, "max_checkpoint_gib": 1.0}, "finalize.top"),
        ({"search": {"scheduler": "sync", "max_concurrent": 2}}, "search.max_concurrent"),
    ],
)
def test_stages_that_would_fail_in_the_end_are_refused_at_the_start(study, path):
    assert set(problems_of(parse_study, study)) == {path}
    assert parse_study({"finalize": {"top": 3}, "search": {"scheduler": "asha", "max_concurrent": 2}})


@pytest.mark.parametrize(
    "machine",
    [{"gpus_per_trial": 1.5}, {"gpus_per_trial": 0, "device": "cuda"}, {"gpus_per_trial": 1, "device": "cpu"}],
)
def test_shares_of_a_gpu_that_cannot_be_given_are_refused(machine):
    assert set(problems_of(parse_machine, machine)) == {"gpus_per_trial"}
    for good in (0, 0.5, 1, 2, "auto"):
        assert parse_machine({"gpus_per_trial": good}).gpus_per_trial == good


@pytest.mark.parametrize("gpus", [0.5, 1, 4])
def test_a_gpu_has_one_rank(gpus):
    machine = {"gpus_per_trial": gpus, "ranks_per_trial": 2}
    problem = problems_of(parse_machine, machine)["ranks_per_trial"]
    assert problem.message == f"contradicts gpus_per_trial: {gpus}; each GPU has one rank"
    assert set(problems_of(parse_machine, {"ranks_per_trial": 0})) == {"ranks_per_trial"}


@pytest.mark.parametrize("several", [{"ranks_per_trial": 2}, {"gpus_per_trial": 2}])
def test_a_probe_measures_one_process(several):
    problem = problems_of(parse_machine, {**several, "probe": "on"})["probe"]
    assert "measures the steps of one process" in problem.message
    parse_machine({**several, "probe": "auto"})
    parse_machine({"ranks_per_trial": 1, "gpus_per_trial": 0.5, "probe": "on"})


@pytest.mark.parametrize(
    ("machine", "with_gpus", "without"),
    [
        ({}, 1, 0),
        ({"ranks_per_trial": 2}, 2, 0),
        ({"ranks_per_trial": 2, "device": "cpu"}, 0, 0),
        ({"ranks_per_trial": 2, "gpus_per_trial": 0}, 0, 0),
        ({"ranks_per_trial": 2, "gpus_per_trial": 2}, 2, 2),
        ({"gpus_per_trial": 0.5}, 0.5, 0.5),
        ({"device": "cuda"}, 1, 1),
        ({"device": "cuda", "ranks_per_trial": 2}, 2, 2),
    ],
)
def test_a_trial_holds_a_gpu_for_each_rank(machine, with_gpus, without):
    machine = parse_machine(machine)
    assert (machine.num_gpus(are_there=True), machine.num_gpus(are_there=False)) == (with_gpus, without)


@pytest.mark.parametrize("name", ["cache", "mlartifacts", "MLflow.db", "mlflow.db-wal", "test_reads.jsonl", "MLRUNS"])
def test_a_study_cannot_have_the_name_of_what_is_beside_the_studies(name):
    problem = problems_of(parse_study, {"name": name})["name"]
    assert "something else in the folder of the studies" in problem.message
    assert "--name" in problem.cure


@pytest.mark.parametrize("name", [".", "..", "", "a/b", "-a", "a b", "run😀", "a\n", "x" * 201])
def test_what_is_no_name_of_a_folder_is_no_name_of_a_study(name):
    problem = problems_of(parse_study, {"name": name})["name"]
    assert problem.value == name
    assert problem.cure


def test_names_of_studies():
    for name in ("a", "mlflow", "cache2", "my-run_1.0", "x" * 200):
        assert parse_study({"name": name}).name == name


# Each value against what pydantic says of it in its own words; the shell and YAML can write all of them.
WRONG_VALUES = [None, True, -1, 1.5, float("nan"), 2**70, "", "x", "\ud800", [], ["a"], [2, 1], {}, {"a": 1}, {1: 2}]


def places_of(model, prefix=()):
    """Every key path of a model."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for inner in models_in(field.annotation):
            yield from places_of(inner, (*prefix, name))


def models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


@pytest.mark.parametrize(
    ("model", "parse", "base"),
    [(Trial, parse_values, BASE), (Machine, parse_machine, {}), (StudySettings, parse_study, {})],
)
def test_no_mistake_is_reported_in_the_words_of_the_library(model, parse, base):
    messages = set()
    for path in sorted(set(places_of(model))):
        for value in WRONG_VALUES:
            raw = copy.deepcopy(base)
            block = raw
            for key in path[:-1]:
                block = block.setdefault(key, {})
            block[path[-1]] = value
            try:
                parse(raw)
            except ConfigError as error:
                messages |= {(problem.path, problem.message) for problem in error.problems}
    assert len(messages) > 10
    library = re.compile("input|value error|assertion|instance|unable to parse|should be|valid string|pydantic", re.I)
    assert [message for message in messages if library.search(message[1])] == []
