"""Which runs of a study are worth pictures: the winner, the runner-up, and the best of every other method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydml.study.folder import newest_checkpoint, read_json, read_records
from raydml.study.results import find_winner


def illustrated_runs(folder: Path) -> dict[str, Path]:
    """Key -> checkpoint folder, the winner first; what ``illustrate`` takes.

    Of each further configuration it is the best run on the winner's fold, so that both validate on the same classes. A
    configuration is among them if it is the second best, or the best of its method. Runs without an intact checkpoint
    (only the best keep theirs) are left out. Raises StudyError while there is no winner.
    """
    winner = find_winner(folder)
    chosen = {winner.trial: winner.checkpoint}
    records = read_records(folder, "search")
    seen: set[str] = set()
    for place, (from_trial, runs) in enumerate(_configurations(folder, winner.trial)):
        method = str((records[from_trial].config.get("method") or {}).get("name", "plain"))
        if place < 2 or method not in seen:
            stage = "confirm" if (folder / "confirmed.json").exists() else "search"
            found = ((run["trial"], newest_checkpoint(folder, stage, run["trial"])) for run in runs)
            key, path = next(((key, path) for key, path in found if path is not None), ("", None))
            if path is not None:
                chosen.setdefault(key, path)
                seen.add(method)
    return chosen


def _configurations(folder: Path, winner: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Best first: the searched trial that a configuration comes from, and its runs on the winner's fold, best first."""
    if not (folder / "confirmed.json").exists():
        ranked = [row for row in read_json(folder / "ranking.json") if row["value"] is not None]
        return [(row["trial"], [row]) for row in ranked]
    confirmed = read_json(folder / "confirmed.json")
    (fold,) = (run["fold"] for row in confirmed for run in row["runs"] if run["trial"] == winner)
    return [
        (row["from_trial"], sorted((run for run in row["runs"] if run["fold"] == fold), key=lambda run: -run["value"]))
        for row in confirmed
    ]
