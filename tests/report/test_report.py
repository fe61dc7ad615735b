"""The report of a study written by hand: every format read back, nothing unescaped, nothing from outside."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from typer.testing import CliRunner

from raydml.cli.main import app
from raydml.report.page import ReportError, read_illustrations, report_page, write_report
from raydml.report.tables import epochs_csv, final_latex, trials_csv
from raydml.report.text import summary_markdown
from raydml.study.summary import histories, summarise
from tests.report.written_study import CURVES, ERROR, METRIC, png, write_study

VOID = {"meta", "img", "br", "hr", "link", "input"}
SECTIONS = [
    "findings", "test", "published", "confirmed", "settled", "curves", "choices", "importance", "cost",
    "retrievals", "classes", "map", "parameters", "trials", "reads",
]  # fmt: skip


class Page(HTMLParser):
    """Which tags a page opens and closes, its text by section, its links, and its tables as rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.sources, self.rows = [], {}, [], []
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.sources += [value for name, value in found.items() if name in ("src", "href", "data", "action", "poster")]
        if tag == "section":
            self.key = found["id"]
            self.sections[self.key] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "section" in self.open:
            self.sections[self.key] += data + " "
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path / "birds")


@pytest.fixture
def made(study):
    trials = histories(study)
    return summarise(study), trials, read_illustrations(study)


def test_the_page_has_every_section_and_needs_no_other_file(made):
    text = report_page(*made)
    page = Page(text)
    assert list(page.sections) == SECTIONS
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)
    assert [source[1:] for source in page.sources if source.startswith("#")] == SECTIONS
    assert "@import" not in text
    assert "url(" not in text
    assert not re.search(r"https?://", text)


def test_the_protocol_is_beside_the_test_numbers(made):
    assert "<p>Leave one out: so &amp; so.</p>" in report_page(*made)
    assert "\nLeave one out: so & so.\n" in summary_markdown(made[0])


def test_what_comes_from_a_study_is_escaped(made):
    text = report_page(*made)
    for evil in (ERROR, "birds <1>", "<MIC>", "<i>Black"):
        assert evil not in text
    assert "&lt;script&gt;alert(&#34;1 &amp; 2&#34;)&lt;/script&gt;" in text
    page = Page(text)
    assert ERROR in page.sections["trials"]
    assert 'The class "<i>Black & White</i>" fails.' in page.sections["map"]
    assert text.count("<script") == 1


def test_the_page_says_what_was_found(made):
    page = Page(report_page(*made))
    assert "A (mic: margin, distance_weighted) has the best mean" in page.sections["findings"]
    assert "The test classes were read 1 time outside finalize" in page.sections["findings"]
    assert ["A", "mic: margin, distance_weighted", "0.310 ± 0.040", "0.360", "0.100 ± 0.010", "0.600 ± 0.040",
            "0.650 ± 0.030"] in page.rows  # fmt: skip
    # Corrected for two folds: the standard error grows by the root of (1/4 + 1) / (1/4); p by Student's t of 3 degrees.
    assert ["A leads B", "0.090 ± 0.013", "< 0.001", "< 0.001", "0.002", "significant", "4"] in page.rows
    assert ["B leads A", "0.010 ± 0.013", "0.092", "0.092", "0.35", "not significant", "4"] in page.rows
    assert "confirm-004, fold 0, seed 0: 0.6000" in page.sections["confirmed"]
    published = [row for row in page.rows if row and row[0].startswith("MIC: margin loss")]
    assert [row[:4] for row in published] == [
        ["MIC: margin loss this study ran it: A", "0.6610", "resnet50", "128"]
    ] * 2
    # 33 rows are folded; beside ours are the 3 of the systems that were run and the 4 best, MIC's being one of both.
    titled = [row[0] for row in page.rows if len(row) == 5 and row[3] in ("128", "512", "2048", "–", "64")]
    assert len(titled) == 2 + (3 + 4 - 1) + 33
    assert "All 33 published rows of cub200, leave one out" in page.sections["published"]
    assert "rung 2" in page.sections["curves"]
    assert "Of 4 trials: 2 ran to the end, 1 stopped early, 1 crashed." in page.sections["curves"]
    assert "cluster NMI" in page.sections["curves"]
    assert "at least 8 are needed" in page.sections["importance"]
    assert ["search", "4", "11", "16", "1.8 min", "5.7%", "1", "2", "20 s"] in page.rows
    assert ["total", "12", "43", "48", "11.4 min", "0.9%", "1", "2", "20 s"] in page.rows
    assert "9 reads: 8 for finalize, 1 for evaluate; on node-7." in page.sections["reads"]


