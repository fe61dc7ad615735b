"""What the tests of the data share: the message of a refusal, the settings of a split, the real lists."""

from pathlib import Path

import pytest

from raydml.data.catalog import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LISTS = SHARED / "benchmark_lists"
needs_real_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="shared/data/benchmark_lists is not beside the repo")
SPLIT = {"test_fraction": 0.5, "val_fraction": 0.5, "num_folds": 4, "fold": None, "order": "sorted", "seed": 0}


def refusal(call, *args, **settings) -> str:
    """The message with which a call is refused."""
    with pytest.raises(DataError) as caught:
        call(*args, **settings)
    return str(caught.value)


def assert_contains(text, *parts) -> None:
    """Every part is in a text or a list."""
    assert [part for part in parts if part not in text] == [], text
