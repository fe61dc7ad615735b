"""The copy of a driver's folder in an object store, a few seconds behind, and a folder made from such a copy.

Events are appended, and a store cannot append. So the new bytes of events.jsonl become a file of their own in the
store, named by its first and its last byte; files that are next to each other are merged now and then. All other files
of the folder are small, and stored as a whole when they have changed. The checkpoints and the embeddings are in the
store already, see `raydml.study.remote`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from raydml.ops.addresses import redacted
from raydml.ops.files import write_whole
from raydml.ops.object_store import ObjectStore, StoredFile, StoreError
from raydml.study import events
from raydml.study.driver import DEAD_AFTER_S, DELIVERY_LOCK, HOLDER, LOCK, StudyHeld, only_driver
from raydml.study.events import STAGES, events_path
from raydml.study.remote import PART_OF_READS, StudyPlace

EVERY_S = 2.0
_EVENTS = "events"  # the folder of their parts in the store
_MERGE = 32  # so many parts in a row become one
_PROBE = "clock.probe"
_PART = re.compile(rf"{_EVENTS}/(\d+)-(\d+)\.jsonl")
#: What a driver keeps for itself.
_PRIVATE = (LOCK, DELIVERY_LOCK, "tracking.json", "events.jsonl", "output.log")


class MirrorError(ValueError):
    """A study in a store that is not there, or does not fit the folder of its name; the message says the cure."""


class _Part(NamedTuple):
    """Bytes of events.jsonl in the store. rank: how often they were merged."""

    begin: int
    end: int
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{_EVENTS}/{self.begin:015d}-{self.end:015d}.jsonl"


class Mirror:
    """Keeps the copy of a study in an object store at most a few seconds behind its folder: `start`, then `finish`.

    A store that cannot be reached is tried again and again; the study goes on meanwhile, and a note says so.
    """

    def __init__(self, folder: Path) -> None:
        place = StudyPlace.of(folder)
        assert place.uri is not None
        self.folder, self.store = folder, ObjectStore(place.uri)
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and modification time of what is in the store
        self._parts: list[_Part] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self) -> None:
        """Take the study over in the store, and begin to copy. Raises StudyHeld while a driver elsewhere runs it."""
        stored = self.store.names()
        _refuse_held(self.store, stored, self.folder)
        self._parts = _chain(stored)
        if self._parts and not _is_beginning(self.store, self._parts[-1], events_path(self.folder)):
            raise _other_events(self.folder, self.store.uri)
        self.store.put(self.folder / HOLDER, HOLDER)
        self._thread.start()

    def copy(self) -> None:
        """Bring the store up to date. Raises StoreError."""
        with self._lock:
            for file in self._files():
                self._send(file)
            self._send_events()

    def finish(self, within_s: float) -> str:
        """Bring the store up to date at the end of a run; return in a sentence what is missing there, else ""."""
        self._over.set()
        self._thread.join(within_s)
        if self._thread.is_alive():
            return self._behind("it does not answer")
        try:
            self.copy()
            self.store.delete(HOLDER)
        except (StoreError, OSError) as error:
            return self._behind(str(error))
        return ""

    def _behind(self, reason: str) -> str:
        return f"the copy of this study in {self.store.uri} is not complete: {reason.rstrip('.')}"

    def _run(self) -> None:
        fails = False
        while not self._over.wait(EVERY_S):
            try:
                self.copy()
                fails = False
            except (OSError, StoreError) as error:
                if not fails:
                    note = f"{self._behind(redacted(str(error)))}; it is tried again"
                    with suppress(OSError):
                        events.append(events_path(self.folder), {"event": "note", "text": note})
                fails = True

    def _files(self) -> Iterable[Path]:
        """Yield what is copied as a whole, study.json last: without it the copy is no study."""
        last = None
        for path, folders, files in os.walk(self.folder):
            here = Path(path)
            if here == self.folder:
                folders[:] = [name for name in folders if name not in (*STAGES[:-1], _EVENTS, PART_OF_READS)]
            for name in files:
                if name in _PRIVATE or name.startswith(".") or name.endswith((".lock", ".npz.partial")):
                    continue
                if here.name == "final" and name.endswith(".npz"):  # sent by the node that has made it
                    continue
                if here == self.folder and name == "study.json":
                    last = here / name
                else:
                    yield here / name
        if last is not None:
            yield last

    def _send(self, file: Path) -> None:
        name = file.relative_to(self.folder).as_posix()
        try:
            stat = file.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            if self._sent.get(name) != state:
                self.store.put(file, name)
                self._sent[name] = state
        except FileNotFoundError:  # replaced or deleted meanwhile
            return

    def _send_events(self) -> None:
        path = events_path(self.folder)
        begin = self._parts[-1].end if self._parts else 0
        if not path.exists() or path.stat().st_size <= begin:
            return
        with open(path, "rb") as file:
            file.seek(begin)
            new = file.read()
        if not (num_bytes := new.rfind(b"\n") + 1):
            return
        part = _Part(begin, begin + num_bytes)
        self.store.put_bytes(new[:num_bytes], part.name)
        self._parts.append(part)
        while len(last := self._parts[-_MERGE:]) == _MERGE and len({part.rank for part in last}) == 1:
            merged = _Part(last[0].begin, last[-1].end, last[0].rank + 1)
            with open(path, "rb") as file:
                file.seek(merged.begin)
                self.store.put_bytes(file.read(merged.end - merged.begin), merged.name)
            self._parts[-_MERGE:] = [merged]
            for part in last:
                self.store.delete(part.name)


def _chain(stored: Iterable[str]) -> list[_Part]:
    """Return the parts that hold the events from the first byte on, each as long as there is one."""
    found = [_Part(int(named[1]), int(named[2])) for name in stored if (named := _PART.fullmatch(name))]
    longest: dict[int, _Part] = {}
    for part in found:
        longest[part.begin] = max(part, longest.get(part.begin, part), key=lambda one: one.end)
    chain: list[_Part] = []
    while (following := longest.get(chain[-1].end if chain else 0)) is not None and following.end > following.begin:
        chain.append(following)
    return chain


def _is_beginning(store: ObjectStore, part: _Part, path: Path) -> bool:
    """Return whether a file has the bytes of a part where the part says."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        file.seek(part.begin)
        return file.read(part.end - part.begin) == store.get_bytes(part.name)


