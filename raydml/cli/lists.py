"""Commands about the contents of a search space: list and schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from raydml.cli.arguments import CommandError, new_console
from raydml.ops.files import write_whole

if TYPE_CHECKING:
    from pydantic import BaseModel

SCHEMA_FILE = Path("search_spaces/schema.json")
Kind = Literal["losses", "miners", "regularizers", "methods", "samplers", "optimizers", "schedules", "backbones"]


class _Setting(NamedTuple):
    """One setting of a listing. default: as in YAML, or "required"; about: meaning and source of the default."""

    type: str
    default: str
    about: str


class _ListedEntry(NamedTuple):
    """One entry of a listing. source: the paper; fits: what can be combined with it; both may be empty."""

    name: str
    about: str
    source: str
    settings: dict[str, _Setting]
    fits: str = ""


def list_plugins(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List plugins with description, paper, settings and defaults."""
    entries = list(listed_entries(kind))
    if as_json:
        rows = [
            {**entry._asdict(), "settings": {name: setting._asdict() for name, setting in entry.settings.items()}}
            for entry in entries
        ]
        typer.echo(json.dumps(rows))
        return
    new_console().print(_catalogue(entries))


def schema(
    write: Annotated[bool, typer.Option("--write", help=f"Write it to {SCHEMA_FILE}, where editors look.")] = False,
) -> None:
    """Print the JSON schema of a search space, for editors."""
    from raydml.search_space.json_schema import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if not write:
        typer.echo(text, nl=False)
        return
    if not SCHEMA_FILE.parent.is_dir():
        raise CommandError(
            f"there is no folder {SCHEMA_FILE.parent} here. Cure: go where launch.py is, or `schema > FILE`"
        )
    write_whole(SCHEMA_FILE, text)
    typer.echo(f"wrote {SCHEMA_FILE}")


def listed_entries(kind: Kind) -> Iterator[_ListedEntry]:
    """All entries of one kind, read from their definitions."""
    from raydml import registry as plugins

    if kind in plugins.KINDS:
        for name in plugins.names(kind):
            settings = settings_of(plugins.settings_model(kind, name))
            source = "" if kind == "methods" else plugins.source(kind, name)
            yield _ListedEntry(name, plugins.describe(kind, name), source, settings, fits(kind, name))
    elif kind == "backbones":
        from raydml.models.backbones import BACKBONES

        for name, facts in BACKBONES.items():
            weights = facts.weights_file or facts.weights_by_path or "no published weights"
            yield _ListedEntry(name, f"{facts.feature_dim} features, crops of {facts.crops} px, {weights}", "", {})
    else:
        from raydml.config.trial import Trial

        field = {"optimizers": "optimizer", "schedules": "schedule"}[kind]
        for model in get_args(Trial.model_fields[field].annotation):
            about = (inspect.getdoc(model) or "").partition("\n")[0]
            name = get_args(model.model_fields["name"].annotation)[0]
            yield _ListedEntry(name, about.replace("``", ""), "", settings_of(model))


def fits(kind: str, name: str) -> str:
    """What a loss takes, what a miner yields or what a regulariser needs; empty for the other kinds."""
    from raydml import registry as plugins

    cls: Any = plugins.load(kind, name)
    if kind == "losses":
        return f"takes {', '.join(cls.accepts) or 'labels alone, no miner'}"
    if kind == "miners":
        kinds = sorted({miner.yields for miner in _by_each_choice(name)})
        return f"yields {' or '.join(kinds)}{', by its settings' if len(kinds) > 1 else ''}"
    if kind == "regularizers":
        needs = ["a loss that takes pairs"] if cls.needs_pairs else []
        needs += [f"a miner that yields {' or '.join(cls.rewrites)}"] if cls.rewrites else []
        return f"needs {' and '.join(needs)}" if needs else ""
    return ""


def _by_each_choice(name: str) -> Iterator[Any]:
    """The miner at its defaults, and with every value of each setting that is a choice of words."""
    from raydml import registry as plugins

    yield plugins.build("miners", name)
    for setting, field in plugins.settings_model("miners", name).model_fields.items():
        if get_origin(field.annotation) is Literal:
            for word in get_args(field.annotation):
                yield plugins.build("miners", name, **{setting: word})


def settings_of(model: type[BaseModel]) -> dict[str, _Setting]:
    """All settings of a model except its name; the type includes its limits."""
    described = model.model_json_schema()
    properties: Mapping[str, Any] = described.get("properties", {})
    required = described.get("required", ())
    return {
        name: _Setting(
            type_text(facts),
            "required" if name in required else json.dumps(facts.get("default")),
            facts.get("description", ""),
        )
        for name, facts in properties.items()
        if name != "name"
    }


def type_text(facts: Mapping[str, Any]) -> str:
    """A type of the JSON schema in words: ``float > 0``, ``int >= 1 or null``, ``a | b``."""
    if "anyOf" in facts:
        return " or ".join(type_text(branch) for branch in facts["anyOf"])
    if "enum" in facts:
        return " | ".join(str(choice) for choice in facts["enum"])
    if facts.get("type") == "array" and "items" in facts:
        return f"list of {type_text(facts['items'])}"
    kind = {"number": "float", "integer": "int", "boolean": "bool", "string": "text", "array": "list"}.get(
        facts.get("type", ""), facts.get("type", "value")
    )
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {facts[key]:g}" for key, sign in signs.items() if key in facts]
    return f"{kind} {' and '.join(limits)}".strip()


def _catalogue(entries: Sequence[_ListedEntry]) -> Group:
    """Print names, a line about each, its source, and its settings with default and meaning."""
    parts: list[RenderableType] = []
    for number, entry in enumerate(entries):
        if number and any(one.settings for one in entries):
            parts.append(Text())
        parts.append(Text.assemble((entry.name, "bold"), "  ", entry.about))
        parts += [_indented(4, (entry.source, "dim"))] if entry.source else []
        parts += [_indented(4, entry.fits)] if entry.fits else []
        for name, setting in entry.settings.items():
            typed = f": {setting.type}" + (", required" if setting.default == "required" else f" = {setting.default}")
            parts.append(_indented(4, (name, "cyan"), typed))
            parts += [_indented(8, (setting.about, "dim"))] if setting.about else []
    return Group(*parts)


def _indented(num_columns: int, *pieces: str | tuple[str, str]) -> Padding:
    return Padding(Text.assemble(*pieces), (0, 0, 0, num_columns), expand=False)
