"""Damaged inputs at every door: only raydml's own errors come out. With more inputs: ``python -m tests.fuzz``."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raydml.study import event_fields, events
from tests.fuzz.doors import DOORS
from tests.fuzz.harness import MAX_INPUT_S, Door, fuzz, scratch_folder
from tests.fuzz.mutation import mutator_of_bytes

#: Inputs that cost about a second of the processor; the whole doors of the second table are behind the mark slow.
CHEAP = dict.fromkeys(("yaml", "set", "image_list", "benchmark_lists", "embeddings", "event_lines"), 2000)
CHEAP |= dict.fromkeys(("checkpoints", "signed_checkpoints", "weights", "packs"), 1000)
COSTLY = dict.fromkeys(("space", "matlab", "exported_models", "galleries", "events", "studies", "requests"), 100)


@pytest.mark.parametrize("name", CHEAP)
def test_no_foreign_error_comes_out_of_a_damaged_input(name: str) -> None:
    with scratch_folder() as folder:
        outcome = fuzz(DOORS[name](Path(folder)), CHEAP[name], seed=0)
    assert not outcome.foreign, outcome.messages
    assert outcome.num_accepted > 0, "whole inputs among them"
    assert outcome.num_refused > 0
    assert outcome.slowest_s < MAX_INPUT_S


@pytest.mark.slow
def test_no_foreign_error_comes_out_of_whole_doors() -> None:
    assert {*CHEAP, *COSTLY} == {*DOORS}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--inputs", "100", *COSTLY],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == list(COSTLY)
    assert all(int(row[1]) == int(row[2]) + int(row[3]) == 100 for row in rows)


def test_a_foreign_error_is_counted_with_its_input() -> None:
    def read(content: bytes) -> object:
        return json.loads(content)

    outcome = fuzz(Door(mutator_of_bytes([b'{"a": 1}']), read), 200, seed=3)
    assert outcome.num_accepted + outcome.num_foreign == 200
    (kind,) = (kind for kind in outcome.foreign if kind.startswith("JSONDecodeError"))
    with pytest.raises(json.JSONDecodeError):
        json.loads(outcome.examples[kind])


def test_an_input_of_a_seed_is_always_the_same() -> None:
    mutate = mutator_of_bytes([bytes(range(256))])
    made = [[mutate(np.random.default_rng([seed, number])) for number in range(20)] for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_every_kind_of_event_that_changes_a_study_has_its_fields_checked() -> None:
    kinds = re.findall(r'^        case (".*"):', Path(events.__file__).read_text(), flags=re.MULTILINE)
    handled = {kind.strip(' "') for several in kinds for kind in several.split("|")}
    assert len(handled) > 15
    assert handled - {"epoch"} == {*event_fields._FIELDS}
