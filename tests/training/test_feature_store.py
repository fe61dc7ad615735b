"""Features of a frozen backbone, kept: the same trial as with the backbone in the loop, and one pass for all trials."""

import json
import logging
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2

from raydml.config.trial import fingerprint, parse_machine, parse_trial
from raydml.data.catalog import DataError
from raydml.errors import ConfigError
from raydml.images.augmentation import View, draw, drawn_views, views_of
from raydml.images.augmentation_settings import Augmentation
from raydml.images.features import FeatureLoader
from raydml.images.loader import Loader
from raydml.models.convnet import ConvNet
from raydml.training import feature_store
from raydml.training.trainer import Trainer
from raydml.training.trial_images import Catalogs
from tests.models.networks import make

VIEWS = {"five_crops": True, "flip": True}
METHODS = {
    "plain": {"name": "plain"},
    "divide_conquer": {"name": "divide_conquer", "num_learners": 2, "recluster_every": 1},
    "mic": {"name": "mic", "num_clusters": 3, "recluster_every": 1, "images_per_cluster": 2},
}


@pytest.fixture
def images(tmp_path):
    """Eight classes of four photographs of noise, 40 x 32 px."""
    generator = np.random.default_rng(0)
    for label in range(8):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"class{label}" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path):
    network = make("convnet", seed=5)
    save_file(network.trunk.state_dict(), tmp_path / "convnet.safetensors")
    return tmp_path / "convnet.safetensors"


def trial_of(weights, *, augmentation=None, **changes):
    return parse_trial(
        {
            "epochs": 3,
            "data": {
                "name": "image_folder",
                "resize_px": 32,
                "crop_px": 24,
                "split": {"test_fraction": 0.25, "val_fraction": 0.34, "num_folds": 3, "fold": 0},
                "augmentation": VIEWS if augmentation is None else augmentation,
            },
            "model": {"backbone": "convnet", "weights": str(weights), "embedding_dim": 8, "train": "head"},
            "loss": {"name": "contrastive"},
            "sampler": {"name": "class_balanced", "classes_per_batch": 4, "images_per_class": 2},
            "recall_at": [1],
            "optimizer": {"name": "adamw", "learning_rate": 0.01},
            **changes,
        }
    )


def machine_of(images, cache, **changes):
    return parse_machine({"data_root": str(images), "cache_dir": cache and str(cache), **changes})


def trained(trial, machine):
    trainer = Trainer(trial, machine, device="cpu")
    return trainer, list(trainer.epochs())


def without_times(result):
    return {name: value for name, value in result.items() if not name.endswith("_s") and name != "peak_memory_bytes"}


def of(trainer):
    return trainer.method.network.state_dict()


