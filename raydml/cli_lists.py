"""Commands that tell what can be written into a search space: list and schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich.console import Console

from raydml import screens

if TYPE_CHECKING:
    from pydantic import BaseModel

Kind = Literal["losses", "miners", "methods", "samplers", "optimizers", "schedules", "backbones"]
Row = tuple[str, str, list[tuple[str, str, str]]]


def list_plugins(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Names, one line about each, and settings with type and default."""
    rows = list(rows_of(kind))
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {
                        "name": name,
                        "about": about,
                        "settings": {key: [kind, default] for key, kind, default in settings},
                    }
                    for name, about, settings in rows
                ]
            )
        )
        return
    Console(markup=False, highlight=False).print(screens.catalogue(rows), soft_wrap=True)


def schema() -> None:
    """Print the JSON schema of a search space, for editors."""
    from raydml.space import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def rows_of(kind: Kind) -> Iterator[Row]:
    """(name, one line, [(setting, type, default)]) for everything of a kind, from where it is defined."""
    if kind in ("losses", "miners", "methods"):
        from raydml import plugins

        for name in plugins.names(kind):
            yield name, plugins.describe(kind, name), settings_of(plugins.settings_model(kind, name))
    elif kind == "backbones":
        from raydml.model import BACKBONES

        for name, facts in BACKBONES.items():
            size = f"exactly {facts.fixed_crop_px}" if facts.fixed_crop_px else f"at least {facts.minimum_crop_px}"
            weights = facts.weights_file or "no published weights"
            yield name, f"{facts.feature_dim} features, crops of {size} px, {weights}", []
    else:
        from raydml.config import Trial

        field = {"samplers": "sampler", "optimizers": "optimizer", "schedules": "schedule"}[kind]
        for model in get_args(Trial.model_fields[field].annotation):
            about = (inspect.getdoc(model) or "").partition("\n")[0]
            yield get_args(model.model_fields["name"].annotation)[0], about.replace("``", ""), settings_of(model)


def settings_of(model: type[BaseModel]) -> list[tuple[str, str, str]]:
    """Every setting of a model but its name: (setting, type with its limits, default as in YAML)."""
    described = model.model_json_schema()
    properties: Mapping[str, Any] = described.get("properties", {})
    required = described.get("required", ())
    return [
        (name, type_text(facts), "required" if name in required else json.dumps(facts.get("default")))
        for name, facts in properties.items()
        if name != "name"
    ]


def type_text(facts: Mapping[str, Any]) -> str:
    """``float > 0``, ``int >= 1 or null``, ``a | b``: a type in the words of the JSON schema."""
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
