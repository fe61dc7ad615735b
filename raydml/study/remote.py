"""Studies in an object store: where their files are, and how each process of a study reaches them.

The driver has a folder of the study on its own disk, with all results, and the checkpoints of the best trials alone.
`raydml.study.mirror` copies that folder into the store. What a trial writes goes from its node straight into the store,
and is fetched by the process that needs it. Without a store the driver's folder is on a disk that all nodes share.

In the store, below ``<address>/<name>/``, files have the names that they have in the folder, but for what is appended:

    events/<begin>-<end>.jsonl                bytes of events.jsonl, see `raydml.study.mirror`
    test_reads/<host>-<pid>-<number>.jsonl    reads of the test classes by one process of a node
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from raydml.data.seal import TestKey, TestReads
from raydml.ops.files import write_whole
from raydml.ops.object_store import ObjectStore, StoreError, check_uri
from raydml.training import checkpoint

REMOTE, READS, PART_OF_READS = "remote.json", "test_reads.jsonl", "test_reads"


class StudyPlace(NamedTuple):
    """Where a study is: the driver's folder, and the address of the study in an object store, if it is in one.

    id: of the study there. Another study may be made at the same address, once this one is deleted.
    """

    folder: str
    uri: str | None = None
    id: str = ""

    @classmethod
    def of(cls, folder: Path) -> StudyPlace:
        """Return the place of the study in a folder of this machine. Raises StoreError for a damaged remote.json."""
        file = folder / REMOTE
        if not file.exists():
            return cls(str(folder))
        try:
            recorded = json.loads(file.read_text(encoding="utf-8"))
            uri, study_id = str(recorded["uri"]), str(recorded.get("id", ""))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(
                f'{file} is damaged. Cure: write {{"uri": "ADDRESS"}} into it, with the address of the study, such as '
                f"s3://bucket/studies/{folder.name}"
            ) from error
        return cls(str(folder), check_uri(uri), study_id)

    def record(self) -> None:
        """Write into the folder in which store the study is."""
        if self.uri is not None:
            recorded = {"uri": self.uri, "id": self.id or uuid.uuid4().hex}
            write_whole(Path(self.folder, REMOTE), json.dumps(recorded) + "\n")

    def files_of_driver(self) -> StudyFiles:
        """Return the files as the driver sees them."""
        return StudyFiles(Path(self.folder)) if self.uri is None else StoredFiles(self.uri, Path(self.folder))

    def files_of_node(self) -> StudyFiles:
        """Return the files as a process on any node sees them, which may be the driver's.

        What comes from a store, or goes there, passes through a folder for temporary files.
        """
        if self.uri is None:
            return StudyFiles(Path(self.folder))
        name = hashlib.sha256(f"{self.uri} {self.id}".encode()).hexdigest()[:16]
        return StoredFiles(self.uri, Path(tempfile.gettempdir()) / f"raydml-{os.getuid()}" / name)


class StudyFiles:
    """The files of a study on a disk that all its processes share.

    root: the folder that holds them for this process.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def local(self, path: str | Path, place: StudyPlace) -> Path:
        """Return where a file of the driver's folder is for this process."""
        return self.root / Path(path).relative_to(place.folder)

    def reads(self) -> TestReads:
        """Return the records of the reads of test classes that this process makes."""
        return TestReads(self.root / READS)

    def push(self, path: Path) -> None:
        """Bring a file, or a folder that is written once, to where the other processes find it."""

    def pull(self, path: Path) -> None:
        """Bring a file or folder from there, if this process does not have it."""

    def share(self, folder: Path) -> None:
        """Exchange the files of a folder, each of which is written once, with the other processes."""

    def drop(self, path: Path) -> None:
        """Delete a folder for the other processes."""

    def tidy(self, path: Path) -> None:
        """Delete the copy of this process of what it has pushed or pulled."""

    def runs(self, stage: str) -> list[str]:
        """Return the folders of the starts of a stage, ``run-000`` and so on, in order."""
        return sorted(path.name for path in (self.root / stage).glob("run-*"))

    def newest_intact(self, parent: Path, damaged: list[str]) -> Path | None:
        """Return the newest intact checkpoint in a folder, see `raydml.training.checkpoint.newest_intact`."""
        return self._newest(parent, damaged, whole=True)

    def newest_checkpoint(
        self, stage: str, key: str, damaged: list[str] | None = None, *, whole: bool = True
    ) -> Path | None:
        """Return the newest intact checkpoint of a trial over all starts of its stage.

        What is wrong with each newer one is added to ``damaged``. whole: not only its card and its history.
        """
        noted = [] if damaged is None else damaged
        for run in reversed(self.runs(stage)):
            if (found := self._newest(self.root / stage / run / key, noted, whole=whole)) is not None:
                return found
        return None

    def _newest(self, parent: Path, damaged: list[str], *, whole: bool) -> Path | None:  # noqa: ARG002 - all is here
        return checkpoint.newest_intact(parent, damaged)

    def stored_bytes(self, stage: str, key: str) -> int | None:
        """Return the size of the checkpoints of a trial, None without any; two of them may share a file."""
        paths = self._checkpoints(stage, key)
        found = [file.stat() for path in paths for file in path.iterdir()]
        return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in found}.values()) if paths else None

    def drop_checkpoints(self, stage: str, key: str) -> list[str]:
        """Delete the checkpoints of a trial; return in a sentence each what cannot be deleted, and why."""
        failures = []
        for path in self._checkpoints(stage, key):
            try:
                shutil.rmtree(path)
            except OSError as error:
                failures.append(f"cannot delete {path}: {error}")
        return failures

    def _checkpoints(self, stage: str, key: str) -> list[Path]:
        names = ("checkpoint_*", ".checkpoint_*.partial")  # with those that a fault has left unfinished
        return sorted(path for name in names for path in (self.root / stage).glob(f"run-*/{key}/{name}"))


