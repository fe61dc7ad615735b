"""What a study would do, without doing it: ``--dry-run``."""

from __future__ import annotations

from typing import Any

from raydml.config.recipe import flatten
from raydml.config.trial import fingerprint
from raydml.search_space.space import Space
from raydml.study.folder import described_trials, make_splits
from raydml.training.trial_images import Catalogs


def dry_run(space: Space) -> dict[str, Any]:
    """What a study would do: stages with their number of trials and epochs, resources of a trial, and each sampled
    configuration with its fingerprint and the settings in which the configurations differ."""
    catalogs = Catalogs(space.machine)
    trials = described_trials(space, catalogs)
    make_splits(space.study, catalogs, trials)  # what a run would refuse, a dry run refuses
    epochs = max(trial.epochs for trial in trials)
    study, stages = space.study, [{"stage": "search", "num_trials": len(trials), "epochs": epochs}]
    if study.confirm is not None:
        runs = min(study.confirm.top, len(trials)) * study.confirm.folds * study.confirm.seeds
        stages.append({"stage": "confirm", "num_trials": runs, "epochs": epochs})
    if study.finalize is not None:
        tested = study.finalize.top
        if study.confirm is not None:
            tested = min(tested, study.confirm.top) * study.confirm.folds * study.confirm.seeds
        stages.append({"stage": "finalize", "num_trials": tested, "epochs": 0})
    flat = [flatten(trial.model_dump(mode="json")) for trial in trials]
    varying = sorted({name for row in flat for name in row if any(other.get(name) != row[name] for other in flat)})
    return {
        "study": study.model_dump(mode="json"),
        "stages": stages,
        "resources": {
            "cpus_per_trial": space.machine.cpus_per_trial,
            "gpus_per_trial": space.machine.gpus_per_trial,
            "max_concurrent": study.search.max_concurrent,
        },
        "trials": [
            {
                "trial": f"search-{index:03d}",
                "fingerprint": fingerprint(trial),
                "settings": {name: row[name] for name in varying if name in row},
            }
            for index, (trial, row) in enumerate(zip(trials, flat, strict=True))
        ],
    }
