"""`submit`: what it refuses here, what it would send, and how it deals with the job server; `tests/study/test_jobs.py`
runs studies on a real one."""

import json

import pytest
from typer.testing import CliRunner

from raydml.cli import main, submit
from raydml.cli.arguments import Invocation
from tests.cli.commands import done, refused
from tests.study.test_folder import ROOT
from tests.study.test_job_server import StandIn, serving

SERVER = ("--address", "http://127.0.0.1:1")


def with_variables(variables, *arguments):
    """Run a command as with these environment variables of its user."""
    invocation = Invocation("launch.py submit ...", ROOT / "launch.py", dict(variables), dict(variables))
    return CliRunner().invoke(main.app, list(map(str, arguments)), prog_name="launch.py", obj=invocation)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--address is missing. Cure: Ray's job server, such as --address http://HEAD:8265"),
        (
            ("--address", "head:6379"),
            "no job server. Cure: http://HEAD:8265, with the port of Ray's dashboard; to join",
        ),
        (("--address", "auto"), "no job server. Cure: http://HEAD:8265"),
        (SERVER, "--storage is missing: the folder of a job goes when the job ends. Cure: the folder that all nodes"),
        ((*SERVER, "--storage", "studies"), "--storage studies: is relative to the folder of the job"),
        (
            (*SERVER, "--storage", "s3://key:secret@bucket/x"),
            "has credentials, which would be recorded. Cure: set them",
        ),
        ((*SERVER, "--storage", "s3://bucket/x"), "--tracking-uri is missing: with --storage s3://bucket/x MLflow's"),
        ((*SERVER, "--storage", "/s", "--time", "1 day"), "is not a duration"),
        ((*SERVER, "--storage", "/s", "--smoke", "--time", "1h"), "--smoke runs a miniature"),
        ((*SERVER, "--storage", "/s", "--tracking-uri", "sqlite:///x.db"), "is relative to the folder of the job"),
        ((*SERVER, "--storage", "/s", "--env", "NO_SUCH"), "--env NO_SUCH: there is no variable of this name"),
        ((*SERVER, "--storage", "/s"), "nothing answers there (Connection refused). Cure: start the cluster"),
        ((*SERVER, "--storage", "/s", "--dry-run", "--set", "trial.lr=1"), "trial.lr"),
        (
            (*SERVER, "--storage", "/s", "--dry-run", "--set", "machine.cache_dir=c"),
            "machine.cache_dir = c: is relative",
        ),
    ],
)
def test_what_is_refused_before_anything_is_sent(arguments, words):
    said = " ".join(refused("submit", "digits", *arguments).split())
    assert words in said
    assert said.startswith("error: ")


