"""The floors of the package: who may import whom, who may know Ray, MLflow, faiss, argv and the environment.

The tables below are the architecture. A new module gets a line in FLOORS first; an import that the tables forbid is
answered by moving the code, not the line.
"""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raydml"

# A module may import floors below its own. Folder entries hold for every file in the folder; a file's own entry wins.
FLOORS = {
    # 1: facts and value types; they know nothing of the rest
    "plugins": 1,
    "tuples": 1,
    "distances": 1,
    "draws": 1,
    "problems": 1,
    "logs": 1,
    "pretrained": 1,
    "randomness": 1,
    "preprocessing": 1,
    "long_steps": 1,
    "metric_names": 1,
    "saved_embeddings": 1,
    "data/catalog": 1,
    "download/sources": 1,
    "images/pixels": 1,
    "pictures/style": 1,
    "report/markup": 1,
    "report/trial_history": 1,
    # 2: plain values in, plain values out; never a configuration
    "losses": 2,
    "miners": 2,
    "regularizers": 2,
    "metrics": 2,
    "statistics": 2,
    "comparisons": 2,
    "adequacy": 2,
    "embedding_geometry": 2,
    "ensemble": 2,
    "codes": 2,
    "step_bars": 2,
    "retrieval": 2,
    "clustering": 2,
    "protocols": 2,
    "model": 2,
    "objective": 2,
    "backbones": 2,
    "bn_inception": 2,
    "head": 2,
    "kmeans": 2,
    "surrogates": 2,
    "samplers/per_cluster": 2,
    "published": 2,
    "pictures/embedding_map": 2,
    "pictures/image_rows": 2,
    "pictures/ranked_queries": 2,
    "report/charts": 2,
    "report/cost": 2,
    "report/crossing": 2,
    "report/csv_files": 2,
    "report/embedded_pictures": 2,
    "report/importance": 2,
    "report/section": 2,
    "report/systems": 2,
    "recipe": 2,
    "optimizers": 2,
    "events": 2,
    "yaml_reader": 2,
    "data/benchmark_lists": 2,
    "data/benchmarks": 2,
    "data/cars_lists": 2,
    "data/check": 2,
    "data/datasets": 2,
    "data/list_file": 2,
    "data/own_images": 2,
    "data/seal": 2,
    "data/splits": 2,
    "download/archives": 2,
    "download/download": 2,
    "download/http_body": 2,
    "download/install": 2,
    "images/colours": 2,
    "images/crops": 2,
    "images/decoded_pixels": 2,
    "images/decoding": 2,
    "images/free_memory": 2,
    "images/image_cache": 2,
    "images/loader": 2,
    "images/pack": 2,
    "images/packing": 2,
    "images/read_ahead": 1,
    "images/shared_pack": 2,
    "images/transforms": 2,
    "samplers/class_index": 2,
    "samplers/class_samplers": 2,
    "samplers/cluster_samplers": 2,
    "samplers/epoch_plan": 2,
    "samplers/group_samplers": 2,
    "samplers/samplers": 2,
    # 3: what is made of them, still without a configuration
    "methods": 3,
    "scoring": 3,
    "bare_backbones": 3,
    "epoch_under_way": 3,
    "compatibility": 3,
    "image_rules": 3,
    "plugin_rules": 3,
    "domains": 3,
    "progress": 3,
    # plain dictionaries and arrays in, pages and pictures out: an actor may draw where the GPU is
    "report": 3,
    "pictures": 3,
    "run_updates": 3,
    # 4: the two configurations and the search space
    "config": 4,
    "sections": 4,
    "image_sections": 4,
    "training_sections": 4,
    "coverage": 4,
    "domain_reader": 4,
    "overrides": 4,
    "space": 4,
    "space_schema": 4,
    # 5: a configuration's parts; a trained network: measured, kept, given away
    "assembly": 5,
    "trial_images": 5,
    "checkpoint": 5,
    "evaluate": 5,
    "export": 5,
    # 6: one trial, and a study's folder
    "train": 6,
    "evaluate_other": 6,
    "gallery": 6,
    "onnx_export": 6,
    "pictures/kept_clusters": 6,
    "pictures/validated_run": 6,
    "study": 6,
    "plan": 7,
    # 7: Ray as a rim, MLflow
    "trial": 7,
    "results": 7,
    "study_summary": 7,
    "pictures/cluster_illustrations": 7,
    "pictures/illustrations": 7,
    "pictures/illustrated_runs": 7,
    "scheduler": 7,
    "tracking": 7,
    "mlflow_store": 7,
    "registered_models": 7,
    "study_runs": 7,
    "pyfunc_model": 7,
    # 8: the study and what people see of it
    "runner": 8,
    "sweep": 8,
    "trial_table": 8,
    "terminal": 8,
    "screens": 8,
    # 9: the front door
    "cli": 9,
    "cli_arguments": 9,
    "cli_data": 9,
    "cli_evaluate": 9,
    "cli_export": 9,
    "cli_lists": 9,
    "cli_models": 9,
    "cli_results": 9,
    "cli_studies": 9,
    "launch": 9,
}

