"""The commands: CPU seconds from start to end, and the slow libraries that each imports.

    uv run python benchmarks/commands.py                                       # without a finished study
    uv run python benchmarks/commands.py --storage studies --study digits      # all rows
    uv run python benchmarks/commands.py --launch ../other/launch.py           # another checkout

CPU time of the process and its children (user + system), the smallest of several runs: wall time depends on what else
the machine does. The targets are those of the project.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SLOW = ("torch", "torchvision", "ray", "mlflow", "pandas", "matplotlib")


class Command(NamedTuple):
    """Arguments, the CPU seconds aimed at (None: no target), and whether a finished study is needed."""

    arguments: str
    target_s: float | None = None
    needs_study: bool = False


COMMANDS = (
    Command("--help", 0.5),
    Command("status nosuch", 0.7),
    Command("sweep wrong.yaml", 1.5),
    Command("sweep SPACE --max-epochs -1"),
    Command("list losses", 1.5),
    Command("list losses margin"),
    Command("list backbones"),
    Command("schema"),
    Command("evaluate nosuch"),
    Command("evaluate backbone:convnet --data digits"),
    Command("query gallery nothing.png"),
    Command("sync nosuch"),
    Command("status", 1.0),
    Command("status STUDY", 1.2, needs_study=True),
    Command("resume STUDY", needs_study=True),
    Command("report STUDY --out REPORT", 6.0, needs_study=True),
    Command("evaluate STUDY", needs_study=True),
    Command("sweep SPACE --dry-run"),
)


def cpu_seconds(arguments: list[str], folder: Path) -> float:
    """Run a program in a folder and return the CPU seconds of it and of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, cwd=folder, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def imported_by(launch: Path, arguments: list[str], folder: Path) -> list[str]:
    """Return which of the slow libraries a command imports, by the lines of ``-X importtime``."""
    command = [sys.executable, "-X", "importtime", str(launch), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return [name for name in SLOW if name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", type=Path, default=ROOT / "launch.py")
    parser.add_argument("--storage", type=Path)
    parser.add_argument("--study", help="a finished study in the storage")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    launch = options.launch.resolve()
    os.environ["PYTHONPATH"] = str(launch.parent)
    space = launch.parent / "search_spaces" / "digits.yaml"
    table = Table(box=None, pad_edge=False)
    for heading in ("command", "CPU s", "target", "imports"):
        table.add_column(heading, justify="right" if heading in ("CPU s", "target") else "left")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "wrong.yaml").write_text(space.read_text().replace("\n  optimizer:", "\n  optimiser:"))
        for command in COMMANDS:
            if command.needs_study and options.study is None:
                continue
            words = {"SPACE": str(space), "STUDY": str(options.study), "REPORT": str(folder / "report")}
            arguments = [words.get(word, word) for word in command.arguments.split()]
            if options.storage is not None and arguments[0] in ("status", "resume", "report", "evaluate", "sync"):
                arguments += ["--storage", str(options.storage.resolve())]
            runs = [cpu_seconds([sys.executable, str(launch), *arguments], folder) for _ in range(options.turns)]
            target = "" if command.target_s is None else f"{command.target_s:g}"
            imports = ", ".join(imported_by(launch, arguments, folder)) or "none"
            table.add_row(command.arguments, f"{min(runs):.2f}", target, imports)
    Console().print(table)


if __name__ == "__main__":
    main()
