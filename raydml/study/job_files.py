"""What is sent to a cluster for a job: the files of raydml that a study needs, and the user's own, as one archive."""

from __future__ import annotations

import hashlib
import io
import itertools
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from raydml.search_space.shipped import spaces_folder
from raydml.study.package import PACKAGE, files_of_package
from raydml.training.checkpoint import COMMIT_FILE, git_commit

#: Files and folders of a checkout that a study needs.
_OF_A_STUDY = (PACKAGE.name, "search_spaces", "launch.py", "pyproject.toml", "requirements.lock")
_SUBMITTED = "submitted"  # the folder of search spaces that are not part of raydml
_MAX_UNTRACKED_BYTES = 1 << 20
_OLDEST = (1980, 1, 1, 0, 0, 0)  # that zip can name: the same files make the same archive


class JobFiles(NamedTuple):
    """The working directory of a job.

    contents: of each file, by its name there. space: the name of the search space. points: that of the file of points
    that the search begins with, empty without one. left_out: files beside them that git does not track, and that are
    too large for code.
    """

    contents: dict[str, bytes]
    space: str
    points: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def has_launch(self) -> bool:
        """Whether ``launch.py`` is among them; an installed raydml is started as a module."""
        return "launch.py" in self.contents


def files_of_job(space: Path, points: Path | None = None) -> JobFiles:
    """Return what a study of a search space needs, as it is in the working tree now.

    points: a file of points that its search begins with.

    Of a git checkout these are the tracked files, and others that are small and not ignored, such as a loss that was
    just written; else the files of the package, with launch.py and the search spaces beside it.
    """
    found, left_out = _files_of_checkout() or (_files_without_git(), ())
    names = [_place_of(file, found) for file in (space, points) if file is not None]
    contents = {name: path.read_bytes() for name, path in sorted(found.items())}
    if commit := git_commit():
        contents[f"{PACKAGE.name}/{COMMIT_FILE}"] = f"{commit}\n".encode()
    return JobFiles(contents, names[0], names[1] if points else "", left_out)


def _place_of(file: Path, found: dict[str, Path]) -> str:
    """Return the name of a file among those found; one from elsewhere is added to them."""
    for name, path in found.items():
        if path.resolve() == file.resolve():
            return name
    name = next(
        name for number in itertools.count() if (name := f"{_SUBMITTED}/{number or ''}{file.name}") not in found
    )
    found[name] = file
    return name


def _files_of_checkout() -> tuple[dict[str, Path], tuple[str, ...]] | None:
    """Return the files by name, and those that are left out; None where git does not track the package."""
    tracked = _listed_by_git("--cached")
    if f"{PACKAGE.name}/__init__.py" not in tracked:
        return None
    others = _listed_by_git("--others", "--exclude-standard")
    root = PACKAGE.parent
    files = [name for name in (*tracked, *others) if (root / name).is_file()]  # no link that leads nowhere
    large = tuple(name for name in files if name in others and (root / name).stat().st_size > _MAX_UNTRACKED_BYTES)
    return {name: root / name for name in files if name not in large}, large


def _listed_by_git(*kind: str) -> list[str]:
    command = ["git", "-C", str(PACKAGE.parent), "ls-files", "-z", *kind, "--", *_OF_A_STUDY]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return []
    return [name for name in done.stdout.split("\0") if name] if done.returncode == 0 else []


def _files_without_git() -> dict[str, Path]:
    found = {f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}": path for path in files_of_package()}
    if spaces_folder().parent == PACKAGE:  # installed: the search spaces are in the package
        return found
    beside = [PACKAGE.parent / "launch.py", *sorted(spaces_folder().glob("*.yaml"))]
    return found | {path.relative_to(PACKAGE.parent).as_posix(): path for path in beside if path.is_file()}


def archive_of(contents: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Return the name that Ray keeps an archive of these files under, and the archive; both follow from the files."""
    digest, archive = hashlib.sha256(), io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for name, content in sorted(contents.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            entry = zipfile.ZipInfo(name, _OLDEST)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            writer.writestr(entry, content)
    return f"_ray_pkg_{digest.hexdigest()[:32]}.zip", archive.getvalue()