# Imports on one floor, importer -> imported; each one is an exception that somebody decided on.
SIDEWAYS = {
    ("data/benchmark_lists", "data/list_file"),
    ("data/benchmarks", "data/benchmark_lists"),
    ("data/benchmarks", "data/cars_lists"),
    ("data/cars_lists", "data/list_file"),
    ("data/check", "data/benchmark_lists"),
    ("data/check", "data/benchmarks"),
    ("data/check", "data/list_file"),
    ("data/check", "images/decoding"),
    ("data/datasets", "data/benchmarks"),
    ("data/datasets", "data/own_images"),
    ("download/download", "download/http_body"),
    ("download/install", "download/archives"),
    ("download/install", "download/download"),
    ("images/decoded_pixels", "images/decoding"),
    ("images/image_cache", "data/datasets"),
    ("images/image_cache", "data/seal"),
    ("images/image_cache", "data/splits"),
    ("images/image_cache", "images/decoded_pixels"),
    ("images/image_cache", "images/decoding"),
    ("images/image_cache", "images/free_memory"),
    ("images/image_cache", "images/pack"),
    ("images/image_cache", "images/packing"),
    ("images/image_cache", "images/shared_pack"),
    ("images/loader", "images/crops"),
    ("images/loader", "images/transforms"),
    ("images/pack", "images/decoding"),
    ("images/pixels", "preprocessing"),
    ("images/packing", "images/decoded_pixels"),
    ("images/packing", "images/decoding"),
    ("images/packing", "images/pack"),
    ("images/shared_pack", "images/pack"),
    ("images/shared_pack", "images/packing"),
    ("images/transforms", "images/colours"),
    ("images/transforms", "images/crops"),
    ("samplers/class_samplers", "samplers/class_index"),
    ("samplers/class_samplers", "samplers/epoch_plan"),
    ("samplers/cluster_samplers", "samplers/class_index"),
    ("samplers/cluster_samplers", "samplers/epoch_plan"),
    ("samplers/cluster_samplers", "samplers/group_samplers"),
    ("samplers/group_samplers", "samplers/class_index"),
    ("samplers/group_samplers", "samplers/epoch_plan"),
    ("samplers/per_cluster", "samplers/cluster_samplers"),
    ("samplers/per_cluster", "samplers/epoch_plan"),
    ("samplers/per_cluster", "samplers/samplers"),
    ("samplers/samplers", "samplers/class_index"),
    ("samplers/samplers", "samplers/class_samplers"),
    ("samplers/samplers", "samplers/epoch_plan"),
    ("samplers/samplers", "samplers/group_samplers"),
    ("backbones", "bn_inception"),
    ("model", "backbones"),
    ("model", "head"),
    ("objective", "regularizers/_base"),
    ("clustering", "kmeans"),
    ("clustering", "metrics"),
    ("compatibility", "image_rules"),
    ("plugin_rules", "methods/_base"),
    ("compatibility", "plugin_rules"),
    ("config", "sections"),
    ("config", "image_sections"),
    ("config", "training_sections"),
    ("image_sections", "sections"),
    ("training_sections", "sections"),
    ("space", "config"),
    ("space", "coverage"),
    ("space", "domain_reader"),
    ("space", "overrides"),
    ("space", "space_schema"),
    ("space_schema", "config"),
    ("evaluate", "checkpoint"),
    ("evaluate", "export"),
    ("evaluate", "trial_images"),
    ("export", "checkpoint"),
    ("registered_models", "mlflow_store"),
    ("study_runs", "mlflow_store"),
    ("tracking", "mlflow_store"),
    ("tracking", "registered_models"),
    ("tracking", "study_runs"),
    ("regularizers/orthogonality", "model"),
    ("sweep", "runner"),
    ("screens", "trial_table"),
    ("terminal", "trial_table"),
    ("cli_models", "cli_arguments"),
    ("cli_results", "cli_arguments"),
    ("cli_studies", "cli_arguments"),
    ("cli", "cli_data"),
    ("cli", "cli_lists"),
    ("cli_data", "cli_arguments"),
    ("cli", "cli_models"),
    ("cli", "cli_results"),
    ("cli", "cli_studies"),
    ("cli", "cli_evaluate"),
    ("cli", "cli_export"),
    ("cli_evaluate", "cli_arguments"),
    ("cli_evaluate", "cli_models"),
    ("cli_export", "cli_arguments"),
    ("cli_export", "cli_models"),
    ("codes", "retrieval"),
    ("evaluate", "assembly"),
    ("pictures/illustrated_runs", "results"),
    ("pictures/illustrations", "pictures/cluster_illustrations"),
    ("pictures/ranked_queries", "protocols"),
    ("pictures/ranked_queries", "retrieval"),
    ("report/choices", "report/parallel"),
    ("report/choices", "report/words"),
    ("report/latex", "report/words"),
    ("report/markdown", "report/words"),
    ("report/page", "report/records"),
    ("report/page", "report/results"),
    ("report/page", "report/search"),
    ("report/records", "report/words"),
    ("report/results", "report/words"),
    ("report/search", "report/choices"),
    ("report/search", "report/words"),
    ("report/write", "report/latex"),
    ("report/write", "report/markdown"),
    ("report/write", "report/page"),
    ("results", "study_summary"),
    ("study_summary", "scheduler"),
    ("trial", "pictures/illustrations"),
    ("launch", "cli"),
}

