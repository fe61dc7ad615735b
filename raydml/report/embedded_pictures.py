"""The pictures of a study that its report shows: those that `illustrations.json` lists."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"


class ReportError(ValueError):
    """A report that cannot be made, with the cure."""


class Illustration(NamedTuple):
    """A PNG with the words below it. trial: key of the trial it shows, None for the study as a whole."""

    section: str
    title: str
    caption: str
    trial: str | None
    path: Path

    def png(self) -> bytes:
        """The file. Raises ReportError for one that is missing or no PNG."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ReportError(f"{self.path}: {error}. {_CURE.format(self.path.parent)}") from error
        if not content.startswith(_PNG) or len(content) < 24:
            raise ReportError(f"{self.path} is no PNG. {_CURE.format(self.path.parent)}")
        return content


_CURE = "Cure: copy the whole folder {} of the study, or delete it and report without pictures"


def size_px(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    width_px, height_px = struct.unpack(">II", png[16:24])
    return width_px, height_px


def read_illustrations(folder: Path) -> list[Illustration]:
    """The pictures of a study's folder, in order of display; none where none were drawn."""
    index = folder / "illustrations" / "illustrations.json"
    if not index.exists():
        return []
    return [
        Illustration(entry["section"], entry["title"], entry["caption"], entry["trial"], index.parent / entry["file"])
        for entry in json.loads(index.read_text(encoding="utf-8"))
    ]
