"""The number of cores: the affinity of this process and the quota of its container."""

import os

import pytest

from raydml.ops.cores import num_usable_cores
from tests.images.processes import run_children


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_that_the_process_may_not_use_do_not_count(tmp_path):
    def child(queue) -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        queue.put(num_usable_cores(tmp_path))

    assert run_children(child, 1) == [(0, 1)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max 100000\n", 16),
        ("400000 100000\n", 4),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("9900000 100000\n", 16),
        ("", 16),
        (None, 16),
    ],
)
def test_the_quota_of_a_container(tmp_path, monkeypatch, content, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert num_usable_cores(tmp_path) == expected
