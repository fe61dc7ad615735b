"""Imports without collections, after which what is alive is never looked at again."""

import gc

import pytest

from raydml.ops.garbage import imports_uncollected


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_meanwhile_and_what_is_alive_is_left_out_afterwards(fails):
    try:
        with imports_uncollected():
            assert not gc.isenabled()
            if fails:
                raise ImportError
    except ImportError:
        assert fails
    try:
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_a_process_that_never_collects_stays_so():
    gc.disable()
    try:
        with imports_uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
