"""What a node must have for a trial: the driver's code, the study's folder, the images, and a GPU that works.

A node that lacks something would fail trial after trial, and faster than any other. It is found before the first trial
where it is there by then, and else by the first actor that starts on it. Its trials run elsewhere. What only slows a
node down, or spoils its records, is noted.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray

from raydml.ops.object_store import ObjectStore, StoreError
from raydml.study.health import note_of_shared_memory, shared_memory_bytes
from raydml.study.package import PACKAGE, digest_of_package
from raydml.study.remote import StudyPlace

#: Ray gives each node this label.
_NODE_ID = "ray.io/node-id"
_hosts: dict[str, str] = {}  # of the nodes that have been asked for, by their ids
_CHECK_S = 60.0  # for a node to answer before the first trial: a new process imports torch


_MAX_APART_S = 5.0  # between the clocks of two machines
#: Ray's words where a worker cannot load the code of an actor or of what it gets, and the error behind them.
_NOT_LOADED = re.compile("failed to import on the worker|input arguments for this task could not be computed")
#: An actor in Ray's words for one that could not be set up, and for one whose process has died.
_ACTOR_ID = re.compile(r"actor_id(?:=|: )([0-9a-f]+)")
_NO_LIBRARY = re.compile(r"^\s*((?:ModuleNotFound|Import|OS)Error: .+)$", re.MULTILINE)


STUDY_FILE = "study.json"


class NodeFault(ValueError):
    """A node that no trial can run on; the message begins with the node's id in brackets."""


class NodeNeeds(NamedTuple):
    """What every node of a study must have.

    package: see `digest_of_package`. shared_package: the folder from which the driver and all workers of an embedded
    Ray import it; None on a cluster, whose workers get a copy. torch: its version. place: of the study; None where
    there is none yet. data_root: the folder of the images, if any. command_folder: the one that relative paths refer
    to. mark: a file in the folder, by which a node knows that it sees the same one.
    """

    package: str
    shared_package: str | None
    torch: str
    place: StudyPlace | None
    data_root: str | None
    command_folder: str
    mark: str = STUDY_FILE

    @property
    def is_joined(self) -> bool:
        """Whether the nodes belong to a cluster that the driver has joined."""
        return self.shared_package is None


class NodeReport(NamedTuple):
    """What a node reports of itself.

    fault: of `fault_of_node`. clock_s: its time of day. cache_dir: of decoded images, if any; missing_bytes: of those
    of the study that it does not have there; free_bytes: on that disk. shared_memory_bytes: the size of /dev/shm; None
    where a system has none.
    """

    fault: str
    clock_s: float
    cache_dir: str | None = None
    missing_bytes: int = 0
    free_bytes: int = 0
    shared_memory_bytes: int | None = None


def needs_of(place: StudyPlace | None, data_root: Path | None, *, joined: bool) -> NodeNeeds:
    """Return what the nodes must have for the study at a place, whose driver this process is.

    joined: whether they belong to a cluster that the driver has joined.
    """
    return NodeNeeds(
        package=digest_of_package(),
        shared_package=None if joined else str(PACKAGE),
        torch=_version_of_torch(),
        place=place,
        data_root=str(data_root) if data_root else None,
        command_folder=os.getcwd(),
    )


def _version_of_torch() -> str:
    import torch  # not before Ray is started

    return torch.__version__.partition("+")[0]  # what follows is the kind of build: a head may have no GPU


def fault_of_node(needs: NodeNeeds, *, has_gpu: bool) -> str:
    """Return in words what this node lacks, with the cure; empty if nothing. has_gpu: Ray has assigned one."""
    if needs.package != digest_of_package() and needs.shared_package != str(PACKAGE):
        return f"it runs another raydml, from {PACKAGE}. Cure: remove that copy, or make it the same as the driver's"
    if needs.torch != _version_of_torch():
        return f"it has torch {_version_of_torch()}, the driver {needs.torch}. Cure: install requirements.lock on both"
    return _fault_of_folders(needs.place, needs.mark, needs.data_root) or (_fault_of_gpu() if has_gpu else "")


