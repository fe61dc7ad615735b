"""The report of a study written by hand: every format read back, nothing unescaped, nothing from outside."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
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
from raydml.study import events
from raydml.study.summary import histories, summarise
from tests.report.written_study import (
    CURVES,
    ERROR,
    METRIC,
    REFITS,
    add_refits,
    config_of,
    png,
    write_published_study,
    write_study,
)

VOID = {"meta", "img", "br", "hr", "link", "input"}
SECTIONS = [
    "findings", "test", "footprint", "published", "confirmed", "settled", "curves", "choices", "importance", "cost",
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


@pytest.fixture
def refitted(study):
    add_refits(study)
    return summarise(study), histories(study), read_illustrations(study)


def csv_rows(text):
    return list(csv.DictReader(io.StringIO(text)))


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
    assert ["A", "mic: margin, distance_weighted", "fold models", "4", "0.310 ± 0.040", "0.650 ± 0.030"] in page.rows
    assert ["A", "", "ensemble of fold models", "–", "0.360", "–"] in page.rows
    assert ["B", "", "untrained network", "–", "0.100 ± 0.010", "0.300 ± 0.020"] in page.rows
    # Corrected for two folds: the standard error grows by the root of (1/4 + 1) / (1/4); p by Student's t of 3 degrees.
    assert ["A leads B", "0.090 ± 0.013", "< 0.001", "< 0.001", "0.002", "significant", "4"] in page.rows
    assert ["B leads A", "0.010 ± 0.013", "0.092", "0.092", "0.35", "not significant", "4"] in page.rows
    assert "confirm-004, fold 0, seed 0: 0.6000" in page.sections["confirmed"]
    published = [row for row in page.rows if row and row[0].startswith("MIC: margin loss")]
    assert [row[:4] for row in published] == [
        ["MIC: margin loss this study ran it: A", "0.6610", "resnet50", "128"]
    ] * 2
    # 68 rows have a float Recall@1 and are folded. Shown are those of the 4 systems that were run and the 4 best of
    # ResNet-50: HIER, ProxyNCA++, MIC (which was run) and Hyp.
    assert "All 68 published rows of cub200, leave one out" in page.sections["published"]
    beginning = next(n for n, row in enumerate(page.rows) if row[-1:] == ["source and status"])
    systems = [row[0].partition(" this study")[0] for row in page.rows[beginning + 1 : beginning + 7]]
    assert systems == [
        "Revisiting Training Strategies: Margin (D, beta 1.2)", "MIC's baselines: margin, distance-weighted",
        "Hyp", "MIC: margin loss", "ProxyNCA++: marked † there", "HIER",
    ]  # fmt: skip
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
        "|  | configuration | models | runs | MAP@R | R@1 |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| A | mic: margin, distance_weighted | fold models | 4 | 0.3100 ± 0.0400 | 0.6500 ± 0.0300 |\n"
        "| A | mic: margin, distance_weighted | ensemble of fold models | – | 0.3600 | – |\n"
        "| A | mic: margin, distance_weighted | untrained network | – | 0.1000 ± 0.0100 | 0.3000 ± 0.0200 |\n"
        "| A | mic: margin, distance_weighted | fold models, validation classes | 4 | 0.6000 ± 0.0400 | "
        "0.8000 ± 0.0300 |\n"
        "| B | margin, distance_weighted | fold models | 4 | 0.3200 ± 0.0400 | 0.6500 ± 0.0300 |\n"
    ) in text
    assert (
        "| A | mic: margin, distance_weighted | `print-search-002` | search-002 | 0.6100 ± 0.0411 | 4 |\n"
        "| B | margin, distance_weighted | `print-search-000` | search-000 | 0.5200 ± 0.0504 | 4 |\n"
    ) in text
    assert "| 1 | search-000 | margin, distance_weighted | 0.5500 | 3 | ran to the end |\n" in text
    assert "| 4 | search-003 | contrastive | 0.1000 | 1 | crashed |\n" in text


def test_published_numbers_are_below_ours_with_their_source_and_status(refitted):
    text = summary_markdown(refitted[0])
    section = text.partition("## Published numbers: ")[2].partition("\n\n## ")[0]
    lines = section.splitlines()
    assert lines[0] == "cub200, leave one out"
    assert lines[2] == "|  | backbone | dimensions | Recall@1 | source and status |"
    # The refit only: neither the 0.650 of the fold models nor B, which has no refit.
    assert [line for line in lines if "**this study**" in line] == [
        "| **this study**: refit of A, mic: margin, distance_weighted | resnet50 | 128 | 0.6720 ± 0.0110 | "
        "configuration `print-search-002` |"
    ]
    (mic,) = [line for line in lines if line.startswith("| MIC: ")]
    assert mic == (
        "| MIC: margin loss (this study ran it: A) | resnet50 | 128 | 0.6610 | tables of later papers, ICCV 2019; "
        "confirmed by secondary sources; chosen on test |"
    )
    (margin,) = [line for line in lines if line.startswith("| Revisiting Training Strategies: ")]
    assert "Margin (D, beta 1.2) (this study ran it: B) | resnet50 | 128 | 0.6309 (deviation 0.0046) |" in margin
    # Of 68 rows with a float Recall@1: three of the systems that were run, and the four best of ResNet-50.
    assert [line.split("|")[4].strip() for line in lines[5:11]] == [
        "0.6309 (deviation 0.0046)", "0.6340", "0.6550", "0.6610", "0.6900", "0.7010",
    ]  # fmt: skip
    assert "\n\n... and 62 more in report.html\n\n" in section
    assert section.endswith("Without a mark it was not selected on the test classes, and ours never is.")


def test_no_number_of_a_study_without_a_refit_stands_beside_published_ones(made):
    page, text, latex = Page(report_page(*made)), summary_markdown(made[0]), final_latex(made[0])
    remark = "No number of this study is comparable to these; the test results say why."
    assert remark in page.sections["published"]
    assert "this study:" not in page.sections["published"]
    assert "Published numbers" in page.sections["published"]
    assert "Compared with published numbers" not in page.sections["published"]
    assert "None of these numbers is comparable to published ones." in page.sections["test"]
    assert "run its search space with --recipe published" in " ".join(page.sections["test"].split())
    section = text.partition("## Published numbers: ")[2].partition("\n\n## ")[0]
    assert remark in section
    assert "**this study**" not in section
    assert "MIC" not in latex
    assert latex.count("begin{tabular}") == 1


def test_the_test_section_has_refit_and_fold_models_side_by_side(refitted):
    page = Page(report_page(*refitted))
    first, fold, ensemble, untrained = [row[1:] for row in page.rows if row and row[0] == "A" and len(row) == 6][:4]
    label = "mic: margin, distance_weighted"
    assert first == [
        label, "refit, 3 epochs comparable", "3", "0.340 ± 0.025", "0.672 ± 0.011",
    ]  # fmt: skip
    assert fold == ["", "fold models", "4", "0.310 ± 0.040", "0.650 ± 0.030"]
    assert ensemble == ["", "ensemble of fold models", "–", "0.360", "–"]
    # Of the refits: another network for each of their seeds.
    assert untrained == ["", "untrained network", "–", "0.110 ± 0.010", "0.310 ± 0.020"]
    assert "Only the refits are comparable to published numbers." in page.sections["test"]
    assert "refit-001, seed 1: 0.3500" in page.sections["test"]
    models = "refit-000, refit-001, refit-002"
    assert ["A", label, "all development classes", "3", "4, 3, 2, 3", models] in page.rows
    assert "The number of epochs was found in validation: the median of the best" in page.sections["refit"]
    assert page.sections["published"].startswith("Compared with published numbers")
    ours = [row[:4] for row in page.rows if row and row[0].startswith("this study: ")]
    assert ours == [["this study: refit of A, mic: margin, distance_weighted", "0.672 ± 0.011", "resnet50", "128"]]


def test_a_refit_on_all_classes_is_marked_and_has_no_score(tmp_path):
    folder = add_refits(write_study(tmp_path / "birds"), classes="all")
    summary, trials = summarise(folder), histories(folder)
    page = Page(report_page(summary, trials))
    (row,) = [row for row in page.rows if row and any(cell.startswith("refit on all classes") for cell in row)][:1]
    assert row[2:] == [
        "refit on all classes, 3 epochs trained on the test classes as well: never scored", "3", "–", "–",
    ]  # fmt: skip
    assert "all classes the test classes included: never scored" in [row[2] for row in page.rows if len(row) == 6]
    assert "(trained on the test classes as well: never scored) | 3 | – | – |" in summary_markdown(summary)
    latex = rows_of(final_latex(summary))
    assert latex[1][0].endswith("refit on all classes, 3 epochs (trained on the test classes as well: never scored)")
    assert latex[1][1:] == ["--", "--"]
    assert not any(row["test.map_at_r"] for row in csv_rows(trials_csv(trials, summary)) if row["stage"] == "refit")


def test_a_study_that_only_refits_has_no_empty_section(tmp_path):
    folder = write_published_study(tmp_path / "mic")
    summary, trials = summarise(folder), histories(folder)
    page = Page(report_page(summary, trials))
    assert list(page.sections) == [
        "findings", "test", "published", "refit", "curves", "cost", "parameters", "trials", "reads",
    ]  # fmt: skip
    assert "The refits are comparable to published numbers." in page.sections["test"]
    assert "fold" not in page.sections["test"]
    assert "Intervals are 95 % t intervals of the mean over seeds." in page.sections["test"]
    assert [
        "A",
        "mic: margin, distance_weighted",
        "all development classes",
        "3",
        "refit-000, refit-001, refit-002",
    ] in page.rows
    assert "The training loss of 3 refits" in page.sections["curves"]
    assert "All trials" not in page.sections["curves"]
    text = summary_markdown(summary)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Test results", "## Published numbers: cub200, leave one out",
    ]  # fmt: skip
    tested, _ = final_latex(summary).split("\\end{table}\n\n")
    assert rows_of(tested + "\\end{table}")[1][1:] == ["34.0 $\\pm$ 2.5", "67.2 $\\pm$ 1.1"]
    rows = csv_rows(trials_csv(trials, summary))
    assert [(row["trial"], row["stage"], row["seed"], row["configuration"], row["test.map_at_r"]) for row in rows] == [
        (f"refit-00{seed}", "refit", str(seed), "print-search-002", str(value)) for seed, value in REFITS.items()
    ]


def test_the_report_says_which_values_are_means_over_folds_and_who_was_pruned(tmp_path):
    folder = write_study(tmp_path / "birds", stages=1)
    study = json.loads((folder / "study.json").read_text())
    study["study"]["search"]["folds"] = 2
    (folder / "study.json").write_text(json.dumps(study))
    rows = {row["trial"]: row for row in json.loads((folder / "ranking.json").read_text())}
    rows["search-002"] |= {"value": 0.5, "num_folds": 2, "pruned": False}
    rows["search-000"] |= {"num_folds": 1, "pruned": True}
    ranked = [rows["search-002"], *(row for key, row in rows.items() if key != "search-002")]
    (folder / "ranking.json").write_text(json.dumps(ranked))
    further = {"trial": "search-002-fold-1", "stage": "search"}
    config = {**config_of("search-002", fold=1), "data": {"name": "cub200", "split": {"fold": 1}}}
    for event in (
        {"event": "trial_started", "fingerprint": "other", "configuration": "print-search-002", "config": config},
        {"event": "epoch", "epoch": 1, "metrics": {METRIC: 0.97, "train_loss": 1.0}},
        {"event": "trial_ended", "reason": "finished"},
    ):
        events.append(events.events_path(folder), {**event, **further})
    summary, trials = summarise(folder), histories(folder)
    text = summary_markdown(summary)
    assert (
        "1 configuration with a mean over 2 folds is ranked first, and the others by their value on the first" in text
    )
    assert "Of 2 that ran to their end, 1 was significantly worse than the best on the first fold" in text
    assert (
        "The best trial is search-002 (mic: margin, distance_weighted): validation MAP@R 0.5000, the mean over 2 "
        in text
    )
    assert "| 1 | search-002 | mic: margin, distance_weighted | 0.5000 | 4 | ran to the end | mean of 2 |" in text
    assert "| 2 | search-000 | margin, distance_weighted | 0.5500 | 3 | ran to the end | 1, pruned |" in text
    assert "means over 2 folds, those of one run below them, in percent" in final_latex(summary)
    # Best so far, choices and importance are of the first fold: 0.97 on another one is no better.
    assert max(summary["stability"]["best_so_far"]) == 0.55
    page = report_page(summary, trials, [])
    assert page.count("search-002-fold-1") == 1, "in the table of all trials"
    (row,) = [row for row in csv_rows(trials_csv(trials, summary)) if row["trial"] == "search-002-fold-1"]
    assert (row["stage"], row["fold"], row["configuration"]) == ("search", "1", "print-search-002")


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
    assert rows[2] == ["\\quad ensemble of fold models", "36.0", "--"]
    assert rows[3] == ["\\quad untrained network", "10.0 $\\pm$ 1.0", "30.0 $\\pm$ 2.0"]
    assert latex.count("$") % 2 == 0
    assert "\\caption{Study birds \\textless{}1\\textgreater{}: MAP@R, Recall@1 on the test classes" in latex
    assert "over up to 4 runs" in latex


def test_the_refits_and_the_published_numbers_have_a_table_of_their_own(refitted):
    latex = final_latex(refitted[0])
    tested, published = latex.split("\\end{table}\n\n")
    rows = rows_of(tested + "\\end{table}")
    assert rows[1] == ["mic: margin, distance\\_weighted, refit, 3 epochs", "34.0 $\\pm$ 2.5", "67.2 $\\pm$ 1.1"]
    assert rows[2] == ["\\quad fold models", "31.0 $\\pm$ 4.0", "65.0 $\\pm$ 3.0"]
    assert not any("MIC" in row[0] for row in rows)
    rows = rows_of(published)
    assert rows[1] == ["mic: margin, distance\\_weighted, refit", "67.2 $\\pm$ 1.1"]
    assert ["MIC: margin loss (resnet50, 128)$^\\ast$", "66.1"] in rows
    assert ["HIER (resnet50, 512)$^\\dagger$", "70.1"] in rows
    assert not any("65.0" in row[1] for row in rows)
    assert "beside published numbers of cub200, leave one out, in percent; $^\\ast$: epoch chosen on the" in published
    assert latex.count("$") % 2 == 0


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


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\n=1"])
def test_a_text_is_no_formula_in_a_spreadsheet_and_a_number_stays_one(made, text):
    summary, (first, *_), _ = made
    trial = replace(first, error=text, config={**first.config, "margin": -0.5, "layers": [True, 1]})
    (row,) = csv.DictReader(io.StringIO(trials_csv([trial], summary)))
    assert (row["error"], row["margin"], row["layers"]) == (f"'{text}", "-0.5", "[true, 1]")


def test_a_carriage_return_in_a_text_begins_no_row(made):
    summary, (first, *_), _ = made
    for error, written in (
        ("a\r=1+1", "a\n=1+1"),
        ("\r=1", "'\n=1"),
        ("a\r\n@b", "a\n@b"),
        ("a\udce9\ud800", "a\\udce9\\ud800"),
    ):
        (row,) = csv.DictReader(io.StringIO(trials_csv([replace(first, error=error)], summary)))
        assert row["error"] == written
        assert row["trial"] == first.trial


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
