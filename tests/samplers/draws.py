"""Labels to draw from, and whether what was drawn is as likely as it should be."""

import numpy as np


def labels_of(*counts: int, seed: int = 0) -> np.ndarray:
    """The given numbers of images of class 0, 1, ..., in a mixed order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def assert_as_likely(observed: np.ndarray, expected: np.ndarray | float) -> None:
    """Counts against what independent draws give: chi-square within five deviations of its mean."""
    observed = np.asarray(observed, dtype=float).reshape(-1)
    expected = np.broadcast_to(np.asarray(expected, dtype=float).reshape(-1), observed.shape)
    assert (expected > 5).all()  # below, chi-square says nothing
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < len(observed) + 5 * np.sqrt(2 * len(observed))
