"""Commands on studies whose storage folder was copied, moved and renamed, and on stores that are gone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
from PIL import Image

from raydml.study.driver import LOCK
from raydml.study.folder import read_study
from raydml.tracking.store import connect, default_uri
from tests.cli.commands import done, refused
from tests.study.small import ONE_PROCESS, leave_pictures_out
from tests.study.test_folder import make

ROOT = Path(__file__).parents[2]
OPTIONS = ["--num-trials", "2", "--max-epochs", "1", "--set", "study.confirm=null", *ONE_PROCESS]

pytestmark = pytest.mark.usefixtures("own_folder")


def contents_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use_every_command(storage, images, monkeypatch):
    """Each command that opens a study or its store; the galleries that its run in MLflow then has."""
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    _artifact_repos_cache.clear()  # within one process MLflow remembers where the files of a run are
    shown, served = ["--storage", storage], []
    monkeypatch.setattr("raydml.cli.server.serve_ui", lambda uri, _port, **_: served.append(uri) or 0)
    for command in ("status", "report", "resume", "sync"):
        done(command, "digits", *shown)
    done("ui", "digits", *shown)
    assert served == [default_uri(storage)]
    done("evaluate", "digits", "--on", "test", *shown)
    done("evaluate", "models:/raydml-digits/1", "--on", "val", *shown)
    done("trial", "digits:search-000", "--max-epochs", "1", *shown)
    done("export", "digits", storage.parent / f"model-{storage.name}", *shown)
    gallery = storage.parent / f"gallery-{storage.name}"
    assert "in MLflow" in done("index", "digits", images, gallery, *shown).stdout
    client = connect(default_uri(storage))
    experiment = client.get_experiment_by_name("raydml")
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'digits'")
    for picture in ("report/report.html", "study/summary.json"):
        assert Path(client.download_artifacts(run.info.run_id, picture)).is_file()
    done("query", f"runs:/{run.info.run_id}/galleries/{gallery.name}", next(images.glob("*.png")), *shown)
    assert str(storage.resolve()) in json.dumps(read_study(storage / "digits")["machine"]), "the cache"
    return sorted(item.path for item in client.list_artifacts(run.info.run_id, "galleries"))


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(600)
def test_a_study_works_after_its_storage_was_copied_moved_and_renamed(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    first = tmp_path / "first"
    leave_pictures_out(first / "digits")
    sweep = [sys.executable, ROOT / "launch.py", "sweep", ROOT / "search_spaces" / "digits.yaml", "--storage", first]
    subprocess.run([*sweep, *OPTIONS], check=True, timeout=300, capture_output=True)
    study = json.loads((first / "digits/study.json").read_text())
    assert study["tracking_uri"] is None, "the embedded store is not recorded by its path"
    # Older versions recorded it so.
    (first / "digits/study.json").write_text(json.dumps(study | {"tracking_uri": f"sqlite:///{first}/mlflow.db"}))
    copy = tmp_path / "a copy"
    shutil.copytree(first, copy)
    before = contents_of(first)
    assert use_every_command(copy, images, monkeypatch) == ["galleries/gallery-a copy"]
    assert contents_of(first) == before, "a command on the copy wrote into the original"
    moved = tmp_path / "below" / "moved"
    moved.parent.mkdir()
    shutil.move(first, moved)
    done("sync", "digits", "--storage", moved)
    renamed = moved.rename(tmp_path / "100% new")
    assert use_every_command(renamed, images, monkeypatch) == ["galleries/gallery-100% new"]
    assert not first.exists()
    assert not moved.exists()
    # The store alone is gone: it is filled again, on demand only.
    filled = renamed.rename(tmp_path / "filled")
    (filled / "mlflow.db").unlink()
    assert "there is no MLflow store" in refused("ui", "digits", "--storage", filled)
    assert not (filled / "mlflow.db").exists()
    done("sync", "digits", "--storage", filled)
    uri = default_uri(filled)
    assert len(connect(uri).search_runs([connect(uri).get_experiment_by_name("raydml").experiment_id])) == 3


def make_study(storage, **more):
    folder = storage / "digits"
    folder.mkdir(parents=True)
    study = {"name": "digits", "study_id": "0" * 32, "tracking_uri": None, "machine": {}, "trials": []}
    (folder / "study.json").write_text(json.dumps({**study, "storage": str(storage), **more}))
    return folder


def test_a_recorded_store_that_is_gone_is_named_and_never_made_again(tmp_path, monkeypatch):
    storage, gone = tmp_path / "studies", tmp_path / "vanished" / "mlflow.db"
    make_study(storage, tracking_uri=f"sqlite:///{gone}")
    for command in ("sync", "ui", "resume"):
        error = refused(command, "digits")
        assert f"{gone}, which does not exist any more" in error
        assert "--tracking-uri" in error
    assert not gone.parent.exists()
    # The named store wins, as an option and as a variable.
    used = []
    monkeypatch.setattr("raydml.cli.server.serve_ui", lambda uri, _port, **_: used.append(uri) or 0)
    monkeypatch.setattr("raydml.tracking.store.runs_page", lambda _uri: "")
    monkeypatch.setattr("raydml.tracking.delivery.sync", lambda _events, uri, _study, **_: used.append(uri) or True)
    (tmp_path / "other.db").write_text("")
    other = f"sqlite:///{tmp_path}/other.db"
    done("ui", "digits", "--tracking-uri", other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    done("ui", "digits")
    done("sync", "digits")
    assert used == [other, other, other]
    assert not gone.parent.exists()


def test_a_study_that_runs_is_not_run_twice(tmp_path):
    """Whatever the other process holds: the study, and the delivery of its events."""
    folder = make(tmp_path)
    with filelock.FileLock(folder / LOCK):
        before = (folder / "study.json").read_bytes()
        options = ["--tracking-uri", default_uri(folder.parent), "--data-root", tmp_path]
        said = refused("resume", folder.name, "--storage", folder.parent, *options)
        assert (folder / "study.json").read_bytes() == before, "refused before anything is changed"
    assert "is running already, by another process, whose pid is not recorded. Cure: wait for it" in said
    assert not (folder / "events.jsonl").exists()
