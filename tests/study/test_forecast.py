"""Forecasts of small studies, counted by hand."""

import pytest
import torch
from PIL import Image

from raydml.config.trial import Trial, parse_trial
from raydml.data.catalog import DataError
from raydml.study.folder import StudyError, plan_study
from raydml.study.forecast import find_weights, forecast
from raydml.study.probe import probe_study, shape_of
from tests.study.test_folder import space_at


def test_images_steps_and_stages_by_hand(tmp_path):
    plan = forecast(
        plan_study(space_at(tmp_path, overrides=["trial.epochs=2", "study.search.scheduler=none"])), tmp_path
    )
    (data,) = plan["data"]
    assert (data["num_images"], data["num_classes"], data["as_published"]) == (1797, 10, False)
    # scikit-learn counts 178, 182, 177, 183, 181 images of the digits 0 to 4 and 896 of the others.
    assert [row["split"] for row in data["splits"]] == ["search", "fold 0", "fold 1"]
    search = data["splits"][0]
    assert search["train"] == {"num_images": 178 + 182 + 177, "num_classes": 3}
    assert search["val"] == {"num_images": 183 + 181, "num_classes": 2}
    assert search["test"] == {"num_images": 896, "num_classes": 5}
    assert [(stage["stage"], stage["num_trials"], stage["epochs"]) for stage in plan["stages"]] == [
        ("search", 3, 6),
        ("confirm", 4, 8),
    ]
    assert plan["cache"] is None
    assert [(row["backbone"], row["found"]) for row in plan["weights"]] == [("convnet", None)]
    steps = plan["steps"]
    assert steps["per_trial"] == [2 * number for number in steps["per_epoch"]]
    assert not steps["are_expected"]


def test_trials_of_different_lengths_are_counted_one_by_one(tmp_path):
    def stages(*more):
        overrides = ["trial.epochs={grid: [2, 20]}", "study.search.num_trials=1", *more]
        return forecast(plan_study(space_at(tmp_path, overrides=overrides)), tmp_path)["stages"]

    search, confirm = stages("study.search.scheduler=none")
    assert (search["num_trials"], search["epochs"], search["most_epochs"]) == (2, 22, 22)
    assert search["in_words"] == "2 trials of 2 to 20 epochs"
    assert confirm["in_words"].endswith("of 2 to 20 epochs")
    # Two trials of 20 epochs would take about 20 + (20 + 2) / 2.
    search, _ = stages("study.search.scheduler=asha", "study.search.grace_epochs=2", "study.search.reduction_factor=2")
    assert (search["epochs"], search["most_epochs"]) == (22, 22)


def test_runs_on_further_folds_are_counted_at_most_and_in_words(tmp_path):
    def search(*more):
        overrides = ["trial.epochs=9", "study.search.num_trials=9", "study.confirm=null", "study.search.folds=2", *more]
        plan = forecast(plan_study(space_at(tmp_path, overrides=overrides)), tmp_path)
        return plan["stages"][0], [row["split"] for row in plan["data"][0]["splits"]]

    row, splits = search("study.search.scheduler=none")
    assert (row["num_trials"], row["epochs"], row["most_epochs"]) == (9, 9 * 9 + 9 * 9, 2 * 9 * 9)
    assert row["in_words"] == (
        "9 trials of 9 epochs; then at most 9 runs on 1 further fold, 81 epochs: of each trial that runs to its end"
    )
    assert splits == ["search", "fold 0"]
    # Rungs at 1 and 3: of 9 trials 3 and then 1 go on.
    row, _ = search("study.search.scheduler=sync")
    assert (row["epochs"], row["most_epochs"]) == (9 + 3 * 2 + 1 * 6 + 9, 2 * 81)
    # Trials of 2 epochs end by themselves.
    row, _ = search("study.search.scheduler=sync", "trial.epochs={grid: [2, 9]}", "study.search.num_trials=2")
    assert "then at most 4 runs on 1 further fold, 22 epochs" in row["in_words"]


def test_a_forecast_refuses_what_a_run_would(tmp_path):
    with pytest.raises(DataError, match="batches_per_epoch = 1 cannot show all 3 classes"):
        forecast(plan_study(space_at(tmp_path, overrides=["trial.sampler.batches_per_epoch=1"])), tmp_path)


