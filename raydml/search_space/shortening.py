"""A search space with fewer epochs: what is counted in epochs is cut along with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from raydml.config.trial import StudySettings
from raydml.search_space.domains import Choice, Range, shared_keys, to_plain
from raydml.search_space.yaml_reader import Node

_ORIGIN = "--max-epochs"
_logger = logging.getLogger("raydml")


def with_epochs(trial: Node, study: StudySettings | None, epochs: int) -> tuple[Node, StudySettings | None]:
    """Return a trial (a tree with domains) of this many epochs, and its study, with what a shorter trial cannot have.

    Cut: `study.search.grace_epochs` and `study.refit.epochs` to `epochs`; milestones and warm-ups of the schedule to
    the last epoch (milestones that then coincide are one). In a trial of one epoch nothing of a schedule is left but
    its name, and `step`, which needs a milestone, becomes `constant`. What a method states as a share of the epochs
    follows by itself. A note names what was cut.
    """
    assert epochs >= 1, epochs
    if not isinstance(trial.value, dict):
        return trial, study  # the check of the space refuses it
    notes: list[str] = []
    entries = {key: _with_short_schedules(key, child, epochs, notes) for key, child in trial.value.items()}
    if study is not None and study.search.scheduler != "none" and study.search.grace_epochs > epochs:
        notes.append(f"study.search.grace_epochs {study.search.grace_epochs} -> {epochs}")
        study = study.model_copy(update={"search": study.search.model_copy(update={"grace_epochs": epochs})})
    refit = None if study is None else study.refit
    if study is not None and refit is not None and refit.epochs != "confirmed" and refit.epochs > epochs:
        notes.append(f"study.refit.epochs {refit.epochs} -> {epochs}")
        study = study.model_copy(update={"refit": refit.model_copy(update={"epochs": epochs})})
    if notes:
        plural = "epoch" if epochs == 1 else "epochs"
        _logger.info("note: cut to fit %d %s: %s", epochs, plural, ", ".join(dict.fromkeys(notes)))
    return Node({**entries, "epochs": Node(epochs, _ORIGIN)}, trial.where), study


def _with_short_schedules(key: str, node: Node, epochs: int, notes: list[str]) -> Node:
    """Return the value of a key of a trial, with the schedules in it cut."""
    if key == "schedule":
        return _in_each_item(node, lambda block: _short_schedule(block, epochs, notes))
    if "schedule" not in shared_keys(key):
        return node

    def inside(block: Node) -> Node:
        if not isinstance(block.value, dict):
            return block
        cut = {name: _with_short_schedules(name, child, epochs, notes) for name, child in block.value.items()}
        return Node(cut, block.where)

    return _in_each_item(node, inside)


def _in_each_item(node: Node, change: Callable[[Node], Node]) -> Node:
    """Apply a change to a value, or to each item where it is a choice, to any depth."""
    if not isinstance(node.value, Choice):
        return change(node)
    items = tuple(_in_each_item(item, change) for item in node.value.items)
    return Node(replace(node.value, items=items), node.where)


def _short_schedule(block: Node, epochs: int, notes: list[str]) -> Node:
    if not isinstance(block.value, dict):
        return block
    last = epochs - 1
    if last == 0:
        name = Node("constant", _ORIGIN) if "milestones" in block.value else block.value.get("name")
        kept = {} if name is None else {"name": name}
        notes += [f"trial.schedule.{key} left out" for key in block.value if key not in kept]
        return Node(kept, block.where)
    entries = dict(block.value)
    for key in ("milestones", "warmup_epochs", "new_layer_warmup_epochs"):
        if key not in entries:
            continue
        cut = _in_each_item(entries[key], lambda value: _at_most(value, last))
        if to_plain(cut) != to_plain(entries[key]):
            notes.append(f"trial.schedule.{key} {_written(entries[key])} -> {_written(cut)}")
            entries[key] = cut
    return Node(entries, block.where)


def _at_most(node: Node, limit: int) -> Node:
    """Return a number, a range or a list of numbers, none of them above the limit and none twice in a list."""
    value = node.value
    if isinstance(value, list):
        items = [_in_each_item(item, lambda one: _at_most(one, limit)) for item in value]
        kept = [item for number, item in enumerate(items) if item.value not in [one.value for one in items[:number]]]
        return Node(kept, node.where)
    if isinstance(value, Range):
        if value.low >= limit:
            return Node(limit, node.where)
        above = value.high - 1 if value.kind == "randint" else value.high
        excess = max(0, above - limit)
        steps = -(-excess // value.step) * value.step if value.step else excess
        first = None if value.first is None else min(value.first, limit)
        return Node(replace(value, high=value.high - steps, first=first), node.where)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Node(min(value, limit), node.where)
    return node


def _written(node: Node) -> Any:
    plain = to_plain(node)
    return plain if not isinstance(plain, dict) else str(plain).replace("'", "")
