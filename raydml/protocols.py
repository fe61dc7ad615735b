"""Who searches whom: how the images of one part are divided into queries and gallery.

leave_one_out: every image is a query against all the others. CUB, Cars and SOP; MIC and Divide & Conquer also
    score each VehicleID list so.
query_gallery: the images with the role "query" search those with the role "gallery". In-Shop Clothes.
one_gallery_image: one random image of each class is the gallery and the others are the queries; ten repetitions from a
    fixed seed, and the scores are their means. The usual protocol of VehicleID (Liu et al., "Deep Relative Distance
    Learning", CVPR 2016, section 5); R = 1, so R-precision and MAP@R are Recall@1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PROTOCOLS = ("leave_one_out", "query_gallery", "one_gallery_image")
NUM_REPETITIONS = 10
_SEED = 0  # of the galleries drawn: every model is asked the same questions


class ProtocolError(ValueError):
    """Images that a protocol cannot be applied to."""


class Search(NamedTuple):
    """queries: (Q,) rows of the embeddings. gallery: (G,) rows, or None where the queries search one another."""

    queries: np.ndarray
    gallery: np.ndarray | None


def protocols_of(roles: Sequence[str] | None, declared: Sequence[str]) -> tuple[str, ...]:
    """The protocols of one part, the main one first: those that its data set declares and its images allow.

    roles: "query" | "gallery" of each image of the part, or None. Images with roles are always scored by them.
    """
    if roles is not None and any(roles):
        return ("query_gallery",)
    return tuple(name for name in declared if name != "query_gallery") or ("leave_one_out",)


def searches(protocol: str, labels: np.ndarray, roles: Sequence[str] | None = None) -> list[Search]:
    """The searches a protocol asks for; scores are means over them.

    labels: (N,) integers. Raises ProtocolError: unknown name; query_gallery with an image that has no role, or without
    queries or gallery; one_gallery_image without a class of two images.
    """
    if protocol == "leave_one_out":
        return [Search(np.arange(len(labels)), None)]
    if protocol == "query_gallery":
        return [_by_role(np.array(roles if roles is not None else [""] * len(labels)))]
    if protocol == "one_gallery_image":
        return [_one_of_each(labels, repetition) for repetition in range(NUM_REPETITIONS)]
    raise ProtocolError(f"protocol: {protocol!r}; one of {', '.join(PROTOCOLS)}")


def _by_role(roles: np.ndarray) -> Search:
    search = Search(np.flatnonzero(roles == "query"), np.flatnonzero(roles == "gallery"))
    assert search.gallery is not None
    without = len(roles) - len(search.queries) - len(search.gallery)
    if without or not len(search.queries) or not len(search.gallery):
        raise ProtocolError(
            f"protocol query_gallery: {len(search.queries)} queries, {len(search.gallery)} gallery images and "
            f"{without} images without a role; every image needs one of them, and there must be both"
        )
    return search


def _one_of_each(labels: np.ndarray, repetition: int) -> Search:
    generator = np.random.default_rng([_SEED, repetition])
    shuffled = generator.permutation(len(labels))
    gallery = shuffled[np.unique(labels[shuffled], return_index=True)[1]]
    queries = np.setdiff1d(np.arange(len(labels)), gallery)
    if not len(queries):
        raise ProtocolError("protocol one_gallery_image: no class has a second image: nothing is left to search with")
    return Search(queries, np.sort(gallery))
