"""Protocols against values by hand, slow loops and golden vectors."""

import numpy as np
import pytest

from raydml.evaluation.protocols import (
    NUM_REPETITIONS,
    PROTOCOLS,
    ProtocolError,
    describe_protocol,
    protocols_of,
    retrieval_tasks,
)
from raydml.evaluation.scoring import ScoringError
from tests.evaluation.scored import score
from tests.golden_vectors import golden


@pytest.mark.parametrize("place", [1, 2, 3])
def test_leave_one_out_gives_the_vehicleid_recall_of_mic(place):
    arrays, about = golden("mic_eval_vehicleid")
    ks = tuple(about["hyperparameters"]["k_vals"])
    metrics = score(arrays[f"set{place}_emb"], arrays[f"set{place}_labels"], recall_at=ks, lone_misses=True)
    assert [metrics[f"recall_at_{k}"] for k in ks] == pytest.approx(arrays[f"set{place}_recall"].tolist())


def test_query_gallery_by_hand():
    """On a line. Queries: 0 (a), 5 (b). Gallery: 1 (b), 2 (a), 3 (a), 9 (c).

    a at 0: b a a c -> R = 2: hits at 2 and 3 -> R-precision 1/2, AP (1/2)/2
    b at 5: a(3) a(2) then b(1) and c(9), both 4 away, by index b -> R = 1 -> 0
    A query is not searched for, and the gallery asks nothing.
    """
    rows = np.array([[1.0], [0.0], [2.0], [3.0], [5.0], [9.0]], dtype=np.float32)
    labels = np.array([1, 0, 0, 0, 1, 2])
    roles = ["gallery", "query", "gallery", "gallery", "query", "gallery"]
    metrics = score(rows, labels, recall_at=(1, 2, 3), protocol="query_gallery", roles=roles)
    assert metrics == pytest.approx(
        {"recall_at_1": 0.0, "recall_at_2": 0.5, "recall_at_3": 1.0, "r_precision": 0.25, "map_at_r": 0.125}
    )


def test_one_gallery_image_draws_one_image_of_every_class_again_and_again():
    labels = np.repeat([4, 2, 9], [5, 1, 3])
    found = retrieval_tasks("one_gallery_image", labels)
    assert len(found) == NUM_REPETITIONS == 10
    for search in found:
        assert sorted(labels[search.gallery].tolist()) == [2, 4, 9]
        assert sorted([*search.queries.tolist(), *search.gallery.tolist()]) == list(range(9))
    drawn = {tuple(search.gallery.tolist()) for search in found}
    assert len(drawn) > 3  # 15 galleries are possible
    again = retrieval_tasks("one_gallery_image", labels)
    assert all(np.array_equal(one.gallery, two.gallery) for one, two in zip(found, again, strict=True))


def test_every_image_of_a_class_is_drawn_equally_often():
    labels = np.repeat(np.arange(500), 4)
    places = np.concatenate([search.gallery % 4 for search in retrieval_tasks("one_gallery_image", labels)])
    # 5,000 draws of one of 4 places: the standard deviation of a share is 0.006.
    assert np.bincount(places) / len(places) == pytest.approx([0.25] * 4, abs=0.025)


def test_one_gallery_image_is_the_mean_over_its_galleries():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 4)
    rows = (np.eye(6)[labels] + 0.6 * generator.standard_normal((24, 6))).astype(np.float32)
    hits, reciprocal = [], []
    for search in retrieval_tasks("one_gallery_image", labels):
        ranks = []
        for query in search.queries:
            distances = [float(((rows[query] - rows[other]) ** 2).sum()) for other in search.gallery]
            order = [labels[search.gallery[place]] for place in np.argsort(distances, kind="stable")]
            ranks.append(order.index(labels[query]))
        hits.append(np.mean([rank < 1 for rank in ranks]))
        reciprocal.append(np.mean([rank < 3 for rank in ranks]))
    metrics = score(rows, labels, recall_at=(1, 3), protocol="one_gallery_image")
    assert 0.3 < np.mean(hits) < 1
    assert metrics["recall_at_1"] == pytest.approx(np.mean(hits))
    assert metrics["recall_at_3"] == pytest.approx(np.mean(reciprocal))
    # There is one image to find, so being first is all that R-precision and MAP@R can ask.
    assert metrics["r_precision"] == metrics["map_at_r"] == pytest.approx(metrics["recall_at_1"])


