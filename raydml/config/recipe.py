"""What a trial trains with, in a few words."""

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