# Heavy packages and the only modules that may know them.
HOMES = {
    "ray": {"trial", "scheduler", "runner", "sweep"},
    "mlflow": {"tracking", "mlflow_store", "registered_models", "study_runs", "pyfunc_model"},
    "faiss": {"codes", "gallery"},
    "typer": {
        "cli",
        *(
            f"cli_{name}"
            for name in ("arguments", "data", "evaluate", "export", "lists", "models", "results", "studies")
        ),
    },
}
READS_THE_OUTSIDE = {"cli", "launch"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "shared", "base"}


@functools.cache
def modules() -> dict[str, Path]:
    """Every Python file that is shipped: "train" or "losses/margin" -> path. Empty `__init__` files are left out."""
    found = {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and "__pycache__" not in path.parts
    }
    return {**found, "launch": ROOT / "launch.py"}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def floor_of(module: str) -> int | None:
    """The floor of "losses/margin": its own line, else its folder's, else None."""
    return FLOORS.get(module, FLOORS.get(module.split("/")[0]) if "/" in module else None)


def imported_names(tree: ast.Module, package: str) -> set[str]:
    """Dotted names of everything imported anywhere in the file, also inside functions.

    ``from a.b import c`` yields both "a.b" and "a.b.c": c may be a module. Relative imports are resolved against
    ``package``, the dotted name of the folder the file lies in.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    return names


def package_of(module: str) -> str:
    if module == "launch":
        return ""
    return ".".join(["raydml", *module.split("/")[:-1]])


def own_imports(module: str, names: set[str]) -> set[str]:
    """Which of ``names`` are modules of this package, as keys of :func:`modules`."""
    paths = {name.removeprefix("raydml.").replace(".", "/") for name in names if name.startswith("raydml.")}
    return (paths & modules().keys()) - {module}


def forbidden_imports(module: str, imports: set[str]) -> list[str]:
    """The rule itself: a lower floor, what the module's own folder shares (``_name.py``), or a listed pair."""
    own = floor_of(module)
    assert own is not None
    wrong = []
    for imported in sorted(imports):
        floor = floor_of(imported)
        assert floor is not None, f"{imported} has no line in FLOORS"
        folder, _, name = imported.rpartition("/")
        shared = bool(folder) and name.startswith("_") and module.rpartition("/")[0] == folder
        if floor > own or (floor == own and not shared and (module, imported) not in SIDEWAYS):
            wrong.append(f"{module} (floor {own}) imports {imported} (floor {floor})")
    return wrong


def reads_of_the_outside(tree: ast.Module) -> list[str]:
    """Where a file reads argv or the environment. Setting a variable for another library is not a read."""
    written = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            written.add(id(node.value))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # a statement: nothing is handed back
            called = node.value.func
            if isinstance(called, ast.Attribute) and called.attr in ("setdefault", "update"):
                written.add(id(called.value))
    reads = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in written:
            name = ast.unparse(node)
            if name in ("os.environ", "os.environb", "os.getenv", "sys.argv", "sys.orig_argv"):
                reads.append(f"line {node.lineno}: {name}")
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "sys"):
            reads += [
                f"line {node.lineno}: from {node.module} import {alias.name}"
                for alias in node.names
                if alias.name in ("environ", "getenv", "argv")
            ]
    return reads


def test_every_module_has_a_floor() -> None:
    missing = sorted(module for module in modules() if floor_of(module) is None)
    assert not missing, f"no line in FLOORS for {missing}: which floor do they stand on?"


def test_every_line_of_the_tables_names_a_module_on_disk() -> None:
    folders = {module.split("/")[0] for module in modules() if "/" in module}
    assert not sorted(FLOORS.keys() - modules().keys() - folders)
    named = {module for pair in SIDEWAYS for module in pair}
    assert not sorted(named - modules().keys())


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    names = imported_names(tree_of(modules()[module]), package_of(module))
    assert not forbidden_imports(module, own_imports(module, names))


