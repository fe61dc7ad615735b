"""What a node lacks, in words, and studies on clusters some of whose nodes cannot run a trial."""

import errno
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raydml.config.trial import Machine
from raydml.study import events, node, runner
from raydml.study.events import events_path, read_state
from raydml.study.faults import FaultStop
from raydml.study.node import NodeReport, fault_of_node, fit_nodes, needs_of, node_fault_in, note_of_room, selector_of
from raydml.study.process import MachineFault
from raydml.study.remote import StudyPlace
from raydml.study.runner import StudyEvents, StudySession, run_trials
from tests.chaos.targets import Cluster
from tests.study.small import leave_pictures_out
from tests.study.test_folder import ROOT

can_mount = shutil.which("unshare") is not None and subprocess.call(["unshare", "--mount", "true"]) == 0


def alive(monkeypatch, *ids, **resources):
    """Let the cluster have these nodes, none of which is about to be taken away."""
    nodes = [
        {
            "NodeID": name,
            "NodeManagerHostname": f"host-{name}",
            "Alive": True,
            "Resources": resources or {"CPU": 2.0},
            "Labels": {},
        }
        for name in ids
    ]
    monkeypatch.setattr(node.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(node, "notices_of_nodes", dict)


@pytest.fixture
def needs(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    (tmp_path / "images").mkdir()
    return needs_of(StudyPlace(str(tmp_path / "study")), tmp_path / "images", joined=True)


def test_a_node_that_has_everything_has_no_fault(needs):
    assert fault_of_node(needs, has_gpu=False) == ""
    assert fault_of_node(needs._replace(data_root=None), has_gpu=False) == ""


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        ({"package": "0123"}, f"another raydml, from {ROOT / 'raydml'}. Cure: "),
        ({"torch": "1.0.0"}, "the driver 1.0.0. Cure: install requirements.lock"),
        (
            {"place": StudyPlace("/nowhere/study")},
            "does not see the study in /nowhere/study. Cure: mount the shared storage",
        ),
        ({"data_root": "/nowhere"}, "has no folder machine.data_root = /nowhere. Cure: mount or copy"),
    ],
)
def test_what_a_node_lacks_is_said_with_its_cure(needs, lack, words):
    assert words in fault_of_node(needs._replace(**lack), has_gpu=False)


def test_code_that_changes_under_a_study_on_this_machine_alone_is_noted(needs):
    here = needs._replace(package="0123", shared_package=str(ROOT / "raydml"))
    assert fault_of_node(here, has_gpu=False) == ""
    assert "changed since the study began; this trial and later ones may run" in node.note_of_changed_code(here)
    assert node.note_of_changed_code(needs) == ""


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ""),  # the disk is full for all nodes: a trial then stops the study, with the cure
        (errno.EROFS, "cannot use"),
        (errno.ENOTCONN, "cannot use"),
    ],
)
def test_a_storage_that_fails_is_a_fault_of_the_node_unless_it_is_full(needs, monkeypatch, number, words):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(node.tempfile, "TemporaryFile", fail)
        found = fault_of_node(needs, has_gpu=False)
    assert (
        (found.startswith(f"it {words} {needs.place.folder} ({os.strerror(number)}). Cure: ")) if words else found == ""
    )


def test_a_mount_that_cannot_be_looked_at_is_a_fault_of_the_node(needs, monkeypatch):
    exists = Path.exists

    def stale(path):
        if str(path) == needs.data_root:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return exists(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", stale)
        assert f"cannot use {needs.data_root} (Stale file handle)" in fault_of_node(needs, has_gpu=False)


def test_a_gpu_that_is_full_is_no_fault_of_its_node(needs, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", full)
        assert fault_of_node(needs, has_gpu=True) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which torch finds no GPU")
def test_a_gpu_that_ray_counts_and_torch_cannot_use(needs):
    assert "Ray counts a GPU there, and torch cannot use it (" in fault_of_node(needs, has_gpu=True)


def test_a_storage_that_has_no_study_yet_is_known_by_another_file(needs, tmp_path):
    assert fault_of_node(needs._replace(place=None), has_gpu=False) == ""
    marked = needs._replace(place=StudyPlace(str(tmp_path)), mark=".mark")
    assert f"it does not see {tmp_path}. Cure: mount the shared storage" in fault_of_node(marked, has_gpu=False)
    (tmp_path / ".mark").touch()
    assert fault_of_node(marked, has_gpu=False) == ""


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({}, []),
        ({"clock_s": 1_004.0}, []),
        ({"clock_s": 1_007.0}, ["its clock is 7 s ahead of the driver's", "Cure: synchronise the clocks"]),
        ({"clock_s": 900.0}, ["its clock is 100 s behind the driver's"]),
        ({"missing_bytes": 2**30, "free_bytes": 2**31}, []),
        (
            {"missing_bytes": 30 * 2**30, "free_bytes": 2**30},
            ["machine.cache_dir = /c has 1.0 GiB free, and the decoded images take 30.0 GiB", "Cure: free space there"],
        ),
        ({"shared_memory_bytes": 2**33}, []),
        ({"shared_memory_bytes": 2**26}, ["/dev/shm has 0.1 GiB, and Ray's object store takes 4.0 GiB", "--shm-size"]),
    ],
)
def test_what_is_not_right_on_a_node_and_no_fault(report, words):
    notes = node.notes_of_node(NodeReport("", **{"clock_s": 1_000.0, "cache_dir": "/c", **report}), 1_000.0, 2.0**32)
    assert len(notes) == bool(words)
    assert all(word in notes[0] for word in words)


