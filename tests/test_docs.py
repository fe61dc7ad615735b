"""What the documents promise: names exist, the tree is complete, the examples work, nothing is left to fill in."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from raydml.cli.main import app
from raydml.data.datasets import open_catalog
from raydml.data.splits import make_split
from raydml.search_space.space import load_space, sample_trials
from raydml.study.folder import check_split
from tests.cli.commands_page import PAGE, commands, page

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raydml"
DOCUMENTS = [path for pattern in ("*.md", "docs/*.md", "search_spaces/*.yaml") for path in sorted(ROOT.glob(pattern))]
GROUP = typer.main.get_command(app)
PLACEHOLDERS = re.compile(r"RESULT-TABLE|measured numbers here|\b(?:TODO|FIXME|TBD|XXX)\b", re.IGNORECASE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_fill_in(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{path.name}:{number}: {line}" for number, line in enumerate(lines, 1) if PLACEHOLDERS.search(line)] == []


def fenced(language: str, page: str) -> str:
    """The only block of a language in a document."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return block


#: The test file of the loss in docs/extending.md. Two equal embeddings and two opposite ones: values known by hand.
TEST_OF_MY_LOSS = """
import math

import torch

from raydml.losses.my_loss import MyLoss


def test_at_known_angles() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    right, wrong = (MyLoss(scale=8.0)(points, torch.tensor(labels)) for labels in ([0, 0, 1, 1], [0, 1, 0, 1]))
    assert math.isclose(right, math.log1p(math.exp(-8)), rel_tol=1e-4)
    # Each anchor: a positive at -1 and a negative at 1 cost log(1 + e^8) each, a negative at -1 costs log(1 + e^-8).
    assert math.isclose(wrong, (2 * math.log1p(math.exp(8)) + math.log1p(math.exp(-8))) / 3, rel_tol=1e-4)
"""

#: Validated as settings, listed, in the schema, and trained for one epoch; run in the copy of the tree.
USE_OF_MY_LOSS = """
import json, math, pathlib
from typer.testing import CliRunner
import raydml
from raydml.cli.main import app
from raydml.config.trial import Machine, parse_trial
from raydml.errors import ConfigError
from raydml.search_space.json_schema import json_schema
from raydml.training.trainer import Trainer

here = pathlib.Path.cwd()
assert pathlib.Path(raydml.__file__).is_relative_to(here)
raw = {
    "epochs": 1,
    "data": {"name": "digits", "resize_px": 16, "crop_px": 16},
    "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 16},
    "loss": {"name": "my_loss", "scale": 8},
    "sampler": {"name": "class_balanced", "classes_per_batch": 2},
}
trial = parse_trial(raw)
assert trial.loss.settings == {"scale": 8.0}
try:
    parse_trial({**raw, "loss": {"name": "my_loss", "scale": -1}})
except ConfigError as error:
    assert [(problem.path, problem.message) for problem in error.problems] == [("loss.scale", "must be > 0")]
else:
    raise AssertionError("scale: -1 passed")
losses = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["list", "losses", "--json"]).output)}
assert losses["my_loss"]["settings"]["scale"]["type"] == "float > 0"
assert '"const": "my_loss"' in json.dumps(json_schema())
(result,) = Trainer(trial, Machine(cache_dir=here / "cache", device="cpu"), device="cpu").epochs()
assert math.isfinite(result["train_loss"]) and result["gradient_norm"] > 0
"""


@pytest.fixture(scope="module")
def tree_with_my_loss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository to which the documented loss and its test were added: two files, and nothing else."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("raydml", "tests", "search_spaces", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "pyproject.toml", "launch.py"):
        shutil.copy(ROOT / name, tree)
    files = {
        "raydml/losses/my_loss.py": fenced("python", "docs/extending.md"),
        "tests/losses/test_my_loss.py": TEST_OF_MY_LOSS,
    }
    for name, text in files.items():
        assert not (tree / name).exists()
        (tree / name).write_text(text, encoding="utf-8")
    return tree


