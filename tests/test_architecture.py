"""The architecture: packages in one order, no import circle, and few places for heavy libraries and the environment.

A package imports packages above it in ORDER and nothing below. Code that needs the opposite belongs somewhere else.
"""

import ast
import functools
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raydml"
ORDER = (  # "export" is the door that models outside of this package import, "api" the one of a user's Python code
    [
        *("errors", "registry", "ops", "metrics", "data", "images", "models", "losses", "miners", "regularizers"),
        *(
            "samplers",
            "methods",
            "config",
            "search_space",
            "searchers",
            "evaluation",
            "training",
            "inference",
            "export",
            "analysis",
        ),
        *("report", "study", "tracking", "cli", "__main__", "api"),
    ]
)
HOMES = {  # a heavy library -> the packages or files that may import it
    "ray": {"study"},
    "mlflow": {"tracking"},
    "faiss": {"ops/clustering", "evaluation", "inference"},
    "typer": {"cli"},
}
READS_THE_SURROUNDINGS = "cli/main"  # argv and the environment
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "shared", "base"}
Imports = dict[str, set[str]]


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package, "losses/margin" -> its tree; empty `__init__` files are left out."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
    }


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported anywhere in a file, inside functions too; relative imports as "."."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." if node.level else str(node.module)
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            names.update(str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))
    return names


def within(trees: dict[str, ast.Module]) -> Imports:
    """Module -> the modules of the package that it imports."""
    named = {
        module: {name.removeprefix("raydml.").replace(".", "/") for name in imported(tree)}
        for module, tree in trees.items()
    }
    return {module: (names & trees.keys()) - {module} for module, names in named.items()}


def against_the_order(imports: Imports) -> list[str]:
    place = {package: number for number, package in enumerate(ORDER)}
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if place[module.split("/")[0]] < place[other.split("/")[0]]
    ]


def reads_of_the_surroundings(tree: ast.AST) -> list[int]:
    """Lines that read argv or the environment. Setting a variable for another library is no read."""
    set_here = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            set_here.add(id(node.value))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            if isinstance(called, ast.Attribute) and called.attr in ("setdefault", "update"):
                set_here.add(id(called.value))
    names = {"os.environ", "os.environb", "os.getenv", "sys.argv", "sys.orig_argv"}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in set_here]
    lines = [node.lineno for node in attributes if ast.unparse(node) in names]
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in ("os", "sys")]
    return lines + [
        node.lineno for node in froms if {alias.name for alias in node.names} & {"environ", "getenv", "argv"}
    ]


def test_packages_import_only_packages_above_them() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ORDER) - {"errors", "registry", "export", "__main__", "api"}
    assert against_the_order(within(sources())) == []


def test_there_is_no_import_circle() -> None:
    graphlib.TopologicalSorter(within(sources())).prepare()  # CycleError names the circle


def test_heavy_libraries_stay_at_home() -> None:
    strays = [
        f"{module} imports {library}"
        for module, tree in sources().items()
        for library in HOMES.keys() & {name.split(".")[0] for name in imported(tree)}
        if not {module, module.split("/")[0]} & HOMES[library]
    ]
    assert strays == []


def test_argv_and_environment_are_read_in_one_place() -> None:
    reads = {module: lines for module, tree in sources().items() if (lines := reads_of_the_surroundings(tree))}
    assert reads.keys() <= {READS_THE_SURROUNDINGS}, f"pass the value in from cli/main.py: {reads}"


def test_files_are_named_for_what_they_hold_and_init_files_are_empty() -> None:
    assert [module for module in sources() if module.split("/")[-1] in VAGUE_NAMES] == []
    assert [module for module, tree in sources().items() if "." in imported(tree)] == [], "imports are absolute"
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}  # its door is tested in test_api.py
    assert {folder: (folder / "__init__.py").read_text(encoding="utf-8") for folder in folders} == dict.fromkeys(
        folders, ""
    )


def test_no_public_class_name_has_two_meanings() -> None:
    places: dict[str, list[str]] = {}
    for module, tree in sources().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_the_rules_refuse_what_they_must() -> None:
    assert against_the_order({"training/trainer": {"study/actor"}, "losses/margin": {"ops/tuples", "miners/all"}}) == [
        "training/trainer imports study/actor",
        "losses/margin imports miners/all",
    ]
    code = "def f():\n    from raydml.study import actor\n    import importlib\n    importlib.import_module('ray')\n"
    assert imported(ast.parse(code)) >= {"raydml.study.actor", "ray"}
    assignment = "x = os.environ.setdefault('A', 1)"
    for read in ("x = os.environ['A']", "os.environ.get('A')", "from os import environ", assignment):
        assert reads_of_the_surroundings(ast.parse(read)), read
    assert not reads_of_the_surroundings(ast.parse("os.environ['A'] = '1'\nos.environ.setdefault('B', '1')"))


def test_no_file_names_a_package_registry_or_somebodys_machine() -> None:
    """Any index must do, and a path that exists on one machine is of no use on another."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    if not files:
        pytest.skip("not a git checkout")
    hosts = ["py" + r"pi\.org", "python" + r"hosted\.", "arti" + "factory", "--(?:extra-)?index" + "-url"]
    places = [r"(?<![\w.])/" + name + "/" for name in ("wo" + "rk", "opt/py" + "pi", "opt/wh" + "eels", "ro" + "ot")]
    pattern = re.compile("|".join([*hosts, *places]).encode(), re.IGNORECASE)
    texts = {path.relative_to(ROOT): path.read_bytes() for path in files}
    assert [
        f"{path}: {found[0]!r}" for path, text in texts.items() if b"\0" not in text and (found := pattern.search(text))
    ] == []
