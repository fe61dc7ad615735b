"""The table of published numbers: against a transcription, itself compared with the sources; in a summary.

published_sources.json has a row for each row that a source prints: percent, as printed, at the k it is printed for.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from raydml.analysis.published import is_system, published_numbers, published_of
from raydml.config.recipe import recipe_of
from raydml.data.benchmarks import BENCHMARKS
from raydml.evaluation.protocols import PROTOCOLS
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
        if "source" not in row and row["system"] == system and variant in (None, row["variant"]):
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
    numbers = published_numbers()
    of_a_row = Counter((n.system, n.variant, n.backbone, n.embedding_dim, n.dataset, n.metric) for n in numbers)
    # The same network may be in two tables only where each measured it by itself.
    assert [key for key, count in of_a_row.items() if count > 1] == []
    names = {name for benchmark in BENCHMARKS.values() for name in benchmark.data_names}
    for number in numbers:
        assert number.dataset in names
        assert number.protocol in PROTOCOLS
        assert re.fullmatch(r"(binary_)?recall_at_[1-9]\d*", number.metric)
        assert number.metric.startswith("binary") == number.variant.endswith(", binary")
        assert 0.2 < number.value < 1  # fractions, not percent
        assert number.deviation is None or 0 < number.deviation < 0.01
        assert number.source
        assert number.status
        assert not re.search(r"recall\]|\bmem\b|paper\?", f"{number.source} {number.status}")


def test_each_number_has_a_protocol_that_its_data_set_is_scored_by():
    protocols = {name: one.protocols for one in BENCHMARKS.values() for name in one.data_names}
    found = {(n.dataset, n.protocol) for n in published_numbers()}
    assert all(protocol in protocols[dataset] for dataset, protocol in found)
    assert ("inshop", "query_gallery") in found
    vehicles = {(n.dataset, n.protocol, n.system) for n in published_numbers() if n.dataset.startswith("vehicleid")}
    assert vehicles == {
        ("vehicleid_large", "leave_one_out", "Divide & Conquer"),
        ("vehicleid_small", "leave_one_out", "MIC"),
        *((f"vehicleid_{size}", "one_gallery_image", "fast-reid") for size in ("small", "medium", "large")),
    }


def test_the_table_is_what_its_sources_print():
    def key(source, system, variant, backbone, dim, dataset, metric):
        # Rows of the first sources are told apart by system and variant alone.
        return (
            (source, backbone, dim, system, variant, dataset, metric) if source else (system, variant, dataset, metric)
        )

    printed, later = {}, {row.get("source") for row in SOURCES}
    for row in SOURCES:
        assert row["where"]
        deviations = row.get("deviation", [None] * len(row["k"]))
        for k, percent, deviation in zip(row["k"], row["percent"], deviations, strict=True):
            facts = (row.get("source"), row["system"], row["variant"], row.get("backbone"), row.get("embedding_dim"))
            name = key(*facts, row["dataset"], f"{row['metric']}_{k}")
            assert name not in printed
            printed[name] = (percent, deviation)
    ours = {}
    for n in published_numbers():
        source = n.source if n.source in later else None
        name = key(source, n.system, n.variant, n.backbone, n.embedding_dim, n.dataset, n.metric)
        assert name not in ours
        ours[name] = (round(100 * n.value, 4), None if n.deviation is None else round(100 * n.deviation, 4))
    assert ours == printed  # in both directions: none is missing, none is invented
    assert len(ours) == 732


@pytest.mark.parametrize(
    ("system", "variant", "backbone", "dim", "dataset", "protocol", "chosen_on_test", "recalls"),
    [
        ("HIER", "", "resnet50", 512, "cub200", "leave_one_out", None, {1: 70.1, 2: 79.4, 4: 86.9}),
        ("HIER", "", "vit_small_patch16_224", 384, "inshop", "query_gallery", None, {1: 92.8, 10: 98.4, 20: 99.0}),
        ("Proxy-Anchor", "", "bn_inception", 512, "cars196", "leave_one_out", None, {1: 86.1, 2: 91.7, 4: 95.0}),
        ("classification baseline", "normalised softmax", "resnet50", 128, "cub200", "leave_one_out", None,
         {1: 56.5, 2: 69.6, 4: 79.9}),
        ("XBM", "", "resnet50", 128, "sop", "leave_one_out", None, {1: 80.6, 10: 91.6, 100: 96.2}),
        ("not trained", "DINO ViT-S/16", "dino_vits16", 384, "cars196", "leave_one_out", False,
         {1: 42.9, 2: 53.9, 4: 64.2}),
        ("A-BIER", "", None, None, "inshop", "query_gallery", None,
         {1: 83.1, 10: 95.1, 20: 96.9, 30: 97.5, 40: 97.8, 50: 98.0}),
        ("Margin", "", None, None, "cub200", "leave_one_out", None, {2: 74.4, 4: 83.1, 8: 90.0, 16: 94.2}),
        ("UNICOM", "fine-tuned", "UNICOM ViT-B/16", None, "sop", "leave_one_out", True, {1: 88.8}),
        ("UNICOM", "zero-shot", "UNICOM ViT-L/14@336px", None, "cars196", "leave_one_out", False, {1: 97.3}),
        ("not trained", "openai_vitb32_224", None, None, "sop", "leave_one_out", False, {1: 61.2}),
        ("not trained", "resnet50_moco_v2", None, None, "inshop", "query_gallery", False, {1: 26.7}),
        ("fast-reid", "BoT", "ResNet-50-IBN", 2048, "vehicleid_small", "one_gallery_image", None, {1: 86.6, 5: 97.9}),
        ("fast-reid", "BoT", "ResNet-50-IBN", 2048, "vehicleid_medium", "one_gallery_image", None, {1: 82.9, 5: 96.0}),
        ("fast-reid", "BoT", "ResNet-50-IBN", 2048, "vehicleid_large", "one_gallery_image", None, {1: 80.6, 5: 93.9}),
    ],
)  # fmt: skip
def test_numbers_typed_from_the_sources(system, variant, backbone, dim, dataset, protocol, chosen_on_test, recalls):
    found = [
        n
        for n in published_of(dataset, protocol)
        if (n.system, n.variant, n.backbone, n.embedding_dim) == (system, variant, backbone, dim)
    ]
    assert {int(n.metric.removeprefix("recall_at_")): round(100 * n.value, 4) for n in found} == recalls
    assert {n.chosen_on_test for n in found} == {chosen_on_test}


def test_larger_k_finds_more():
    rows = {}
    for n in published_numbers():
        name, k = n.metric.rsplit("_", 1)
        key = (n.source, n.system, n.variant, n.backbone, n.embedding_dim, n.dataset, name)
        rows.setdefault(key, {})[int(k)] = n.value
    assert max(map(len, rows.values())) == 6
    for values in rows.values():
        ordered = [values[k] for k in sorted(values)]
        assert ordered == sorted(ordered)


def test_who_chose_the_epoch_on_the_test_classes_is_said_only_where_it_is_known():
    chosen = {}
    for n in published_numbers():
        chosen.setdefault((n.source, n.variant if n.system == "UNICOM" else n.system), set()).add(n.chosen_on_test)
    hier = "table of HIER, CVPR 2023"
    assert {key: found for key, found in chosen.items() if found != {None}} == {
        ("release README, CVPR 2019", "Divide & Conquer"): {True},
        ("release README, BMVC 2019", "classification baseline"): {False},  # the last epoch: its code picks none
        ("release README, CVPR 2019", "multi-similarity"): {True},
        ("tables of later papers, ICCV 2019", "MIC"): {True},
        ("figures in the benchmark's repository, ICML 2020", "Revisiting Training Strategies"): {True},
        ("README of UNICOM, ICLR 2023", "fine-tuned"): {True},
        # Nothing is trained, so no epoch is chosen.
        ("README of UNICOM, ICLR 2023", "zero-shot"): {False},
        (hier, "not trained"): {False},
        ("model zoo of OML (open-metric-learning)", "not trained"): {False},
    }
    assert {system for source, system in chosen if source == hier} == {
        "classification baseline", "XBM", "multi-similarity", "SoftTriple", "Proxy-Anchor", "ProxyNCA++", "Hyp",
        "HIER", "IRT_R", "not trained",
    }  # fmt: skip


@needs_spec
def test_divide_and_conquer_is_its_readme_and_not_what_is_remembered_of_the_paper():
    text = section("spec_divide_conquer.md", "## 14. Expected results")
    (line,) = [line for line in text.splitlines() if line.startswith("| release README")]
    sop, inshop, vehicleid = [float(re.match(r"[\d.]+", cell.strip())[0]) for cell in line.split("|")[2:5]]
    assert "2400 list" in line
    read = {"sop": {1: sop}, "inshop": {1: inshop}, "vehicleid_large": {1: vehicleid}}
    assert transcribed("Divide & Conquer") == read


@needs_spec
def test_what_the_table_of_hier_prints_unlike_the_paper_is_left_out():
    """Of the normalised softmax with 512 dimensions, which HIER repeats: its k = 1 on In-Shop is that of 128."""
    line = next(
        line
        for line in section("spec_classification.md", "## 10. Targets").splitlines()
        if line.startswith("Paper tables")
    )
    text = line.partition("ResNet-50 512-d float: ")[2].partition(". 2048-d")[0]
    paper = {DATA[name]: numbers(recalls, "/") for name, recalls in re.findall(r"([\w-]+) ([\d./]+\d)", text)}
    ks = {"cub200": (1, 2, 4, 8), "cars196": (1, 2, 4, 8), "sop": (1, 10, 100), "inshop": (1, 10, 20, 30)}
    printed = {
        (dataset, f"recall_at_{k}"): percent
        for dataset, recalls in paper.items()
        for k, percent in zip(ks[dataset], recalls, strict=True)
    }
    of_hier = {
        (n.dataset, n.metric): round(100 * n.value, 4)
        for n in published_numbers()
        if (n.source, n.system, n.embedding_dim) == ("table of HIER, CVPR 2023", "classification baseline", 512)
    }
    assert len(of_hier) == 4 * 3 - 1
    assert {key: printed[key] for key in of_hier} == of_hier
    assert ("inshop", "recall_at_1") not in of_hier


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
        assert {n.embedding_dim for n in published_numbers() if n.variant == f"{dim} dimensions"} == {int(dim)}


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
    assert not any("MDR" in number.system for number in published_numbers())
    found = {(n.dataset, n.metric, round(100 * n.value, 2)) for n in published_numbers()}
    # Tables of papers that were not read: Divide & Conquer on SOP and VehicleID.
    for remembered in (("sop", 75.9), ("vehicleid_large", 82.0)):
        assert (remembered[0], "recall_at_1", remembered[1]) not in found


def test_only_numbers_of_the_same_protocol_are_published_of():
    assert {n.system for n in published_of("vehicleid_large", "leave_one_out")} == {"Divide & Conquer"}
    assert {n.system for n in published_of("vehicleid_large", "one_gallery_image")} == {"fast-reid"}
    assert published_of("vehicleid_medium", "leave_one_out") == []
    assert published_of("inshop", "leave_one_out") == []
    assert {n.protocol for n in published_of("inshop", "query_gallery")} == {"query_gallery"}
    assert published_of("digits", "leave_one_out") == []


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
    # The releases and MIC, MIC's baselines, the benchmark of 2020, Deep_Metric's comparison, HIER's table, UNICOM's.
    assert len(summary["published"]) == (4 + 1 + 2 + 1) + 4 + 23 + 7 + 25 + 4
    (binary,) = [e for e in summary["published"] if e["variant"] == "normalised softmax, binary"]
    assert binary["metrics"]["binary_recall_at_1"] == {"mean": 0.6367, "deviation": None}
    assert set(binary["metrics"]) == {f"binary_recall_at_{k}" for k in (1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("loss", "miner", "system", "variant", "is_same"),
    [
        ("proxy_anchor", None, "Proxy-Anchor", "", True),
        ("soft_triple", None, "SoftTriple", "", True),
        ("margin", "distance_weighted", "Margin", "", True),
        ("margin", "distance_weighted", "MIC", "margin loss", False),
        ("proxy_nca", None, "Proxy-NCA", "", True),
        ("proxy_nca", None, "ProxyNCA++", "marked † there", False),
        ("multi_similarity", "multi_similarity", "multi-similarity", "", True),
    ],
)
def test_a_system_is_recognised_by_its_loss_and_miner(loss, miner, system, variant, is_same):
    config = {"loss": {"name": loss}, "miner": {"name": miner} if miner else None}
    assert is_system(config, system, variant) == is_same


@pytest.mark.parametrize(("auxiliary", "is_same"), [(None, True), ("margin", True), ("proxy_nca", False)])
def test_mic_with_another_loss_for_its_auxiliary_head_is_another_variant(auxiliary, is_same):
    method = {"name": "mic", **({"auxiliary_loss": {"name": auxiliary}} if auxiliary else {})}
    assert is_system({**CONFIG, "method": method, "regularizers": {}}, "MIC", "margin loss") == is_same


def test_a_study_of_all_lists_of_vehicleid_has_the_numbers_of_each(tmp_path):
    entries = summarise(finished_study(tmp_path, "vehicleid"))["published"]
    assert {(one["dataset"], one["protocol"], one["system"]) for one in entries} == {
        ("vehicleid_small", "leave_one_out", "MIC"),
        ("vehicleid_large", "leave_one_out", "Divide & Conquer"),
        *((f"vehicleid_{size}", "one_gallery_image", "fast-reid") for size in ("small", "medium", "large")),
    }


def test_a_study_of_other_images_has_none(tmp_path):
    assert summarise(finished_study(tmp_path, "image_folder"))["published"] == []


def test_a_recipe_in_words():
    plain = {**CONFIG, "method": {"name": "plain"}, "regularizers": {}}
    assert recipe_of(plain) == "margin, distance_weighted"
    assert recipe_of({**plain, "miner": None}) == "margin"
