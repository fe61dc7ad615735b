"""Try damaged inputs at the doors of raydml, and print what came of them.

    python -m tests.fuzz --inputs 100000 [--seed N] [DOOR ...]

Prints for each door the inputs, those accepted, refused by an error of raydml and ended by another error, the time of
the processor, and the slowest input. Inputs that ended in another error are kept in the folder ``--keep``. Exit code 1
where there are any.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.fuzz.doors import DOORS
from tests.fuzz.harness import fuzz, scratch_folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("doors", nargs="*", metavar="DOOR", help=f"one of {', '.join(DOORS)}; default: all")
    parser.add_argument("--inputs", type=int, default=2000, metavar="N", help="inputs at each door; default: 2000")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="input i of a seed is always the same")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to keep inputs that end in a foreign error")
    given = parser.parse_args()
    if unknown := [name for name in given.doors if name not in DOORS]:
        parser.error(f"no door {', '.join(unknown)}; there are {', '.join(DOORS)}")
    print(f"seed {given.seed}")
    header = ("door", "inputs", "accepted", "own errors", "foreign", "CPU s", "slowest s")
    print("{:20}{:>9}{:>10}{:>12}{:>9}{:>9}{:>11}".format(*header), flush=True)
    num_foreign = 0
    for name in given.doors or DOORS:
        with scratch_folder() as folder:
            outcome = fuzz(DOORS[name](Path(folder)), given.inputs, given.seed)
        counts = f"{outcome.num_inputs:9}{outcome.num_accepted:10}{outcome.num_refused:12}{outcome.num_foreign:9}"
        print(f"{name:20}{counts}{outcome.seconds:9.1f}{outcome.slowest_s:11.3f}", flush=True)
        for number, (kind, count) in enumerate(outcome.foreign.most_common()):
            print(f"    {count} x {kind}: {outcome.messages[kind]!r}", flush=True)
            if given.keep is not None:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"{name}-{number}").write_bytes(outcome.examples[kind])
        num_foreign += outcome.num_foreign
    return 1 if num_foreign else 0


if __name__ == "__main__":
    raise SystemExit(main())
