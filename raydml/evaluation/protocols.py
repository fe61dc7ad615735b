"""Evaluation protocols: how the images of one part are divided into queries and gallery.

leave_one_out: every image searches all the others. CUB, Cars and SOP; MIC and Divide & Conquer also score each
    VehicleID list this way.
query_gallery: the images with the role "query" search those with the role "gallery". In-Shop Clothes.
one_gallery_image: one random image of each class is the gallery and the others are the queries; ten repetitions from a
    fixed seed, and the scores are their means. The usual protocol of VehicleID (Liu et al., "Deep Relative Distance
    Learning", CVPR 2016, section 5); R = 1, so R-precision and MAP@R are Recall@1.

leave_one_out_across_groups, query_gallery_across_groups: the same, but a query does not find the gallery images of its
    own class and its own group (`data.exclude_same: group`). With cameras as groups this is the protocol of Market-1501
    (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015, section 4): images of the same person in
    the same camera are ignored, neither right nor wrong.

Images with the role "distractor" are in every gallery, and are never a query and never relevant, with any label.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from raydml.data.catalog import Groups
from raydml.ops.wording import counted

NUM_REPETITIONS = 10
DISTRACTOR = "distractor"
_SEED = 0  # of the random galleries, which are the same for every model


class ProtocolError(ValueError):
    """Images that a protocol cannot be applied to."""


class RetrievalTask(NamedTuple):
    """Queries and the gallery that they search.

    queries: (Q,) rows of the embeddings. gallery: (G,) rows, or None if the queries search one another. own: (Q,) the
    index of each query in the gallery, where it does not find itself; None if no query is in the gallery. codes: (N,)
    integers of all rows of the embeddings: a query does not find gallery rows with its own code; None: it finds all.
    """

    queries: np.ndarray
    gallery: np.ndarray | None
    own: np.ndarray | None = None
    codes: np.ndarray | None = None

    @property
    def searched(self) -> np.ndarray:
        """(G,) rows of the gallery, which are the queries where these search one another."""
        return self.queries if self.gallery is None else self.gallery

    @property
    def num_others(self) -> int:
        """The number of images in the gallery, the query itself not counted."""
        return len(self.searched) - (self.gallery is None or self.own is not None)

    @property
    def num_found(self) -> int:
        """The number of images that every query finds, itself not counted."""
        if self.codes is None:
            return self.num_others
        return len(self.searched) - int(_num_equal(self.codes, self).max(initial=0))


class Protocol(NamedTuple):
    """One way to divide images into queries and gallery.

    sentence: a description with {queries} and {gallery}. tasks: a function from labels (N,) and roles (N,) text to the
    tasks whose scores are averaged. across_groups: whether a query does not find images of its class and group.
    to_end: whether mAP over the whole ranking is published for it; to compute it sorts the gallery for each query.
    """

    sentence: str
    tasks: Callable[[np.ndarray, np.ndarray], list[RetrievalTask]]
    across_groups: bool = False
    to_end: bool = False


def protocols_of(roles: Sequence[str] | None, declared: Sequence[str], groups: Groups | None = None) -> tuple[str, ...]:
    """Return the protocols of one part, the main one first: those that its data set declares and its images allow.

    roles: "query" | "gallery" | "distractor" of each image of the part, or None. Queries and gallery that are given as
    roles are the only protocol unless the data set declares others beside them. groups: those of the images; where a
    query does not find its own, each protocol is the one across groups.
    """
    if groups is not None and groups.are_excluded:
        return tuple(f"{name}_across_groups" for name in protocols_of(roles, declared))
    if roles is not None and any(role not in ("", DISTRACTOR) for role in roles):
        return tuple(declared) if "query_gallery" in declared else ("query_gallery",)
    return tuple(name for name in declared if name != "query_gallery") or ("leave_one_out",)


def retrieval_tasks(
    protocol: str, labels: np.ndarray, roles: Sequence[str] | None = None, groups: Groups | None = None
) -> list[RetrievalTask]:
    """Return the tasks of a protocol; scores are means over them.

    labels: (N,) integers. groups: of the N images, for a protocol across groups. Raises ProtocolError: unknown name;
    a protocol across groups without groups; query_gallery with an image that has no role, or without
    queries or gallery; one_gallery_image without a class of two images; only distractors.
    """
    if protocol not in PROTOCOLS:
        raise ProtocolError(f"protocol: {protocol!r}; one of {', '.join(PROTOCOLS)}")
    given = _as_array(roles, len(labels))
    tasks = PROTOCOLS[protocol].tasks(labels, given)
    if not PROTOCOLS[protocol].across_groups:
        return tasks
    if groups is None:
        raise ProtocolError(f"protocol {protocol}: the images have no groups. Cure: name their column in data.group")
    ids = np.unique(np.array(groups.names, dtype=np.str_), return_inverse=True)[1].astype(np.int64)
    codes = (_of_class(labels, given) - labels.min() + 1) * (ids.max() + 1) + ids
    return [task._replace(codes=codes) for task in tasks]


def _of_class(labels: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Return the labels (N,), with one of their own for distractors."""
    return np.where(roles == DISTRACTOR, labels.min() - 1, labels)


