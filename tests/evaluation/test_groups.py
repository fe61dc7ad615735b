"""Groups: gallery images of a query's class and group that it does not find, and groups as another level of labels."""

import numpy as np
import pytest

from raydml.data.catalog import Groups
from raydml.evaluation.embed import evaluate_embeddings
from raydml.evaluation.protocols import ProtocolError, describe_protocol, protocols_of, retrieval_tasks
from raydml.evaluation.ranking import HiddenRows, ranked_relevant, ranked_relevant_codes
from raydml.evaluation.reranking import KReciprocal, reranked_relevant
from raydml.evaluation.saved_embeddings import SavedEmbeddings, load_embeddings, save_embeddings
from raydml.evaluation.scoring import MetricSpec, ScoringError, score_by_all
from raydml.evaluation.verification import verify
from raydml.inference.evaluate import evaluate_saved
from raydml.metrics.names import METRIC_GROUPS
from raydml.report.retrievals import rank_queries
from tests.evaluation.slow_ranking import slow_scores
from tests.evaluation.test_ranking import CLOUDS

SPEC = MetricSpec((1, 2, 5), groups=("retrieval", "ranking"))
ACROSS = {"leave_one_out": "leave_one_out_across_groups", "query_gallery": "query_gallery_across_groups"}


def slow_ranks_across(queries, gallery, labels, codes, depth, own):
    """First relevant rank and hits of the lists without hidden rows; labels, codes: (of queries, of the gallery)."""
    first, hits = [], []
    for number, query in enumerate(queries):
        distances = np.square(gallery.astype(np.float64) - query.astype(np.float64)).sum(axis=1).tolist()
        found = [
            row
            for _, row in sorted((distance, row) for row, distance in enumerate(distances))
            if codes[1][row] != codes[0][number] and not (own and row == number)
        ]
        right = [bool(labels[1][row] == labels[0][number]) for row in found]
        first.append(right.index(True) + 1 if True in right else 0)
        hits.append((right + [False] * depth)[:depth])
    return first, hits


def joined(parts):
    parts = list(parts)
    return np.concatenate([p.first for _, p in parts]).tolist(), np.concatenate([p.hits for _, p in parts]).tolist()


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(("depth", "num_groups"), [(1, 3), (20, 3), (60, 1), (60, 2)])
@pytest.mark.parametrize("own", [True, False], ids=["self-retrieval", "apart"])
def test_ranks_without_hidden_rows_are_the_full_sort(name, depth, num_groups, own):
    rows = CLOUDS[name]()
    generator = np.random.default_rng(depth)
    labels, groups = generator.integers(0, 4, len(rows)), generator.integers(0, num_groups, len(rows))
    codes = labels * num_groups + groups
    half = len(rows) if own else len(rows) // 4
    queries, gallery = rows[:half], rows if own else rows[half:]
    of_query, of_row = (labels[:half], codes[:half]), (labels, codes) if own else (labels[half:], codes[half:])
    found = ranked_relevant(
        queries,
        None if own else gallery,
        query_labels=of_query[0],
        gallery_labels=None if own else of_row[0],
        depth=depth,
        hidden=HiddenRows(of_query[1], of_row[1]),
        working_bytes=100_000,  # several chunks
    )
    pairs = list(zip(of_query, of_row, strict=True))
    assert joined(found) == slow_ranks_across(queries, gallery, *pairs, depth, own)


@pytest.mark.parametrize("depth", [1, 30, 119])
def test_of_binary_codes_too(depth):
    bits = np.random.default_rng(0).integers(0, 2, (120, 16)).astype(np.uint8)  # many ties
    generator = np.random.default_rng(1)
    labels, codes = generator.integers(0, 4, 120), None
    codes = labels * 3 + generator.integers(0, 3, 120)
    found = ranked_relevant_codes(
        np.packbits(bits, axis=1), query_labels=labels, depth=depth, hidden=HiddenRows(codes, codes)
    )
    assert joined(found) == slow_ranks_across(bits, bits, (labels, labels), (codes, codes), depth, True)


def images(seed, num_images=70):
    """Points of 8 classes in 3 groups; the group moves a point, as a camera does."""
    generator = np.random.default_rng(seed)
    labels, groups = generator.integers(0, 8, num_images), generator.integers(0, 3, num_images)
    centres, shifts = generator.standard_normal((8, 4)), generator.standard_normal((3, 4))
    rows = centres[labels] + shifts[groups] + 0.8 * generator.standard_normal((num_images, 4))
    return rows.astype(np.float32), labels, tuple(f"camera {group}" for group in groups)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("base", list(ACROSS))
