"""Damaged inputs made from whole ones: bytes changed at random places, and JSON values changed in their structure."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

#: Pieces that readers stumble over, put into any input.
_PIECES = (
    *(
        b"",
        b"\0",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\r",
        b"\n",
        b"\n\n",
        b'"',
        b"'",
        b"`",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
    ),
    *(
        b"[" * 200,
        b'{"a":' * 60,
        b"1" * 5000,
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"-Infinity",
        b"null",
        b"true",
        b"\\ud800",
    ),
    *(b"../", b"/etc/passwd", b"=cmd()", b"&a [*a]", b"*a", b"!!python/object:os.system", b"<<", b"? ", b"- ", b"%"),
    *(b"\x80\x04c", b"\x93NUMPY", b"PK\x03\x04", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 64, b"MATLAB"),
)
#: Values in the place of any value of a JSON document.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "\0", "\ud800", "a" * 5000, "../..", "1", "=1+1", "ü", [], {}, [[]], [None], {"": None}, {"name": 3}),
)

Mutator = Callable[[np.random.Generator], bytes]


def mutator_of_bytes(samples: Sequence[bytes]) -> Mutator:
    """Return a function that makes one input of these samples, of which one in fifty is whole."""

    def mutate(random: np.random.Generator) -> bytes:
        content = bytearray(samples[random.integers(len(samples))])
        if random.random() < 0.02:
            return bytes(content)
        for _ in range(1 + min(int(random.geometric(0.4)), 8)):
            _change(content, random, samples)
        return bytes(content)

    return mutate


def _change(content: bytearray, random: np.random.Generator, samples: Sequence[bytes]) -> None:
    place, length = int(random.integers(len(content) + 1)), int(random.geometric(0.15))
    match int(random.integers(8)):
        case 0 | 1 if content:  # one bit
            content[place - 1] ^= 1 << int(random.integers(8))
        case 2:
            content[place : place + length] = random.bytes(length)
        case 3:
            content[place:place] = _PIECES[random.integers(len(_PIECES))]
        case 4:
            content[place : place + length] = _PIECES[random.integers(len(_PIECES))]
        case 5:
            del content[place : place + int(random.geometric(0.02))]
        case 6:
            other = samples[random.integers(len(samples))]
            begin = int(random.integers(len(other) + 1))
            content[place:place] = other[begin : begin + int(random.geometric(0.02))]
        case 7 if random.random() < 0.3:
            del content[place:]
        case _:
            content[place : place + 1] = bytes([random.integers(256)])


def mutator_of_json(documents: Sequence[Any]) -> Mutator:
    """Return a function that makes one JSON text with one to four values, keys or blocks changed."""

    def mutate(random: np.random.Generator) -> bytes:
        document = copy.deepcopy(documents[random.integers(len(documents))])
        for _ in range(1 + min(int(random.geometric(0.6)), 3)):
            document = _changed(document, random)
        return json.dumps(document).encode()

    return mutate


def _changed(document: Any, random: np.random.Generator) -> Any:
    holders = _holders(document)
    if not holders or random.random() < 0.02:
        return copy.deepcopy(_VALUES[random.integers(len(_VALUES))])
    holder = holders[random.integers(len(holders))]
    key = list(holder)[random.integers(len(holder))] if isinstance(holder, dict) else int(random.integers(len(holder)))
    match int(random.integers(6)):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[key[:-1] + chr(random.integers(32, 127))] = holder.pop(key)
        case 2 if isinstance(holder[key], (int, float)) and abs(holder[key]) < 1e300:
            holder[key] = holder[key] * float(random.choice([-1, 10, 0.1, 1e10]))
        case 3:
            for _ in range(int(random.choice([1, 3, 40, 300]))):
                holder[key] = [holder[key]] if random.random() < 0.5 else {"name": holder[key]}
        case _:
            holder[key] = copy.deepcopy(_VALUES[random.integers(len(_VALUES))])
    return document


def _holders(value: Any) -> list[Any]:
    """Return every list and dictionary with entries in a JSON document."""
    if not isinstance(value, (dict, list)) or not value:
        return []
    found, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        found.append(holder)
        items = holder.values() if isinstance(holder, dict) else holder
        waiting += [item for item in items if isinstance(item, (dict, list)) and item]
    return found


def mixed(*mutators: Mutator) -> Mutator:
    """Return a mutator that takes each of these in turn at random."""
    return lambda random: mutators[random.integers(len(mutators))](random)
