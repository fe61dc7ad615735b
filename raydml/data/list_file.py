"""Reads the list files of benchmarks strictly: a line that is not as it must be is reported with its number."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from raydml.data.catalog import DataError, Entry, listed

_MAX_QUOTED_LINES = 5
_MAX_QUOTED_CHARACTERS = 120


class Line(NamedTuple):
    """One line of a list: its number in the file, from 1, and its fields."""

    number: int
    fields: list[str]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file without what is blank at its end. Raises DataError: unreadable, not UTF-8, empty."""
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text in UTF-8: {error}") from error
    if lines == [""]:
        raise DataError(f"{file} is empty")
    return lines


def read_list(
    file: Path, columns: str, *, header: Sequence[str] = (), separator: str | None = None, num_header_lines: int = 0
) -> list[Line]:
    """The lines of a list after its header, each with just as many fields as there are columns.

    columns: their names, separated by blanks. separator None: a run of blanks or tabs. header: the names that the
    last of the num_header_lines must hold. Blank lines, carriage returns and a missing end of line at the end of the
    file are no fault; a blank line between others is.

    Raises DataError: a file that cannot be read or lists nothing, another header, more or fewer fields in a line.
    """
    texts = read_lines(file)
    if header and texts[num_header_lines - 1 : num_header_lines] and texts[num_header_lines - 1].split() != [*header]:
        raise DataError(
            f"{file}: line {num_header_lines} is {_short(texts[num_header_lines - 1])}; it must be {' '.join(header)!r}"
        )
    lines = [
        Line(number, [field.strip() for field in text.split(separator)])
        for number, text in enumerate(texts[num_header_lines:], start=num_header_lines + 1)
    ]
    if not lines:
        raise DataError(f"{file} ends after its header; lines with the columns {columns} must follow")
    num_fields = len(columns.split())
    wrong = [Line(n, [texts[n - 1]]) for n, fields in lines if len(fields) != num_fields or "" in fields]
    refuse_lines(file, f"must have the {num_fields} columns {columns}", wrong)
    return lines


def refuse_lines(file: Path, rule: str, wrong: Iterable[Line]) -> None:
    """Raise DataError with the rule and the first of the wrong lines, if there are any."""
    found = [f"line {number}: {_short(' '.join(fields))}" for number, fields in wrong]
    if found:
        raise DataError(f"{file}: every line {rule}; {len(found):,} do not: {listed(found, _MAX_QUOTED_LINES)}")


def whole_numbers(file: Path, lines: list[Line], column: int, most: int = 10**9) -> list[int]:
    """Column `column`, from 0, as whole numbers of 0 to `most`. Raises DataError with the lines that hold others."""
    texts = [line.fields[column] for line in lines]
    # int() alone would also take "+1", "1_0" and the digits of other scripts
    wrong = [
        line
        for line, text in zip(lines, texts, strict=True)
        if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most)
    ]
    refuse_lines(file, f"must have a whole number from 0 to {most} in column {column + 1}", wrong)
    return [int(text) for text in texts]


def refuse_faulty_entries(source: Path, entries: list[Entry]) -> None:
    """Raise DataError for what no list may hold: paths out of the folder, an image twice, a class in train and test."""
    outside = [e.path for e in entries if e.path.startswith("/") or "\\" in e.path or ".." in e.path.split("/")]
    if outside:
        raise DataError(f"{source}: {len(outside):,} paths may lead out of the folder: {listed(outside)}")
    twice = [path for path, count in Counter(entry.path for entry in entries).items() if count > 1]
    if twice:
        raise DataError(f"{source}: {len(twice):,} images are listed more than once: {listed(twice)}")
    train, test = ({entry.class_name for entry in entries if entry.part == part} for part in ("train", "test"))
    if shared := train & test:
        raise DataError(
            f"{source}: {len(shared):,} classes are in both train and test: {listed(sorted(shared))}; the parts must "
            "not share a class, so these are not the published lists"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED_CHARACTERS else text[:_MAX_QUOTED_CHARACTERS] + "...")
