"""A study in one dictionary and in words, from a folder written by hand."""

from __future__ import annotations

import json
import math

import pytest

from raydml.analysis.published import is_system
from raydml.report.text import all_metrics, findings, hours_text, main_metrics, p_text, published_groups, score_text
from raydml.study.summary import histories, question_of, summarise
from tests.report.written_study import CURVES, ENDED, ERROR, write_study


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path / "birds")


def test_histories_hold_what_the_events_say(study):
    trials = {trial.trial: trial for trial in histories(study)}
    assert len(trials) == 4 + 8
    first = trials["search-000"]
    assert (first.best, first.epoch_of_best, first.ended) == (0.55, 3, "finished")
    assert first.curve("val_map_at_r") == [(1, 0.30), (2, 0.50), (3, 0.55), (4, 0.54)]
    assert (first.num_epochs, first.num_planned_epochs, first.fold, first.seed) == (4, 4, None, 0)
    assert trials["search-003"].error == ERROR
    assert (trials["confirm-003"].fold, trials["confirm-003"].seed) == (1, 1)
    assert trials["search-002"].metrics == [
        "val_map_at_r", "val_recall_at_1", "train_loss", "epoch_s", "clustering_s", "cluster_nmi",
    ]  # fmt: skip
    assert {key: trial.ended for key, trial in trials.items() if trial.stage == "search"} == ENDED


def test_the_summary_of_a_finished_study(study):
    summary = summarise(study)
    assert summary["question"] == "is <MIC> better than the margin loss alone, on birds & cars?"
    assert summary["plan"] == {
        "dataset": "cub200",
        "num_trials": 4,
        "scheduler": "asha",
        "epochs": 4,
        "rungs": [2],
        "folds": 2,
        "seeds": 2,
        "stages": ["search", "confirm", "finalize"],
        "finished": ["search", "confirm", "finalize"],
    }
    assert [row["trial"] for row in summary["search"]] == ["search-000", "search-002", "search-001", "search-003"]
    assert [(row["letter"], row["label"]) for row in summary["confirm"]] == [
        ("A", "mic: margin, distance_weighted"),
        ("B", "margin, distance_weighted"),
    ]
    assert [row["letter"] for row in summary["final"]] == ["A", "B"]
    assert summary["final"][0]["runs"][1] == {"trial": "confirm-005", "fold": 0, "seed": 1} | {
        "test": {"map_at_r": pytest.approx(0.32)}
    }
    assert summary["final"][0]["ensemble"]["map_at_r"]["mean"] == 0.36
    assert summary["final"][1]["ensemble"] == {}
    assert [row["protocols"] for row in summary["final"]] == [{"leave_one_out": "leave one out: so & so"}] * 2
    assert summary["stability"]["best_so_far"] == [0.55] * 4
    assert summary["importance"]["reason"] == "4 trials with a value: at least 8 are needed"
    assert [read["purpose"] for read in summary["test_reads"]] == ["finalize"] * 8 + ["evaluate"]
    json.dumps(summary, allow_nan=False)


def test_differences_are_paired_over_folds_and_seeds(study):
    summary = summarise(study)
    (row,) = summary["comparisons"]
    # Differences 0.10, 0.09, 0.09, 0.08: standard deviation sqrt(0.0002 / 3), t(3) = 3.182 at 97.5 %.
    assert (row["better"], row["worse"], row["num_pairs"], row["is_real"]) == ("A", "B", 4, True)
    assert row["difference"] == pytest.approx(0.09)
    assert row["half_width"] == pytest.approx(3.1824 * math.sqrt(0.0002 / 3) / 2, rel=1e-4)
    # On the test classes every pair is 0.1 worse.
    (tested,) = summary["test_comparisons"]
    assert (tested["better"], tested["difference"]) == ("B", pytest.approx(0.01))
    assert not tested["is_real"]


def test_the_cost_counts_the_share_of_a_gpu_that_trials_hold(study):
    cost = summarise(study)["cost"]
    assert cost["unit"] == "GPU-hours"
    search, confirm = cost["stages"]
    assert search["hours"] == pytest.approx((4 * 10 + 2 * 20 + 4 * 30 + 10) / 2 / 3600)
    assert search["hours_saved"] == pytest.approx(2 * 20 / 2 / 3600)
    assert search["hours_clustering"] == pytest.approx(12 / 2 / 3600)
    assert confirm["hours"] == pytest.approx(8 * 4 * 36 / 2 / 3600)


