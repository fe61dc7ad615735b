"""Quality beside inference cost: a table of the final configurations, and their Pareto front for each kind of cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydml.analysis.pareto import pareto_front
from raydml.inference.footprint import MEASURES, measure_text
from raydml.metrics.names import metric_label, metric_name
from raydml.ops.wording import counted
from raydml.report.charts import ScatterChart, ScatterPoint, scatter_chart
from raydml.report.tables import TableCell, table
from raydml.report.text import ScoredModels, final_models, footprint_rows, main_metrics, score_text

Values = Mapping[str, Any]


def footprint_section(summary: Values) -> Values | None:
    """The footprint of each final configuration, and a chart for each measure in which they differ.

    None for a study whose networks were not measured.
    """
    rows = footprint_rows(summary)
    if not rows:
        return None
    shown = _shown_models(summary)
    name = next(iter(main_metrics(summary)), "")
    scores = {one.row["letter"]: score_text(one.scores.get(name), 3) for one in shown}
    header = ["", "configuration", "backbone", "dimensions", *([metric_label(name)] if scores else [])]
    cells = [
        [TableCell(row["letter"], strong=True), row["label"], row["backbone"], row["embedding_dim"]]
        + ([scores.get(row["letter"])] if scores else [])
        + [measure_text(name, row["footprint"][name]) for name in MEASURES]
        for row in rows
    ]
    places = dict.fromkeys(_measured_on(row["footprint"]) for row in rows)
    charts = [chart for measure in MEASURES if (chart := _chart(shown, measure, name)) is not None]
    return {
        "table": table(
            [*header, *MEASURES.values()],
            cells,
            words=(0, 1, 2),
            caption="Final configurations: quality on the test classes, and inference cost",
        ),
        "note": (
            f"Time is the network's alone, on {'; '.join(places)}: median of several batches, and of the runs of a "
            "configuration. Other work on the machine makes it longer. MACs are those of convolutions, matrix products "
            "and attention. Embeddings are counted as float32."
        ),
        "charts": charts,
        "same": _same_words(rows) if len(rows) > 1 else "",
    }


def _measured_on(footprint: Values) -> str:
    threads = f", {counted(footprint['threads'], 'thread')}" if footprint["threads"] else ""
    return f"{footprint['device']}{threads}, {footprint['precision']}, images of {footprint['crop_px']} px"


def _shown_models(summary: Values) -> list[ScoredModels]:
    """One kind of models for each configuration: its refits where they were scored, else its other models."""
    found: dict[str, ScoredModels] = {}
    for one in final_models(summary, ("refit", "metrics")):
        if one.scores and one.row.get("footprint"):
            found.setdefault(one.row["letter"], one)
    return list(found.values())


def _chart(shown: Sequence[ScoredModels], measure: str, metric: str) -> ScatterChart | None:
    """The configurations by one measure and the main metric; None where fewer than two differ in it."""
    known = [
        (one, one.row["footprint"][measure], one.scores[metric]["mean"])
        for one in shown
        if one.row["footprint"][measure] is not None and metric in one.scores
    ]
    if len({cost for _, cost, _ in known}) < 2:
        return None
    front = pareto_front([(cost, quality) for _, cost, quality in known])
    points = [
        ScatterPoint(
            cost,
            quality,
            one.row["letter"],
            f"{one.row['letter']} {one.row['label']}, {one.title}: {metric_name(metric)} "
            f"{score_text(one.scores[metric], 3)}, {measure_text(measure, cost)} {MEASURES[measure]}",
            number in front,
        )
        for number, (one, cost, quality) in enumerate(known)
    ]
    return scatter_chart(points, x_label=MEASURES[measure], y_label=metric_name(metric))


def _same_words(rows: Sequence[Values]) -> str:
    same = [
        f"{measure_text(name, rows[0]['footprint'][name])} {title}"
        for name, title in MEASURES.items()
        if len({row["footprint"][name] for row in rows}) == 1 and rows[0]["footprint"][name] is not None
    ]
    return f"All have the same number of: {', '.join(same)}." if same else ""