def _num_equal(values: np.ndarray, task: RetrievalTask) -> np.ndarray:
    """Count the gallery rows with the same value as each query: (Q,) int64. values: (N,)."""
    of_query, sorted_values = values[task.queries], np.sort(values[task.searched])
    return np.searchsorted(sorted_values, of_query, "right") - np.searchsorted(sorted_values, of_query, "left")


def num_relevant(task: RetrievalTask, labels: np.ndarray) -> np.ndarray:
    """Count the images of its class that each query can find, itself not counted: (Q,) int64. labels: (N,)."""
    if task.codes is not None:  # the query itself has its own code
        return _num_equal(labels, task) - _num_equal(task.codes, task)
    return _num_equal(labels, task) - (task.gallery is None or task.own is not None)


def num_lone_queries(
    protocol: str, labels: np.ndarray, roles: Sequence[str] | None = None, groups: Groups | None = None
) -> int:
    """Count the queries of a protocol whose class has no other image for them to find."""
    of_class = _of_class(labels, _as_array(roles, len(labels)))
    return int((num_relevant(retrieval_tasks(protocol, labels, roles, groups)[0], of_class) == 0).sum())


def reason_unscorable(
    protocol: str,
    labels: np.ndarray,
    roles: Sequence[str] | None,
    recall_at: Sequence[int],
    groups: Groups | None = None,
    *,
    noun: str = "class",
) -> str:
    """Return in words why images cannot be scored under a protocol, or "" where they can; no embedding is needed.

    labels, roles, groups: of N images, as in `retrieval_tasks`. recall_at: the k of Recall@k. noun: what a label is.
    """
    try:
        tasks = retrieval_tasks(protocol, labels, roles, groups)
    except ProtocolError as error:
        return str(error)
    of_class = _of_class(labels, _as_array(roles, len(labels)))
    for task in tasks:
        if not num_relevant(task, of_class).any():
            of_another = "" if task.codes is None else " in another group"
            return f"no query has another image of its {noun}{of_another} to find ({protocol})"
        if max(recall_at) > task.num_found:
            return f"recall_at goes to {max(recall_at)}, and a query finds only {task.num_found} images ({protocol})"
    return ""


