"""The ranks of all queries together, which the package yields in parts, and their comparison."""

import numpy as np

from raydml.evaluation.ranking import Ranks, ranked_relevant, ranked_relevant_codes


def joined(parts):
    first, hits, nearest = zip(*(ranks for _, ranks in parts), strict=True)
    return Ranks(np.concatenate(first), np.concatenate(hits), np.concatenate(nearest))


def rank_relevant(*arguments, **settings):
    return joined(ranked_relevant(*arguments, **settings))


def rank_relevant_codes(*arguments, **settings):
    return joined(ranked_relevant_codes(*arguments, **settings))


def assert_ranks(found, expected):
    for name, values, others in zip(found._fields, found, expected, strict=True):
        np.testing.assert_array_equal(values, np.array(others), err_msg=name)
