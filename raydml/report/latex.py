"""The final results of a study as a LaTeX table (booktabs), ours above, published numbers below a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydml.metrics.names import metric_label, metric_name
from raydml.report.words import counted, main_metrics, published_groups

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def final_latex(summary: Mapping[str, Any]) -> str:
    """A table environment: mean $\\pm$ 95 % interval in percent, one row a configuration; needs only booktabs.

    summary: as `study_summary.py` describes it. Before `finalize` it holds the confirmed validation numbers, before
    those the searched ones; the caption says which.
    """
    if summary["final"]:
        names = main_metrics(summary)
        body = [_final_rows(summary["final"], names), *_published_rows(summary, names)]
        about = "on the test classes, untrained networks for comparison"
    elif summary["confirm"]:
        names = [summary["metric"]]
        body = [[[_text(row["label"]), _score(row)] for row in summary["confirm"]]]
        about = "of the confirmed configurations on the validation classes"
    else:
        names = [summary["metric"]]
        body = [[[_text(f"{row['trial']}: {row['recipe']}"), _percent(row["best"])] for row in summary["search"][:10]]]
        about = "of the best trials on the validation classes, one run each"
    caption = f"Study {_text(summary['study'])}: {_text(', '.join(map(metric_name, names)))} {about}, in percent"
    if summary["final"] or summary["confirm"]:
        runs = max((row["num_runs"] for row in summary["confirm"]), default=1)
        caption += f"; mean $\\pm$ 95\\,\\% t interval over up to {counted(runs, 'run')}"
    groups = [" \\\\\n".join("    " + " & ".join(row) for row in rows) + " \\\\\n" for rows in body if rows]
    header = " & ".join(["", *(_text(metric_label(name)) for name in names)])
    return (
        "% needs \\usepackage{booktabs}\n"
        "\\begin{table}\n  \\centering\n"
        f"  \\caption{{{caption}.}}\n"
        f"  \\begin{{tabular}}{{l{'r' * len(names)}}}\n    \\toprule\n    {header} \\\\\n    \\midrule\n"
        + "    \\midrule\n".join(groups)
        + "    \\bottomrule\n  \\end{tabular}\n\\end{table}\n"
    )


def _final_rows(final: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for row in final:
        rows.append([_text(row["label"]), *(_score(row["metrics"].get(name)) for name in names)])
        if row["ensemble"]:
            rows.append([r"\quad concatenated", *(_score(row["ensemble"].get(name)) for name in names)])
        if row["untrained"]:
            rows.append([r"\quad untrained", *(_score(row["untrained"].get(name)) for name in names)])
    return rows


def _published_rows(summary: Mapping[str, Any], names: Sequence[str]) -> list[list[list[str]]]:
    return [
        [
            [
                _text(f"{entry['system']}: {entry['variant']}") + (r"$^\ast$" if entry["chosen_on_test"] else ""),
                *(_deviating(entry["metrics"].get(name)) for name in names),
            ]
            for entry in theirs
        ]
        for *_, theirs in published_groups(summary)
    ]


def _text(value: object) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in str(value).replace("\n", " "))


def _percent(value: float | None) -> str:
    return "--" if value is None else f"{100 * value:.1f}"


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] is None:
        return "--"
    half_width = score["half_width"]
    return _percent(score["mean"]) + ("" if half_width is None else f" $\\pm$ {100 * half_width:.1f}")


def _deviating(score: Mapping[str, Any] | None) -> str:
    """A published mean; its deviation over runs is no interval and stays out of a column of intervals."""
    return "--" if score is None else _percent(score["mean"])
