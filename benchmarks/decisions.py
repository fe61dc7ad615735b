"""What a decision of a search costs the driver: a proposal by each searcher, and the next trial by each scheduler.

    uv run python benchmarks/decisions.py [--num-trials 1000]

One core, no Ray. A searcher proposes the next trial when so many have ended; "ours" is the time without Optuna's own. A
scheduler has so many trials that wait at the first rung. Medians of several decisions. The target is 5 ms for ours.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

SPACE = Path(__file__).parent.parent / "search_spaces" / "image_folder.yaml"


def searchers(num_trials, num_draws, asked_for):
    """Rows of (searcher, milliseconds of a proposal, of those in Optuna)."""
    import optuna

    from raydml.config.trial import fingerprint
    from raydml.search_space.space import load_space
    from raydml.searchers._base import DrawnBefore
    from raydml.study.draws import TrialDraws

    spent = [0.0]

    def timed(function):
        def call(*arguments, **options):
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - begin

        return call

    optuna.create_study = timed(optuna.create_study)
    for owner, names in ((optuna.Study, ("ask", "add_trials")), (optuna.trial.Trial, ("suggest_float", "suggest_int",
                         "suggest_categorical"))):  # fmt: skip
        for name in names:
            setattr(owner, name, timed(getattr(owner, name)))
    optuna.trial.create_trial = timed(optuna.trial.create_trial)
    for name in asked_for:
        balance = "study.search.balance={of: loss, eliminate: true}"
        settings = [f"study.search.num_trials={num_trials + 100}", f"study.search.searcher={{name: {name}}}"]
        settings += ["machine.data_root=/images", "trial.epochs=27"]
        for options in ([], [balance]) if name == "random" else ([],):
            draws = TrialDraws(load_space(SPACE, [*settings, *options]))
            maker = TrialDraws(load_space(SPACE, [*settings[:1], *settings[2:]]))
            generator, before, taken = random.Random(0), [], set()
            for index in range(num_trials):
                drawn = maker.draw(index, before, taken)
                value = generator.random()
                before.append(DrawnBefore(drawn.point, value, 9, True, {1: value / 2, 3: value}))
                taken.add(fingerprint(drawn.trial))
            times, own = [], []
            for index in range(num_trials, num_trials + (3 if name == "gp" else num_draws)):
                spent[0] = 0.0
                begin = time.perf_counter()
                draws.draw(index, before, taken)
                took = time.perf_counter() - begin
                times.append(took)
                own.append(took - spent[0])
            yield name + (" + balance" if options else ""), statistics.median(times) * 1e3, statistics.median(own) * 1e3


def known_results(num_trials, num_draws):
    """Milliseconds that a running search takes to read the results of its trials for the next proposal."""
    from raydml.search_space.space import load_space
    from raydml.study import events
    from raydml.study.drawing import DrawnSearch
    from raydml.study.events import events_path
    from raydml.study.folder import create_study, read_study

    space = Path(__file__).parent.parent / "search_spaces" / "digits.yaml"
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"study.search.num_trials={num_trials}",
            f"study.search.searcher={{name: tpe, num_random: {num_trials - 1}}}",
        ]
        made = create_study(
            load_space(space, settings), storage=Path(folder), tracking_uri="sqlite:///x.db", space_text=""
        )
        search = DrawnSearch(made, read_study(made))
        for number in range(num_trials - 1):
            for epoch in range(1, 10):
                metrics = {"val_map_at_r": epoch / 10 + number / 1e5}
                key = f"search-{number:03d}"
                event = {"event": "epoch", "stage": "search", "trial": key, "epoch": epoch, "metrics": metrics}
                events.append(events_path(made), event, durable=False)
        search._reader.read_on()
        search._known_to(num_trials - 1)
        times = []
        for number in range(num_draws):
            key = f"search-{number:03d}"
            event = {"event": "trial_ended", "stage": "search", "trial": key, "reason": "finished", "error": None}
            events.append(events_path(made), event, durable=False)
            begin = time.perf_counter()
            search._reader.read_on()
            search._known_to(num_trials - 1)
            times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def schedulers(num_trials, num_draws):
    """Rows of (scheduler, milliseconds until it has chosen the next trial)."""
    from raydml.study.promotion import Pasha, Promotion
    from raydml.study.scheduler import Asha, SyncHalving

    keys = [f"search-{number:05d}" for number in range(num_trials)]
    rungs = {"metric": "value", "max_epochs": 27, "grace_epochs": 1, "reduction_factor": 3, "history": ()}
    made = {
        "asha": Asha(**{**rungs, "history": {}}),
        "promotion": Promotion(**rungs, keys=[*keys, "more"]),
        "pasha": Pasha(**rungs, keys=[*keys, "more"]),
        "sync": SyncHalving(**{**rungs, "history": {}}, keys=[*keys, "more"], ended=[]),
    }
    generator = random.Random(0)
    values = [generator.random() for _ in keys]
    for name, scheduler in made.items():
        controller = SimpleNamespace(search_alg=SimpleNamespace(is_finished=lambda: False), stop_trial=lambda _: None)
        times = []
        for key, value in zip(keys, values, strict=True):
            trial = SimpleNamespace(
                trial_id=key, config={"run": {"key": key}}, PENDING="PENDING", PAUSED="PAUSED", status="RUNNING"
            )
            scheduler.on_trial_add(controller, trial)
            begin = time.perf_counter()
            decision = scheduler.on_trial_result(controller, trial, {"epoch": 1, "value": value})
            if decision == "PAUSE":
                trial.status = "PAUSED"
            chosen = scheduler.choose_trial_to_run(controller)
            times.append(time.perf_counter() - begin)
            if chosen is not None:
                chosen.status = "RUNNING"
        yield name, statistics.median(times[-num_draws:]) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-trials", type=int, default=1000)
    parser.add_argument("--num-draws", type=int, default=30)
    parser.add_argument("--searchers", nargs="+", default=["random", "grid", "priors", "tpe", "gp"])
    asked = parser.parse_args()
    print(f"| at {asked.num_trials} trials | ms a decision | ours |\n|---|---|---|")
    for name, took, own in searchers(asked.num_trials, asked.num_draws, asked.searchers):
        print(f"| searcher {name} | {took:.2f} | {own:.2f} |", flush=True)
    print(f"| results of all trials | | {known_results(asked.num_trials, asked.num_draws):.2f} |", flush=True)
    for name, took in schedulers(asked.num_trials, asked.num_draws):
        print(f"| scheduler {name} | | {took:.3f} |")


if __name__ == "__main__":
    main()
