"""Every space that comes with raydml, run in miniature."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from raydml.search_space.smoke import write_smoke_space
from raydml.search_space.space import load_space
from raydml.study.events import read_state
from raydml.study.folder import create_study, read_json
from raydml.study.smoke import mark_as_smoke, smoke_outcome
from raydml.study.stages import run_study
from tests.study.in_process import without_ray
from tests.study.small import leave_pictures_out

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
# These run with their own backbone, one of each system and of each benchmark; the others with a tiny one.
OWN_BACKBONE = {"divide_conquer_sop", "classification_cars196", "deep_metric_inshop", "multi_similarity_cub200"}
OWN_BACKBONE |= {"mdr_cub200", "mic_vehicleid", "digits", "glyphs", "image_folder", "loss_zoo"}
OWN_BACKBONE |= {"methods_digits", "methods_image_folder"}
FOUNDATIONS = {path.stem for path in SPACES if path.stem.startswith("foundation_")}
OWN_BACKBONE |= {"foundation_cub200"}
# Their pictures are drawn: those of each system, of a benchmark and of images of one's own.
PICTURES = {"divide_conquer_inshop", "classification_cub200", "deep_metric_cub200", "multi_similarity_cub200"}
PICTURES |= {"mdr_sop", "mic_cub200", "image_folder", "foundation_image_folder"}
# Trials of the search, where they are not two. Every loss and method in the first; ResNet-50 takes 10 s for a trial.
NUM_TRIALS = {"reality_check_cub200": 24, "method_x_loss_cub200": 24, "divide_conquer_inshop": 4}
NUM_TRIALS |= dict.fromkeys(("divide_conquer_sop", "classification_cars196", "mic_vehicleid", *FOUNDATIONS), 1)
NUM_TRIALS["foundation_cub200"] = 6  # each network with each part that learns


def smoke_overrides(name, has_own_backbone=None):
    overrides = ["machine.data_root=.", "machine.device=cpu"]
    if name in OWN_BACKBONE if has_own_backbone is None else has_own_backbone:
        return overrides
    if name in FOUNDATIONS:
        return [*overrides, "trial.model.backbone=timm:test_vit"]
    overrides += ["trial.model.backbone=convnet", "trial.model.weights=none"]
    # Its embedding is the pooled features themselves.
    return [*overrides, "trial.model.embedding_dim=128"] if name.startswith("classification") else overrides


@pytest.mark.parametrize(
    ("sampler", "seconds"),
    [
        ({"name": "class_balanced", "classes_per_batch": 4, "images_per_class": 5}, 2.0),
        ({"name": "made_up", "num_pairs": 8}, 0.0),
    ],
)
def test_seconds_per_step_are_known_where_the_sampler_says_the_size_of_a_batch(sampler, seconds, monkeypatch):
    epochs = {0: {"images_per_s": 10.0, "peak_memory_bytes": 7}}
    trial = SimpleNamespace(config={"sampler": sampler}, epochs=epochs, ended="finished", stage="search")
    monkeypatch.setattr("raydml.study.smoke.read_state", lambda _: SimpleNamespace(trials={"search-000": trial}))
    outcome = smoke_outcome(Path("unused"))
    assert (outcome.peak_memory_bytes, outcome.seconds_per_step) == (7, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_space_runs_in_miniature_from_its_first_trial_to_its_report(path, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    space = load_space(path, smoke_overrides(path.stem))
    small = write_smoke_space(space, tmp_path / "data", max_trials=NUM_TRIALS.get(path.stem, 2))
    folder = create_study(load_space(small), storage=tmp_path, tracking_uri="sqlite:///unused.db", space_text="text")
    mark_as_smoke(folder)
    if path.stem not in PICTURES:
        leave_pictures_out(folder)
    assert run_study(folder).status == "finished"
    outcome = smoke_outcome(folder)
    assert outcome.failures == []
    for trial in read_state(folder).trials.values():
        is_refit = trial.stage == "refit"  # for as many epochs as the confirmed runs took to their best one
        assert len(trial.epochs) == trial.config["epochs"]
        assert is_refit or len(trial.epochs) == 2
        for metrics in trial.epochs.values():
            assert math.isfinite(metrics["train_loss"])
            assert ("val_map_at_r" not in metrics) if is_refit else (0 <= metrics["val_map_at_r"] <= 1)
            # May be 0: the classes of the miniatures differ so much that all pairs are beyond their margins.
            assert math.isfinite(metrics["gradient_norm"])
            assert "clustering_s" not in metrics or metrics["clustering_s"] > 0
    assert space.study.finalize is None or read_json(folder / "final.json")[0]["metrics"]
    assert "Smoke run on generated images" in (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert read_json(folder / "study.json")["name"] == f"{path.stem}-smoke"
