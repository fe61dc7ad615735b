"""deploy/Dockerfile: what it copies exists and is sent to the engine, and it installs the locked versions."""

import fnmatch
import re
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "LABEL", "RUN", "USER", "WORKDIR"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction and its arguments on one line. Raises ValueError for a line that begins with none."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            if name not in INSTRUCTIONS:
                raise ValueError(f"no instruction: {line}")
            found.append((name, " ".join(arguments.split())))
    return found


@pytest.fixture(scope="module")
def image() -> list[tuple[str, str]]:
    return instructions((ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"))


def test_a_misspelt_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction: COPPY"):
        instructions("FROM python\nCOPPY a b\n")


def is_sent(name: str) -> bool:
    """Whether the engine gets a file or folder: the last line of .dockerignore that fits it decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(name, pattern):
            sent = line.startswith("!")
    return sent


def test_what_is_copied_exists_and_is_sent_and_nothing_else_is(image: list[tuple[str, str]]) -> None:
    words = [arguments.split() for name, arguments in image if name == "COPY"]
    sources = {word for line in words for word in line[:-1] if not word.startswith("--")}
    assert {
        "raydml",
        "launch.py",
        "search_spaces",
        "pyproject.toml",
        "requirements.lock",
        "README.md",
        "LICENSE",
    } == sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not is_sent(source)] == []
    assert [name for name in (".git", ".venv", "studies", "tests", "docs", "data") if is_sent(name)] == []
    assert not any(name == "ADD" for name, _ in image)


def test_it_installs_the_locked_versions_for_a_python_that_is_supported(image: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (base,) = [arguments for name, arguments in image if name == "FROM"]
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)
    assert version
    assert version[1] in SpecifierSet(project["requires-python"])
    commands = " ".join(arguments for name, arguments in image if name == "RUN")
    assert (
        "--extra cluster --constraint /tmp/raydml/requirements.lock --requirement /tmp/raydml/pyproject.toml"
        in commands
    )
    assert "cluster" in project["optional-dependencies"]
    assert "--no-deps --editable ." in commands
    assert {"bash", "wget"} <= set(commands.split()), "KubeRay's probes need them"


def test_it_runs_as_the_user_of_the_pods(image: list[tuple[str, str]]) -> None:
    assert image[-1] == ("USER", "1000")
    assert any(name == "RUN" and "useradd --create-home --uid 1000 ray" in arguments for name, arguments in image)
    assert ("WORKDIR", "/home/ray/raydml") in image
    pods = (ROOT / "deploy" / "kuberay" / "raycluster.yaml").read_text(encoding="utf-8")
    assert pods.count("runAsUser: 1000") == 2


def test_a_login_shell_finds_the_commands(image: list[tuple[str, str]]) -> None:
    """It sets PATH anew (/etc/profile), and KubeRay may start one."""
    assert not any(name == "ENV" and "PATH" in arguments for name, arguments in image)
    commands = " ".join(arguments for name, arguments in image if name == "RUN")
    assert commands.count("uv pip install --system") == 2