def test_decoded_images_that_a_node_lacks_are_those_that_were_opened_for_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(node.ray, "get_gpu_ids", list)  # it would start a Ray
    for name, num_bytes, opened_s in (("images-a", 10, 100.0), ("images-b", 20, 50.0), ("images-c", 40, 100.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.pixels").write_bytes(bytes(num_bytes))
        (tmp_path / name / "manifest.json").touch()
        os.utime(tmp_path / name / "manifest.json", (opened_s, opened_s))
    packs = node.packs_in(tmp_path, 80.0)
    assert packs == {"images-a": 10, "images-c": 40}
    assert node.packs_in(None, 80.0) == {}
    shutil.rmtree(tmp_path / "images-a")
    found = node._check_node(needs_of(None, None, joined=True), str(tmp_path), packs)
    assert (found.fault, found.missing_bytes, found.cache_dir) == ("", 10, str(tmp_path))
    assert found.free_bytes > 0
    assert abs(found.clock_s - time.time()) < 60


def test_where_no_node_has_room_the_largest_is_named(monkeypatch):
    alive(monkeypatch, "x", CPU=2.0)
    assert node.note_of_room({"cpu": 1.0, "gpu": 0.0}) == ""
    said = node.note_of_room({"cpu": 1.0, "gpu": 1.0})
    assert said.startswith("No node has the 1 CPU and 1 GPU that a trial needs, and the largest has 2 CPU and 0 GPU.")
    alive(monkeypatch)
    assert "the largest has 0 CPU and 0 GPU" in node.note_of_room({"cpu": 1.0, "gpu": 0.5})


@pytest.mark.parametrize(
    "words",
    [
        "RuntimeError: The actor with name TrialActor failed to import on the worker. This may be because needed "
        "library dependencies are not installed in the worker environment:\n\nTraceback (most recent call last):",
        "  At least one of the input arguments for this task could not be computed:\n"
        "ray.exceptions.RaySystemError: System error: No module named 'torch'\ntraceback: Traceback:",
    ],
)
@pytest.mark.parametrize(
    "died",
    [
        "The actor died because of an error raised in its creation task, ray::X.__init__() (pid=1, actor_id=00ab)",
        "The actor died unexpectedly before finishing this task.\n\tclass_name: with_resources.<locals>.X\n"
        "\tactor_id: 00ab\n\tpid: 25970\nThe actor is dead because its worker process has died.",
    ],
)
def test_a_node_that_cannot_load_the_code_of_a_trial_is_found_in_the_text_of_an_error(monkeypatch, words, died):
    text = f"""{died}
{words}
  File "/x/raydml/study/node.py", line 20, in <module>
    import torch
ModuleNotFoundError: No module named 'torch'
"""
    actors = {"00ab": {"Address": {"NodeID": "0a1b2c3d"}}}
    monkeypatch.setattr(node.ray._private.state, "actors", lambda actor: actors.get(actor, {}))
    monkeypatch.setattr(node, "_hosts", {"0a1b2c3d": "gpu-7"})
    assert node_fault_in(text) == (
        "0a1b2c3d",
        "gpu-7 (0a1b2c): it cannot load raydml (ModuleNotFoundError: No module named 'torch'). Cure: install "
        "requirements.lock there",
    )
    assert node_fault_in(text.replace("00ab", "00ac")) is None
    assert node_fault_in(text.replace("ModuleNotFoundError", "ObjectLostError")) is None
    assert node_fault_in("actor_id=00ab\nModuleNotFoundError: No module named 'my_loss'") is None


def test_the_fault_of_a_node_is_found_in_the_text_of_an_error():
    text = """ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task
  File "/x/raydml/study/actor.py", line 103, in setup
raydml.study.node.NodeFault: [0a1b2c] gpu-7 (0a1b2c): it has torch 2.8. Cure: x
"""
    assert node_fault_in(text) == ("0a1b2c", "gpu-7 (0a1b2c): it has torch 2.8. Cure: x")
    assert node_fault_in("ValueError: [0a1b2c] x") is None


def test_a_fault_of_a_node_ends_the_run_of_tune_and_not_the_trial(tmp_path):
    error = tmp_path / "error.txt"
    error.write_text(
        "Failure # 1 (occurred at x)\nraydml.study.node.NodeFault: [ab12] gpu-7 (ab12): no disk. Cure: x\n"
    )
    trial = SimpleNamespace(config={"run": {"key": "search-000"}}, error_file=str(error), last_result={})
    for name in ("on_trial_recover", "on_trial_error"):
        stop = FaultStop()
        getattr(StudyEvents(str(tmp_path), "search", None, None, stop=stop), name)(0, [], trial)
        assert stop.stop_all()
        assert (stop.fault, stop.bad_nodes) == ("", {"ab12": "gpu-7 (ab12): no disk. Cure: x"})
    assert not events_path(tmp_path).exists()


def session_of(folder):
    study = SimpleNamespace(search=SimpleNamespace(max_concurrent=None))
    place = StudyPlace(str(folder))
    needs = needs_of(place, None, joined=True)
    return StudySession(folder, place, study, Machine(), "val_map_at_r", {"cpu": 1.0, "gpu": 0.0}, needs, {}, set())


def test_a_stage_goes_on_without_a_bad_node_with_the_same_trials(tmp_path, monkeypatch):
    """Of two runs of Tune, the first one ends for a node; a trial that found no memory waits for the others."""
    session, calls = session_of(tmp_path), []

    def run_group(session, stage, trials, resume_from, states, configurations, scheduler, is_alone, later):  # noqa: ARG001
        calls.append((sorted(resume_from), is_alone))
        if len(calls) == 1:
            session.record("trial_retried", stage=stage, trial="a", error="no memory", reason="out_of_memory")
            return False
        for key in resume_from:
            session.record("trial_ended", stage=stage, trial=key, reason="finished", error=None)
        return True

    monkeypatch.setattr(runner, "_run_group", run_group)
    alive(monkeypatch, "x")
    trials = {key: SimpleNamespace(epochs=1) for key in "abc"}
    ended = run_trials(session, "search", trials, dict.fromkeys(trials, "f"), "none")
    assert calls == [(["a", "b", "c"], False), (["b", "c"], False), (["a"], True)]
    assert {trial.ended for trial in ended.values()} == {"finished"}


def test_nodes_that_join_one_after_the_other_and_are_all_bad_stop_the_study(tmp_path, monkeypatch):
    session, joined = session_of(tmp_path), []

    def run_group(session, *_):
        joined.append(f"node-{len(joined)}")
        session.leave_out({joined[-1]: f"{joined[-1]}: no disk"})
        return False

    monkeypatch.setattr(runner, "_run_group", run_group)
    alive(monkeypatch, "good")
    with pytest.raises(
        MachineFault, match="5 nodes that joined this stage cannot run a trial, the last: node-4: no disk"
    ):
        run_trials(session, "search", {"a": SimpleNamespace(epochs=1)}, {"a": "f"}, "none")


def test_without_a_node_that_is_left_there_is_no_study_and_no_slot(tmp_path, monkeypatch):
    session = session_of(tmp_path)
    alive(monkeypatch, "x", "y")
    assert runner.num_slots(session) == 4
    session.leave_out({"x": "host x: no disk"})
    assert runner.num_slots(session) == 2
    monkeypatch.setattr(node, "notices_of_nodes", lambda: {"y": 0.0})
    assert fit_nodes({"cpu": 1.0}, {}) == [row for row in node.ray.nodes() if row["NodeID"] == "x"]
    monkeypatch.setattr(node, "notices_of_nodes", dict)
    with pytest.raises(MachineFault, match="no node can run a trial: host x: no disk; host y: no code"):
        session.leave_out({"y": "host y: no code"})
    notes = [event["text"] for event in events.read(events_path(tmp_path))]
    assert notes == ["a node is left out: host x: no disk", "a node is left out: host y: no code"]


def test_bad_nodes_are_left_out_by_their_ids():
    assert selector_of({}, {}) == {}
    assert selector_of({}, {"aa": "why", "bb": "why"}) == {"ray.io/node-id": "!in(aa,bb)"}
    assert selector_of({"zone": "a"}, {"aa": "why"}) == {"zone": "a", "ray.io/node-id": "!in(aa)"}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("A100", "x"), ("!A100", "yz"), ("in(A100,T4)", "xy"), ("in(A100, T4)", "xy"), ("!in(A100,T4)", "z"), ("B", "")],
)
def test_a_trial_has_room_only_on_nodes_with_the_labels_of_the_machine_section(monkeypatch, wanted, found):
    alive(monkeypatch, "x", "y", "z")
    for row, kind in zip(node.ray.nodes(), ("A100", "T4", None), strict=True):
        row["Labels"] = {"ray.io/accelerator-type": kind} if kind else {}
    labels = {"ray.io/accelerator-type": wanted}
    assert "".join(row["NodeID"] for row in fit_nodes({"cpu": 1.0}, {}, labels)) == found
    missing = note_of_room({"cpu": 1.0}, labels)
    assert bool(missing) == (not found)
    if missing:
        assert "machine.node_labels = {ray.io/accelerator-type: B}" in missing