def slow_score(rows, labels, asks, searched, is_distractor):
    """Recall@1, @2, R-precision and MAP@R of queries (numbers of rows) that search others, one at a time."""
    of_each = []
    for query in asks:
        others = [other for other in searched if other != query]
        distances = [float(np.square(rows[query].astype(float) - rows[other]).sum()) for other in others]
        order = [others[place] for place in np.argsort(distances, kind="stable")]
        right = [labels[other] == labels[query] and not is_distractor[other] for other in order]
        relevant = sum(right)
        if not relevant:
            of_each.append([0.0, 0.0, np.nan, np.nan])
            continue
        average = sum(sum(right[:rank]) / rank for rank in range(1, relevant + 1) if right[rank - 1]) / relevant
        of_each.append([right[0], any(right[:2]), sum(right[:relevant]) / relevant, average])
    return dict(
        zip(("recall_at_1", "recall_at_2", "r_precision", "map_at_r"), np.nanmean(of_each, axis=0), strict=True)
    )


def crowded(num_distractors):
    """Rows near one another, of all roles mixed; the distractors carry labels of the others, which do not matter."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 6, 60)
    rows = (0.7 * np.eye(6)[labels] + 0.4 * generator.standard_normal((60, 6))).astype(np.float32)
    distracts = np.zeros(60, dtype=bool)
    distracts[generator.permutation(60)[:num_distractors]] = True
    return rows, labels, distracts


@pytest.mark.parametrize("num_distractors", [1, 20])
@pytest.mark.parametrize("lowest_label", [0, -1, -4])
def test_distractors_are_in_every_gallery_and_never_relevant(num_distractors, lowest_label):
    rows, labels, distracts = crowded(num_distractors)
    labels = labels + lowest_label
    everyone = np.arange(60)
    roles = np.where(distracts, "distractor", "")
    found = score(rows, labels, recall_at=(1, 2), roles=roles.tolist())
    assert found == pytest.approx(slow_score(rows, labels, everyone[~distracts], everyone, distracts))
    assert found != pytest.approx(score(rows[~distracts], labels[~distracts], recall_at=(1, 2)))
    asks = ~distracts & (everyone % 3 == 0)
    roles = np.where(distracts, "distractor", np.where(asks, "query", "gallery"))
    found = score(rows, labels, recall_at=(1, 2), protocol="query_gallery", roles=roles.tolist())
    assert found == pytest.approx(slow_score(rows, labels, everyone[asks], everyone[~asks], distracts))


@pytest.mark.parametrize("lowest_label", [0, -1])
def test_distractors_beside_one_gallery_image_of_each_class(lowest_label):
    rows, labels, distracts = crowded(25)
    labels = labels + lowest_label
    roles = np.where(distracts, "distractor", "").tolist()
    found = retrieval_tasks("one_gallery_image", labels, roles)
    assert len(found) == NUM_REPETITIONS
    expected = []
    for search in found:
        assert not distracts[search.queries].any()
        assert set(np.flatnonzero(distracts)) <= set(search.gallery.tolist())
        drawn = search.gallery[~distracts[search.gallery]]
        assert sorted(labels[drawn]) == sorted(set(labels[~distracts]))
        expected.append(slow_score(rows, labels, search.queries, search.gallery, distracts))
    means = {name: np.mean([one[name] for one in expected]) for name in expected[0]}
    assert score(rows, labels, recall_at=(1, 2), protocol="one_gallery_image", roles=roles) == pytest.approx(means)


def test_a_query_among_distractors_does_not_find_itself():
    """Two of one class, apart, and a distractor on each: the copies come first, the query itself nowhere."""
    rows = np.array([[0.0], [0.0], [9.0], [9.0]], dtype=np.float32)
    roles = ["distractor", "", "distractor", ""]
    (search,) = retrieval_tasks("leave_one_out", np.array([3, 3, 3, 3]), roles)
    assert search.gallery[search.own].tolist() == search.queries.tolist() == [1, 3]
    assert sorted(search.gallery.tolist()) == [0, 1, 2, 3]
    assert search.num_found == 3
    found = score(rows, np.array([3, 3, 3, 3]), recall_at=(1, 2, 3), roles=roles)
    # From 0: the copy, then (both 9 away) the other of the class or its copy: in the gallery the queries come first.
    assert found == {"recall_at_1": 0, "recall_at_2": 1, "recall_at_3": 1, "r_precision": 0, "map_at_r": 0}


def test_binary_codes_and_integers_meet_the_same_distractors():
    rows, labels, distracts = crowded(20)
    everyone, roles = np.arange(60), np.where(distracts, "distractor", "").tolist()
    signs = (rows > 0).astype(np.float32)
    found = score(rows, labels, recall_at=(1, 2), roles=roles, codes="binary")
    # Equal distances are ordered by place in the gallery, where the queries stand before the distractors.
    order = np.concatenate([everyone[~distracts], everyone[distracts]])
    assert found == pytest.approx(slow_score(signs, labels, everyone[~distracts], order, distracts))
    rounded = np.rint(rows.astype(np.float64) * (127 / np.abs(rows).max()))
    found = score(rows, labels, recall_at=(1, 2), roles=roles, codes="int8")
    assert found == pytest.approx(slow_score(rounded, labels, everyone[~distracts], order, distracts))


@pytest.mark.parametrize(
    ("protocol", "roles", "words"),
    [
        ("leave_one_out", None, "leave one out: each of 9 images searches the 8 others; 3 classes"),
        (
            "leave_one_out",
            ["distractor"] * 4 + [""] * 5,
            "leave one out: each of 5 images searches the 8 others, 4 of them distractors; 2 classes",
        ),
        (
            "query_gallery",
            ["query"] * 2 + ["gallery"] * 6 + ["distractor"],
            "query and gallery: 2 queries search 7 gallery images, 1 of them distractors; 3 classes",
        ),
        (
            "one_gallery_image",
            None,
            "one gallery image a class: 6 queries search 3 images, mean of ten drawn galleries; 3 classes",
        ),
        (
            "one_gallery_image",
            [""] * 6 + ["distractor"] * 3,
            "one gallery image a class: 4 queries search 5 images, mean of ten drawn galleries, 3 of them distractors; "
            "2 classes",
        ),
    ],
)
def test_a_protocol_in_words(protocol, roles, words):
    assert describe_protocol(protocol, np.repeat([4, 2, 9], 3), roles) == words


def test_thousands_have_commas():
    assert "each of 60,502 images" in describe_protocol("leave_one_out", np.arange(60_502) // 6)


def test_which_protocols_a_part_is_scored_by():
    both = ("leave_one_out", "one_gallery_image")
    assert protocols_of(None, both) == both
    assert protocols_of(None, ("query_gallery",)) == ("leave_one_out",)  # the validation classes of In-Shop
    assert protocols_of(["query", "gallery"], ("leave_one_out",)) == ("query_gallery",)
    assert protocols_of(["", ""], ()) == ("leave_one_out",)
    assert protocols_of(["", "distractor"], both) == both
    assert protocols_of(["query", "gallery", "distractor"], both) == ("query_gallery",)
    declared = ("leave_one_out", "query_gallery")  # beside the roles
    assert protocols_of(["query", "gallery"], declared) == declared
    assert protocols_of(["", ""], declared) == ("leave_one_out",)


def test_images_that_do_not_fit_a_protocol_are_refused():
    labels = np.array([0, 0, 1, 1])
    with pytest.raises(ProtocolError, match=f"'loo'; one of {', '.join(PROTOCOLS)}"):
        retrieval_tasks("loo", labels)
    with pytest.raises(ProtocolError, match="1 queries, 2 gallery images and 1 images without a role"):
        retrieval_tasks("query_gallery", labels, ["query", "gallery", "gallery", ""])
    with pytest.raises(ProtocolError, match="0 queries, 0 gallery images and 4 images"):
        retrieval_tasks("query_gallery", labels)
    with pytest.raises(ProtocolError, match="no label has a second image"):
        retrieval_tasks("one_gallery_image", np.arange(4))
    with pytest.raises(ProtocolError, match="no label has a second image"):
        retrieval_tasks("one_gallery_image", np.zeros(3, int), ["", "distractor", "distractor"])
    with pytest.raises(ProtocolError, match="all 4 images are distractors"):
        retrieval_tasks("leave_one_out", labels, ["distractor"] * 4)
    with pytest.raises(ProtocolError, match="2 queries, 2 gallery images and 0 images without"):
        retrieval_tasks("query_gallery", labels, ["query", "query", "distractor", "distractor"])
    rows = np.eye(4, dtype=np.float32)
    with pytest.raises(ScoringError, match="3 neighbours, but a query has only 2 images to search"):
        score(rows, labels, recall_at=(1, 3), protocol="one_gallery_image")
