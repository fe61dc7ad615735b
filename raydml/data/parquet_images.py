"""Images in Parquet and Arrow files, also as the datasets library of Hugging Face writes them.

A column of images is bytes, or a struct with the fields bytes and path. A column of labels is texts or whole numbers;
numbers have the names that a ClassLabel of the datasets library gives them in the file's metadata.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raydml.data.catalog import DataError, listed
from raydml.data.samples import Columns, Sample

PARQUET_SUFFIXES = (".parquet", ".arrow")
_ROWS_AT_ONCE = 32
_MAX_NUM_ROWS_NAMED = 10


def parquet_samples(file: Path, columns: Columns) -> Iterator[Sample]:
    """Yield the images of a file, a few rows in memory at a time. Raises DataError with file, column and row."""
    import pyarrow as pa  # a slow import that other data sets do not need

    wanted = [columns.image, columns.label, *([] if columns.group is None else [columns.group])]
    try:
        schema, batches = _opened(file, list(dict.fromkeys(wanted)))
        image = _image_column(file, schema, columns.image)
        names = {column: _names(file, schema, column) for column in wanted[1:]}
        start = 0
        for batch in batches:
            images = batch.column(columns.image)
            given = [""] * len(images)
            if image == "struct":
                has_path = images.type.get_field_index("path") >= 0
                given = [str(one or "") for one in images.field("path").to_pylist()] if has_path else given
                images = images.field("bytes")
            _refuse_empty(file, columns.image, images, start)
            texts = [_values(file, column, batch.column(column), names[column], start) for column in wanted[1:]]
            for row, (value, label, name) in enumerate(zip(images, texts[0], given, strict=True)):
                group = texts[1][row] if columns.group is not None else ""
                yield Sample(start + row, value.as_py(), label, group, name)
            start += len(images)
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file} is damaged or truncated ({reason}). Cure: fetch or write it again") from error


def _opened(file: Path, wanted: list[str]) -> tuple[Any, Iterator[Any]]:
    """Return the schema of a file and its batches, with the wanted columns alone."""
    import pyarrow as pa
    from pyarrow import parquet

    if file.suffix.lower() == ".parquet":
        opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        schema = opened.schema_arrow
        _refuse_lacking(file, schema, wanted)
        return schema, opened.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted)
    source = pa.memory_map(str(file))
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        _refuse_open_end(source)
        source.seek(0)
        reader = pa.ipc.open_stream(source)
        batches = iter(reader)
    _refuse_lacking(file, reader.schema, wanted)
    parts = (
        batch.select(wanted).slice(row, _ROWS_AT_ONCE)
        for batch in batches
        for row in range(0, batch.num_rows, _ROWS_AT_ONCE)
    )
    return reader.schema, parts


def _refuse_open_end(source: Any) -> None:
    """Raise EOFError for a stream that ends without its end mark: a reader takes its lack for the end."""
    size = source.size()
    source.seek(max(0, size - 4))
    if size < 8 or source.read(4) != bytes(4):
        raise EOFError("the stream has no end mark")


def _refuse_lacking(file: Path, schema: Any, wanted: list[str]) -> None:
    if lacking := [column for column in wanted if schema.names.count(column) != 1]:
        cure = "Cure: name them in data.image, data.label and data.group"
        raise DataError(f"{file} has no column {' and no column '.join(lacking)}, but {listed(schema.names)}. {cure}")


def _image_column(file: Path, schema: Any, column: str) -> str:
    """Return "bytes" or "struct", the form of the column of images."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    kind = schema.field(column).type
    if is_bytes(kind):
        return "bytes"
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type):
        return "struct"
    raise DataError(
        f"{file}: column {column!r} is {kind}, and must be the bytes of image files, or a struct {{bytes, path}} with "
        "them. Cure: another column in data.image; with the datasets library: cast_column to Image()"
    )


def _refuse_empty(file: Path, column: str, images: Any, start: int) -> None:
    rows = [start + row for row, image in enumerate(images) if not image.is_valid or not len(image.as_buffer())]
    if rows:
        raise DataError(
            f"{file}: column {column!r} has no bytes in row {listed(rows, _MAX_NUM_ROWS_NAMED)} (or only a path). "
            "Cure: remove these rows, or write the bytes of the images into the file"
        )


def _names(file: Path, schema: Any, column: str) -> list[str]:
    """Return the names of a ClassLabel by number; refuse columns that are neither texts nor whole numbers."""
    from pyarrow import types

    kind = schema.field(column).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)
    if not (is_text or types.is_integer(plain)):
        raise DataError(
            f"{file}: column {column!r} is {kind}, and must be texts or whole numbers. Cure: another column in "
            "data.label or data.group, or convert it"
        )
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None or is_text:
        return []
    try:
        feature = json.loads(written)["info"]["features"][column]
        return [str(name) for name in feature.get("names") or []]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file}: its metadata of the datasets library does not describe column {column!r} ({error!r}). Cure: "
            "write it again, or remove the metadata"
        ) from error


def _values(file: Path, column: str, values: Any, names: list[str], start: int) -> list[str | int]:
    found = values.to_pylist()
    wrong = [
        start + row
        for row, value in enumerate(found)
        if value is None or value == "" or (names and not 0 <= value < len(names))
    ]
    if wrong:
        of_names = f", or none of the {len(names)} classes" if names else ""
        raise DataError(
            f"{file}: column {column!r} has no value{of_names} in row {listed(wrong, _MAX_NUM_ROWS_NAMED)}. Cure: give "
            "these rows a label, or remove them"
        )
    return [names[value] for value in found] if names else found
