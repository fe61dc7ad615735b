"""Trials on nodes that are about to be taken away: each is saved within the notice, and goes on elsewhere.

Ray announces such a node, with a deadline: a spot instance or a pod that is about to end, or one that an autoscaler
removes. Ray starts nothing new there, and leaves what runs to run until the node is gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray

from raydml.study.node import node_of_actor, notices_of_nodes


class Moves(NamedTuple):
    """What one look at the notices has found. notes: for the user. keys: trials to be started elsewhere now."""

    notes: list[str]
    keys: list[str]


class PreemptionWatch:
    """Finds the trials that run on nodes which are about to be taken away, and lets each be saved once.

    A trial is saved at the end of the epoch that it trains, and then has to be started elsewhere. One that starts on
    such a node after the notice, in a process that was there already, has nothing to save.
    """

    def __init__(self) -> None:
        self._noted: set[str] = set()  # ids of the nodes whose notice has been seen
        self._saving: dict[str, tuple[Any, Any]] = {}  # key -> its actor, and the call that saves it

    def look(self, running: Mapping[str, Any]) -> Moves:
        """Return what is new. running: key -> the actor of each trial that runs now."""
        notices = notices_of_nodes()
        moves = Moves([], [])
        if not notices:
            self._saving.clear()
            return moves
        new = notices.keys() - self._noted
        for key, actor in running.items():
            name, node = node_of_actor(actor)
            saving = self._saving.get(key)
            if node not in notices:
                self._saving.pop(key, None)
            elif saving is not None and saving[0] == actor:
                if ray.wait([saving[1]], timeout=0)[0]:  # a failure to save is one of its next steps, too
                    del self._saving[key]
                    moves.keys.append(key)
            elif node in new:
                self._saving[key] = (actor, actor.save_between_epochs.remote())
                moves.notes.append(f"{key}: {name} is about to be taken away{_in_words(notices[node])}")
            else:
                moves.keys.append(key)
        self._noted |= new
        return moves


def _in_words(deadline_s: float) -> str:
    left_s = deadline_s - time.time()
    soon = f", in {max(left_s, 0):.0f} s" if deadline_s else ""
    return f"{soon}: it goes on elsewhere after this epoch"