def test_each_view_is_torchvisions(images, weights, tmp_path):
    trainer = Trainer(trial_of(weights), machine_of(images, tmp_path / "cache"), device="cpu")
    network = trainer.method.network.eval()
    crops = v2.FiveCrop(24)
    for row in (0, 5):
        (pixels,) = trainer.train_images.pixels.read([row])
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        top_left, top_right, bottom_left, bottom_right, centre = crops(image)
        expected = []
        for crop in (centre, top_left, top_right, bottom_left, bottom_right):
            expected += [crop, v2.functional.horizontal_flip(crop)]
        inputs = trainer.preprocessing.normalise(torch.stack(expected).permute(0, 2, 3, 1))
        with torch.no_grad():
            features = network.trunk(inputs)
        kept = trainer.train_features
        found = [kept.read([row], view)[0] for view in range(10)]
        torch.testing.assert_close(torch.from_numpy(np.stack(found)), features)


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_is_the_same_as_with_the_backbone_in_the_loop(images, weights, tmp_path, method):
    sampler = {"name": "class_balanced", "classes_per_batch": 4, "images_per_class": 4}
    trial = trial_of(weights, method=METHODS[method], sampler=sampler)
    kept, of_kept = trained(trial, machine_of(images, tmp_path / "cache"))
    computed, of_computed = trained(trial, machine_of(images, tmp_path / "cache", feature_store="off"))
    assert isinstance(kept.loader, FeatureLoader)
    assert isinstance(computed.loader, Loader)
    for name, value in of(computed).items():
        torch.testing.assert_close(of(kept)[name], value, rtol=1e-4, atol=1e-5)
    for one, other in zip(of_kept, of_computed, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert one["val_map_at_r"] == pytest.approx(other["val_map_at_r"], abs=1e-6)
    assert len({result["train_loss"] for result in of_kept}) == 3


def test_a_trial_resumes_exactly(images, weights, tmp_path):
    machine = machine_of(images, tmp_path / "cache")
    _, whole = trained(trial_of(weights), machine)
    first = Trainer(trial_of(weights), machine, device="cpu")
    steps = first.steps()
    while first.epoch < 1 or first.epoch_state is None or first.epoch_state.position < 1:
        next(steps)
    first.save(tmp_path / "checkpoint")
    second = Trainer(trial_of(weights), machine, device="cpu")
    second.restore(tmp_path / "checkpoint")
    rest = list(second.epochs())
    assert [without_times(result) for result in rest] == [without_times(result) for result in whole[1:]]


def counted_trunk(monkeypatch):
    """How many images every convnet trunk gets, in a list that grows."""
    seen = []
    forward = ConvNet.forward
    monkeypatch.setattr(ConvNet, "forward", lambda self, images: seen.append(len(images)) or forward(self, images))
    return seen


def test_the_backbone_sees_each_image_once_in_all_trials_of_all_folds(images, weights, tmp_path, monkeypatch):
    seen = counted_trunk(monkeypatch)
    machine = machine_of(images, tmp_path / "cache")
    for fold in range(3):
        trial = trial_of(weights, augmentation={"flip": True})
        split = trial.data.split.model_copy(update={"fold": fold})
        trained(trial.model_copy(update={"data": trial.data.model_copy(update={"split": split})}), machine)
    assert sum(seen) == 2 * 6 * 4, "24 development images in two views"
    trained(trial_of(weights, augmentation={"flip": True}, seed=3, loss={"name": "margin"}), machine)
    assert sum(seen) == 48
    trained(trial_of(weights, augmentation={}), machine)
    assert sum(seen) == 48 + 24, "other views are another set"


@pytest.mark.parametrize("change", ["weights", "image", "crop", "precision"])
def test_whatever_decides_the_features_decides_which_are_taken(images, weights, tmp_path, monkeypatch, change):
    machine = machine_of(images, tmp_path / "cache")
    trained(trial_of(weights, augmentation={}), machine)
    trial = trial_of(weights, augmentation={})
    if change == "weights":
        state = load_file(weights)
        name = next(name for name in state if name.endswith("weight"))
        save_file({**state, name: state[name] + 0.1}, weights)
    elif change == "image":
        pixels = np.full((32, 40, 3), 7, dtype=np.uint8)
        for label in range(8):
            Image.fromarray(pixels).save(images / f"class{label}" / "0.png")
    elif change == "crop":
        trial = trial.model_copy(update={"data": trial.data.model_copy(update={"crop_px": 20})})
    else:
        trial = trial.model_copy(update={"precision": "bf16"})
    seen = counted_trunk(monkeypatch)
    list(Trainer(trial, machine, device="cpu", catalogs=Catalogs(machine, on_changed="accept")).epochs())
    assert sum(seen) == 24


def test_damaged_features_are_computed_anew_with_a_warning(images, weights, tmp_path, caplog):
    machine = machine_of(images, tmp_path / "cache")
    _, before = trained(trial_of(weights), machine)
    (manifest,) = (tmp_path / "cache").glob("features-*/manifest.json")
    file = manifest.parent / json.loads(manifest.read_text())["values"]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="raydml"):
        _, after = trained(trial_of(weights), machine)
    assert "are damaged" in caplog.text
    assert [without_times(result) for result in after] == [without_times(result) for result in before]


def test_without_space_the_backbone_stays_in_the_loop_with_a_warning(images, weights, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="raydml"):
        trainer, results = trained(trial_of(weights), machine_of(images, tmp_path / "cache", max_cache_gib=0.0001))
    assert isinstance(trainer.loader, Loader)
    assert "machine.max_cache_gib allows" in caplog.text
    assert len(results) == 3


def test_without_a_cache_each_process_keeps_its_own(images, weights, tmp_path, monkeypatch):
    seen = counted_trunk(monkeypatch)
    trainer, _ = trained(trial_of(weights, augmentation={}), machine_of(images, None))
    assert isinstance(trainer.loader, FeatureLoader)
    assert sum(seen) == 24
    assert not list(tmp_path.glob("**/features-*"))


