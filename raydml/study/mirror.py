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
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from raydml.ops.addresses import redacted
from raydml.ops.files import write_whole
from raydml.ops.object_store import ObjectStore, StoreError
from raydml.study import events
from raydml.study.driver import DEAD_AFTER_S, DELIVERY_LOCK, HOLDER, LOCK, StudyHeld, only_driver
from raydml.study.events import STAGES, events_path
from raydml.study.remote import PART_OF_READS, REMOTE, StudyPlace, merge_reads

EVERY_S = 2.0
_EVENTS = "events"  # the folder of their parts in the store
_MERGE = 32  # so many parts in a row become one
_HOLD_EVERY_S, _SETTLE_S = 5.0, 0.5
_PART = re.compile(rf"{_EVENTS}/(\d+)-(\d+)\.jsonl")
#: What a driver keeps for itself.
_PRIVATE = (LOCK, HOLDER, DELIVERY_LOCK, REMOTE, "tracking.json", "events.jsonl", "output.log")


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

    A store that cannot be reached is tried again and again; the study goes on meanwhile, and a note says so. Where
    another driver has taken the study over meanwhile, nothing more is copied.

    on_lost: is called once when that is found.
    """

    def __init__(self, folder: Path, on_lost: Callable[[], None] = lambda: None) -> None:
        place = StudyPlace.of(folder)
        assert place.uri is not None
        self.folder, self.store = folder, ObjectStore(place.uri)
        self._on_lost, self._is_lost = on_lost, False
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and modification time of what is in the store
        self._parts: list[_Part] = []
        self._token = uuid.uuid4().hex
        self._over, self._is_complete = threading.Event(), threading.Event()
        self._lock, self._events_lock = threading.Lock(), threading.Lock()
        self._failure = ""  # of the last copy
        self._threads = [
            threading.Thread(target=self._copy_files, name="mirror", daemon=True),
            # A large file must neither hold up the events nor make a driver that lives look dead.
            threading.Thread(target=self._copy_events, name="mirror-events", daemon=True),
        ]

    def start(self) -> None:
        """Take the study over in the store, and begin to copy. Raises StudyHeld while a driver elsewhere runs it."""
        stored = self.store.names()
        refuse_held(self.folder)
        self._parts = _chain(stored)
        if self._parts and not _is_beginning(self.store, self._parts[-1], events_path(self.folder)):
            raise _other_events(self.folder, self.store.uri)
        self._hold()
        time.sleep(_SETTLE_S)  # of two drivers that begin at once, the last one has it
        if not self._holds():
            refuse_held(self.folder)
        here = {file.relative_to(self.folder).as_posix() for file in self._files()}
        for name in stored:
            kept = name in here or (name.startswith("final/") and (self.folder / name).exists())
            if _is_of_folder(name) and not kept:  # deleted here, because it is made anew
                self.store.delete(name)
        for thread in self._threads:
            thread.start()

    def copy(self) -> None:
        """Bring the store up to date. Raises StoreError."""
        with self._lock:
            here = list(self._files())
            for file in here:
                if self._is_lost:
                    return
                self._send(file)
            for name in self._sent.keys() - {file.relative_to(self.folder).as_posix() for file in here}:
                self.store.delete(name)
                del self._sent[name]
        self._send_events()

    def finish(self, within_s: float) -> str:
        """Bring the store up to date at the end of a run; return in a sentence what is missing there, else ""."""
        self._over.set()
        if self._threads[0].ident is None:  # it was not started
            return ""
        if not self._is_complete.wait(within_s):
            return self._behind(self._failure or "it does not answer")
        return self._behind("another driver has taken the study over") if self._is_lost else ""

    def _hold(self) -> None:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "token": self._token}
        self.store.put_bytes(json.dumps(holder).encode(), HOLDER)

    def _holds(self) -> bool:
        """Return whether no other driver has taken the study over."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return bool(json.loads(self.store.get_bytes(HOLDER))["token"] == self._token)
        return True  # nobody has it

    def _copy_files(self) -> None:
        while True:
            is_last = self._over.wait(EVERY_S)
            if self._is_lost:
                self._is_complete.set()
                return
            try:
                self.copy()
                if is_last:
                    if self._holds():
                        self.store.delete(HOLDER)
                    self._is_complete.set()
                    return
                self._failure = ""
            except (OSError, StoreError) as error:
                if not self._failure and not is_last:
                    note = f"{self._behind(redacted(str(error)))}; it is tried again"
                    with suppress(OSError):
                        events.append(events_path(self.folder), {"event": "note", "text": note})
                self._failure = redacted(str(error))
                time.sleep(_SETTLE_S)

    def _copy_events(self) -> None:
        held_s = time.monotonic()
        while not self._over.wait(EVERY_S):
            with suppress(OSError, StoreError):  # the other thread notes it
                if time.monotonic() - held_s >= _HOLD_EVERY_S:
                    if not self._holds():
                        self._is_lost = True
                        self._on_lost()
                        return
                    self._hold()
                    held_s = time.monotonic()
                self._send_events()

    def _behind(self, reason: str) -> str:
        return f"the copy of this study in {self.store.uri} is not complete: {reason.rstrip('.')}"

    def _files(self) -> Iterable[Path]:
        """Yield what is copied as a whole, study.json last: without it the copy is no study."""
        last = None
        for path, folders, files in os.walk(self.folder):
            here = Path(path)
            folders[:] = [name for name in folders if not name.startswith(".")]
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
        if (self.folder / REMOTE).exists():
            yield self.folder / REMOTE
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
        with self._events_lock:
            if not self._is_lost:
                self._send_new_events()

    def _send_new_events(self) -> None:
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


