"""The report of a study as files: a page, Markdown, a LaTeX table, and two CSV files with all numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydml.analysis.trials import TrialState
from raydml.ops.files import write_whole
from raydml.report.csv_files import epochs_csv, trials_csv
from raydml.report.embedded_pictures import Illustration
from raydml.report.latex import final_latex
from raydml.report.markdown import summary_markdown
from raydml.report.page import report_page

FORMATS = ("html", "md", "latex", "csv")


def write_report(
    out: Path,
    summary: Mapping[str, Any],
    trials: Sequence[TrialState],
    illustrations: Sequence[Illustration] = (),
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write the files of these formats into a folder, which is made; returns them in order of the formats.

    html: report.html; md: report.md; latex: table.tex; csv: trials.csv and epochs.csv. What is in the folder already is
    replaced, each file at once. summary, trials: as `study_summary.py` gives them.

    Raises ReportError for a picture that is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    makers = {
        "html": {"report.html": lambda: report_page(summary, trials, illustrations)},
        "md": {"report.md": lambda: summary_markdown(summary)},
        "latex": {"table.tex": lambda: final_latex(summary)},
        "csv": {"trials.csv": lambda: trials_csv(trials, summary), "epochs.csv": lambda: epochs_csv(trials)},
    }
    return [write_whole(out / name, make()) for kind in dict.fromkeys(formats) for name, make in makers[kind].items()]
