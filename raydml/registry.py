"""Losses, miners, regularisers, methods by name: the folder is the registry, the constructor is the schema.

A plugin is one file `raydml/<kind>/<name>.py` with one public class. Before the `*` its constructor takes
what the trial knows (CONTEXT); after the `*` come its settings: typed keywords with defaults, limits written
into the type with a word on each (`margin: Annotated[float, Field(gt=0, description="...")] = 0.2`). Adding a plugin is
adding its file and its test file; nothing registers.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

KINDS = ("losses", "miners", "regularizers", "methods")

# What a constructor may ask for before its `*`. Anything else there is a mistake in the plugin.
CONTEXT = (
    *("num_classes", "embedding_dim", "network", "loss", "miner"),
    *("train_labels", "num_epochs", "make_objective", "make_sampler"),
)

# `build` and the plugin block of a configuration use these words themselves.
RESERVED = ("kind", "name")


class PluginError(ValueError):
    """A plugin or one of its settings was named or set wrongly; the message says where and how to cure it.

    key: what was wrong ("kind", "name" or a setting). value: what was given. choices: what would have been
    accepted, where that is a list. nearest: the choice spelt most like the value, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        key: str = "",
        value: object = None,
        choices: Iterable[str] = (),
        nearest: str | None = None,
    ) -> None:
        super().__init__(message)
        self.key = key
        self.value = value
        self.choices = tuple(choices)
        self.nearest = nearest


