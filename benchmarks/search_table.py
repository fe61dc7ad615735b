"""Trials of a search space whose every epoch is known: what benchmarks/search.py runs its simulated studies on.

    OMP_NUM_THREADS=1 python benchmarks/search_table.py grocery IMAGES --hours 0.6

Trains random trials of search_tables/NAME.yaml to their last epoch, one after the other on one thread, and then some of
them again with another seed, until all are done or the time is up; goes on where search_tables/NAME.json ends. IMAGES:
a folder with one folder a class.

The file has for each trial its point (the address of each domain and what was picked there), the loss, validation
MAP@R of each epoch, and the processor time of an epoch in seconds (mean, with validation). A trial that collapsed or
diverged has a shorter curve.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raydml.config.trial import Trial, parse_machine, parse_trial
from raydml.ops.files import write_whole
from raydml.search_space.domains import Address, random_pick, resolve
from raydml.search_space.points import Point, Value, read_point, recording, written_point
from raydml.search_space.space import SearchSpace, load_space

FOLDER = Path(__file__).parent / "search_tables"
METRIC = "val_map_at_r"
NUM_REPEATED = 10


@dataclass(frozen=True)
class Row:
    """One trial of the table. curve: the metric of each epoch. seed: 0; another for the repetition of a trial."""

    index: int
    point: Point
    loss: str
    curve: tuple[float, ...]
    epoch_s: float
    ended: str
    seed: int = 0


def space_of(name: str, images: Path | None = None) -> SearchSpace:
    """Return the space of a table. images: their folder, where trials shall run."""
    return load_space(FOLDER / f"{name}.yaml", [f"machine.data_root={images or FOLDER}"])


def read_table(name: str) -> list[Row]:
    """Return the trials of a table."""
    rows = json.loads((FOLDER / f"{name}.json").read_text())
    return [Row(**{**row, "point": read_point(row["point"]), "curve": tuple(row["curve"])}) for row in rows]


def write_table(name: str, rows: list[Row]) -> None:
    """Write one line for each trial."""
    lines = [json.dumps({**asdict(row), "point": written_point(row.point)}) for row in rows]
    write_whole(FOLDER / f"{name}.json", "[\n" + ",\n".join(lines) + "\n]\n")


def train(index: int, point: Point, trial: Trial, images: Path, cache: Path) -> Row:
    """Train one trial to its end."""
    from raydml.training.trainer import Trainer

    machine = parse_machine({"data_root": str(images), "cache_dir": str(cache), "cpus_per_trial": 1})
    trainer = Trainer(trial, machine, device="cpu")
    begin_s, curve = time.process_time(), []
    result: dict[str, Any] = {}
    for result in trainer.epochs():
        curve.append(round(result.get(METRIC, 0.0), 5))
    epoch_s = (time.process_time() - begin_s) / len(curve)
    return Row(index, point, trial.loss.name, tuple(curve), round(epoch_s, 3), result["ended"], trial.seed)


def main() -> None:
    """Train the trials that the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in FOLDER.glob("*.yaml")))
    parser.add_argument("images", type=Path)
    parser.add_argument("--trials", type=int, help="without the repetitions; default: as many as the space names")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "raydml")
    arguments = parser.parse_args()
    space = space_of(arguments.name, arguments.images)
    rows = read_table(arguments.name) if (FOLDER / f"{arguments.name}.json").exists() else []
    end_s = time.monotonic() + 3600 * arguments.hours
    runs = [
        *((index, 0) for index in range(arguments.trials or space.study.search.num_trials)),
        *((index, 1) for index in range(NUM_REPEATED)),
    ]
    done = {(row.index, row.seed) for row in rows}
    for index, seed in runs:
        if time.monotonic() > end_s:
            break
        if (index, seed) in done:
            continue
        point: dict[Address, Value] = {}
        configuration, _ = resolve(space.trial, recording(random_pick(space.study.seed, index, 0, {}), point))
        trial = parse_trial({**configuration, "seed": seed})
        rows.append(train(index, point, trial, arguments.images, arguments.cache))
        write_table(arguments.name, rows)
        row = rows[-1]
        print(f"{index:3d} {row.loss:20} {max(row.curve):.4f} {row.epoch_s:6.2f} s an epoch  {row.ended}", flush=True)


if __name__ == "__main__":
    main()
