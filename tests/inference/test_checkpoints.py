"""Embedding, scoring, collapse, and checkpoints evaluated by their folder, on the handwritten digits."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn
from torchvision.transforms.v2.functional import center_crop

from raydml.config.trial import fingerprint, parse_machine, parse_trial
from raydml.data.catalog import DataError
from raydml.data.datasets import open_catalog
from raydml.data.digests import ImageRecord
from raydml.data.miniatures import build
from raydml.data.seal import TestReads
from raydml.data.splits import make_split
from raydml.errors import ConfigError
from raydml.evaluation.embed import embed, evaluate_embeddings
from raydml.evaluation.nearness import RetrievalError
from raydml.evaluation.saved_embeddings import concatenate, load_embeddings, save_embeddings
from raydml.evaluation.scoring import MetricSpec
from raydml.images.pixels import PackedPixels, packed
from raydml.images.preprocessing import Preprocessing
from raydml.inference.evaluate import RefinementChoice, evaluate_checkpoint, evaluate_saved
from raydml.inference.export import load_checkpoint
from raydml.metrics.names import METRIC_GROUPS
from raydml.models.network import build_network, preprocessing_for
from raydml.training import checkpoint
from raydml.training.randomness import seed_for
from raydml.training.trainer import Trainer
from raydml.training.trial_images import Catalogs
from tests.evaluation.slow_ranking import slow_recall_and_map
from tests.models.networks import make

PLAIN = Preprocessing(resize_px=6, crop_px=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Flatten(nn.Module):
    """Embeds an image as its own pixels; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Linear(1, 1)
        self.calls = []

    def forward(self, images):
        self.calls.append((len(images), self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return self.dropout(self.norm(images)).flatten(1)


def pictures(num_images, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_images, 6, 6, 3), dtype=np.uint8)


def test_embed_keeps_order_and_prepares_as_stated():
    pixels = pictures(7)
    found = embed(Flatten(), packed(pixels), PLAIN, device="cpu", batch_size=3)
    expected = (pixels[:, 1:5, 1:5] / 255).transpose(0, 3, 1, 2).reshape(7, -1) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32


def test_embed_evaluates_without_gradients_and_gives_every_mode_back():
    network = Flatten().train()
    network.norm.eval()  # as a frozen BatchNorm layer is
    before = network.norm.running_mean.clone()
    embed(network, packed(pictures(7)), PLAIN, device="cpu", batch_size=3)
    assert network.calls == [(3, False, False, False), (3, False, False, False), (1, False, False, False)]
    assert (network.training, network.norm.training, network.dropout.training) == (True, False, True)
    assert torch.equal(network.norm.running_mean, before)
    network.eval()
    embed(network, packed(pictures(2)), PLAIN, device="cpu", batch_size=3)
    assert not any(module.training for module in network.modules())


def test_embed_gives_the_modes_back_after_an_error():
    network = Flatten().train()
    network.norm = nn.BatchNorm2d(5)
    with pytest.raises(RuntimeError):
        embed(network, packed(pictures(2)), PLAIN, device="cpu", batch_size=2)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.003)])
def test_precision_is_really_lower_and_the_result_is_float32(precision, tolerance):
    network = make(embedding_dim=8)
    preprocessing = preprocessing_for("convnet", resize_px=8, crop_px=8)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    full = embed(network, packed(pixels), preprocessing, device="cpu", batch_size=4)
    low = embed(network, packed(pixels), preprocessing, device="cpu", batch_size=4, precision=precision)
    assert low.dtype == np.float32
    assert 0 < np.abs(low - full).max() < tolerance


def test_embed_takes_the_centre_of_images_of_different_sizes():
    """Short sides of 6 pixels, long ones of 6 to 9: the 4 x 4 centre is cut as torchvision's CenterCrop cuts it."""
    generator = np.random.default_rng(0)
    sizes = np.array([[6, 9], [7, 6], [6, 6]], dtype=np.int32)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    offsets = np.cumsum([0, *(image.size for image in images[:-1])])
    pixels = PackedPixels(np.concatenate([image.reshape(-1) for image in images]), offsets, sizes)
    found = embed(Flatten(), pixels, PLAIN, device="cpu", batch_size=2)
    for row, image in zip(found, images, strict=True):
        centre = center_crop(torch.from_numpy(image).permute(2, 0, 1), [4, 4]).numpy()
        np.testing.assert_allclose(row, (centre / 255).reshape(-1) / np.sqrt(1 + 1e-5), rtol=1e-5)


