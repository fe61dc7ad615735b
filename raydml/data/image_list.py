"""The user's own images in a CSV list: path, label and, if wished, split and role."""

import csv
import io
import os
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from raydml.data.catalog import PARTS, ROLES, DataError, ImageEntry, ImageFile, find_files, listed, log_notes
from raydml.data.class_names import join_spellings, readable
from raydml.data.formats import CONVERT, LIST_SUFFIXES, count_suffixes, is_undecoded
from raydml.ops.wording import counted

_COLUMNS = ("path", "label", "split", "role")  # the first two are required
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_MAX_NUM_LINES = 20  # with problems, in one message
_LINE_END = re.compile(r"\r\n|\r|\n")
_EXCELS_LINE = re.compile(r'"?sep=(.)"?\r?\n')


class ListedImages(NamedTuple):
    """The images of a list. notes: see `Catalog`."""

    files: list[ImageFile]
    notes: tuple[str, ...]


class _Record(NamedTuple):
    """One line of a list, or several where a quoted value has line breaks. line: the first of them, from 1."""

    line: int
    values: list[str]


def read_image_list(root: Path, list_file: str | None, group: str | None = None) -> ListedImages:
    """Return the images of a CSV file with the columns path,label[,split][,role]; other columns are ignored.

    Values are separated by commas, semicolons or tabs; the file is UTF-8 or, with a byte order mark, UTF-16. path:
    relative to root, with "/" or, where no such file exists, with the backslashes of Windows or in another Unicode
    spelling. label: any text, kept as it is ("007", "NA"), but one class for all Unicode spellings of a name. split:
    train, val or test, for every image or for none. role: query or gallery, for every image of a part or for none of
    it; not in train, where nothing would use it. group: the column of the second label, with a value for every image.

    Raises DataError with all faults and their lines at once: missing columns or values, a column twice, an open quote,
    other splits or roles, paths listed twice, outside root or missing on the disk, suffixes that cannot be decoded, a
    part with roles without a query or without a gallery image.
    """
    if list_file is None:
        raise DataError("data.name = 'image_list' needs data.list_file, a CSV file with the columns path,label")
    file = root / Path(list_file).expanduser()
    key = f"data.list_file = {str(file)!r}"
    lines: dict[str, int] = {}  # path as listed -> line
    entries: list[ImageEntry] = []
    problems: list[str] = []
    for number, fields in _fields(_text_of(file, key), key, group):
        entry = _entry_of(fields, group)
        if isinstance(entry, str):
            problems.append(f"line {number}: {entry}")
        elif entry.path in lines:
            problems.append(
                f"line {number}: {fields['path']!r} is listed twice, first in line {lines[entry.path]}; remove "
                "one (it would find itself)"
            )
        else:
            lines[entry.path] = number
            entries.append(entry)
    if len(problems) > _MAX_NUM_LINES:
        problems[_MAX_NUM_LINES:] = [f"and {len(problems) - _MAX_NUM_LINES} more lines with problems"]
    classes, notes = join_spellings(entry.class_name for entry in entries)
    entries = [entry._replace(class_name=classes[entry.class_name]) for entry in entries]
    files, missing = _find(root, entries)
    if len(set(found := [file.path for file in files])) < len(found):
        twice = sorted(path for path, count in Counter(found).items() if count > 1)
        problems.append(
            f"{len(twice)} files are listed twice, in different spellings: {listed(twice)}; remove one each"
        )
    if missing:
        named = listed(f"{text} in line {lines[path]}" for path, text in missing.items())
        problems.append(
            f"{len(missing)} of {len(entries)} files do not exist under {root}: {named}; paths are relative to "
            "machine.data_root: correct them, or remove these lines"
        )
    if undecoded := [entry.path for entry in entries if is_undecoded(entry.path)]:
        named = listed(f"{path} in line {lines[path]}" for path in undecoded)
        problems.append(f"files that cannot be decoded ({count_suffixes(undecoded)}): {named}; {CONVERT}")
    if not entries and not problems:
        problems.append("lists no image")
    problems += _split_problems(entries) + _role_problems(entries)
    if problems:
        raise DataError(f"{key}: " + "\n".join(problems))
    return ListedImages(files, (*notes, *_role_notes(entries)))