def test_scores_across_groups_are_those_of_a_slow_loop(seed, base):
    rows, labels, names = images(seed)
    labels[:2] = [20, 21]  # two queries at least with nothing to find
    roles = None
    queries = gallery = np.arange(len(labels))
    if base == "query_gallery":
        roles = np.where(np.random.default_rng(seed).random(len(labels)) < 0.4, "query", "gallery").tolist()
        queries, gallery = (np.flatnonzero(np.array(roles) == role) for role in ("query", "gallery"))
    groups = Groups(names, are_excluded=True)
    (protocol,) = protocols_of(roles, (base,), groups)
    assert protocol == ACROSS[base]
    found = evaluate_embeddings(rows, labels, roles, [protocol], SPEC, groups=groups)
    expected, num_lone = slow_scores(
        rows, labels, queries, gallery, lambda query, row: labels[query] == labels[row] and names[query] == names[row]
    )
    expected["map_at_1000"] = expected["map"]
    if base == "leave_one_out":
        del expected["map"]
    assert found.metrics == pytest.approx(expected)
    assert found.num_lone_queries == num_lone
    without = evaluate_embeddings(rows, labels, roles, [base], SPEC)
    assert found.metrics["recall_at_1"] < without.metrics["recall_at_1"]  # the camera's own images are nearer
    ranked = rank_queries(rows, labels, roles, groups=groups)  # of the pictures
    assert ranked.map_at_r == pytest.approx(expected["map_at_r"])
    assert ranked.recall_at_1 == pytest.approx(expected["recall_at_1"])


def slow_map(rows, labels, names, roles):
    """Mean average precision over the whole ranking, from the formula: mean over the relevant images of (number of
    relevant ones so far) / rank; equal distances in order of index, ignored images without a rank."""
    averages = []
    for query in np.flatnonzero(np.array(roles) == "query"):
        gallery = [row for row in range(len(rows)) if roles[row] != "query"]
        of_class = {row for row in gallery if labels[row] == labels[query] and roles[row] != "distractor"}
        found = [row for row in gallery if row not in of_class or names[row] != names[query]]
        distances = np.square(rows[found].astype(np.float64) - rows[query].astype(np.float64)).sum(axis=1)
        order = [found[place] for place in np.argsort(distances, kind="stable")]
        ranks = [rank for rank, row in enumerate(order, start=1) if row in of_class]
        if ranks:
            averages.append(sum(number / rank for number, rank in enumerate(ranks, start=1)) / len(ranks))
    return np.mean(averages)


@pytest.mark.parametrize("codes", ["float", "binary"])
@pytest.mark.parametrize("name", CLOUDS)
def test_map_is_over_the_whole_ranking(name, codes):
    """With ties, copies, crowds, distractors and images that a query does not find."""
    rows = CLOUDS[name]()
    generator = np.random.default_rng(1)
    labels, cameras = generator.integers(0, 9, len(rows)), generator.integers(0, 3, len(rows))
    roles = generator.choice(["query", "gallery", "distractor"], len(rows), p=(0.3, 0.5, 0.2)).tolist()
    groups = Groups(tuple(map(str, cameras)), are_excluded=True)
    spec = MetricSpec((1,), codes=(codes,), groups=("ranking",))
    found = evaluate_embeddings(rows, labels, roles, ["query_gallery_across_groups"], spec, groups=groups).metrics
    prefix, compared = ("", rows) if codes == "float" else ("binary_", (rows > 0).astype(np.float32))
    assert list(found) == [f"{prefix}{metric}" for metric in ("mrr", "map_at_1000", "map")]
    assert found[f"{prefix}map"] == pytest.approx(slow_map(compared, labels, cameras, roles), abs=1e-12)


def test_map_goes_on_behind_rank_1000():
    """1,300 gallery images on a line behind a query: its one image to find is at rank 1,201, by hand."""
    rows = np.arange(1_301, dtype=np.float32)[:, None]
    labels = np.array([0, *range(1, 1_301)])
    labels[[1, 1_202]] = 0  # the first is by the camera of the query and has no rank
    roles = ["query"] + ["gallery"] * 1_300
    groups = Groups(tuple("12"[row == 1_202] for row in range(1_301)), are_excluded=True)
    spec = MetricSpec((1,), groups=("retrieval", "ranking"), intervals=True)
    found = evaluate_embeddings(rows, labels, roles, ["query_gallery_across_groups"], spec, groups=groups).metrics
    assert found["map"] == pytest.approx(1 / 1_201)
    assert found["mrr"] == pytest.approx(1 / 1_201)
    assert (found["map_at_1000"], found["map_at_r"]) == (0, 0)
    without = evaluate_embeddings(rows, labels, roles, ["query_gallery"], spec).metrics
    assert "map" not in without  # which would sort the gallery for each query of every other protocol


