"""What the blocks of a configuration are made of: strict values, and the blocks of plugins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from raydml import registry
from raydml.errors import ABSENT, ConfigError, Problem, unknown_name

STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) else value


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
OptionalPath = Annotated[Path | None, BeforeValidator(_as_path)]


class Section(BaseModel):
    """A block of the configuration."""

    model_config = STRICT


# --- plugin blocks: {name: margin, beta: 1.2} ------------------------------------------------------------------------


class PluginBlock(BaseModel):
    """A plugin by name with all its settings, also those left at their defaults.

    ``block.name``, ``block.settings``; ``model_dump()`` gives ``{"name": ..., **settings}`` again.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    kind: ClassVar[str]
    name: str

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, block: Any) -> Any:
        if isinstance(block, PluginBlock):
            return block
        if not isinstance(block, Mapping):
            cure = f"write {{name: {block}}}" if isinstance(block, str) else "write {name: ...}"
            raise ConfigError([Problem("", block, "must be a block of keys", cure=cure)])
        choices = registry.names(cls.kind)
        if "name" not in block:
            raise ConfigError([Problem("name", ABSENT, "is required and missing", choices, cure="add this key")])
        name = block["name"]
        if name not in choices:
            raise ConfigError([unknown_name("name", name, choices, f"one of the {cls.kind}")])
        settings = {key: value for key, value in block.items() if key != "name"}
        return {"name": name, **registry.checked_settings(cls.kind, name, settings)}

    @property
    def settings(self) -> dict[str, Any]:
        """Setting -> value: what the plugin's constructor takes after the ``*``."""
        return dict(self.__pydantic_extra__ or {})


class MethodBlock(PluginBlock):
    kind = "methods"


class LossBlock(PluginBlock):
    kind = "losses"


class MinerBlock(PluginBlock):
    kind = "miners"


class SamplerBlock(PluginBlock):
    kind = "samplers"


def _with_defaults(block: object) -> object:
    """Regulariser -> its settings, those left at their defaults included. Raises ConfigError with every mistake."""
    if not isinstance(block, Mapping):
        cure = "write {mdr: {weight: 0.6}}, or {} for none"
        raise ConfigError([Problem("", block, "must be a block of regularisers by name", cure=cure)])
    choices = registry.names("regularizers")
    filled: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for name, settings in block.items():
        if name not in choices:
            problem = unknown_name(str(name), name, choices, "one of the regularizers")._replace(value=settings)
            if name == "name":
                problem = problem._replace(nearest=None, cure=f"write the name as the key: {{{settings}: {{...}}}}")
            problems.append(problem)
            continue
        given = {} if settings is None else settings
        if not isinstance(given, Mapping):
            problems.append(Problem(name, given, "must be a block of settings", cure=f"write {name}: {{}}"))
            continue
        try:
            filled[name] = registry.checked_settings("regularizers", name, given)
        except ConfigError as error:
            problems += [problem.under(name) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return filled


# A mapping: each regulariser at most once, in any order.
RegularizerBlocks = Annotated[dict[str, dict[str, Any]], BeforeValidator(_with_defaults)]