def test_images_are_not_sent(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\n")
    for space in (tmp_path, tmp_path / "list.csv"):
        assert "images are not sent. Cure: put them where" in refused("submit", space, *SERVER, "--storage", "/s")
    data = ("--set", "trial.data.name=cub200", "--data-root", "images")
    assert "machine.data_root = images: is relative" in refused(
        "submit", "mdr_cub200", *SERVER, "--storage", "/s", "--dry-run", *data[2:]
    )


def test_a_dry_run_says_what_would_be_sent_and_needs_no_server():
    said = " ".join(
        done("submit", "digits", *SERVER, "--storage", "/mnt/s", "--num-trials", "4", "--dry-run").stdout.split()
    )
    assert "command python launch.py sweep search_spaces/digits.yaml --num-trials 4 --storage /mnt/s" in said
    assert "variables none" in said
    assert "MLflow mlflow.db in the storage" in said
    assert "raydml/ (" in said
    assert "tests" not in said


def test_points_to_start_from_are_sent_or_named(tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text("- {loss: {name: margin}}\n")
    command = ("submit", "digits", *SERVER, "--storage", "/mnt/s", "--dry-run", "--start-from")
    assert "--start-from submitted/points.yaml --storage /mnt/s" in " ".join(done(*command, file).stdout.split())
    assert "--start-from older --storage /mnt/s" in " ".join(done(*command, "older").stdout.split())
    file.write_text("- {loss: {name: no_such}}\n")
    assert "the space holds none of its 1 point" in " ".join(refused(*command, file).split())


def test_variables_are_named_and_their_values_are_not_shown():
    variables = {
        "MLFLOW_TRACKING_URI": "https://me:first-secret@mlflow.example.org",
        "MLFLOW_TRACKING_PASSWORD": "second-secret",
        "HF_TOKEN": "third-secret",
        "OTHER": "x",
    }
    command = ("submit", "digits", *SERVER, "--storage", "/s", "--env", "HF_TOKEN", "--dry-run")
    uri = ("--tracking-uri", variables["MLFLOW_TRACKING_URI"])
    result = with_variables(variables, *command, *uri)
    assert result.exit_code == 0, result.output
    assert "secret" not in result.output
    said = " ".join(result.stdout.split())
    assert "variables MLFLOW_TRACKING_PASSWORD, HF_TOKEN, MLFLOW_TRACKING_URI (values are not shown)" in said
    assert "MLflow https://***@mlflow.example.org" in said
    assert submit._variables(variables, uri[1], ["HF_TOKEN"]) == {
        "RAY_JOB_STOP_WAIT_TIME_S": "30", **{name: variables[name] for name in variables if name != "OTHER"}
    }  # fmt: skip
    assert "MLFLOW_TRACKING_URI" not in submit._variables(variables, "", [])


def test_a_store_on_this_host_is_another_one_for_the_job():
    command = ("submit", "digits", *SERVER, "--storage", "/s", "--dry-run", "--tracking-uri")
    assert (
        "note: for the job, http://localhost:5000 is a server on the head"
        in done(*command, "http://localhost:5000").output
    )
    assert "note" not in done(*command, "http://mlflow:5000").output


@pytest.fixture(autouse=True)
def in_a_moment(monkeypatch):
    monkeypatch.setattr(submit, "_START_S", 0.2)
    monkeypatch.setattr(submit, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(submit, "_POLL_S", 0.01)


def submission(seen):
    [body] = [json.loads(body) for method, path, _, body in seen if (method, path) == ("POST", "/api/jobs/")]
    return body


def test_a_study_is_submitted_with_its_space_its_files_and_what_to_do_next(tmp_path):
    space = tmp_path / "mine.yaml"
    space.write_text((ROOT / "search_spaces" / "digits.yaml").read_text())
    cluster = StandIn()
    with serving(cluster) as (address, seen):
        result = done("submit", space, "--address", address, "--storage", "/mnt/s", "--set", "trial.epochs=3")
        body = submission(seen)
    assert body["entrypoint"] == ("python launch.py sweep submitted/mine.yaml --set trial.epochs=3 --storage /mnt/s")
    assert body["metadata"] == {"raydml_study": "mine", "raydml_storage": "/mnt/s", "job_name": "mine"}
    assert body["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "30"
    [package] = cluster.packages
    assert body["runtime_env"]["working_dir"] == f"gcs://{package.rpartition('/')[2]}"
    said = result.stdout
    assert f"mine is job {body['submission_id']} on {address}" in said
    assert f"ray job stop --address {address} {body['submission_id']}" in said
    assert "--follow" in said
    assert "go on with the study" in said


def test_code_that_the_cluster_has_is_not_sent_again():
    cluster = StandIn()
    with serving(cluster) as (address, seen):
        for _ in range(2):
            done("submit", "digits", "--address", address, "--storage", "/mnt/s")
    [package] = cluster.packages
    assert [method for method, path, *_ in seen if path == package] == ["GET", "PUT", "GET"]


def test_a_study_that_runs_is_not_submitted_twice():
    cluster = StandIn()
    with serving(cluster) as (address, seen):
        command = ("submit", "digits", "--address", address, "--storage", "/mnt/s")
        done(*command)
        job = submission(seen)
        cluster.jobs = [{**job, "status": "RUNNING"}]
        num_seen = len(seen)
        assert f"digits runs already as job {job['submission_id']} on" in done(*command).stdout
        said = refused(*command, "--num-trials", "3")
        assert "digits' runs already as job" in said
        assert f"with other options: {job['entrypoint']}. Cure: another --name, or stop it: ray job stop" in said
        cluster.jobs[0]["runtime_env"] = {"working_dir": "gcs://_ray_pkg_other.zip"}
        assert ", with the code of its start: the files here have changed since" in done(*command).stdout
        assert not [method for method, *_ in seen[num_seen:] if method != "GET"]
        done(*command[:-1], "/mnt/other")  # another study of this name
        cluster.jobs = [{**job, "status": "FAILED"}]
        done(*command)
        assert len([method for method, *_ in seen[num_seen:] if method == "POST"]) == 2


def test_a_command_that_ends_at_once_is_reported_with_its_log():
    cluster = StandIn(["PENDING", "FAILED"], log="x\n/bin/sh: 1: python: not found\n")
    with serving(cluster) as (address, _):
        said = refused("submit", "digits", "--address", address, "--storage", "/mnt/s")
    assert "the job has failed:\nx\n/bin/sh: 1: python: not found\nCure: --python with the path" in said


@pytest.mark.parametrize(
    ("status", "code", "exit_code"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 1), ("STOPPED", None, 143)]
)
def test_a_followed_job_is_printed_to_its_end(status, code, exit_code):
    cluster = StandIn(["PENDING", "RUNNING", status], log="epoch 1\nepoch 2 \x1b[31m\n", code=code)
    with serving(cluster) as (address, _):
        result = CliRunner().invoke(
            main.app, ["submit", "digits", "--address", address, "--storage", "/s", "--follow"], prog_name="launch.py"
        )
    assert result.exit_code == exit_code, result.output
    assert result.stdout.count("epoch 1\nepoch 2 \\x1b[31m\n") == 1
    assert ("To go on:" in result.stdout) == bool(exit_code)


def test_what_to_do_next_holds_no_password():
    typed = "launch.py submit digits --follow --tracking-uri http://me:a-secret@mlflow:5000"
    invocation = Invocation(typed, ROOT / "launch.py", {"RAY_AUTH_MODE": "disabled"}, {})
    with serving(StandIn()) as (address, _):
        command = ["submit", "digits", "--address", address, "--storage", "/s"]
        command += ["--tracking-uri", "http://me:a-secret@mlflow:5000"]
        result = CliRunner().invoke(main.app, command, prog_name="launch.py", obj=invocation)
    assert result.exit_code == 0, result.output
    assert "a-secret" not in result.output
    assert "launch.py submit digits --tracking-uri http://***@mlflow:5000 --follow" in result.stdout


def test_another_version_of_ray_is_noted():
    cluster = StandIn()
    cluster.version = "2.61.0"
    with serving(cluster) as (address, _):
        said = done("submit", "digits", "--address", address, "--storage", "/s").stdout
    assert "note: the cluster runs Ray 2.61.0, and this raydml is for 2.60.0" in said
