"""The stage refit: which trials it has, where their epochs come from, what it ends with; from results by hand."""

import json
from types import SimpleNamespace

import pytest

from raydml.analysis.trials import TrialState
from raydml.config.trial import fingerprint, parse_study, parse_trial
from raydml.study import stages
from raydml.study.events import append, events_path, read, read_state
from raydml.study.folder import StudyError
from raydml.study.refit import configurations_to_refit, notes_on_refits, refit_trials
from tests.config.test_trial import trial_with
from tests.study.study_events import ended, epoch, stage_started, started

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
    monkeypatch.setattr(stages, "newest_checkpoint", lambda _folder, _stage, key: key)
    rows = [{"trial": second}, {"trial": first}]
    before = {"event": "search_extended", "num_trials_before": 2}
    assert list(stages.keys_of_runs(tmp_path, "refit", rows)) == ["refit-002", "refit-000"]
    append(events_path(tmp_path), before)
    # The crashed one is tried again now, with a key of its own.
    rows = [{"trial": first}, {"trial": first}]
    assert list(stages.keys_of_runs(tmp_path, "refit", rows)) == ["refit-000", "refit-002"]
    monkeypatch.setattr(stages, "newest_checkpoint", lambda *_: None)
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
