"""The files of deploy/kuberay: valid by the definitions of KubeRay and Kubernetes, closed, and idle without a study.

tests/deploy/schemas has what is needed of these definitions (KubeRay 1.5.2, Kubernetes 1.33).
"""

import configparser
import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

from raydml.cli.main import app
from tests.deploy.trimmed_schemas import HERE, MANIFESTS, manifests

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
HOME = "/home/ray/raydml/"  # of the code in the image
SECRET = re.compile("USERNAME|PASSWORD|KEY|TOKEN")


def complaints(one: dict[str, Any]) -> list[str]:
    """What is wrong with an object, by the schema of its kind."""
    schema = json.loads((HERE / "schemas" / f"{one['kind'].lower()}.json").read_text(encoding="utf-8"))
    found = jsonschema.Draft202012Validator(schema).iter_errors(one)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def objects() -> list[dict[str, Any]]:
    return [one for path in MANIFESTS for one in manifests(path)]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [one for one in objects() if one["kind"] == kind]
    return found


def pods() -> list[dict[str, Any]]:
    """The specification of every pod."""
    found = []
    for one in objects():
        if one["kind"] in ("Deployment", "StatefulSet"):
            found.append(one["spec"]["template"]["spec"])
        elif one["kind"] in ("RayJob", "RayCluster"):
            spec = one["spec"].get("rayClusterSpec", one["spec"])
            found += [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return found


def containers() -> list[dict[str, Any]]:
    return [container for pod in pods() for container in pod["containers"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_definitions_accept_the_file(path: Path) -> None:
    assert [complaints(one) for one in manifests(path)] == [[] for _ in manifests(path)]


WORKER = ("spec", "workerGroupSpecs", 0)
HEAD_POD = ("spec", "headGroupSpec", "template", "spec")


@pytest.mark.parametrize(
    ("where", "key", "becomes", "complaint"),
    [
        (WORKER, "minReplicas", "minReplica", "'minReplica' was unexpected"),
        (WORKER, "template", None, "'template' is a required property"),
        (("spec",), "authOptions", "authOption", "'authOption' was unexpected"),
        (("spec", "authOptions"), "mode", "modes", "'modes' was unexpected"),
        (("spec", "autoscalerOptions"), "version", "versions", "'versions' was unexpected"),
        (("spec",), "enableInTreeAutoscaling", "enableInTreeAutoscaler", "unexpected"),
        (("spec",), "headGroupSpec", None, "'headGroupSpec' is a required property"),
        (HEAD_POD, "securityContext", "securitycontext", "'securitycontext' was unexpected"),
        ((*HEAD_POD, "containers", 0), "name", None, "'name' is a required property"),
        ((*HEAD_POD, "containers", 0, "volumeMounts", 0), "mountPath", "path", "'path' was unexpected"),
        ((*HEAD_POD, "volumes", 0, "persistentVolumeClaim"), "claimName", "claim", "'claim' was unexpected"),
        (("metadata",), "name", "nmae", "'nmae' was unexpected"),
    ],
)
def test_a_broken_copy_is_refused(where: tuple[Any, ...], key: str, becomes: str | None, complaint: str) -> None:
    broken = copy.deepcopy(of_kind("RayCluster"))
    table = broken
    for step in where:
        table = table[step]
    value = table.pop(key)
    if becomes is not None:
        table[becomes] = value
    assert any(complaint in text for text in complaints(broken)), complaints(broken)


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("authOptions", "mode"), "tokens", "'tokens' is not one of"),
        (("autoscalerOptions", "version"), "v3", "'v3' is not one of"),
        (("workerGroupSpecs", 0, "maxReplicas"), "four", "'four' is not of type 'integer'"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
    ],
)
def test_a_wrong_value_is_refused(where: tuple[Any, ...], value: object, complaint: str) -> None:
    job = copy.deepcopy(of_kind("RayJob"))
    table = job["spec"]["rayClusterSpec"]
    for step in where[:-1]:
        table = table[step]
    table[where[-1]] = value
    assert any(complaint in text for text in complaints(job)), complaints(job)


def test_the_cluster_of_a_job_is_the_cluster() -> None:
    assert of_kind("RayJob")["spec"]["rayClusterSpec"] == of_kind("RayCluster")["spec"]


def test_the_cluster_demands_the_token_and_nothing_but_its_head_runs_at_rest() -> None:
    spec = of_kind("RayCluster")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 900
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head, (workers,) = spec["headGroupSpec"]["template"]["spec"], spec["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0)
    assert workers["maxReplicas"] > 0
    gpus = [
        pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in (head, workers["template"]["spec"])
    ]
    assert gpus == [None, "1"]
    # KubeRay refuses these with version 2 of the autoscaler.
    assert "restartPolicy" not in head
    assert "restartPolicy" not in workers["template"]["spec"]
    job = of_kind("RayJob")["spec"]
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"] is True


def test_the_version_of_ray_is_the_locked_one() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    (version,) = re.findall(r"^ray==(\S+)", lock, flags=re.MULTILINE)
    assert of_kind("RayCluster")["spec"]["rayVersion"] == version


def test_nothing_is_reached_from_outside_and_no_secret_is_in_a_file() -> None:
    kinds = {one["kind"] for one in objects()}
    assert kinds == {
        "RayJob",
        "RayCluster",
        "Service",
        "Deployment",
        "StatefulSet",
        "ConfigMap",
        "PersistentVolumeClaim",
    }
    assert {one["spec"]["type"] for one in objects() if one["kind"] == "Service"} == {"ClusterIP"}
    assert of_kind("RayCluster")["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in containers():
        assert not [port for port in container.get("ports", ()) if "hostPort" in port]
        for variable in container.get("env", ()):
            assert ("valueFrom" in variable) == bool(SECRET.search(variable["name"])), variable["name"]
    for path in MANIFESTS:
        assert not re.search(r"\w+://[^/\s]*:[^/\s]*@", path.read_text(encoding="utf-8")), "a password in an address"


def test_the_secrets_have_the_keys_that_the_commands_make() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    text = page + (KUBERAY / "mlflow.yaml").read_text(encoding="utf-8")
    for container in containers():
        for variable in container.get("env", ()):
            if "valueFrom" in variable:
                secret = variable["valueFrom"]["secretKeyRef"]
                command = re.search(rf"create secret generic {secret['name']} ((?:.*\\\n)*.*)", text)
                assert command, secret
                assert f"--from-literal={secret['key']}=" in command[1], secret


def test_all_pods_of_ray_share_storage_and_have_room_in_memory_and_for_images() -> None:
    (shared,) = manifests(KUBERAY / "storage.yaml")
    assert shared["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = of_kind("RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/mnt/shared"]["persistentVolumeClaim"]["claimName"] == shared["metadata"]["name"]
        assert "emptyDir" in mounts["/mnt/cache"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_the_study_of_the_job_is_a_command_of_the_program() -> None:
    job = of_kind("RayJob")
    python, script, command, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, script, command) == ("python", f"{HOME}launch.py", "sweep")
    assert (ROOT / words[0].removeprefix(HOME)).is_file()
    sweep = typer.main.get_command(app).commands["sweep"]  # type: ignore[attr-defined]
    typed = sweep.make_context("sweep", words).params
    assert typed["name"] == job["metadata"]["name"]
    assert Path(typed["storage_or_uri"]).is_relative_to("/mnt/shared")
    assert typed["data_root"].is_relative_to("/mnt/shared")
    assert set(typed["settings"]) == {"machine.gpus_per_trial=1", "machine.cache_dir=/mnt/cache"}
    assert typed["address"] is None, "a job joins its own cluster"


def test_the_clients_reach_the_server_by_a_name_that_it_accepts() -> None:
    services = {
        one["metadata"]["name"]: one["spec"]["ports"][0]["port"] for one in objects() if one["kind"] == "Service"
    }
    head = of_kind("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    (client,) = [one["value"] for one in head["env"] if one["name"] == "MLFLOW_TRACKING_URI"]
    assert client == f"http://mlflow:{services['mlflow']}"
    (server,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    values = {one["name"]: one.get("value") for one in server["env"]}
    assert f"mlflow:{services['mlflow']}" in values["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    settings = of_kind("ConfigMap")["data"]
    addresses = [values["MLFLOW_BACKEND_STORE_URI"], *re.findall(r"database_uri = (\S+)", settings["basic_auth.ini"])]
    assert addresses == [
        f"postgresql://mlflow@mlflow-db:{services['mlflow-db']}/{name}" for name in ("mlflow", "mlflow_auth")
    ]
    here, there = (configparser.ConfigParser(), configparser.ConfigParser())
    here.read_string(settings["basic_auth.ini"])
    there.read(ROOT / "deploy" / "mlflow" / "basic_auth.ini")
    assert {**here["mlflow"], "database_uri": ""} == {**there["mlflow"], "database_uri": ""}, "as beside a cluster"
    assert "create database mlflow_auth owner mlflow;" in settings["accounts.sql"]


def test_all_pods_have_one_image_and_what_is_to_be_edited_is_marked() -> None:
    images = {container["image"] for container in containers()} - {"postgres:17"}
    (image,) = images
    assert f"-t {image} " in (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    for path in MANIFESTS:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if "example.com" in line and "# CHANGE" not in line] == [], path.name
