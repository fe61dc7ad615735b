"""Sections of the report that show rather than count: pictures, parameters, how trials ended, reads of the test."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from raydml.analysis.trials import ENDINGS, TrialState
from raydml.report.embedded_pictures import Illustration, size_px
from raydml.report.markup import Markup, element, folded, joined, paragraph, table
from raydml.report.section import Section
from raydml.report.words import counted

#: Sections of pictures, in the order of the page.
PICTURE_SECTIONS = {
    "retrievals": "Sample retrievals",
    "changed": "What changed between two runs",
    "classes": "Classes that fail",
    "map": "A map of the embedding",
    "clusters": "Clusters",
}
_WIDE_PX = 1000  # a picture from this width on has the whole page's width
_FEW_READS = 12


def record_sections(
    summary: Mapping[str, Any], trials: Sequence[TrialState], pictures: Sequence[Illustration]
) -> list[Section]:
    shown = [
        Section(key, title, _gallery([picture for picture in pictures if picture.section == key]))
        for key, title in PICTURE_SECTIONS.items()
    ]
    return [
        *shown,
        Section("parameters", "All parameters", _parameters(summary, trials)),
        Section("trials", "How every trial ended", _endings(trials)),
        Section("reads", "Who read the test classes", _reads(summary["test_reads"])),
    ]


def _gallery(pictures: Sequence[Illustration]) -> Markup:
    if not pictures:
        return Markup()
    return element("div", *(_figure(picture) for picture in pictures), class_="gallery")


def _figure(picture: Illustration) -> Markup:
    png = picture.png()
    width_px, height_px = size_px(png)
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    image = element("img", src=source, alt=picture.title, width=width_px, height=height_px, loading="lazy")
    named = (
        f"{picture.title} ({picture.trial})" if picture.trial and picture.trial not in picture.title else picture.title
    )
    caption = element("figcaption", element("b", f"{named}."), " ", picture.caption)
    return element("figure", image, caption, class_="wide" if width_px >= _WIDE_PX else None)


def _parameters(summary: Mapping[str, Any], trials: Sequence[TrialState]) -> Markup:
    """The confirmed configurations as YAML, without a confirmation the best trial of the search."""
    configs = {trial.trial: trial.config for trial in trials}
    rows = [(f"{row['letter']}  {row['label']}", row["from_trial"]) for row in summary["confirm"]]
    rows = rows or [(f"{row['trial']}  {row['recipe']}", row["trial"]) for row in summary["search"][:1]]
    blocks = [
        folded(f"{title}, from {key}" if key not in title else title,
               element("pre", yaml.safe_dump(_plain(configs[key]), sort_keys=False, allow_unicode=True)))
        for title, key in rows
    ]  # fmt: skip
    if not blocks:
        return Markup()
    note = "As they can stand below `trial:` in a search space. trials.csv has those of every trial."
    return joined(paragraph(note.replace("`", ""), class_="muted"), *blocks)


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML knows them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _endings(trials: Sequence[TrialState]) -> Markup:
    if not trials:
        return Markup()
    rows = [
        [trial.trial, trial.recipe, ENDINGS.get(trial.ended, trial.ended) + (f": {trial.error}" if trial.error else ""),
         f"{trial.num_epochs}/{trial.num_planned_epochs}", None if trial.best is None else f"{trial.best:.4f}",
         trial.epoch_of_best, f"{sum(metrics.get('epoch_s', 0.0) for metrics in trial.epochs.values()):.0f}",
         trial.fold, trial.seed]
        for trial in trials
    ]  # fmt: skip
    header = ["trial", "recipe", "ended", "epochs", "best", "at epoch", "seconds", "fold", "seed"]
    shown = table(header, rows, words=(0, 1, 2), caption="Every trial of the search and of the confirmation")
    return shown if len(rows) <= _FEW_READS else folded(counted(len(rows), "trial"), shown)


def _reads(reads: Sequence[Mapping[str, Any]]) -> Markup:
    if not reads:
        return paragraph("The test classes have not been read.")
    rows = [
        [read.get("time"), read.get("purpose", f"damaged line: {read.get('damaged')}"), read.get("host"),
         _short(read.get("checkpoint")), read.get("commit")]
        for read in reads
    ]  # fmt: skip
    purposes = dict.fromkeys(str(row[1]) for row in rows)
    told = ", ".join(f"{sum(row[1] == purpose for row in rows)} for {purpose}" for purpose in purposes)
    hosts = ", ".join(dict.fromkeys(str(row[2]) for row in rows if row[2]))
    words = f"{counted(len(reads), 'read')}: {told}; on {hosts or 'an unknown host'}. "
    words += "Each was written down before the images were opened."
    header = ["time", "purpose", "host", "checkpoint", "commit"]
    shown = table(header, rows, words=range(len(header)), caption="Reads of the test classes")
    return joined(paragraph(words), shown if len(rows) <= _FEW_READS else folded("All reads", shown))


def _short(checkpoint: object) -> str | None:
    """The trial and the checkpoint's own folder: what is above them is the same for all."""
    return None if checkpoint is None else "/".join(PurePosixPath(str(checkpoint)).parts[-2:])
