"""The user's own images in class folders."""

import os
from pathlib import Path
from typing import NamedTuple

from raydml.data.catalog import DataError, ImageEntry, ImageFile, find_files, is_hidden, listed
from raydml.data.class_names import join_parts, join_spellings
from raydml.data.formats import (
    CONVERT,
    DECODED_FORMATS,
    count_suffixes,
    is_doubtful_name,
    is_image_name,
    is_undecoded,
    left_out,
)
from raydml.ops.wording import counted


class ClassFolders(NamedTuple):
    """What a folder of class folders holds. notes and kind: see `catalog_of`."""

    files: list[ImageFile]
    notes: tuple[str, ...]
    kind: str


class _Scan:
    """What is found in the folders: images, their folders, and faults by kind."""

    def __init__(self) -> None:
        self.entries: list[ImageEntry] = []
        self.doubtful: list[str] = []  # names of files that may be images and are not decoded
        self.in_root: list[str] = []  # images without a class folder
        self.faults: dict[str, list[str]] = {
            kind: [] for kind in ("undecoded", "empty", "mixed", "broken", "looping", "unreadable")
        }


_ADVICE = {
    "undecoded": "classes without an image that can be decoded: {}; " + CONVERT,
    "empty": "classes without an image (empty class): {}; add images or remove these folders",
    "mixed": "folders with images beside sub-folders: {}; a class is a folder without sub-folders: move these images "
    "into a folder of their own",
    "broken": "links that lead nowhere: {}; repair or remove them",
    "looping": "links that lead back to a folder above them: {}; remove them",
    "unreadable": "files or folders that cannot be read: {}; change their permissions or remove them",
}


def scan_folders(root: Path) -> ClassFolders:
    """Return the images of root/<class>/*.jpg|png...; a class is a folder without sub-folders, named by its path.

    The same class in train/ and val/ and the like, or in two Unicode spellings, is one class (class_names.py). Hidden
    files and folders, `__MACOSX` and files that are evidently no images are ignored; links are followed.

    Raises DataError with all faults at once: no images, images in the root or beside sub-folders, a class without an
    image or with none that can be decoded, an unreadable folder or file, a link to nothing or to a folder above it.
    """
    scan = _Scan()
    _scan_folder(root, "", frozenset(), scan)
    files, unreadable = find_files(root, scan.entries)
    scan.faults["unreadable"] += unreadable
    problems = [f"{len(found)} {_ADVICE[kind].format(listed(found))}" for kind, found in scan.faults.items() if found]
    if scan.in_root:
        problems.insert(0, _without_folders(scan))
    if not files and not problems:
        found = f"; it holds {count_suffixes(scan.doubtful)}: {CONVERT}" if scan.doubtful else ""
        problems = [f"no class folder with images ({', '.join(DECODED_FORMATS)}) in it{found}"]
    if problems:
        raise DataError(f"machine.data_root = {str(root)!r}: " + "\n".join(problems))
    spelled, spelling_notes = join_spellings(file.class_name for file in files)
    classes, part_notes = join_parts(spelled.values())
    joined = [file._replace(class_name=classes[spelled[file.class_name]]) for file in files]
    notes = [*part_notes, *spelling_notes]
    if scan.doubtful:
        notes.append(left_out(scan.doubtful))
    return ClassFolders(joined, tuple(notes), _kind_of(set(classes.values())))


def grouped_by_parent(files: list[ImageFile]) -> list[ImageFile]:
    """Return the images with the folder above their class folder as group. Raises DataError where there is none."""
    grouped = [file._replace(group=file.class_name.rpartition("/")[0]) for file in files]
    if lacking := sorted({file.class_name for file in grouped if not file.group}):
        raise DataError(
            f"data.group = 'parent': {counted(len(lacking), 'class', 'classes')} without a folder above the class "
            f"folder: {listed(lacking)}. Cure: move each class folder into the folder of its group, or write a CSV "
            "list with a column of groups (data.name: image_list)"
        )
    return grouped


def _kind_of(class_names: set[str]) -> str:
    if any("/" in name for name in class_names):
        return "{classes} in nested folders, named by their paths"
    return "{classes} in class folders"


def _without_folders(scan: _Scan) -> str:
    what = f"{counted(len(scan.in_root), 'image')} directly in it, without a class folder ({listed(scan.in_root, 3)})"
    beside = " beside class folders" if scan.entries else ""
    return (
        f"{what}{beside}. An image needs a class: move the images of each class into a folder named after it, or write "
        "a CSV list with the columns path,label (data.name: image_list)"
    )


def _scan_folder(folder: Path, prefix: str, above: frozenset[str], scan: _Scan) -> None:
    real = os.path.realpath(folder)
    if real in above:
        scan.faults["looping"].append(prefix)
        return
    try:
        with os.scandir(folder) as inside:
            found = sorted((entry for entry in inside if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        scan.faults["unreadable"].append(f"{prefix or '.'} ({error.strerror})")
        return
    # A dangling link may have been a class, so its name does not matter. exists() is false for a link to itself too.
    broken = {entry.name for entry in found if entry.is_symlink() and not os.path.exists(entry.path)}
    scan.faults["broken"] += [f"{prefix}/{name}".lstrip("/") for name in sorted(broken)]
    folders = [entry for entry in found if entry.name not in broken and entry.is_dir()]
    names = {entry.name for entry in folders} | broken
    others = [entry.name for entry in found if entry.name not in names]
    images = [name for name in others if is_image_name(name)]
    # Beside class folders an unknown suffix says nothing; in a class it may be that of all its images.
    may_be = is_doubtful_name if prefix and not folders else is_undecoded
    doubtful = [name for name in others if may_be(name)]
    scan.doubtful += doubtful
    if images and not prefix:
        scan.in_root = images
    elif images and folders:
        scan.faults["mixed"].append(f"{prefix} ({counted(len(images), 'image')})")
    elif images:
        scan.entries += [ImageEntry(f"{prefix}/{name}", prefix) for name in images]
    elif doubtful and prefix and not folders:
        scan.faults["undecoded"].append(f"{prefix} ({count_suffixes(doubtful)})")
    elif prefix and not folders and not broken:
        scan.faults["empty"].append(prefix)
    for entry in folders:
        _scan_folder(Path(entry.path), f"{prefix}/{entry.name}".lstrip("/"), above | {real}, scan)
