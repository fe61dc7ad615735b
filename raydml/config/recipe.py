"""Trials as plain values: the recipe in a few words, and settings as dotted names."""

from collections.abc import Mapping
from typing import Any


def recipe_of(config: Mapping[str, Any]) -> str:
    """``mic: margin, distance_weighted + mdr``: method unless plain, loss, miner, regularisers.

    config: a trial as plain values; of an older or cut event some blocks may be missing.
    """
    method, loss, miner = ((config.get(block) or {}).get("name") for block in ("method", "loss", "miner"))
    words = ", ".join(word for word in (loss, miner) if word)
    words = words if method in (None, "plain") else f"{method}: {words}"
    return " + ".join([words, *(config.get("regularizers") or {})])


def flatten(settings: Mapping[str, Any], *, keep_empty: bool = False, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted names; lists stay as they are.

    ``{"loss": {"name": "margin"}}`` gives ``{"loss.name": "margin"}``. An empty block is left out unless `keep_empty`.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and (value or not keep_empty):
            flat |= flatten(value, keep_empty=keep_empty, prefix=f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
