"""YAML 1.2 scalars, with the line of every value.

`1e-4`, `1E5` and `.5e-3` are numbers (PyYAML reads texts), only true and false are booleans (`no`, `on` are texts),
and there are no dates. Refused, each with its line: a key written twice, tags, merge keys, keys that are not texts, an
alias that contains itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from raydml.errors import ABSENT, Problem, join_path


@dataclass(frozen=True)
class Node:
    """A value and its place.

    value: None, bool, int, float, str, a list of Nodes, a dict of text -> Node, or a domain (from domains.py). where:
    ``file:line``, or ``--set``.
    """

    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    # Its own table: the base class shares one among all loaders.
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


_FLOAT = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(text: str, source: str, *, lines: bool = True) -> tuple[Node | None, list[Problem]]:
    """Return the document as a tree of Nodes, None where it is not YAML, and the problems found.

    source: the file in ``where``, followed by the line number unless ``lines`` is false.
    """
    reader = _Reader(source, lines)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        return None, [reader.syntax_problem(error)]
    if root is None:
        return Node(None, reader.where(0)), []
    return reader.node(root, ()), reader.problems


_KINDS = ("null", "bool", "int", "float", "str", "merge", "map", "seq")


def _scalar(kind: str, text: str) -> Any:
    """Return a scalar of a kind. Raises ValueError where a tag forces a kind that the text is not."""
    match kind:
        case "null":
            return None
        case "bool":
            if text.lower() not in ("true", "false"):
                raise ValueError(text)
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


class _Reader:
    """Converts PyYAML's nodes to Nodes and collects problems."""

    def __init__(self, source: str, lines: bool) -> None:
        self.source = source
        self.lines = lines
        self.problems: list[Problem] = []
        self._open: list[yaml.Node] = []

    def where(self, line: int) -> str:
        return f"{self.source}:{line + 1}" if self.lines else self.source

    def syntax_problem(self, error: yaml.YAMLError) -> Problem:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        detail = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        where = self.where(mark.line) if mark else self.source
        column = f" (column {mark.column + 1})" if mark else ""
        cure = "check brackets, quotes, colons and indentation on this line and the one above"
        return Problem("", ABSENT, f"is not YAML: {detail}{column}", cure=cure, where=where)

    def node(self, node: yaml.Node, path: tuple[str | int, ...]) -> Node:
        where = self.where(node.start_mark.line)
        if any(node is ancestor for ancestor in self._open):
            self._report(path, where, "contains itself through an alias", "write it out")
            return Node(None, where)
        self._open.append(node)
        try:
            return Node(self._value(node, path, where), where)
        finally:
            self._open.pop()

    def _value(self, node: yaml.Node, path: tuple[str | int, ...], where: str) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        value: Any = None
        try:
            value = _scalar(kind, node.value) if isinstance(node, yaml.ScalarNode) else None
        except ValueError:
            kind = "unreadable"
        if kind not in _KINDS:
            self._report(path, where, f"has the tag {node.tag}, and tags are not used here", "remove the tag")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.node(item, (*path, number)) for number, item in enumerate(node.value)]
        return value

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = self.where(key_node.start_mark.line)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag != "tag:yaml.org,2002:str":
                shown = "<<" if key == "<<" else yaml.serialize(key_node).strip()
                self._report((*path, shown), where, "is not a usable key", "write the key as a plain text")
                continue
            if key in entries:
                message = f"is written twice, first at {entries[key].where}"
                self._report((*path, key), where, message, "keep one of the two")
                continue
            # The line of the key, not of the value.
            entries[key] = Node(self.node(value_node, (*path, key)).value, where)
        return entries

    def _report(self, path: tuple[str | int, ...], where: str, message: str, cure: str) -> None:
        self.problems.append(Problem(join_path(*path), ABSENT, message, cure=cure, where=where))
