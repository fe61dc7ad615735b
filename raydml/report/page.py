"""The report of a study as files: a page, Markdown, a LaTeX table, and two CSV files with all numbers.

The page needs no network, no other file and no script to be read. Its structure is in page.html, sections.html and
charts.html beside this module, which escape everything that comes from a study: class names, recipes, errors.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jinja2
import markupsafe
import yaml

from raydml.analysis.trials import ENDINGS, TrialState, searched_trials
from raydml.ops.files import write_whole
from raydml.ops.wording import counted
from raydml.report.footprints import footprint_section
from raydml.report.prefixes import prefixes_section
from raydml.report.sections import (
    choices_section,
    confirmed_section,
    cost_section,
    curves_section,
    final_section,
    findings_section,
    importance_section,
    published_section,
    refit_section,
    settled_section,
)
from raydml.report.tables import FoldedTable, epochs_csv, final_latex, table, trials_csv
from raydml.report.text import summary_markdown

FORMATS = ("html", "md", "latex", "csv")
#: Key -> title of the sections of pictures, in order of display.
PICTURE_SECTIONS = {
    "retrievals": "Sample retrievals",
    "changed": "What changed between two runs",
    "classes": "Hardest classes",
    "labels": "Labels that may be wrong",
    "map": "A map of the embedding",
    "clusters": "Clusters",
}
_WIDE_PX = 1000  # a picture of this width or more takes the whole width of the page
_MAX_OPEN_ROWS = 12  # a longer table is folded
_PNG = b"\x89PNG\r\n\x1a\n"
_CURE = "Cure: copy the whole folder {} of the study, or delete it and report without pictures"


class ReportError(ValueError):
    """A report that cannot be made, with the cure."""


class Illustration(NamedTuple):
    """A PNG with its caption. trial: key of the trial that it shows, None for the study as a whole."""

    section: str
    title: str
    caption: str
    trial: str | None
    path: Path

    def png(self) -> bytes:
        """Read the file. Raises ReportError for one that is missing or no PNG."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ReportError(f"{self.path}: {error}. {_CURE.format(self.path.parent)}") from error
        if not content.startswith(_PNG) or len(content) < 24:
            raise ReportError(f"{self.path} is no PNG. {_CURE.format(self.path.parent)}")
        return content


class PageSection(NamedTuple):
    """One section. key: its anchor in the page. macro: of sections.html. content: the argument of that macro."""

    key: str
    title: str
    macro: str
    content: Any


