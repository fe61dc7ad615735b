"""docs/commands.md, made from the commands themselves: ``python -m tests.cli.commands_page`` writes it again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from raydml.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
HEAD = """\
# Commands

`uv run launch.py COMMAND --help` shows the same in the terminal. After `pip install`, the program is `raydml` or
`python -m raydml`. Exit codes: 0 done, 2 a mistake that the message describes, 130 or 143 interrupted, 1 a defect.

<!-- Made from the program by `python -m tests.cli.commands_page`; edit the help texts, not this file. -->
"""


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command in the order of the help, a command of a group as "data list"."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def plain(text: str | None) -> str:
    """A help text without markup and line breaks, safe in a cell of a table."""
    text = re.sub(r"\[/?(?:bold|dim|italic|cyan|green|red|yellow)\]", "", text or "")
    return " ".join(text.split()).replace("|", "\\|")


def section(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(["launch.py", name, *(str(argument.metavar or argument.name) for argument in arguments)])
    paragraphs = [plain(paragraph) for paragraph in (command.help or "").split("\n\n")]
    rows = [f"| `{argument.metavar or argument.name}` | {plain(argument.help)} |" for argument in arguments]
    for option in options:
        if getattr(option, "hidden", False) or option.name == "help":
            continue
        assert option.is_flag or option.metavar, f"{name} {option.opts}: the page and the help need a metavar"
        values = "" if option.is_flag else " " + option.metavar.replace("|", "\\|")
        opts = [*option.opts, *option.secondary_opts]
        rows.append(f"| `{', '.join(opts)}{values}` | {plain(option.help)} |")
    return "\n\n".join([f"## {name}", f"    {usage}", *paragraphs, "\n".join(["| | |", "|---|---|", *rows])]) + "\n"


def page() -> str:
    group = typer.main.get_command(app)
    return "\n".join([HEAD, *(section(name, command) for name, command in commands(group))])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
