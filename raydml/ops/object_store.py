"""Files in an object store, below one address: s3://, gs://, abfs://, and file:// for a folder.

The credentials are those of the environment, as each store's own tools find them (AWS_ACCESS_KEY_ID or the role of the
machine, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT and so on). An address may end with options of the store:
``s3://bucket/studies?region=eu-west-1``, ``&endpoint_override=http://HOST:9000`` for MinIO and others.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

from raydml.ops.addresses import redacted
from raydml.ops.files import write_whole

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file")
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # between the tries of a call that fails
_BLOCK_BYTES = 8 << 20
_CONNECT_S, _REQUEST_S = 5.0, 20.0  # without an answer
_Result = TypeVar("_Result")


class StoreError(ValueError):
    """A store that cannot be used, after all tries; the message has its address, the reason and the cure."""


class StoredFile(NamedTuple):
    """size: in bytes. time_s: when it was written, by the clock of the store (seconds since 1970)."""

    size: int
    time_s: float


class ObjectStore:
    """The files below an address, by names such as ``search/run-000/model.json``. A file appears when it is whole.

    A call that fails is tried again for about 16 s, and then raises StoreError; a file that is not there raises
    FileNotFoundError at once.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files, self._root = _opened(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.uri,)

    def check(self) -> None:
        """Write a file and delete it. Raises StoreError where that cannot be done from this machine."""
        name = f".{uuid.uuid4().hex}.partial"
        self.put_bytes(b"", name)
        self.delete(name)

    def put(self, file: Path, name: str) -> None:
        """Store a file under a name."""

        def copy() -> None:
            with open(file, "rb") as source:
                size = os.fstat(source.fileno()).st_size
                if size <= _BLOCK_BYTES:  # read before anything is sent, and sent in one request
                    self._write(name, _whole(source, size, file))
                else:
                    self._stream(name, source, size, file)
            stored = self._files.get_file_info(self._path(name)).size
            if stored != size:
                raise OSError(f"{name} has {stored} bytes there instead of {size}")

        self._try(copy)

    def _stream(self, name: str, source: BinaryIO, size: int, file: Path) -> None:
        """Store a large file. Raises OSError where it cannot be read to its end; then it is not there."""
        fault = None
        with self._appearing(name) as path:
            with self._files.open_output_stream(path) as target:
                left = size
                while left and fault is None:
                    try:
                        block = _whole(source, min(left, _BLOCK_BYTES), file)
                    except OSError as error:
                        fault = error
                    else:
                        target.write(block)
                        left -= len(block)
            if fault is not None:
                # pyarrow cannot give an upload up: what was sent is a file now. A request later it is gone.
                self._files.delete_file(path)
                raise fault

    def _write(self, name: str, content: bytes) -> None:
        with self._appearing(name) as path, self._files.open_output_stream(path) as target:
            target.write(content)

    @contextmanager
    def _appearing(self, name: str) -> Iterator[str]:
        """Yield the path to write a file to: in an object store its own, in a folder a hidden one, renamed at last."""
        path = self._path(name)
        if not self._is_folder:
            yield path
            return
        folder, _, last = path.rpartition("/")
        os.makedirs(folder, exist_ok=True)
        aside = f"{folder}/.{last}.{uuid.uuid4().hex}.partial"
        try:
            yield aside
            os.replace(aside, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(aside)

    def put_bytes(self, content: bytes, name: str) -> None:
        """Store some bytes under a name."""

        self._try(lambda: self._write(name, content))

    def get(self, name: str, file: Path) -> None:
        """Write a stored file to a path, whose folder is made if missing."""

        def copy(aside: Path) -> None:
            with self._files.open_input_stream(self._path(name)) as source, open(aside, "wb") as target:
                shutil.copyfileobj(source, target, _BLOCK_BYTES)
            stored = self._files.get_file_info(self._path(name)).size
            if aside.stat().st_size != stored:
                raise OSError(f"{name} was cut off after {aside.stat().st_size} of {stored} bytes")

        file.parent.mkdir(parents=True, exist_ok=True)
        self._try(lambda: write_whole(file, copy, several_writers=True))

    def get_bytes(self, name: str) -> bytes:
        """Return the content of a stored file."""

        def read() -> bytes:
            with self._files.open_input_stream(self._path(name)) as source:
                content: bytes = source.read()
            if len(content) != (size := self._files.get_file_info(self._path(name)).size):
                raise OSError(f"{name} was cut off after {len(content)} of {size} bytes")
            return content

        return self._try(read)

    def copy(self, name: str, new_name: str) -> None:
        """Store the content of a stored file under another name as well, without moving it through this machine."""

        def copy() -> None:
            with self._appearing(new_name) as path:
                self._files.copy_file(self._path(name), path)

        self._try(copy)

    def names(self, below: str = "") -> dict[str, StoredFile]:
        """Return all files below a name, by their names."""
        from pyarrow.fs import FileSelector, FileType

        def listed() -> dict[str, StoredFile]:
            selector = FileSelector(self._path(below), allow_not_found=True, recursive=True)
            found = {}
            for info in self._files.get_file_info(selector):
                path = PurePosixPath(info.path).relative_to(self._root)
                # A hidden file is not whole yet. A key may hold "..", and would be written outside the study's folder.
                if info.type == FileType.File and not any(part.startswith(".") for part in path.parts):
                    name = path.as_posix()
                    found[name] = StoredFile(info.size, info.mtime.timestamp() if info.mtime else 0.0)
            return found

        return self._try(listed)

    def folders(self, below: str) -> list[str]:
        """Return the names of the folders directly below a name, without what is before them, in order."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._path(below), allow_not_found=True)
        found = self._try(lambda: self._files.get_file_info(selector))
        return sorted(info.base_name for info in found if info.type == FileType.Directory)

    def info(self, name: str) -> StoredFile | None:
        """Return size and time of a stored file; None where there is none."""
        from pyarrow.fs import FileType

        info = self._try(lambda: self._files.get_file_info(self._path(name)))
        return StoredFile(info.size, info.mtime.timestamp()) if info.type == FileType.File else None

    def delete(self, name: str) -> None:
        """Delete a stored file, if it is there."""
        if self.info(name) is not None:
            self._try(lambda: self._files.delete_file(self._path(name)))

    def delete_below(self, name: str) -> None:
        """Delete all files below a name, if there are any."""
        from pyarrow.fs import FileType

        if self._try(lambda: self._files.get_file_info(self._path(name))).type == FileType.Directory:
            self._try(lambda: self._files.delete_dir(self._path(name)))

    @property
    def _is_folder(self) -> bool:
        return urlsplit(self.uri).scheme == "file"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, call: Callable[[], _Result]) -> _Result:
        for wait_s in (*_WAITS_S, None):
            try:
                with _counted():
                    return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                if _NO_FILE.search(str(error)):  # of a copy
                    raise FileNotFoundError(str(error)) from error
                if wait_s is None or _is_for_good(error):
                    raise StoreError(
                        f"{self.uri} cannot be used: {_reason(error)}. Cure: {_cure(error, self.uri)}"
                    ) from error
                time.sleep(wait_s)
        raise AssertionError("unreachable")


_callers: set[int] = set()  # daemon threads that wait for a store


@contextmanager
def _counted() -> Iterator[None]:
    is_daemon = threading.current_thread().daemon
    if is_daemon:
        _callers.add(threading.get_ident())
    try:
        yield
    finally:
        if is_daemon:
            _callers.discard(threading.get_ident())


def is_waited_for() -> bool:
    """Return whether a daemon thread of this process waits for a store; pyarrow would wait for it at the end.

    What other threads do, such as deletions, is to be completed.
    """
    return bool(_callers)


def _whole(source: BinaryIO, size: int, file: Path) -> bytes:
    """Return the next bytes of a file. Raises OSError where it has fewer."""
    content = source.read(size)
    if len(content) < size:
        raise OSError(f"{file} was cut off while it was read: {len(content)} bytes came instead of {size}")
    return content


def joined(uri: str, name: str) -> str:
    """Return the address of a name below an address; its options stay at the end."""
    place, mark, options = uri.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def check_uri(uri: str) -> str:
    """Return the address of a place in an object store. Raises StoreError, with the cure, for one that cannot be."""
    if fault := _fault_of(urlsplit(uri)):
        raise StoreError(f"{redacted(uri)} {fault}")
    return uri


def _fault_of(parts: SplitResult) -> str:
    """Return what is wrong with an address, with the cure; empty if nothing."""
    if parts.scheme not in SCHEMES:
        return f"is not the address of a store. Cure: a folder, or one of {', '.join(SCHEMES)}://..."
    if "@" in parts.netloc and (parts.scheme not in ("abfs", "abfss") or ":" in parts.netloc.rpartition("@")[0]):
        return "has credentials, which would be recorded. Cure: set them in the environment"
    if not parts.netloc and parts.scheme != "file":
        return f"names no bucket. Cure: {parts.scheme}://BUCKET/PREFIX"
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        return "is no folder. Cure: file:///FOLDER"
    known = _OPTIONS.get(parts.scheme, ())
    for name, _ in parse_qsl(parts.query):
        if name not in known:
            return f"has the option {name}, and not one of: {', '.join(known) or 'none'}. Cure: remove it"
    return ""


_OPTIONS = {"s3": ("region", "endpoint_override", "scheme")}


@functools.lru_cache(maxsize=16)
def _opened(uri: str) -> tuple[Any, str]:
    """Return the file system of pyarrow for an address, and the path in it."""
    from pyarrow import fs

    parts = urlsplit(check_uri(uri))
    if parts.scheme == "file":
        return fs.LocalFileSystem(), parts.path.rstrip("/")
    if parts.scheme != "s3":
        files, root = fs.FileSystem.from_uri(uri)
        return files, root.rstrip("/")
    options = dict(parse_qsl(parts.query))
    if (endpoint := options.get("endpoint_override", "")).startswith("http://"):
        options.setdefault("scheme", "http")
    options["endpoint_override"] = re.sub(r"^https?://", "", endpoint)
    files = fs.S3FileSystem(
        **{name: value for name, value in options.items() if value},
        allow_delayed_open=True,  # a small file is one request
        connect_timeout=_CONNECT_S,
        request_timeout=_REQUEST_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
    )
    return files, f"{parts.netloc}{parts.path}".rstrip("/")


_ACCESS = re.compile(r"ACCESS_DENIED|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|status 403|Forbidden", re.I)
_NO_FILE = re.compile(r"NO_SUCH_KEY|NoSuchKey")
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist|create bucket", re.I)
_OTHER_REGION = re.compile(r"PermanentRedirect|HTTP status 301|AuthorizationHeaderMalformed", re.I)


def _is_for_good(error: OSError) -> bool:
    said = str(error)
    return any(pattern.search(said) for pattern in (_ACCESS, _NO_BUCKET, _OTHER_REGION))


def _reason(error: OSError) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _cure(error: OSError, uri: str) -> str:
    said = str(error)
    if _ACCESS.search(said):
        return "credentials in the environment of this process, on every node, that may read, write and delete there"
    if _NO_BUCKET.search(said):
        return "make the bucket, or correct its name"
    if _OTHER_REGION.search(said):
        return f"name the region of the bucket: {uri.partition('?')[0]}?region=REGION"
    return "check the network and the address"
