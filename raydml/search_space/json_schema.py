"""The JSON schema of a search space, for editors: completion, descriptions, and red lines under misspelt keys.

It holds keys, types, limits and names. Rules between sections (a loss and its miner) are in `load_space` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from raydml import registry
from raydml.config.trial import Machine, StudySettings, Trial
from raydml.search_space.domains import DOMAINS

_BLOCKS = {"loss": "losses", "miner": "miners", "sampler": "samplers", "method": "methods"}


def json_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12) of a whole YAML file."""
    builder = _Builder()
    trial = builder.with_domains("trial", builder.block("trial", _trial_schema()))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "raydml search space",
        "type": "object",
        "additionalProperties": False,
        "required": ["trial"],
        "properties": {"study": _study_schema(), "machine": _flat(Machine), "trial": trial},
        "$defs": dict(sorted(builder.definitions.items())),
    }


def _study_schema() -> dict[str, Any]:
    schema = _flat(StudySettings)
    searchers = [_plugin("searchers", name) for name in registry.names("searchers")]
    schema["properties"]["search"]["properties"]["searcher"] = {"anyOf": searchers}
    balance = schema["properties"]["search"]["properties"]["balance"]
    balance["anyOf"] = [*balance["anyOf"], {"type": "string"}]
    return schema


def _trial_schema() -> dict[str, Any]:
    schema = _flat(Trial)
    for key, kind in _BLOCKS.items():
        variants: list[dict[str, Any]] = [_plugin(kind, name) for name in registry.names(kind)]
        is_optional = not Trial.model_fields[key].is_required() and key == "miner"
        schema["properties"][key] = {"anyOf": [*variants, *([{"type": "null"}] if is_optional else [])]}
    schema["properties"]["regularizers"] = {
        "type": "object",
        "description": "Terms added to the loss, by name.",
        "properties": {name: _settings("regularizers", name) for name in registry.names("regularizers")},
        "additionalProperties": False,
        "default": {},
    }
    return schema


def _settings(kind: str, name: str) -> dict[str, Any]:
    schema = {**_flat(registry.settings_model(kind, name)), "description": registry.describe(kind, name)}
    for setting in schema.get("properties", {}).values():
        branches = setting.get("anyOf", [])
        if of_kind := next((branch["plugins"] for branch in branches if "plugins" in branch), None):
            setting["anyOf"] = [*(_plugin(of_kind, other) for other in registry.names(of_kind)), {"type": "null"}]
    return schema


def _plugin(kind: str, name: str) -> dict[str, Any]:
    schema = _settings(kind, name)
    schema["properties"] = {"name": {"const": name, "type": "string"}, **schema.get("properties", {})}
    schema["required"] = ["name"]
    return schema


def _flat(model: type[BaseModel]) -> dict[str, Any]:
    """Return pydantic's schema with its references inlined and its titles left out."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(part: Any, is_properties: bool = False) -> Any:
        if isinstance(part, list):
            return [inline(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            target = definitions[part["$ref"].rpartition("/")[2]]
            return inline({**target, **{key: value for key, value in part.items() if key != "$ref"}})
        # A property may be named title; the keyword title repeats the key.
        kept = part if is_properties else {k: v for k, v in part.items() if k not in ("title", "discriminator")}
        return {key: inline(value, key == "properties" and not is_properties) for key, value in kept.items()}

    flat: dict[str, Any] = inline(schema)
    return flat


class _Builder:
    """Allows a domain in place of every value of a trial, with one definition for each key path."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}

    def with_domains(self, path: str, schema: Mapping[str, Any]) -> dict[str, str]:
        """Return a reference to the value itself or a domain of such values."""
        itself = {"$ref": f"#/$defs/{path}"}
        domains = _choices_of(itself)
        if _holds_numbers(schema):
            number = {"type": "number"}
            ranges = [_domain(name, _numbers(3 if name == "quniform" else 2), number) for name in DOMAINS[2:]]
            self.definitions["a range"] = {"anyOf": ranges}
            domains.append({"$ref": "#/$defs/a range"})
        self.definitions[path] = {"anyOf": [dict(schema), *domains]}
        return itself

    def block(self, path: str, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the schema of a block with domains allowed for each key, also in each of its variants by name."""
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                variants = [self.block(_variant_path(path, variant), variant) for variant in schema[keyword]]
                names = [name for variant in schema[keyword] if (name := _name_of(variant))]
                if names:  # the name itself may be a domain; load_space then checks which keys fit
                    chosen = {"anyOf": _choices_of({"enum": names})}
                    variants.append({"type": "object", "properties": {"name": chosen}, "required": ["name"]})
                return {**{k: v for k, v in schema.items() if k != keyword}, "anyOf": variants}
        if "properties" not in schema:
            return schema
        properties: dict[str, Any] = {}
        for key, value in schema["properties"].items():
            below = f"{path}.{key}"
            properties[key] = value if "const" in value else self.with_domains(below, self.block(below, value))
        # Required keys may come from a choice of blocks (`loss, miner: {choice: [...]}`); names may not.
        is_named = _name_of(schema) is not None
        part = {"type": "object"} if is_named else {"$ref": f"#/$defs/{path}"}
        shared = {"^[a-z_]+( *, *[a-z_]+)+$": {"anyOf": _choices_of(part)}}
        required = ["name"] if is_named else []
        return {**schema, "properties": properties, "required": required, "patternProperties": shared}


def _choices_of(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    items = {"type": "array", "items": dict(item), "minItems": 1}
    return [_domain("choice", items, dict(item)), _domain("grid", items)]


def _name_of(variant: Mapping[str, Any]) -> str | None:
    name: str | None = variant.get("properties", {}).get("name", {}).get("const")
    return name


def _variant_path(path: str, variant: Mapping[str, Any]) -> str:
    name = _name_of(variant)
    return f"{path}.{name}" if name else path


def _domain(name: str, schema: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the schema of ``{name: ...}``, with the published value beside it where the domain may have one."""
    properties = {name: schema} if first is None else {name: schema, "first": first}
    return {"type": "object", "properties": properties, "required": [name], "additionalProperties": False}


def _numbers(count: int) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "number"}, "minItems": count, "maxItems": count}


def _holds_numbers(schema: Mapping[str, Any]) -> bool:
    kinds = [schema, *schema.get("anyOf", [])]
    return any(kind.get("type") in ("number", "integer") for kind in kinds)
