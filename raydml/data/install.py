"""A benchmark's folder comes to be: its archives are fetched, checked and unpacked, by one process at a time."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from raydml.data.archives import unpack
from raydml.data.catalog import DataError, listed
from raydml.data.download import PATIENCE, Patience, fetch
from raydml.data.sources import Archive, Source

LOCK_FILE = ".raydml-download.lock"
Progress = Callable[[str, int, int | None], None]  # what is done, bytes done, bytes in all (None: not known)
Tell = Callable[[str], None]


def install(
    source: Source,
    root: Path,
    *,
    progress: Progress,
    tell: Tell,
    accepted_sha256: str | None = None,
    patience: Patience = PATIENCE,
) -> list[Path]:
    """Put every archive of a source to root/<archive.folder>, and return these folders.

    What is there already is left alone. The archives stay in root beside their folders, so that a damaged folder can be
    removed and made again without the network. accepted_sha256: see `fetch`.

    Raises DataError: another process is at work in root, or what `fetch` and `unpack` raise.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {root}: {error}. Give another --root") from error
    with _alone_in(root):
        return [_install_one(archive, root, progress, tell, accepted_sha256, patience) for archive in source.archives]


def _install_one(
    archive: Archive, root: Path, progress: Progress, tell: Tell, accepted_sha256: str | None, patience: Patience
) -> Path:
    target = root / archive.folder
    if os.path.lexists(target):
        tell(f"{target} is there already")
        return target
    file = fetch(
        archive,
        root,
        patience=patience,
        accepted_sha256=accepted_sha256,
        progress=partial(progress, "downloading"),
        tell=tell,
    )
    if not accepted_sha256 and (archive.digest is None or not archive.verified):
        what = "there is none to compare with" if archive.digest is None else "the expected one is from memory"
        tell(f"{archive.file_name}: checksum not confirmed, {what}")
    left_out = unpack(
        file, root, archive.folder, max_bytes=archive.max_unpacked_bytes, progress=partial(progress, "unpacking")
    )
    if left_out:
        tell(f"not needed and left in the archive: {listed(map(repr, left_out))}")
    tell(f"{target} is complete; {file} may be removed")
    return target


@contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    with (root / LOCK_FILE).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file is closed, also by a kill
        except BlockingIOError as error:
            raise DataError(f"another download is at work in {root}. Wait for it, or give another --root") from error
        yield
