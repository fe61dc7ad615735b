"""Golden vectors: what the code of the published systems computes.

A set is tests/golden/<name>.npz with the sidecar <name>.json. Its cases are "cases" (a list) or "hyperparameters" (a
list or a dictionary). The arrays of a case are <case>__<array>; in the sets of MIC <case>_<array> or c<number>_<array>.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden_facts(name: str) -> dict[str, Any]:
    """The sidecar of a set."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of a set."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def golden_tensors(name: str) -> dict[str, Tensor]:
    """All arrays of a set, as tensors."""
    return {key: torch.from_numpy(array) for key, array in golden_arrays(name).items()}


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a set, and its sidecar."""
    return golden_arrays(name), golden_facts(name)


def golden_cases(name: str, keep: Callable[[dict], bool] = lambda _: True) -> list[Any]:
    """The cases of a set for `pytest.mark.parametrize`: dictionaries with "case" (its name) and "tolerance"."""
    facts = golden_facts(name)
    cases = facts.get("cases") or facts["hyperparameters"]
    if isinstance(cases, dict):
        cases = [{"case": case, **settings} for case, settings in cases.items()]
    kept = [{"tolerance": facts["tolerance"], **case, "case": _prefix(case["case"])} for case in cases if keep(case)]
    assert kept, f"{name}: no case to test"
    return [pytest.param(case, id=case["case"]) for case in kept]


def golden_case(name: str, case: str | int) -> dict[str, Tensor]:
    """The arrays of one case, by their names within it."""
    arrays = golden_arrays(name)
    start = f"{_prefix(case)}__"
    if not any(key.startswith(start) for key in arrays):
        start = f"{_prefix(case)}_"
    found = {key.removeprefix(start): torch.from_numpy(a) for key, a in arrays.items() if key.startswith(start)}
    assert found, f"{name}: no arrays of case {case}"
    return found


def _prefix(case: str | int) -> str:
    return f"c{case}" if isinstance(case, int) else case
