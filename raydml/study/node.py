"""What a node must have for a trial: the driver's code, the study's folder, the images, and a GPU that works.

A node that lacks something would fail trial after trial, and faster than any other. It is found before the first trial
where it is there by then, and else by the first actor that starts on it. Its trials run elsewhere.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch

from raydml.study.faults import is_without_memory
from raydml.study.package import PACKAGE, digest_of_package

#: Ray gives each node this label.
_NODE_ID = "ray.io/node-id"
_hosts: dict[str, str] = {}  # of the nodes that have been asked for, by their ids
_CHECK_S = 60.0  # for a node to answer before the first trial: a new process imports torch


class NodeFault(ValueError):
    """A node that no trial can run on; the message begins with the node's id in brackets."""


class NodeNeeds(NamedTuple):
    """What every node of a study must have.

    package: see `digest_of_package`. shared_package: the folder from which the driver and all workers of an embedded
    Ray import it; None on a cluster, whose workers get a copy. torch: its version. folder: of the study. data_root: the
    folder of the images, if any. command_folder: the one that relative paths refer to.
    """

    package: str
    shared_package: str | None
    torch: str
    folder: str
    data_root: str | None
    command_folder: str


def needs_of(folder: Path, data_root: Path | None, *, joined: bool) -> NodeNeeds:
    """Return what the nodes must have for the study in a folder, whose driver this process is.

    joined: whether they belong to a cluster that the driver has joined.
    """
    return NodeNeeds(
        package=digest_of_package(),
        shared_package=None if joined else str(PACKAGE),
        torch=_version_of_torch(),
        folder=str(folder),
        data_root=str(data_root) if data_root else None,
        command_folder=os.getcwd(),
    )


def _version_of_torch() -> str:
    return torch.__version__.partition("+")[0]  # what follows is the kind of build: a head may have no GPU


def fault_of_node(needs: NodeNeeds, *, has_gpu: bool) -> str:
    """Return in words what this node lacks, with the cure; empty if nothing. has_gpu: Ray has assigned one."""
    if needs.package != digest_of_package() and needs.shared_package != str(PACKAGE):
        return f"it runs another raydml, from {PACKAGE}. Cure: remove that copy, or make it the same as the driver's"
    if needs.torch != _version_of_torch():
        return f"it has torch {_version_of_torch()}, the driver {needs.torch}. Cure: install requirements.lock on both"
    return _fault_of_folders(Path(needs.folder), needs.data_root) or (_fault_of_gpu() if has_gpu else "")


def _fault_of_folders(folder: Path, data_root: str | None) -> str:
    place = folder
    try:
        if not (folder / "study.json").exists():
            return f"it does not see the study in {folder}. Cure: mount the shared storage there, under the same path"
        with tempfile.TemporaryFile(dir=folder):
            pass
        if data_root is not None and not (place := Path(data_root)).exists():
            return f"it has no folder machine.data_root = {data_root}. Cure: mount or copy the images there"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of all nodes: the trial stops the study, with the cure
            return ""
        return f"it cannot use {place} ({error.strerror}). Cure: mount it there again, for this user to read and write"
    return ""


def _fault_of_gpu() -> str:
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


def refuse_unfit_node(needs: NodeNeeds) -> None:
    """Raise NodeFault where this node lacks what a trial needs; else go to the folder of the command."""
    if fault := fault_of_node(needs, has_gpu=bool(ray.get_gpu_ids())):
        node = ray.get_runtime_context().get_node_id()
        raise NodeFault(f"[{node}] {name_of_node(socket.gethostname(), node)}: {fault}")
    if Path(needs.command_folder).is_dir():
        os.chdir(needs.command_folder)


def node_fault_in(text: str) -> tuple[str, str] | None:
    """Return the id of the node, and what is wrong with it, from the text of a NodeFault that a worker has raised."""
    found = re.findall(rf"{NodeFault.__name__}: \[(\w+)\] (.+)$", text, re.MULTILINE)
    return (found[-1][0], found[-1][1].strip()) if found else None


def node_of_actor(actor: Any) -> str:
    """Return the name of the node that an actor runs on; empty for None, and where Ray does not know it any more."""
    if actor is None:
        return ""
    node = (ray._private.state.actors(actor._actor_id.hex()).get("Address") or {}).get("NodeID", "")
    if node and node not in _hosts:
        _hosts.update({row["NodeID"]: row["NodeManagerHostname"] for row in ray.nodes()})
    return name_of_node(_hosts[node], node) if node in _hosts else ""


def name_of_node(host: str, node_id: str) -> str:
    """Return how a node is named for a user: several may be on one host."""
    return f"{host} ({node_id[:6]})"


def away_from(bad_nodes: Mapping[str, str]) -> dict[str, str] | None:
    """Return Ray's label selector for every node but some, given by their ids; None where there are none."""
    return {_NODE_ID: f"!in({','.join(bad_nodes)})"} if bad_nodes else None


def fit_nodes(resources: Mapping[str, float], bad_nodes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the nodes of the cluster that have room for a trial, without the bad ones."""
    return [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in bad_nodes
        and all(node["Resources"].get(name.upper(), 0) >= amount for name, amount in resources.items())
    ]


def unfit_nodes(
    needs: NodeNeeds, resources: Mapping[str, float], seen: set[str], is_stopping: Callable[[], bool]
) -> dict[str, str]:
    """Look at each node that could run a trial, and return the ids of those that cannot, with the reasons.

    A node that does not answer, because other studies hold it, for example, is looked at by its first trial.

    seen: the nodes that have been looked at before; those of this call are added. is_stopping: whether to wait no
    longer.
    """
    check = ray.remote(_check_node)
    asked = {
        check.options(num_cpus=0, num_gpus=resources.get("gpu", 0.0), label_selector={_NODE_ID: node["NodeID"]}).remote(
            needs
        ): node["NodeID"]
        for node in fit_nodes(resources, {})
        if node["NodeID"] not in seen
    }
    seen.update(asked.values())
    answered, silent = list[Any](), list(asked)
    until_s = time.monotonic() + _CHECK_S
    while silent and time.monotonic() < until_s and not is_stopping():
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=1.0)
    for task in silent:
        ray.cancel(task, force=True)
    faults = {asked[task]: _answer(task) for task in answered}
    return {node: fault for node, fault in faults.items() if fault}


def _check_node(needs: NodeNeeds) -> str:
    """Return what `refuse_unfit_node` says of the node that this task runs on."""
    try:
        refuse_unfit_node(needs)
    except NodeFault as fault:
        return str(fault).partition("] ")[2]
    return ""


def _answer(task: Any) -> str:
    try:
        return str(ray.get(task))
    except ray.exceptions.RayError as error:  # the code of the driver cannot be loaded there, for example
        return f"a first task failed: {' '.join(str(error).split())[-300:]}"
