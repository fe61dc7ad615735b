"""One class for one name: spellings and copies of a class name that people do not mean as different classes."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from raydml.data.catalog import listed

#: Names of folders that divide the images of a data set; a class of the same name in several of them is one class.
PART_NAMES = frozenset(
    (
        *("train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing", "eval"),
        *("evaluation", "holdout", "query", "queries", "gallery", "galleries", "probe"),
    )
)
_ONLY_PARTS = PART_NAMES - {"dev", "eval", "evaluation", "holdout", "probe"}  # words with no other meaning
_BESIDE_PARTS = frozenset(("set", "data", "dataset", "images", "imgs", "split", "folder", "part", "seg"))
_LIST_FOR_SPLIT = "for another split write a CSV list with the columns path,label,split (data.name: image_list)"
_DIGITS = re.compile("[0-9]+")
_NOT_UTF8 = re.compile("[\udc80-\udcff]+")  # how Python keeps the bytes of such a file name


def readable(name: str) -> str:
    """Return a file name as text that every file and terminal can hold.

    Bytes that are not UTF-8 are read as Windows-1252, the usual encoding of names that were unpacked on another system.
    """
    return name if name.isascii() else _NOT_UTF8.sub(_windows_1252, name)


def _windows_1252(found: re.Match[str]) -> str:
    raw = found.group().encode("utf-8", "surrogateescape")
    try:
        return raw.decode("cp1252")
    except UnicodeDecodeError:  # five bytes have no meaning there
        return raw.decode("latin-1")


def join_spellings(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return the class of each name, and a sentence where names in several spellings became one class.

    Spellings: the bytes of a letter with an accent (Unicode NFC and NFD, or Windows-1252). A name in one spelling is
    kept as it is.
    """
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        spellings[unicodedata.normalize("NFC", readable(name))].append(name)
    classes = {name: joined if len(same) > 1 else readable(name) for joined, same in spellings.items() for name in same}
    several = [joined for joined, same in spellings.items() if len(same) > 1]
    if not several:
        return classes, []
    what = "class name is" if len(several) == 1 else "class names are"
    return classes, [
        f"{len(several)} {what} written in more than one Unicode spelling (NFC, NFD or another encoding) and taken as "
        f"one class each: {listed(several)}"
    ]


def join_parts(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return the class of each path of a class folder, and a sentence about folders such as train/ and val/.

    Where paths differ only in such folders (train/cat and val/cat, or cat/train and cat/val), they are one class, and
    no class is named after these folders. Where they do not, the paths are kept, and so they are where the folders may
    be classes of their own: one word with several numbers (train1 and train2), or words with other meanings (probe).
    """
    paths = sorted(set(names))
    shorter = {path: "/".join(step for step in path.split("/") if not _is_part(step)) or path for path in paths}
    same: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        same[shorter[path]].append(path)
    several = [name for name, members in same.items() if len(members) > 1]
    parts = sorted({step for path in paths if shorter[path] != path for step in path.split("/") if _is_part(step)})
    divided = len({_DIGITS.sub("", step.casefold()) for step in parts}) > 1
    if several and not (divided and any(set(_words(step)) & _ONLY_PARTS for step in parts)):
        return {path: path for path in paths}, [
            f"the folders {listed(parts)} have class names in common ({listed(several, 3)}) and are not taken as a "
            f"split: folders of the same name are classes of their own; {_LIST_FOR_SPLIT}"
        ]
    if several:
        what = "1 class name" if len(several) == 1 else f"{len(several):,} class names"
        return shorter, [
            f"the folders {listed(parts)} have {what} in common ({listed(several, 3)}): folders of the same name are "
            f"one class, and their images are joined. data.split divides the classes; {_LIST_FOR_SPLIT}"
        ]
    kept = {path: path for path in paths}
    if len(parts) > 1 and all(shorter[path] != path for path in paths):
        return kept, [
            f"the folders {listed(parts)} have no class name in common and are not taken as a split: data.split "
            f"divides the classes; {_LIST_FOR_SPLIT}"
        ]
    return kept, []


def _is_part(step: str) -> bool:
    """Return whether a folder is named like a part: train, Test, testing_set, train2, valset, seg_train."""
    words = _words(step)
    parts = [word for word in words if word in PART_NAMES]
    return bool(parts) and all(word in parts or word in _BESIDE_PARTS for word in words)


def _words(step: str) -> list[str]:
    """Return the words in the name of a folder; those such as valset without "set"."""
    words = re.findall(r"[a-z]+", step.casefold())
    return [part if (part := word.removesuffix("set")) in PART_NAMES else word for word in words]
