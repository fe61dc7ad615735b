"""Trials as plain values: the recipe in a few words, settings as dotted names, values as text."""

from collections.abc import Mapping
from typing import Any


def recipe_of(config: Mapping[str, Any]) -> str:
    """``mic: margin, distance_weighted + mdr``: method unless plain, loss, miner, regularisers.

    A loss with the miner of its own name is ``multi_similarity + its miner``. Behind a semicolon follows what of the
    backbone learns, where that is not all of it, or where it is a network of timm: ``; head of resnet50``. config: a
    trial as plain values; of an older or cut event some blocks may be missing.
    """
    method, loss, miner = ((config.get(block) or {}).get("name") for block in ("method", "loss", "miner"))
    words = f"{loss} + its miner" if loss and loss == miner else ", ".join(word for word in (loss, miner) if word)
    words = words if method in (None, "plain") else f"{method}: {words}"
    words = " + ".join([words, *(config.get("regularizers") or {})])
    return "; ".join(filter(None, (words, _part_that_learns(config))))


def _part_that_learns(config: Mapping[str, Any]) -> str:
    model = config.get("model") or {}
    name, train = str(model.get("backbone", "")), model.get("train", "all")
    short = name.removeprefix("timm:").partition(".")[0]  # without the tag that names the weights
    if name.startswith("timm:hf-hub:"):
        short = name.rpartition("/")[2]
    if train == "head":
        return f"head of {short}"
    if isinstance(train, Mapping):
        if "last_blocks" in train:
            number = train["last_blocks"]
            return f"last block of {short}" if number == 1 else f"last {number} blocks of {short}"
        return f"adapters in {short}"
    return short if name.startswith("timm:") else ""


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


def value_text(value: Any) -> str:
    """Return a value as a person would write it: three significant digits, ``none``, lists with brackets."""
    if value is None:
        return "none"
    if isinstance(value, float):
        if 1e-3 <= abs(value) < 1e5:
            return f"{float(f'{value:.3g}'):g}"
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        mantissa, exponent = (mantissa, exponent) if exponent or not value else f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}" if exponent else mantissa
    if isinstance(value, list | tuple):
        return f"[{', '.join(value_text(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
