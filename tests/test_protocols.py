"""Who searches whom, against counting by hand, slow loops and the seeds' vectors."""

import json
from pathlib import Path

import numpy as np
import pytest

from raydml.evaluate import EvaluationError, score
from raydml.protocols import NUM_REPETITIONS, PROTOCOLS, ProtocolError, protocols_of, searches

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays), json.loads((GOLDEN / f"{name}.json").read_text())


def scored_apart(queries, query_labels, gallery, gallery_labels, ks):
    """score() of a query set and a gallery set, stored one after the other."""
    rows = np.concatenate([queries, gallery]).astype(np.float32)
    labels = np.concatenate([query_labels, gallery_labels])
    roles = ["query"] * len(queries) + ["gallery"] * len(gallery)
    return score(rows, labels, recall_at=ks, protocol="query_gallery", roles=roles)


@pytest.mark.parametrize(
    ("name", "prefix", "recall", "unit", "ks"),
    [
        (
            "mic_eval_inshop",
            ("c0_query_emb", "c0_query_labels", "c0_gallery_emb", "c0_gallery_labels"),
            "c0_recall",
            1,
            None,
        ),
        (
            "mic_eval_inshop",
            ("c1_query_emb", "c1_query_labels", "c1_gallery_emb", "c1_gallery_labels"),
            "c1_recall",
            1,
            None,
        ),
        (
            "divide_conquer_eval",
            ("inshop__query", "inshop__query_labels", "inshop__gallery", "inshop__gallery_labels"),
            "inshop__recall",
            1,
            (1, 10, 20, 30, 50),
        ),
        (
            "mdr_eval",
            ("inshop__query", "inshop__query_labels", "inshop__gallery", "inshop__gallery_labels"),
            "inshop__recall_percent",
            100,
            (1, 10, 20, 30, 40),
        ),
    ],
)
def test_query_gallery_gives_the_recall_of_the_seeds(name, prefix, recall, unit, ks):
    arrays, _ = golden(name)
    wanted = ks or tuple(int(k) for k in arrays[f"{prefix[0][:2]}_k_vals"])
    metrics = scored_apart(*(arrays[key] for key in prefix), wanted)
    assert [metrics[f"recall_at_{k}"] * unit for k in wanted] == pytest.approx(arrays[recall].tolist())


@pytest.mark.parametrize("place", [1, 2, 3])
def test_leave_one_out_gives_the_vehicleid_recall_of_mic(place):
    arrays, about = golden("mic_eval_vehicleid")
    ks = tuple(about["hyperparameters"]["k_vals"])
    metrics = score(arrays[f"set{place}_emb"], arrays[f"set{place}_labels"], recall_at=ks)
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
    found = searches("one_gallery_image", labels)
    assert len(found) == NUM_REPETITIONS == 10
    for search in found:
        assert sorted(labels[search.gallery].tolist()) == [2, 4, 9]
        assert sorted([*search.queries.tolist(), *search.gallery.tolist()]) == list(range(9))
    drawn = {tuple(search.gallery.tolist()) for search in found}
    assert len(drawn) > 3  # 15 galleries are possible
    again = searches("one_gallery_image", labels)
    assert all(np.array_equal(one.gallery, two.gallery) for one, two in zip(found, again, strict=True))


def test_every_image_of_a_class_is_drawn_equally_often():
    labels = np.repeat(np.arange(500), 4)
    places = np.concatenate([search.gallery % 4 for search in searches("one_gallery_image", labels)])
    # 5,000 draws of one of 4 places: the standard deviation of a share is 0.006.
    assert np.bincount(places) / len(places) == pytest.approx([0.25] * 4, abs=0.025)


def test_one_gallery_image_is_the_mean_over_its_galleries():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 4)
    rows = (np.eye(6)[labels] + 0.6 * generator.standard_normal((24, 6))).astype(np.float32)
    hits, reciprocal = [], []
    for search in searches("one_gallery_image", labels):
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


def test_which_protocols_a_part_is_scored_by():
    both = ("leave_one_out", "one_gallery_image")
    assert protocols_of(None, both) == both
    assert protocols_of(None, ("query_gallery",)) == ("leave_one_out",)  # the validation classes of In-Shop
    assert protocols_of(["query", "gallery"], ("leave_one_out",)) == ("query_gallery",)
    assert protocols_of(["", ""], ()) == ("leave_one_out",)


def test_what_a_protocol_cannot_be_applied_to():
    labels = np.array([0, 0, 1, 1])
    with pytest.raises(ProtocolError, match=f"'loo'; one of {', '.join(PROTOCOLS)}"):
        searches("loo", labels)
    with pytest.raises(ProtocolError, match="1 queries, 2 gallery images and 1 images without a role"):
        searches("query_gallery", labels, ["query", "gallery", "gallery", ""])
    with pytest.raises(ProtocolError, match="0 queries, 0 gallery images and 4 images"):
        searches("query_gallery", labels)
    with pytest.raises(ProtocolError, match="no class has a second image"):
        searches("one_gallery_image", np.arange(4))
    rows = np.eye(4, dtype=np.float32)
    with pytest.raises(EvaluationError, match="3 neighbours, but a query has only 2 images to search"):
        score(rows, labels, recall_at=(1, 3), protocol="one_gallery_image")