@contextmanager
def sweep(checkout, storage, cluster, *settings):
    """Run a study on a cluster, and yield its process, which prints into ``output.txt`` in its storage."""
    command = [sys.executable, str(checkout / "launch.py"), "sweep", str(ROOT / "search_spaces" / "digits.yaml")]
    command += ["--storage", str(storage), "--address", cluster.address]
    command += [f"--set={setting}" for setting in settings]
    leave_pictures_out(storage / "digits")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with open(storage / "output.txt", "w") as output:
        process = subprocess.Popen(
            command, env={**environment, "RAY_AUTH_MODE": "token"}, cwd=checkout, stdout=output, stderr=output
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(30)
            cluster.stop()


SMALL = ("study.search.num_trials=3", "study.confirm=null", "study.refit=null", "study.finalize=null", "trial.epochs=2")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
@pytest.mark.skipif(not can_mount, reason="needs the right to mount folders for a process alone")
@pytest.mark.timeout(400)
def test_a_node_with_older_code_runs_the_drivers_and_those_that_join_without_storage_or_library_are_left_out(tmp_path):
    """Each has a checkout at the path of the driver's, as `ray up` makes them.

    Where a library is missing, Ray's worker cannot load the code of a trial at all, and so not look at its node.
    """
    checkout, older, storage, empty, broken = (
        tmp_path / name for name in ("checkout", "older", "studies", "empty", "torch")
    )
    for folder in (checkout, older):
        shutil.copytree(ROOT / "raydml", folder / "raydml", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "launch.py", folder)
    for folder in (storage, empty, broken):
        folder.mkdir()
    (broken / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    actor = older / "raydml" / "study" / "actor.py"
    actor.write_text(f"{actor.read_text()}\nPath({str(tmp_path / 'ran older code')!r}).touch()\n")
    cluster = Cluster(tmp_path / "cluster", num_nodes=0)
    cluster.folder.mkdir()
    cluster.start()
    cluster.add_node(mounts=[(older, checkout)])
    folder, longer = storage / "digits", ("trial.epochs=30", "study.search.scheduler=none")
    with sweep(checkout, storage, cluster, *SMALL, *longer) as process:
        deadline = time.monotonic() + 120
        while not (events_path(folder).exists() and read_state(folder).of_stage("search")):
            assert time.monotonic() < deadline, (storage / "output.txt").read_text()
            time.sleep(0.2)
        cluster.add_node(mounts=[(empty, storage)])
        cluster.add_node(mounts=[(broken, Path(torch.__file__).parent)])
        assert process.wait(200) == 0, (storage / "output.txt").read_text()
    assert not (tmp_path / "ran older code").exists()
    state, errors = read_state(folder), (folder / "search").rglob("error.txt")
    assert [trial.ended for trial in state.of_stage("search")] == ["finished"] * 3, [
        each.read_text() for each in errors
    ]
    assert [list(trial.epochs) for trial in state.of_stage("search")] == [list(range(1, 31))] * 3
    left_out = sorted(note for note in state.notes if "a node is left out" in note)
    assert len(left_out) == 2, left_out
    assert any("does not see the study" in note for note in left_out), left_out
    words = "it cannot load raydml (ModuleNotFoundError: No module named 'torch'). Cure: install"
    assert any(words in note for note in left_out), left_out
    found = events.read(events_path(folder))
    assert not [event for event in found if event["event"] == "trial_retried"]
    assert len({event["node"] for event in found if event["event"] == "trial_started"}) == 1


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which torch finds no GPU")
def test_a_cluster_whose_gpus_do_not_work_stops_the_study_and_ends_no_trial(tmp_path):
    cluster = Cluster(tmp_path / "cluster", num_nodes=0)
    cluster.folder.mkdir()
    cluster.start()
    cluster.add_node("--num-gpus", "1")
    with sweep(ROOT, tmp_path, cluster, *SMALL) as process:
        assert process.wait(120) == 2, (tmp_path / "output.txt").read_text()
    said = " ".join((tmp_path / "output.txt").read_text().split())
    assert "no node can run a trial" in said
    assert "torch cannot use it" in said
    assert "Cure: repair its driver" in said
    assert not read_state(tmp_path / "digits").of_stage("search")
