"""Studies from Python: started on a folder, waited for, read as data frames; the same numbers as the commands'."""

import json
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import filelock
import numpy as np
import pytest

import raydml
from raydml import Study, load_model
from raydml.api import LOG, StudyFailed
from raydml.cli.arguments import CommandError
from raydml.errors import ConfigError
from raydml.study.driver import LOCK
from tests.cli.commands import done
from tests.report.written_study import add_refits, write_published_study, write_study
from tests.study.small import leave_pictures_out

HEAVY = ("torch", "ray", "mlflow", "pandas", "matplotlib", "faiss")


def test_importing_the_door_imports_nothing_heavy() -> None:
    code = f"import sys\nfrom raydml import Study, load_model\nprint([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        raydml.Trainer  # noqa: B018


SPACE = """
study:
  search: {num_trials: 1, scheduler: none, max_concurrent: 1}
  confirm: {top: 1, folds: 2, seeds: 1}
  finalize: {top: 1}
trial:
  epochs: 1
  data: {name: digits, resize_px: 16, crop_px: 16, split: {order: sorted, val_fraction: 0.4, num_folds: 2}}
  model: {backbone: convnet, weights: none, embedding_dim: {grid: [8, 16]}}
  loss: {name: normalized_softmax}
  sampler: {name: uniform, batch_size: 64}
"""


def test_a_mistake_is_raised_before_anything_starts(tmp_path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE, encoding="utf-8")
    with pytest.raises(ConfigError, match="embedding_dim"):
        Study.start(space, settings=["trial.model.embedding_dim=-1"], storage=tmp_path / "studies")
    with pytest.raises(CommandError, match="--time = 'soon'"):
        Study.start(space, time_limit="soon", storage=tmp_path / "studies")
    with pytest.raises(CommandError, match="--stages"):
        Study.start(space, stages="final", storage=tmp_path / "studies")
    assert not (tmp_path / "studies").exists()


def test_a_study_that_another_process_runs_is_not_started_again(tmp_path) -> None:
    study = Study(tmp_path)
    with filelock.FileLock(tmp_path / LOCK).acquire(timeout=0):
        assert study.resume()._process is None
        with pytest.raises(TimeoutError, match="continues"):
            study.wait(0.3)


def test_the_process_of_a_study_gets_the_password_of_an_address_where_nobody_sees_it(tmp_path, monkeypatch) -> None:
    started = []
    monkeypatch.setattr("raydml.cli.studies.load_with_options", lambda *_, **__: (None, None))
    monkeypatch.setattr("raydml.cli.studies.create", lambda *_: tmp_path)
    popen = SimpleNamespace(DEVNULL=0, STDOUT=0, Popen=lambda command, **options: started.append((command, options)))
    monkeypatch.setattr("raydml.api.subprocess", popen)
    (tmp_path / "study.json").touch()
    Study.start("space.yaml", tracking_uri="http://ann:PLANTED@host")
    Study.start("space.yaml", tracking_uri="http://host")
    (command, options), (_, others) = started
    assert "PLANTED" not in " ".join(command)
    assert options["env"]["MLFLOW_TRACKING_URI"] == "http://ann:PLANTED@host"
    assert others["env"].get("MLFLOW_TRACKING_URI") != "http://ann:PLANTED@host"


def test_a_process_that_ends_before_its_study_is_reported(tmp_path) -> None:
    (tmp_path / LOG).write_text("many lines\nRuntimeError: the disk is full\n", encoding="utf-8")
    study = Study(tmp_path, subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"]))
    with pytest.raises(StudyFailed, match=r"(?s)code 3.*Study\.open.*the disk is full"):
        study.wait()


def interrupt_when_it_runs(study: Study) -> None:
    """Send this process what Ctrl-C sends, once the study has started."""
    for _ in range(600):
        if study.state == "running":
            break
        time.sleep(0.1)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_study_from_python(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = tmp_path / "space.yaml"
    space.write_text(SPACE, encoding="utf-8")
    leave_pictures_out(tmp_path / "studies" / "python")
    study = Study.start(space, name="python")
    with pytest.raises(TimeoutError, match="continues"):
        study.wait(0.1)
    threading.Thread(target=interrupt_when_it_runs, args=[study], daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        study.wait()
    assert study._process.poll() == 130
    assert study.state == "interrupted"
    study = Study.open("python").wait()
    assert study.state == "finished", (study.folder / LOG).read_text(encoding="utf-8")

    summary = json.loads((study.folder / "summary.json").read_text(encoding="utf-8"))
    assert list(study.trials["trial"]) == ["search-000", "search-001", "confirm-000", "confirm-001"]
    assert sorted(study.trials["model.embedding_dim"][:2]) == [8, 16]
    assert list(study.epochs["epoch"]) == [1, 1, 1, 1]
    assert study.confirmed["mean"].tolist() == [row["mean"] for row in summary["confirm"]]
    scores = study.test.set_index("metric")
    assert scores.loc["map_at_r", "mean"] == summary["final"][0]["metrics"]["map_at_r"]["mean"]
    assert scores.loc["map_at_r", "untrained"] == summary["final"][0]["untrained"]["map_at_r"]["mean"]
    assert study.report.is_file()

    # The model is the one that `export` writes.
    done("export", "python", tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    embeddings = load_model(study).embed(images)
    assert embeddings.shape[0] == 3
    assert np.array_equal(embeddings, load_model(tmp_path / "model").embed(images))
    assert Study.start(space, name="python").wait().state == "finished"  # nothing to do


def test_the_test_scores_of_refits_stand_beside_those_of_the_fold_models(tmp_path) -> None:
    folder = add_refits(write_study(tmp_path / "birds"))
    scores = Study.open(folder).test.set_index(["letter", "metric"])
    first = scores.loc[("A", "map_at_r")]
    assert (first["refit"], first["refit_half_width"]) == (0.34, 0.0248)
    assert (first["mean"], first["half_width"], first["ensemble"], first["untrained"]) == (0.31, 0.04, 0.36, 0.1)
    assert scores["refit"].isna().tolist() == [False, False, True, True]
    alone = Study.open(write_published_study(tmp_path / "mic")).test.set_index("metric")
    assert (alone.loc["recall_at_1", "refit"], alone.loc["recall_at_1", "untrained"]) == (0.672, 0.31)
    assert alone["mean"].isna().all()