def test_market_by_hand():
    """On a line. Query: person a, camera 1, at 0. Gallery, by distance: a in camera 1 (junk), b in camera 1, a in 2.

    The junk is neither right nor wrong: b is first, a second. Without the rule the first would be right.
    """
    rows = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
    labels, roles = np.array([0, 0, 1, 0]), ["query", "gallery", "gallery", "gallery"]
    groups = Groups(("1", "1", "1", "2"), are_excluded=True)
    spec = MetricSpec((1, 2))
    metrics = evaluate_embeddings(rows, labels, roles, ["query_gallery_across_groups"], spec, groups=groups).metrics
    assert metrics == {"recall_at_1": 0.0, "recall_at_2": 1.0, "r_precision": 0.0, "map_at_r": 0.0}
    assert evaluate_embeddings(rows, labels, roles, ["query_gallery"], spec).metrics["recall_at_1"] == 1.0
    sentence = describe_protocol("query_gallery_across_groups", labels, roles, groups)
    assert sentence == (
        "query and gallery: 1 queries search 3 gallery images, but not those of its own class and group (2 groups, "
        "1 pair ignored); 2 classes"
    )
    with pytest.raises(ScoringError, match="has only 2 images to search"):
        evaluate_embeddings(rows, labels, roles, ["query_gallery_across_groups"], MetricSpec((3,)), groups=groups)


def test_distractors_are_found_also_in_the_query_s_group():
    rows = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
    labels, roles = np.array([0, 0, 0, 1]), ["", "", "distractor", ""]
    groups = Groups(("1", "2", "1", "1"), are_excluded=True)
    (task,) = retrieval_tasks("leave_one_out_across_groups", labels, roles, groups)
    assert len(set(task.codes.tolist())) == 4
    found = evaluate_embeddings(rows, labels, roles, ["leave_one_out_across_groups"], MetricSpec((1,)), groups=groups)
    assert found.metrics["recall_at_1"] == 1.0


def test_a_protocol_across_groups_needs_groups():
    with pytest.raises(ProtocolError, match="the images have no groups"):
        retrieval_tasks("leave_one_out_across_groups", np.array([0, 0]))


@pytest.mark.parametrize("seed", range(2))
def test_another_level_of_labels_is_scored_besides(seed, tmp_path):
    rows, labels, _ = images(seed)
    names = tuple("fruit" if label < 5 else "dairy" for label in labels)
    paths = tuple(str(number) for number in range(len(labels)))
    groups = Groups(names)
    saved = SavedEmbeddings(rows, labels, tuple("abcdefgh"), paths, None, {"dataset": "image_list"}, groups)
    again = load_embeddings(save_embeddings(tmp_path / "e.npz", saved))
    assert again.groups == groups
    found = evaluate_saved(again, SPEC._replace(intervals=True))
    every = range(len(labels))
    for prefix, values in (("", labels), ("group_", names)):
        expected, _ = slow_scores(rows, values, every, every, lambda query, row: False)  # noqa: ARG005
        expected["map_at_1000"] = expected.pop("map")
        assert {name: found.metrics[f"{prefix}{name}"] for name in expected} == pytest.approx(expected)
        low, high = found.intervals[f"{prefix}map_at_r"]
        assert low <= expected["map_at_r"] <= high
    assert found.protocols["group_leave_one_out"] == (
        "by group: leave one out: each of 70 images searches the 69 others; 2 groups"
    )
    assert set(found.protocols) == {"leave_one_out", "group_leave_one_out"}
    one = evaluate_saved(saved._replace(groups=Groups(("fruit",) * len(labels))), SPEC)
    assert "all images are of one group, 'fruit'" in one.protocols["group"]
    assert not [name for name in one.metrics if name.startswith("group_")]