def read_illustrations(folder: Path) -> list[Illustration]:
    """Return the pictures that ``illustrations.json`` of a study's folder lists, in order of display."""
    index = folder / "illustrations" / "illustrations.json"
    if not index.exists():
        return []
    try:
        return [_illustration(entry, index.parent) for entry in json.loads(index.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ReportError(f"{index} is damaged ({type(error).__name__}). {_CURE.format(index.parent)}") from error


def _illustration(entry: Mapping[str, Any], folder: Path) -> Illustration:
    """Return a picture that illustrations.json lists. Raises KeyError, TypeError, ValueError for a damaged entry."""
    texts = [entry[name] for name in ("section", "title", "caption", "file")]
    if not all(isinstance(text, str) for text in (*texts, entry["trial"] or "")):
        raise TypeError("an entry holds texts")
    section, title, caption, file = texts
    if PurePosixPath(file).name != file:  # beside the index, nowhere else
        raise ValueError(file)
    return Illustration(section, title, caption, entry["trial"], folder / file)


def write_report(
    out: Path,
    summary: Mapping[str, Any],
    trials: Sequence[TrialState],
    illustrations: Sequence[Illustration] = (),
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write the files of these formats into a folder, which is made; return them in order of the formats.

    html: report.html; md: report.md; latex: table.tex; csv: trials.csv and epochs.csv. Files that exist are replaced.
    summary, trials: see `study/summary.py`.

    Raises ReportError for a picture that is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    makers = {
        "html": {"report.html": lambda: report_page(summary, trials, illustrations)},
        "md": {"report.md": lambda: summary_markdown(summary)},
        "latex": {"table.tex": lambda: final_latex(summary)},
        "csv": {"trials.csv": lambda: trials_csv(trials, summary), "epochs.csv": lambda: epochs_csv(trials)},
    }
    return [write_whole(out / name, make()) for kind in dict.fromkeys(formats) for name, make in makers[kind].items()]


def report_page(
    summary: Mapping[str, Any], trials: Sequence[TrialState], illustrations: Sequence[Illustration] = ()
) -> str:
    """Return the whole page with its pictures embedded.

    Raises ReportError for a picture that is missing.
    """
    sections = _sections(summary, trials, illustrations)
    page = templates().get_template("page.html")
    return page.render(study=summary["study"], created=summary["created"], sections=sections)


@functools.cache
def templates() -> jinja2.Environment:
    """Return the environment of the page's templates: values are escaped, unknown names are errors."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["with_code"] = _with_code
    environment.filters["percent"] = lambda share: f"{100 * share:.3f}%"
    return environment


def _with_code(text: str) -> markupsafe.Markup:
    """Return escaped text in which what is between backticks is code."""
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def _sections(
    summary: Mapping[str, Any], trials: Sequence[TrialState], illustrations: Sequence[Illustration]
) -> list[PageSection]:
    """Return the sections that have content, in the order of the page."""
    searched = searched_trials(trials)
    published = published_section(summary)
    beside = "Compared with published numbers" if published and published["has_ours"] else "Published numbers"
    made: list[tuple[str, str, str, Any]] = [
        ("findings", "Findings", "findings", findings_section(summary)),
        ("test", "Test results", "final", final_section(summary)),
        ("footprint", "Quality and inference cost", "footprint", footprint_section(summary)),
        ("prefixes", "Shorter embeddings", "prefixes", prefixes_section(summary)),
        ("published", beside, "published", published),
        ("refit", "Refit", "refit", refit_section(summary)),
        ("confirmed", "Confirmed over folds and seeds", "confirmed", confirmed_section(summary)),
        ("settled", "Did the search converge?", "settled", settled_section(summary, searched)),
        ("curves", "Learning curves", "curves", curves_section(summary, trials)),
        ("choices", "Results by choice", "choices", choices_section(searched)),
        ("importance", "Hyperparameter importance", "importance", importance_section(summary, searched)),
        ("cost", "Cost", "cost", cost_section(summary["cost"])),
    ]
    for key, title in PICTURE_SECTIONS.items():
        made.append((key, title, "gallery", [_picture(one) for one in illustrations if one.section == key]))
    made += [
        ("parameters", "All parameters", "parameters", _parameters(summary, trials)),
        ("trials", "All trials", "trials", _endings(trials)),
        ("reads", "Test-set access log", "reads", _reads(summary["test_reads"])),
    ]
    return [PageSection(*section) for section in made if section[-1]]


def _picture(picture: Illustration) -> Mapping[str, Any]:
    png = picture.png()
    width_px, height_px = struct.unpack(">II", png[16:24])  # of its header
    is_named = picture.trial is None or picture.trial in picture.title
    return {
        "base64": base64.b64encode(png).decode("ascii"),
        "alt": picture.title,
        "title": picture.title if is_named else f"{picture.title} ({picture.trial})",
        "caption": picture.caption,
        "width_px": width_px,
        "height_px": height_px,
        "is_wide": width_px >= _WIDE_PX,
    }


def _parameters(summary: Mapping[str, Any], trials: Sequence[TrialState]) -> list[tuple[str, str]]:
    """Return (title, YAML) of the confirmed configurations or, before there are any, of the best searched trial."""
    configs = {trial.trial: trial.config for trial in trials}
    rows = [(f"{row['letter']}  {row['label']}", row["from_trial"]) for row in summary["confirm"]]
    rows = rows or [(f"{row['letter']}  {row['label']}", row["runs"][0]["trial"]) for row in summary["refit"]]
    rows = rows or [(f"{row['trial']}  {row['recipe']}", row["trial"]) for row in summary["search"][:1]]
    return [
        (
            title if key in title else f"{title}, from {key}",
            yaml.safe_dump(configs[key], sort_keys=False, allow_unicode=True),
        )
        for title, key in rows
    ]


def _endings(trials: Sequence[TrialState]) -> FoldedTable | None:
    if not trials:
        return None
    rows = [
        [trial.trial, trial.recipe, ENDINGS.get(trial.ended, trial.ended) + (f": {trial.error}" if trial.error else ""),
         f"{trial.num_epochs}/{trial.num_planned_epochs}", None if trial.best is None else f"{trial.best:.4f}",
         trial.epoch_of_best, f"{sum(metrics.get('epoch_s', 0.0) for metrics in trial.epochs.values()):.0f}",
         trial.fold, trial.seed]
        for trial in trials
    ]  # fmt: skip
    header = ["trial", "recipe", "ended", "epochs", "best", "at epoch", "seconds", "fold", "seed"]
    shown = table(header, rows, words=(0, 1, 2), caption="All trials")
    return FoldedTable(counted(len(rows), "trial") if len(rows) > _MAX_OPEN_ROWS else "", shown)


def _reads(reads: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if not reads:
        return {"sentence": "The test classes have not been read.", "table": None}
    rows = [
        [read.get("time"), read.get("purpose", f"damaged line: {read.get('damaged')}"), read.get("host"),
         _short_path(read.get("checkpoint")), read.get("commit")]
        for read in reads
    ]  # fmt: skip
    purposes = dict.fromkeys(str(row[1]) for row in rows)
    counts = ", ".join(f"{sum(row[1] == purpose for row in rows)} for {purpose}" for purpose in purposes)
    hosts = ", ".join(dict.fromkeys(str(row[2]) for row in rows if row[2]))
    sentence = f"{counted(len(reads), 'read')}: {counts}; on {hosts or 'an unknown host'}. "
    sentence += "Each read was recorded before the images were opened."
    header = ["time", "purpose", "host", "checkpoint", "commit"]
    shown = table(header, rows, words=range(len(header)), caption="Test-set access log")
    return {"sentence": sentence, "table": FoldedTable("All reads" if len(rows) > _MAX_OPEN_ROWS else "", shown)}


def _short_path(checkpoint: object) -> str | None:
    """Return the trial's folder and the checkpoint's own; the folders above them are the same for all."""
    return None if checkpoint is None else "/".join(PurePosixPath(str(checkpoint)).parts[-2:])