def test_commands_in_sentences_are_code(made):
    summary, trials, _ = made
    text = report_page({**summary, "study": "<i>"}, trials)
    assert "<code>resume &lt;i&gt; --num-trials 16</code>" in text


def test_a_trial_that_was_stopped_ends_in_a_bar_and_one_that_failed_in_a_cross(made):
    text = report_page(*made)
    for words, mark in (
        ("search-001[^<]*stopped early after epoch 2", "M0 -6V6"),
        ("search-003[^<]*crashed", "M-4 -4"),
    ):
        assert re.search(rf'{words}[^<]*</title></path></svg>\s*<svg [^>]*><path d="{mark}', text), words
    assert re.search(r"search-000[^<]*ran to the end[^<]*</title></path></svg>\s*<circle", text)


def test_loss_by_method(made):
    page = Page(report_page(*made))
    header = next(row for row in page.rows if row and row[0] == "loss × miner")
    assert header == ["loss × miner", "distance_weighted", "multi_similarity", "none"]
    assert ["margin", "0.550median 0.540, 2 trials", "–", "–"] in page.rows
    assert ["contrastive", "–", "–", "0.100median 0.100, 1 trial"] in page.rows


def test_pictures_are_inside_the_page(made):
    page = Page(report_page(*made))
    pictures = [source for source in page.sources if source.startswith("data:")]
    assert [base64.b64decode(source.partition(",")[2]) for source in pictures] == [
        png(width_px, 40) for width_px in (1200, 700, 700)
    ]
    # Only the one of 1200 pixels takes the width of the page.
    assert re.findall(r'<figure class="wide"><img [^>]*width="(\d+)"', report_page(*made)) == ["1200"]
    summary, trials, _ = made
    assert {"retrievals", "classes", "map"}.isdisjoint(Page(report_page(summary, trials)).sections)


def test_parameters_can_be_read_back(made):
    blocks = re.findall(r"<pre>(.*?)</pre>", report_page(*made), flags=re.DOTALL)
    summary, trials, _ = made
    configs = {trial.trial: trial.config for trial in trials}
    assert [yaml.safe_load(html.unescape(block)) for block in blocks] == [
        configs[row["from_trial"]] for row in summary["confirm"]
    ]


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_a_study_that_has_not_ended_has_a_page_of_what_there_is(tmp_path, stages):
    folder = write_study(tmp_path / "birds", stages=stages)
    page = Page(report_page(summarise(folder), histories(folder)))
    assert ("confirmed" in page.sections) == (stages == 2)
    assert ("settled" in page.sections) == (stages >= 1)
    assert {"test", "published"}.isdisjoint(page.sections)
    assert {"findings", "curves", "cost", "trials"} <= set(page.sections)
    assert "The test classes have not been read." in page.sections["reads"]


def test_a_study_without_an_epoch_has_a_page(tmp_path):
    folder = write_study(tmp_path / "birds", stages=0)
    (folder / "events.jsonl").unlink()
    assert set(Page(report_page(summarise(folder), [])).sections) == {"findings", "reads"}


def test_a_missing_picture_is_an_error_with_a_cure(study, made):
    summary, trials, pictures = made
    (study / "illustrations" / "map.png").unlink()
    with pytest.raises(ReportError, match=r"map\.png.*Cure: copy the whole folder"):
        report_page(summary, trials, pictures)
    (study / "illustrations" / "map.png").write_bytes(b"GIF89a" + bytes(40))
    with pytest.raises(ReportError, match=r"map\.png is no PNG"):
        report_page(summary, trials, pictures)


def test_a_study_without_pictures_has_none_to_show(study):
    (study / "illustrations" / "illustrations.json").unlink()
    assert read_illustrations(study) == []


