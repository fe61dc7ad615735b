"""Further sealed sets: scored as `evaluate --data` would score them, each read recorded, settings refused."""

import numpy as np
import pytest

from raydml.config.trial import fingerprint, parse_machine, parse_trial
from raydml.data.catalog import DataError
from raydml.data.seal import TestReads
from raydml.errors import ConfigError
from raydml.evaluation.embed import metric_spec_of
from raydml.inference.evaluate import Collection, embed_collection, evaluate_extra_tests, evaluate_saved
from raydml.inference.export import load_checkpoint
from raydml.metrics.names import METRIC_GROUPS
from raydml.training import checkpoint
from raydml.training.trainer import Trainer
from raydml.training.trial_images import Catalogs
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
    machine = parse_machine({"data_root": str(root), "cache_dir": str(tmp_path / "cache"), "device": "cpu"})
    trial = parse_trial({**trial_with(STREET, SHOP).model_dump(mode="json"), "recall_at": [1, 2]})
    own = parse_machine({**machine.model_dump(mode="json"), "data_root": str(folder_of(tmp_path / "own", **OWN))})
    trainer = Trainer(trial, own, device="cpu")
    list(trainer.epochs())
    spec = parse_trial({**trial.model_dump(mode="json"), "recall_at": [1, 2, 20]})
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, state={}, model_card=trainer.model_card(), best_weights=trainer.best_weights)
    return folder, machine, metric_spec_of(spec)._replace(groups=METRIC_GROUPS)


OWN = dict.fromkeys("abcdefgh", 5)


def test_scores_are_those_of_the_set_by_itself_and_each_read_is_recorded(tmp_path, trained):
    folder, machine, spec = trained
    reads = TestReads(tmp_path / "reads.jsonl")
    found = evaluate_extra_tests(
        folder,
        machine,
        key_of=lambda name: reads.record(purpose=f"finalize: extra test {name}", checkpoint=folder, commit="c"),
        spec=spec,
    )
    assert list(found) == ["street", "shop_2"]
    assert [read["purpose"] for read in reads.read()] == ["finalize: extra test street", "finalize: extra test shop_2"]
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
    assert found["street"].num_lone_queries == 1
    assert list(found["shop_2"].protocols) == ["shop_2_leave_one_out_across_groups"]
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
    ],
)
def test_settings_that_do_not_fit_are_refused(extra, key):
    with pytest.raises(ConfigError) as caught:
        trial_with(*extra)
    assert {problem.path.split("[")[0] for problem in caught.value.problems} == {key}


def test_a_set_that_is_not_there_is_named(tmp_path):
    machine = parse_machine({"data_root": str(tmp_path)})
    (extra,) = trial_with(STREET).data.extra_tests
    with pytest.raises(DataError, match=r"data\.extra_tests: street: machine\.data_root = .*street' is not a folder"):
        Catalogs(machine).extra(extra)
