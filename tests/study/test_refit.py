"""The stage refit: which trials it has, where their epochs come from, what it ends with; from results by hand."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from raydml import load_model
from raydml.analysis.trials import TrialState
from raydml.config.trial import fingerprint, parse_study, parse_trial
from raydml.data.catalog import DataError
from raydml.study import actor, runner, stages
from raydml.study.budget import Budget
from raydml.study.events import append, events_path, read, read_state
from raydml.study.folder import StudyError, create_study, newest_checkpoint, read_json
from raydml.study.refit import configurations_to_refit, notes_on_refits, refit_trials, refitted
from raydml.study.remote import StudyPlace
from raydml.study.results import find_validated, find_winner, illustrated_runs, is_finished, mean_of_runs
from raydml.study.stages import run_study
from raydml.training import checkpoint
from tests.cli.commands import done, refused
from tests.config.test_trial import trial_with
from tests.data.own_images import folder_of
from tests.study.in_process import without_ray
from tests.study.repeatable import repeatable
from tests.study.study_events import ended, epoch, stage_started, started
from tests.study.test_folder import space_at

TRIALS = {f"search-{number:03d}": parse_trial(trial_with(epochs=20, seed=number)) for number in range(2)}


def write_confirmed(folder, curves, configuration="abc", from_trial="search-001"):
    """A confirmation with one run for each curve of validation values."""
    append(events_path(folder), stage_started(len(curves), 20, "confirm") | {"configurations": [configuration]})
    runs = []
    for number, curve in enumerate(curves):
        append(events_path(folder), started(number, stage="confirm", fold=number))
        for place, value in enumerate(curve, start=1):
            append(events_path(folder), epoch(number, place, value, stage="confirm"))
        append(events_path(folder), ended(number, "finished", stage="confirm"))
        runs.append({"trial": f"confirm-{number:03d}", "value": max(curve)})
    rows = [{"configuration": configuration, "from_trial": from_trial, "runs": runs}]
    (folder / "confirmed.json").write_text(json.dumps(rows))


def rows_of(folder, study):
    configurations = configurations_to_refit(folder, read_state(folder), TRIALS)
    return refit_trials(configurations, TRIALS, study)


def test_the_epochs_are_the_median_of_the_confirmed_runs_and_the_note_says_so(tmp_path):
    # The best epochs are 2, 4, 1 and 3: of 2.5, the half counts up.
    write_confirmed(tmp_path, [(0.1, 0.9), (0.1, 0.2, 0.2, 0.4), (0.5, 0.3), (0.1, 0.2, 0.3)])
    study = parse_study({"seed": 5, "confirm": {"top": 1, "folds": 2, "seeds": 2}, "refit": {"seeds": 2}})
    rows = rows_of(tmp_path, study)
    assert [(row["trial"].epochs, row["trial"].seed) for row in rows] == [(3, 5), (3, 6)]
    assert {(row["configuration"], row["from_trial"], row["epochs"]) for row in rows} == {("abc", "search-001", 3)}
    assert {row["trial"].data.split.val_fraction for row in rows} == {0.0}
    assert notes_on_refits(rows, study, read_state(tmp_path)) == [
        "refit of A: 3 epochs, the median of the best epochs 1, 2, 3, 4 of its confirmed runs"
    ]
    given = parse_study({**study.model_dump(), "refit": {"seeds": 1, "epochs": 9, "classes": "all"}})
    (row,) = rows_of(tmp_path, given)
    assert (row["trial"].epochs, row["trial"].data.split.test_fraction, row["best_epochs"]) == (9, 0.0, [])
    first, second = notes_on_refits([row], given, read_state(tmp_path))
    assert first == "refit of A: 9 epochs, as study.refit.epochs says"
    assert "never scored" in second


def test_without_a_confirmation_the_best_of_the_search_and_its_best_epoch_count(tmp_path):
    ranking = [
        {"trial": "search-001", "fingerprint": "b", "value": 0.9, "epoch_of_best": 6},
        {"trial": "search-000", "fingerprint": "a", "value": None, "epoch_of_best": None},
    ]
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    study = parse_study({"refit": {"top": 2, "seeds": 1}})
    (row,) = rows_of(tmp_path, study)
    assert (row["configuration"], row["trial"].epochs) == ("b", 6)
    assert notes_on_refits([row], study, read_state(tmp_path)) == [
        "refit of search-001: 6 epochs, the best epoch of search-001"
    ]


def test_a_run_that_a_longer_search_repeats_is_kept_by_what_it_trains(tmp_path, monkeypatch):
    first, second = (parse_trial(trial_with(epochs=epochs)) for epochs in (3, 4))
    for number, reason in ((0, "finished"), (1, "crashed")):
        append(events_path(tmp_path), started(number, stage="refit") | {"fingerprint": fingerprint(first)})
        append(events_path(tmp_path), ended(number, reason, stage="refit"))
    monkeypatch.setattr(stages, "newest_checkpoint", lambda _folder, _stage, key, **_: key)
    rows = [{"trial": second}, {"trial": first}]
    before = {"event": "search_extended", "num_trials_before": 2}
    assert list(stages.keys_of_runs(tmp_path, "refit", rows)) == ["refit-002", "refit-000"]
    append(events_path(tmp_path), before)
    # The crashed one is tried again now, with a key of its own.
    rows = [{"trial": first}, {"trial": first}]
    assert list(stages.keys_of_runs(tmp_path, "refit", rows)) == ["refit-000", "refit-002"]
    monkeypatch.setattr(stages, "newest_checkpoint", lambda *_, **__: None)
    assert list(stages.keys_of_runs(tmp_path, "refit", rows)) == ["refit-002", "refit-003"]


def test_a_lost_refit_is_named_and_the_others_count_until_none_is_left(tmp_path):
    trial = parse_trial(trial_with())
    row = {"configuration": "a", "from_trial": "search-000", "epochs": 3, "best_epochs": [3], "trial": trial}
    rows = {f"refit-{number:03d}": row for number in range(2)}
    endings = {"refit-000": "non_finite_loss", "refit-001": "finished"}
    states = {key: TrialState(key, "refit", state=state, num_epochs=1) for key, state in endings.items()}

    def note(text):
        append(events_path(tmp_path), {"event": "note", "text": text})

    session = SimpleNamespace(note=note)
    (found,) = stages._refitted(session, rows, states)
    assert [run["trial"] for run in found["runs"]] == ["refit-001"]
    (event,) = read(events_path(tmp_path))
    assert event["text"].startswith("without refit-000 non_finite_loss: means and intervals of refits are over those")
    lost = {"refit-000": states["refit-000"]}
    with pytest.raises(StudyError, match=r"no refit reached its last epoch: refit-000 non_finite_loss. Cure: .*--name"):
        stages._refitted(session, {"refit-000": row}, lost)


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_there_is_no_interval_of_fewer_than_three_refits(num_seeds):
    values = [0.5, 0.6, 0.8][:num_seeds]
    runs = {
        f"refit-{seed:03d}": {"val": {}, "test": {"map_at_r": value, "untrained_map_at_r": value / 2}}
        for seed, value in enumerate(values)
    }
    row = {"epochs": 3, "classes": "development", "runs": [{"trial": key} for key in runs]}
    tested = stages._tested_refit(row, runs)
    # Of three: 4.302653 times the standard deviation 0.152753 over the root of 3.
    half_width = None if num_seeds == 2 else pytest.approx(4.302653 * 0.152753 / 3**0.5, rel=1e-4)
    assert tested["metrics"] == {"map_at_r": {"mean": pytest.approx(np.mean(values)), "half_width": half_width}}
    assert (tested["untrained"]["map_at_r"]["half_width"] is None) == (num_seeds == 2)


def test_finalize_scores_refits_but_none_that_trained_on_the_test_classes(tmp_path):
    study = parse_study({"confirm": None, "refit": {"seeds": 2, "classes": "all"}, "finalize": {"top": 1}})
    ranking = [{"trial": "search-000", "fingerprint": "a", "value": 0.9, "epoch_of_best": 6}]
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    rows = {f"refit-{number:03d}": row for number, row in enumerate(rows_of(tmp_path, study))}
    states = {key: TrialState(key, "refit", state="finished", num_epochs=6) for key in rows}
    for classes, scored in (("all", []), ("development", ["refit-000", "refit-001"])):
        if classes == "development":
            study = parse_study({**study.model_dump(), "refit": {"seeds": 2}})
            rows = {f"refit-{number:03d}": row for number, row in enumerate(rows_of(tmp_path, study))}
        (tmp_path / "refit.json").write_text(json.dumps(refitted(rows, states)))
        (winner,) = stages._winners(tmp_path, study)
        assert winner["keys"] == ["search-000"]
        assert stages._scored_refits(winner) == scored, classes


def test_a_resume_announces_a_read_only_for_refits_that_have_not_ended(tmp_path, monkeypatch):
    study = parse_study({"confirm": None, "refit": {"seeds": 3, "classes": "all"}})
    ranking = [{"trial": "search-000", "fingerprint": "a", "value": 0.9, "epoch_of_best": 6}]
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    prints = [fingerprint(row["trial"]) for row in rows_of(tmp_path, study)]
    for number in (0, 1):  # one that has ended, and one that was interrupted
        append(events_path(tmp_path), started(number, stage="refit") | {"fingerprint": prints[number]})
    append(events_path(tmp_path), ended(0, "finished", stage="refit"))
    monkeypatch.setattr(stages, "read_study", lambda _folder: None)
    monkeypatch.setattr(stages, "search_trials", lambda _study: TRIALS)
    monkeypatch.setattr(stages, "run_trials", lambda *_: {})
    recorded = []
    session = SimpleNamespace(
        folder=tmp_path,
        study=study,
        note=lambda _text: None,
        record=lambda name, **about: recorded.append((name, about)),
    )
    stages._refit(session)
    assert [name for name, _ in recorded] == ["test_read"] * 2
    assert [about["checkpoint"] for _, about in recorded] == [f"trial {one}" for one in prints[1:]]


def run(folder, monkeypatch, *overrides):
    """Run a small study of digits in this process, without its pictures."""
    without_ray(monkeypatch)
    monkeypatch.setattr(stages, "illustrate", lambda _session: None)
    monkeypatch.setattr(actor, "METRIC_GROUPS", ("retrieval",))
    small = ["machine.device=cpu", "study.search.scheduler=none", "trial.sampler.batches_per_epoch=3", "trial.epochs=2"]
    space = space_at(folder, overrides=[*small, *overrides])
    made = create_study(space, storage=folder / "studies", tracking_uri=None, space_text="text")
    assert run_study(made).status == "finished"
    assert is_finished(made)
    return made


def check_tested(refit, seeds):
    """Compare the means and intervals of the refits with those of SciPy; of fewer than three there is no interval."""
    assert refit["num_runs"] == len(refit["runs"]) == seeds
    for name, score in refit["metrics"].items():
        values = [one["test"][name] for one in refit["runs"].values()]
        assert score["mean"] == pytest.approx(np.mean(values))
        if seeds < 3:
            assert score["half_width"] is None
        else:
            low, high = stats.t.interval(0.95, df=seeds - 1, loc=np.mean(values), scale=stats.sem(values))
            assert score["half_width"] == pytest.approx((high - low) / 2)
    for one in refit["runs"].values():
        assert one["val"] == {}
        assert {"map_at_r", "untrained_map_at_r"} <= set(one["test"])


def test_the_best_configuration_is_refitted_tested_and_taken_away(tmp_path, monkeypatch):
    folder = run(tmp_path, monkeypatch, "study.search.num_trials=1", "study.confirm.seeds=1",
                 "study.refit={seeds: 2, epochs: 1}", "study.finalize={top: 1}")  # fmt: skip
    (refit,), (final,) = read_json(folder / "refit.json"), read_json(folder / "final.json")
    assert refit["configuration"] == final["configuration"] == read_json(folder / "confirmed.json")[0]["configuration"]
    assert [(run["trial"], run["seed"]) for run in refit["runs"]] == [("refit-000", 0), ("refit-001", 1)]
    assert sorted(final["runs"]) == ["confirm-000", "confirm-001"]
    check_tested(final["refit"], 2)
    winner = find_winner(folder)
    assert winner.trial == "refit-000", "nothing validates them: the first seed"
    card = checkpoint.load_card(winner.checkpoint)
    classes = read_json(folder / "split.json")
    (mine,) = [parts for name, parts in classes.items() if name.startswith("refit ")]
    assert (mine["train"], mine["val"]) == (["0", "1", "2", "3", "4"], [])
    assert card["split"] == {"train": [0, 1, 2, 3, 4], "val": [], "test": [5, 6, 7, 8, 9]}
    assert (card["epoch"], card["best_epoch"]) == (1, 1)
    assert json.loads((folder / "model" / "config.json").read_text())["fingerprint"] == card["fingerprint"]
    assert find_validated(folder).trial in illustrated_runs(folder)
    mean = mean_of_runs(folder, "refit-001", "test")
    assert (mean.num_runs, mean.mean) == (2, final["refit"]["metrics"]["map_at_r"]["mean"])
    (summary,) = [event for event in read(events_path(folder)) if event["event"] == "summary"]
    assert summary["metrics"]["test_refit_map_at_r"] == mean.mean
    assert summary["tags"] == {"winner": "refit-000"}
    check_commands(folder, tmp_path)
    check_results_are_made_again(folder, monkeypatch)


def check_results_are_made_again(folder, monkeypatch):
    """Damaged results of stages: refused, and after the deletion that the message advises equal to what they were."""
    names = ("ranking.json", "confirmed.json", "refit.json", "final.json", "final/confirm-001.json", "summary.json")
    before = {name: read_json(folder / name) for name in names}
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    for command in (("report",), ("evaluate",), ("export", str(folder / "x"))):
        assert re.search(r"(ranking|confirmed|refit)\.json is damaged", refused(command[0], str(folder), *command[1:]))
    assert "summary.json is damaged" in refused("status", str(folder))
    for name in names:
        (folder / name).unlink()
    monkeypatch.setattr(stages, "run_trials", runner.run_trials)
    monkeypatch.setattr(runner, "num_slots", lambda *_: 1)
    assert run_study(folder).status == "finished"
    after = {name: read_json(folder / name) for name in names}
    for summary in (before["summary.json"], after["summary.json"]):
        del summary["test_reads"], summary["cost"]  # one network was tested again; the first run held no resources
    assert repeatable(after) == repeatable(before)
    (folder / "summary.json").unlink()
    done("report", str(folder))
    assert repeatable(read_json(folder / "summary.json")["final"]) == repeatable(before["summary.json"]["final"])


def check_commands(folder, tmp_path):
    """What the commands say of a study whose model is a refit."""
    storage = ["--storage", str(folder.parent)]
    shown = [line.split() for line in done("status", "mini", *storage).output.splitlines()]
    assert shown[0][:5] == ["study", "search", "confirm", "refit", "finalize"]
    assert shown[1][:5] == ["mini", "done", "done", "done", "done"]
    assert [row[:2] for row in shown if row and row[0].startswith("refit-")] == [["refit-000", "A"], ["refit-001", "A"]]
    exported = tmp_path / "exported"
    done("export", "mini", str(exported), *storage)
    assert json.loads((exported / "config.json").read_text())["trained_on"] == "all development classes"
    assert "It was trained on all development classes." in (exported / "README.md").read_text()
    best = find_validated(folder).trial
    reads = (folder / "test_reads.jsonl").read_text()
    for target in (str(folder), f"{folder}:refit-001", str(find_winner(folder).checkpoint)):
        said = refused("evaluate", target, *storage)
        assert "no class validates this model" in said
        assert f":{best} --on val)" in said
    assert (folder / "test_reads.jsonl").read_text() == reads
    assert load_model(folder).card["fingerprint"] == checkpoint.load_card(find_winner(folder).checkpoint)["fingerprint"]


@pytest.mark.slow
def test_a_study_without_validation_classes_is_refit_and_finalize(tmp_path, monkeypatch):
    folder = run(tmp_path, monkeypatch, "study.search.num_trials=2", "study.confirm=null", "study.finalize={top: 1}",
                 "trial.data.split.val_fraction=0", "study.refit={seeds: 3}")  # fmt: skip
    state = read_state(folder)
    assert list(state.stages) == list(state.planned) == ["refit", "finalize"]
    assert [(trial.configuration, trial.seed) for trial in state.of_stage("refit")] == [
        (row["configuration"], seed) for row in read_json(folder / "refit.json") for seed in range(3)
    ]
    assert (state.num_tested, state.stages["finalize"].num_trials) == (6, 6)
    for row in read_json(folder / "final.json"):
        assert (row["runs"], row["metrics"], row["validation"], row["ensemble"]) == ({}, {}, {}, {})
        assert row["protocols"]
        check_tested(row["refit"], 3)
    assert find_winner(folder).trial == "refit-000"
    assert illustrated_runs(folder) == {}
    (folder / "final.json").unlink()
    with pytest.raises(StudyError, match="--time ends a search early, and study 'mini' has none"):
        run_study(folder, budget=Budget(time_s=60))


@pytest.mark.slow
def test_more_configurations_are_tested_than_refitted_and_what_saw_the_test_classes_is_not(tmp_path, monkeypatch):
    settings = ["study.search.num_trials=2", "study.confirm=null", "study.finalize={top: 2}"]
    folder = run(tmp_path, monkeypatch, *settings, "study.refit={seeds: 1}")
    first, second = read_json(folder / "final.json")
    assert (list(first["refit"]["runs"]), second["refit"]) == (["refit-000"], None)
    assert [row["letter"] for row in read_json(folder / "summary.json")["final"]] == ["A", "B"]

    folder = run(tmp_path, monkeypatch, *settings, "study.refit={seeds: 1, classes: all}", "study.name=all",
                 "trial.sampler.batches_per_epoch=5")  # fmt: skip
    refit = read_json(folder / "final.json")[0]["refit"]
    assert (refit["runs"], refit["metrics"], refit["num_runs"], refit["classes"]) == ({}, {}, 1, "all")
    reads = [json.loads(line) for line in (folder / "test_reads.jsonl").read_text().splitlines()]
    assert reads[0]["purpose"] == "training on all classes"
    assert not [read for read in reads[1:] if "refit" in read["checkpoint"]]
    found = newest_checkpoint(folder, "refit", "refit-000")
    assert find_winner(folder).checkpoint == found
    place = StudyPlace(str(folder))
    machine = read_json(folder / "study.json")["machine"]
    with pytest.raises(DataError, match="trained on the test classes as well"):
        stages.evaluate_remotely._function(str(found), machine, place, "abc", str(folder / "final" / "refit-000.npz"))
    best = find_validated(folder).trial
    said = refused("evaluate", str(folder), "--on", "test", "--storage", str(folder.parent))
    assert "trained on the test classes as well" in said
    assert f":{best} --on test)" in said
    said = refused("evaluate", str(folder), "--storage", str(folder.parent))
    assert "no class validates this model, which was trained on every class" in said
    assert "--on test" not in said, "which is refused as well"
    said = refused("evaluate", str(folder), "--data", "digits", "--storage", str(folder.parent))
    assert "trained on every class of digits" in said
    assert len((folder / "test_reads.jsonl").read_text().splitlines()) == len(reads), "refused before it is recorded"
    assert "never scored" in json.loads((folder / "model" / "config.json").read_text())["trained_on"]


@pytest.mark.slow
def test_an_extra_test_that_fails_says_why_and_the_test_classes_keep_their_scores(tmp_path, monkeypatch):
    folder_of(tmp_path / "own", **dict.fromkeys("abcdefgh", 4))
    folder_of(tmp_path / "street", x=3, y=3)
    folder_of(tmp_path / "shop", x=3, y=3)
    score, attempts = actor.evaluate_extra_test, []

    def damaged(checkpoint_folder, name, machine, **options):
        attempts.append((name, machine.evaluation_batch))
        if name == "street":
            raise ValueError("its disk is gone")
        if len(attempts) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(checkpoint_folder, name, machine, **options)

    monkeypatch.setattr(actor, "evaluate_extra_test", damaged)
    sets = [{"name": name, "data": "image_folder", "root": str(tmp_path / name)} for name in ("street", "shop")]
    folder = run(
        tmp_path, monkeypatch, "study.search.num_trials=1", "study.confirm=null", "study.finalize={top: 1}",
        "trial.data.name=image_folder", f"machine.data_root={tmp_path / 'own'}", "trial.data.resize_px=8",
        "trial.data.crop_px=8", f"trial.data.extra_tests={json.dumps(sets)}", "machine.evaluation_batch=64",
        "trial.sampler.classes_per_batch=2", "trial.sampler.images_per_class=2", "trial.recall_at=[1]",
    )  # fmt: skip
    assert attempts == [("street", 64), ("shop", 64), ("shop", 32)]
    (row,) = read_json(folder / "final.json")
    assert "recall_at_1" in row["metrics"]
    assert "shop_recall_at_1" in row["metrics"]
    assert not [name for name in row["metrics"] if name.startswith("street")]
    reason = "street: not scored for search-000, because its disk is gone"
    assert row["protocols"]["street_not_scored"] == reason
    assert reason[1:] in (folder / "report" / "report.md").read_text()
