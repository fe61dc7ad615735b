"""Upper limits cut to what the images allow: by hand on small catalogs."""

import logging
from pathlib import Path

import pytest

import raydml.samplers
from raydml import registry
from raydml.config.trial import parse_machine, parse_study, parse_trial
from raydml.data.catalog import ImageFile, catalog_of
from raydml.search_space.space import load_space, sample_trials
from raydml.study.limits import study_within_limits, trials_within_limits
from raydml.training.trial_images import Catalogs

SPACES = Path(__file__).parents[2] / "search_spaces"
TRIAL = {
    "data": {"name": "image_folder", "resize_px": 32, "crop_px": 32, "split": {"val_fraction": 0.25, "num_folds": 4}},
    "model": {"backbone": "convnet", "weights": "none"},
    "loss": {"name": "margin"},
    "sampler": {"name": "class_balanced", "classes_per_batch": 16, "images_per_class": 4},
}
UNIFORM = {"loss": {"name": "normalized_softmax"}, "sampler": {"name": "uniform", "batch_size": 64}}

MADE_UP = '''
"""Made up: nobody (2026)."""

from raydml.samplers._base import Sampler


class MadeUp(Sampler):
    """Pairs of images."""

    def __init__(self, labels, *, num_pairs: int = 8) -> None:
        self.batch_size = 2 * num_pairs

    def plan(self, generator): ...
'''


class Listed:
    """Catalogs without files: so many classes of so many images each."""

    def __init__(self, num_classes: int, per_class: int) -> None:
        rows = [ImageFile(f"{c}/{i}.jpg", f"{c:04d}", 1) for c in range(num_classes) for i in range(per_class)]
        self.catalog = catalog_of("image_folder", None, rows, kind="{classes} in class folders")

    def of(self, _trial):
        return self.catalog


def trial(**changes):
    return parse_trial({**TRIAL, **changes})


def test_26_classes_of_36_images_train_on_9_and_say_so_first(caplog):
    with caplog.at_level(logging.INFO, "raydml"):
        (cut,) = trials_within_limits([trial()], Listed(26, 36), 2)
    assert [record.getMessage() for record in caplog.records] == [
        "26 classes in class folders, 936 images: 9 train / 4 validate / 13 test, sealed",
        "note: cut to what the images allow: sampler.classes_per_batch 16 -> 9",
    ]
    assert cut == trial(sampler={**TRIAL["sampler"], "classes_per_batch": 9})


def test_6_classes_of_2_images(caplog):
    """2 train, 2 validate, 2 are sealed; 4 development classes make 2 folds; 4 images are in each part."""
    with caplog.at_level(logging.INFO, "raydml"):
        balanced, uniform = trials_within_limits([trial(), trial(**UNIFORM)], Listed(6, 2), 2)
    assert balanced.sampler.settings == {"classes_per_batch": 2, "images_per_class": 4, "batches_per_epoch": None}
    assert (uniform.sampler.settings, uniform.recall_at) == ({"batch_size": 4}, (1, 2))
    assert {one.data.split.num_folds for one in (balanced, uniform)} == {2}
    assert len(caplog.records) == 2  # one line on the split and one note for all trials
    for words in ("data.split.num_folds 4 -> 2", "batch_size 64 -> 4", "recall_at [1, 2, 4, 8] -> [1, 2]"):
        assert words in caplog.text


def test_the_smallest_fold_decides():
    # 13 development classes in 4 folds validate on 4, 3, 3, 3: fold 0 trains on 9, the search split on 9 too.
    (cut,) = trials_within_limits([trial()], Listed(26, 5), 4)
    assert cut.sampler.settings["classes_per_batch"] == 9
    # At 0.1, 2 of them validate in the search, which trains on 11.
    data = {**TRIAL["data"], "split": {"val_fraction": 0.1, "num_folds": 4}}
    (cut,) = trials_within_limits([trial(data=data)], Listed(26, 5), 0)
    assert cut.sampler.settings["classes_per_batch"] == 11


def test_without_validation_all_development_classes_and_the_test_decide(caplog):
    # Of 6 classes, 2 are sealed at 0.5 whatever validates; their 4 images are searched with k below 4.
    data = {**TRIAL["data"], "split": {"val_fraction": 0, "test_fraction": 0.5}}
    with caplog.at_level(logging.INFO, "raydml"):
        (cut,) = trials_within_limits([trial(data=data)], Listed(6, 2), 0)
    assert (cut.sampler.settings["classes_per_batch"], cut.recall_at) == (4, (1, 2))
    assert "12 images: 4 train / none validates / 2 test, sealed" in caplog.text


def test_a_method_with_groups_of_images_follows_the_batch():
    mic = {"method": {"name": "mic", "num_clusters": 8}, "sampler": {**TRIAL["sampler"], "classes_per_batch": 8}}
    mic["sampler"] = {**mic["sampler"], "images_per_class": 2}
    (cut,) = trials_within_limits([trial(**mic)], Listed(6, 2), 0)
    assert cut.method.settings["images_per_cluster"] == 2  # two groups in a batch of 2 x 2 images


