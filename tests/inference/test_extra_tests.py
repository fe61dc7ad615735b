"""Further sealed sets: scored as `evaluate --data` would score them, each read recorded, settings refused."""

import numpy as np
import pytest

from raydml.config.trial import fingerprint, parse_machine, parse_trial
from raydml.data.catalog import DataError
from raydml.data.seal import TestReads
from raydml.errors import ConfigError
from raydml.evaluation.embed import metric_spec_of
from raydml.inference.evaluate import (
    Collection,
    _checked_num_found,
    check_extra_test,
    embed_collection,
    evaluate_extra_test,
    evaluate_saved,
)
from raydml.inference.export import load_checkpoint
from raydml.metrics.names import METRIC_GROUPS
from raydml.training import checkpoint
from raydml.training.trainer import Trainer
from raydml.training.trial_images import Catalogs, split_for
from tests.data.own_images import folder_of, write_image, write_list

SPACE = {
    "epochs": 1,
    "recall_at": [1, 2, 20],
    "data": {"name": "image_folder", "resize_px": 8, "crop_px": 8},
    "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 4},
    "loss": {"name": "contrastive"},
    "sampler": {"name": "class_balanced", "classes_per_batch": 2, "images_per_class": 2},
}
STREET = {"name": "street", "data": "image_folder", "root": "street"}
SHOP = {"name": "shop_2", "data": "image_list", "root": "shop", "list_file": "list.csv", "group": "camera"}
SHOP |= {"exclude_same": "group"}


