"""Charts and tables as the elements they are made of: where things stand, and that nothing escapes."""

from __future__ import annotations

import math
import re

import pytest

from raydml.report.charts import Line, Scale, Whisker, bars, line_chart, number_text, scale_of, ticks, whisker_rows
from raydml.report.markup import Markup, bullets, element, escaped, joined, table
from raydml.report.parallel import Axis, axis_of, grades, labels_of, parallel_coordinates

EVIL = '<script>alert("1 & 2")</script>'


def test_everything_that_is_no_markup_is_escaped_where_it_enters():
    assert escaped(EVIL) == "&lt;script&gt;alert(&quot;1 &amp; 2&quot;)&lt;/script&gt;"
    assert escaped(None) == "–"
    assert escaped(escaped("<")) == "&lt;"
    assert element("p", EVIL, class_='"x', data_a=None) == f'<p class="&quot;x">{escaped(EVIL)}</p>'
    assert element("text", 3, text_anchor="end") == '<text text-anchor="end">3</text>'
    for markup in (table([EVIL], [[EVIL]], caption=EVIL), bullets([EVIL]), joined(EVIL), bars([(EVIL, 0.5, EVIL)])):
        assert "<script" not in markup
        assert escaped(EVIL) in markup
    assert joined(Markup("<b>"), "<i>") == "<b>&lt;i&gt;"


def test_figures_stand_to_the_right_and_words_do_not():
    made = table(["a", "b"], [["x", 1], ["y" * 30, None]], emphasised=(1,))
    assert '<tr><td>x</td><td class="number">1</td></tr>' in made
    assert f'<tr class="emphasised"><td class="long">{"y" * 30}</td><td class="number">–</td></tr>' in made


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
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
def test_ticks_are_round_and_inside(low, high, whole, expected):
    assert ticks(Scale(low, high), whole=whole) == pytest.approx(expected)


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


def paths(markup):
    return re.findall(r'd="([^"]*)"', markup)


def test_a_curve_stands_where_its_values_are_and_a_gap_stays_open():
    line = Line([(1, 0.0), (2, 1.0), (3, math.nan), (5, 0.5)], "series-0", EVIL)
    made = line_chart([line], x_label="epoch", y_label="value", up=Scale(0.0, 1.0))
    assert paths(made) == ["M0.0 1000.0L250.0 0.0M1000.0 500.0"]
    assert '<circle cx="100.000%" cy="50.000%" r="3.5" class="dot series-0"></circle>' in made
    assert "<script" not in made


def test_where_a_trial_was_stopped_and_where_one_failed_is_marked():
    points = [(1, 0.2), (2, 0.4)]
    made = line_chart(
        [Line(points, "series-0", "a", "cut"), Line(points, "series-1", "b", "failed"), Line(points, "x", "c", None)],
        x_label="epoch", y_label="value", rungs=[1, 2],
    )  # fmt: skip
    cut, failed = re.findall(r'<path d="(M[^"]*)" class="cut', made)
    assert cut == "M0 -6V6"
    assert failed.count("M") == 2
    assert "<circle" not in made
    assert 'x1="100.000%" x2="100.000%"' in made
    assert made.count('class="rung"') == 2


def test_labels_of_rungs_that_lie_close_are_left_out():
    lines = [Line([(1, 0.1), (81, 0.2)], "s", "t")]
    made = line_chart(lines, x_label="epoch", y_label="v", rungs=[1, 3, 9, 27])
    assert made.count('class="rung"') == 4
    assert re.findall(r"rung (\d+)<", made) == ["1", "27"]


def test_a_chart_of_nothing_says_so():
    for lines in ([], [Line([], "s", "t")], [Line([(1, math.nan)], "s", "t")]):
        assert "nothing has been measured yet" in line_chart(lines, x_label="epoch", y_label="v")
    assert "nothing" not in line_chart([Line([(1, 0.5)], "s", "t")], x_label="epoch", y_label="v")


def test_a_whisker_reaches_from_end_to_end_of_its_interval():
    row = Whisker("A", "margin <b>", 0.5, 0.1, [("fold 0", 0.4), ("fold 1", 0.6)], "0.500 ± 0.100")
    made = whisker_rows([row], x_label="MAP@R", reference=(0.4, "untrained"))
    # 0.4 to 0.6 with a margin of 6 % of 0.2 on each side: 0.388 to 0.612.
    ends = [100 * (value - 0.388) / 0.224 for value in (0.4, 0.6)]
    low, high = (f"{end:.3f}%" for end in ends)
    assert f'x1="{low}" x2="{high}" y1="50%" y2="50%" class="whisker"' in made
    assert made.count('class="value"') == 2
    assert 'cx="50.000%" cy="50%" r="5" class="mean"' in made
    assert f'x1="{low}" x2="{low}" y1="0" y2="100%" class="rung"' in made
    assert "margin &lt;b&gt;" in made
    alone = whisker_rows([row._replace(half_width=None)], x_label="MAP@R")
    assert 'class="whisker"' not in alone
    assert 'class="rung"' not in alone


def test_axes_of_numbers_and_of_choices():
    numbers = axis_of("rate", [1e-4, 1e-2, None, 1e-3])
    assert numbers.shares == [0.0, 1.0, None, pytest.approx(0.5)]
    assert [text for _, text in numbers.ticks] == ["0.0001", "0.001", "0.01"]
    assert axis_of("dim", [16, 64, 64, 32]).shares == [0.0, 1.0, 1.0, pytest.approx(1 / 3)]
    close = axis_of("beta", [0.0, 0.5, 0.55, 1.0])
    assert [text for _, text in close.ticks] == ["0", "0.5", "1"], "0.55 would stand in 0.5"
    assert axis_of("same", [3, 3]).ticks == [(0.5, "3")]
    choices = axis_of("loss", ["margin", None, "arcface", "margin"])
    assert choices.shares == [0.75, None, 0.25, 0.75]
    assert choices.ticks == [(0.25, "arcface"), (0.75, "margin")]
    assert axis_of("flip", [True, False]).ticks == [(0.25, "False"), (0.75, "True")]


def test_lines_are_graded_by_rank_and_the_best_is_drawn_last():
    values = [0.5, 0.1, 0.9, 0.3, 0.7]
    assert grades(values) == [2, 0, 4, 1, 3]
    axes = [Axis("a", [0.0, 0.25, 0.5, 0.75, 1.0], [(0.0, "x")]), Axis("b", [None, 0.5, 1.0, 0.0, 0.5], [(0.0, "y")])]
    made = parallel_coordinates(axes, values, [f"trial {n}" for n in range(5)])
    order = re.findall(r"<title>trial (\d)</title>", made)
    assert order == ["1", "3", "0", "4", "2"]
    assert paths(made)[2].count("L") == 0, "a trial without a parameter passes its axis by"
    assert all(path.count("L") == 1 for path in paths(made)[:2])
    assert re.findall(r"grade-(\d)", made) == ["0", "1", "2", "3", "4"]


def test_axes_have_short_names_unless_two_would_be_the_same():
    names = ["optimizer.learning_rate", "schedule.name", "loss", "loss.margin.beta", "miner.x.beta"]
    assert list(labels_of(names).values()) == ["learning_rate", "schedule", "loss", "loss.margin.beta", "miner.x.beta"]
