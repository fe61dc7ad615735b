"""A user's own images: a folder a class, or a CSV file that lists them."""

import csv
import os
from collections import defaultdict
from pathlib import Path

from raydml.data.catalog import (
    IMAGE_SUFFIXES,
    PARTS,
    ROLES,
    DataError,
    Entry,
    Row,
    found_on_disk,
    is_hidden,
    listed,
)

_COLUMNS = ("path", "label", "split", "role")  # the first two are required


def scan_folders(root: Path) -> list[Row]:
    """The images of root/<class>/*.jpg|png...; a class is a folder without sub-folders, named by its path from root.

    Hidden files and folders, `__MACOSX` and files without an image's suffix are passed over; links are followed.

    Raises DataError, all faults at once: no images, a folder with images beside sub-folders, an empty class, a folder
    or a file that cannot be read, a link that leads nowhere or back to a folder above it.
    """
    entries: list[Entry] = []
    faults: dict[str, list[str]] = {"empty": [], "mixed": [], "broken": [], "looping": [], "unreadable": []}
    _scan_folder(root, "", frozenset(), entries, faults)
    rows, unreadable = found_on_disk(root, entries)
    faults["unreadable"] += unreadable
    advice = {
        "empty": "classes without an image (empty class): {}; add images or remove these folders",
        "mixed": "folders with images beside sub-folders or in the root itself: {}; a class is a folder without "
        "sub-folders: move these images into a folder of their own",
        "broken": "links that lead nowhere: {}; mend or remove them",
        "looping": "links that lead back to a folder above them: {}; remove them",
        "unreadable": "files or folders that cannot be read: {}; change their permissions or remove them",
    }
    problems = [f"{len(found)} {advice[fault].format(listed(found))}" for fault, found in faults.items() if found]
    if not rows and not problems:
        problems = [f"no class folder with images ({', '.join(IMAGE_SUFFIXES)}) in it"]
    if problems:
        raise DataError(f"machine.data_root = {str(root)!r}: " + "\n".join(problems))
    return rows


