"""`doctor`: each finding with its cure, and the exit code."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from raydml.cli import doctor
from tests.cli.commands import done, run
from tests.study.test_folder import ROOT
from tests.study.test_job_server import StandIn, serving


def said_by(*arguments):
    result = run("doctor", *arguments)
    return result.exit_code, " ".join(result.stdout.split())


def test_a_machine_that_has_all():
    said = " ".join(done("doctor").stdout.split())
    for subject in ("ok python", "ok raydml", "ok torch", "ok ray", "ok mlflow", "ok faiss", "GPUs"):
        assert subject in said
    assert f"code {doctor_digest()}" in said


def doctor_digest():
    from raydml.study.package import digest_of_package

    return digest_of_package()


def test_places_that_cannot_be_used_are_faults_with_their_cures(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    code, said = said_by("--storage", tmp_path / "file" / "x", "--data-root", tmp_path / "nowhere")
    assert code == 1
    assert "cannot be written (Not a directory). Cure: a folder that this user can write" in said
    assert "cannot be read (No such file or directory). Cure: mount or copy the images there" in said
    assert said.endswith("2 faults, 0 notes")
    code, said = said_by("--data-root", tmp_path / "empty")
    assert code == 1
    assert "is empty. Cure: mount or copy" in said


def test_what_is_not_there_yet_is_made_later_and_nothing_is_left_behind(tmp_path):
    code, said = said_by("--storage", tmp_path / "studies")
    assert code == 0
    assert "free for studies, checkpoints and decoded images; the folder will be made" in said
    joined = said.replace(" ", "")  # a long path is folded
    assert "mlflow.db: will be made by the first study".replace(" ", "") in joined
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noted(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=3_000_000_000))
    found = doctor._storage(tmp_path)
    assert found.state == "note"
    assert "3 GB free" in found.text
    assert " Cure: `sweep SPACE --dry-run` says what a study needs" in found.text


def test_a_clock_of_the_storage_that_is_apart_is_noted(tmp_path, monkeypatch):
    now_s = time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: now_s + 60)
    found = doctor._storage(tmp_path)
    assert found.state == "note"
    assert "clock is 60 s from this one's. Cure: synchronise" in found.text


def test_an_mlflow_server_that_may_come_later_is_no_fault_and_a_wrong_address_is_one(tmp_path):
    code, said = said_by("--storage", tmp_path, "--tracking-uri", "http://127.0.0.1:9")
    assert code == 0
    assert (
        "note MLflow MLflow at http://127.0.0.1:9 cannot be used: [Errno 111] Connection refused. Cure: start" in said
    )
    with serving(lambda *_: (200, b"<html>")) as (address, _):
        code, said = said_by("--storage", tmp_path, "--tracking-uri", address)
    assert code == 1
    assert "fault MLflow" in said


@pytest.mark.parametrize(
    ("counts", "cuda", "visible", "state", "words"),
    [
        ((0, 0, 0), "12.8", None, "ok", "none: trials run on the CPU"),
        ((2, 2, 2), "12.8", None, "ok", "torch sees 2, faiss 2, Ray 2"),
        ((0, 0, 2), None, None, "fault", "Cure: a build of torch with CUDA"),
        ((0, 0, 2), "12.8", None, "fault", "Cure: a driver for CUDA 12.8"),
        ((1, 1, 2), "12.8", "0", "ok", "(CUDA_VISIBLE_DEVICES=0)"),
        ((2, 0, 2), "12.8", None, "note", "Cure: the package faiss-gpu"),
    ],
)
def test_gpus_that_one_library_sees_and_another_does_not(counts, cuda, visible, state, words):
    found = doctor.finding_of_gpus(*counts, cuda, visible)
    assert found.state == state
    assert words in found.text


def test_a_job_server_and_a_cluster_that_are_not_there():
    for address, words in (("http://127.0.0.1:1", "fault job server"), ("127.0.0.1:1", "fault cluster")):
        code, said = said_by("--address", address)
        assert code == 1
        assert (
            f"{words} --address {address}: nothing answers there (Connection refused). Cure: start the cluster" in said
        )


def test_a_job_server_that_answers():
    cluster = StandIn()
    cluster.jobs = [{"submission_id": "a", "status": "RUNNING"}, {"submission_id": "b", "status": "FAILED"}]
    with serving(cluster) as (address, _):
        code, said = said_by("--address", address)
        assert code == 0
        assert f"ok job server {address}: Ray 2.60.0, 1 job running" in said
        cluster.version = "2.61.0"
        assert "note job server" in said_by("--address", address)[1]


@pytest.mark.slow
def test_it_is_fast_and_starts_no_ray(tmp_path):
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "doctor"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "RAY_TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - began_s < 15  # 3 s on two idle cores
    assert not list(tmp_path.iterdir())