SPLIT = {"order": "sorted", "test_fraction": 0.5, "val_fraction": 0.4}
TRIAL = {
    "seed": 5,
    "data": {"name": "digits", "resize_px": 8, "crop_px": 8, "split": SPLIT},
    "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 16},
    "loss": {"name": "contrastive"},
    "sampler": {"name": "class_balanced", "classes_per_batch": 3, "images_per_class": 4},
    "recall_at": [1, 4],
}


def split_of(trial):
    return make_split(open_catalog("digits", None), **trial.data.split.model_dump())


def digits_of(classes):
    """(pixels for the convnet, labels) straight from scikit-learn, prepared by hand: 0..16 -> -1..1."""
    digits = load_digits()
    chosen = np.isin(digits.target, classes)
    grey = np.round(digits.images[chosen] * (255 / 16)) / 127.5 - 1
    return torch.from_numpy(np.repeat(grey[:, None], 3, axis=1)).float(), digits.target[chosen]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint whose weights are another seed's initial ones: they differ without any training."""
    trial = parse_trial(TRIAL)
    network = build_network(**trial.model.model_dump(), seed=77)
    card = {
        "network": trial.model.model_dump(exclude={"weights"}),
        "preprocessing": preprocessing_for("convnet", resize_px=8, crop_px=8).to_dict(),
        "trial": trial.model_dump(mode="json"),
        "fingerprint": fingerprint(trial),
        "epoch": 1,
        "metrics": {},
    }
    folder = tmp_path_factory.mktemp("study") / "checkpoint_000001"
    checkpoint.save(folder, state={}, model_card=card, best_weights=network.state_dict())
    return folder, trial, network


MACHINE = parse_machine({"device": "cpu", "evaluation_batch": 100})


@pytest.mark.parametrize("part", ["val", "test"])
def test_whitening_of_a_checkpoint_is_learned_on_classes_that_are_not_scored(saved, part):
    folder, trial, network = saved
    split = split_of(trial)
    reads = TestReads(folder.parent / "reads.jsonl")
    key = reads.record(purpose="t", checkpoint=folder, commit="c") if part == "test" else None
    choice = RefinementChoice(tta="flip", whiten=True)
    found = evaluate_checkpoint(folder, part, MACHINE, key=key, untrained=False, choice=choice)
    learned_on, which = (
        (split.train, "training") if part == "val" else (split.train + split.val, "training and validation")
    )
    flip, pca, both = found.refined
    assert pca.settings["pca"]["learned_on"] == f"the {which} images of its trial"
    with torch.no_grad():
        rows = network.eval()(digits_of(learned_on)[0]).double().numpy()
        images, labels = digits_of(split.val if part == "val" else split.test)
        plain, mirrored = (network(batch).double().numpy() for batch in (images, images.flip(3)))
    assert pca.settings["pca"]["num_images"] == len(rows)
    mean = plain + mirrored
    whitening = PCA(whiten=True, svd_solver="full").fit(rows)

    def whitened(of):
        return torch.nn.functional.normalize(torch.from_numpy(whitening.transform(of)), dim=1)

    unit = torch.nn.functional.normalize(torch.from_numpy(mean), dim=1)
    for one, expected in ((flip, unit), (pca, whitened(plain)), (both, whitened(unit.numpy()))):
        recall, average = slow_recall_and_map(expected, labels)
        assert one.evaluation.metrics["map_at_r"] == pytest.approx(average, abs=0.004), one.name
        assert one.evaluation.metrics["recall_at_1"] == pytest.approx(recall, abs=0.006), one.name
    assert both.name == "flip+pca"


