"""Commands about the contents of a search space: list and schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raydml.cli.arguments import CommandError, echo, new_console, program_of
from raydml.errors import did_you_mean
from raydml.ops.files import write_whole

if TYPE_CHECKING:
    from pydantic import BaseModel

SCHEMA_FILE = Path("search_spaces/schema.json")
Kind = Literal[
    "losses",
    "miners",
    "regularizers",
    "methods",
    "samplers",
    "searchers",
    "optimizers",
    "schedules",
    "backbones",
    "spaces",
]


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
    context: typer.Context,
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help=f"One of: {', '.join(get_args(Kind))}.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of them, with its settings and defaults.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list, with all settings.")] = False,
) -> None:
    """List losses, miners and other plugins; with NAME, one in full."""
    console = new_console()
    kinds: tuple[Kind, ...] = get_args(Kind)
    if kind is None:
        _print_overview(console, [(each, ", ".join(names(each))) for each in kinds])
        echo(console, f"\n{program_of(context)} list losses    one line for each")
        return
    if kind not in kinds:
        hint = did_you_mean(kind, kinds) or "."
        raise CommandError(f"KIND = {kind!r} is not one of the kinds{hint} Choices: {', '.join(kinds)}")
    if name is not None and name not in names(kind):
        hint = did_you_mean(name, names(kind)) or "."
        raise CommandError(f"NAME = {name!r} is not one of the {kind}{hint} Choices: {', '.join(names(kind))}")
    chosen = names(kind) if name is None else (name,)
    if as_json:
        rows = []
        for entry in listed_entries(kind, chosen):
            settings = {setting: facts._asdict() for setting, facts in entry.settings.items()}
            rows.append({**entry._asdict(), "settings": settings})
        typer.echo(json.dumps(rows))
    elif name is not None:
        console.print(_in_full(*listed_entries(kind, chosen)))
    else:
        _print_overview(console, [(each, about(kind, each)) for each in chosen])
        if kind == "spaces":
            echo(console, f"\n{program_of(context)} sweep {chosen[0]} --dry-run    what it would do")
        elif kind != "backbones":
            echo(console, f"\n{program_of(context)} list {kind} {chosen[0]}    its settings")


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


def names(kind: Kind) -> tuple[str, ...]:
    """The names of one kind, in the order of the listing."""
    from raydml import registry

    if kind == "backbones":
        from raydml.models.backbones import BACKBONES

        return tuple(BACKBONES)
    if kind == "spaces":
        from raydml.search_space.shipped import shipped_spaces

        return tuple(path.stem for path in shipped_spaces())
    if kind in ("optimizers", "schedules"):
        return tuple(_sections(kind))
    return registry.names(kind)


def about(kind: Kind, name: str) -> str:
    """One line about an entry."""
    from raydml import registry

    if kind == "backbones":
        from raydml.models.backbones import BACKBONES

        facts = BACKBONES[name]
        weights = facts.weights_file or facts.weights_by_path or "no published weights"
        return f"{facts.feature_dim} features, crops of {facts.crops} px, {weights}"
    if kind == "spaces":
        from raydml.search_space.shipped import describe_space, spaces_folder

        found = describe_space(spaces_folder() / f"{name}.yaml")
        return f"{found.data}: {found.question} Cost: {found.cost}"
    if kind in ("optimizers", "schedules"):
        return (inspect.getdoc(_sections(kind)[name]) or "").partition("\n")[0].replace("``", "")
    return registry.describe(kind, name)


def listed_entries(kind: Kind, chosen: Sequence[str]) -> Iterator[_ListedEntry]:
    """The entries with these names, read from their definitions."""
    from raydml import registry

    for name in chosen:
        if kind in ("backbones", "spaces"):
            yield _ListedEntry(name, about(kind, name), "", {})
        elif kind in ("optimizers", "schedules"):
            yield _ListedEntry(name, about(kind, name), "", settings_of(_sections(kind)[name]))
        else:
            settings = settings_of(registry.settings_model(kind, name))
            source = "" if kind == "methods" else registry.source(kind, name)
            yield _ListedEntry(name, about(kind, name), source, settings, fits(kind, name))


def _sections(kind: str) -> dict[str, type[BaseModel]]:
    """The optimizers or the schedules of a trial by name."""
    from raydml.config.trial import Trial

    field = Trial.model_fields[kind.removesuffix("s")]
    return {get_args(model.model_fields["name"].annotation)[0]: model for model in get_args(field.annotation)}


def fits(kind: str, name: str) -> str:
    """What a loss takes, what a miner yields or what a regulariser needs; empty for the other kinds."""
    from raydml import registry

    if kind not in ("losses", "miners", "regularizers"):
        return ""
    cls: Any = registry.load(kind, name)
    if kind == "losses":
        return f"takes {', '.join(cls.accepts) or 'labels alone, no miner'}"
    if kind == "miners":
        kinds = sorted({miner.yields for miner in _by_each_choice(name)})
        return f"yields {' or '.join(kinds)}{', by its settings' if len(kinds) > 1 else ''}"
    needs = ["a loss that takes pairs"] if cls.needs_pairs else []
    needs += [f"a miner that yields {' or '.join(cls.rewrites)}"] if cls.rewrites else []
    return f"needs {' and '.join(needs)}" if needs else ""


def _by_each_choice(name: str) -> Iterator[Any]:
    """The miner at its defaults, and with every value of each setting that is a choice of words."""
    from raydml import registry

    yield registry.build("miners", name)
    for setting, field in registry.settings_model("miners", name).model_fields.items():
        if get_origin(field.annotation) is Literal:
            for word in get_args(field.annotation):
                yield registry.build("miners", name, **{setting: word})


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
    if "plugins" in facts:
        return f"block of {facts['plugins']}"
    if facts.get("type") == "array" and "items" in facts:
        return f"list of {type_text(facts['items'])}"
    kind = {"number": "float", "integer": "int", "boolean": "bool", "string": "text", "array": "list"}.get(
        facts.get("type", ""), facts.get("type", "value")
    )
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {facts[key]:g}" for key, sign in signs.items() if key in facts]
    return f"{kind} {' and '.join(limits)}".strip()


def _print_overview(console: Console, entries: Sequence[tuple[str, str]]) -> None:
    """Print a name and a line about each; only a terminal breaks long lines, between words."""
    if not console.is_terminal:
        width = max(len(name) for name, _ in entries)
        echo(console, "\n".join(f"{name:<{width}}  {line}" for name, line in entries))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, line in entries:
        table.add_row(name, line)
    console.print(table)


def _in_full(entry: _ListedEntry) -> Group:
    """Print the name, a line about it, its source, and its settings with default and meaning."""
    parts: list[RenderableType] = [Text.assemble((entry.name, "bold"), "  ", entry.about)]
    parts += [_indented(4, (entry.source, "dim"))] if entry.source else []
    parts += [_indented(4, entry.fits)] if entry.fits else []
    for name, setting in entry.settings.items():
        typed = f": {setting.type}" + (", required" if setting.default == "required" else f" = {setting.default}")
        parts.append(_indented(4, (name, "cyan"), typed))
        parts += [_indented(8, (setting.about, "dim"))] if setting.about else []
    return Group(*parts)


def _indented(num_columns: int, *pieces: str | tuple[str, str]) -> Padding:
    return Padding(Text.assemble(*pieces), (0, 0, 0, num_columns), expand=False)
