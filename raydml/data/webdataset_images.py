"""Images in tars of the WebDataset layout: files of one sample follow one another, and have one name but for the end.

    0001.jpg 0001.cls 0002.jpg 0002.cls ...      or      a/0001.png a/0001.json ...

The name ends at the first dot of its last part. The label is the field `data.label` of the .json or, without such a
field, the content of the .cls.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raydml.data.archives import StrictHeader
from raydml.data.catalog import DataError, listed
from raydml.data.formats import IMAGE_SUFFIXES
from raydml.data.samples import Columns, Sample

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PICKLES = ("pyd", "pkl", "pickle", "pth", "pt", "npy")  # never opened
_MAX_LABEL_BYTES = 1 << 20
_MAX_IMAGE_BYTES = 1 << 30
_DAMAGES = (tarfile.TarError, EOFError, OSError, ValueError)


class _WholeTar(StrictHeader):
    """A header whose absence is an error: a tar ends with blocks of zeros, and one that was cut off does not."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_WholeTar":
        try:
            return super().fromtarfile(tarfile_)  # type: ignore[return-value]
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the end mark of the tar is missing") from error


def webdataset_samples(file: Path, columns: Columns) -> Iterator[Sample]:
    """Yield the images of a tar, one sample in memory at a time. Raises DataError with file and sample."""
    number, key, members = 0, "", dict[str, bytes]()
    try:
        with tarfile.open(file, "r|*", tarinfo=_WholeTar) as archive:
            for info in archive:
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise DataError(
                        f"{file}: member {info.name!r} is a link, a device or sparse: refused. Cure: write the tar "
                        "again with plain files (tar --dereference)"
                    )
                folder, _, name = info.name.rpartition("/")
                stem, _, end = name.partition(".")
                if not stem:  # hidden files, which are of no sample
                    continue
                if f"{folder}/{stem}" != key:
                    if members:
                        yield _sample(file, number, key.lstrip("/"), members, columns)
                        number += 1
                    key, members = f"{folder}/{stem}", {}
                end = end.lower()
                if end in members:
                    raise DataError(f"{file}: {info.name!r} is in it twice. Cure: write the tar again with one of them")
                members[end] = _content(file, archive, info, end)
    except DataError:
        raise
    except _DAMAGES as error:
        raise DataError(f"{file} is damaged or truncated ({error}). Cure: fetch or write it again") from error
    if members:
        yield _sample(file, number, key.lstrip("/"), members, columns)


def _content(file: Path, archive: tarfile.TarFile, info: tarfile.TarInfo, end: str) -> bytes:
    """Read an image or a label; of other members the name alone counts."""
    is_label = end in ("cls", "json")
    if not (is_label or f".{end.rpartition('.')[2]}" in IMAGE_SUFFIXES):
        return b""
    most = _MAX_LABEL_BYTES if is_label else _MAX_IMAGE_BYTES
    if info.size > most:
        raise DataError(
            f"{file}: member {info.name!r} has {info.size:,} bytes: refused. Cure: remove it, or write it with at most "
            f"{most:,}"
        )
    opened = archive.extractfile(info)
    assert opened is not None
    content = opened.read()
    if len(content) != info.size:
        raise EOFError(f"{info.name} ends early")
    return content


def _sample(file: Path, number: int, key: str, members: dict[str, bytes], columns: Columns) -> Sample:
    where = f"{file}: sample {key!r}"
    if columns.image == "image":
        ends = [end for end in members if f".{end}" in IMAGE_SUFFIXES]
    else:
        ends = [end for end in members if end == columns.image.lower().lstrip(".")]
    if len(ends) != 1:
        what = "has no image" if not ends else f"has several images ({', '.join(ends)})"
        raise DataError(
            f"{where} {what}, but {listed(members)}. Cure: the end of its file name in data.image, such as jpg"
        )
    if not members[ends[0]]:
        raise DataError(f"{where}: {ends[0]} is empty. Cure: remove the sample")
    fields = _json_of(where, members)
    label = _value(where, columns.label, fields[columns.label]) if columns.label in fields else _class(where, members)
    if label is None:
        pickled = [end for end in members if end.rpartition(".")[2] in _PICKLES]
        never = f" ({', '.join(pickled)} may be pickled, and is never loaded)" if pickled else ""
        raise DataError(
            f"{where} has no label: no .cls, and no field {columns.label!r} in a .json, but {listed(members)}{never}. "
            "Cure: write a .cls, or name the field in data.label"
        )
    group: str | int = ""
    if columns.group is not None:
        if columns.group not in fields:
            raise DataError(
                f"{where} has no field {columns.group!r} in a .json, but {listed(fields) or 'none'}. Cure: another "
                "field in data.group, or leave it out"
            )
        group = _value(where, columns.group, fields[columns.group])
    return Sample(number, members[ends[0]], label, group, f"{key}.{ends[0]}")


def _json_of(where: str, members: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        fields = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its .json cannot be read: {error}. Cure: write it again") from error
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: its .json is {type(fields).__name__}, and must be an object with fields. Cure: write it again, "
            'such as {"label": 3}'
        )
    return fields


def _value(where: str, name: str, value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(
            f"{where}: field {name!r} is {value!r}, and must be a text or a whole number. Cure: write it as one, or "
            "name another field in data.label or data.group"
        )
    return value


def _class(where: str, members: dict[str, bytes]) -> str | int | None:
    if "cls" not in members:
        return None
    try:
        text = members["cls"].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .cls is no text in UTF-8: {error}. Cure: write it again") from error
    if not text:
        raise DataError(f"{where}: its .cls is empty. Cure: write the class into it, or remove the sample")
    is_number = text.isascii() and text.isdigit() and (text[0] != "0" or text == "0") and len(text) < 19
    return int(text) if is_number else text