def find_list(root: Path) -> str | None:
    """Return the name of the list in a folder: its only CSV file with the columns path and label; None without one.

    Where there are several, none is chosen, and a note names them. A file that cannot be read is no list, and a note
    says so.
    """
    found = []
    for file in sorted(root.iterdir()):
        if file.suffix.lower() in LIST_SUFFIXES and file.is_file():
            name = readable(str(file))
            try:
                with open(file, "rb") as handle:
                    start = _decoded(handle.read(65_536))
                header = next(_records(start, _separator_of(start), name), _Record(1, []))
            except (OSError, ValueError) as error:  # ValueError: of the csv module, too
                log_notes([f"{name} cannot be read and is not taken as a list of images: {error}"])
                continue
            if set(_COLUMNS[:2]) <= {column.strip() for column in header.values}:
                found.append(file.name)
    if len(found) > 1:
        one = f"--set trial.data.name=image_list --set trial.data.list_file={shlex.quote(found[0])}"
        log_notes([f"{root} holds {len(found)} lists of images ({listed(found)}), and none is used; to use one: {one}"])
    return found[0] if len(found) == 1 else None


def _text_of(file: Path, key: str) -> str:
    try:
        raw = file.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{key} does not exist; the path is taken relative to machine.data_root") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        raise DataError(f"{key} cannot be read: {error}; give a CSV file with the columns path,label") from error
    text = _decoded(raw)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{key}: line {line} is not text in UTF-8; save the list as CSV in UTF-8")
    return text