def _compute(arguments):
    images, weights, cache = arguments
    trainer = Trainer(trial_of(weights), machine_of(images, cache), device="cpu")
    return trainer.train_features.read(range(4), 3).tobytes()


@pytest.mark.slow
def test_of_several_processes_one_computes(images, weights, tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, other = pool.map(_compute, [(images, weights, tmp_path / "cache")] * 2)
    assert one == other
    assert len(list((tmp_path / "cache").glob("features-*/*.npy"))) == 1


def test_only_a_frozen_backbone_and_a_few_views_are_kept(images, weights, tmp_path):
    machine = machine_of(images, tmp_path / "cache")
    random_crops = trial_of(weights, augmentation={"random_resized_crop": [0.5, 1.0]})
    assert isinstance(Trainer(random_crops, machine, device="cpu").loader, Loader)
    model = {"backbone": "convnet", "weights": str(weights), "embedding_dim": 8}
    assert isinstance(Trainer(trial_of(weights, model=model), machine, device="cpu").loader, Loader)


def test_a_disk_without_space_is_named_and_nothing_is_left(images, weights, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(feature_store, "flush_to_disk", full)
    with pytest.raises(DataError, match=r"machine.cache_dir = .*No space left"):
        Trainer(trial_of(weights), machine_of(images, tmp_path / "cache"), device="cpu")
    (folder,) = (tmp_path / "cache").glob("features-*")
    assert [file.name for file in folder.iterdir()] == ["lock"]


def test_views_are_the_inputs_that_an_augmentation_can_make():
    assert views_of(Augmentation()) == (View(0, False),)
    assert views_of(Augmentation(flip=True)) == (View(0, False), View(0, True))
    assert len(set(views_of(Augmentation(flip=True, five_crops=True)))) == 10
    assert views_of(Augmentation(random_resized_crop=(0.5, 1.0))) == ()
    assert views_of(Augmentation(flip=True, grayscale=0.1)) == ()


def test_each_of_five_crops_is_drawn_equally_often_and_excludes_other_crops():
    views = drawn_views(Augmentation(five_crops=True, flip=True), draw(20_000, 1))
    counts = np.bincount(views, minlength=10)
    assert counts.sum() == 20_000
    assert (np.abs(counts - 2_000) < 5 * np.sqrt(2_000 * 0.9)).all()
    with pytest.raises(ConfigError, match="five_crops = true: excludes random_resized_crop"):
        trial_of("x", augmentation={"five_crops": True, "random_crop": True})


def test_a_trial_without_five_crops_keeps_its_fingerprint():
    plain = trial_of("x", augmentation={"flip": True}).model_dump(mode="json")
    assert "five_crops" not in plain["data"]["augmentation"]
    assert fingerprint(trial_of("x", augmentation={})) != fingerprint(trial_of("x", augmentation={"five_crops": True}))


def test_features_do_not_push_out_the_images_that_they_are_made_of(images, weights, tmp_path, caplog):
    """Images 24 x 32 x 40 x 3 bytes, features 24 x 10 x 128 x 4: each fits into 140,000 bytes, both do not."""
    machine = machine_of(images, tmp_path / "cache", max_cache_gib=140_000 / 2**30)
    with caplog.at_level(logging.WARNING, logger="raydml"):
        trainer = Trainer(trial_of(weights), machine, device="cpu")
    assert isinstance(trainer.loader, Loader)
    assert "of which the images take" in caplog.text
    assert len(list((tmp_path / "cache").glob("images-*/manifest.json"))) == 1


def test_what_a_killed_writer_left_makes_room(images, weights, tmp_path):
    left = tmp_path / "cache" / "features-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "partial.npy").write_bytes(bytes(300_000))
    trainer = Trainer(
        trial_of(weights), machine_of(images, tmp_path / "cache", max_cache_gib=400_000 / 2**30), device="cpu"
    )
    assert isinstance(trainer.loader, FeatureLoader)
    assert not (left / "partial.npy").exists()


def test_the_batch_of_evaluation_decides_no_bit_of_the_features(images, weights, tmp_path):
    of_one, of_many = (
        Trainer(trial_of(weights), machine_of(images, tmp_path / f"cache{size}", evaluation_batch=size), device="cpu")
        for size in (1, 256)
    )
    assert np.array_equal(of_one.train_features.values, of_many.train_features.values)
