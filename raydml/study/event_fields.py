"""What each kind of event must have, so that no reader of a damaged line fails later.

The fields are checked that readers use, with their types; an event of an unknown kind only needs a name and a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

_Check = Callable[[Any], bool]

_MAX_TIME_S = 253_402_300_799  # 31 December 9999
_MAX_COUNT = 1_000_000  # trials, epochs, workers
_MAX_LEVELS = 30


def is_event(event: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is an event that every reader of a study can use."""
    kind, time_s = event.get("event"), event.get("time", 0.0)
    if type(kind) is not str or not _is_time(time_s):
        return False
    if kind == "epoch":  # nearly all lines of a file
        return (
            type(event.get("trial")) is str
            and type(event.get("stage", "")) is str
            and _is_count(event.get("epoch"))
            and _are_metrics(event.get("metrics"))
        )
    required, optional = _FIELDS.get(kind, ({}, {}))
    return (
        _is_plain(event, _MAX_LEVELS)
        and all(check(event.get(name)) for name, check in required.items())
        and _fit(event, optional)
    )


def _fit(entries: Mapping[str, Any], checks: Mapping[str, _Check]) -> bool:
    """Return whether each entry that is there, and is not None, passes its check."""
    return all(entries.get(name) is None or check(entries[name]) for name, check in checks.items())


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_time(value: Any) -> bool:
    return type(value) in (float, int) and 0 <= value <= _MAX_TIME_S  # false for NaN


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= _MAX_COUNT


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= _MAX_TIME_S


def _are_metrics(value: Any) -> bool:
    """Return whether a value is a dictionary of numbers, NaN and infinities among them."""
    if type(value) is not dict:
        return False
    for number in value.values():
        kind = type(number)
        if kind is not float and not (kind is int and -(2**63) <= number < 2**63):
            return False
    return True


def _is_plain(value: Any, levels: int) -> bool:
    """Return whether a value of JSON has at most so many levels, and whole numbers that fit into 64 bits."""
    if type(value) is int:
        return -(2**63) <= value < 2**63
    if not isinstance(value, dict | list):
        return True
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_plain(item, levels - 1) for item in items)


def _list_of(check: _Check) -> _Check:
    return lambda value: type(value) is list and all(map(check, value))


def _block(required: Mapping[str, _Check] | None = None, **optional: _Check) -> _Check:
    """Return the check of a dictionary: what must be in it, and what may be, or be None."""
    needed = required or {}
    return lambda value: (
        type(value) is dict and all(check(value.get(name)) for name, check in needed.items()) and _fit(value, optional)
    )


def _are_runs(value: Any) -> bool:
    """Return whether a value is a list of dictionaries, or a dictionary of them."""
    rows = list(value.values()) if isinstance(value, dict) else value
    return _list_of(_block())(rows)


_NAMED = _block(name=_is_text)
_SEARCH = _block(
    scheduler=_is_text,
    num_trials=_is_count,
    grace_epochs=_is_positive,
    reduction_factor=lambda n: _is_count(n) and n > 1,
)
_TRIAL = _block(
    seed=_is_whole,
    epochs=_is_count,
    data=_block(name=_is_text, content=_is_text, split=_block(fold=_is_count)),
    model=_block(backbone=_is_text, embedding_dim=_is_count),
    optimizer=_block(name=_is_text, learning_rate=_is_number),
    schedule=_block(name=_is_text, warmup_epochs=_is_count),
    regularizers=lambda value: type(value) is dict,
    loss=_NAMED,
    miner=_NAMED,
    sampler=_NAMED,
    method=_NAMED,
)

_is_result = _block(runs=_are_runs, refit=_block(runs=_are_runs), num_folds=_is_count, value=_is_number)

#: Kind -> the fields that it must have, and those that it may have. Older studies lack some of the latter.
_FIELDS: dict[str, tuple[dict[str, _Check], dict[str, _Check]]] = {
    "study_started": (
        {},
        {
            **dict.fromkeys(("study", "study_id", "storage", "commit", "dataset", "user", "command"), _is_text),
            "config": _block(select_on=_is_text, search=_SEARCH),
            "constant": _block(),
            "varying": _list_of(_is_text),
            "time_limit_s": _is_number,
            "max_device_hours": _is_number,
            "planned": _list_of(_block({"stage": _is_text, "num_trials": _is_count, "max_epochs": _is_count})),
            "splits": lambda splits: (
                type(splits) is dict
                and all(
                    type(parts) is dict and all(_block(classes=_is_whole, images=_is_whole)(p) for p in parts.values())
                    for parts in splits.values()
                )
            ),
        },
    ),
    "step": ({}, {"name": _is_text, "number": _is_count, "total": _is_count}),
    "stage_started": (
        {"stage": _is_text},
        {
            **dict.fromkeys(("num_trials", "max_epochs", "num_slots", "num_ended"), _is_count),
            "resources": _block({"cpu": _is_amount, "gpu": _is_amount}),
            "configurations": _list_of(_is_text),
            "reused": _list_of(_is_text),
        },
    ),
    "stage_finished": (
        {"stage": _is_text},
        # A row that is no object is left out by the reduction: the stage has finished all the same.
        {"ranking": _list_of(lambda row: not isinstance(row, dict) or _is_result(row))},
    ),
    "trial_drawn": (
        {"trial": _is_text, "config": _TRIAL, "point": _block()},
        {"stage": _is_text, "num_known": _is_count},
    ),
    "trial_started": (
        {"trial": _is_text},
        {
            **dict.fromkeys(("stage", "fingerprint", "configuration", "node"), _is_text),
            "config": _TRIAL,
            "gpus": _is_amount,
        },
    ),
    "trial_retried": ({"trial": _is_text}, dict.fromkeys(("stage", "error", "reason", "node", "device"), _is_text)),
    "trial_ended": (
        {"trial": _is_text},
        {
            **dict.fromkeys(("stage", "error", "reason", "node", "device"), _is_text),
            "class_values": _list_of(_is_number),
        },
    ),
    "artifact": ({"path": _is_text}, {"artifact_path": _is_text, "trial": _is_text}),
    "model": ({"folder": _is_text, "name": _is_text}, {"checkpoint": _is_text, "trial": _is_text}),
    "test_read": ({}, dict.fromkeys(("stage", "trial", "checkpoint", "commit"), _is_text)),
    "summary": ({}, {"metrics": _are_metrics, "tags": _block()}),
    "note": ({}, {"text": _is_text}),
    "forecast": (
        {"seconds": _is_seconds, "device_hours": _is_seconds, "unit": _is_text},
        {"disk_bytes": _is_whole, "num_shapes": _is_count, "num_all": _is_count},
    ),
    "search_extended": ({"num_trials_before": _is_count}, {}),
    "trials_reopened": ({"stage": _is_text, "trials": _list_of(_is_text)}, {}),
    "interrupted": ({}, {}),
    "study_finished": ({}, {}),
}
