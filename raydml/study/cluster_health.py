"""What the nodes of a running cluster have and lack, without a study."""

from __future__ import annotations

import tempfile
from collections.abc import MutableMapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import ray

from raydml.study.cluster import connected
from raydml.study.node import look_at_nodes, name_of_node, needs_of
from raydml.study.remote import StudyPlace

_BUSY_S = 15.0  # for a node whose GPUs other studies may hold


class NodeHealth(NamedTuple):
    """A node of a cluster: what Ray counts there, and why no trial can run on it; empty if one can."""

    name: str
    num_cpus: float
    num_gpus: float
    fault: str


def look_at_cluster(
    address: str, storage: Path | str | None, data_root: Path | None, environment: MutableMapping[str, str] | None
) -> tuple[list[NodeHealth], list[str]]:
    """Return the nodes of a cluster, and notes on them. Raises StudyError where it cannot be joined.

    storage: that each node must see, or the address of a store that it must reach. environment: of this process, for
    `connected`.
    """
    with ExitStack() as stack:
        stack.enter_context(connected(address, environment))
        uri = storage if isinstance(storage, str) else None
        place = None if storage is None else StudyPlace(str(storage), uri)
        needs = needs_of(place, data_root, joined=True)
        if isinstance(storage, Path):
            mark = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".raydml-doctor-", dir=storage))
            needs = needs._replace(mark=Path(mark.name).name)
        seen = set[str]()
        with_gpus = look_at_nodes(needs, {"gpu": 1.0}, seen, lambda: False, patience_s=_BUSY_S)
        seen -= set(with_gpus.silent)  # their GPUs may be in use
        others = look_at_nodes(needs, {}, seen, lambda: False)
        faults = {**with_gpus.faults, **others.faults}
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        names = {node: name_of_node(row["NodeManagerHostname"], node) for node, row in alive.items()}
        faults |= {
            node: f"{names.get(node)}: it does not answer. Cure: see `ray status` on the head" for node in others.silent
        }
        nodes = [
            NodeHealth(
                names[node], row["Resources"].get("CPU", 0), row["Resources"].get("GPU", 0), faults.get(node, "")
            )
            for node, row in alive.items()
        ]
        busy = [f"{names[node]}: its GPUs are in use, and were not tried" for node in with_gpus.silent if node in names]
        return nodes, [*with_gpus.notes, *others.notes, *busy]
