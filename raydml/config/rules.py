"""What must fit together: rules between the sections of a trial, each with the values and a cure.

Each rule names the sections it reads and is asked only where those are valid by themselves, so that one wrong section
does not hide what is wrong between the others. A hyperparameter that would have no effect is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raydml.config.image_rules import IMAGE_RULES
from raydml.config.plugin_rules import PLUGIN_RULES, Rule
from raydml.errors import Problem


def problems_of(sections: Mapping[str, Any]) -> list[Problem]:
    """All that does not fit together among the given sections of a trial (key -> valid value)."""
    return [
        problem
        for names, rule in _RULES
        if all(name in sections for name in names)
        for problem in rule(*(sections[name] for name in names))
    ]


def problems_of_stages(sections: Mapping[str, Any]) -> list[Problem]:
    """A stage cannot take more configurations than the stage before it hands over."""
    problems = []
    confirm, finalize, search = sections.get("confirm"), sections.get("finalize"), sections.get("search")
    if finalize is not None:
        limit, setting = (
            (confirm.top, "confirm.top") if confirm else (sections.get("keep_checkpoints"), "keep_checkpoints")
        )
        if limit is not None and finalize.top > limit:
            message = f"is more than {setting}: {limit} configuration(s) are left to test"
            cure = f"write at most {limit}, or raise {setting}"
            problems.append(Problem("finalize.top", finalize.top, message, cure=cure))
        if confirm is None and finalize.top > 1 and sections.get("max_checkpoint_gib") is not None:
            message = "may have to test checkpoints that max_checkpoint_gib has dropped"
            cure = "write 1, add a confirm stage, or remove max_checkpoint_gib"
            problems.append(Problem("finalize.top", finalize.top, message, cure=cure))
    if search is not None and search.scheduler == "sync" and search.max_concurrent is not None:
        message = "cannot be held by scheduler sync: trials that wait at a rung count, and the others would never start"
        cure = "remove max_concurrent (machine.cpus_per_trial also limits how many run at once), or scheduler: asha"
        problems.append(Problem("search.max_concurrent", search.max_concurrent, message, cure=cure))
    return problems


def problems_of_machine(sections: Mapping[str, Any]) -> list[Problem]:
    """Shares of a GPU that Ray can hand out, and a device that they can give."""
    gpus, device = sections.get("gpus_per_trial"), sections.get("device")
    if gpus is None or gpus == "auto":
        return []
    if gpus > 1 and gpus != int(gpus):
        cure = f"write {int(gpus)}, {int(gpus) + 1}, or a share below 1 such as 0.5"
        return [Problem("gpus_per_trial", gpus, "must be a share up to 1 or a whole number", cure=cure)]
    if (device == "cuda" and gpus == 0) or (device == "cpu" and gpus > 0):
        cure = "device: auto, or gpus_per_trial: auto"
        return [Problem("gpus_per_trial", gpus, f"contradicts device: {device}", cure=cure)]
    return []


# --- epochs ----------------------------------------------------------------------------------------------------------


def _schedule_and_epochs(schedule: Any, epochs: int) -> Iterator[Problem]:
    for key, value in (
        ("warmup_epochs", schedule.warmup_epochs),
        ("new_layer_warmup_epochs", schedule.new_layer_warmup_epochs),
    ):
        if value >= epochs and value > 0:
            message = f"leaves nothing of the trial's {epochs} epochs"
            yield Problem(f"schedule.{key}", value, message, cure=f"write at most {epochs - 1}, or raise epochs")
    if schedule.new_layer_factor != 1 and schedule.new_layer_warmup_epochs == 0:
        message = "has no effect: new_layer_warmup_epochs is 0"
        cure = "remove it, or write new_layer_warmup_epochs: 1"
        yield Problem("schedule.new_layer_factor", schedule.new_layer_factor, message, cure=cure)
    if schedule.name == "step":
        milestones = list(schedule.milestones)
        if milestones != sorted(set(milestones)):
            yield Problem("schedule.milestones", milestones, "must rise", cure="write each epoch once, in order")
        if max(milestones) >= epochs:
            message = f"the last milestone has no effect in a trial of {epochs} epochs"
            cure = f"write milestones up to {epochs - 1}, or raise epochs"
            yield Problem("schedule.milestones", milestones, message, cure=cure)


def _recall_at(recall_at: tuple[int, ...]) -> Iterator[Problem]:
    if list(recall_at) != sorted(set(recall_at)):
        yield Problem("recall_at", list(recall_at), "must rise", cure="write each number once, in order")


def _select_on(recall_at: tuple[int, ...], select_on: str) -> Iterator[Problem]:
    k = select_on.removeprefix("val_recall_at_")
    if k.isdigit() and int(k) not in recall_at:
        message = f"is not measured: recall_at is [{', '.join(str(number) for number in recall_at)}]"
        yield Problem("select_on", select_on, message, cure=f"add {k} to recall_at, or select on val_map_at_r")


_RULES: tuple[Rule, ...] = (
    *PLUGIN_RULES,
    *IMAGE_RULES,
    (("schedule", "epochs"), _schedule_and_epochs),
    (("recall_at",), _recall_at),
    (("recall_at", "select_on"), _select_on),
)
