"""Two Ray nodes on one machine, the loss of one of them in the middle of a study, and who may read Ray's token."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import ray

from raydml.study import cluster as study_cluster
from raydml.study import events, stages
from raydml.study.events import events_path, read_state, read_trials
from raydml.study.folder import StudyError, read_json
from raydml.study.process import MachineFault, RayEnded
from tests.chaos.targets import Cluster, processes
from tests.study.small import leave_pictures_out
from tests.study.study_events import started
from tests.study.test_folder import ROOT, make

SMALL = ["study.search.num_trials=2", "study.search.scheduler=none", "study.confirm={top: 1, folds: 2, seeds: 1}"]
SMALL += ["study.refit=null", "study.max_retries=0", "trial.epochs=15", "machine.checkpoint_every_s=0"]


@contextmanager
def sweep_on(cluster, storage):
    """Run a small study on a cluster by the command, which has a token, in a process of its own.

    Ray takes the kind of authentication from the environment of a process once, for good.
    """
    command = [sys.executable, str(ROOT / "launch.py"), "sweep", str(ROOT / "search_spaces" / "digits.yaml")]
    command += ["--storage", str(storage), "--address", cluster.address]
    command += [word for setting in SMALL for word in ("--set", setting)]
    leave_pictures_out(storage / "digits")
    cluster.folder.mkdir()
    cluster.start()
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    with open(storage / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        yield process, log.name
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        cluster.stop()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
@pytest.mark.timeout(600)
def test_a_study_survives_the_loss_of_a_node(tmp_path):
    """Its trials have no second try: the loss of a node is no failure of a trial."""
    cluster, folder = Cluster(tmp_path / "cluster"), tmp_path / "digits"
    with sweep_on(cluster, tmp_path) as (process, log):
        deadline = time.monotonic() + 120
        while sorted(len(trial.epochs) > 2 for trial in trials_of(folder)) != [True, True]:
            assert time.monotonic() < deadline, Path(log).read_text()
            assert process.poll() is None, Path(log).read_text()
            time.sleep(0.1)
        cluster.kill_node(cluster.nodes[1])
        assert process.wait(240) == 0, Path(log).read_text()
    search, confirm = read_trials(folder, "search"), read_trials(folder, "confirm")
    assert (len(search), len(confirm)) == (2, 2)
    assert sorted(trial.num_moves for trial in search.values()) == [0, 1]
    for trial in (*search.values(), *confirm.values()):
        assert (trial.ended, trial.num_retries, list(trial.epochs)) == ("finished", 0, list(range(1, 16)))
    assert len(read_json(folder / "final.json")[0]["runs"]) == 2


def trials_of(folder):
    return read_state(folder).trials.values() if events_path(folder).exists() else ()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
def test_a_cluster_without_the_token_of_the_command_is_named(tmp_path):
    """Ray's GCS cannot reach the driver then, and gives every trial up."""
    with sweep_on(Cluster(tmp_path / "cluster", num_nodes=1, auth="disabled"), tmp_path) as (process, log):
        assert process.wait(120) == 2, Path(log).read_text()
        assert "Cure: start all nodes and this command with the same RAY_AUTH_MODE" in Path(log).read_text()
    assert not any(trial.ended for trial in trials_of(tmp_path / "digits"))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
def test_a_study_goes_on_where_rays_token_is_deleted(tmp_path):
    """Each process that Ray starts reads its token. Six new actors need new processes."""
    program = (
        "import os, ray; from pathlib import Path; from raydml.study.cluster import connected\n"
        "with connected(None, os.environ):\n"
        "    (Path.home() / '.ray' / 'auth_token').unlink()\n"
        "    actor = ray.remote(num_cpus=0)(type('Actor', (), {'number': lambda self: 1}))\n"
        "    print(sum(ray.get([actor.remote().number.remote() for _ in range(6)], timeout=40)))"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["6"], done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "head"])
def test_a_cluster_that_is_not_there_is_refused_within_seconds(address):
    began_s = time.monotonic()
    refusal = f"--address {address}: no Ray cluster can be joined there .*Cure: check"
    with pytest.raises(StudyError, match=refusal), study_cluster.connected(address):
        pass
    assert time.monotonic() - began_s < 15  # Ray itself: 40 s and more