def test_the_markdown_says_what_matters_first(made):
    text = summary_markdown(made[0])
    assert text.startswith(
        "# Study birds \\<1\\>\n\nIs \\<MIC\\> better than the margin loss alone, on birds & cars?\n\n"
    )
    assert text.index("has the best mean") < text.index("## Test results") < text.index("## Search")
    assert (
        "|  | configuration | MAP@R, test | MAP@R, ensemble | MAP@R, untrained | MAP@R, validation | R@1 |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| A | mic: margin, distance_weighted | 0.3100 ± 0.0400 | 0.3600 | 0.1000 ± 0.0100 | 0.6000 ± 0.0400 | "
        "0.6500 ± 0.0300 |\n"
        "| B | margin, distance_weighted | 0.3200 ± 0.0400 | – | 0.1000 ± 0.0100 | 0.6000 ± 0.0400 | "
        "0.6500 ± 0.0300 |\n"
    ) in text
    assert (
        "| A | mic: margin, distance_weighted | `print-search-002` | search-002 | 0.6100 ± 0.0411 | 4 |\n"
        "| B | margin, distance_weighted | `print-search-000` | search-000 | 0.5200 ± 0.0504 | 4 |\n"
    ) in text
    assert "| 1 | search-000 | margin, distance_weighted | 0.5500 | 3 | ran to the end |\n" in text
    assert "| 4 | search-003 | contrastive | 0.1000 | 1 | crashed |\n" in text


def test_published_numbers_are_below_ours_with_their_source_and_status(made):
    text = summary_markdown(made[0])
    section = text.partition("## Published numbers: ")[2].partition("\n\n## ")[0]
    lines = section.splitlines()
    assert lines[0] == "cub200, leave one out"
    assert lines[2] == "|  | backbone | dimensions | Recall@1 | source and status |"
    assert lines[4] == (
        "| **this study**: A, mic: margin, distance_weighted | resnet50 | 128 | 0.6500 ± 0.0300 | "
        "configuration `print-search-002` |"
    )
    (mic,) = [line for line in lines if line.startswith("| MIC: ")]
    assert mic == (
        "| MIC: margin loss (this study ran it: A) | resnet50 | 128 | 0.6610 | tables of later papers, ICCV 2019; "
        "confirmed by secondary sources; chosen on test |"
    )
    (margin,) = [line for line in lines if line.startswith("| Revisiting Training Strategies: ")]
    assert "Margin (D, beta 1.2) (this study ran it: B) | resnet50 | 128 | 0.6309 (deviation 0.0046) |" in margin
    # Of 33 rows: the three of the systems that were run, and the four best, MIC's being one of both.
    assert [line.split("|")[4].strip() for line in lines[6:12]] == [
        "0.6309 (deviation 0.0046)", "0.6340", "0.6536", "0.6570", "0.6610", "0.6685",
    ]  # fmt: skip
    assert "\n\n... and 27 more in report.html\n\n" in section
    assert section.endswith("Ours was selected on validation classes.")


def test_a_long_search_is_cut_in_the_markdown(made):
    summary = {**made[0], "search": made[0]["search"] * 4}
    text = summary_markdown(summary)
    assert "## Search: 16 trials" in text
    assert "\n| 10 |" in text
    assert "\n| 11 |" not in text
    assert "... and 6 more in trials.csv" in text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("odd|name", r"odd\|name"),
        ("<script>1</script>", r"\<script\>1\</script\>"),
        ("![x](http://a.b)", r"!\[x\](http://a.b)"),
        ("a\\<b\nc", r"a\\\<b c"),
    ],
)
def test_text_of_a_study_is_only_text_in_markdown(made, text, escaped):
    summary = made[0]
    summary["search"][0]["recipe"] = text
    assert f"| {escaped} |" in summary_markdown(summary)


def rows_of(latex):
    """The rows of the tabular, as cells; raises where braces or environments do not close."""
    bare = latex.replace("\\{", "").replace("\\}", "").replace("\\\\", "\n")
    depth = 0
    for letter in bare:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0
    open_ = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", latex):
        if kind == "begin":
            open_.append(name)
        else:
            assert open_.pop() == name
    assert open_ == []
    inside = re.search(r"\\begin\{tabular\}\{(l\w*)\}(.*)\\end\{tabular\}", latex, flags=re.DOTALL)
    assert inside is not None
    rows = [row.replace("\\toprule", "").replace("\\midrule", "").replace("\\bottomrule", "").strip()
            for row in inside[2].split("\\\\")]  # fmt: skip
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)&", row)] for row in rows if row]
    assert {len(row) for row in cells} == {len(inside[1])}
    return cells


