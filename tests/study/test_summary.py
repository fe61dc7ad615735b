"""A study in one dictionary and in words, from a folder written by hand."""

from __future__ import annotations

import json
import math

import pytest

from raydml.analysis.published import is_system, published_of
from raydml.ops.wording import hours_text
from raydml.report.comparability import comparability, published_groups
from raydml.report.tables import final_latex
from raydml.report.text import (
    all_metrics,
    final_models,
    findings,
    main_metrics,
    p_text,
    protocols_in_words,
    score_text,
    summary_markdown,
)
from raydml.study import events
from raydml.study.events import events_path
from raydml.study.summary import histories, question_of, summarise
from tests.report.written_study import CURVES, ENDED, ERROR, REFITS, add_refits, write_published_study, write_study


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
        "num_grid_points": 1,
        "scheduler": "asha",
        "search_folds": 1,
        "searcher": "random",
        "num_from_results": 0,
        "ended_by": None,
        "eliminated": [],
        "epochs": 4,
        "rungs": [2],
        "folds": 2,
        "seeds": 2,
        "refit": None,
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
        "A leads B (margin, distance_weighted) by 0.090 ± 0.013 (p < 0.001): a significant difference.",
    ]
    assert found.refit == []
    assert found.test[:-1] == [
        "A scores MAP@R 0.310 ± 0.040 on the test classes.",
        "The ensemble of its fold models scores 0.360.",
        "The untrained network scores 0.100 ± 0.010.",
        "On the test classes, there is no significant difference between B and A.",
    ]
    assert found.test[-1] == "None of these numbers is comparable to published ones."
    reason = "Each model left some of the development classes out for validation. For a model that leaves none out"
    assert comparability(summarise(study)).reason.startswith(reason)
    assert found.cost == ["Training took 11.4 min of GPU time.", "Early stopping saved about 20 s."]
    assert found.warnings[0].startswith("The test classes were read 1 time outside finalize (evaluate)")
    assert found.warnings[1] == "1 of 4 trials failed (see All trials)."


@pytest.mark.parametrize(
    ("changes", "num_grid_points", "words"),
    [
        ({}, 1, "Run at least 12 more trials (`resume birds <1> --num-trials 16`): some recipes had only 1 of the 4"),
        (
            {"num_missing": 37, "is_lower_bound": False},
            1,
            "Run about 37 more trials (`resume birds <1> --num-trials 41`)",
        ),
        # Two rounds of two grid points have run; 7 trials more are 3.5 rounds more.
        ({"num_missing": 7}, 2, "Run at least 7 more trials (`resume birds <1> --num-trials 6`)"),
        ({"num_missing": None}, 1, "It would need more than 10 times as many trials: "),
    ],
)
def test_a_search_that_has_not_converged_names_the_command_with_the_number(study, changes, num_grid_points, words):
    summary = summarise(study)
    summary["plan"]["num_grid_points"] = num_grid_points
    summary["stability"] |= changes
    assert findings(summary).settled[0].startswith(f"The search has not converged. {words}")


def test_a_search_that_has_converged(study):
    summary = summarise(study)
    summary["stability"] |= {"settled": True, "verdict": "it is stable", "remark": "More is worth nothing."}
    assert findings(summary).settled == ["The search has converged: it is stable.", "More is worth nothing."]
    summary["stability"] |= {"settled": False, "ranking": ["A"], "verdict": "the trials do not differ in their recipes"}
    assert findings(summary).settled[0].startswith("Whether the search has converged cannot be judged: the trials do")


def test_reads_of_before_the_search_got_more_trials_are_named(study):
    # The reads are of 04:00 on January 2nd, the extension of 05:00.
    reused = [run["trial"] for row in json.loads((study / "confirmed.json").read_text()) for run in row["runs"]]
    more = [
        {"event": "search_extended", "num_trials_before": 4, "time": 1767330000.0},
        {"event": "stage_started", "stage": "confirm", "reused": reused},
    ]
    with (study / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in more)
    words = (
        "The test classes were read 9 times before the search was given more than 4 trials. Choices made after such a"
    )
    assert any(warning.startswith(words) for warning in findings(summarise(study)).warnings)