def test_kept_whitening_is_of_the_same_weights_and_not_of_the_scored_images(saved, tmp_path):
    """A copy of a checkpoint is the same model; another epoch of one trial is another model."""
    folder, trial, network = saved
    reads = TestReads(tmp_path / "reads.jsonl")

    def tested(of, **settings):
        key = reads.record(purpose="t", checkpoint=of, commit="c")
        return evaluate_checkpoint(of, "test", MACHINE, key=key, untrained=False, **settings)

    evaluate_checkpoint(folder, "val", MACHINE, untrained=False, save_to=tmp_path / "val.npz")
    choice = RefinementChoice(whiten=True, whiten_on=tmp_path / "val.npz")
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (pca,) = tested(copy, choice=choice).refined
    assert pca.settings["pca"]["num_images"] == len(digits_of(split_of(trial).val)[1])
    weights = network.state_dict()
    weights[next(iter(weights))] = next(iter(weights.values())) + 1
    card = checkpoint.load_card(folder)
    later = checkpoint.save(tmp_path / folder.name, state={}, model_card=card, best_weights=weights)
    with pytest.raises(RetrievalError, match=r"are by .* \(weights: '\w{16}' and '\w{16}'\)"):
        tested(later, choice=choice)
    # The images that are to be scored, under other names of their classes.
    tested(folder, save_to=tmp_path / "test.npz")
    rows = load_embeddings(tmp_path / "test.npz")
    names = tuple(f"digit {name}" for name in rows.class_names)
    facts = {**rows.facts, "dataset": "image_folder", "part": "all"}
    save_embeddings(tmp_path / "val.npz", rows._replace(class_names=names, facts=facts))
    with pytest.raises(RetrievalError, match=f"{len(rows.labels)} of its {len(rows.labels)} embeddings are those of"):
        tested(copy, choice=choice)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_checkpoint_is_scored_beside_its_untrained_network(saved, part):
    folder, trial, network = saved
    split = split_of(trial)
    assert split.test == (5, 6, 7, 8, 9)
    key = TestReads(folder.parent / "reads.jsonl").record(purpose="t", checkpoint=folder, commit="c")
    metrics = evaluate_checkpoint(folder, part, MACHINE, key=key if part == "test" else None).metrics
    names = ["recall_at_1", "recall_at_4", "r_precision", "map_at_r"]
    assert list(metrics) == names + [f"untrained_{name}" for name in names]
    images, labels = digits_of(split.val if part == "val" else split.test)
    untrained = build_network(**trial.model.model_dump(), seed=seed_for(5, "network_init"))
    for prefix, candidate in (("", network), ("untrained_", untrained)):
        with torch.no_grad():
            recall, average = slow_recall_and_map(candidate.eval()(images), labels)
        assert metrics[f"{prefix}recall_at_1"] == pytest.approx(recall, abs=0.004)
        assert metrics[f"{prefix}map_at_r"] == pytest.approx(average, abs=0.004)
    assert metrics["map_at_r"] != metrics["untrained_map_at_r"]
    again = evaluate_checkpoint(folder, "val", MACHINE, untrained=False, footprint=True)
    assert list(again.metrics) == names
    assert again.footprint["parameters"] == sum(one.numel() for one in network.parameters())
    assert (again.footprint["embedding_bytes"], again.footprint["crop_px"]) == (4 * 16, 8)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_checkpoint_of_a_trial_with_binary_codes_is_scored_by_them_too(saved, tmp_path, part):
    _, trial, network = saved
    card = checkpoint.load_card(saved[0])
    card["trial"]["binary_codes"] = True
    folder = checkpoint.save(tmp_path / "c", state={}, model_card=card, best_weights=network.state_dict())
    key = TestReads(tmp_path / "reads.jsonl").record(purpose="t", checkpoint=folder, commit="c")
    metrics = evaluate_checkpoint(folder, part, MACHINE, key=key if part == "test" else None).metrics
    names = ["recall_at_1", "recall_at_4", "r_precision", "map_at_r"]
    both = names + [f"binary_{name}" for name in names]
    assert list(metrics) == both + [f"untrained_{name}" for name in both]
    split = split_of(trial)
    images, labels = digits_of(split.val if part == "val" else split.test)
    with torch.no_grad():
        recall, average = slow_recall_and_map((network.eval()(images) > 0).float(), labels)
    assert metrics["binary_recall_at_1"] == pytest.approx(recall, abs=0.004)
    assert metrics["binary_map_at_r"] == pytest.approx(average, abs=0.004)
    assert metrics["binary_map_at_r"] != metrics["map_at_r"]