def _scan_folder(
    folder: Path, prefix: str, above: frozenset[str], entries: list[Entry], faults: dict[str, list[str]]
) -> None:
    real = os.path.realpath(folder)
    if real in above:
        faults["looping"].append(prefix)
        return
    try:
        with os.scandir(folder) as scan:
            found = sorted((entry for entry in scan if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        faults["unreadable"].append(f"{prefix or '.'} ({error.strerror})")
        return
    # A dangling link may have been a class: it is told whatever its name. exists() is false for a link to itself, too.
    broken = {entry.name for entry in found if entry.is_symlink() and not os.path.exists(entry.path)}
    faults["broken"] += [f"{prefix}/{name}".lstrip("/") for name in sorted(broken)]
    folders = [entry for entry in found if entry.name not in broken and entry.is_dir()]
    names = {entry.name for entry in folders} | broken
    pictures = [e.name for e in found if e.name.lower().endswith(IMAGE_SUFFIXES) and e.name not in names]
    if pictures and (folders or not prefix):
        faults["mixed"].append(f"{prefix or '.'} ({len(pictures)} images)")
    elif pictures:
        entries += [Entry(f"{prefix}/{name}", prefix) for name in pictures]
    elif prefix and not folders and not broken:
        faults["empty"].append(prefix)
    for entry in folders:
        _scan_folder(Path(entry.path), f"{prefix}/{entry.name}".lstrip("/"), above | {real}, entries, faults)


_MOST_LINES = 20  # with problems, that a message names


def read_image_list(root: Path, list_file: str | None) -> list[Row]:
    """The images of a CSV file (UTF-8) with the columns path,label[,split][,role] in any order; others are ignored.

    path: relative to root, with "/". label: any text. split: train, val or test, for every image or for none. role:
    query or gallery, for every image of a part or for none of it; not in train, where nothing would use it.

    Raises DataError, all faults at once with their lines: missing columns or values, other splits or roles, paths
    twice, out of root or not on the disk, a class in a part with roles that lacks a query or a gallery image.
    """
    if list_file is None:
        raise DataError("data.name = 'image_list' needs data.list_file, a CSV file with the columns path,label")
    key = f"data.list_file = {str(root / list_file)!r}"
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for number, fields in _csv_lines(root / list_file, key):
        entry = _entry(fields)
        if isinstance(entry, str):
            problems.append(f"line {number}: {entry}")
        elif entry.path in entries:
            problems.append(f"line {number}: {fields['path']!r} is listed twice; remove one (it would find itself)")
        else:
            entries[entry.path] = entry
    if len(problems) > _MOST_LINES:
        problems[_MOST_LINES:] = [f"and {len(problems) - _MOST_LINES} more lines with problems"]
    rows, missing = found_on_disk(root, list(entries.values()))
    if missing:
        problems.append(f"{len(missing)} of {len(entries)} files do not exist under {root}: {listed(missing)}")
    if not entries and not problems:
        problems.append("lists no image")
    problems += _split_problems(list(entries.values())) + _role_problems(list(entries.values()))
    if problems:
        raise DataError(f"{key}: " + "\n".join(problems))
    return rows


def _csv_lines(file: Path, key: str) -> list[tuple[int, dict[str, str]]]:
    """(line number, values of _COLUMNS; "" where there is none). A line of several keeps the number of its last."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            if lacking := [column for column in _COLUMNS[:2] if column not in columns]:
                raise DataError(
                    f"{key} has no column {' and no column '.join(lacking)}; it has: {', '.join(columns) or 'none'}. "
                    "Rename the column that holds it (needed: path, label; optional: split, role)"
                )
            lines = [(reader.line_num, row) for row in reader]
    except FileNotFoundError as error:
        raise DataError(f"{key} does not exist; the path is taken relative to machine.data_root") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{key} cannot be read as a CSV file in UTF-8: {error}") from error
    if too_long := [number for number, row in lines if None in row]:
        raise DataError(
            f"{key}: {len(too_long)} lines have more values than the header has columns: {listed(too_long)}; put "
            'paths and labels that hold a comma in double quotes: "a,b.jpg",label'
        )
    return [(number, {name: (row.get(name) or "").strip() for name in _COLUMNS}) for number, row in lines]


def _entry(fields: dict[str, str]) -> Entry | str:
    """The image of one line, or what is wrong with it."""
    path, label, part, role = (fields[column] for column in _COLUMNS)
    if not path or not label:
        return "path or label is empty"
    plain = os.path.normpath(path).replace(os.sep, "/")
    if plain in (".", "..") or plain.startswith(("/", "../")) or os.path.isabs(path):
        return f"{path!r} leaves machine.data_root; give paths relative to it"
    if part not in ("", *PARTS):
        return f"split = {part!r}; choices: {', '.join(PARTS)}, or no split at all"
    if role not in ("", *ROLES):
        return f"role = {role!r}; choices: {', '.join(ROLES)}, or no role at all"
    if role and part == "train":
        return f"role = {role!r} with split = 'train'; training images have no roles: leave it empty"
    return Entry(plain, label, part, role)


def _split_problems(entries: list[Entry]) -> list[str]:
    without = [entry.path for entry in entries if not entry.part]
    if not without or len(without) == len(entries):
        return []
    return [
        f"{len(without)} of {len(entries)} images have no split: {listed(without)}; fill in train, val or test "
        "for every image, or for none (then data.split decides)"
    ]


def _role_problems(entries: list[Entry]) -> list[str]:
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
            lacking = [label for label, has in found.items() if role not in has and "" not in has]
            if lacking:
                problems.append(
                    f"{len(lacking)} classes{place} have no {role} image: {listed(sorted(lacking))}; each class of a "
                    "part with roles needs at least one query and one gallery image"
                )
    return problems