def names(kind: str) -> tuple[str, ...]:
    """The plugins of a kind, sorted: every file in its folder whose name does not start with an underscore."""
    if kind not in KINDS:
        raise _unknown("kind", kind, KINDS, "kind of plugin", "use one of the kinds")
    folder = Path(__file__).parent / kind
    return tuple(sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")))


def load(kind: str, name: str) -> type:
    """The class of a plugin. PluginError when there is no such plugin or its file does not define exactly one."""
    if name not in names(kind):
        raise _unknown(
            "name", name, names(kind), f"plugin in {kind}", f"use one of them or add raydml/{kind}/{name}.py"
        )
    return public_class(importlib.import_module(f"raydml.{kind}.{name}"))


def public_class(module: ModuleType) -> type:
    """The one class that the module itself defines (imports do not count) without a leading underscore."""
    found = [
        value
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if len(found) != 1:
        listed = ", ".join(cls.__name__ for cls in found) or "none"
        raise PluginError(
            f"{module.__name__}: a plugin file defines exactly one public class, found {listed}. "
            "Give the others a leading underscore or a file of their own.",
            key="class",
            choices=[cls.__name__ for cls in found],
        )
    return found[0]


def describe(kind: str, name: str) -> str:
    """The first line of the class's docstring: what a listing shows."""
    return (inspect.getdoc(load(kind, name)) or "").partition("\n")[0]


def source(kind: str, name: str) -> str:
    """The paper a plugin is from: what stands behind the colon in the first line of its module's docstring."""
    module = inspect.getmodule(load(kind, name))
    return (inspect.getdoc(module) or "").partition("\n")[0].partition(": ")[2]


@functools.cache
def settings_model(kind: str, name: str) -> type[BaseModel]:
    """The plugin's settings as a frozen pydantic model with their defaults.

    Strict: an int passes for a float, a bool or a string never passes for a number, NaN and infinities are
    refused, unknown keys are refused. PluginError when the constructor itself breaks the rules of a plugin.
    """
    return constructor_model(load(kind, name))


def constructor_model(cls: type) -> type[BaseModel]:
    """The settings model of a class, read from the keyword-only part of its constructor."""
    hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    fields: dict[str, Any] = {}
    for parameter in _parameters(cls):
        where = f"{cls.__module__}.{cls.__name__}: parameter {parameter.name!r}"
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            if parameter.name not in CONTEXT or parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                raise PluginError(
                    f"{where} is not something a trial knows ({', '.join(CONTEXT)}). "
                    "Settings go after the `*`, each by its own name.",
                    key=parameter.name,
                    choices=CONTEXT,
                )
            continue
        if parameter.name in CONTEXT + RESERVED:
            raise PluginError(f"{where} may not be a setting: the word is taken. Rename it.", key=parameter.name)
        if parameter.default is inspect.Parameter.empty or parameter.name not in hints:
            raise PluginError(f"{where} is a setting and needs a type and a default.", key=parameter.name)
        fields[parameter.name] = (hints[parameter.name], parameter.default)
    config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)
    return create_model(f"{cls.__name__}Settings", __config__=config, **fields)


def build(kind: str, name: str, **arguments: Any) -> Any:
    """An instance of the plugin.

    Arguments named in CONTEXT (num_classes=, embedding_dim=, ...) are what the trial knows and reach the
    constructor only where it takes them; all others are settings. PluginError names every setting that is
    unknown, of the wrong type or out of range, all at once, and what of the context is missing. ValueError, with
    the reason, where settings exclude each other.
    """
    cls = load(kind, name)
    context = {key: value for key, value in arguments.items() if key in CONTEXT}
    given = {key: value for key, value in arguments.items() if key not in CONTEXT}
    try:
        settings = settings_model(kind, name)(**given)
    except ValidationError as error:
        raise _wrong_settings(kind, name, error) from None
    wanted = {p.name: p.default for p in _parameters(cls) if p.name in CONTEXT}
    missing = [key for key, default in wanted.items() if default is inspect.Parameter.empty and key not in context]
    if missing:
        given_as = ", ".join(f"{key}=..." for key in missing)
        message = f"{kind}/{name} needs {' and '.join(missing)} of whoever builds it: pass {given_as} to build"
        raise PluginError(message, key=missing[0], choices=wanted)
    for key in ("num_classes", "embedding_dim"):
        size = context.get(key, 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise PluginError(f"{key} = {size!r}: must be a whole number of at least 1.", key=key, value=size)
    values = dict(settings)
    return cls(**{key: value for key, value in context.items() if key in wanted}, **values)


def _parameters(cls: type) -> list[inspect.Parameter]:
    """The constructor's parameters without self; none where the class has no constructor of its own."""
    if "__init__" not in vars(cls):
        return []
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]


def _nearest(value: object, choices: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return close[0] if close else None


def _unknown(
    key: str, value: object, choices: tuple[str, ...], noun: str, cure: str, *, spelt: object = None
) -> PluginError:
    """spelt: what was misspelt, where that is not the value."""
    nearest = _nearest(value if spelt is None else spelt, choices)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    message = f"{key} = {value!r}: no such {noun}.{hint} Choices: {', '.join(choices) or 'none'}; {cure}."
    return PluginError(message, key=key, value=value, choices=choices, nearest=nearest)


def _wrong_settings(kind: str, name: str, error: ValidationError) -> PluginError:
    """One PluginError for all problems; its attributes tell of the first."""
    model = settings_model(kind, name)
    known = tuple(model.model_fields)
    problems: list[PluginError] = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(_unknown(key, item["input"], known, "setting", "rename or remove it", spelt=key))
            continue
        field = model.model_fields[str(item["loc"][0])]
        choices = _literal_choices(field.annotation)
        nearest = _nearest(item["input"], choices)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        message = f"{key} = {item['input']!r}: {item['msg']}.{hint} The default is {field.default!r}."
        problems.append(PluginError(message, key=key, value=item["input"], choices=choices, nearest=nearest))
    first = problems[0]
    text = "\n".join(f"  {problem}" for problem in problems)
    return PluginError(
        f"settings of {kind}/{name}:\n{text}",
        key=first.key,
        value=first.value,
        choices=first.choices,
        nearest=first.nearest,
    )


def _literal_choices(annotation: Any) -> tuple[str, ...]:
    return tuple(str(item) for item in get_args(annotation)) if get_origin(annotation) is Literal else ()