@pytest.mark.parametrize(
    ("names", "protocols", "reason"),
    [
        ([str(number) for number in range(70)], ["leave_one_out"], "no query has another image of its group to find"),
        ("by role", ["query_gallery"], "no query has another image of its group to find (query_gallery)"),
        ([str(number) for number in range(70)], ["one_gallery_image"], "no label has a second image"),
        (
            [str(number % 2) for number in range(70)],
            ["one_gallery_image"],
            "recall_at goes to 5, and a query finds only 2",
        ),
    ],
)
def test_groups_that_cannot_be_scored_cost_no_other_score(names, protocols, reason):
    rows, labels, _ = images(5)
    roles = ["query" if number % 3 == 0 else "gallery" for number in range(70)]
    names = roles if names == "by role" else names
    roles = roles if protocols == ["query_gallery"] else None
    every = SPEC._replace(groups=METRIC_GROUPS, intervals=True)
    plain = evaluate_embeddings(rows, labels, roles, protocols, every)
    found = evaluate_embeddings(rows, labels, roles, protocols, every, groups=Groups(tuple(names)))
    assert found.metrics == plain.metrics
    assert found.intervals == plain.intervals
    sentence = found.protocols.pop("group")
    assert sentence.startswith("by group: not scored, because ")
    assert reason in sentence
    assert found.protocols == plain.protocols


def test_a_second_protocol_that_cannot_be_scored_by_group_is_left_out_alone():
    rows, labels, _ = images(5)
    groups = Groups(tuple(str(number % 2) for number in range(70)))
    protocols = ["leave_one_out", "one_gallery_image"]
    found = evaluate_embeddings(rows, labels, None, protocols, SPEC, groups=groups)
    alone = evaluate_embeddings(rows, labels, None, protocols[:1], SPEC, groups=groups)
    by_group = {name: value for name, value in found.metrics.items() if name.startswith("group_")}
    assert by_group == {name: value for name, value in alone.metrics.items() if name.startswith("group_")}
    assert "one_gallery_image not scored, because recall_at goes to 5" in found.protocols["group_one_gallery_image"]


def test_saved_embeddings_keep_what_a_query_does_not_find(tmp_path):
    rows, labels, names = images(0)
    paths = tuple(str(number) for number in range(len(labels)))
    saved = SavedEmbeddings(rows, labels, tuple("abcdefgh"), paths, None, {}, Groups(names, are_excluded=True))
    again = load_embeddings(save_embeddings(tmp_path / "e.npz", saved))
    assert again.groups == saved.groups
    assert set(evaluate_saved(again, SPEC).protocols) == {"leave_one_out_across_groups"}


def test_verification_across_groups_leaves_out_pairs_of_one_class_and_group():
    rows, labels = np.random.default_rng(3).normal(size=(40, 6)).astype(np.float32), np.arange(40) % 5
    names = tuple(str(number // 5 % 3) for number in range(40))
    found = verify(rows, labels, None, "leave_one_out_across_groups", groups=Groups(names, are_excluded=True))
    genuine, impostors = [], []
    for one in range(40):
        for other in range(one):
            distance = np.linalg.norm(rows[one].astype(np.float64) - rows[other])
            if labels[one] != labels[other]:
                impostors.append(distance)
            elif names[one] != names[other]:
                genuine.append(distance)
    nearer = np.mean([[1.0 if near < far else 0.5 * (near == far) for far in impostors] for near in genuine])
    assert found.metrics["roc_auc"] == pytest.approx(nearer)
    assert "without those of one class and group" in found.sentence


def test_reranking_across_groups_ranks_no_image_of_the_own_class_and_group():
    """The slow way: all k-reciprocal distances, and the images of the own class and group struck out."""
    rows, labels = np.random.default_rng(4).normal(size=(40, 6)).astype(np.float32), np.arange(40) % 5
    names = np.array([str(number // 5 % 3) for number in range(40)])
    spec = MetricSpec((1, 2), rerank=KReciprocal(6, 3))
    groups = Groups(tuple(names), are_excluded=True)
    scores = score_by_all(rows, labels, None, ["leave_one_out_across_groups"], spec, groups=groups)
    order = [
        ranks.hits
        for _, ranks in reranked_relevant(
            rows,
            query_labels=labels,
            depth=30,
            settings=KReciprocal(6, 3),
            excluded=lambda one, other: (labels[one][:, None] == labels[other]) & (names[one][:, None] == names[other]),
        )
    ]
    hits = np.concatenate(order)
    assert scores.metrics["recall_at_1"] == pytest.approx(hits[:, 0].mean())
    assert scores.metrics["recall_at_2"] == pytest.approx(hits[:, :2].any(axis=1).mean())
