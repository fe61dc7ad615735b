"""Studies on a real (embedded) Ray: stages, what they leave, what a restart does, and the seal of the test classes."""

import json
import math
import os
import re
import shutil
import signal
import threading
import time

import filelock
import numpy as np
import pytest
import ray
from scipy import stats

from raydml.analysis.trials import TrialState
from raydml.config.trial import Machine, parse_trial
from raydml.data.catalog import DataError
from raydml.data.datasets import open_catalog
from raydml.data.seal import TestReads
from raydml.data.splits import make_split
from raydml.report.text import findings
from raydml.search_space.space import load_space
from raydml.study import events, stages
from raydml.study.budget import Budget
from raydml.study.driver import LOCK, StudyHeld
from raydml.study.events import events_path, read_trials
from raydml.study.extension import extend_search
from raydml.study.folder import StudyError, create_study, move_data_root, newest_checkpoint, read_json
from raydml.study.process import MachineFault
from raydml.study.stages import run_study
from raydml.training import checkpoint
from raydml.training.trainer import Trainer
from tests.study.in_process import without_ray
from tests.study.repeatable import repeatable
from tests.study.small import leave_pictures_out
from tests.study.test_folder import SPACE, image_folder

METRIC = "val_map_at_r"
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def new_study(folder, *, name="digits", pictures=False, **settings):
    path = folder / "mini.yaml"
    path.write_text(SPACE % name)
    space = load_space(path, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    made = create_study(space, storage=folder / "studies", tracking_uri="sqlite:///unused.db", space_text="text")
    return made if pictures else leave_pictures_out(made)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study: two trials of one epoch, the better one confirmed on two folds and tested."""
    settings = {"study.search.num_trials": 2, "trial.epochs": 1, "study.confirm.seeds": 1, "study.finalize": {"top": 1}}
    settings |= {"study.search.scheduler": "none"}
    folder = new_study(tmp_path_factory.mktemp("finished"), pictures=True, **settings)
    assert run_study(folder).status == "finished"
    return folder


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """Three trials of two epochs, of which two stop after the first; the best confirmed on two folds with two seeds.

    Then it is refitted with two seeds.
    """
    settings = {"study.search.scheduler": "sync", "study.search.reduction_factor": 3, "study.finalize": {"top": 1}}
    settings |= {"study.refit": {"seeds": 2}, "trial.sampler.batches_per_epoch": 3}
    folder = new_study(tmp_path_factory.mktemp("halved"), **settings)
    assert run_study(folder).status == "finished"
    return folder


def curves(folder, stage):
    return {key: {e: m[METRIC] for e, m in r.epochs.items()} for key, r in read_trials(folder, stage).items()}


@pytest.mark.slow
def test_the_search_stops_losers_at_the_rung_and_ranks_by_the_best_epoch(halved):
    trials = read_trials(halved, "search")
    assert sorted(trial.ended for trial in trials.values()) == ["finished", "stopped_early", "stopped_early"]
    at_the_rung = {key: trial.epochs[1][METRIC] for key, trial in trials.items()}
    (survivor,) = [key for key, trial in trials.items() if trial.ended == "finished"]
    assert survivor == max(at_the_rung, key=at_the_rung.get)
    ranking = read_json(halved / "ranking.json")
    best = {key: max(values.values()) for key, values in curves(halved, "search").items()}
    assert [row["trial"] for row in ranking] == sorted(best, key=lambda key: -best[key])


def check_confirmation(folder, expected_runs):
    (row,) = read_json(folder / "confirmed.json")
    assert row["from_trial"] == read_json(folder / "ranking.json")[0]["trial"]
    assert [(run["fold"], run["seed"]) for run in row["runs"]] == expected_runs
    values = [max(curve.values()) for curve in curves(folder, "confirm").values()]
    low, high = stats.t.interval(0.95, df=len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert row["mean"] == pytest.approx((low + high) / 2)
    assert row["half_width"] == pytest.approx((high - low) / 2)


def test_confirmation_is_a_t_interval_over_folds(finished):
    check_confirmation(finished, [(0, 0), (1, 0)])


@pytest.mark.slow
def test_confirmation_is_a_t_interval_over_folds_and_seeds(halved):
    check_confirmation(halved, [(0, 0), (0, 1), (1, 0), (1, 1)])


def test_the_test_classes_are_read_once_for_each_confirmed_run_and_each_read_is_recorded(finished):
    (row,) = read_json(finished / "final.json")
    confirmed = {run["trial"]: run["value"] for run in read_json(finished / "confirmed.json")[0]["runs"]}
    assert sorted(row["runs"]) == sorted(confirmed) == ["confirm-000", "confirm-001"]
    reads = TestReads(finished / "test_reads.jsonl").read()
    of_images = [read for read in reads if read["purpose"] == "finalize"]
    assert sorted(read["checkpoint"].split("/")[-2] for read in of_images) == sorted(row["runs"])
    again = [read["checkpoint"].split("/")[-1] for read in reads if read not in of_images]
    winner = max(confirmed, key=confirmed.get)
    assert sorted(again) == sorted([*(f"{key}.npz" for key in confirmed), f"{winner}.npz"]), "ensembles, pictures"
    for name, interval in row["metrics"].items():
        assert interval["mean"] == pytest.approx(np.mean([run["test"][name] for run in row["runs"].values()]))
        if name not in ("density", "rho"):
            assert 0 < row["untrained"][name]["mean"] < 1
    assert {"recall_at_1", "map_at_r", "mrr", "map_at_1000", "nmi_geometric", "ami", "ari", "pair_f1", "rho"} <= set(
        row["metrics"]
    )
    for key, run in row["runs"].items():
        kept = np.load(finished / "final" / f"{key}.npz")["embeddings"]
        assert run["footprint"]["embedding_bytes"] == kept[0].nbytes
        assert run["footprint"]["ms_batch_64"] > 0
    (sentence,) = row["protocols"].values()
    assert re.fullmatch(r"leave one out: each of \d+ images searches the \d+ others; 5 classes", sentence)
    assert {key: run["val"]["map_at_r"] for key, run in row["runs"].items()} == confirmed
    noted = [event for event in events.read(events_path(finished)) if event["event"] == "test_read"]
    assert len(noted) == len(reads) == 2 + 2 + 1


def check_ensemble(folder, folds_of_seeds):
    (row,) = read_json(folder / "final.json")
    values = []
    for keys in folds_of_seeds:
        parts = [np.load(folder / "final" / f"{key}.npz") for key in keys]
        assert np.array_equal(parts[0]["paths"], parts[1]["paths"])
        rows = np.hstack([part["embeddings"] / np.linalg.norm(part["embeddings"], axis=1)[:, None] for part in parts])
        distances = ((rows[:, None].astype(np.float64) - rows[None]) ** 2).sum(axis=2)
        np.fill_diagonal(distances, np.inf)
        labels = parts[0]["labels"]
        values.append((labels[distances.argmin(axis=1)] == labels).mean())
    assert row["ensemble"]["recall_at_1"]["mean"] == pytest.approx(np.mean(values), abs=2e-3)
    assert {score["half_width"] for score in row["ensemble"].values()} == {None}, "two seeds allow no interval"


def test_the_ensemble_is_the_folds_embeddings_side_by_side(finished):
    check_ensemble(finished, [("confirm-000", "confirm-001")])


@pytest.mark.slow
def test_there_is_one_ensemble_for_each_seed(halved):
    check_ensemble(halved, [("confirm-000", "confirm-002"), ("confirm-001", "confirm-003")])


def test_running_a_finished_study_again_does_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run_study(finished).status == "finished"
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_trial_of_the_study_gives_the_same_numbers_without_ray(finished):
    config = read_json(finished / "study.json")["trials"][1]
    machine = Machine.model_validate(read_json(finished / "study.json")["machine"])
    alone = {r["epoch"]: r for r in Trainer(parse_trial(config), machine, device="cpu").epochs()}
    for epoch, metrics in read_trials(finished, "search")["search-001"].epochs.items():
        for name in ("train_loss", "gradient_norm", METRIC, "val_recall_at_1"):
            assert metrics[name] == alone[epoch][name]


def test_a_finished_study_has_a_report_and_a_model(finished):
    summary = read_json(finished / "summary.json")
    assert [len(summary[stage]) for stage in ("search", "confirm", "final")] == [2, 1, 1]
    assert (finished / "model" / "model.safetensors").exists()
    assert sorted(path.name for path in (finished / "report").iterdir()) == [
        *("epochs.csv", "report.html", "report.md", "table.tex", "trials.csv")
    ]
    sections = {row["section"] for row in read_json(finished / "illustrations" / "illustrations.json")}
    assert sections >= {"retrievals", "classes", "map"}
    top = summary["search"][0]["trial"]
    kinds = [(event.get("trial"), event.get("artifact_path")) for event in events.read(events_path(finished))]
    assert (top, "checkpoint") in kinds
    assert (top, "pictures") in kinds


def cut_short(halved, folder):
    """The study as it was while its search ran: one trial ended, one stopped after its first epoch, one not begun."""
    shutil.copytree(halved, folder)
    results = ("ranking.json", "confirmed.json", "refit.json", "final.json", "summary.json", "test_reads.jsonl")
    for name in results:
        (folder / name).unlink()
    for name in ("confirm", "refit", "final", "model", "report"):
        shutil.rmtree(folder / name)
    loser, winner, unborn = (
        next(key for key, r in read_trials(halved, "search").items() if r.ended == "stopped_early"),
        next(key for key, r in read_trials(halved, "search").items() if r.ended == "finished"),
        [key for key, r in read_trials(halved, "search").items() if r.ended == "stopped_early"][1],
    )
    kept = []
    for event in events.read(events_path(halved)):
        if event.get("stage") == "search" and event.get("trial") == unborn:
            continue
        if event.get("trial") == winner and (event["event"] == "trial_ended" or event.get("epoch") == 2):
            continue
        if event["event"] in ("study_finished", "summary", "model", "artifact", "test_read"):
            continue
        if event.get("stage") in ("confirm", "refit", "finalize") or event["event"] in ("stage_finished", "note"):
            continue
        kept.append(event)
    events_path(folder).unlink()
    for event in kept:
        events.append(events_path(folder), event)
    shutil.rmtree(folder / "search" / "run-000" / unborn)
    # Of the two checkpoints of the winner the newer was being written when the power went.
    newest = newest_checkpoint(folder, "search", winner)
    assert checkpoint.load_card(newest)["epoch"] == 2
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:100])
    return loser, winner, unborn


@pytest.mark.slow
def test_refits_run_through_ray_for_the_median_of_the_confirmed_epochs_and_are_tested(halved):
    (row,) = read_json(halved / "refit.json")
    best = sorted(max(curve, key=lambda e: (curve[e], -e)) for curve in curves(halved, "confirm").values())
    middle = (best[1] + best[2]) / 2
    assert (row["epochs"], sorted(row["best_epochs"])) == (math.floor(middle + 0.5), best)
    refits = read_trials(halved, "refit")
    assert {(trial.num_epochs, trial.ended) for trial in refits.values()} == {(row["epochs"], "finished")}
    assert [name for trial in refits.values() for name in trial.metrics if name.startswith(("val_", "best_"))] == []
    (final,) = read_json(halved / "final.json")
    assert list(final["refit"]["runs"]) == ["refit-000", "refit-001"]
    assert (final["refit"]["epochs"], final["refit"]["num_runs"]) == (row["epochs"], 2)
    noted = [event["text"] for event in events.read(events_path(halved)) if event["event"] == "note"]
    stated = f"the median of the best epochs {', '.join(map(str, best))} of its confirmed runs"
    assert [text.startswith("refit of A: ") for text in noted if stated in text] == [True]
    of_images = [read for read in TestReads(halved / "test_reads.jsonl").read() if read["purpose"] == "finalize"]
    assert len(of_images) == 4 + 2, "one read for each network, none by the training"


@pytest.mark.slow
def test_a_resumed_study_ends_as_the_unbroken_one(halved, tmp_path):
    folder = tmp_path / "studies" / "cut"
    loser, winner, unborn = cut_short(halved, folder)
    num_before = len(events.read(events_path(folder)))
    assert run_study(folder).status == "finished"
    later = events.read(events_path(folder))[num_before:]
    started = {event["trial"] for event in later if event["event"] == "trial_started" and event["stage"] == "search"}
    assert started == {winner, unborn}  # what had ended is not run again
    epochs = [event["epoch"] for event in later if event["event"] == "epoch" and event["trial"] == winner]
    assert epochs == [1, 2]  # the checkpoint's own epoch is reported again; epoch 2 is trained again
    for stage in ("search", "confirm"):
        assert curves(folder, stage) == curves(halved, stage)
    for name in ("ranking.json", "confirmed.json", "refit.json"):
        assert read_json(folder / name) == read_json(halved / name)
    for part in ("metrics", "refit"):
        found, whole = (read_json(one / "final.json")[0][part] for one in (folder, halved))
        assert repeatable(found) == repeatable(whole)
    assert loser not in started


@pytest.mark.parametrize("refit", [None, pytest.param({"seeds": 1}, marks=pytest.mark.slow)])
def test_search_confirm_and_refit_never_open_a_test_image(tmp_path, monkeypatch, refit):
    if refit is None:  # the workers of Ray open what this process opens, and are slow to start
        without_ray(monkeypatch)
    root = image_folder(tmp_path / "images", num_classes=8)
    settings = {"machine.data_root": str(root), "study.search.num_trials": 1, "study.search.scheduler": "none"}
    settings |= {"trial.epochs": 1, "study.confirm.seeds": 1}
    settings |= {"trial.data.split.val_fraction": 0.5, "trial.sampler.classes_per_batch": 2}
    settings |= {"study.refit": refit, "machine.device": "cpu"}
    catalog = open_catalog("image_folder", root, None)
    split = make_split(catalog, test_fraction=0.5, val_fraction=0.5, num_folds=2, fold=None, order="sorted", seed=0)
    # Decoding one of these fails: they are no images. (Only their names and sizes go into the catalog.)
    for class_id in split.test:
        for image in (root / catalog.class_names[class_id]).iterdir():
            image.write_bytes(b"sealed")
    folder = new_study(tmp_path, name="image_folder", **settings)
    assert run_study(folder).status == "finished"
    for stage in ("confirm", *(["refit"] if refit else [])):
        assert {record.ended for record in read_trials(folder, stage).values()} == {"finished"}
    assert not (folder / "test_reads.jsonl").exists()


@pytest.mark.slow
def test_an_unreadable_test_image_is_named_at_finalize_and_can_be_skipped_then(tmp_path):
    root = image_folder(tmp_path / "images", num_classes=8, per_class=5)
    settings = {"machine.data_root": str(root), "study.search.num_trials": 1, "study.confirm": None}
    settings |= {"trial.data.split.val_fraction": 0.5, "study.finalize": {"top": 1}}
    (root / "class7" / "0.png").write_bytes(b"sealed")
    folder = new_study(tmp_path, name="image_folder", **settings)
    with pytest.raises(MachineFault, match=r"no trial is lost: 1 of 20 images under .* cannot be read:\n.*0\.png"):
        run_study(folder)
    assert new_study(tmp_path, name="image_folder", **settings, **{"machine.on_unreadable": "skip"}) == folder
    assert run_study(folder).status == "finished"
    assert len(read_trials(folder, "search")) == 1


@pytest.mark.slow
def test_a_diverging_trial_ends_with_its_label_and_does_not_stop_the_study(tmp_path):
    folder = new_study(
        tmp_path,
        **{
            "study.search.num_trials": 1,
            "study.confirm": None,
            "trial.optimizer.learning_rate": {"grid": [1e30, 1e-3]},
            "study.search.scheduler": "asha",
        },
    )
    assert run_study(folder).status == "finished"
    ended = {
        record.config["optimizer"]["learning_rate"]: record.ended for record in read_trials(folder, "search").values()
    }
    assert ended == {1e30: "non_finite_loss", 1e-3: "finished"}
    ranking = read_json(folder / "ranking.json")
    assert [row["ended"] for row in ranking] == ["finished", "non_finite_loss"]
    assert ranking[1]["value"] is None
    assert math.isfinite(ranking[0]["value"])


@pytest.mark.slow
def test_a_search_without_any_value_is_an_error_and_registers_no_model(tmp_path):
    settings = {"study.confirm": None, "study.search.num_trials": 1, "trial.optimizer.learning_rate": 1e30}
    folder = new_study(tmp_path, **settings)
    with pytest.raises(StudyError, match=r"search-000 non_finite_loss.*Cure: smaller learning rates"):
        run_study(folder)
    assert not (folder / "ranking.json").exists()
    assert not [event for event in events.read(events_path(folder)) if event["event"] == "model"]


def test_trials_that_did_not_diverge_can_run_again_as_they_are(tmp_path):
    states = {"search-000": TrialState("search-000", "search", state="non_finite_loss")}
    assert "learning rates" in stages._cure_of(states, tmp_path)
    states["search-001"] = TrialState("search-001", "search", state="crashed")
    assert f"launch.py resume {tmp_path} --retry-crashed" in stages._cure_of(states, tmp_path)


@pytest.mark.parametrize(("setting", "value"), [("machine.cpus_per_trial", 64), ("machine.gpus_per_trial", 1)])
def test_resources_that_this_machine_does_not_have_are_refused_instead_of_waited_for(tmp_path, setting, value):
    folder = new_study(tmp_path, **{setting: value})
    with pytest.raises(StudyError, match=setting):
        run_study(folder)


@pytest.mark.slow
def test_an_interrupt_before_tune_listens_still_ends_the_study(tmp_path):
    folder = new_study(tmp_path, **{"trial.epochs": 50, "study.search.scheduler": "none"})

    def interrupt():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(event["event"] == "stage_started" for event in events.read(events_path(folder))):
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.01)

    events_path(folder).touch()
    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = run_study(folder)
    thread.join()
    assert outcome == ("interrupted", signal.SIGINT)
    assert not (folder / "ranking.json").exists()
    assert events.read(events_path(folder))[-1]["event"] == "interrupted"


def test_a_study_whose_images_are_gone_starts_nothing_and_goes_on_when_they_are_back(tmp_path):
    images = image_folder(tmp_path / "images")
    machine = f"machine:\n  data_root: {images}\n"
    path = tmp_path / "folder.yaml"
    path.write_text(SPACE % "image_folder" + machine)
    space = load_space(path)
    folder = create_study(space, storage=tmp_path / "studies", tracking_uri="sqlite:///x.db", space_text="text")
    images.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"machine\.data_root = .*images' is not a folder"):
        run_study(folder)
    assert not events_path(folder).exists()  # no trial has begun, so none counts as run
    move_data_root(folder, tmp_path / "moved")
    (extra := tmp_path / "moved" / "class0" / "extra.png").write_bytes((tmp_path / "moved/class0/0.png").read_bytes())
    with pytest.raises(DataError, match=r"data\.content.*Cure: restore the images"):
        run_study(folder)
    assert not events_path(folder).exists()
    extra.unlink()
    assert read_json(folder / "study.json")["machine"]["data_root"] == str(tmp_path / "moved")


@pytest.mark.slow
def test_a_time_limit_ends_the_search_for_the_later_stages_and_more_trials_run_later(tmp_path, monkeypatch):
    monkeypatch.setattr("raydml.study.search_limit.CHECK_EVERY_S", 0.05)  # an epoch takes a third of a second
    settings = {"study.search.num_trials": 3, "study.search.scheduler": "none", "trial.epochs": 3}
    folder = new_study(tmp_path, **settings, **{"study.confirm.seeds": 1, "trial.sampler.batches_per_epoch": 40})
    assert run_study(folder, budget=Budget(time_s=0.1)).status == "finished"
    (cut,) = read_trials(folder, "search").values()
    assert (cut.trial, cut.ended) == ("search-000", "time"), "the first value ends the search; the others never start"
    assert 1 <= cut.num_epochs < 3, "the epoch that ran meanwhile counts: it is saved"
    assert [(row["trial"], row["ended"]) for row in read_json(folder / "ranking.json")] == [("search-000", "time")]
    confirmed = read_trials(folder, "confirm")
    assert [(key, trial.num_epochs) for key, trial in confirmed.items()] == [("confirm-000", 3), ("confirm-001", 3)]
    summary = read_json(folder / "summary.json")
    assert "The time limit ended the search after 1 of these trials had started." in findings(summary).question
    checkpoints = {key: newest_checkpoint(folder, "confirm", key) for key in confirmed}

    extend_search(folder, 3)  # the number it was made for, of which two trials have not run
    assert run_study(folder).status == "finished"
    trials = read_trials(folder, "search")
    assert [(key, trial.ended, trial.num_epochs) for key, trial in trials.items()] == [
        (f"search-00{number}", "finished", 3) for number in range(3)
    ]
    assert (folder / "earlier" / "1-trials" / "confirmed.json").exists()
    again, (row,) = read_trials(folder, "confirm"), read_json(folder / "confirmed.json")
    if row["from_trial"] == "search-000":  # the same runs: not repeated
        assert list(again) == list(confirmed)
        assert {key: newest_checkpoint(folder, "confirm", key) for key in again} == checkpoints
    else:
        assert list(again) == ["confirm-002", "confirm-003"]
    assert [run["trial"] for run in row["runs"]] == list(again)


def test_a_study_that_runs_refuses_a_second_driver(tmp_path):
    folder = new_study(tmp_path, **{"study.search.num_trials": 1})
    with filelock.FileLock(folder / LOCK), pytest.raises(StudyHeld, match="is running already, by another process"):
        run_study(folder)