def describe_protocol(
    protocol: str,
    labels: np.ndarray,
    roles: Sequence[str] | None = None,
    groups: Groups | None = None,
    *,
    lone_misses: bool = False,
    noun: str = "classes",
) -> str:
    """Describe a protocol in words and numbers: "leave one out: each of 90 images searches 89 others; 5 classes".

    Queries without an image of their class to find are counted. lone_misses: they count as misses in Recall@k and MRR;
    otherwise they are left out of every mean. noun: what the labels are.
    """
    given = _as_array(roles, len(labels))
    task = retrieval_tasks(protocol, labels, roles, groups)[0]
    sentence = PROTOCOLS[protocol].sentence.format(queries=f"{len(task.queries):,}", gallery=f"{task.num_others:,}")
    num_classes = len(np.unique(labels[given != DISTRACTOR]))
    distractors = int((given == DISTRACTOR).sum())
    more = f", {distractors:,} of them distractors" if distractors else ""
    if task.codes is not None:
        assert groups is not None
        hidden = int((_num_equal(task.codes, task) - (task.gallery is None or task.own is not None)).sum())
        pairs = counted(hidden, "pair")
        more += f", but not those of its own class and group ({len(set(groups.names)):,} groups, {pairs} ignored)"
    number = num_lone_queries(protocol, labels, roles, groups)
    return f"{sentence}{more}; {num_classes:,} {noun}{_lone_in_words(number, lone_misses)}"


def _lone_in_words(number: int, lone_misses: bool) -> str:
    if not number:
        return ""
    treated = "counted as misses" if lone_misses else "left out of the means"
    return f"; without an image of their class to find, and {treated}: {counted(number, 'query', 'queries')}"


def _as_array(roles: Sequence[str] | None, num_images: int) -> np.ndarray:
    return np.array(roles if roles is not None else [""] * num_images, dtype=np.str_)


def _leave_one_out(labels: np.ndarray, roles: np.ndarray) -> list[RetrievalTask]:
    distracts = roles == DISTRACTOR
    queries = np.flatnonzero(~distracts)
    if not len(queries):
        raise ProtocolError(f"protocol leave_one_out: all {len(labels)} images are distractors, so there is no query")
    if not distracts.any():
        return [RetrievalTask(queries, None)]
    return [RetrievalTask(queries, np.concatenate([queries, np.flatnonzero(distracts)]), np.arange(len(queries)))]


def _query_gallery(_labels: np.ndarray, roles: np.ndarray) -> list[RetrievalTask]:
    queries, gallery = np.flatnonzero(roles == "query"), np.flatnonzero(np.isin(roles, ["gallery", DISTRACTOR]))
    without = len(roles) - len(queries) - len(gallery)
    if without or not len(queries) or not (roles == "gallery").any():
        raise ProtocolError(
            f"protocol query_gallery: {len(queries)} queries, {len(gallery)} gallery images and "
            f"{without} images without a role; every image needs one of them, and there must be both"
        )
    return [RetrievalTask(queries, gallery)]


def _one_gallery_image(labels: np.ndarray, roles: np.ndarray) -> list[RetrievalTask]:
    found = [_one_of_each(labels, roles, repetition) for repetition in range(NUM_REPETITIONS)]
    if not len(found[0].queries):
        raise ProtocolError("protocol one_gallery_image: no label has a second image, so there is no query")
    return found


def _one_of_each(labels: np.ndarray, roles: np.ndarray, repetition: int) -> RetrievalTask:
    generator = np.random.default_rng([_SEED, repetition])
    shuffled = generator.permutation(np.flatnonzero(roles != DISTRACTOR))
    gallery = shuffled[np.unique(labels[shuffled], return_index=True)[1]]
    queries = np.setdiff1d(shuffled, gallery)
    return RetrievalTask(queries, np.concatenate([np.sort(gallery), np.flatnonzero(roles == DISTRACTOR)]))


_LEAVE_ONE_OUT = Protocol("leave one out: each of {queries} images searches the {gallery} others", _leave_one_out)
_QUERY_GALLERY = Protocol("query and gallery: {queries} queries search {gallery} gallery images", _query_gallery)

#: Name, as in data sets and in the names of metrics -> protocol.
PROTOCOLS = {
    "leave_one_out": _LEAVE_ONE_OUT,
    "query_gallery": _QUERY_GALLERY,
    "leave_one_out_across_groups": _LEAVE_ONE_OUT._replace(across_groups=True),
    "query_gallery_across_groups": _QUERY_GALLERY._replace(across_groups=True, to_end=True),
    "one_gallery_image": Protocol(
        "one gallery image a class: {queries} queries search {gallery} images, mean of ten drawn galleries",
        _one_gallery_image,
    ),
}
