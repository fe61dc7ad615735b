"""Studies as jobs of a real Ray cluster: `submit`, a job that is killed and submitted again, one that is stopped, and
`ray job submit` as it is typed by hand."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import requests

from raydml.study import events
from raydml.study.events import events_path, read_state
from raydml.study.folder import read_study
from raydml.study.job_server import read_token
from raydml.study.package import digest_of_package
from raydml.training.checkpoint import git_commit, load_card
from tests.chaos.targets import Cluster, kill, processes
from tests.study.in_process import finished_here
from tests.study.small import leave_pictures_out
from tests.study.test_folder import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.xdist_group("cluster"),
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None,
        reason="Ray's job server needs ray[default]: uv run --extra cluster pytest ...",
    ),
]
SMALL = ["study.search.num_trials=4", "study.search.scheduler=none", "study.confirm=null", "study.refit=null"]
SMALL += ["study.finalize=null", "trial.epochs=15", "machine.checkpoint_every_s=0"]
RAY = str(os.path.join(os.path.dirname(sys.executable), "ray"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(folder, has_jobs=True)
    try:
        cluster.start()
        wait_for(lambda: answers(cluster.jobs), 60)
        yield cluster
    finally:
        cluster.stop()


def answers(address):
    try:
        return requests.get(f"{address}/api/version", timeout=5).status_code in (200, 401)
    except requests.ConnectionError:
        return False


def wait_for(found, timeout_s, what=""):
    deadline = time.monotonic() + timeout_s
    while not (result := found()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return result


def command(program, cluster, storage, *arguments, space="digits", settings=SMALL):
    words = [
        *program,
        "submit",
        space,
        "--address",
        cluster.jobs,
        "--storage",
        str(storage),
        "--python",
        sys.executable,
    ]
    return [*words, *(f"--set={setting}" for setting in settings), *map(str, arguments)]


def submit(cluster, storage, *arguments, program=(sys.executable, str(ROOT / "launch.py")), code=0, **more):
    """Run `submit` to its end, and return what it has printed."""
    variables = {**os.environ, "RAY_AUTH_MODE": "token", **more.pop("variables", {})}
    cwd = more.pop("cwd", ROOT)
    done = subprocess.run(
        command(program, cluster, storage, *arguments, **more), env=variables, cwd=cwd, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def started(cluster, storage, *arguments, **more):
    """Submit a job, and return its id."""
    said = submit(cluster, storage, *arguments, **more)
    return next(line for line in said.splitlines() if " is job " in line).split()[3]


def job(cluster, job_id):
    headers = {"Authorization": f"Bearer {read_token({'RAY_AUTH_MODE': 'token'})}"}
    return requests.get(f"{cluster.jobs}/api/jobs/{job_id}", headers=headers, timeout=10).json()


def trials_of(folder):
    return read_state(folder).of_stage("search") if events_path(folder).exists() else []


def values(folder):
    """The scores of each trial in each epoch."""
    return {
        trial.trial: {
            epoch: {name: value for name, value in metrics.items() if name.startswith("val_") and name != "val_s"}
            for epoch, metrics in sorted(trial.epochs.items())
        }
        for trial in trials_of(folder)
    }


def test_a_job_whose_driver_is_killed_goes_on_where_it_was_and_nothing_runs_twice(cluster, tmp_path):
    secrets, commit = {"MLFLOW_TRACKING_PASSWORD": "first-secret"}, git_commit()
    folder = leave_pictures_out(tmp_path / "digits")
    said = submit(cluster, tmp_path, variables=secrets)
    assert "secret" not in said
    assert "MLFLOW_TRACKING_PASSWORD (values are not shown)" in said
    first = next(line for line in said.splitlines() if " is job " in line).split()[3]
    assert job(cluster, first)["runtime_env"]["env_vars"]["MLFLOW_TRACKING_PASSWORD"] == "first-secret"
    assert f"digits runs already as job {first}" in submit(cluster, tmp_path, variables=secrets)
    assert "with other options" in submit(cluster, tmp_path, "--num-trials", 5, code=2)
    wait_for(
        lambda: [trial for trial in trials_of(folder) if trial.ended] and
        [trial for trial in trials_of(folder) if not trial.ended and len(trial.epochs) > 1],
        300,
    )  # fmt: skip
    [sweep] = [pid for pid, (_, _, words) in processes().items() if "sweep" in words and str(tmp_path) in words
               and words.split()[0] == sys.executable]  # fmt: skip
    kill(sweep, signal.SIGKILL)
    wait_for(lambda: job(cluster, first)["status"] == "FAILED", 60)
    before = {trial.trial for trial in trials_of(folder) if trial.ended}
    assert 0 < len(before) < 4
    assert "finished" in submit(cluster, tmp_path, "--follow", variables=secrets)
    starts = [event["trial"] for event in events.read(events_path(folder)) if event["event"] == "trial_started"]
    ends = [event["trial"] for event in events.read(events_path(folder)) if event["event"] == "trial_ended"]
    assert {trial: starts.count(trial) for trial in before} == dict.fromkeys(before, 1)
    assert sorted(ends) == [f"search-{number:03d}" for number in range(4)]

    undisturbed = finished_here(ROOT / "search_spaces" / "digits.yaml", SMALL, tmp_path / "undisturbed")
    assert values(folder) == values(undisturbed)
    assert all(len(epochs) == 15 and all(epochs.values()) for epochs in values(folder).values())

    assert read_study(folder)["commit"] == commit
    card = load_card(max((folder / "search").glob("run-*/search-*/checkpoint_*")))
    assert card["git_commit"] == commit
    assert submit(cluster, tmp_path, "--follow", variables=secrets).count("is finished; nothing to do") == 1


def test_a_job_that_is_stopped_saves_its_trials_first(cluster, tmp_path):
    settings = [*SMALL, "trial.epochs=2000", "machine.checkpoint_every_s=600"]
    job_id = started(cluster, tmp_path, "--name", "stopped", settings=settings)
    folder = tmp_path / "stopped"
    wait_for(lambda: any(len(trial.epochs) > 1 for trial in trials_of(folder)), 300)
    words = [RAY, "job", "stop", "--address", cluster.jobs, job_id]
    subprocess.run(words, check=True, env={**os.environ, "RAY_AUTH_MODE": "token"}, capture_output=True, timeout=200)
    assert job(cluster, job_id)["status"] == "STOPPED"
    assert read_state(folder).state == "interrupted"
    saved = sorted((folder / "search").glob("run-*/search-*/checkpoint_*/manifest.json"))
    assert {file.parents[1].name for file in saved} == {trial.trial for trial in trials_of(folder) if trial.epochs}


def test_an_installed_raydml_without_a_checkout_can_submit_a_space_of_its_user(cluster, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(ROOT / "raydml", site / "raydml", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "search_spaces", site / "raydml" / "search_spaces")
    (tmp_path / "mine.yaml").write_text((ROOT / "search_spaces" / "digits.yaml").read_text())
    program, environment = (sys.executable, "-m", "raydml"), {"PYTHONPATH": str(site)}
    settings = [*SMALL, "study.search.num_trials=1", "trial.epochs=1"]
    leave_pictures_out(tmp_path / "studies" / "mine")
    said = submit(
        cluster, tmp_path / "studies", "--follow", program=program, variables=environment, cwd=tmp_path,
        space="mine.yaml", settings=settings,
    )  # fmt: skip
    assert "-m raydml sweep submitted/mine.yaml" in said
    assert [trial.ended for trial in trials_of(tmp_path / "studies" / "mine")] == ["finished"]


def test_ray_job_submit_as_it_is_typed_by_hand_runs_the_study_on_the_cluster(cluster, tmp_path):
    settings = [*SMALL, "study.search.num_trials=1", "trial.epochs=1"]
    leave_pictures_out(tmp_path / "digits")
    checkout = tmp_path / "checkout"
    for name in ("raydml", "search_spaces"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", checkout)
    words = [RAY, "job", "submit", "--address", cluster.jobs, "--working-dir", str(checkout), "--", sys.executable]
    words += ["launch.py", "sweep", "digits", "--storage", str(tmp_path), *(f"--set={setting}" for setting in settings)]
    done = subprocess.run(
        words, env={**os.environ, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    state = read_state(tmp_path / "digits")
    assert "This is a job of a Ray cluster: the study runs on that cluster." in state.notes


@pytest.mark.parametrize(("token", "words"), [("0" * 64, "refuses the token"), ("", "demands a token")])
def test_a_job_server_that_refuses_the_token_is_named_within_seconds(cluster, tmp_path, token, words):
    variables = {"RAY_AUTH_MODE": "token" if token else "disabled", "RAY_AUTH_TOKEN": token}
    began_s = time.monotonic()
    said = submit(cluster, tmp_path, code=2, variables=variables).strip()
    assert time.monotonic() - began_s < 10  # 1 s without other work
    assert "\n" not in said
    assert words in said
    assert "Cure: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in said


def test_doctor_names_each_node_and_what_it_lacks(cluster, tmp_path):
    """The nodes see the storage of this machine; the images are nowhere."""
    words = [
        sys.executable,
        str(ROOT / "launch.py"),
        "doctor",
        "--address",
        cluster.address,
        "--storage",
        str(tmp_path),
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok cluster {cluster.address}: 3 nodes" in said
    assert said.count(": 1 CPU, 0 GPU") == 2
    assert said.count(": 0 CPU, 0 GPU") == 1
    assert digest_of_package() in said
    assert not list(tmp_path.iterdir())
