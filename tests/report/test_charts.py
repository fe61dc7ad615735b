"""Charts and tables as values and as the elements they become: where things are, and that nothing escapes."""

from __future__ import annotations

import math
import re

import pytest

from raydml.report.charts import (
    Axis,
    Curve,
    Scale,
    Whisker,
    axis_of,
    grades,
    labels_of,
    line_chart,
    number_text,
    parallel_chart,
    scale_of,
    tick_values,
    whisker_chart,
)
from raydml.report.page import templates
from raydml.report.tables import FoldedTable, TableCell, table

EVIL = '<script>alert("1 & 2")</script>'
SAFE = "&lt;script&gt;alert(&#34;1 &amp; 2&#34;)&lt;/script&gt;"


def drawn(macro, *values, template="charts.html"):
    return str(getattr(templates().get_template(template).module, macro)(*values))


def test_text_from_outside_is_escaped():
    evil_table = table([EVIL], [[EVIL], [TableCell(EVIL, small=EVIL, tag=EVIL)]], caption=EVIL)
    chart = line_chart([Curve([(1, 0.5)], "series-0", EVIL)], x_label=EVIL, y_label=EVIL)
    for made, count in (
        (drawn("folded_table", FoldedTable(EVIL, evil_table), template="sections.html"), 8),
        (drawn("bullets", [EVIL], template="sections.html"), 1),
        (drawn("bars", [(EVIL, 0.5, EVIL)]), 2),
        (drawn("line_chart", chart), 4),
        (drawn("parallel_chart", parallel_chart([axis_of(EVIL, [EVIL, 1])], [0.1, 0.2], [EVIL, EVIL])), 4),
    ):
        assert "<script" not in made
        assert made.count(SAFE) == count


def test_numbers_are_aligned_right_and_words_are_not():
    made = drawn("table", table(["a", "b"], [["x", 1], ["y" * 30, None]], emphasised=(1,)), template="sections.html")
    assert '<tr><td>x</td><td class="number">1</td></tr>' in made
    assert f'<tr class="emphasised"><td class="long">{"y" * 30}</td><td class="number">–</td></tr>' in made


@pytest.mark.parametrize(
    ("low", "high", "integers", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 9, True, [2, 4, 6, 8]),
        (1, 3, True, [1, 2, 3]),
        (0.43, 0.83, False, [0.5, 0.6, 0.7, 0.8]),
        (-0.3, 0.3, False, [-0.2, 0.0, 0.2]),
        (0, 1200, False, [0, 500, 1000]),
        (2.0, 2.0, False, [2.0]),
    ],
)
def test_ticks_are_round_and_inside(low, high, integers, expected):
    assert tick_values(Scale(low, high), integers=integers) == pytest.approx(expected)


def test_scales_leave_room_and_do_not_go_below_zero_for_nothing():
    scale = scale_of([0.2, math.nan, 0.7])
    assert (scale.low, scale.high) == (pytest.approx(0.17), pytest.approx(0.73))
    assert scale_of([0.0, 1.0]).low == 0
    assert scale_of([-1.0, 1.0]).low < -1
    assert scale_of([]) == Scale(0.0, 1.0)
    assert scale_of([0.5, 0.5]).share(0.5) == pytest.approx(0.5)
    assert Scale(1e-4, 1e-2, is_log=True).share(1e-3) == pytest.approx(0.5)
    assert Scale(3.0, 3.0).share(3.0) == 0.5


def test_numbers_are_short():
    assert [number_text(v) for v in (0.25, 1200.0, 3.21234e-05, 1e-05)] == ["0.25", "1200", "3.212e-5", "1e-5"]


def test_a_curve_is_where_its_values_are_and_a_gap_stays_open():
    curve = Curve([(1, 0.0), (2, 1.0), (3, math.nan), (5, 0.5)], "series-0", "t")
    chart = line_chart([curve], x_label="epoch", y_label="value", up=Scale(0.0, 1.0))
    (shape,) = chart.shapes
    assert shape.path == "M0.0 1000.0L250.0 0.0M1000.0 500.0"
    made = drawn("line_chart", chart)
    assert f'<path d="{shape.path}" class="line series-0"' in made
    assert '<circle cx="100.000%" cy="50.000%" r="3.5" class="dot series-0"/>' in made


