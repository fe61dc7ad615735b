"""cluster.yaml is valid by Ray's own schema, safe (a token everywhere) and cheap (no worker runs without work)."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private import util as autoscaler_checks

ROOT = Path(__file__).parent.parent
TOKEN_PREFIX = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token "


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


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
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "file_mounts", "head_node_type"):
        assert prepared[key] == cluster[key], key
    assert set(prepared["available_node_types"]) == set(cluster["available_node_types"])


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
def test_ray_refuses_the_file_when_it_is_broken(
    cluster: dict[str, Any], where: tuple[str, ...], value: object, complaint: str
) -> None:
    """Without this, a validator that accepts everything would pass the test above."""
    broken = copy.deepcopy(cluster)
    table = broken
    for key in where[:-1]:
        table = table[key]
    if value is None:
        del table[where[-1]]
    else:
        table[where[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError, NotImplementedError), match=complaint):
        validate(broken)


def test_the_head_has_no_gpu_and_workers_start_from_zero(cluster: dict[str, Any]) -> None:
    node_types = dict(cluster["available_node_types"])
    head = node_types.pop(cluster["head_node_type"])
    assert head["resources"]["GPU"] == 0
    assert re.match(r"(c|m|r|t)\d", head["node_config"]["InstanceType"]), "an instance type without a GPU"
    assert node_types, "no worker type"
    for name, worker in node_types.items():
        assert worker["min_workers"] == 0, f"{name} would be paid for without work"
        assert worker["resources"]["GPU"] >= 1, name
        assert 0 < worker["max_workers"] <= cluster["max_workers"], name
    assert cluster["idle_timeout_minutes"] <= 15


def test_resources_are_whole_numbers(cluster: dict[str, Any]) -> None:
    for name, node_type in cluster["available_node_types"].items():
        for resource, amount in node_type["resources"].items():
            assert type(amount) is int, (name, resource, amount)


def test_every_ray_start_demands_the_token(cluster: dict[str, Any]) -> None:
    starts = ray_starts(cluster)
    assert len(starts) == 2, "one for the head, one for the workers"
    for command in starts:
        before, _, _ = command.partition("ray start")
        assert TOKEN_PREFIX in before, f"no token: {command}"
    assert "~/.ray/auth_token" in cluster["file_mounts"], "the token never reaches the nodes"
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert "RAY_AUTH_MODE=disabled" not in text
    assert not re.search(r"RAY_AUTH_TOKEN=", text), "a token in the file would be in every copy of it"


def test_the_dashboard_listens_on_the_loopback_interface(cluster: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_nodes_install_the_locked_versions_and_check_for_shared_storage(cluster: dict[str, Any]) -> None:
    setup = cluster["setup_commands"]
    assert any("uv pip install" in line and "-r ~/raydml/requirements.lock" in line for line in setup)
    assert any(line.startswith("mountpoint -q /mnt/shared ||") and "exit 1" in line for line in setup)
    for line in setup:
        assert isinstance(line, str), f"a colon made YAML read a mapping: {line}"


def test_mounted_files_exist_and_leave_the_environment_behind(cluster: dict[str, Any]) -> None:
    """Ray skips a missing source with a line in its log, and hashes whole folders: never the checkout itself."""
    sources = {remote: local for remote, local in cluster["file_mounts"].items() if not local.startswith("~")}
    assert sources
    for remote, local in sources.items():
        assert (ROOT / local).exists(), local
        assert local not in (".", "./", ".venv", "studies")
        assert remote == f"~/raydml/{local}"
