"""Kill the processes of studies at random for some minutes, and compare each study with the undisturbed one.

    python -m tests.chaos --minutes 10 [--seed 1] [--faults 8] [--kinds trial driver ...] [--folder DIR]

Every third study runs on a cluster of three nodes, the others on an embedded Ray; the time between two checkpoints of a
trial is 0, 2 or 60 s. A row for each study and the sums are
printed. The exit code is 1 where a promise of docs/reliability.md was broken.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.study import ENDING, KINDS, SURVIVED, disturbed, undisturbed


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--faults", type=int, default=12, help="per study")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="raydml-chaos-"))
    print(f"seed {options.seed}, in {folder}", flush=True)
    end_s = time.monotonic() + 60 * options.minutes
    expected = undisturbed(folder / "undisturbed")
    print(f"undisturbed study: {(time.monotonic() - end_s) / 60 + options.minutes:.1f} min", flush=True)
    rows, number = [], 0
    while time.monotonic() < end_s:
        num_before = sum(sum(row["faults"].values()) for row in rows)
        study = {"faults": 0}

        def until(study=study):
            return study["faults"] >= options.faults or time.monotonic() > end_s

        def shown(text, study=study):
            study["faults"] += 1
            print(text, flush=True)

        on_cluster = number % 3 == 2
        row = disturbed(
            folder / f"{number:03d}",
            options.seed + number,
            # A cluster's nodes outlive the command, and so does the damage that only a stopped study can have.
            options.kinds,
            until,
            expected,
            on_cluster=on_cluster,
            every_s=(0, 60, 2, 0)[number % 4],
            shown=shown,
        )
        rows.append({**row, "cluster": on_cluster})
        print(json.dumps(rows[-1]), flush=True)
        print(f"{num_before + sum(row['faults'].values())} faults so far", flush=True)
        number += 1
    return summary(rows)


def summary(rows):
    """Print the sums over all studies, and return the exit code."""
    faults = sum((Counter(row["faults"]) for row in rows), Counter())
    print(f"\n{'fault':12s}{'number':>8s}")
    for kind, what in {**SURVIVED, **ENDING}.items():
        print(f"{kind:12s}{faults[kind]:8d}   {what}")
    wrong = sum(len(row["wrong"]) for row in rows)
    duplicates = sum(row["duplicates"] for row in rows)
    print(f"\n{sum(faults.values())} faults in {len(rows)} studies, {sum(row['trials'] for row in rows)} trials")
    contradictions = sum(len(row["contradictions"]) for row in rows)
    print(f"wrong numbers {wrong}, duplicate runs {duplicates}")
    print(f"epochs that were trained again with other numbers {contradictions}")
    print(f"runs unlike those of the undisturbed study: {sum(not row['runs as undisturbed'] for row in rows)} studies")
    print(f"epochs trained again {sum(row['epochs lost'] for row in rows)}, by one fault at most "
          f"{max((row['most at once'] for row in rows), default=0)}")  # fmt: skip
    return int(bool(wrong or duplicates or contradictions or not all(row["runs as undisturbed"] for row in rows)))


if __name__ == "__main__":
    sys.exit(main())