def test_a_new_sampler_may_have_settings_of_any_name(tmp_path, monkeypatch):
    for kind in registry.KINDS:
        (tmp_path / kind).mkdir()
        for file in (registry.PACKAGE / kind).glob("*.py"):
            (tmp_path / kind / file.name).symlink_to(file)
    (tmp_path / "samplers" / "made_up.py").write_text(MADE_UP)
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    monkeypatch.setattr(raydml.samplers, "__path__", [*raydml.samplers.__path__, str(tmp_path / "samplers")])
    made_up = {"name": "made_up", "num_pairs": 2}
    for method, expected in (({"name": "plain"}, None), ({"name": "mic", "num_clusters": 8}, 2)):
        (cut,) = trials_within_limits([trial(sampler=made_up, method=method)], Listed(26, 5), 0)
        assert cut.sampler.settings == {"num_pairs": 2}
        assert cut.method.settings.get("images_per_cluster") == expected  # two groups in a batch of 4 images


@pytest.mark.parametrize("num_classes", [44, 5000])
def test_what_fits_is_not_changed(num_classes, caplog):
    before = [trial(), trial(**UNIFORM)]
    with caplog.at_level(logging.INFO, "raydml"):
        assert trials_within_limits(before, Listed(num_classes, 8), 2) == before
    assert len(caplog.records) == 1
    assert f"{num_classes:,} classes" in caplog.text


@pytest.mark.parametrize("name", ["classification_inshop", "reality_check_cub200"])
def test_published_spaces_are_not_cut_on_their_data_sets(name):
    space = load_space(SPACES / f"{name}.yaml", ["machine.data_root=."])
    trials = sample_trials(space)[:8]
    as_published = Catalogs(space.machine, as_published=True)
    assert trials_within_limits(trials, as_published, space.study.confirm.folds) == trials


def test_trials_that_become_equal_are_one(caplog):
    larger = trial(sampler={**TRIAL["sampler"], "classes_per_batch": 32})
    with caplog.at_level(logging.INFO, "raydml"):
        assert len(trials_within_limits([trial(), larger], Listed(26, 5), 2)) == 1
    assert "1 trials are left of 2" in caplog.text


def test_a_study_confirms_on_the_folds_that_there_are():
    study = parse_study({"confirm": {"folds": 4, "seeds": 1}})
    (cut,) = trials_within_limits([trial()], Listed(6, 5), 4)
    assert study_within_limits(study, [cut]).confirm.folds == 2
    assert study_within_limits(study, [trial()]) == study
    alone = parse_study({"confirm": None})
    assert study_within_limits(alone, [cut]) == alone
    searching = parse_study({"search": {"folds": 3}})
    assert study_within_limits(searching, [cut]).search.folds == 2
    assert study_within_limits(searching, [trial()]) == searching


def test_the_folds_of_a_search_are_limits_too():
    # 13 development classes in 4 folds validate on 4, 3, 3, 3; at 0.1 the search itself trains on 11.
    data = {**TRIAL["data"], "split": {"val_fraction": 0.1, "num_folds": 4}}
    (cut,) = trials_within_limits([trial(data=data)], Listed(26, 5), 0, 2)
    assert cut.sampler.settings["classes_per_batch"] == 9, "of fold 0, which follows the split without a fold"
    # Of 4 development classes in 3 folds 2, 1 and 1 validate, and each needs 2: so a second fold means 2 folds.
    for num_folds, expected in ((1, 4), (2, 3), (3, 2)):
        (cut,) = trials_within_limits([trial()], Listed(8, 2), 0, num_folds)
        assert cut.data.split.num_folds == expected
    # Of 5 in 3 folds 2, 2 and 1 validate: from fold 0 on, the third is one too many.
    on_fold = {**TRIAL["data"], "split": {"val_fraction": 0.5, "num_folds": 3, "fold": 0}}
    for num_folds, expected in ((1, 3), (2, 3), (3, 2)):
        (cut,) = trials_within_limits([trial(data=on_fold)], Listed(10, 2), 0, num_folds)
        assert cut.data.split.num_folds == expected


def test_where_no_part_is_scored_no_image_limits_recall(caplog):
    trial = parse_trial(
        {
            **TRIAL,
            "data": {"name": "digits", "resize_px": 8, "crop_px": 8, "split": {"val_fraction": 0, "test_fraction": 0}},
            "sampler": {"name": "class_balanced", "classes_per_batch": 4, "images_per_class": 4},
            "recall_at": [1, 2, 4, 8],
        }
    )
    with caplog.at_level(logging.INFO):
        (kept,) = trials_within_limits([trial], Catalogs(parse_machine({})), 0)
    assert kept.recall_at == (1, 2, 4, 8)
    assert "cut to" not in caplog.text