@pytest.mark.parametrize(
    ("resources", "held"),
    [({"cpu": 2.0, "gpu": 0.25}, ("GPU-hours", 0.25)), ({"cpu": 2.0, "gpu": 0.0}, ("CPU-hours", 2.0))],
)
def test_what_a_trial_held_is_what_the_newest_stage_announced(study, resources, held):
    with (study / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "stage_started", "stage": "finalize"}) + "\n")
        file.write(json.dumps({"event": "stage_started", "stage": "confirm", "resources": resources}) + "\n")
    cost = summarise(study)["cost"]
    assert (cost["unit"], cost["per_trial"]) == held


def test_a_study_that_has_not_begun_costs_nothing(study):
    (study / "events.jsonl").unlink()
    for name in ("ranking.json", "confirmed.json", "final.json"):
        (study / name).unlink()
    assert summarise(study)["cost"]["stages"] == []


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_an_unfinished_study_has_a_summary_of_what_there_is(tmp_path, stages):
    summary = summarise(write_study(tmp_path / "birds", stages=stages))
    assert len(summary["search"]) == (4 if stages else 0)
    assert len(summary["confirm"]) == (2 if stages == 2 else 0)
    assert summary["final"] == []
    assert summary["plan"]["finished"] == ["search", "confirm"][:stages]
    assert summary["best_so_far"]["best"] == max(CURVES["search-000"])
    found = findings(summary)
    missing = ["search", "confirm", "finalize"][stages:]
    assert found.question[-1] == f"Not finished yet: {', '.join(missing)}."
    assert ("so far" in found.winner[0]) == (stages == 0)
    assert found.test == []


def test_a_study_that_has_hardly_begun(tmp_path):
    folder = write_study(tmp_path / "birds", stages=0)
    (folder / "events.jsonl").unlink()
    summary = summarise(folder)
    assert findings(summary).winner == ["No epoch has ended yet."]
    assert findings(summary).cost == []
    assert summary["cost"]["stages"] == []


def test_the_findings_in_words(study):
    found = findings(summarise(study))
    assert found.winner == [
        "A (mic: margin, distance_weighted) has the best mean: validation MAP@R 0.6100 ± 0.0411 over 4 runs.",
        "It is ahead of B (margin, distance_weighted) by 0.0900 ± 0.0130, p < 0.001: a real difference.",
        "A is better than B (Holm-adjusted p < 0.05).",
    ]
    assert found.test[0] == (
        "On the test classes A has MAP@R 0.3100 ± 0.0400; the same network untrained has 0.1000 ± 0.0100; "
        "its folds' embeddings concatenated have 0.3600."
    )
    assert found.test[1].startswith("On the test classes these runs cannot decide which of B and A is better")
    # 0.65: above all but 65.36 and 66.85 (classification, Deep_Metric), 65.7 (multi-similarity) and 66.1 (MIC).
    beside = "Our winner on validation (A, 0.6500) is above 29 of 33 published numbers of Recall@1 on cub200."
    assert found.test[2] == beside
    assert found.cost == ["Training cost 11.4 min of GPU time; stopping trials early saved about 20 s."]
    assert found.warnings[0].startswith("The test classes were read 1 time outside of finalize (evaluate)")
    assert found.warnings[1] == "1 trial of 4 failed; see how trials ended."


def test_reads_by_finalize_are_no_reason_for_a_warning(study):
    reads = (study / "test_reads.jsonl").read_text().splitlines()
    reads[-1] = reads[-1].replace('"evaluate"', '"finalize: ensemble of 2 kept embeddings"')
    (study / "test_reads.jsonl").write_text("\n".join(reads) + "\n")
    assert findings(summarise(study)).warnings == ["1 trial of 4 failed; see how trials ended."]
    (study / "test_reads.jsonl").write_text("\n".join([*reads, reads[0]]) + "\n")
    assert (
        "finalize read the test classes 9 times for 8 runs: it was interrupted." in findings(summarise(study)).warnings
    )


def test_the_metrics_that_papers_print_come_before_many_others(study):
    final = json.loads((study / "final.json").read_text())
    more = ["recall_at_2", "recall_at_4", "recall_at_8", "r_precision", "mrr", "density", "binary_recall_at_1"]
    final[0]["metrics"] |= {name: {"mean": 0.5, "half_width": None} for name in [*more, "recall_at_16", "recall_at_32"]}
    (study / "final.json").write_text(json.dumps(final))
    summary = summarise(study)
    assert len(all_metrics(summary)) == 11
    assert main_metrics(summary) == [
        "map_at_r", "recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "r_precision", "recall_at_16",
    ]  # fmt: skip


