"""Quality beside inference cost: the Pareto front, where its points are, and what the report says of them."""

import itertools
import json
import re

import pytest

from raydml.analysis.pareto import pareto_front
from raydml.report.charts import ScatterPoint, scatter_chart
from raydml.report.footprints import footprint_section
from raydml.report.page import report_page
from raydml.report.text import summary_markdown
from raydml.study.summary import histories, summarise
from tests.report.written_study import write_published_study, write_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "birds")


def test_the_front_by_hand():
    """Cost and quality: b is as good as a and dearer, d is worse and dearer than c; e is the best."""
    a, b, c, d, e = (1, 0.5), (2, 0.5), (3, 0.7), (4, 0.6), (9, 0.8)
    assert pareto_front([e, d, c, b, a]) == [4, 2, 0]
    assert pareto_front([a, a, c]) == [0, 1, 2]
    assert pareto_front([]) == []


def test_the_front_of_every_small_set_is_that_of_the_definition():
    values = list(itertools.product((1, 2, 3), (0.1, 0.2, 0.3)))
    for points in itertools.combinations(values, 4):
        kept = {
            point
            for point in points
            if all(other[0] > point[0] or other[1] < point[1] or other == point for other in points)
        }
        assert {points[number] for number in pareto_front(points)} == kept


def points_of(*values):
    front = pareto_front(values)
    return [ScatterPoint(x, y, "ABC"[n], "words", n in front) for n, (x, y) in enumerate(values)]


def test_points_are_where_their_values_are():
    """Costs 1, 2, 3 with 6 % room on both sides: the middle is the middle; A and C are as far from the edges."""
    chart = scatter_chart(points_of((1, 0.2), (2, 0.6), (3, 0.4)), x_label="ms", y_label="MAP@R")
    (b, high), (c, middle), (a, low) = [(one.x, one.y) for one in chart.points]  # the best first
    assert b == pytest.approx(0.5)
    assert a == pytest.approx(1 - c)
    assert 0 < a < 0.1
    assert middle == pytest.approx((low + high) / 2)
    assert not chart.is_log
    assert not any(one.is_left for one in chart.points)
    # From A right, up to B, and right to the edge; C is not on the front.
    coordinates = [tuple(map(float, pair.split())) for pair in re.split("[ML]", chart.path)[1:]]
    xs, ys = [1000 * a, 1000 * b, 1000 * b, 1000], [1000 * (1 - low)] * 2 + [1000 * (1 - high)] * 2
    assert coordinates == [pytest.approx(pair, abs=0.06) for pair in zip(xs, ys, strict=True)]


def test_costs_of_several_magnitudes_are_on_a_logarithmic_axis():
    chart = scatter_chart(points_of((1e6, 0.2), (1e7, 0.3), (1e8, 0.4)), x_label="parameters", y_label="MAP@R")
    assert chart.points[1].x == pytest.approx(0.5)
    assert chart.is_log
    assert [text for _, text in chart.x_ticks] == ["1 M", "10 M", "100 M"]
    apart = scatter_chart(points_of((5, 0.4), (5, 0.401), (1, 0.1)), x_label="ms", y_label="MAP@R")
    assert [(one.point.letter, one.is_left) for one in apart.points] == [("B", False), ("A", True), ("C", False)]
    near = scatter_chart(points_of((1e9, 0.2), (1e10, 0.3)), x_label="MACs", y_label="MAP@R")
    assert [text for _, text in near.x_ticks] == ["1 G", "2 G", "5 G", "10 G"]


def test_the_report_has_a_table_and_a_chart_of_each_measure_that_differs(folder):
    summary = summarise(folder)
    assert summary["final"][0]["footprint"]["ms_batch_1"] == 7.5, "the median of 6, 7, 8 and 9"
    section = footprint_section(summary)
    assert [chart.x_label for chart in section["charts"]] == [
        "ms an image (batch 64)", "ms an image (batch 1)", "parameters",
    ]  # fmt: skip
    assert section["same"] == "All have the same number of: 4.09 G MACs an image, 512 bytes an embedding."
    # B (the margin loss) has 0.32 and is cheaper than A (MIC), which has 0.31.
    on_front = {(of.letter, of.is_on_front) for chart in section["charts"] for _, _, of, _ in chart.points}
    assert on_front == {("A", False), ("B", True)}
    assert "on NVIDIA H200, fp32, images of 224 px" in section["note"]
    rows = [[cell.text for cell in row] for row in section["table"].rows]
    assert [row[4:] for row in rows] == [
        ["0.310 ± 0.040", "0.5", "7.5", "4.09 G", "25.6 M", "512"],
        ["0.320 ± 0.040", "0.25", "3", "4.09 G", "23.6 M", "512"],
    ]
    page = report_page(summary, histories(folder))
    assert page.count('class="dot series-0"><title>B margin') == 3
    assert "| A | mic: margin, distance_weighted | 0.5 | 7.5 | 4.09 G | 25.6 M | 512 |" in summary_markdown(summary)


def test_a_study_that_measured_nothing_has_no_such_section(tmp_path):
    folder = write_published_study(tmp_path / "published")
    summary = summarise(folder)
    assert summary["final"][0]["footprint"] is None
    assert footprint_section(summary) is None
    assert "Inference cost" not in summary_markdown(summary)


def test_one_configuration_has_a_table_and_no_chart(folder, tmp_path):
    one = write_study(tmp_path / "one")
    final = json.loads((folder / "final.json").read_text())[:1]
    (one / "final.json").write_text(json.dumps(final))
    section = footprint_section(summarise(one))
    assert section["charts"] == []
    assert section["same"] == ""
    assert len(section["table"].rows) == 1
