"""docs/one_trial.md walks through files and functions: all of them must exist under the names it gives."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raydml"


def test_the_walk_names_files_and_functions_that_exist() -> None:
    text = (ROOT / "docs" / "one_trial.md").read_text(encoding="utf-8")
    quoted = re.findall(r"`([^`\n]+)`", text)
    files = {name for name in quoted if re.fullmatch(r"[\w/]+\.py", name)}
    assert len(files) > 20
    assert sorted(name for name in files if not (PACKAGE / name).exists() and not (ROOT / name).exists()) == []

    defined: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
    called = {match[1] for name in quoted if (match := re.fullmatch(r"(?:\w+\.)*(\w+)\([^)]*\)", name))}
    assert len(called) > 20
    assert sorted(called - defined) == []

    metrics = {name for name in quoted if name.startswith("val_")}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert metrics
    assert sorted(name for name in metrics if name.removeprefix("val_").removesuffix("_1") not in sources) == []
