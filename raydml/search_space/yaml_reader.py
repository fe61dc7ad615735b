"""YAML 1.2 scalars, with the line of every value.

`1e-4`, `1E5` and `.5e-3` are numbers (PyYAML reads texts), only true and false are booleans (`no`, `on` are texts),
and there are no dates. Refused, each with its line: a key written twice, tags, merge keys, keys that are not texts, an
alias that contains itself, more levels, values (as aliases multiply them) or digits than any configuration has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from raydml.errors import ABSENT, ConfigError, Problem, join_path


@dataclass(frozen=True)
class Node:
    """A value and its place.

    value: None, bool, int, float, str, a list of Nodes, a dict of text -> Node, or a domain (from domains.py). where:
    ``file:line``, or ``--set``.
    """

    value: Any
    where: str


_MAX_LEVELS = 50
_MAX_VALUES = 100_000
_MAX_BYTES = 1_000_000
_MAX_INT = 2**63  # what numpy, torch and JSON readers can hold
# Halves of letters beyond U+FFFF, and bytes of a command line that is not UTF-8 (U+DC80 to U+DCFF).
_SURROGATES = re.compile("[\ud800-\udfff]")
_NO_TEXT = re.compile("[\ud800-\udc7f\udd00-\udfff]")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, and with file names that are not UTF-8."""

    NON_PRINTABLE = re.compile(  # type: ignore[misc]
        "[^\t\n\r -~\x85\xa0-\ud7ff\udc80-\udcff\ue000-\ufffd\U00010000-\U0010ffff]"
    )

    # Its own table: the base class shares one among all loaders.
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


_FLOAT = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def decoded_yaml(content: bytes, source: str) -> str:
    """Return the text of a YAML file, which is UTF-8. Raises ConfigError for another encoding and for a huge file."""
    if len(content) > _MAX_BYTES:
        message = f"has {len(content):,} bytes, and a configuration at most {_MAX_BYTES:,}"
        raise ConfigError([Problem("", ABSENT, message, cure="write a file of a few hundred lines", where=source)])
    zeros_between_letters = content[:2].count(0) == 1
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or zeros_between_letters:
        cure = "save the file in UTF-8, which an editor offers when saving (iconv -f UTF-16 -t UTF-8 does it, too)"
        raise ConfigError([Problem("", ABSENT, "is text in UTF-16, not in UTF-8", cure=cure, where=f"{source}:1")])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8: byte 0x{content[error.start]:02x}"
        cure = "save the file in UTF-8"
        raise ConfigError([Problem("", ABSENT, message, cure=cure, where=f"{source}:{line}")]) from error


def read_yaml(text: str, source: str, *, lines: bool = True) -> tuple[Node | None, list[Problem]]:
    """Return the document as a tree of Nodes, None where it is not YAML, and the problems found.

    source: the file in ``where``, followed by the line number unless ``lines`` is false.
    """
    reader = _Reader(source, lines)
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return Node(None, reader.where(0)), []
        return reader.node(root, ()), reader.problems
    except yaml.YAMLError as error:
        return None, [reader.syntax_problem(error, text)]
    except RecursionError:
        return None, [reader.too_large(_deepest_line(text), f"has more than {_MAX_LEVELS} levels of lists and blocks")]
    except _TooLargeError as error:
        return None, [error.problem]


def _deepest_line(text: str) -> int:
    """Return the line, from 0, where a document opens more lists and blocks than are read."""
    levels = 0
    for event in yaml.parse(text, Loader=_Loader):  # without recursion
        levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if levels > _MAX_LEVELS:
            return event.start_mark.line if event.start_mark else 0
    return 0


class _TooLargeError(Exception):
    """Ends the reading of a document that no configuration can be."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


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
            # Python refuses to read more than 4,300 digits, and a number of 20 digits is beyond the limit already.
            number = int(text) if len(text) <= 20 else _MAX_INT
            if abs(number) >= _MAX_INT:
                raise OverflowError(text)
            return number
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
        self._num_values = 0

    def where(self, line: int) -> str:
        return f"{self.source}:{line + 1}" if self.lines else self.source

    def too_large(self, line: int, message: str) -> Problem:
        return Problem("", ABSENT, message, cure="write a file of a few hundred lines", where=self.where(line))

    def syntax_problem(self, error: yaml.YAMLError, text: str) -> Problem:
        if isinstance(error, yaml.reader.ReaderError):
            line = text.count("\n", 0, error.position)
            letter = error.character if isinstance(error.character, str) else chr(error.character)
            message = f"holds the character U+{ord(letter):04X}, which no YAML file may hold"
            cure = "remove it, or save the file again in UTF-8"
            return Problem("", ABSENT, message, cure=cure, where=self.where(line))
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        detail = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        where = self.where(mark.line) if mark else self.source
        column = f" (column {mark.column + 1})" if mark else ""
        cure = "check brackets, quotes, colons and indentation on this line and the one above"
        return Problem("", ABSENT, f"is not YAML: {detail}{column}", cure=cure, where=where)

    def node(self, node: yaml.Node, path: tuple[str | int, ...]) -> Node:
        where = self.where(node.start_mark.line)
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            message = f"has more than {_MAX_VALUES:,} values, as aliases multiply them"
            raise _TooLargeError(self.too_large(node.start_mark.line, message))
        if len(self._open) > _MAX_LEVELS:
            message = f"has more than {_MAX_LEVELS} levels of lists and blocks"
            raise _TooLargeError(self.too_large(node.start_mark.line, message))
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
            if isinstance(value, str) and "\0" in value:
                self._report(path, where, "holds the character U+0000, which no name or path has", "remove \\0")
            if isinstance(value, str) and _SURROGATES.search(value):
                value = value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
                if _NO_TEXT.search(value):
                    self._report(path, where, "holds half of a letter, \\ud800 to \\udfff", "write the whole letter")
        except OverflowError:
            message = f"is a whole number of {len(node.value.lstrip('+-')):,} digits, and at most 18 are used here"
            self._report(path, where, message, "write a smaller number")
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
