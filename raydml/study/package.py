"""The package as other machines get it: which files it has, their digest, and copies that know their commit."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import raydml
from raydml.training.checkpoint import COMMIT_FILE, git_commit

PACKAGE = Path(raydml.__file__).parent


def files_of_package() -> list[Path]:
    """Return the files that are the package, without what Python and editors put beside them, and without the commit
    of a copy."""
    found = []
    for folder, folders, files in os.walk(PACKAGE):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".") and not name.endswith("~")]
    return sorted(set(found) - {PACKAGE / COMMIT_FILE})


@functools.cache
def digest_of_package() -> str:
    """Return a digest of the names and the bytes of all files of the package that this process runs."""
    found = hashlib.sha256()
    for path in files_of_package():
        content = path.read_bytes()
        found.update(f"{path.relative_to(PACKAGE).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()[:16]


@contextmanager
def staged_package() -> Iterator[Path]:
    """Yield a folder that holds a copy of the package with its commit, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="raydml-package-") as folder:
        copy = Path(folder) / PACKAGE.name
        for path in files_of_package():
            place = copy / path.relative_to(PACKAGE)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        if commit := git_commit():
            (copy / COMMIT_FILE).write_text(commit + "\n", encoding="utf-8")
        yield Path(folder)
