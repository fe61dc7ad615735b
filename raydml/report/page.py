"""The report of a study as one HTML page that needs no network, no other file and no script to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydml.analysis.trials import TrialState
from raydml.report.embedded_pictures import Illustration
from raydml.report.markup import Markup, element, joined
from raydml.report.records import record_sections
from raydml.report.results import result_sections
from raydml.report.search import search_sections

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")  # sorts a table by a click on a heading; nothing depends on it
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def report_page(summary: Mapping[str, Any], trials: Sequence[TrialState], pictures: Sequence[Illustration] = ()) -> str:
    """The whole page. summary, trials: as `study_summary.py` gives them; pictures are embedded.

    Whatever comes from the study (names of classes, recipes, errors) is escaped; see `markup.py`.

    Raises ReportError for a picture that is not there.
    """
    sections = [
        section
        for section in (
            *result_sections(summary),
            *search_sections(summary, trials),
            *record_sections(summary, trials, pictures),
        )
        if section.content
    ]
    head = joined(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", f"{summary['study']}: report"),
        element("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    links = element("nav", *(element("a", one.title, href=f"#{one.key}") for one in sections), aria_label="sections")
    made = f"Study of {summary['created']}. "
    body = joined(
        element("header", element("h1", summary["study"]), links),
        element("main", *(section.markup() for section in sections)),
        element("footer", made, "The same numbers: report.md, table.tex, trials.csv, epochs.csv beside this file."),
        element("script", Markup(_SCRIPT.read_text(encoding="utf-8"))),
    )
    page = element("html", element("head", head), element("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"