def refuse_held(folder: Path) -> None:
    """Raise StudyHeld where another process runs the study of a folder that is in a store; do nothing for others.

    A process of this machine is found by its number. One of another is dead if it has not been heard of for a while by
    the clock of the store.
    """
    place = StudyPlace.of(folder)
    if place.uri is None:
        return
    store = ObjectStore(place.uri)
    try:
        holder = json.loads(store.get_bytes(HOLDER))
        host, pid, machine = str(holder["host"]), int(holder["pid"]), str(holder["machine"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # nobody, or written by something else
        return
    found = store.info(HOLDER)
    if found is None or (machine == _machine() and (pid == os.getpid() or not _is_alive(pid))):
        return
    probe_name = f".{uuid.uuid4().hex}.partial"
    store.put_bytes(b"", probe_name)
    probe = store.info(probe_name)
    store.delete(probe_name)
    age_s = (probe.time_s if probe else time.time()) - found.time_s
    if age_s <= DEAD_AFTER_S:
        raise StudyHeld(
            f"study {folder.name!r} in {redacted(store.uri)} is running already, by pid {pid} on {host}. Cure: wait "
            f"for it, or stop it with Ctrl-C there. It was alive {max(age_s, 0):.0f} s ago; if its host is dead, try "
            f"again in {DEAD_AFTER_S:.0f} s"
        )


def _machine() -> str:
    """Return a text that no other machine has, and no other container, also where both have the same host name."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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
        StudyPlace(str(folder), uri, _id_in(store)).record()
        wanted = {name for name in stored if _is_of_folder(name)}
        for name in sorted(wanted, key=lambda name: name == "study.json"):
            with suppress(FileNotFoundError):  # its driver makes it anew
                store.get(name, folder / name)
        for file in [path for path in folder.rglob("*") if path.is_file()]:
            name = file.relative_to(folder).as_posix()
            if _is_of_folder(name) and name not in wanted:  # of an older state
                file.unlink()
        write_whole(events_path(folder), written)
        merge_reads(folder)
    return folder


def _id_in(store: ObjectStore) -> str:
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return str(json.loads(store.get_bytes(REMOTE))["id"])
    return ""


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
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return not (top in of_nodes and rest) and name not in _PRIVATE and not is_hidden and not name.endswith(".lock")
