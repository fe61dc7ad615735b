"""Events of a study written by hand, as the driver writes them."""


def started(number, *, loss="margin", miner="distance_weighted", epochs=9, stage="search", fold=None, seed=0):
    return {
        "event": "trial_started",
        "trial": f"{stage}-{number:03d}",
        "stage": stage,
        "fingerprint": "0123456789ab",
        "config": {
            "seed": seed,
            "epochs": epochs,
            "data": {"split": {"fold": fold}},
            "loss": {"name": loss},
            "miner": {"name": miner} if miner else None,
            "model": {"embedding_dim": 64},
            "optimizer": {"name": "adamw", "learning_rate": 3.14e-4},
        },
    }


def epoch(number, epoch, value, *, stage="search", metric="val_map_at_r"):
    metrics = {metric: value, "train_loss": 1.0}
    return {"event": "epoch", "trial": f"{stage}-{number:03d}", "stage": stage, "epoch": epoch, "metrics": metrics}


def ended(number, reason, *, error=None, stage="search"):
    return {"event": "trial_ended", "trial": f"{stage}-{number:03d}", "stage": stage, "reason": reason, "error": error}


def study_started(select_on="val_map_at_r"):
    return {
        "event": "study_started",
        "study": "digits",
        "config": {"name": "digits", "select_on": select_on},
        "dataset": "digits",
        "splits": {"search": {part: {"classes": number} for part, number in (("train", 3), ("val", 2), ("test", 5))}},
        "planned": [
            {"stage": "search", "num_trials": 3, "max_epochs": 9},
            {"stage": "confirm", "num_trials": 4, "max_epochs": 9},
            {"stage": "finalize", "num_trials": 2, "max_epochs": 0},
        ],
    }


def stage_started(num_trials, max_epochs=9, stage="search"):
    return {"event": "stage_started", "stage": stage, "num_trials": num_trials, "max_epochs": max_epochs}
