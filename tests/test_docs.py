"""What the documents promise: names exist, the tree is complete, the examples work, nothing is left to fill in."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from raydml import registry
from raydml.data.datasets import open_catalog
from raydml.data.splits import make_split
from raydml.ops.tuples import Triplets, all_pairs
from raydml.search_space.space import load_space, sample_trials
from raydml.study.folder import check_split

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raydml"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [path for pattern in ("*.md", "docs/*.md", "search_spaces/*.yaml") for path in sorted(ROOT.glob(pattern))]
PLACEHOLDERS = re.compile(r"RESULT-TABLE|measured numbers here|\b(?:TODO|FIXME|TBD|XXX)\b", re.IGNORECASE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_fill_in(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{path.name}:{number}: {line}" for number, line in enumerate(lines, 1) if PLACEHOLDERS.search(line)] == []


def fenced(language: str) -> str:
    """The only block of a language in the README."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return block


def test_the_loss_in_the_readme_works(tmp_path: Path) -> None:
    """Its settings make a schema, it learns from labels and pairs, and refuses what it does not accept."""
    file = tmp_path / "my_loss.py"
    file.write_text(fenced("python"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("my_loss", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cls = registry.public_class(module)
    settings = registry.constructor_model(cls)
    assert settings(scale=8).model_dump() == {"scale": 8.0}
    with pytest.raises(ValueError, match="greater than 0"):
        settings(scale=-1)

    labels = torch.tensor([0, 0, 1, 1])
    loss = cls(scale=8.0)
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.bfloat16)
    mixed = apart[[0, 2, 1, 3]].requires_grad_()
    value = loss(mixed, labels)
    assert value.dtype == torch.float32
    assert value > loss(apart, labels)
    assert loss(mixed, labels, all_pairs(labels)) == value
    value.backward()
    assert mixed.grad is not None
    assert mixed.grad.any()
    rows = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="miner"):
        loss(mixed, labels, Triplets(rows, rows, rows, rows.bool()))


def test_the_search_space_in_the_readme_loads(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(fenced("yaml"), encoding="utf-8")
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