def test_the_cache_holds_the_resized_images(tmp_path):
    root = tmp_path / "images"
    for label in range(8):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 20), (30 * label, 60 * number, 0)).save(root / f"class{label}" / f"{number}.png")
    overrides = [f"machine.data_root={root}", "trial.data.name=image_folder", "trial.data.split.test_fraction=0.25"]
    overrides += ["trial.data.split.val_fraction=0.5", "trial.data.resize_px=16", "trial.recall_at=[1]"]
    plan = forecast(plan_study(space_at(tmp_path, overrides=overrides)), tmp_path)
    # 32 x 16 pixels of 3 bytes each, a multiple of the alignment of 64: 6 of 8 classes are development classes.
    assert plan["cache"]["development_bytes"] == 6 * 4 * 32 * 16 * 3
    assert plan["cache"]["test_bytes"] == 2 * 4 * 32 * 16 * 3
    assert plan["cache"]["folder"] == str(tmp_path.resolve() / "cache")
    assert not (tmp_path / "cache").exists()


def test_weights_are_looked_for_and_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    base = {
        "data": {"name": "digits", "resize_px": 32, "crop_px": 32},
        "loss": {"name": "normalized_softmax"},
        "sampler": {"name": "uniform", "batch_size": 32},
    }

    def trial(backbone: str, weights: str) -> Trial:
        return parse_trial({**base, "model": {"backbone": backbone, "weights": weights}})

    found, words = find_weights(trial("resnet18", "default"))
    place = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    assert not found
    assert str(place) in words
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in words
    place.parent.mkdir()
    place.touch()
    assert find_weights(trial("resnet18", "default")) == (True, f"found: {place}")
    assert find_weights(trial("resnet18", str(place))) == (True, f"found: {place}")
    assert find_weights(trial("convnet", "none")) == (None, "random weights")
    absent = tmp_path / "mine.pth"
    assert str(absent) in find_weights(trial("resnet18", str(absent)))[1]


@pytest.mark.slow  # two processes import torch
def test_a_probe_measures_each_shape_of_trial_once(tmp_path):
    overrides = [
        "trial.model.embedding_dim={choice: [8, 16]}",
        "study.search.num_trials=4",
        "study.search.scheduler=none",
    ]
    overrides += ["trial.epochs=3", "machine.device=cpu"]
    plan = plan_study(space_at(tmp_path, overrides=overrides))
    expected = probe_study(plan, tmp_path, forecast(plan, tmp_path))
    assert [(row["num_trials"], list(row["shape"])) for row in expected["probe"]] == [(2, ["model.embedding_dim"])] * 2
    for row in expected["probe"]:
        assert 2e8 < row["peak_memory_bytes"] < 2e10  # torch alone takes more than the first
        assert 0 < row["seconds_per_step"] < 10
        # 2 batches in an epoch, and no method that clusters
        assert row["epoch_s"] == pytest.approx(2 * row["seconds_per_step"] + row["validation_s"])
    mean_s = sum(row["epoch_s"] for row in expected["probe"]) / 2
    epochs = 4 * 3 + 4 * 3  # search, and 2 folds of 2 seeds
    assert expected["hours"] == pytest.approx(epochs * mean_s / expected["slots"]["num_slots"] / 3600)


@pytest.mark.parametrize("machine", ["ranks_per_trial=2", "gpus_per_trial=2"])
def test_a_probe_of_several_ranks_is_refused(tmp_path, machine):
    plan = plan_study(space_at(tmp_path, overrides=[f"machine.{machine}"]))
    with pytest.raises(StudyError, match=r"--probe: it measures the steps of one process"):
        probe_study(plan, tmp_path, forecast(plan, tmp_path))


def test_a_probe_opens_no_sealed_image(tmp_path):
    without = ["trial.data.split={val_fraction: 0, test_fraction: 0}", "trial.sampler.batches_per_epoch=5"]
    without += ["study.confirm=null", "study.finalize=null"]
    space = space_at(tmp_path, overrides=[*without, "study.refit={seeds: 1}"])
    plan = plan_study(space)
    with pytest.raises(StudyError, match=r"(?s)--probe: .*Cure: add --set trial\.data\.split\.test_fraction=0\.5"):
        probe_study(plan, tmp_path, forecast(plan, tmp_path))


def test_what_decides_speed_and_memory_is_a_shape(tmp_path):
    first, *_ = plan_study(space_at(tmp_path)).trials
    other_rate = first.model_copy(update={"optimizer": first.optimizer.model_copy(update={"learning_rate": 1.0})})
    assert shape_of(other_rate) == shape_of(first)
    other_fold = first.model_copy(
        update={"data": first.data.model_copy(update={"split": first.data.split.model_copy(update={"fold": 1})})}
    )
    assert shape_of(other_fold) == shape_of(first)
    assert shape_of(first.model_copy(update={"precision": "bf16"})) != shape_of(first)