def test_where_a_trial_was_stopped_and_where_one_failed_is_marked():
    points = [(1, 0.2), (2, 0.4)]
    curves = [Curve(points, "a", "a", "cut"), Curve(points, "b", "b", "failed"), Curve(points, "c", "c", None)]
    made = drawn("line_chart", line_chart(curves, x_label="epoch", y_label="value", rungs=[1, 2]))
    assert re.findall(r'<path d="([^"]*)" class="cut (.)"', made) == [("M0 -6V6", "a"), ("M-4 -4L4 4M-4 4L4 -4", "b")]
    assert "<circle" not in made
    assert re.findall(r'x1="([^"]*)" x2="([^"]*)" y1="0" y2="100%" class="rung"', made) == [
        ("0.000%", "0.000%"),
        ("100.000%", "100.000%"),
    ]


def test_labels_of_rungs_that_are_close_are_left_out():
    curves = [Curve([(1, 0.1), (81, 0.2)], "s", "t")]
    chart = line_chart(curves, x_label="epoch", y_label="v", rungs=[1, 3, 9, 27])
    assert [label for _, label in chart.rungs] == ["rung 1", "", "", "rung 27"]


def test_a_chart_of_nothing_says_so():
    for curves in ([], [Curve([], "s", "t")], [Curve([(1, math.nan)], "s", "t")]):
        chart = line_chart(curves, x_label="epoch", y_label="v")
        assert "nothing has been measured yet" in drawn("line_chart", chart)
    chart = line_chart([Curve([(1, 0.5)], "s", "t")], x_label="epoch", y_label="v")
    assert "nothing" not in drawn("line_chart", chart)


def test_a_whisker_reaches_from_end_to_end_of_its_interval():
    row = Whisker("A", "margin <b>", 0.5, 0.1, [("fold 0", 0.4), ("fold 1", 0.6)], "0.500 ± 0.100")
    made = drawn("whiskers", whisker_chart([row], x_label="MAP@R", reference=(0.4, "untrained")))
    # 0.4 to 0.6 with a margin of 6 % of 0.2 on each side: 0.388 to 0.612.
    ends = [100 * (value - 0.388) / 0.224 for value in (0.4, 0.6)]
    low, high = (f"{end:.3f}%" for end in ends)
    assert f'x1="{low}" x2="{high}" y1="50%" y2="50%" class="whisker"' in made
    assert made.count('class="value"') == 2
    assert 'cx="50.000%" cy="50%" r="5" class="mean"' in made
    assert f'x1="{low}" x2="{low}" y1="0" y2="100%" class="rung"' in made
    assert "margin &lt;b&gt;" in made
    alone = drawn("whiskers", whisker_chart([row._replace(half_width=None)], x_label="MAP@R"))
    assert 'class="whisker"' not in alone
    assert 'class="rung"' not in alone


def test_axes_of_numbers_and_of_choices():
    numbers = axis_of("rate", [1e-4, 1e-2, None, 1e-3])
    assert numbers.shares == [0.0, 1.0, None, pytest.approx(0.5)]
    assert [text for _, text in numbers.ticks] == ["0.0001", "0.001", "0.01"]
    assert axis_of("dim", [16, 64, 64, 32]).shares == [0.0, 1.0, 1.0, pytest.approx(1 / 3)]
    close = axis_of("beta", [0.0, 0.5, 0.55, 1.0])
    assert [text for _, text in close.ticks] == ["0", "0.5", "1"], "0.55 would overlap 0.5"
    assert axis_of("same", [3, 3]).ticks == [(0.5, "3")]
    choices = axis_of("loss", ["margin", None, "arcface", "margin"])
    assert choices.shares == [0.75, None, 0.25, 0.75]
    assert choices.ticks == [(0.25, "arcface"), (0.75, "margin")]
    assert axis_of("flip", [True, False]).ticks == [(0.25, "False"), (0.75, "True")]


def test_lines_are_graded_by_rank_and_the_best_is_drawn_last():
    values = [0.5, 0.1, 0.9, 0.3, 0.7]
    assert grades(values) == [2, 0, 4, 1, 3]
    axes = [Axis("a", [0.0, 0.25, 0.5, 0.75, 1.0], [(0.0, "x")]), Axis("b", [None, 0.5, 1.0, 0.0, 0.5], [(0.0, "y")])]
    lines = parallel_chart(axes, values, [f"trial {n}" for n in range(5)]).lines
    assert [title for _, _, title in lines] == [f"trial {n}" for n in (1, 3, 0, 4, 2)]
    assert [grade for _, grade, _ in lines] == [0, 1, 2, 3, 4]
    assert [path.count("L") for path, _, _ in lines] == [1, 1, 0, 1, 1], "a trial without a parameter skips its axis"


def test_axes_have_short_names_unless_two_would_be_the_same():
    names = ["optimizer.learning_rate", "schedule.name", "loss", "loss.margin.beta", "miner.x.beta"]
    assert list(labels_of(names).values()) == ["learning_rate", "schedule", "loss", "loss.margin.beta", "miner.x.beta"]
