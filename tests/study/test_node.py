"""What a node lacks, in words, and studies on clusters some of whose nodes cannot run a trial."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from raydml.study import events, node
from raydml.study.events import events_path, read_state
from raydml.study.node import away_from, fault_of_node, needs_of, node_fault_in
from tests.chaos.targets import Cluster
from tests.study.test_folder import ROOT

can_mount = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def needs(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    (tmp_path / "images").mkdir()
    return needs_of(tmp_path / "study", tmp_path / "images")


def test_a_node_that_has_everything_has_no_fault(needs):
    assert fault_of_node(needs, has_gpu=False) == ""
    assert fault_of_node(needs._replace(data_root=None), has_gpu=False) == ""


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        ({"package": "0123", "package_folder": "/elsewhere"}, f"another raydml, from {ROOT / 'raydml'}. Cure: "),
        ({"package": "0123"}, f"the files in {ROOT / 'raydml'} were changed while the study ran. Cure: resume it"),
        ({"torch": "1.0.0"}, "the driver 1.0.0. Cure: install requirements.lock"),
        ({"folder": "/nowhere/study"}, "does not see the study in /nowhere/study. Cure: mount the shared storage"),
        ({"data_root": "/nowhere"}, "has no folder machine.data_root = /nowhere. Cure: mount or copy"),
    ],
)
def test_what_a_node_lacks_is_said_with_its_cure(needs, lack, words):
    assert words in fault_of_node(needs._replace(**lack), has_gpu=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which torch finds no GPU")
def test_a_gpu_that_ray_counts_and_torch_cannot_use(needs):
    assert "Ray counts a GPU there, and torch cannot use it (" in fault_of_node(needs, has_gpu=True)


def test_the_digest_of_the_package_changes_with_each_byte_and_each_name(tmp_path, monkeypatch):
    def digest(**files):
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}" / "raydml"
        for name, content in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(node, "_PACKAGE", folder)
        node.digest_of_package.cache_clear()
        return node.digest_of_package()

    try:
        same = digest(a="1", b__c="2")
        assert digest(a="1", b__c="2") == same
        others = {digest(a="1", b__c="3"), digest(a="1", b__d="2"), digest(a="12"), digest(a="1", b__c="2", d="")}
        assert len(others | {same}) == 5
    finally:
        node.digest_of_package.cache_clear()


def test_the_staged_package_is_the_package_and_nothing_else():
    with node.staged_package() as folder:
        assert [path.name for path in folder.iterdir()] == ["raydml"]
        command = "from raydml.study import node; print(node.__file__, node.digest_of_package())"
        done = subprocess.run(
            [sys.executable, "-c", command], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == [str(folder / "raydml" / "study" / "node.py"), node.digest_of_package()]
    assert not folder.exists()


def test_the_fault_of_a_node_is_found_in_the_text_of_an_error():
    text = """ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task
  File "/x/raydml/study/actor.py", line 103, in setup
raydml.study.node.NodeFault: [0a1b2c] gpu-7 (0a1b2c): it has torch 2.8. Cure: x
"""
    assert node_fault_in(text) == ("0a1b2c", "gpu-7 (0a1b2c): it has torch 2.8. Cure: x")
    assert node_fault_in("ValueError: [0a1b2c] x") is None


def test_bad_nodes_are_left_out_by_their_ids():
    assert away_from({}) is None
    assert away_from({"aa": "why", "bb": "why"}) == {"ray.io/node-id": "!in(aa,bb)"}


@contextmanager
def sweep(checkout, storage, cluster, *settings):
    """Run a study on a cluster, and yield its process, which prints into ``output.txt`` in its storage."""
    command = [sys.executable, str(checkout / "launch.py"), "sweep", str(ROOT / "search_spaces" / "digits.yaml")]
    command += ["--storage", str(storage), "--address", cluster.address]
    command += [f"--set={setting}" for setting in settings]
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
@pytest.mark.xdist_group("ray")
@pytest.mark.skipif(not can_mount, reason="needs the right to mount folders for a process alone")
@pytest.mark.timeout(400)
def test_a_node_with_older_code_runs_the_drivers_and_one_without_the_storage_is_left_out_when_it_joins(tmp_path):
    """Each has a checkout at the path of the driver's, as `ray up` makes them."""
    checkout, older, storage, empty = (tmp_path / name for name in ("checkout", "older", "studies", "empty"))
    for folder in (checkout, older):
        shutil.copytree(ROOT / "raydml", folder / "raydml", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "launch.py", folder)
    for folder in (storage, empty):
        folder.mkdir()
    actor = older / "raydml" / "study" / "actor.py"
    actor.write_text(f"{actor.read_text()}\nPath({str(tmp_path / 'ran older code')!r}).touch()\n")
    cluster = Cluster(tmp_path / "cluster", num_nodes=0)
    cluster.folder.mkdir()
    cluster.start()
    cluster.add_node(mounts=[(older, checkout)])
    folder, longer = storage / "digits", ("trial.epochs=40", "study.search.scheduler=none")
    with sweep(checkout, storage, cluster, *SMALL, *longer) as process:
        deadline = time.monotonic() + 120
        while not (events_path(folder).exists() and read_state(folder).of_stage("search")):
            assert time.monotonic() < deadline, (storage / "output.txt").read_text()
            time.sleep(0.2)
        cluster.add_node(mounts=[(empty, storage)])
        assert process.wait(200) == 0, (storage / "output.txt").read_text()
    assert not (tmp_path / "ran older code").exists()
    state = read_state(folder)
    assert {trial.ended for trial in state.of_stage("search")} == {"finished"}
    assert [list(trial.epochs) for trial in state.of_stage("search")] == [list(range(1, 41))] * 3
    assert [note for note in state.notes if "a node is left out" in note and "does not see the study" in note]
    found = events.read(events_path(folder))
    assert not [event for event in found if event["event"] == "trial_retried"]
    assert len({event["node"] for event in found if event["event"] == "trial_started"}) == 1


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("ray")
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
