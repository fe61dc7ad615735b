"""The table of published numbers: against a transcription, itself compared with the sources; in a summary.

published_sources.json has a row for each row that a source prints: percent, as printed, at the k it is printed for.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from raydml.analysis.published import PUBLISHED, comparable
from raydml.config.recipe import recipe_of
from raydml.data.benchmarks import BENCHMARKS
from raydml.evaluation.protocols import PROTOCOLS
from raydml.models.network import BACKBONES
from raydml.study.results import summarise

SOURCES = json.loads((Path(__file__).parents[1] / "published_sources.json").read_text(encoding="utf-8"))
SPEC = Path(__file__).parents[2].parent / "shared" / "spec"
needs_spec = pytest.mark.skipif(not SPEC.is_dir(), reason="the texts that the table was taken from are not here")

DATA = {"CUB": "cub200", "CUB200": "cub200", "Cars": "cars196", "CARS": "cars196", "CARS196": "cars196"}
DATA |= {"SOP": "sop", "In-Shop": "inshop"}


def transcribed(system, variant=None, metric="recall_at"):
    """dataset -> {k: percent} of one system (and variant)."""
    found = {}
    for row in SOURCES:
        if row["system"] == system and variant in (None, row["variant"]):
            assert row["metric"] == metric
            assert row["dataset"] not in found
            found[row["dataset"]] = dict(zip(row["k"], row["percent"], strict=True))
    return found


def section(name, start, end="\n## "):
    text = (SPEC / name).read_text(encoding="utf-8")
    assert text.count(start) == 1
    return text.partition(start)[2].partition(end)[0]


def numbers(text, separator):
    return [float(number) for number in text.split(separator)]


def test_no_number_is_there_twice_and_every_fact_is_one_of_ours():
    keys = Counter((n.system, n.variant, n.source, n.dataset, n.metric, n.protocol) for n in PUBLISHED)
    assert max(keys.values()) == 1
    assert len({(n.source, n.variant, n.dataset) for n in PUBLISHED}) == len(
        {(n.system, n.source, n.variant, n.dataset) for n in PUBLISHED}
    )
    names = {name for benchmark in BENCHMARKS.values() for name in benchmark.data_names}
    for number in PUBLISHED:
        assert number.dataset in names
        assert number.protocol in PROTOCOLS
        assert number.backbone is None or number.backbone in BACKBONES
        assert re.fullmatch(r"(binary_)?recall_at_[1-9]\d*", number.metric)
        assert number.metric.startswith("binary") == number.variant.endswith(", binary")
        assert 0.5 < number.value < 1  # fractions, not percent
        assert number.deviation is None or 0 < number.deviation < 0.01
        assert number.source
        assert number.status
        assert not re.search(r"recall\]|\bmem\b|paper\?", f"{number.source} {number.status}")


def test_the_table_is_what_its_sources_print():
    printed = {}
    for row in SOURCES:
        assert row["where"]
        deviations = row.get("deviation", [None] * len(row["k"]))
        for k, percent, deviation in zip(row["k"], row["percent"], deviations, strict=True):
            key = (row["system"], row["variant"], row["dataset"], f"{row['metric']}_{k}")
            assert key not in printed
            printed[key] = (percent, deviation)
    ours = {
        (n.system, n.variant, n.dataset, n.metric): (
            round(100 * n.value, 4),
            None if n.deviation is None else round(100 * n.deviation, 4),
        )
        for n in PUBLISHED
    }
    assert ours == printed  # in both directions: none is missing, none is invented
    assert len(PUBLISHED) == len(printed) == 246


def test_larger_k_finds_more():
    for row in SOURCES:
        assert row["k"] == sorted(row["k"])
        assert row["percent"] == sorted(row["percent"])


def test_who_chose_the_epoch_on_the_test_classes_is_said_only_where_it_is_known():
    chosen = {(n.system, n.source): n.chosen_on_test for n in PUBLISHED}
    assert len(chosen) == len({(n.system, n.source, n.chosen_on_test) for n in PUBLISHED})
    assert chosen == {
        ("Divide & Conquer", "release README, CVPR 2019"): True,
        ("classification baseline", "release README, BMVC 2019"): False,  # the last epoch: its code picks none
        ("classification baseline", "README of leftthomas/NormSoftmax, a re-run"): None,
        ("Deep_Metric", "README of December 2018"): None,
        ("multi-similarity", "release README, CVPR 2019"): True,
        ("MIC", "tables of later papers, ICCV 2019"): True,
        ("MIC's baselines", "the authors' baseline repository"): None,
        ("Revisiting Training Strategies", "figures in the benchmark's repository, ICML 2020"): True,
    }


@needs_spec
def test_divide_and_conquer_is_its_readme_and_not_what_is_remembered_of_the_paper():
    text = section("spec_divide_conquer.md", "## 14. Expected results")
    (line,) = [line for line in text.splitlines() if line.startswith("| release README")]
    sop, inshop, vehicleid = [float(re.match(r"[\d.]+", cell.strip())[0]) for cell in line.split("|")[2:5]]
    assert "2400 list" in line
    read = {"sop": {1: sop}, "inshop": {1: inshop}, "vehicleid_large": {1: vehicleid}}
    assert transcribed("Divide & Conquer") == read


def test_the_vehicles_of_divide_and_conquer_are_scored_by_leave_one_out():
    (vehicles,) = [number for number in PUBLISHED if number.dataset == "vehicleid_large"]
    assert vehicles.protocol == "leave_one_out"


@needs_spec
def test_the_classification_baseline_is_its_readme_and_a_re_run():
    text = section("spec_classification.md", "## 10. Targets")
    rows = re.findall(r"^\| (\S+) R@([\d/]+) \| ([\d./ ]+) \| ([\d./ ]+) \|", text, flags=re.MULTILINE)
    assert len(rows) == 4
    rerun = text.partition("float | binary: ")[2].partition(". With ground-truth")[0]
    rerun_parts = dict(part.strip().split(" ", 1) for part in rerun.split(";"))
    for column, (ending, metric) in enumerate((("", "recall_at"), (", binary", "binary_recall_at"))):
        printed, again = {}, {}
        for name, ks, *columns in rows:
            num_neighbours = [int(k) for k in ks.split("/")]
            printed[DATA[name]] = dict(zip(num_neighbours, numbers(columns[column], "/"), strict=True))
            recalls = numbers(rerun_parts[name].split("|")[column], "/")
            again[DATA[name]] = dict(zip(num_neighbours, recalls, strict=True))
        assert transcribed("classification baseline", f"normalised softmax{ending}", metric) == printed
        assert transcribed("classification baseline", f"normalised softmax, re-run{ending}", metric) == again


@needs_spec
def test_deep_metric_and_multi_similarity_are_their_readmes():
    text = section("spec_deep_metric.md", "## 12. Target tables")
    (weight, ms) = [line for line in text.splitlines() if "[readme]:" in line]
    row = r"(CUB|Cars|SOP|In-Shop) (?:R@[\d./]+ ?= ?|R@[\d/]+ = )?([\d./]+\d)"
    ks = {"cub200": (1, 2, 4, 8, 16, 32), "cars196": (1, 2, 4, 8, 16, 32), "sop": (1, 10, 100, 1000)}
    ks["inshop"] = (1, 10, 20, 30, 40, 50)
    weight = weight.partition("(The Weight row")[0].replace("R@1..32", "R@1")
    printed = {
        DATA[name]: dict(zip(ks[DATA[name]], numbers(p, "/"), strict=True)) for name, p in re.findall(row, weight)
    }
    assert len(printed) == 4
    assert transcribed("Deep_Metric") == printed
    sizes = dict(re.findall(r"(\d+)-d ([\d./]+\d)", ms))
    assert sorted(sizes) == ["512", "64"]
    for dim, recalls in sizes.items():
        found = transcribed("multi-similarity", f"{dim} dimensions")
        assert found == {"cub200": dict(zip(ks["cub200"], numbers(recalls, "/"), strict=True))}
        assert {n.embedding_dim for n in PUBLISHED if n.variant == f"{dim} dimensions"} == {int(dim)}


@needs_spec
def test_mic_is_what_later_papers_agree_on():
    text = section("spec_mic.md", "## 14. Expected results", "\n## 15")
    printed = {}
    for name, cell in re.findall(r"^\| (CUB200|CARS196|SOP|In-Shop) \| (.*?) \| \[2nd\]", text, flags=re.MULTILINE):
        printed[DATA[name]] = {int(k): float(p) for k, p in re.findall(r"R@(\d+) ([\d.]+)", cell)}
    assert "one secondary table prints R@100 94.6" in text
    del printed["sop"][100]
    (small,) = re.findall(r"^\| VehicleID \| small R@1 ([\d.]+) \| \[2nd\]", text, flags=re.MULTILINE)
    assert transcribed("MIC") == {**printed, "vehicleid_small": {1: float(small)}}


@needs_spec
def test_the_baselines_of_mic_are_those_of_their_repository():
    text = section("spec_mic.md", "Baselines without the auxiliary task", "\nBaseline schedules")
    variants = {"Margin": "margin, distance-weighted", "Triplet": "triplet, soft hard", "N-Pair": "n-pair"}
    variants["ProxyNCA"] = "proxy-NCA"
    ks = {"cub200": (1, 2, 4, 8), "cars196": (1, 2, 4, 8), "sop": (1, 10, 100, 1000), "inshop": (1, 10, 20, 30, 50)}
    printed = {}
    for name, line in re.findall(r"^(CUB|CARS|SOP|In-Shop) (.*)\.$", text, flags=re.MULTILINE):
        for part in re.sub(r"^\(k [\d ]+\) ", "", line).split("; "):
            variant = variants[re.match(r"[\w-]+?(?=[+ ])", part)[0]]
            recalls = part.rpartition("/ ")[2].split()
            dataset = DATA[name]
            printed.setdefault(variant, {})[dataset] = dict(zip(ks[dataset], map(float, recalls), strict=True))
    assert sum(len(datasets) for datasets in printed.values()) == 14
    assert {variant: transcribed("MIC's baselines", variant) for variant in variants.values()} == printed


@needs_spec
def test_the_benchmark_of_2020_is_its_figures():
    text = section("facts_revisiting_dml.md", "## 6. Benchmark numbers")
    printed = {}
    for line in text.splitlines():
        cells = [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]
        if len(cells) != 4 or cells[0] in ("method", "---"):
            continue
        for dataset, cell in zip(("cub200", "cars196", "sop"), cells[1:], strict=True):
            if cell != "-":
                printed[cells[0], dataset] = tuple(map(float, re.match(r"([\d.]+) \+- ([\d.]+)", cell).groups()))
    assert len(printed) == 23 * 3 - 2
    ours = {
        (row["variant"], row["dataset"]): (*row["percent"], *row["deviation"])
        for row in SOURCES
        if row["system"] == "Revisiting Training Strategies"
    }
    assert ours == printed


def test_mdr_and_what_is_only_remembered_are_not_in_the_table():
    assert not any("MDR" in number.system for number in PUBLISHED)
    found = {(n.dataset, n.metric, round(100 * n.value, 2)) for n in PUBLISHED}
    # Tables of papers that were not read: Divide & Conquer on SOP, the baseline with 512 dimensions on CUB, ...
    for remembered in (("sop", 75.9), ("cub200", 61.3), ("cars196", 84.1), ("inshop", 89.7), ("vehicleid_large", 82.0)):
        assert (remembered[0], "recall_at_1", remembered[1]) not in found


def test_only_numbers_of_the_same_protocol_are_comparable():
    assert {n.system for n in comparable("vehicleid_large", "leave_one_out")} == {"Divide & Conquer"}
    assert comparable("vehicleid_large", "one_gallery_image") == []
    assert comparable("inshop", "leave_one_out") == []
    assert {n.protocol for n in comparable("inshop", "query_gallery")} == {"query_gallery"}
    assert comparable("digits", "leave_one_out") == []


CONFIG = {
    "data": {"name": "cub200"},
    "model": {"backbone": "resnet50", "embedding_dim": 128},
    "method": {"name": "mic"},
    "loss": {"name": "margin"},
    "miner": {"name": "distance_weighted"},
    "regularizers": {"mdr": {"weight": 0.1}},
}


def finished_study(folder, dataset):
    """A folder with the result files of a study of one trial on this data set."""
    config = {**CONFIG, "data": {"name": dataset}}
    score = {"recall_at_1": {"mean": 0.5, "half_width": None}}
    parts = dict.fromkeys(("metrics", "untrained", "validation", "untrained_validation", "ensemble"), score)
    started = {"event": "trial_started", "stage": "search", "trial": "search-000", "fingerprint": "f", "config": config}
    settings = {"search": {"scheduler": "none", "grace_epochs": 1, "reduction_factor": 3}}
    files = {
        "study.json": {"name": "x", "created": "2026", "select_on": "val_recall_at_1", "trials": [config]}
        | {"machine": {"device": "cpu", "gpus_per_trial": 0, "cpus_per_trial": 1}}
        | {"study": {**settings, "confirm": None, "finalize": {"top": 1}}},
        "ranking.json": [{"trial": "search-000", "value": 0.5, "epoch_of_best": 1, "ended": "finished"}],
        "final.json": [{"configuration": "f", "from_trial": "search-000", "runs": {}, "protocols": {}, **parts}],
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "events.jsonl").write_text(json.dumps(started) + "\n")
    return folder


def test_a_finished_study_of_a_benchmark_has_its_published_numbers(tmp_path):
    summary = summarise(finished_study(tmp_path, "cub200"))
    (final,) = summary["final"]
    assert (final["recipe"], final["dataset"]) == ("mic: margin, distance_weighted + mdr", "cub200")
    assert (final["backbone"], final["embedding_dim"]) == ("resnet50", 128)
    (mic,) = [entry for entry in summary["published"] if entry["system"] == "MIC"]
    assert mic["metrics"]["recall_at_1"] == {"mean": 0.661, "deviation": None}
    assert set(mic["metrics"]) == {"recall_at_1", "recall_at_2", "recall_at_4"}
    assert mic["chosen_on_test"]
    assert {entry["dataset"] for entry in summary["published"]} == {"cub200"}
    assert len(summary["published"]) == 4 + 1 + 2 + 1 + 4 + 23
    (binary,) = [e for e in summary["published"] if e["variant"] == "normalised softmax, binary"]
    assert binary["metrics"]["binary_recall_at_1"] == {"mean": 0.6367, "deviation": None}
    assert set(binary["metrics"]) == {f"binary_recall_at_{k}" for k in (1, 2, 4, 8)}


def test_a_study_of_other_images_has_none(tmp_path):
    assert summarise(finished_study(tmp_path, "image_folder"))["published"] == []


def test_a_recipe_in_words():
    plain = {**CONFIG, "method": {"name": "plain"}, "regularizers": {}}
    assert recipe_of(plain) == "margin, distance_weighted"
    assert recipe_of({**plain, "miner": None}) == "margin"