def test_trials_that_the_time_limit_cut_do_not_count_as_failures_of_their_recipe(study):
    before = summarise(study)["stability"]
    config = {"epochs": 4, "loss": {"name": "never_seen"}, "data": {"name": "cub200"}}
    more = [
        {"event": "trial_started", "stage": "search", "trial": "search-004", "config": config},
        {"event": "trial_ended", "stage": "search", "trial": "search-004", "reason": "time"},
    ]
    with (study / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in more)
    assert summarise(study)["stability"] == before


def test_reads_by_finalize_are_no_reason_for_a_warning(study):
    reads = (study / "test_reads.jsonl").read_text().splitlines()
    reads[-1] = reads[-1].replace('"evaluate"', '"finalize: ensemble of 2 kept embeddings"')
    (study / "test_reads.jsonl").write_text("\n".join(reads) + "\n")
    assert findings(summarise(study)).warnings == ["1 of 4 trials failed (see All trials)."]
    (study / "test_reads.jsonl").write_text("\n".join([*reads, reads[0]]) + "\n")
    assert (
        "finalize read the test classes 9 times for 8 runs, because it was interrupted."
        in findings(summarise(study)).warnings
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
    words = "The interval of B reaches down to the score of the untrained network."
    assert words in findings(summarise(study)).test


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
        ("Margin", ""): ["B"],
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


def test_published_numbers_are_shown_where_both_have_the_metric_and_ours_only_where_they_compare(study):
    summary = summarise(study)
    assert all_metrics(summary) == main_metrics(summary) == ["map_at_r", "recall_at_1"]
    (group,) = published_groups(summary)
    assert (group.title, group.metrics, group.ours) == ("cub200, leave one out", ["recall_at_1"], [])
    values = [entry["metrics"]["recall_at_1"]["mean"] for entry in group.theirs]
    assert values == sorted(values)
    assert values[-1] == 0.892  # UNICOM, zero-shot
    add_refits(study)
    (group,) = published_groups(summarise(study))
    assert [(row["letter"], scores["recall_at_1"]["mean"]) for row, scores in group.ours] == [("A", 0.672)]


def test_a_refit_has_its_settings_its_runs_and_its_scores_beside_those_of_the_fold_models(study):
    before = summarise(study)
    add_refits(study)
    summary = summarise(study)
    assert summary["plan"]["refit"] == {"top": 1, "seeds": 3, "epochs": "confirmed", "classes": "development"}
    assert summary["plan"]["stages"] == summary["plan"]["finished"] == ["search", "confirm", "refit", "finalize"]
    (refit,) = summary["refit"]
    assert (refit["letter"], refit["label"], refit["epochs"]) == ("A", "mic: margin, distance_weighted", 3)
    assert [run["trial"] for run in refit["runs"]] == ["refit-000", "refit-001", "refit-002"]
    first, second = summary["final"]
    assert second["refit"] is None
    assert first["refit"]["runs"] == [
        {"trial": f"refit-00{seed}", "fold": None, "seed": seed, "test": {"map_at_r": value}}
        for seed, value in REFITS.items()
    ]
    assert (first["refit"]["epochs"], first["refit"]["num_runs"], first["refit"]["classes"]) == (3, 3, "development")
    assert first["refit"]["metrics"]["map_at_r"] == {"mean": 0.34, "half_width": 0.0248}
    # The fold models are compared with each other as before.
    assert first["metrics"] == before["final"][0]["metrics"]
    assert summary["test_comparisons"] == before["test_comparisons"] != []
    assert [stage["stage"] for stage in summary["cost"]["stages"]] == ["search", "confirm", "refit"]
    json.dumps(summary, allow_nan=False)


def test_the_findings_of_a_refit(study):
    found = findings(summarise(add_refits(study)))
    assert found.refit == [
        "A (mic: margin, distance_weighted) was trained once more on all development classes for 3 epochs, 3 seeds; "
        "its last weights count.",
        "The number of epochs was found in validation: the median of the best epochs of the confirmed runs.",
    ]
    assert found.test[:4] == [
        "The refit of A scores MAP@R 0.340 ± 0.025 on the test classes (3 runs).",
        "Its fold models score 0.310 ± 0.040.",
        "The ensemble of its fold models scores 0.360.",
        "The untrained network scores 0.110 ± 0.010.",  # that of the refits
    ]
    # ResNet-50 on CUB, R@1 up to 67.2: all but HIER (70.1), ProxyNCA++ (69.0). Of the sources there are 1 + 1 of the
    # releases, 4 of MIC's baselines, 23 of the benchmark of 2020, 5 of HIER's table.
    assert found.test[-2] == (
        "The refit of A (Recall@1 0.672) exceeds 32 of 34 published numbers of resnet50 on cub200, leave one out."
    )
    assert found.test[-1] == "Only the refits are comparable to published numbers."
    assert comparability(summarise(study)).reason == (
        "As published models are, they are trained on all development classes, for a number of epochs that is fixed "
        "beforehand, and scored with their last weights; the other models left some of these classes out for "
        "validation."
    )
    assert not any("outside finalize" in warning or "interrupted" in warning for warning in found.warnings[1:])


def test_the_rule_of_the_epochs_is_that_of_the_settings(study):
    summary = summarise(add_refits(study, epochs=7))
    assert findings(summary).refit[-1] == "The number of epochs is that of study.refit.epochs."
    summary["plan"] |= {"folds": None, "refit": {"epochs": "confirmed"}}
    summary["confirm"] = []
    assert findings(summary).refit[-1].endswith("found in validation: the best epoch of the searched trial.")


def test_a_refit_on_all_classes_has_no_score_and_makes_nothing_comparable(study):
    summary = summarise(add_refits(study, classes="all"))
    refit = summary["final"][0]["refit"]
    assert (refit["metrics"], refit["untrained"], refit["runs"], refit["num_runs"]) == ({}, {}, [], 3)
    assert published_groups(summary)[0].ours == []
    scored = {**refit, "metrics": {"recall_at_1": {"mean": 0.99, "half_width": None}}}  # which finalize never does
    assert published_groups({**summary, "final": [{**summary["final"][0], "refit": scored}]})[0].ours == []
    found = findings(summary)
    assert "on all classes, the test classes included, for 3 epochs" in found.refit[0]
    assert found.refit[1] == "No image is left that these models could be tested on, so they are never scored."
    assert found.test[0] == "A scores MAP@R 0.310 ± 0.040 on the test classes."
    assert "the refits, which are trained on the test classes as well, have no" in comparability(summary).reason
    # Reads for training are no reason for a warning; that of evaluate is.
    assert [warning for warning in found.warnings if "outside finalize" in warning] == [
        "The test classes were read 1 time outside finalize (evaluate). Choices made after such a read are not "
        "independent of the test."
    ]


def test_the_scores_of_a_smoke_run_compare_with_nothing(study):
    add_refits(study)
    plan = json.loads((study / "study.json").read_text()) | {"smoke": True}
    (study / "study.json").write_text(json.dumps(plan))
    summary = summarise(study)
    assert published_groups(summary)[0].ours == []
    none = "None of these numbers is comparable to published ones."
    assert comparability(summary) == (none, "The images are generated.")
    assert findings(summary).test[-1] == none


def test_the_scores_of_a_fragment_of_a_benchmark_compare_with_nothing(study):
    add_refits(study)
    plan = json.loads((study / "study.json").read_text())
    whole = summarise(study)  # as an older study, which has no record
    assert whole["unlike_published"] == []
    for recorded in ({}, {"unlike_published": []}):
        (study / "study.json").write_text(json.dumps(plan | recorded))
        assert len(published_groups(summarise(study))[0].ours) == 1
        assert comparability(summarise(study)).verdict == "Only the refits are comparable to published numbers."
    fragment = ["train has 12 images of 3 classes, published are 5,864 of 100"]
    (study / "study.json").write_text(json.dumps(plan | {"unlike_published": fragment}))
    summary = summarise(study)
    none = "None of these numbers is comparable to published ones."
    reason = f"The images are not the published ones: {fragment[0]}."
    assert comparability(summary) == (none, reason)
    (group,) = published_groups(summary)
    assert (group.ours, len(group.theirs)) == ([], len(published_groups(whole)[0].theirs))
    assert findings(summary).test[-1] == none
    text, latex = summary_markdown(summary), final_latex(summary)
    assert f"{none} {reason}" in text
    assert "(comparable)" in summary_markdown(whole)
    assert "(comparable)" not in text
    assert "**this study**" in summary_markdown(whole)
    assert "**this study**" not in text
    assert (final_latex(whole).count("begin{tabular}"), latex.count("begin{tabular}")) == (2, 1)


@pytest.mark.parametrize("dataset", ["cub200", "image_folder"])
def test_test_images_that_could_not_be_read_make_a_benchmark_another_one(study, dataset):
    final = json.loads((add_refits(study) / "final.json").read_text())
    for run in final[0]["refit"]["runs"].values():
        run["num_left_out"] = 1200
    (study / "final.json").write_text(json.dumps(final))
    events = study / "events.jsonl"
    events.write_text(events.read_text().replace('"name": "cub200"', f'"name": "{dataset}"'))
    summary = summarise(study)
    if dataset == "image_folder":  # nothing is published of the user's own images
        assert summary["unlike_published"] == []
        assert comparability(summary).verdict == "The scores of the refits are those to report."
    else:
        assert comparability(summary).reason == (
            "The images are not the published ones: 1,200 test images that cannot be read are left out."
        )
        assert published_groups(summary)[0].ours == []


def test_fewer_refits_than_were_planned_are_counted_and_too_few_are_warned_of(study):
    summary = summarise(add_refits(study))
    assert not any("refits" in warning for warning in findings(summary).warnings)
    assert [one.title for one in final_models(summary, ("refit",))] == ["refit, 3 epochs"]
    summary["final"][0]["refit"]["num_runs"] = 2
    assert "Some configurations have fewer than 3 refits, too few for an interval." in findings(summary).warnings
    assert [one.title for one in final_models(summary, ("refit",))] == ["refit, 3 epochs, 2 of 3 seeds"]


def test_of_a_data_set_without_published_numbers_the_number_to_report_is_stated(study):
    without = {"published": []}
    summary = summarise(study) | without
    assert comparability(summary).verdict == "No model that was tested is trained on all development classes."
    assert "published" not in comparability(summary).reason
    summary = summarise(add_refits(study)) | without
    assert comparability(summary).verdict == "The scores of the refits are those to report."
    assert comparability(summary).reason.startswith("They are trained on all development classes, for a number of")


def test_a_study_without_a_search_is_summarised_by_its_refits(tmp_path):
    summary = summarise(write_published_study(tmp_path / "mic"))
    assert summary["plan"]["stages"] == summary["plan"]["finished"] == ["refit", "finalize"]
    assert (summary["search"], summary["confirm"], summary["stability"]) == ([], [], None)
    (final,) = summary["final"]
    assert (final["letter"], final["recipe"], final["dataset"]) == ("A", "mic: margin, distance_weighted", "cub200")
    assert (final["metrics"], final["runs"]) == ({}, [])
    assert [entry["ours"] for entry in summary["published"] if entry["system"] == "MIC"] == [["A"]]
    found = findings(summary)
    assert found.winner == found.settled == []
    assert found.question == [
        "What does MIC reach as published?",
        "1 configuration on cub200, trained on all development classes for at most 3 epochs, without validation "
        "classes and without a search.",
    ]
    assert found.refit[-1] == "The number of epochs is that of the search space."
    assert found.test[:2] == [
        "The refit of A scores MAP@R 0.340 ± 0.025 on the test classes (3 runs).",
        "The untrained network scores 0.110 ± 0.010.",
    ]
    assert found.test[-1] == "The refits are comparable to published numbers."
    assert comparability(summary).reason.endswith("fixed beforehand, and scored with their last weights.")
    # A smoke run of it shows the published numbers as well, without its own.
    (group,) = published_groups({**summary, "smoke": True})
    assert (group.metrics, group.ours, len(group.theirs)) == (["recall_at_1"], [], 68)
    assert found.warnings == []


def vehicles(dataset, protocols, metrics):
    """The summary of a refit on VehicleID, with the entries that are published of its small list."""
    row = {"letter": "A", "label": "triplet", "configuration": "f", "dataset": dataset, "metrics": {}}
    row |= {"backbone": "resnet50", "embedding_dim": 128, "protocols": dict.fromkeys(protocols, "so"), "runs": []}
    row["refit"] = {"classes": "development", "metrics": {name: {"mean": value} for name, value in metrics.items()}}
    entries = {}
    names = ("metric", "value", "deviation")
    for number in [
        one for name in ("leave_one_out", "one_gallery_image") for one in published_of("vehicleid_small", name)
    ]:
        facts = {name: value for name, value in number._asdict().items() if name not in names}
        entry = entries.setdefault((number.system, number.protocol), {**facts, "metrics": {}, "ours": []})
        entry["metrics"][number.metric] = {"mean": number.value, "deviation": None}
    return {"smoke": False, "metric": "val_recall_at_1", "final": [row], "published": list(entries.values())}


def values_of(group):
    return [{name: scores[name]["mean"] for name in group.metrics} for _, scores in group.ours]


def test_the_two_protocols_of_vehicleid_have_a_table_each():
    measured = {"recall_at_1": 0.81, "one_gallery_image_recall_at_1": 0.72, "one_gallery_image_recall_at_5": 0.9}
    groups = published_groups(vehicles("vehicleid_small", ["leave_one_out", "one_gallery_image"], measured))
    assert [group.title for group in groups] == ["vehicleid_small, leave one out", "vehicleid_small, one gallery image"]
    assert [values_of(group) for group in groups] == [
        [{"recall_at_1": 0.81}],
        [{"recall_at_1": 0.72, "recall_at_5": 0.9}],
    ]
    assert [[entry["system"] for entry in group.theirs] for group in groups] == [["MIC"], ["fast-reid"]]


def test_numbers_of_a_protocol_that_was_not_used_stand_beside_none_of_ours():
    groups = published_groups(vehicles("vehicleid_small", ["leave_one_out"], {"recall_at_1": 0.81}))
    assert [group.protocol for group in groups] == ["leave_one_out"]


def test_each_list_of_vehicleid_is_compared_with_the_published_numbers_of_that_list():
    # In the order of a file whose keys are sorted.
    protocols = ["large_leave_one_out", "leave_one_out", "one_gallery_image", "small_leave_one_out"]
    protocols.append("small_one_gallery_image")
    # Those without a list are of all lists together, of which nothing is published.
    measured = {"recall_at_1": 0.5, "one_gallery_image_recall_at_1": 0.4, "small_recall_at_1": 0.81}
    measured |= {"small_one_gallery_image_recall_at_1": 0.72, "small_one_gallery_image_recall_at_5": 0.9}
    summary = vehicles("vehicleid", protocols, measured)
    groups = published_groups(summary)
    assert [group.title for group in groups] == ["vehicleid_small, leave one out", "vehicleid_small, one gallery image"]
    assert [values_of(group) for group in groups] == [
        [{"recall_at_1": 0.81}],
        [{"recall_at_1": 0.72, "recall_at_5": 0.9}],
    ]
    assert main_metrics(summary) == ["recall_at_1", "small_recall_at_1"]
    summary["final"][0]["protocols"] = {name: name for name in protocols}
    assert protocols_in_words(summary) == [
        "Leave_one_out.", "One_gallery_image.", "Small_leave_one_out.", "Small_one_gallery_image.",
        "Large_leave_one_out.",
    ]  # fmt: skip


def test_the_summary_says_who_proposed_the_trials_and_what_ended_the_search(study):
    """From events: a note on an option that got no further trials, and a drawn configuration."""
    folder = study
    text = "search.balance: margin + distance_weighted gets no further trials after 4: by their values at epoch 1"
    events.append(events_path(folder), {"event": "note", "text": text})
    drawn = {"event": "trial_drawn", "stage": "search", "trial": "search-001", "config": {}, "point": {}}
    events.append(events_path(folder), drawn)
    plan = summarise(folder)["plan"]
    assert plan["eliminated"] == ["margin + distance_weighted"]
    assert (plan["searcher"], plan["num_from_results"], plan["ended_by"]) == ("random", 0, None)
