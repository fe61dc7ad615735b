"""The ranks of all queries together, which the package gives some at a time."""

import numpy as np

from raydml.evaluation.ranking import Ranks, ranked_relevant


def joined(parts):
    first, hits, nearest = zip(*(ranks for _, ranks in parts), strict=True)
    return Ranks(np.concatenate(first), np.concatenate(hits), np.concatenate(nearest))


def rank_relevant(*arguments, **settings):
    return joined(ranked_relevant(*arguments, **settings))
