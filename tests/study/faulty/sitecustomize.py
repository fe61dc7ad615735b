"""Faults on order, in every Python process that has this folder on its path.

The variable FAULT_PLAN names a JSON file with a list of faults: ``what`` goes wrong, the number of the ``epoch``, the
``seed`` or the ``learning_rate`` of the trial, and how many ``times`` (for ever without it). Each fault that happens
leaves a file beside the plan, which counts it over all processes.
"""

import errno
import importlib.util
import json
import os
import sys
import time
from pathlib import Path


def happens(fault, number, plan):
    """Whether a fault is still to happen; if so, it is counted."""
    for turn in range(fault.get("times", 1000)):
        try:
            (plan.parent / f"fault-{number}-{turn}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def go_wrong(trainer, place):
    plan = Path(os.environ["FAULT_PLAN"])
    faults = json.loads(plan.read_text()) if plan.exists() else []
    for number, fault in enumerate(faults):
        known = {"learning_rate": trainer.trial.optimizer.learning_rate, "epoch": trainer.epoch + (place == "step")}
        wanted = {name: fault[name] for name in known if name in fault}
        if fault.get("place", "step") != place or any(known[name] != value for name, value in wanted.items()):
            continue
        if not happens(fault, number, plan):
            continue
        match fault["what"]:
            case "hang":
                time.sleep(10_000)
            case "no memory":
                raise MemoryError("none left")
            case "raise":
                raise RuntimeError("on order")
            case "no space":
                raise OSError(errno.ENOSPC, "No space left on device", "/full/disk")
            case "die":
                os._exit(137)


class Finder:
    """Changes the trainer when it is imported."""

    def find_spec(self, name, _path, _target=None):
        if name != "raydml.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def changed(module):
            run(module)
            step, contents = module.Trainer._step, module.Trainer.contents

            def faulty_step(self, *arguments):
                go_wrong(self, "step")
                return step(self, *arguments)

            def faulty_contents(self, snapshots):
                go_wrong(self, "save")
                return contents(self, snapshots)

            module.Trainer._step, module.Trainer.contents = faulty_step, faulty_contents

        spec.loader.exec_module = changed
        return spec


if "FAULT_PLAN" in os.environ:
    sys.meta_path.insert(0, Finder())