def test_sideways_imports_are_used_and_make_no_circle() -> None:
    used = {
        (module, imported)
        for module, path in modules().items()
        for imported in own_imports(module, imported_names(tree_of(path), package_of(module)))
        if floor_of(module) == floor_of(imported)
    }
    assert not sorted(SIDEWAYS - used), "listed, but nobody imports so any more"
    remaining = set(used)
    while remaining:
        importers = {importer for importer, _ in remaining}
        leaves = {pair for pair in remaining if pair[1] not in importers}
        assert leaves, f"these import each other in a circle: {sorted(remaining)}"
        remaining -= leaves


def test_the_rule_bites() -> None:
    """The checks above, on imports that must be refused."""
    assert forbidden_imports("train", {"trial"})
    assert forbidden_imports("losses/margin", {"miners/distance_weighted"})
    assert forbidden_imports("losses/margin", {"config"})
    assert not forbidden_imports("losses/margin", {"tuples"})
    assert floor_of("a_new_module") is None
    source = "def f():\n    from raydml import trial\n    import raydml.sweep\n    from ..data import seal\n"
    names = imported_names(ast.parse(source), "raydml.losses")
    assert own_imports("losses/margin", names) == {"trial", "sweep", "data/seal"}
    assert imported_names(ast.parse("import importlib\nimportlib.import_module('ray')"), "raydml") >= {"ray"}
    assert reads_of_the_outside(ast.parse("import os\nx = os.environ['A']"))
    assert reads_of_the_outside(ast.parse("import os\nx = os.environ.get('A')"))
    assert reads_of_the_outside(ast.parse("from os import environ"))
    assert reads_of_the_outside(ast.parse("import os\nx = os.environ.setdefault('A', '1')"))
    assert not reads_of_the_outside(ast.parse("import os\nos.environ['A'] = '1'\nos.environ.setdefault('B', '1')"))


@pytest.mark.parametrize("package", sorted(HOMES))
def test_heavy_packages_stay_at_home(package: str) -> None:
    users = {
        module
        for module, path in modules().items()
        if package in {name.split(".")[0] for name in imported_names(tree_of(path), package_of(module))}
    }
    assert users <= HOMES[package], f"{sorted(users - HOMES[package])} may not import {package}"


def test_init_files_are_empty() -> None:
    inits = sorted(PACKAGE.rglob("__init__.py"))
    assert inits
    assert [path.relative_to(ROOT).as_posix() for path in inits if path.read_text(encoding="utf-8").strip()] == []
    folders = {path.parent for path in modules().values() if path.is_relative_to(PACKAGE)}
    assert folders == {path.parent for path in inits}, "a folder without __init__.py is not packed into the wheel"


@pytest.mark.parametrize("module", sorted(modules().keys() - READS_THE_OUTSIDE))
def test_argv_and_environment_are_read_at_the_front_door(module: str) -> None:
    assert not reads_of_the_outside(tree_of(modules()[module])), "pass the value in from cli.py"


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_eval_and_no_bare_except(module: str) -> None:
    for node in ast.walk(tree_of(modules()[module])):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}: {node.func.id}"


def test_no_vague_module_names() -> None:
    words = {module: module.split("/")[-1].removesuffix(".py") for module in modules()}
    assert [module for module, name in words.items() if name in VAGUE_NAMES] == []


def test_the_trainer_needs_little_more_than_torch() -> None:
    """A machine with torch, torchvision (which brings NumPy and Pillow) and pydantic can train. Ray and MLflow are not
    absent here, so that an import which does without them would be seen as well."""
    absent = ["faiss", "safetensors", "sklearn", "scipy", "pandas", "matplotlib", "typer", "rich", "yaml"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import raydml.train, raydml.evaluate, raydml.export\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'ray', 'mlflow'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def tracked_files() -> list[Path]:
    """What git has or would take; outside a checkout, nothing (the test is then skipped)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_package_registry_or_somebodys_machine() -> None:
    """Any index must do, and a path that exists on one machine helps nobody on another."""
    files = tracked_files()
    if not files:
        pytest.skip("not a git checkout")
    hosts = ["py" + r"pi\.org", "python" + r"hosted\.", "arti" + "factory", "--(?:extra-)?index" + "-url"]
    places = [
        r"(?<![\w.])/" + folder + "/" for folder in ("wo" + "rk", "opt/py" + "pi", "opt/wh" + "eels", "ro" + "ot")
    ]
    pattern = re.compile("|".join([*hosts, *places]), re.IGNORECASE)
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found