class StoredFiles(StudyFiles):
    """The files of a study in an object store. uri: of the study. root: the folder of this process for copies."""

    def __init__(self, uri: str, root: Path) -> None:
        super().__init__(root)
        self.store = ObjectStore(uri)
        self._pushed: dict[tuple[int, int], str] = {}  # device and inode of pushed weights -> their name in the store

    def reads(self) -> TestReads:
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        return PushedReads(self.root / PART_OF_READS / name, self)

    def push(self, path: Path) -> None:
        if path.is_file():
            self.store.put(path, self._name(path))
            return
        files = {self._name(file): file for file in path.rglob("*") if file.is_file()}
        for file in (files[name] for name in _manifest_last(files)):
            if file.name != checkpoint.WEIGHTS or not self._push_again(file):
                self.store.put(file, self._name(file))

    def _push_again(self, weights: Path) -> bool:
        """Store weights that an earlier checkpoint shares, without sending them again; return whether that was done."""
        stat = weights.stat()
        file = (stat.st_dev, stat.st_ino)
        before, self._pushed = self._pushed.get(file), {file: self._name(weights)}
        if before is None or before == self._name(weights):
            return False
        try:
            self.store.copy(before, self._name(weights))
        except FileNotFoundError:  # deleted meanwhile
            return False
        return True

    def pull(self, path: Path) -> None:
        name = self._name(path)
        if not path.exists() and self.store.info(name) is not None:
            self.store.get(name, path)
            return
        for found in _manifest_last(self.store.names(name)):
            if not (self.root / found).exists():
                self.store.get(found, self.root / found)

    def share(self, folder: Path) -> None:
        stored = self.store.names(self._name(folder))
        for name in stored:
            if not (self.root / name).exists():
                self.store.get(name, self.root / name)
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if self._name(file) not in stored and not file.name.startswith("."):
                self.store.put(file, self._name(file))

    def drop(self, path: Path) -> None:
        self.store.delete_below(self._name(path))

    def tidy(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def runs(self, stage: str) -> list[str]:
        return sorted({*super().runs(stage), *self.store.folders(stage)})

    def newest_intact(self, parent: Path, damaged: list[str]) -> Path | None:
        stored = list(self.store.names(self._name(parent)))
        found = self._newest_of(stored, parent, damaged, whole=True)
        if found is not None:  # a trial that has moved leaves older ones behind
            folders = {(self.root / name).parent for name in stored}
            for old in checkpoint.in_order(list(folders - {found}))[checkpoint.NUM_KEPT - 1 :]:
                self.drop(old)
        return found

    def stored_bytes(self, stage: str, key: str) -> int | None:
        below = [f"{stage}/{run}/{key}" for run in self.store.folders(stage)]
        found = [file.size for name in below for file in self.store.names(name).values()]
        return sum(found) if found else None

    def drop_checkpoints(self, stage: str, key: str) -> list[str]:
        failures = super().drop_checkpoints(stage, key)  # what this process has fetched
        try:
            for run in self.store.folders(stage):
                self.store.delete_below(f"{stage}/{run}/{key}")
        except StoreError as error:
            failures.append(f"cannot delete the checkpoints of {key}: {error}")
        return failures

    def _newest(self, parent: Path, damaged: list[str], *, whole: bool) -> Path | None:
        return self._newest_of(list(self.store.names(self._name(parent))), parent, damaged, whole=whole)

    def _newest_of(self, stored: Sequence[str], parent: Path, damaged: list[str], *, whole: bool) -> Path | None:
        """Return the newest intact checkpoint in a folder, which is fetched. stored: the files of it in the store."""
        names = {Path(name).parent.name for name in stored if Path(name).name == checkpoint.MANIFEST}
        here = {path.name for path in parent.iterdir() if path.is_dir()} if parent.is_dir() else set()
        looked_at = checkpoint.FILES if whole else (checkpoint.CARD, checkpoint.HISTORY)
        for folder in checkpoint.in_order([parent / name for name in {*names, *here} if not name.startswith(".")]):
            if folder.name in here and checkpoint.is_intact(folder):
                return folder
            if folder.name not in names:  # what was here alone is damaged
                continue
            chosen = [name for name in stored if Path(name).parent.name == folder.name]
            for name in _manifest_last(chosen):
                if Path(name).name in (*looked_at, checkpoint.MANIFEST):
                    self.store.get(name, self.root / name)
            damage = checkpoint.damage_of(folder, looked_at)
            if damage is None:
                return folder
            damaged.append(damage)
            self.tidy(folder)
        return None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


class PushedReads(TestReads):
    """Records of reads that are in the store before the images are opened."""

    def __init__(self, path: Path, files: StoredFiles) -> None:
        super().__init__(path)
        self._files = files

    def record(self, *, purpose: str, checkpoint: str | Path, commit: str) -> TestKey:
        key = super().record(purpose=purpose, checkpoint=checkpoint, commit=commit)
        assert self.path is not None
        self._files.push(self.path)
        return key


def _manifest_last(names: Iterable[str]) -> list[str]:
    """Return names in the order in which files are copied: a manifest says that the others are there."""
    return sorted(names, key=lambda name: name.rpartition("/")[2] == checkpoint.MANIFEST)


@functools.lru_cache(maxsize=64)
def _files_of_driver(place: StudyPlace) -> StudyFiles:
    return place.files_of_driver()


def files_of_study(folder: Path) -> StudyFiles:
    """Return the files of the study in a folder of this machine, as the driver sees them."""
    return _files_of_driver(StudyPlace.of(folder))


def merge_reads(folder: Path) -> None:
    """Add the reads of test classes that other processes have recorded in the store to those of the driver's folder."""
    files = files_of_study(folder)
    if not isinstance(files, StoredFiles):
        return
    file = folder / READS
    known = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()
    parts = [files.store.get_bytes(name).decode() for name in sorted(files.store.names(PART_OF_READS))]
    new = sorted({line for part in parts for line in part.splitlines() if line.strip()} - known)
    if new:
        whole = file.read_text(encoding="utf-8") if file.exists() else ""
        write_whole(file, whole + "".join(f"{line}\n" for line in new))