def trial_with(*extra):
    return parse_trial({**SPACE, "data": {**SPACE["data"], "extra_tests": list(extra)}})


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of one epoch, and the machine with its images and two other sets beside them."""
    root = tmp_path / "images"
    folder_of(root / "street", x=3, y=4, z=1)
    rows = [[f"{label}{number}.png", label, f"c{number % 2}"] for label in "pq" for number in range(4)]
    for number, (path, *_) in enumerate(rows):
        write_image(root / "shop" / path, shade=30 * number)
    write_list(root / "shop", rows, ("path", "label", "camera"))
    own = str(folder_of(tmp_path / "own", **OWN))
    machine = parse_machine({"data_root": own, "cache_dir": str(tmp_path / "cache"), "device": "cpu"})
    sets = [{**one, "root": str(root / one["root"])} for one in (STREET, SHOP)]
    trial = parse_trial({**trial_with(*sets).model_dump(mode="json"), "recall_at": [1, 2]})
    trainer = Trainer(trial, machine, device="cpu")
    list(trainer.epochs())
    # 7: each of 8 images in street finds 7 others, and in shop 6, without its class and camera.
    spec = parse_trial({**trial.model_dump(mode="json"), "recall_at": [1, 2, 7, 20]})
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, state={}, model_card=trainer.model_card(), best_weights=trainer.best_weights)
    return folder, machine, metric_spec_of(spec)._replace(groups=METRIC_GROUPS)


OWN = dict.fromkeys("abcdefgh", 5)


def test_scores_are_those_of_the_set_by_itself_and_each_read_is_recorded(tmp_path, trained):
    folder, machine, spec = trained
    reads = TestReads(tmp_path / "reads.jsonl")

    def score(name):
        key = reads.record(purpose=f"finalize: extra test {name}", checkpoint=folder, commit="c")
        return evaluate_extra_test(folder, name, machine, key=key, spec=spec)

    found = {name: score(name) for name in ("street", "shop_2")}
    model = load_checkpoint(folder)
    for extra in parse_trial(model.card["trial"]).data.extra_tests:
        key = reads.record(purpose="by itself", checkpoint=folder, commit="c")
        collection = Collection(Catalogs(machine).extra(extra), key)
        saved = embed_collection(model.network, model.preprocessing, collection, machine, facts={})
        alone = evaluate_saved(saved, spec._replace(recall_at=(1, 2)))
        ours = found[extra.name].metrics
        assert {f"{extra.name}_{name}": value for name, value in alone.metrics.items()}.items() <= ours.items()
        assert f"untrained_{extra.name}_recall_at_1" in ours
        assert found[extra.name].num_lone_queries == alone.num_lone_queries
    assert "street_recall_at_7" in found["street"].metrics
    assert "shop_2_recall_at_7" not in found["shop_2"].metrics
    assert found["street"].num_lone_queries == 1
    # The own images of each class are shades 0 to 4, those of street 0 to 3; shop has 0, 30, ... 210.
    assert found["street"].protocols["street_shared"].startswith("street: 8 of 8 images are byte for byte among")
    assert found["shop_2"].protocols["shop_2_shared"].startswith("shop_2: 1 of 8 images")
    assert list(found["shop_2"].protocols) == ["shop_2_leave_one_out_across_groups", "shop_2_shared"]
    assert found["street"].protocols["street_leave_one_out"].startswith("street: leave one out: each of 8 images")
    assert all(name.startswith(("shop_2_", "untrained_shop_2_")) for name in found["shop_2"].metrics)
    assert np.isfinite(list(found["shop_2"].metrics.values())).all()


def test_they_are_in_the_fingerprint_and_nowhere_without_them():
    without = parse_trial(SPACE)
    assert fingerprint(trial_with()) == fingerprint(without) != fingerprint(trial_with(STREET))
    assert "extra_tests" not in without.model_dump(mode="json")["data"]
    assert parse_trial(trial_with(STREET, SHOP).model_dump(mode="json")) == trial_with(STREET, SHOP)


@pytest.mark.parametrize("name", ["val", "group", "small", "recall_of_mine", "Street", "2nd", "a b"])
def test_a_name_that_other_metrics_begin_with_is_refused(name):
    with pytest.raises(ConfigError, match="is no name of an extra test"):
        trial_with({**STREET, "name": name})


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ([STREET, STREET], "data.extra_tests"),
        ([{**STREET, "group": "camera"}], "data.extra_tests"),
        ([{**SHOP, "list_file": None}], "data.extra_tests"),
        ([{**STREET, "path": "x.tar"}], "data.extra_tests"),
        ([STREET, {**STREET, "name": "street_group"}], "data.extra_tests"),
        ([{**STREET, "name": "street_recall"}, STREET], "data.extra_tests"),
    ],
)
def test_settings_that_do_not_fit_are_refused(extra, key):
    with pytest.raises(ConfigError) as caught:
        trial_with(*extra)
    assert {problem.path.split("[")[0] for problem in caught.value.problems} == {key}


ROWS = [[f"{label}{number}.png", label] for label in "pqr" for number in range(5)]


def catalogs_of(tmp_path, extra, columns, header):
    """The extra test of a list with further columns for each of ROWS, its catalog, and the own images and split."""
    rows = [[*row, *more] for row, more in zip(ROWS, columns, strict=True)]
    for number, (path, *_) in enumerate(rows):
        write_image(tmp_path / "shop" / path, shade=15 * number)
    write_list(tmp_path / "shop", rows, ("path", "label", *header))
    trial = trial_with({"name": "shop", "data": "image_list", "root": "../shop", "list_file": "list.csv", **extra})
    machine = parse_machine({"data_root": str(folder_of(tmp_path / "own", **OWN))})
    (one,), catalogs = trial.data.extra_tests, Catalogs(machine)
    return one, catalogs.extra(one), catalogs.of(trial), split_for(trial, catalogs.of(trial))


ROLES = [["query" if number < 3 else "gallery"] for _ in "pqr" for number in range(5)]
CAMERAS = [[f"c{number % 2}"] for _ in "pqr" for number in range(5)]
ACROSS = {"group": "camera", "exclude_same": "group"}


@pytest.mark.parametrize(
    ("extra", "columns", "header", "num_found"),
    [
        ({}, [[]] * 15, (), 14),  # the others
        ({}, ROLES, ("role",), 6),  # 2 of 3 classes
        (ACROSS, CAMERAS, ("camera",), 12),  # without 3 images of its class and camera, of 3 and of 2
    ],
)
def test_no_query_needs_more_images_than_it_finds(tmp_path, extra, columns, header, num_found):
    one, catalog, *_ = given = catalogs_of(tmp_path, extra, columns, header)
    check_extra_test(*given)
    assert _checked_num_found(one, catalog.labels, catalog.roles, catalog.groups, catalog.protocols) == num_found


@pytest.mark.parametrize(
    ("extra", "columns", "header", "message"),
    [
        ({"group": "unique"}, [[f"u{number}"] for number in range(15)], ("unique",), "group = 'unique'.*of its group"),
        (ACROSS, [["c"]] * 15, ("camera",), "in another group to find.*Cure: .*exclude_same: nothing"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_study(tmp_path, extra, columns, header, message):
    given = catalogs_of(tmp_path, extra, columns, header)
    with pytest.raises(DataError, match=rf"data\.extra_tests: shop: .*{message}"):
        check_extra_test(*given)


@pytest.mark.parametrize(
    ("images", "message"),
    [({"x": 1, "y": 1}, "no query has another image of its class to find"), ({"x": 3}, "are of 1 class")],
)
def test_images_without_anything_to_find_are_refused_before_the_study(tmp_path, images, message):
    folder_of(tmp_path / "images" / "street", **images)
    trial = trial_with({**STREET, "root": "../images/street"})
    machine = parse_machine({"data_root": str(folder_of(tmp_path / "own", **OWN))})
    (extra,), catalogs = trial.data.extra_tests, Catalogs(machine)
    own = catalogs.of(trial)
    with pytest.raises(DataError, match=rf"data\.extra_tests: street: .*{message}.* Cure: "):
        check_extra_test(extra, catalogs.extra(extra), own, split_for(trial, own))


def test_files_that_train_are_refused_also_through_a_link_and_those_of_the_sealed_classes_are_not(tmp_path):
    root = folder_of(tmp_path / "own", **OWN)
    (tmp_path / "link").symlink_to(root)
    machine = parse_machine({"data_root": str(root)})
    trial = trial_with({**STREET, "root": str(tmp_path / "link")})
    (extra,), catalogs = trial.data.extra_tests, Catalogs(machine)
    own, split = catalogs.of(trial), split_for(trial, catalogs.of(trial))
    with pytest.raises(DataError, match=r"street: 20 of its 40 images train or validate in the trial: .*Cure: "):
        check_extra_test(extra, catalogs.extra(extra), own, split)
    (tmp_path / "sealed").mkdir()
    for number in split.test:
        (tmp_path / "sealed" / own.class_names[number]).symlink_to(root / own.class_names[number])
    (extra,) = trial_with({**STREET, "root": str(tmp_path / "sealed")}).data.extra_tests
    check_extra_test(extra, catalogs.extra(extra), own, split)


def test_one_name_may_begin_with_another_where_their_metrics_do_not():
    assert len(trial_with(STREET, {**STREET, "name": "streets"}).data.extra_tests) == 2


def test_a_set_that_is_not_there_is_named(tmp_path):
    machine = parse_machine({"data_root": str(tmp_path)})
    (extra,) = trial_with(STREET).data.extra_tests
    with pytest.raises(DataError, match=r"data\.extra_tests: street: machine\.data_root = .*street' is not a folder"):
        Catalogs(machine).extra(extra)
