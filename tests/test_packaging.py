"""requirements.lock, pyproject.toml and the two README commands belong together."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def locked() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def wanted(pyproject: dict[str, Any]) -> list[Requirement]:
    """Everything pyproject.toml names: run time, every extra, every group of development tools."""
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    groups = pyproject["dependency-groups"].values()
    return [Requirement(line) for lines in (project["dependencies"], *extras, *groups) for line in lines]


def environment(python: str, system: str, machine: str) -> dict[str, str]:
    return {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": system,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "platform_machine": machine,
    }


def applies(requirement: Requirement, where: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(where)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "machine"), [("linux", "x86_64"), ("darwin", "arm64")])
def test_the_lock_answers_every_requirement_within_its_bounds(
    pyproject: dict[str, Any], locked: list[Requirement], python: str, system: str, machine: str
) -> None:
    where = environment(python, system, machine)
    versions: dict[str, str] = {}
    for pin in locked:
        if applies(pin, where):
            name = canonicalize_name(pin.name)
            assert name not in versions, f"two versions of {name} for Python {python} on {system}"
            versions[name] = str(pin.specifier).removeprefix("==")
    for requirement in wanted(pyproject):
        if not applies(requirement, where):
            continue
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is in pyproject.toml, not in requirements.lock: run .ci/renew-lock"
        assert requirement.specifier.contains(Version(versions[name])), f"{requirement} but {name}=={versions[name]}"


def test_the_lock_has_exact_versions_and_no_addresses(locked: list[Requirement]) -> None:
    assert len(locked) > 100
    for pin in locked:
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin
        assert pin.url is None, pin
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for forbidden in ("://", "/opt", "file:", "--hash", "--index", "--find-links", "-e ", "\\"):
        body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
        assert forbidden not in body, forbidden
    assert "://" not in text
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("uv pip install -r requirements.lock" in line for line in header), "how it is used"
    assert any(".ci/renew-lock" in line for line in header), "how it is renewed"


def test_every_bound_is_closed_on_both_sides(pyproject: dict[str, Any]) -> None:
    """A run-time package without an upper bound breaks the first command of the README on somebody else's day."""
    for line in pyproject["project"]["dependencies"]:
        operators = {specifier.operator for specifier in Requirement(line).specifier}
        assert ">=" in operators, line
        assert "<" in operators, line


def test_supported_pythons(pyproject: dict[str, Any]) -> None:
    requirement = Requirement(f"python{pyproject['project']['requires-python']}")
    assert [python for python in PYTHONS if requirement.specifier.contains(python)] == list(PYTHONS)
    assert not requirement.specifier.contains("3.9")


def test_uv_lock_stays_out_of_git() -> None:
    """It records the addresses from which its maker installed."""
    assert "uv.lock" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_the_readme_opens_with_the_two_commands() -> None:
    """.ci/run takes its test command from here."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    assert blocks[0].strip() == "pip install uv && uv run launch.py"
    assert blocks[1].strip() == "pip install uv && uv run pytest"


def test_license_is_apache_2(pyproject: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert pyproject["project"]["license"] == "Apache-2.0"
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.xdist_group("packaging")
def test_the_groups_of_xdist_have_an_effect(request: pytest.FixtureRequest) -> None:
    """Else two studies on Ray run side by side, and what the tests of a module share is made on each worker."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("runs in one process, without xdist")
    assert request.node.nodeid.endswith("@packaging"), f"pytest {pytest.__version__} and pytest-xdist do not fit"
