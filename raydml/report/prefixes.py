"""The section of the report's page about shorter embeddings: quality by bytes, where prefixes were scored."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raydml.metrics.names import metric_label, metric_name
from raydml.report.charts import NUM_SERIES, Curve, LineChart, Scale, Ticks, line_chart
from raydml.report.comparability import Values
from raydml.report.tables import FoldedTable, TableCell, table
from raydml.report.text import ScoredModels, final_models, score_text

_METRICS = ("recall_at_1", "map_at_r")
_PREFIX = re.compile(rf"dim_(\d+)_({'|'.join(_METRICS)})")
_BYTES = 4  # of a float32
_LEAST_APART = 0.08  # share of an axis below which two tick labels would overlap


class _Sizes(NamedTuple):
    """Models of one configuration. scores: metric -> number of dimensions, rising -> mean and interval."""

    models: ScoredModels
    scores: Mapping[str, Mapping[int, Values]]


def prefixes_section(summary: Values) -> Values | None:
    """Quality by the bytes of an embedding: a chart for each metric, and all values folded away."""
    sizes = [found for one in final_models(summary, ("refit", "metrics")) if (found := _sizes_of(one))]
    if not sizes:
        return None
    shown = sizes[:NUM_SERIES]
    styles = [f"series-{place}" for place in range(len(shown))]
    keys = [(style, _title(one)) for style, one in zip(styles, shown, strict=True)]
    return {
        "sentence": _sentence(sizes[0]),
        "charts": [(f"{metric_name(name)}, test", _chart(name, shown, styles)) for name in _METRICS],
        "legend": keys if len(keys) > 1 else [],
        "as_table": FoldedTable("As a table", _table(sizes)),
        "note": "The first dimensions of each embedding, brought to length 1. Bytes are those of float32 numbers; the "
        "time of an exact search falls about as they do.",
    }


def _sizes_of(one: ScoredModels) -> _Sizes | None:
    """Return what was scored of the prefixes of some models, and of their whole embedding; None where nothing was."""
    whole: int = one.row["embedding_dim"]
    scores: dict[str, dict[int, Values]] = {name: {} for name in _METRICS}
    for metric, score in one.scores.items():
        if found := _PREFIX.fullmatch(metric):
            scores[found[2]][int(found[1])] = score
    if not any(scores.values()):
        return None
    for name, by_dim in scores.items():
        if name in one.scores:
            by_dim[whole] = one.scores[name]
    return _Sizes(one, {name: dict(sorted(by_dim.items())) for name, by_dim in scores.items()})


def _title(one: _Sizes) -> str:
    return f"{one.models.row['letter']} {one.models.row['label']}, {one.models.title}"


def _sentence(one: _Sizes) -> str:
    """Return what the shortest prefix of the best models keeps."""
    by_dim = one.scores[_METRICS[0]]
    (least, short), *_, (most, whole) = by_dim.items()
    kept = f", {short['mean'] / whole['mean']:.0%} of" if whole["mean"] else ", against"
    return (
        f"{_title(one)}: with {least} of {most} dimensions ({_BYTES * least} instead of {_BYTES * most} bytes an "
        f"image) {metric_label(_METRICS[0])} is {short['mean']:.3f}{kept} the {whole['mean']:.3f} of the whole "
        "embedding."
    )


def _chart(name: str, sizes: Sequence[_Sizes], styles: Sequence[str]) -> LineChart:
    """Return curves over the logarithm of the bytes, with a dot for each length."""
    curves, places = [], set[int]()
    for one, style in zip(sizes, styles, strict=True):
        points = [(math.log2(_BYTES * dim), score["mean"]) for dim, score in one.scores[name].items()]
        curves.append(Curve(points, style, _title(one), None))
        for point, (dim, score) in zip(points, one.scores[name].items(), strict=True):
            title = f"{_title(one)}, {dim} dimensions, {_BYTES * dim} bytes: {score_text(score)}"
            curves.append(Curve([point], style, title))
            places.add(_BYTES * dim)
    drawn = line_chart(curves, x_label="bytes an image, logarithmic", y_label=metric_name(name), height_px=260)
    return drawn._replace(x_ticks=_ticks(sorted(places)))


def _ticks(sizes: Sequence[int]) -> Ticks:
    """Return the sizes in bytes that have room on a logarithmic axis from the smallest to the largest."""
    across = Scale(sizes[0], sizes[-1], is_log=True)
    ticks: Ticks = []
    for size in reversed(sizes):  # the whole embedding always has a label
        share = across.share(size)
        if not ticks or ticks[-1][0] - share >= _LEAST_APART:
            ticks.append((share, str(size)))
    return ticks[::-1]


def _table(sizes: Sequence[_Sizes]) -> Any:
    rows: list[list[object]] = [
        [
            TableCell(one.models.row["letter"], strong=True),
            one.models.title,
            dim,
            _BYTES * dim,
            *(score_text(one.scores[name].get(dim), decimals=3) for name in _METRICS),
        ]
        for one in sizes
        for dim in one.scores[_METRICS[0]]
    ]
    header = ["", "models", "dimensions", "bytes an image", *map(metric_label, _METRICS)]
    return table(header, rows, words=(0, 1), caption="Shorter embeddings, test scores")
