"""The section about shorter embeddings, from a written study."""

import re

import pytest

from raydml.report.page import report_page
from raydml.report.prefixes import prefixes_section
from raydml.study.summary import histories, summarise
from tests.report.written_study import add_prefixes, add_refits, score, write_study


@pytest.fixture
def study(tmp_path):
    return add_prefixes(write_study(tmp_path / "birds"))


def test_without_prefixes_there_is_no_section(tmp_path):
    plain = write_study(tmp_path / "birds")
    assert prefixes_section(summarise(plain)) is None
    assert "Shorter embeddings" not in report_page(summarise(plain), histories(plain))


def test_bytes_and_scores_of_each_length(study):
    section = prefixes_section(summarise(study))
    assert section is not None
    rows = [[cell.text for cell in row] for row in section["as_table"].table.rows]
    # 4 bytes a number; the whole embedding, of 128 dimensions, has the metrics of the configuration.
    assert [row[2:5] for row in rows] == [
        ["2", "8", "0.200 ± 0.030"],
        ["8", "32", "0.520 ± 0.030"],
        ["32", "128", "0.600 ± 0.030"],
        ["128", "512", "0.650 ± 0.030"],
        ["32", "128", "0.630 ± 0.030"],
        ["128", "512", "0.650 ± 0.030"],
    ]
    assert [row[5] for row in rows][:2] == ["0.100 ± 0.020", "0.260 ± 0.020"]
    assert [row[0] for row in rows] == ["A"] * 4 + ["B"] * 2
    assert "with 2 of 128 dimensions (8 instead of 512 bytes an image)" in section["sentence"]
    assert "R@1 is 0.200, 31% of the 0.650 of the whole embedding" in section["sentence"]


def test_the_curve_is_over_the_logarithm_of_the_bytes(study):
    (title, chart), _ = prefixes_section(summarise(study))["charts"]
    assert title == "Recall@1, test"
    assert [text for _, text in chart.x_ticks] == ["8", "32", "128", "512"]
    assert [share for share, _ in chart.x_ticks] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    curve = chart.shapes[0]
    across = [float(x) / 1000 for x in re.findall(r"[ML]([\d.]+) ", curve.path)]
    assert across == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-3)
    dots = [shape for shape in chart.shapes if shape.curve.mark]
    assert [shape.x for shape in dots] == pytest.approx([0, 1 / 3, 2 / 3, 1, 2 / 3, 1])
    assert dots[1].curve.title.endswith(", 8 dimensions, 32 bytes: 0.5200 ± 0.0300")


def test_labels_of_the_axis_do_not_overlap(study):
    summary = summarise(study)
    for dim in (126, 127):
        summary["final"][0]["metrics"][f"dim_{dim}_recall_at_1"] = score(0.64, None)
        summary["final"][0]["metrics"][f"dim_{dim}_map_at_r"] = score(0.3, None)
    (_, chart), _ = prefixes_section(summary)["charts"]
    assert [text for _, text in chart.x_ticks] == ["8", "32", "128", "512"]


def test_a_refit_is_a_curve_of_its_own(study):
    add_refits(study)
    add_prefixes(study)
    summary = summarise(study)
    summary["final"][0]["refit"]["metrics"] |= {
        "dim_8_recall_at_1": score(0.5, None),
        "dim_8_map_at_r": score(0.2, None),
    }
    section = prefixes_section(summary)
    assert [words.partition(" ")[0] for _, words in section["legend"]] == ["A", "A", "B"]
    assert "refit" in section["legend"][0][1]
    assert "Shorter embeddings" in report_page(summary, histories(study))
