"""Commands that run studies, and MLflow: a server that is down, one that cannot be right, and passwords."""

import logging
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from raydml.cli import studies
from raydml.study import actor, stages
from raydml.study.driver import only_driver
from raydml.study.folder import read_json
from raydml.study.stages import run_study
from raydml.tracking.delivery import Tracker, sync
from raydml.tracking.store import default_uri
from tests.cli.commands import done, refused, run
from tests.cli.test_main import SPACE, fake_run, make_study
from tests.study.in_process import without_ray
from tests.study.test_folder import space_at
from tests.tracking.test_delivery import free_port
from tests.tracking.test_store import PAGE, answering

pytestmark = [pytest.mark.usefixtures("own_folder"), pytest.mark.xdist_group("mlflow")]


def test_a_study_starts_without_its_server_but_not_with_an_address_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "space.yaml").write_text(SPACE)
    made, ran = [], []
    monkeypatch.setattr("raydml.study.folder.create_study", lambda _space, **settings: made.append(settings))
    monkeypatch.setattr(studies, "run_and_show", lambda *arguments: ran.append(arguments))
    away = f"http://ann:PLANTED@127.0.0.1:{free_port()}"
    sweep = ("sweep", "space.yaml", "--data-root", ".", "--tracking-uri")
    said = done(*sweep, away).stderr
    assert "note: MLflow at http://***@127.0.0.1" in said
    assert "The study runs all the same" in said
    assert "PLANTED" not in said
    assert (made.pop()["tracking_uri"], ran.pop()[-2]) == (away, away)
    make_study(tmp_path / "studies", "digits")
    assert "note: MLflow at http://127.0.0.1:9" in done("resume", "digits").stderr
    assert len(ran) == 1
    with answering(404, PAGE) as (page, _):
        for command in (sweep, ("resume", "digits", "--tracking-uri")):
            for wrong in (page, "file:///tmp/runs", "sqlite:///mlflow.db", "http://"):
                assert "Cure: " in refused(*command, wrong)
    assert (len(made), len(ran)) == (0, 1), "refused before anything is made"


def test_what_mlflow_lacks_is_said_last(tmp_path, monkeypatch):
    folder = make_study(tmp_path / "studies", "digits", tracking_uri=None)
    fake_run(monkeypatch, SimpleNamespace(status="finished", signal=None, text=""))
    monkeypatch.setattr(studies, "show_outcome", lambda _program, _folder, console: console.print("the outcome"))
    lines = done("resume", folder).stdout.strip().splitlines()
    assert lines[-3:] == ["the outcome", "", "deliver it later: launch.py sync digits"]


@pytest.mark.parametrize("phase", ["before the driver", "while the results are sent"])
def test_a_signal_outside_the_driver_ends_the_command_in_order(tmp_path, monkeypatch, phase):
    folder = make_study(tmp_path / "studies", "digits", tracking_uri=None)
    calls = fake_run(monkeypatch, SimpleNamespace(status="finished", signal=None, text=""))
    monkeypatch.setattr(studies, "show_outcome", lambda _program, _folder, console: console.print("the outcome"))
    tracker = sys.modules["raydml.tracking.delivery"].Tracker
    method = "start" if phase == "before the driver" else "finish"
    original, sent = getattr(tracker, method), []

    def with_signal(self, *arguments):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # until the handler ends this
        return original(self, *arguments)

    monkeypatch.setattr(tracker, method, with_signal)
    result = run("resume", folder)
    assert result.exit_code == 143
    was_run = any(isinstance(call, tuple) and call[0] == folder for call in calls)
    assert was_run == (phase != "before the driver")
    if was_run:
        assert "the outcome" in result.output
        after = [call for call in calls if call != "end_unused"]
        assert after[-1] == "finish", "a short one, after the one that was cut off"
    else:
        assert "Interrupted. To continue:\n  launch.py resume digits" in result.output


@pytest.mark.slow
def test_no_secret_of_the_environment_or_of_an_address_is_written_anywhere(tmp_path, monkeypatch, capfd, caplog):
    """A whole study, its report, its MLflow store and everything that is printed."""
    caplog.set_level(logging.DEBUG)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, f"PLANTED-{name}")
    address = f"http://ann:PLANTED-ADDRESS@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0.01")  # the last request ends before `finish` does
    without_ray(monkeypatch)
    monkeypatch.setattr(stages, "illustrate", lambda _session: None)
    monkeypatch.setattr(actor, "METRIC_GROUPS", ("retrieval",))
    overrides = ["machine.device=cpu", "study.search.scheduler=none", "study.search.num_trials=1", "trial.epochs=1"]
    overrides += ["study.confirm.seeds=1", "study.finalize={top: 1}"]
    space = space_at(tmp_path, overrides=overrides)
    storage = tmp_path / "studies"
    file = next(tmp_path.glob("*.yaml"))
    folder = studies.create(space, file, storage, address, f"launch.py sweep --tracking-uri {address}")
    tracker = Tracker(folder / "events.jsonl", address, folder.name)
    with only_driver(folder):  # as the command does, which holds the study before anything is sent
        tracker.start()
        assert run_study(folder).status == "finished"
        assert not tracker.finish(1)
    print(tracker.hint())
    assert sync(folder / "events.jsonl", default_uri(storage), folder.name)
    assert read_json(folder / "study.json")["tracking_uri"] == address.replace("ann:PLANTED-ADDRESS@", "")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"study.json", "events.jsonl", "report.html", "mlflow.db", "MLmodel"} <= names
    assert [path for path in files if b"PLANTED" in path.read_bytes()] == []
    out, err = capfd.readouterr()
    assert "complete it: launch.py sync" in out
    assert "its password is not stored" in out
    assert "PLANTED" not in out + err + caplog.text
