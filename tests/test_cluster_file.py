"""The files of Ray's cluster launcher: valid by Ray's own schema, safe (a token everywhere) and cheap.

cluster.yaml is for AWS, deploy/gcp.yaml its twin for Google Cloud, deploy/local.yaml for a fixed list of machines.
"""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click import ClickException
from ray.autoscaler._private import util as autoscaler_checks

ROOT = Path(__file__).parent.parent
TOKEN_PREFIX = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token "


AWS, GCP, FIXED = "cluster.yaml", "deploy/gcp.yaml", "deploy/local.yaml"
#: Of each cloud, the key of the machine type and the types without a GPU.
MACHINES = {AWS: ("InstanceType", r"(c|m|r|t)\d"), GCP: ("machineType", r"(c|e|m|n|t)\d")}


def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


@pytest.fixture(params=[AWS, GCP, FIXED])
def file(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cluster(file: str) -> dict[str, Any]:
    return read(file)


def validate(cluster: dict[str, Any]) -> dict[str, Any]:
    """What ``ray up`` does with the file before it talks to a cloud."""
    prepared = autoscaler_checks.prepare_config(copy.deepcopy(cluster))
    autoscaler_checks.validate_config(prepared)
    return prepared


def ray_starts(cluster: dict[str, Any]) -> list[str]:
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    return [command for command in commands if "ray start" in command]


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    prepared = validate(cluster)
    # Ray fills in its defaults (among them a dashboard open to everybody) where a key is absent: ours must survive.
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts", "setup_commands"):
        assert prepared[key] == cluster[key], key
    for key in ("provider", "auth"):
        assert cluster[key].items() <= prepared[key].items(), key
    if "available_node_types" in cluster:
        assert prepared["head_node_type"] == cluster["head_node_type"]
        assert set(prepared["available_node_types"]) == set(cluster["available_node_types"])


@pytest.mark.parametrize("file", [AWS, GCP])
@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("min_nodes",), 3, "min_nodes"),
        (("head_node_type",), "missing", "head_node_type"),
        (("available_node_types", "gpu_worker", "resources", "GPU"), 0.5, "0.5"),
        (("available_node_types", "gpu_worker", "node_config"), None, "node_config"),
        (("available_node_types", "gpu_worker", "min_workers"), 99, "max_workers"),
        (("provider", "type"), "nowhere", "nowhere"),
        (("head_start_ray_commands",), "ray start --head", "head_start_ray_commands|is not of type"),
    ],
)
def test_ray_refuses_the_file_of_a_cloud_when_it_is_broken(
    file: str, where: tuple[str, ...], value: object, complaint: str
) -> None:
    """Without this, a validator that accepts everything would pass the test above."""
    with pytest.raises((jsonschema.ValidationError, ValueError, NotImplementedError), match=complaint):
        validate(broken(read(file), where, value))


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("min_nodes",), 2, "min_nodes"),
        (("available_node_types",), {"gpu": {"node_config": {}}}, "available_node_types is not supported"),
        (("provider", "worker_ips"), None, "head_ip. and list of .worker_ips"),
        (("provider", "head_ip"), None, "head_ip. and list of .worker_ips"),
        (("provider", "worker_ips"), "192.0.2.11", "is not of type 'array'"),
        (("provider", "type"), "nowhere", "nowhere"),
        (("worker_start_ray_commands",), "ray start", "is not of type"),
    ],
)
def test_ray_refuses_the_list_of_machines_when_it_is_broken(
    capsys: pytest.CaptureFixture[str], where: tuple[str, ...], value: object, complaint: str
) -> None:
    with pytest.raises((jsonschema.ValidationError, ClickException, NotImplementedError)) as refused:
        validate(broken(read(FIXED), where, value))
    assert re.search(complaint, f"{refused.value} {''.join(capsys.readouterr())}")


def broken(cluster: dict[str, Any], where: tuple[str, ...], value: object) -> dict[str, Any]:
    """Return the contents of a file in which one value is another one; None removes it."""
    table = cluster
    for key in where[:-1]:
        table = table[key]
    if value is None:
        del table[where[-1]]
    else:
        table[where[-1]] = value
    return cluster