def test_a_trainer_scores_binary_codes_where_its_trial_asks():
    sampler = {**TRIAL["sampler"], "batches_per_epoch": 1}
    results = []
    for changes in ({}, {"binary_codes": True}):
        trainer = Trainer(parse_trial({**TRIAL, "epochs": 1, "sampler": sampler, **changes}), MACHINE, device="cpu")
        results += trainer.epochs()
    plain, both = results
    metrics = [name for name in plain if name.startswith("val_")]
    assert metrics == ["val_recall_at_1", "val_recall_at_4", "val_r_precision", "val_map_at_r"]
    assert set(both) - set(plain) == {name.replace("val_", "val_binary_") for name in metrics}
    assert {name: both[name] for name in metrics} == {name: plain[name] for name in metrics}
    with torch.no_grad():
        images, labels = digits_of(split_of(trainer.trial).val)
        recall, average = slow_recall_and_map((trainer.method.network.eval()(images) > 0).float(), labels)
    assert both["val_binary_recall_at_1"] == pytest.approx(recall, abs=0.004)
    assert both["val_binary_map_at_r"] == pytest.approx(average, abs=0.004)
    assert both["best_val_map_at_r"] == both["val_map_at_r"]


def test_binary_codes_choose_no_trial():
    with pytest.raises(ConfigError, match="select_on"):
        parse_trial({**TRIAL, "binary_codes": True, "select_on": "val_binary_map_at_r"})


def test_the_test_part_needs_a_key_and_opens_nothing_without(saved, monkeypatch):
    monkeypatch.setattr("raydml.training.trial_images.open_catalog", lambda *_: pytest.fail("opened the data"))
    with pytest.raises(DataError, match="sealed"):
        evaluate_checkpoint(saved[0], "test", MACHINE)


def test_other_images_than_the_trials_are_refused(saved, tmp_path):
    folder, _, network = saved
    card = checkpoint.load_card(folder)
    card["trial"]["data"]["content"] = "ab" * 32
    other = checkpoint.save(tmp_path / "c", state={}, model_card=card, best_weights=network.state_dict())
    with pytest.raises(DataError, match=r"data\.content: .* made for images with the hash abababababab"):
        evaluate_checkpoint(other, "val", MACHINE)


def test_test_images_are_those_that_the_study_first_opened(tmp_path):
    """Two pictures of one size are exchanged between classes of the test part; those of the others stay."""
    generator = np.random.default_rng(0)
    for label in range(8):
        (tmp_path / "images" / f"{label}").mkdir(parents=True)
        for number in range(2):
            picture = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            picture.save(tmp_path / "images" / f"{label}" / f"{number}.bmp")  # not compressed: of one size
    machine = parse_machine({"data_root": str(tmp_path / "images"), "cache_dir": str(tmp_path / "cache")})
    split = {"test_fraction": 0.5, "val_fraction": 0.5, "num_folds": 2, "order": "sorted"}
    sampler = {"name": "class_balanced", "classes_per_batch": 2, "images_per_class": 2}
    data = {"name": "image_folder", "resize_px": 8, "crop_px": 8, "split": split}
    trial = parse_trial({**TRIAL, "data": data, "sampler": sampler, "recall_at": [1]})
    catalogs = Catalogs(machine, record=ImageRecord.of_study(tmp_path / "study"))
    folder = Trainer(trial, machine, device="cpu", catalogs=catalogs).save(tmp_path / "study" / "checkpoint_1")
    reads = TestReads(tmp_path / "reads.jsonl")

    def score(part):
        key = reads.record(purpose="x", checkpoint=folder, commit="") if part == "test" else None
        return evaluate_checkpoint(folder, part, machine, key=key, untrained=False, catalogs=catalogs).metrics

    before = {part: score(part) for part in ("val", "test")}
    files = [tmp_path / "images" / label / "0.bmp" for label in ("6", "7")]
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)
    assert score("val") == before["val"]
    with pytest.raises(DataError, match=r"2 of 8 images .*6/0\.bmp, 7/0\.bmp"):
        score("test")
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    assert score("test") == before["test"]


