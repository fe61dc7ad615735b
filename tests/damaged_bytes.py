"""Files with a few changed bytes, for the tests of what reads them."""

import numpy as np


def damaged(whole, times):
    """Yield the bytes of a file `times` times, each with one to eight bytes replaced at random places."""
    random = np.random.default_rng(0)
    for _ in range(times):
        changed = bytearray(whole)
        for place in random.integers(len(whole), size=random.integers(1, 9)):
            changed[place] = random.integers(256)
        yield bytes(changed)