def _fault_of_folders(study: StudyPlace | None, mark: str, data_root: str | None) -> str:
    place = Path(tempfile.gettempdir() if study is None or study.uri else study.folder)
    try:
        if study is not None:
            if study.uri is not None:
                if fault := _fault_of_store(study.uri):
                    return fault
            elif not (place / mark).exists():
                what = f"the study in {study.folder}" if mark == STUDY_FILE else study.folder
                return f"it does not see {what}. Cure: mount the shared storage there, under the same path"
            with tempfile.TemporaryFile(dir=place):
                pass
        if data_root is not None and not (place := Path(data_root)).exists():
            return f"it has no folder machine.data_root = {data_root}. Cure: mount or copy the images there"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of all nodes: the trial stops the study, with the cure
            return ""
        return f"it cannot use {place} ({error.strerror}). Cure: mount it there again, for this user to read and write"
    return ""


def _fault_of_store(uri: str) -> str:
    """Return in words why a store cannot be used from this node; empty where a file can be written and deleted."""
    try:
        ObjectStore(uri).check()
    except StoreError as error:
        return f"it cannot use the store of the study: {error}"
    return ""


def _fault_of_gpu() -> str:
    import torch

    from raydml.study.faults import is_without_memory

    try:
        torch.zeros(1, device="cuda").item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        if is_without_memory(error):  # of other processes: the trial itself waits for some
            return ""
        said = " ".join(str(error).split())[:200]
        return (
            f"Ray counts a GPU there, and torch cannot use it ({said}). Cure: repair its driver, start the node with "
            "--num-gpus=0, or --set machine.gpus_per_trial=0"
        )
    return ""


def note_of_changed_code(needs: NodeNeeds) -> str:
    """Return a sentence where the code on this machine has changed since the driver of the study began; else empty."""
    if needs.package == digest_of_package():
        return ""
    return f"files in {PACKAGE} were changed since the study began; this trial and later ones may run the new code"


def refuse_unfit_node(needs: NodeNeeds, *, has_gpu: bool) -> None:
    """Raise NodeFault where this node lacks what a trial needs; else go to the folder of the command.

    has_gpu: whether the trial computes on a GPU that Ray has assigned to it.
    """
    if fault := fault_of_node(needs, has_gpu=has_gpu):
        node = ray.get_runtime_context().get_node_id()
        raise NodeFault(f"[{node}] {name_of_node(socket.gethostname(), node)}: {fault}")
    if Path(needs.command_folder).is_dir():
        os.chdir(needs.command_folder)


def node_fault_in(text: str) -> tuple[str, str] | None:
    """Return the id of the node, and what is wrong with it, from the text of an error that a worker has raised.

    It is a NodeFault, or Ray's own error where the node cannot load the code of an actor.
    """
    if found := re.findall(rf"{NodeFault.__name__}: \[(\w+)\] (.+)$", text, re.MULTILINE):
        return found[-1][0], found[-1][1].strip()
    fault, actors = _fault_of_loading(text), _ACTOR_ID.findall(text)
    if not fault or not actors:
        return None
    node = _node_of_actor_id(actors[-1])
    return (node, f"{name_of_node(_host_of(node), node)}: {fault}") if node else None


def _fault_of_loading(text: str) -> str:
    """Return in words that a node cannot load code that the driver has loaded: a library is missing there."""
    found = _NOT_LOADED.search(text)
    said = _NO_LIBRARY.findall(text[found.end() :]) if found else []
    return f"it cannot load raydml ({said[-1].strip()[:200]}). Cure: install requirements.lock there" if said else ""


def node_of_actor(actor: Any) -> tuple[str, str]:
    """Return the name and the id of the node that an actor runs on; empty for None, and where Ray has forgotten it."""
    node = "" if actor is None else _node_of_actor_id(actor._actor_id.hex())
    return (name_of_node(_host_of(node), node) if _host_of(node) else ""), node


def _node_of_actor_id(actor_id: str) -> str:
    """Return the id of the node of an actor, also of one that has died; empty where Ray does not know it."""
    return str((ray._private.state.actors(actor_id).get("Address") or {}).get("NodeID") or "")


