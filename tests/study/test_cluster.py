"""Two Ray nodes on one machine, the loss of one of them in the middle of a study, and who may read Ray's token."""

import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from raydml.search_space.space import load_space
from raydml.study import cluster as study_cluster
from raydml.study import events
from raydml.study.events import events_path, read_trials
from raydml.study.folder import StudyError, create_study, read_json
from raydml.study.stages import run_study
from tests.chaos.targets import processes
from tests.study.test_folder import ROOT


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(900)
def test_a_study_survives_the_loss_of_a_node(tmp_path, monkeypatch):
    # The nodes and this driver have no token in common; they live and die within this test.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes()
        small = ["study.search.num_trials=4", "study.confirm={top: 1, folds: 2, seeds: 1}", "study.refit=null"]
        space = load_space(ROOT / "search_spaces" / "digits.yaml", small)
        folder = create_study(space, storage=tmp_path, tracking_uri="sqlite:///unused.db", space_text="")
        lost = threading.Event()

        def lose_a_node():
            deadline = time.monotonic() + 400
            while time.monotonic() < deadline:
                if events_path(folder).exists():
                    seen = events.read(events_path(folder))
                    if sum(event["event"] == "epoch" for event in seen) >= 3:
                        cluster.remove_node(second, allow_graceful=False)
                        lost.set()
                        return
                time.sleep(0.2)

        thread = threading.Thread(target=lose_a_node)
        thread.start()
        outcome = run_study(folder, address=cluster.address)
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert lost.is_set()
    assert outcome.status == "finished"
    search, confirm = read_trials(folder, "search"), read_trials(folder, "confirm")
    assert len(search) == 4
    assert {record.ended for record in search.values()} <= {"finished", "stopped_early"}
    assert {record.ended for record in confirm.values()} == {"finished"}
    retried = {event["trial"] for event in events.read(events_path(folder)) if event["event"] == "trial_retried"}
    assert retried  # somebody was on the node that went
    for record in (*search.values(), *confirm.values()):
        assert sorted(record.epochs) == list(range(1, max(record.epochs) + 1))
    assert len(read_json(folder / "final.json")[0]["runs"]) == 2


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
LISTENERS = {"driver": "all", "gcs_server": "all", "raylet": "all", "trial": "all", "agent": "host"}


def role_of(words):
    if "gcs_server" in words:
        return "gcs_server"
    if "raylet/raylet" in words:
        return "raylet"
    if "Agent" in words or "agent" in words:
        return "agent"
    return "trial" if words.startswith("ray::") or "default_worker" in words else "driver"


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_what_listens_during_a_study_is_what_the_docs_list():
    """Sockets in the state LISTEN (0A), which /proc lists by their inodes, of the processes of a session."""
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
        addresses = {}
        for table in ("tcp", "tcp6"):
            for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A":
                    addresses[fields[9]] = fields[1].split(":")[0]
        found = {}
        for pid, (_, session, words) in processes().items():
            if session != driver.pid:
                continue
            for link in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(link) if link.is_symlink() else ""
                if (address := addresses.get(target.removeprefix("socket:[").removesuffix("]"))) is not None:
                    where = "all" if set(address) == {"0"} else "loopback" if address.endswith("7F") else "host"
                    found.setdefault(role_of(words), set()).add(where)
    finally:
        driver.stdin.close()
        assert driver.wait(60) == 0
        driver.stdout.close()
    assert {role: where - {"loopback"} for role, where in found.items() if where - {"loopback"}} == {
        role: {where} for role, where in LISTENERS.items()
    }


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
