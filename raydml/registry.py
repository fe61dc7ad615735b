"""Losses, miners, samplers, searchers ... by name: the folder is the registry, the constructor is the schema.

A plugin is one file `raydml/<kind>/<name>.py` with one public class. Before the `*` its constructor takes parts of the
trial (CONTEXT); after the `*` are its settings: typed keywords with defaults, limits written into the type with
a description of each (`margin: Annotated[float, Field(gt=0, description="...")] = 0.2`). Adding a plugin is adding its
file and its test file.

The signature is read from the source, so that settings are listed and checked without the modules that the plugin
itself imports (torch takes longer than everything else). Only `load` and `build` import it. A name in a type or a
default is taken from where the file imports it, so that import should be a quick one. A file whose signature cannot be
read this way is imported: correct, and slower.
"""

import ast
import functools
import importlib
import inspect
import logging
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WithJsonSchema, create_model

# That of typing hides ADDED_LATER before Python 3.11, where the default is None.
from typing_extensions import get_type_hints

from raydml.errors import ABSENT, ConfigError, Problem, problems_from, unknown_name, unused_key

_logger = logging.getLogger("raydml")

PACKAGE = Path(__file__).parent
KINDS = ("losses", "miners", "regularizers", "samplers", "methods", "searchers")

# What a constructor may take before its `*`. Anything else there is a mistake in the plugin.
CONTEXT = (
    *("num_classes", "embedding_dim", "network", "loss", "make_loss", "miner", "labels"),
    *("train_labels", "num_epochs", "make_objective", "make_sampler"),
    *("tree", "study_seed", "first_points"),
)


class _AddedLater(Enum):
    """The type of ADDED_LATER."""

    ADDED_LATER = "added later"


#: In the type of a setting, `Annotated[float, ADDED_LATER, ...] = 0.0`: configurations from before it existed lack it.
#: A block leaves it out at its default, so that their fingerprints remain what they were.
ADDED_LATER = _AddedLater.ADDED_LATER

# `build` and the plugin block of a configuration use these words themselves.
RESERVED = ("kind", "name")


class PluginError(TypeError):
    """A plugin whose file breaks the rules of the module's header, or one built without what it needs of the trial."""


def names(kind: str) -> tuple[str, ...]:
    """Return the plugins of a kind, sorted: the files in its folder whose names do not start with an underscore."""
    assert kind in KINDS, f"{kind!r} is not one of {', '.join(KINDS)}"
    return tuple(sorted(path.stem for path in (PACKAGE / kind).glob("*.py") if not path.stem.startswith("_")))


def load(kind: str, name: str) -> type:
    """Return the class of a plugin. Raises ConfigError for an unknown name, PluginError for a wrong file."""
    _refuse_unknown(kind, name)
    return public_class(importlib.import_module(f"raydml.{kind}.{name}"))


def _refuse_unknown(kind: str, name: str) -> None:
    if name not in names(kind):
        raise ConfigError([unknown_name("name", name, names(kind), f"one of the {kind}")])