def test_one_evaluation_of_all_lists_of_vehicleid_is_that_of_each_list(tmp_path):
    """As with three evaluations by one list each, to the last bit, also from saved embeddings and for an ensemble."""
    root = build("vehicleid", tmp_path / "data", classes_per_part=4)
    noise = np.random.default_rng(0)
    for file in sorted((root / "image").iterdir()):  # colours that show the class would be found without an error
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    machine = parse_machine({"data_root": str(root), "device": "cpu"})
    spec = MetricSpec((1, 2), groups=METRIC_GROUPS, intervals=True)
    found, files = {}, {}
    for name in ("vehicleid", "vehicleid_small", "vehicleid_medium", "vehicleid_large"):
        trial = parse_trial({**TRIAL, "data": {**TRIAL["data"], "name": name}})
        network = build_network(**trial.model.model_dump(), seed=77)
        card = {
            "network": trial.model.model_dump(exclude={"weights"}),
            "preprocessing": preprocessing_for("convnet", resize_px=8, crop_px=8).to_dict(),
            "trial": trial.model_dump(mode="json"),
        }
        folder = checkpoint.save(tmp_path / name, state={}, model_card=card, best_weights=network.state_dict())
        key = TestReads(tmp_path / "reads.jsonl").record(purpose="t", checkpoint=folder, commit="c")
        files[name] = tmp_path / f"{name}.npz"
        found[name] = evaluate_checkpoint(folder, "test", machine, key=key, spec=spec, save_to=files[name])
    every = found.pop("vehicleid")
    expected = dict(found["vehicleid_large"].metrics)  # all sealed classes
    for name, alone in found.items():
        prefix = name.removeprefix("vehicleid_") + "_"
        for metric, value in alone.metrics.items():
            start = "untrained_" if metric.startswith("untrained_") else ""
            expected[f"{start}{prefix}{metric.removeprefix(start)}"] = value
        of_list = {metric: bounds for metric, bounds in every.intervals.items() if metric.startswith(prefix)}
        assert of_list == {f"{prefix}{metric}": bounds for metric, bounds in alone.intervals.items()}
        for protocol, sentence in alone.protocols.items():
            assert every.protocols[f"{prefix}{protocol}"] == f"{prefix[:-1]} list: {sentence}"
    assert every.metrics == expected
    assert len({every.metrics[f"{name}_map_at_r"] for name in ("small", "medium", "large")}) == 3
    assert "medium_one_gallery_image_recall_at_1" in every.metrics
    again = evaluate_saved(load_embeddings(files["vehicleid"]), spec)
    assert again.metrics == {name: value for name, value in expected.items() if not name.startswith("untrained_")}
    ensembles = [concatenate([load_embeddings(files[name])] * 2) for name in ("vehicleid", "vehicleid_medium")]
    together, medium = (evaluate_saved(ensemble, spec).metrics for ensemble in ensembles)
    assert {f"medium_{name}": value for name, value in medium.items()}.items() <= together.items()
    # An unreadable test image is left out where the machine allows it, and the evaluation counts it.
    assert every.num_left_out == 0
    test_image = root / "image" / load_embeddings(files["vehicleid_large"]).paths[-1].rpartition("/")[2]
    test_image.write_bytes(b"x" * test_image.stat().st_size)  # the content hash has the size
    machine = machine.model_copy(update={"on_unreadable": "skip"})
    key = TestReads(tmp_path / "reads.jsonl").record(purpose="t", checkpoint=folder, commit="c")
    assert evaluate_checkpoint(folder, "test", machine, key=key, untrained=False).num_left_out == 1


def test_the_network_of_a_checkpoint_has_the_saved_weights(saved):
    folder, _, network = saved
    model = load_checkpoint(folder)
    assert not model.network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], tensor), name
    assert model.preprocessing.crop_px == 8
    assert model.card["epoch"] == 1


def test_intervals_draw_whole_classes():
    """Two classes, one always found and one never: drawn query by query the mean could hardly leave 0.5."""
    generator = np.random.default_rng(0)
    good = np.repeat(np.eye(40)[:2] * 10, 20, axis=0)[:20] + 0.01 * generator.standard_normal((20, 40))
    lost = np.repeat(np.eye(40)[2:22] * 10, 2, axis=0)  # pairs of twins from two different classes
    rows = np.concatenate([good, lost]).astype(np.float32)
    labels = np.array([0] * 20 + [1, 2] * 20)
    found = evaluate_embeddings(rows, labels, None, ["leave_one_out"], MetricSpec((1,), intervals=True))
    assert found.metrics["recall_at_1"] == pytest.approx(20 / 60)
    low, high = found.intervals["recall_at_1"]
    assert (low, high) == (0.0, 1.0), "three classes are drawn: all of the found one, or none"