def test_a_network_that_training_did_not_improve_is_named(study):
    final = json.loads((study / "final.json").read_text())
    final[1]["untrained"]["map_at_r"]["mean"] = 0.285  # the interval of 0.32 ± 0.04 reaches down to 0.28
    (study / "final.json").write_text(json.dumps(final))
    assert "B is not clearly better there than the untrained network." in findings(summarise(study)).test


def test_configurations_of_the_same_recipe_are_told_apart(study):
    for name in ("confirmed.json", "final.json"):
        rows = json.loads((study / name).read_text())
        rows[0]["from_trial"] = "search-001"
        (study / name).write_text(json.dumps(rows))
    lines = (study / "events.jsonl").read_text().replace("multi_similarity", "margin", 1)
    lines = lines.replace('"miner": {"name": "multi_similarity"}', '"miner": {"name": "distance_weighted"}', 1)
    (study / "events.jsonl").write_text(lines)
    labels = [row["label"] for row in summarise(study)["confirm"]]
    assert labels == ["margin, distance_weighted, search-001", "margin, distance_weighted, search-000"]


def test_the_rows_of_the_systems_that_this_study_ran_are_marked(study):
    ours = {
        (entry["system"], entry["variant"]): entry["ours"] for entry in summarise(study)["published"] if entry["ours"]
    }
    assert ours == {
        ("MIC", "margin loss"): ["A"],
        ("MIC's baselines", "margin, distance-weighted"): ["B"],
        ("Revisiting Training Strategies", "Margin (D, beta 1.2)"): ["B"],
    }


@pytest.mark.parametrize(
    ("config", "system", "variant", "expected"),
    [
        ({"method": {"name": "divide_conquer"}, "loss": {"name": "margin"}}, "Divide & Conquer", "8 learners", True),
        ({"method": {"name": "divide_conquer"}, "loss": {"name": "margin"}}, "MIC", "margin loss", False),
        ({"loss": {"name": "normalized_softmax"}}, "classification baseline", "normalised softmax, binary", True),
        (
            {"loss": {"name": "normalized_softmax"}, "regularizers": {"mdr": {}}},
            "classification baseline",
            "normalised softmax",
            False,
        ),
        (
            {"loss": {"name": "margin", "beta": 0.6}, "miner": {"name": "distance_weighted"}},
            "Revisiting Training Strategies",
            "Margin (D, beta 0.6)",
            True,
        ),
        (
            {"loss": {"name": "margin", "beta": 0.6}, "miner": {"name": "distance_weighted"}},
            "Revisiting Training Strategies",
            "Margin (D, beta 1.2)",
            False,
        ),
        ({"loss": {"name": "triplet"}, "miner": None}, "Revisiting Training Strategies", "Triplet (D)", False),
    ],
)
def test_a_published_system_is_known_by_method_loss_and_miner(config, system, variant, expected):
    assert is_system(config, system, variant) is expected


def test_the_question_ends_where_the_next_heading_begins():
    assert question_of("# Question: one\n#   two three\n# Command: x\n#   four") == "one two three"
    assert question_of("# Question: one\n#\n#   two") == "one"
    assert question_of("study: {}\n") is None
    assert question_of("") is None


def test_numbers_in_words():
    assert hours_text(1.26) == "1.3 h"
    assert hours_text(0.5) == "30.0 min"
    assert hours_text(0.01) == "36 s"
    assert [p_text(p) for p in (0.0001, 0.0123, 0.5)] == ["< 0.001", "= 0.012", "= 0.50"]
    assert score_text({"mean": 0.5, "half_width": None}) == "0.5000"
    assert score_text({"mean": None, "half_width": None}) is None


def test_published_numbers_are_compared_where_both_have_the_metric(study):
    summary = summarise(study)
    assert all_metrics(summary) == main_metrics(summary) == ["map_at_r", "recall_at_1"]
    ((dataset, protocol, names, ours, theirs),) = published_groups(summary)
    assert (dataset, protocol, names, len(ours)) == ("cub200", "leave_one_out", ["recall_at_1"], 2)
    values = [entry["metrics"]["recall_at_1"]["mean"] for entry in theirs]
    assert values == sorted(values)
    assert values[-1] == 0.6685