def _host_of(node_id: str) -> str:
    """Return the host of a node; empty where Ray does not know it."""
    if node_id and node_id not in _hosts:
        _hosts.update({row["NodeID"]: row["NodeManagerHostname"] for row in ray.nodes()})
    return _hosts.get(node_id, "")


def notices_of_nodes() -> dict[str, float]:
    """Return the ids of the nodes that are about to be taken away, and when (seconds since 1970; 0: not said)."""
    return {node: time_ms / 1000 for node, time_ms in ray._private.state.state.get_draining_nodes().items()}


def name_of_node(host: str, node_id: str) -> str:
    """Return how a node is named for a user: several may be on one host."""
    return f"{host} ({node_id[:6]})"


def selector_of(labels: Mapping[str, str], bad_nodes: Mapping[str, str]) -> dict[str, str]:
    """Return Ray's label selector for the nodes with these labels, but for some, given by their ids."""
    return {**labels, **({_NODE_ID: f"!in({','.join(bad_nodes)})"} if bad_nodes else {})}


def fit_nodes(
    resources: Mapping[str, float], bad_nodes: Mapping[str, str], labels: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return the nodes of the cluster that have room for a trial, without the bad ones and those that go away.

    labels: a label selector that they satisfy.
    """
    unused = {*bad_nodes, *notices_of_nodes()}
    return [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in unused
        and all(node["Resources"].get(name.upper(), 0) >= amount for name, amount in resources.items())
        and all(_satisfies(node["Labels"].get(key), wanted) for key, wanted in (labels or {}).items())
    ]


def _satisfies(value: str | None, wanted: str) -> bool:
    """Return whether a node with this value of a label is one that Ray's selector allows. None: without the label."""
    negative, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    allowed = wanted[3:-1].split(",") if wanted.startswith("in(") and wanted.endswith(")") else [wanted]
    return (value in [one.strip() for one in allowed]) != negative


def packs_in(cache_dir: Path | None, since_s: float) -> dict[str, int]:
    """Return the sizes of the folders of images and features that were opened since a time, by their names."""
    if cache_dir is None:
        return {}
    found = [file for kind in ("images", "features") for file in cache_dir.glob(f"{kind}-*/manifest.json")]
    manifests = [file for file in found if file.stat().st_mtime >= since_s]
    return {file.parent.name: sum(part.stat().st_size for part in file.parent.iterdir()) for file in manifests}


class NodesSeen(NamedTuple):
    """What was found on some nodes.

    faults: ids of those that no trial can run on, and why. notes: on others. silent: ids of those that did not answer.
    """

    faults: dict[str, str]
    notes: list[str]
    silent: list[str]


def look_at_nodes(
    needs: NodeNeeds,
    resources: Mapping[str, float],
    seen: set[str],
    is_stopping: Callable[[], bool],
    *,
    labels: Mapping[str, str] | None = None,
    cache_dir: str | None = None,
    packs: Mapping[str, int] | None = None,
    patience_s: float = _CHECK_S,
) -> NodesSeen:
    """Look at each node that could run a trial.

    A node that does not answer, because other studies hold it, for example, is looked at by its first trial.

    seen: the nodes that have been looked at before; those of this call are added. is_stopping: whether to wait no
    longer. labels: that the nodes have. cache_dir: of decoded images. packs: those of the study, as `packs_in` returns
    them.
    """
    check = ray.remote(_check_node)
    nodes = {node["NodeID"]: node for node in fit_nodes(resources, {}, labels) if node["NodeID"] not in seen}
    asked = {
        check.options(num_cpus=0, num_gpus=resources.get("gpu", 0.0), label_selector={_NODE_ID: node}).remote(
            needs, cache_dir, packs or {}
        ): node
        for node in nodes
    }
    seen.update(nodes)
    faults, notes, silent = dict[str, str](), list[str](), list[Any](asked)
    until_s = time.monotonic() + patience_s
    while silent and time.monotonic() < until_s and not is_stopping():
        answered, silent = ray.wait(silent, timeout=1.0)
        for task in answered:  # one at a time: the clock of a node is compared with the time of its answer
            node = nodes[asked[task]]
            name = name_of_node(node["NodeManagerHostname"], node["NodeID"])
            found, received_s = _answer(task), time.time()
            if found.fault:
                faults[node["NodeID"]] = f"{name}: {found.fault}"
            store_bytes = node["Resources"].get("object_store_memory", 0)
            notes += [f"{name}: {note}" for note in notes_of_node(found, received_s, store_bytes)]
    for task in silent:
        ray.cancel(task, force=True)
    return NodesSeen(faults, notes, [asked[task] for task in silent])


def notes_of_node(report: NodeReport, received_s: float, store_bytes: float) -> list[str]:
    """Return in words what is not right on a node, and no fault.

    received_s: when its report arrived, by the clock here. store_bytes: of Ray's object store there.
    """
    notes = []
    if (apart_s := abs(report.clock_s - received_s)) > _MAX_APART_S:
        side = "ahead of" if report.clock_s > received_s else "behind"
        notes.append(
            f"its clock is {apart_s:,.0f} s {side} the driver's, and so are the times in its records of test reads and "
            "in its logs. Cure: synchronise the clocks of all nodes (chrony, NTP)"
        )
    if report.missing_bytes > report.free_bytes:
        notes.append(
            f"machine.cache_dir = {report.cache_dir} has {report.free_bytes / 2**30:.1f} GiB free, and the decoded "
            f"images take {report.missing_bytes / 2**30:.1f} GiB: its trials decode them in each epoch, which is slow. "
            "Cure: free space there, or a machine.cache_dir on another disk"
        )
    if note := note_of_shared_memory(report.shared_memory_bytes, store_bytes):
        notes.append(note)
    return notes


def note_of_room(resources: Mapping[str, float], labels: Mapping[str, str] | None = None) -> str:
    """Return a sentence where no node of the cluster has room for a trial: which is the largest; else empty."""
    if fit_nodes(resources, {}, labels):
        return ""
    if labels and fit_nodes(resources, {}):
        wanted = ", ".join(f"{key}: {value}" for key, value in labels.items())
        return (
            f"No node has room for a trial and the labels machine.node_labels = {{{wanted}}}. The trials wait for one "
            "that joins, or that the autoscaler starts; `ray list nodes --detail` shows the labels of each."
        )
    sizes = [
        (node["Resources"].get("GPU", 0), node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]
    ]
    gpus, cpus = max(sizes, default=(0, 0))
    return (
        f"No node has the {resources.get('cpu', 0):g} CPU and {resources.get('gpu', 0):g} GPU that a trial needs, and "
        f"the largest has {cpus:g} CPU and {gpus:g} GPU. The trials wait for a node that joins, or that the autoscaler "
        "starts; `ray status` on the head shows what it can start."
    )


def _check_node(needs: NodeNeeds, cache_dir: str | None, packs: Mapping[str, int]) -> NodeReport:
    """Return what the node that this task runs on reports."""
    fault = fault_of_node(needs, has_gpu=bool(ray.get_gpu_ids()))
    missing_bytes = free_bytes = 0
    if cache_dir is not None:
        with suppress(OSError):  # a folder that cannot be used is found by the first trial, with the cure
            folder = Path(cache_dir)
            place = next(path for path in (folder, *folder.parents) if path.is_dir())
            free_bytes = shutil.disk_usage(place).free
            missing_bytes = sum(size for name, size in packs.items() if not (folder / name / "manifest.json").exists())
    return NodeReport(fault, time.time(), cache_dir, missing_bytes, free_bytes, shared_memory_bytes())


def _answer(task: Any) -> NodeReport:
    try:
        found: NodeReport = ray.get(task)
    except ray.exceptions.RayError as error:  # the code of the driver cannot be loaded there, for example
        fault = _fault_of_loading(str(error)) or f"a first task failed: {' '.join(str(error).split())[-300:]}"
        return NodeReport(fault, time.time())
    return found
