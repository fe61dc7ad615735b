"""Mistakes of the user: where, what, what could be there instead, and the cure; all of them at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

if TYPE_CHECKING:  # pydantic is slow to import, and `--help` has no use for it
    from pydantic import BaseModel, ValidationError


class Absent(Enum):
    """The value of a missing key (None is a value)."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


class Problem(NamedTuple):
    """One mistake of the user.

    path: the key, written ``loss.margin``; value: the value given; choices: the values allowed; nearest: the choice
    that was probably meant; where: ``file:line`` or ``--set``, empty when unknown.
    """

    path: str
    value: Any
    message: str
    choices: tuple[Any, ...] = ()
    nearest: str | None = None
    cure: str = ""
    where: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where else ""
        shown = "" if self.value is ABSENT else f" = {_shorten(self.value)}"
        key = f"{self.path}{shown}: " if self.path or shown else ""
        lines = [f"{head}{key}{self.message}"]
        if self.choices:
            lines.append(f"    choices: {', '.join(str(choice) for choice in self.choices)}")
        if self.nearest:
            lines.append(f"    did you mean: {self.nearest}")
        if self.cure:
            lines.append(f"    cure: {self.cure}")
        return "\n".join(lines)

    def under(self, prefix: str) -> Problem:
        """Return the same problem with a prefix before its path."""
        return self._replace(path=join_path(prefix, self.path))


class ConfigError(ValueError):
    """All problems of a configuration; ``str()`` shows every one."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        assert self.problems, "a ConfigError needs a problem"
        super().__init__(self.problems)

    def __str__(self) -> str:
        number = len(self.problems)
        title = "1 problem in the configuration" if number == 1 else f"{number} problems in the configuration"
        text = "\n".join([f"{title}:", *(str(problem) for problem in self.problems)])
        return text.encode(errors="backslashreplace").decode()  # half of a surrogate pair cannot be printed


def join_path(*steps: str | int) -> str:
    """``("data", "split", "fold") -> "data.split.fold"``; empty steps are left out."""
    return ".".join(str(step) for step in steps if step != "")


def nearest_name(name: object, choices: Iterable[Any]) -> str | None:
    """Return the choice that ``name`` was probably meant to be, or None."""
    by_lower_case = {str(choice).lower(): str(choice) for choice in choices}
    close = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.6)
    return by_lower_case[close[0]] if close else None


def did_you_mean(name: object, choices: Iterable[Any]) -> str:
    """Return ``; did you mean 'margin'?``, or "" where no choice is near."""
    nearest = nearest_name(name, choices)
    return f"; did you mean {nearest!r}?" if nearest else ""


def unknown_name(path: str, value: object, choices: Sequence[Any], what: str, where: str = "") -> Problem:
    """Return the problem of a name outside a set of names; ``what`` completes "is not ..."."""
    nearest = nearest_name(value, choices)
    cure = f"write {nearest}" if nearest else "write one of the choices"
    return Problem(path, value, f"is not {what}", tuple(choices), nearest, cure, where)


def unused_key(path: str, value: object, name: str, users: Sequence[str], choices: Sequence[str]) -> Problem:
    """Return the problem of a key that `name` does not use, but `users`, which could be chosen instead, do."""
    message = f"is not used by {name}; it is by {', '.join(users)}"
    cure = f"remove {path.rpartition('.')[2]}, or set name to {' or '.join(users)}"
    return Problem(path, value, message, tuple(choices), None, cure)


def problems_from(error: ValidationError, model: type[BaseModel], raw: Any) -> list[Problem]:
    """Return pydantic's errors of validating ``raw`` as ``model`` as problems, one for each key."""
    found: dict[str, Problem] = {}
    problems = []
    for item in error.errors(include_url=False):
        steps = _steps_in(raw, item["loc"], keep_last=item["type"] == "missing")
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):
            problems += [problem.under(join_path(*steps)) for problem in inner.problems]
            continue
        problem = _translate(dict(item), steps, model, raw)
        earlier = found.get(problem.path)
        if earlier is None:
            found[problem.path] = problem
        else:  # one value, several allowed kinds (a number or auto): one problem that names them all
            found[problem.path] = earlier._replace(
                message=f"{earlier.message}, or {problem.message}", choices=earlier.choices + problem.choices
            )
    return [*found.values(), *problems]


def problem_of_option(error: ValidationError, option: str) -> Problem:
    """Return pydantic's error about the value of an option or argument of a command as a problem."""
    from pydantic import BaseModel

    item = error.errors(include_url=False)[0]
    value, _, choices = item["msg"].partition(" is not one of ")
    if choices:
        return unknown_name(option, value.rpartition(", ")[2].strip("'"), _quoted(choices), "one of the choices")
    return _translate(dict(item), (), BaseModel, item["input"])._replace(path=option)


_BOUNDS = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">="), "less_than": ("lt", "<")}
_BOUNDS["less_than_equal"] = ("le", "<=")
_TYPES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "finite_number": "must be a finite number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "is too large",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "is_instance_of": "must be a path",
    "string_unicode": "has characters that cannot be written as UTF-8",
    "invalid_key": "is not a usable key",
    "model_attributes_type": "must be a block of keys",
    "model_type": "must be a block of keys",
    "dict_type": "must be a block of keys",
}