def _stored_events(store: ObjectStore) -> bytes:
    """Return the events in a store."""
    while True:
        with suppress(FileNotFoundError):  # its driver has merged some meanwhile
            return b"".join(store.get_bytes(part.name) for part in _chain(store.names(_EVENTS)))


def _refuse_held(store: ObjectStore, stored: Mapping[str, StoredFile], folder: Path) -> None:
    """Raise StudyHeld where another process runs the study, of this host or, by the clock of the store, of another."""
    try:
        holder = json.loads(store.get_bytes(HOLDER)) if HOLDER in stored else None
        host, pid = (str(holder["host"]), int(holder["pid"])) if holder else ("", 0)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # gone meanwhile, or written by nobody
        return
    if not pid:
        return
    age = ""
    if host == socket.gethostname():
        if pid == os.getpid() or not Path(f"/proc/{pid}").exists():
            return
    else:
        store.put_bytes(b"", _PROBE)
        probe = store.info(_PROBE)
        store.delete(_PROBE)
        age_s = (probe.time_s if probe else time.time()) - stored[HOLDER].time_s
        if age_s > DEAD_AFTER_S:
            return
        age = f". It was alive {max(age_s, 0):.0f} s ago; if its host is dead, try again in {DEAD_AFTER_S:.0f} s"
    raise StudyHeld(
        f"study {folder.name!r} in {store.uri} is running already, by pid {pid} on {host}. Cure: wait for it, or "
        f"stop it with Ctrl-C there{age}"
    )


def _other_events(folder: Path, uri: str) -> MirrorError:
    return MirrorError(
        f"{folder} and {uri} have different events: both have gone on since they were the same. Cure: move "
        f"{folder} away to go on with the study in the store"
    )


def is_stored(uri: str) -> bool:
    """Return whether there is a study at an address. Raises StoreError."""
    return ObjectStore(uri).info("study.json") is not None


def fetch_study(uri: str, storage: Path) -> Path:
    """Bring the folder of the study at an address into a local storage folder up to date, and return it.

    Events that the store does not have yet stay. Raises StoreError; MirrorError where there is no study, where another
    one has the name in the storage, and where the events of the folder and of the store contradict each other.
    """
    store = ObjectStore(uri)
    try:
        study = json.loads(store.get_bytes("study.json"))
        name, study_id = str(study["name"]), str(study["study_id"])
    except FileNotFoundError:
        raise MirrorError(f"no study at {uri}. Cure: sweep --storage ADDRESS makes one there") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MirrorError(f"study.json at {uri} is damaged. Cure: put it back from a backup") from error
    if not name or Path(name).name != name or name.startswith("."):
        raise MirrorError(f"study.json at {uri} has the name {name!r}. Cure: put it back from a backup")
    folder = storage.resolve() / name
    if (folder / "study.json").exists() and (_id_of(folder) != study_id or StudyPlace.of(folder).uri is None):
        raise MirrorError(
            f"{folder} is another study than the one at {uri}. Cure: name another folder (--storage DIR), or move "
            "it away"
        )
    written, stored = _stored_events(store), store.names()
    before = events_path(folder).read_bytes() if events_path(folder).exists() else b""
    if before.startswith(written):
        if (folder / "study.json").exists():
            return folder  # what is here is newer, or the same
        written = before
    elif not written.startswith(before):
        raise _other_events(folder, uri)
    with only_driver(folder):
        StudyPlace(str(folder), uri).record()
        wanted = [name for name in stored if _is_of_folder(name)]
        for name in sorted(wanted, key=lambda name: name == "study.json"):
            store.get(name, folder / name)
        write_whole(events_path(folder), written)
    return folder


def _id_of(folder: Path) -> str:
    """Return the id of the study in a folder; empty for a damaged one."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads((folder / "study.json").read_text(encoding="utf-8"))["study_id"])
    return ""


def up_to_date(folder: Path) -> Path:
    """Bring the folder of a study up to date with its store, if it has one, and return it. Raises as `fetch_study`."""
    uri = StudyPlace.of(folder).uri
    return folder if uri is None else fetch_study(uri, folder.parent)


def _is_of_folder(name: str) -> bool:
    top, _, rest = name.partition("/")
    of_nodes = (*STAGES[:-1], _EVENTS, PART_OF_READS)
    return not (top in of_nodes and rest) and name not in (HOLDER, _PROBE) and not name.endswith(".npz.partial")