def test_what_is_no_head_of_ray_is_refused_within_seconds(monkeypatch):
    """The port of the dashboard, for example: GcsClient itself waits for 40 s."""
    # Ray would put the address of this host in the place of 127.0.0.1.
    monkeypatch.setattr(study_cluster.services, "canonicalize_bootstrap_address_or_die", lambda address: address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, began_s = f"127.0.0.1:{server.getsockname()[1]}", time.monotonic()
        with pytest.raises(StudyError, match="does not answer as a head of Ray"), study_cluster.connected(address):
            pass
    assert time.monotonic() - began_s < 15


@pytest.mark.parametrize(
    ("address", "is_job", "joined"),
    [(None, False, None), (None, True, "auto"), ("local", False, None), ("head:1", True, "head:1")],
)
def test_a_study_joins_the_cluster_of_its_job_unless_another_is_named(tmp_path, monkeypatch, address, is_job, joined):
    class Joined(Exception):
        """Raised where the study would begin."""

    def connected(address, **_):
        raise Joined(address)

    monkeypatch.setattr(stages, "connected", connected)
    environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"} if is_job else {}
    with pytest.raises(Joined) as raised:
        stages.drive_study(make(tmp_path), address=address, own_environment=environment)
    assert raised.value.args == (joined,)


def test_a_study_that_has_trials_pauses_where_its_cluster_is_gone_and_another_one_is_refused(tmp_path, monkeypatch):
    """As after the loss of a head; the command then prints the line that goes on."""

    def connected(address, **_):
        raise StudyError(f"--address {address}: no Ray cluster can be joined there")

    monkeypatch.setattr(stages, "connected", connected)
    folder = make(tmp_path)
    with pytest.raises(StudyError, match=r"^--address head:1: no Ray cluster can be joined there$"):
        stages.drive_study(folder, address="head:1")
    events.append(events_path(folder), started(0))
    with pytest.raises(MachineFault, match=r"has stopped, and no trial is lost: --address head:1: .* Then resume the"):
        stages.drive_study(folder, address="head:1")
    assert read_state(folder).state == "interrupted"


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A cluster that no study runs on."""
    cluster = Cluster(tmp_path_factory.mktemp("head"), num_nodes=0)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
def test_a_wrong_token_is_refused_within_seconds(head):
    program = "import sys; from raydml.study.cluster import connected\nwith connected(sys.argv[1]):\n    pass"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, head.address], env=environment, cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert "no Ray cluster can be joined there" in done.stderr
    assert "token" in done.stderr.splitlines()[-1]
    assert time.monotonic() - began_s < 30  # most of it are imports


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
def test_a_cluster_of_other_versions_is_refused_in_words(head):
    program = (
        "import sys; from ray._private import utils; from raydml.study.cluster import connected\n"
        "utils.compute_version_info = lambda: ('2.59.0', '3.10.1')\n"
        "with connected(sys.argv[1]):\n    pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, head.address], env={**os.environ, "RAY_AUTH_MODE": "token"}, cwd=ROOT,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    here = f"Ray {ray.__version__} on Python {'.'.join(map(str, sys.version_info[:3]))}"
    said = f"--address {head.address}: the cluster has {here}, and this command Ray 2.59.0 on Python 3.10.1: Ray joins"
    assert said in done.stderr
    assert "Cure: install requirements.lock with the same Python on all machines" in done.stderr


@pytest.mark.parametrize("before", ["no folder", "a readable token", "no home"])
def test_rays_token_is_readable_by_this_user_alone(tmp_path, monkeypatch, caplog, before):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    if before != "no home":
        home.mkdir()
    if before == "a readable token":
        (home / ".ray").mkdir(mode=0o755)
        (home / ".ray" / "auth_token").write_text("secret")
        (home / ".ray" / "auth_token").chmod(0o644)
    study_cluster._protect_token()
    assert not caplog.records
    if before == "no home":
        assert not home.exists()
        return
    assert (home / ".ray").stat().st_mode & 0o777 == 0o700
    token = home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    if before == "a readable token":
        assert token.read_text() == "secret", "clusters that use it go on"
    else:
        assert len(bytes.fromhex(token.read_text())) == 32
    study_cluster._protect_token()
    assert token.read_text(), "a second study uses the same"


#: What listens during a study on an embedded Ray, and where, as docs/reliability.md lists it.
LISTENERS = {"driver": {"all"}, "gcs_server": {"all"}, "raylet": {"all"}, "trial": {"all"}, "agent": {"host"}}
#: The same with the extra `cluster`, with whose libraries Ray's agent counts its metrics and offers them.
CLUSTER_LISTENERS = {**LISTENERS, "agent": {"host", "all"}}


def role_of(words):
    if "gcs_server" in words:
        return "gcs_server"
    if "raylet/raylet" in words:
        return "raylet"
    if "autoscaler/_private/monitor.py" in words:
        return "monitor"
    if "dashboard/dashboard.py" in words:
        return "dashboard"
    if "Agent" in words or "agent" in words:
        return "agent"
    return "trial" if words.startswith("ray::") or "default_worker" in words else "driver"


def listeners_of(session):
    """The roles of a session's processes, and where each listens beside loopback.

    Sockets in the state LISTEN (0A), which /proc lists by their inodes.
    """
    addresses = {}
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A":
                addresses[fields[9]] = fields[1].split(":")[0]
    found = {}
    for pid, (_, of_session, words) in processes().items():
        if of_session != session:
            continue
        with suppress(FileNotFoundError):  # ended meanwhile
            for link in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(link) if link.is_symlink() else ""
                if (address := addresses.get(target.removeprefix("socket:[").removesuffix("]"))) is not None:
                    where = "all" if set(address) == {"0"} else "loopback" if address.endswith("7F") else "host"
                    found.setdefault(role_of(words), set()).add(where)
    return {role: where - {"loopback"} for role, where in found.items() if where - {"loopback"}}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
def test_what_listens_during_a_study_is_what_the_docs_list():
    has_metrics = importlib.util.find_spec("opencensus") is not None
    expected = CLUSTER_LISTENERS if has_metrics else LISTENERS
    program = (
        "import ray, sys; from raydml.study.cluster import connected\n"
        "with connected(None):\n"
        "    ray.get(ray.remote(lambda: 1).remote()); print('up', flush=True); sys.stdin.read()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert driver.stdout.readline() == b"up\n"
        # Some of these processes listen only seconds after the first task has run.
        end = time.monotonic() + 60
        while (found := listeners_of(driver.pid)) != expected and time.monotonic() < end:
            time.sleep(0.5)
    finally:
        driver.stdin.close()
        assert driver.wait(60) == 0
        driver.stdout.close()
    assert found == expected


def test_what_goes_wrong_with_an_early_ray_is_raised_where_it_is_used(tmp_path, monkeypatch):
    def fail(**_options):
        raise OSError("no memory for the object store")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", fail)
    early = study_cluster.EarlyRay({})
    early.start()
    with pytest.raises(RayEnded, match="no memory for the object store"), early.used():
        pytest.fail("a study without Ray")


def test_an_early_ray_ends_where_its_use_ends(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", lambda **_options: calls.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    early = study_cluster.EarlyRay({})
    early.start()
    assert calls == ["init"]
    with early.used():
        calls.append("study")
    assert calls == ["init", "study", "shutdown"]


def test_a_study_protects_the_token_before_ray_starts(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", lambda **_options: seen.append((tmp_path / ".ray").stat().st_mode & 0o777))
    with study_cluster.connected(None):
        pass
    assert seen == [0o700]


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_is_used_replaced_or_refused_by_the_length_of_its_sockets(
    tmp_path, monkeypatch, caplog, name
):
    """A socket of Linux has 107 bytes; Ray's part is /ray/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store."""
    options = []
    monkeypatch.setattr(ray, "init", lambda **some: options.append(some["_temp_dir"]))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    rest = "/ray/session_2026-11-29_02-11-16_007306_4194304/sockets/plasma_store"
    longest = "/tmp/" + "x" * (107 - len(rest) - len("/tmp/"))
    for folder, replaced in ((longest, None), (longest + "x", "/tmp/ray"), ("/tmp/\udcff", "/tmp/ray")):
        monkeypatch.setattr(study_cluster.os, "makedirs", lambda *_, **__: None)
        monkeypatch.setattr(study_cluster.tempfile, "TemporaryFile", lambda dir: nullcontext())  # noqa: ARG005
        monkeypatch.setenv(name, folder)
        with study_cluster.connected(None):
            pass
        assert options.pop() == replaced
        shown = folder.replace("\udcff", "\\udcff")
        assert (f"TMPDIR = {shown} is too long" in caplog.text) == bool(replaced)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(name, str(tmp_path / "file"))
    monkeypatch.setattr(study_cluster, "_SOCKET_BYTES", 0)
    refusal = r"TMPDIR = .*file: .*File exists.*Cure: set RAY_TMPDIR"
    with pytest.raises(StudyError, match=refusal), study_cluster.connected(None):
        pass


def test_two_signals_at_once_are_one_and_a_later_one_ends_the_study_at_once(monkeypatch):
    """Ray stops a job by a signal to each of its processes, one of which passes its own on to the other."""
    monkeypatch.setattr(study_cluster, "_SAME_SIGNAL_S", 0.3)
    with study_cluster.catch_signals() as received:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2
        time.sleep(0.4)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