def public_class(module: ModuleType) -> type:
    """Return the one class without a leading underscore that the module itself defines (imports do not count)."""
    found = [
        value
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if len(found) != 1:
        raise _not_one_class(module.__name__, [cls.__name__ for cls in found])
    return found[0]


def _not_one_class(module: str, found: list[str]) -> PluginError:
    return PluginError(
        f"{module}: a plugin file defines exactly one public class, found {', '.join(found) or 'none'}. "
        "Give the others a leading underscore or a file of their own."
    )


@functools.cache
def signature(kind: str, name: str) -> type:
    """Return a class with the constructor's signature, the docstring and the names of a plugin, and no code.

    Compiled from the parts of the file that the settings need: their types and defaults, and the statements of the
    module that define the names in them. Where these are not enough, such as for a default that is an attribute of the
    class, the class itself: the file is imported. Raises ConfigError for an unknown name, PluginError for a wrong file.
    """
    _refuse_unknown(kind, name)
    path = PACKAGE / kind / f"{name}.py"
    module = ModuleType(f"raydml.{kind}.{name}")
    source = ast.parse(path.read_bytes(), str(path))
    classes = [node for node in source.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    if len(classes) != 1:
        raise _not_one_class(module.__name__, [node.name for node in classes])
    only = ast.ClassDef(classes[0].name, [], [], _docstring_and_signature(classes[0]), [])
    body = [*_definitions(source.body, only), only]
    code = compile(ast.fix_missing_locations(ast.Module(body, [])), str(path), "exec")
    try:
        exec(code, vars(module))
        found: type = vars(module)[only.name]
        get_type_hints(found.__init__)  # type: ignore[misc]
    except Exception as error:  # of the author's statements without the rest of the file: may be anything
        _logger.debug("%s is imported to read its settings: %s", path, error)
        try:
            return load(kind, name)
        except PluginError:
            raise
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"
            raise PluginError(f"{path} cannot be imported: {reason}. Mend or remove the file.") from failure
    return found


def _docstring_and_signature(plugin: ast.ClassDef) -> list[ast.stmt]:
    """Return the body of a class that has the docstring of a plugin and its constructor, which does nothing.

    The types of the parameters before the `*` are left out: they are parts of a trial, not settings.
    """
    body: list[ast.stmt] = [ast.Expr(ast.Constant(ast.get_docstring(plugin) or ""))]
    for node in plugin.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for parameter in (*node.args.posonlyargs, *node.args.args):
                parameter.annotation = None
            node.body, node.returns, node.decorator_list = [ast.Pass()], None, []
            body.append(node)
    return body


def _definitions(statements: list[ast.stmt], used_in: ast.stmt) -> list[ast.stmt]:
    """Return the statements of a module, in order, that define the names used in a statement, and those used in them.

    `from __future__` imports always belong to them.
    """
    needed, used = set[int](), _names_in(used_in)
    found = True
    while found:
        new = [
            number
            for number, node in enumerate(statements)
            if number not in needed and (_defined_by(node) & used or getattr(node, "module", "") == "__future__")
        ]
        found = bool(new)
        needed |= set(new)
        used |= set().union(*(_names_in(statements[number]) for number in new))
    return [statements[number] for number in sorted(needed)]


def _names_in(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _defined_by(node: ast.stmt) -> set[str]:
    """Return the names that a statement of a module binds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}


def describe(kind: str, name: str) -> str:
    """Return the first line of the class's docstring."""
    return (inspect.getdoc(signature(kind, name)) or "").partition("\n")[0]


def source(kind: str, name: str) -> str:
    """Return the paper of a plugin: the part after the colon in the first line of its module's docstring."""
    path = PACKAGE / kind / f"{name}.py"
    _refuse_unknown(kind, name)
    document = ast.get_docstring(ast.parse(path.read_bytes(), str(path)))
    return (document or "").partition("\n")[0].partition(": ")[2]


@functools.cache
def settings_model(kind: str, name: str) -> type[BaseModel]:
    """Return the settings of a plugin, with their defaults, as a frozen pydantic model.

    The model is strict: an int passes for a float, a bool or a string never passes for a number, NaN, infinities and
    unknown keys are refused. Raises ConfigError for an unknown name, PluginError for a constructor that breaks the
    rules.
    """
    return constructor_model(signature(kind, name))


def constructor_model(cls: type) -> type[BaseModel]:
    """Return the settings model of a class, read from the keyword-only parameters of its constructor."""
    try:
        hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    except NameError as error:
        raise PluginError(
            f"{cls.__module__}.{cls.__name__}: a type in the constructor is not there at run time: {error}. Import it "
            "outside `if TYPE_CHECKING:`."
        ) from error
    fields: dict[str, Any] = {}
    for parameter in _parameters(cls):
        where = f"{cls.__module__}.{cls.__name__}: parameter {parameter.name!r}"
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            if parameter.name not in CONTEXT or parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                raise PluginError(
                    f"{where} is not a part of a trial ({', '.join(CONTEXT)}). "
                    "Settings go after the `*`, each by its own name."
                )
            continue
        if parameter.name in CONTEXT + RESERVED:
            raise PluginError(f"{where} may not be a setting: the word is taken. Rename it.")
        if parameter.default is inspect.Parameter.empty or parameter.name not in hints:
            raise PluginError(f"{where} is a setting and needs a type and a default.")
        fields[parameter.name] = (hints[parameter.name], parameter.default)
    config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)
    return create_model(f"{cls.__name__}Settings", __config__=config, **fields)


def checked_settings(kind: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting of a plugin, those not given at their defaults. Raises ConfigError with every mistake.

    A setting that is ADDED_LATER is left out at its default.
    """
    model = settings_model(kind, name)
    try:
        checked = model.model_validate(dict(given)).model_dump()
    except ValidationError as error:
        problems = problems_from(error, model, given)
    else:
        at_default = {
            key
            for key, field in model.model_fields.items()
            if ADDED_LATER in field.metadata and checked[key] == field.default
        }
        return {key: value for key, value in checked.items() if key not in at_default}
    raise ConfigError([_with_its_users(kind, name, problem) for problem in problems])


def checked_block(kind: str, block: Any) -> dict[str, Any]:
    """Return a plugin by name, ``{"name": ..., **settings}``, with `checked_settings`. Raises ConfigError."""
    if not isinstance(block, Mapping):
        cure = f"write {{name: {block}}}" if isinstance(block, str) else "write {name: ...}"
        raise ConfigError([Problem("", block, "must be a block of keys", cure=cure)])
    if "name" not in block:
        raise ConfigError([Problem("name", ABSENT, "is required and missing", names(kind), cure="add this key")])
    _refuse_unknown(kind, block["name"])
    settings = {key: value for key, value in block.items() if key != "name"}
    return {"name": block["name"], **checked_settings(kind, block["name"], settings)}


# The type of a setting that is itself a plugin by name. The keyword `plugins` says in the schema of which kind.
LossSetting = Annotated[
    dict[str, Any],
    BeforeValidator(functools.partial(checked_block, "losses")),
    WithJsonSchema({"type": "object", "plugins": "losses"}),
]
MinerSetting = Annotated[
    dict[str, Any],
    BeforeValidator(functools.partial(checked_block, "miners")),
    WithJsonSchema({"type": "object", "plugins": "miners"}),
]


def build(kind: str, name: str, **arguments: Any) -> Any:
    """Return an instance of the plugin.

    Arguments named in CONTEXT (num_classes=, embedding_dim=, ...) are parts of the trial and are passed only to a
    constructor that takes them; all others are settings. Raises ConfigError with every setting that is unknown, of the
    wrong type or out of range, PluginError where a part of the context is missing, and ValueError, with the reason,
    where settings exclude each other.
    """
    cls = load(kind, name)
    given = {key: value for key, value in arguments.items() if key not in CONTEXT}
    try:
        settings = checked_settings(kind, name, given)
    except ConfigError as error:
        raise ConfigError(problem.under(f"{kind}/{name}") for problem in error.problems) from None
    takes = [parameter for parameter in _parameters(cls) if parameter.name in CONTEXT]
    context = {parameter.name: arguments[parameter.name] for parameter in takes if parameter.name in arguments}
    missing = [p.name for p in takes if p.default is inspect.Parameter.empty and p.name not in context]
    if missing:
        given_as = ", ".join(f"{key}=..." for key in missing)
        raise PluginError(f"{kind}/{name} needs {' and '.join(missing)}: pass {given_as} to build")
    return cls(**context, **settings)


def _parameters(cls: type) -> list[inspect.Parameter]:
    """Return the constructor's parameters without self; none where the class has no constructor of its own."""
    if "__init__" not in vars(cls):
        return []
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]


def _with_its_users(kind: str, name: str, problem: Problem) -> Problem:
    """Replace an unknown key by one that other plugins of the kind use, where there are some."""
    known = tuple(settings_model(kind, name).model_fields)
    if "." in problem.path or problem.path in known:
        return problem
    users = tuple(other for other in names(kind) if problem.path in settings_model(kind, other).model_fields)
    return unused_key(problem.path, problem.value, name, users, known) if users else problem