def test_the_latex_table_closes_and_holds_the_numbers(made):
    latex = final_latex(made[0])
    rows = rows_of(latex)
    assert rows[0] == ["", "MAP@R", "R@1"]
    assert rows[1] == ["mic: margin, distance\\_weighted", "31.0 $\\pm$ 4.0", "65.0 $\\pm$ 3.0"]
    assert rows[2] == ["\\quad ensemble of folds", "36.0", "--"]
    assert rows[3] == ["\\quad untrained", "10.0 $\\pm$ 1.0", "30.0 $\\pm$ 2.0"]
    assert ["MIC: margin loss$^\\ast$", "--", "66.1"] in rows
    assert latex.count("$") % 2 == 0
    assert "\\caption{Study birds \\textless{}1\\textgreater{}: MAP@R, Recall@1 on the test classes" in latex
    assert "over up to 4 runs" in latex


def test_letters_that_mean_something_to_latex_are_escaped(made):
    summary = made[0]
    summary["final"][0]["label"] = r"50% & $x_1^2$ #~{\a}"
    rows = rows_of(final_latex(summary))
    assert rows[1][0] == (r"50\% \& \$x\_1\textasciicircum{}2\$ \#\textasciitilde{}\{\textbackslash{}a\}")


@pytest.mark.parametrize(("stages", "num_rows"), [(0, 0), (1, 4), (2, 2)])
def test_before_the_test_the_table_holds_validation_numbers(tmp_path, stages, num_rows):
    latex = final_latex(summarise(write_study(tmp_path / "birds", stages=stages)))
    rows = rows_of(latex)
    assert len(rows) == 1 + num_rows
    assert "validation classes" in latex
    if stages == 2:
        assert rows[1] == ["mic: margin, distance\\_weighted", "61.0 $\\pm$ 4.1"]


def test_one_row_a_trial_with_every_parameter_and_result(made):
    summary, trials, _ = made
    rows = list(csv.DictReader(io.StringIO(trials_csv(trials, summary))))
    assert len(rows) == 12
    first = rows[0]
    assert (first["trial"], first["ended"], first["best"], first["epoch_of_best"]) == (
        "search-000", "finished", "0.55", "3",
    )  # fmt: skip
    assert first["configuration"] == "print-search-000"
    assert (first["epochs_run"], first["epochs_planned"], first["seconds"]) == ("4", "4", "40.0")
    assert float(first["best.train_loss"]) == pytest.approx(1 / 3)
    assert (first["loss.name"], first["loss.beta"], first["optimizer.learning_rate"]) == ("margin", "1.2", "0.0001")
    assert first["test.map_at_r"] == ""
    assert rows[3]["error"] == ERROR
    tested = next(row for row in rows if row["trial"] == "confirm-004")
    assert (tested["configuration"], tested["fold"], tested["seed"]) == ("print-search-002", "0", "0")
    assert float(tested["test.map_at_r"]) == pytest.approx(0.3)


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1"])
def test_a_text_is_no_formula_in_a_spreadsheet_and_a_number_stays_one(made, text):
    summary, (first, *_), _ = made
    trial = replace(first, error=text, config={**first.config, "margin": -0.5, "layers": [True, 1]})
    (row,) = csv.DictReader(io.StringIO(trials_csv([trial], summary)))
    assert (row["error"], row["margin"], row["layers"]) == (f"'{text}", "-0.5", "[true, 1]")


def test_one_row_an_epoch_with_every_metric(made):
    rows = list(csv.DictReader(io.StringIO(epochs_csv(made[1]))))
    assert len(rows) == 11 + 32
    curves = {key: [float(row[METRIC]) for row in rows if row["trial"] == key] for key in CURVES}
    assert curves == CURVES
    nmi = [(row["trial"], row["epoch"]) for row in rows if row["cluster_nmi"]]
    assert nmi == [("search-002", "1"), ("search-002", "3")]


def test_the_formats_become_files(made, tmp_path):
    written = write_report(tmp_path / "new" / "report", *made)
    names = ["report.html", "report.md", "table.tex", "trials.csv", "epochs.csv"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == sorted(names)
    only = write_report(tmp_path / "some", *made, formats=("csv", "md", "csv"))
    assert [path.name for path in only] == ["trials.csv", "epochs.csv", "report.md"]


def test_the_command_prints_the_markdown_and_writes_the_files(study, tmp_path):
    result = CliRunner().invoke(app, ["report", str(study)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(r"# Study birds \<1\>")
    assert (study / "report" / "report.html").exists()
    assert "report.html" in result.output
    some = CliRunner().invoke(app, ["report", str(study), "--out", str(tmp_path / "o"), "--format", "latex"])
    assert some.exit_code == 0, some.output
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["table.tex"]
