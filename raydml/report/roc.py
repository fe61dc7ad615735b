"""The ROC curve of a verification as a file: a table, or a picture with a logarithmic axis of false accept rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raydml.metrics.verification import RocPoints
from raydml.ops.files import write_whole
from raydml.report.image_rows import BLUE, DPI, INK, PALE, WIDTH_IN

COLUMNS = ("distance", "false_accept_rate", "true_accept_rate")


def write_roc(file: Path, points: RocPoints, title: str) -> None:
    """Write the points as ``.csv`` with COLUMNS, or draw them as ``.png`` or ``.svg``."""
    if file.suffix == ".csv":
        table = pd.DataFrame(dict(zip(COLUMNS, points, strict=True)))
        write_whole(file, table.to_csv(index=False))
        return
    figure = _drawn(points, title)
    write_whole(file, lambda aside: figure.savefig(aside, format=file.suffix[1:], facecolor="white", dpi=DPI))


def _drawn(points: RocPoints, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, 0.75 * WIDTH_IN), layout="constrained")
    axes = figure.add_subplot()
    # A logarithmic axis has no 0: what is accepted before the first impostor is drawn at its left edge.
    smallest = float(points.far[points.far > 0].min(initial=1.0)) / 2
    far = [smallest, *np.maximum(points.far, smallest), 1.0]
    axes.plot(far, [0.0, *points.tar, 1.0], color=BLUE, linewidth=1.8)
    axes.set_xscale("log")
    axes.set_xlim(smallest / 1.3, 1)  # beside the axis, not under it
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("false accept rate", color=INK)
    axes.set_ylabel("true accept rate", color=INK)
    axes.set_title(title, fontsize=9.5, color=INK, parse_math=False)
    axes.grid(color=PALE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