def _translate(item: dict[str, Any], steps: tuple[str | int, ...], model: type[BaseModel], raw: Any) -> Problem:
    path, value, kind, facts = join_path(*steps), item["input"], item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(steps, value, model, raw)
    if kind == "missing":
        return Problem(path, ABSENT, "is required and missing", cure="add this key")
    if kind == "union_tag_not_found":
        choices = _tags(_models_at(model, steps))
        return Problem(join_path(path, "name"), ABSENT, "is required and missing", choices, cure="add this key")
    if kind == "union_tag_invalid":
        return unknown_name(join_path(path, "name"), facts["tag"], _quoted(facts["expected_tags"]), "a known name")
    if kind == "literal_error":
        return unknown_name(path, value, _quoted(facts["expected"]), "one of the choices")
    if kind in _BOUNDS:
        key, sign = _BOUNDS[kind]
        bound = f"{sign} {facts[key]:g}"
        return Problem(path, value, f"must be {bound}", cure=f"give a number {bound}")
    if kind in ("too_short", "too_long"):
        bound = f"at least {facts['min_length']}" if kind == "too_short" else f"at most {facts['max_length']}"
        return Problem(path, value, f"must have {bound} item(s)", cure=f"give {bound}")
    if kind in _TYPES:
        return Problem(path, value, _TYPES[kind], cure=_cure_of_type(kind, value))
    # The words of a validator's ValueError, without the library's own before them.
    message = re.sub("^(Value error|Assertion failed), ", "", item["msg"]).replace("Input should be", "must be")
    return Problem(path, value, message[:1].lower() + message[1:])


def _unknown_key(steps: tuple[str | int, ...], value: Any, model: type[BaseModel], raw: Any) -> Problem:
    """Return the problem of an unknown key, or of one that only a sibling (another optimizer) uses."""
    *parents, key = steps
    siblings = _models_at(model, tuple(parents))
    owner = _chosen(siblings, _value_at(raw, tuple(parents)))
    owners = tuple(tag for sibling in siblings if key in sibling.model_fields for tag in _tags([sibling]))
    choices = tuple(name for name in owner.model_fields if name != "name") if owner else ()
    if owners and owner is not None:
        return unused_key(join_path(*steps), value, _tags([owner])[0], owners, choices)
    nearest = nearest_name(key, choices)
    cure = f"write {nearest}" if nearest else "remove it"
    return Problem(join_path(*steps), value, "is an unknown key", choices, nearest, cure)


def _cure_of_type(kind: str, value: object) -> str:
    if isinstance(value, Mapping) and len(value) == 1 and kind != "model_attributes_type":
        return "give one value, or a domain such as {choice: [...]} or {uniform: [low, high]}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value):
        return f"write {value} without quotes"
    examples = {
        "int_type": "8",
        "is_instance_of": "images",
        "invalid_key": "embedding_dim",
        "float_type": "0.1",
        "bool_type": "true",
        "tuple_type": "[1, 2]",
    }
    if kind in examples:
        return f"give a value such as {examples[kind]}"
    return "give keys and values, such as {name: ...}" if "block" in _TYPES[kind] else ""


def _steps_in(raw: Any, loc: tuple[str | int, ...], keep_last: bool) -> tuple[str | int, ...]:
    """Return pydantic's location without the tags of unions, which are not in the file."""
    steps: list[str | int] = []
    here = raw
    for number, step in enumerate(loc):
        inside = (isinstance(here, Mapping) and step in here) or (
            isinstance(here, list | tuple) and isinstance(step, int) and step < len(here)
        )
        if inside:
            here = here[step]
            steps.append(step)
        elif keep_last and number == len(loc) - 1:
            steps.append(step)
    return tuple(steps)


def _value_at(raw: Any, steps: tuple[str | int, ...]) -> Any:
    for step in steps:
        raw = raw[step]
    return raw


def _models_at(model: type[BaseModel], steps: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """Return the models that are possible at a place: several where a name chooses."""
    models = [model]
    for step in steps:
        fields = [candidate.model_fields[str(step)] for candidate in models if str(step) in candidate.model_fields]
        models = [found for field in fields for found in _models_in(field.annotation)]
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _tags(models: Sequence[type[BaseModel]]) -> tuple[str, ...]:
    fields = (model.model_fields.get("name") for model in models)
    return tuple(str(tag) for field in fields if field is not None for tag in get_args(field.annotation))


def _chosen(models: Sequence[type[BaseModel]], raw: Any) -> type[BaseModel] | None:
    if len(models) == 1:
        return models[0]
    name = raw.get("name") if isinstance(raw, Mapping) else None
    return next((model for model in models if name in _tags([model])), None)


def _quoted(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"'([^']*)'", text))


def _shorten(value: object, limit: int = 120) -> str:
    text = repr(value) if isinstance(value, str) else _as_yaml(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _as_yaml(value: object) -> str:
    """Return a value as written in a file: true, null, {name: margin}."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_as_yaml(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