@pytest.mark.parametrize("file", [AWS, GCP])
def test_the_head_has_no_gpu_and_workers_start_from_zero(file: str, cluster: dict[str, Any]) -> None:
    node_types = dict(cluster["available_node_types"])
    head = node_types.pop(cluster["head_node_type"])
    assert head["resources"]["GPU"] == 0
    key, without_gpu = MACHINES[file]
    assert re.match(without_gpu, head["node_config"][key]), "a type of machine without a GPU"
    for worker in node_types.values():
        assert not re.match(without_gpu, worker["node_config"][key])
    assert node_types, "no worker type"
    for name, worker in node_types.items():
        assert worker["min_workers"] == 0, f"{name} would be paid for without work"
        assert worker["resources"]["GPU"] >= 1, name
        assert 0 < worker["max_workers"] <= cluster["max_workers"], name
    assert cluster["idle_timeout_minutes"] <= 15


def test_all_machines_of_a_list_are_used_except_the_head_for_trials() -> None:
    """Ray never starts one for a waiting trial: the node type of this provider has no resources."""
    cluster = read(FIXED)
    prepared = validate(cluster)
    (machine,) = prepared["available_node_types"].values()
    assert machine["resources"] == {}
    assert machine["min_workers"] == machine["max_workers"] == len(cluster["provider"]["worker_ips"])
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(cluster["head_start_ray_commands"][-1].split())
    assert not any("--num-" in command for command in cluster["worker_start_ray_commands"])


@pytest.mark.parametrize("file", [AWS, GCP])
def test_resources_are_whole_numbers(cluster: dict[str, Any]) -> None:
    for name, node_type in cluster["available_node_types"].items():
        for resource, amount in node_type["resources"].items():
            assert type(amount) is int, (name, resource, amount)


def test_every_ray_start_demands_the_token(file: str, cluster: dict[str, Any]) -> None:
    starts = ray_starts(cluster)
    assert len(starts) == 2, "one for the head, one for the workers"
    for command in starts:
        before, _, _ = command.partition("ray start")
        assert TOKEN_PREFIX in before, f"no token: {command}"
    assert "~/.ray/auth_token" in cluster["file_mounts"], "the token never reaches the nodes"
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "RAY_AUTH_MODE=disabled" not in text
    assert not re.search(r"RAY_AUTH_TOKEN=", text), "a token in the file would be in every copy of it"


def test_the_dashboard_listens_on_the_loopback_interface(file: str, cluster: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in (ROOT / file).read_text(encoding="utf-8")


def test_nodes_install_the_locked_versions_and_check_for_shared_storage(cluster: dict[str, Any]) -> None:
    setup = cluster["setup_commands"]
    assert any("uv pip install" in line and "-r ~/raydml/requirements.lock" in line for line in setup)
    assert any(line.startswith("mountpoint -q /mnt/shared ||") and "exit 1" in line for line in setup)
    for line in setup:
        assert isinstance(line, str), f"a colon made YAML read a mapping: {line}"


def test_the_files_differ_only_in_where_the_machines_come_from() -> None:
    aws, gcp, fixed = (read(file) for file in (AWS, GCP, FIXED))
    same = ("file_mounts", "rsync_exclude", "setup_commands", "worker_start_ray_commands")
    for other in (gcp, fixed):
        assert {key: other[key] for key in same} == {key: aws[key] for key in same}
    assert gcp["head_start_ray_commands"] == aws["head_start_ray_commands"]
    assert [line.replace(" --num-cpus=0 --num-gpus=0", "") for line in fixed["head_start_ray_commands"]] == aws[
        "head_start_ray_commands"
    ]
    assert "google-api-python-client" in gcp["head_setup_commands"][0], "the head starts the workers"


def test_what_is_to_be_edited_is_marked(file: str) -> None:
    """Addresses and names that are nobody's have the mark on their line."""
    text = (ROOT / file).read_text(encoding="utf-8")
    invented = [line for line in text.splitlines() if re.search(r"ami-0{17}|my-project|/NAME|\b192\.0\.2\.", line)]
    assert invented
    assert [line for line in invented if "# CHANGE" not in line] == []


def test_mounted_files_exist_and_leave_the_environment_behind(cluster: dict[str, Any]) -> None:
    """Ray skips a missing source with a line in its log, and hashes whole folders: never the checkout itself."""
    sources = {remote: local for remote, local in cluster["file_mounts"].items() if not local.startswith("~")}
    assert sources
    for remote, local in sources.items():
        assert (ROOT / local).exists(), local
        assert local not in (".", "./", ".venv", "studies")
        assert remote == f"~/raydml/{local}"