def _decoded(raw: bytes) -> str:
    """Return the text of a list. Bytes that are not UTF-8 are kept: they may be those of a file name."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace")
    return raw.decode("utf-8-sig", "surrogateescape")


def _without_excels_line(text: str) -> str:
    return text[found.end() :] if (found := _EXCELS_LINE.match(text)) else text


def _separator_of(text: str) -> str:
    """Return what separates the columns of the first line; Excel may say so in a line of its own (sep=;)."""
    if found := _EXCELS_LINE.match(text):
        return found[1]
    header = _LINE_END.split(text, maxsplit=1)[0]
    # The separator that yields the columns decides; where none does, the most frequent one makes the message readable.
    return max(_SEPARATORS, key=lambda mark: (_num_columns(header, mark), header.count(mark)))


def _num_columns(header: str, mark: str) -> int:
    return len({column.strip(' \t"') for column in header.split(mark)} & set(_COLUMNS))


def _fields(text: str, key: str, group: str | None) -> list[tuple[int, dict[str, str]]]:
    """Return the line and the values of _COLUMNS and of the group ("" if absent) of each record."""
    names = (*_COLUMNS, *([] if group in (None, *_COLUMNS) else [str(group)]))
    separator = _separator_of(text)
    records = _records(text, separator, key)
    header = next(records, _Record(1, []))
    columns = [column.strip() for column in header.values]
    if twice := [column for column in names if columns.count(column) > 1]:
        raise DataError(
            f"{key}: line {header.line} has the column {' and the column '.join(twice)} twice: {', '.join(columns)}; "
            "remove or rename one of the two"
        )
    if lacking := [column for column in _COLUMNS[:2] if column not in columns]:
        raise DataError(
            f"{key} has no column {' and no column '.join(lacking)}; line {header.line} has, separated by "
            f"{_SEPARATORS.get(separator, repr(separator))}: {', '.join(columns) or 'none'}. Name the columns in the "
            "first line: path,label and optionally split,role, separated by commas, semicolons or tabs"
        )
    if group is not None and group not in columns:
        raise DataError(f"{key} has no column {group!r} (data.group); line {header.line} has: {', '.join(columns)}")
    places = {column: columns.index(column) for column in names if column in columns}
    found, too_long = [], []
    for line, values in records:
        if len(values) > len(columns):
            too_long.append(line)
        fields = {name: values[place].strip() for name, place in places.items() if place < len(values)}
        if _LINE_END.search("".join(fields.values())):
            raise DataError(f"{key}: {_open_quote(text, line)}")
        found.append((line, {name: fields.get(name, "") for name in names}))
    if too_long:
        raise DataError(
            f"{key}: {len(too_long)} lines have more values than the header has columns: {listed(too_long)}; put "
            f'paths and labels that hold a {separator!r} in double quotes: "a{separator}b.jpg"{separator}label'
        )
    return found


def _records(text: str, separator: str, key: str) -> Iterator[_Record]:
    """Yield the records of a list that are not empty. Raises DataError with the line where a quote opens."""
    body = _without_excels_line(text)
    skipped = 1 if len(body) < len(text) else 0
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=separator, strict=True)
    begins = 1 + skipped
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{key}: {_open_quote(text, begins)} ({error})") from error
        if values:
            yield _Record(begins, values)
        begins = reader.line_num + 1 + skipped


def _open_quote(text: str, line: int) -> str:
    shown = _LINE_END.split(text)[line - 1].strip()
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return (
        f"line {line}: a double quote opens here and is not closed in this line: {shown}; close it, remove it, or "
        "write a quote inside a quoted value twice"
    )


def _entry_of(fields: dict[str, str], group: str | None) -> ImageEntry | str:
    """Return the image of one line, or the problem with the line."""
    path, label, part, role = (fields[column] for column in _COLUMNS)
    if not path or not label:
        return "path or label is empty; give both, or remove the line"
    plain = _plain(path)
    if _leaves(plain) or os.path.isabs(path):
        return f"{path!r} leaves machine.data_root; give paths relative to it"
    if part not in ("", *PARTS):
        return f"split = {part!r}; choices: {', '.join(PARTS)}, or no split at all"
    if role not in ("", *ROLES):
        return f"role = {role!r}; choices: {', '.join(ROLES)}, or no role at all"
    if role and part == "train":
        return f"role = {role!r} with split = 'train'; training images have no roles: leave it empty"
    if group is not None and not fields[group]:
        return f"{group} is empty (data.group); give each image a group"
    return ImageEntry(plain, label, part, role, group=fields[group] if group is not None else "")


def _plain(path: str) -> str:
    return os.path.normpath(path).replace(os.sep, "/")


def _leaves(plain: str) -> bool:
    return plain in (".", "..") or plain.startswith(("/", "../"))


def _find(root: Path, entries: Sequence[ImageEntry]) -> tuple[list[ImageFile], dict[str, str]]:
    """Return the files of a list, and path as listed -> path with the reason, of those that do not exist.

    A path is tried as it is and, where there is no such file, in its other spellings.
    """
    files, missing = find_files(root, entries)
    if not missing:
        return files, {}
    present = {file.path for file in files}
    absent = [entry for entry in entries if entry.path not in present]
    spellings = [(entry, entry._replace(path=path)) for entry in absent for path in _spellings(entry.path)]
    others, _ = find_files(root, [spelled for _, spelled in spellings])
    by_path = {file.path: file for file in others}
    found: dict[str, ImageFile] = {}
    for entry, spelled in spellings:
        if spelled.path in by_path:
            found.setdefault(entry.path, by_path[spelled.path]._replace(class_name=entry.class_name))
    reasons = dict(zip((entry.path for entry in absent), missing, strict=True))
    still = {path: reason for path, reason in reasons.items() if path not in found}
    return [*files, *found.values()], still


def _spellings(path: str) -> Iterator[str]:
    """Yield other paths that a list of another system may mean: with "/", in other Unicode spellings."""
    others: dict[str, None] = {}  # in order, each once: a list may have 100,000 such paths
    for place in (path, _plain(path.replace("\\", "/"))):
        for spelled in dict.fromkeys((place, readable(place))):
            others[spelled] = None
            if not spelled.isascii():
                others |= dict.fromkeys(unicodedata.normalize(form, spelled) for form in ("NFC", "NFD"))
    for other in others:
        if other != path and not _leaves(other):
            yield other


def _split_problems(entries: list[ImageEntry]) -> list[str]:
    without = [entry.path for entry in entries if not entry.part]
    if not without or len(without) == len(entries):
        return []
    return [
        f"{len(without)} of {len(entries)} images have no split: {listed(without)}; fill in train, val or test "
        "for every image, or for none (then data.split decides)"
    ]


def _role_problems(entries: list[ImageEntry]) -> list[str]:
    roles: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    without: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        roles[entry.part][entry.class_name].add(entry.role)
        if not entry.role:
            without[entry.part].append(entry.path)
    problems = []
    for part, found in roles.items():
        place = f" of split {part}" if part else ""
        if set().union(*found.values()) == {""}:
            continue
        if without[part]:
            problems.append(
                f"{len(without[part])} images{place} have no role and others have one: {listed(without[part])}; fill "
                "in query or gallery for every image of the part, or for none"
            )
        for role in ROLES:
            if not any(role in has for has in found.values()):
                problems.append(f"no image{place} has the role {role}; a part with roles needs queries and a gallery")
    return problems


def _role_notes(entries: list[ImageEntry]) -> list[str]:
    """Return notes on classes of a part with roles that lack queries or gallery images."""
    roles: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in entries:
        if entry.role:
            roles[entry.part, entry.class_name].add(entry.role)
    effects = {
        "query": "these images are in the gallery, and wrong for every query",
        "gallery": "these queries have nothing to find, are left out of the means, and are counted",
    }
    notes = []
    for role, effect in effects.items():
        if lacking := sorted(label for (_, label), has in roles.items() if role not in has):
            named = f"{counted(len(lacking), 'class', 'classes')} without a {role} image: {listed(lacking)}"
            notes.append(f"{named}; {effect}")
    return notes