def run_in(tree: Path, *arguments: str) -> None:
    """Run Python in the copy of the tree, on its own modules."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_documented_loss_is_listed_checked_and_trained(tree_with_my_loss: Path) -> None:
    run_in(tree_with_my_loss, "-c", USE_OF_MY_LOSS)


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def test_the_documented_loss_keeps_the_contract(tree_with_my_loss: Path) -> None:
    files = ("tests/losses/test_contract.py", "tests/losses/test_my_loss.py")
    run_in(tree_with_my_loss, *PYTEST, *files, "-k", "my_loss")


@pytest.mark.slow
def test_no_other_file_has_to_change_for_the_documented_loss(tree_with_my_loss: Path) -> None:
    names = ("test_search_spaces", "test_docs", "test_registry", "test_architecture", "config/test_trial")
    run_in(tree_with_my_loss, *PYTEST, *(f"tests/{name}.py" for name in names), "-k", "not documented_loss")


def test_the_documented_search_space_loads(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(fenced("yaml", "docs/search_spaces.md"), encoding="utf-8")
    space = load_space(path, ["study.search.num_trials=8"])
    catalog = open_catalog("digits", None)
    trials = sample_trials(space)
    assert {trial.loss.name for trial in trials} == {"margin", "normalized_softmax"}
    for trial in trials:
        check_split(trial, catalog, make_split(catalog, **trial.data.split.model_dump()))


def test_the_walk_names_files_and_functions_that_exist() -> None:
    text = (ROOT / "docs" / "one_trial.md").read_text(encoding="utf-8")
    quoted = re.findall(r"`([^`\n]+)`", text)
    files = {name for name in quoted if re.fullmatch(r"[\w/]+\.py", name)}
    assert 10 <= len(files) <= 15, "one trial is a walk through at most fifteen files"
    assert sorted(name for name in files if not (PACKAGE / name).exists() and not (ROOT / name).exists()) == []
    defined: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
    called = {match[1] for name in quoted if (match := re.fullmatch(r"(?:\w+\.)*(\w+)\([^)]*\)", name))}
    assert len(called) > 15
    assert sorted(called - defined) == []
    metrics = {name for name in quoted if name.startswith("val_")}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert metrics
    assert sorted(name for name in metrics if name.removeprefix("val_").removesuffix("_1") not in sources) == []


PAGES = [ROOT / "README.md", *(path for path in sorted(ROOT.glob("docs/*.md")) if path.name != "LOG.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (path.parent / link).exists()] == []
    known = {name: {opt for option in command.params for opt in option.opts} for name, command in commands(GROUP)}
    wrong = []
    for line in re.findall(r"launch\.py ([a-z][^\n`]*)", text):
        words = line.split("#")[0].split()
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        options = {word.split("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word)}
        if name not in known or not options <= known[name] | {"--help"}:
            wrong.append(line)
    assert wrong == []


def test_the_page_of_commands_is_that_of_the_program() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.cli.commands_page"


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 6_000


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")][1:]
    pieces = [
        piece.strip() for cell in cells for quote in re.findall(r"`([^`]+)`", cell) for piece in quote.split("...")
    ]
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    texts = [node.value for tree in sources for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    said = "\n".join(text for text in texts if isinstance(text, str))
    assert len(cells) >= 15
    assert [piece for piece in pieces if piece not in said] == []


def test_the_documented_command_runs_each_test_that_shares_a_process_of_the_clusters() -> None:
    """`pytest -m cluster` runs what has the mark; a group keeps its tests from running at once.

    There are three, so that two processes have about as much to do.
    """
    group, mark = "xdist_group" + r'\("(?:cluster|faults|team server)"\)', "mark" + r"\.cluster\b"
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    counts = {name: (len(re.findall(group, text)), len(re.findall(mark, text))) for name, text in texts.items()}
    assert sum(groups for groups, _ in counts.values()) > 15
    assert [name for name, (groups, marks) in counts.items() if groups != marks] == []
    assert "uv run --extra cluster pytest -m cluster" in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
