"""The configuration: `Trial` decides the number, `Machine` does not; `StudySettings`: how many trials, which stages.

All are frozen pydantic models that refuse unknown keys and wrong types (an int will do for a float, a bool never for
a number). `parse_trial`, `parse_machine` and `parse_study` report every mistake at once as a `ConfigError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, create_model

from raydml.config.rules import problems_of, problems_of_machine, problems_of_plugins, problems_of_stages
from raydml.config.sections import (
    STRICT,
    AdamW,
    ConstantSchedule,
    Count,
    Counts,
    Data,
    Index,
    LossBlock,
    MethodBlock,
    MinerBlock,
    Model,
    NotNegative,
    Optimizer,
    OptionalPath,
    Positive,
    RegularizerBlocks,
    SamplerBlock,
    Schedule,
    SearcherBlock,
    Section,
    as_tuple,
)
from raydml.errors import ConfigError, Problem, problems_from, unknown_name

_METRIC = r"^val_(map_at_r|r_precision|recall_at_[1-9]\d*)$"


def _metric(name: str) -> str:
    if not re.fullmatch(_METRIC, name):
        choices = ("val_map_at_r", "val_r_precision", "val_recall_at_1", "val_recall_at_K")
        raise ConfigError([unknown_name("", name, choices, "a metric on the validation classes")])
    return name


class Trial(Section):
    """Everything that decides the number. Same fingerprint = same experiment on any machine.

    chunk_size: the most images whose activations the backbone keeps at a time, with the gradient of the whole batch
    (gradient caching); null: all. binary_codes: also score the signs of the embeddings (bit 1: above 0), as metrics
    named binary_... select_on: the validation metric that chooses the epoch whose weights are kept and ranks
    the trials of a study (larger is better).
    """

    rules = staticmethod(problems_of)
    later: ClassVar[Mapping[str, Any]] = {"chunk_size": None}

    seed: Index = 0
    epochs: Count = 10
    data: Data
    model: Model
    method: MethodBlock = Field(default_factory=lambda: MethodBlock(name="plain"))
    loss: LossBlock
    miner: MinerBlock | None = None
    regularizers: RegularizerBlocks = Field(default_factory=dict)
    sampler: SamplerBlock
    optimizer: Optimizer = AdamW()
    schedule: Schedule = ConstantSchedule()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    chunk_size: Count | None = None
    channels_last: bool = False
    compile: bool = False
    recall_at: Counts = (1, 2, 4, 8)
    binary_codes: bool = False
    select_on: Annotated[str, AfterValidator(_metric), Field(json_schema_extra={"pattern": _METRIC})] = "val_map_at_r"


class Machine(Section):
    """Where and with what it runs. cpus_per_trial is also the number of torch threads of a trial.

    gpus_per_trial: a share of one GPU, or several of one machine, each of which trains on its part of every batch;
    auto is one GPU, or a share of one where the first steps of a trial leave it idle. probe: on trains the first steps
    of each shape of trial before the study, for a forecast; auto does so where they decide on shares; with off, trials
    hold whole GPUs. node_labels: the labels of Ray that a node must have: a label and its value, ``!value``, or
    ``in(a,b)``.
    ranks_per_trial: the processes that train a trial together; auto is one for each of its GPUs, and one on a CPU. With
    ranks_per_trial, gpus_per_trial: auto is as many GPUs.
    cache_dir: a folder for decoded images, on a disk of the machine itself. max_cache_gib: its largest size: those that
    were used longest ago are removed, and a data set that is larger is decoded each time. system_metrics: report per
    epoch how busy the process and its GPU are; auto where the trial has a GPU. stuck_after_s: a trial that reports no
    epoch for so many seconds, and for ten times its longest epoch, is ended and tried once more. checkpoint_every_s:
    a running trial begins a checkpoint at most this often, and trains on meanwhile; a fault costs it about this time
    and an epoch. 0: after each epoch. feature_store: on keeps the features of a backbone that does not learn
    (``model.train: head``) in cache_dir, where the augmentation makes a few views of an image only.
    """

    rules = staticmethod(problems_of_machine)

    data_root: OptionalPath = None
    cache_dir: OptionalPath = None
    max_cache_gib: Positive | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_trial: Count = 1
    gpus_per_trial: Literal["auto"] | NotNegative = "auto"
    ranks_per_trial: Literal["auto"] | Count = "auto"
    probe: Literal["auto", "on", "off"] = "auto"
    node_labels: dict[str, str] = Field(default_factory=dict)
    evaluation_batch: Count = 256
    on_unreadable: Literal["refuse", "skip"] = "refuse"
    system_metrics: Literal["auto", "on", "off"] = "auto"
    stuck_after_s: Positive = 600.0
    feature_store: Literal["on", "off"] = "on"
    checkpoint_every_s: NotNegative = 60.0

    def num_gpus(self, *, are_there: bool) -> float:
        """Return how many GPUs a trial holds, at most. are_there: whether there are GPUs at all."""
        if self.gpus_per_trial != "auto":
            return float(self.gpus_per_trial)
        num_ranks = 1 if self.ranks_per_trial == "auto" else self.ranks_per_trial
        return float(num_ranks) if self.device == "cuda" or (are_there and self.device == "auto") else 0.0


class Balance(Section):
    """Fair shares of the options of a choice, such as the losses that a study compares.

    of: the key of the choice below trial. least: trials of each option before the searcher is free to choose.
    eliminate: whether options that cannot win any more get no further trials.
    """

    of: str = "loss"
    least: Annotated[int, Field(ge=3)] = 5
    eliminate: bool = True


def _as_balance(value: object) -> object:
    return {"of": value} if isinstance(value, str) else value


class SearchStage(Section):
    """Stage 1: num_trials trials; a grid is run num_trials times.

    scheduler: asha stops trials early; promotion pauses them, and lets the best go on when a slot is free; pasha does
    so, and adds a rung only while the two highest disagree; sync stops them, but decides in trial order and repeats
    exactly; none stops nothing. grace_epochs and reduction_factor are those of successive halving.

    searcher: proposes the trials. first: configurations that the search begins with, in part or whole; what they leave
    out takes its published value. balance: a choice, each option of which gets its share of the trials. generation:
    with scheduler sync, how many trials in a row a searcher proposes from the same results.

    folds: on how many folds a configuration is trained. The trials that ran to their end on the first fold, and are not
    significantly worse than the best one there, run on the others as well, and the mean over all folds counts.
    """

    later: ClassVar[Mapping[str, Any]] = {
        "searcher": {"name": "random"},
        "first": [],
        "balance": None,
        "generation": 8,
        "folds": 1,
    }

    num_trials: Count = 1
    max_concurrent: Count | None = None
    scheduler: Literal["asha", "promotion", "pasha", "sync", "none"] = "asha"
    grace_epochs: Count = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    searcher: SearcherBlock = Field(default_factory=lambda: SearcherBlock(name="random"))
    first: Annotated[tuple[Mapping[str, Any], ...], BeforeValidator(as_tuple)] = ()
    balance: Annotated[Balance | None, BeforeValidator(_as_balance)] = None
    generation: Count = 8
    folds: Count = 1


class ConfirmStage(Section):
    """Stage 2: the best ``top`` configurations on the first ``folds`` folds, ``seeds`` times each."""

    top: Count = 1
    folds: Count = 2
    seeds: Count = 1


class RefitStage(Section):
    """Stage 3: the best ``top`` configurations train on the validation classes as well, ``seeds`` times each.

    Nothing validates them: their last weights count. epochs: confirmed is the median of the best epochs of the
    configuration's confirmed runs (without a confirm stage, of its runs in the search); or a number. classes: all also
    trains on the test classes; such models are never scored.
    """

    top: Count = 1
    seeds: Count = 3
    epochs: Literal["confirmed"] | Count = "confirmed"
    classes: Literal["development", "all"] = "development"


class FinalizeStage(Section):
    """Stage 4: the test classes are opened for the best ``top`` of the confirmed configurations.

    Without a confirm stage, for the best ``top`` of the search. Their refits are tested as well.
    """

    top: Count = 1


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


MAX_STUDY_NAME = 200  # a file system takes 255, and the names of copies, models and partial files are longer
#: What the folder of the studies contains besides them, in lower case: some file systems do not tell cases apart.
_STORAGE_NAMES = ("cache", "mlartifacts", "mlflow.db", "mlruns", "test_reads.jsonl")


def is_storage_name(name: str) -> bool:
    """Return whether the folder of the studies contains, or may contain, something else of this name."""
    return name.lower() in _STORAGE_NAMES or name.lower().startswith("mlflow.db-")  # SQLite's files beside the store


def _study_name(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        cure = "use letters, digits, dots, dashes and underscores, and begin with a letter or a digit"
        raise ConfigError([Problem("", name, "is not a usable name of a folder", cure=cure)])
    if len(name) > MAX_STUDY_NAME:
        message = f"has {len(name)} letters, and the name of a study at most {MAX_STUDY_NAME}"
        raise ConfigError([Problem("", name, message, cure="give a shorter name (--name)")])
    if is_storage_name(name):
        message = "is the name of something else in the folder of the studies"
        cure = f"give another name (--name {name.replace('.', '-')}-study)"
        raise ConfigError([Problem("", name, message, cure=cure)])
    return name


class StudySettings(Section):
    """The settings of a study: its name, its seed and its stages.

    keep_checkpoints, max_checkpoint_gib: how many checkpoints of the search stay on disk, best trials first. Of the
    confirmed runs, those of the configurations to be tested stay, and all of the refits. max_retries: how often a
    crashed trial is restarted from its checkpoint.
    """

    rules = staticmethod(problems_of_stages)

    name: Annotated[str, AfterValidator(_study_name), Field(json_schema_extra={"pattern": _NAME})] = "study"
    seed: Index = 0
    search: SearchStage = SearchStage()
    confirm: ConfirmStage | None = None
    refit: RefitStage | None = None
    finalize: FinalizeStage | None = None
    keep_checkpoints: Count = 3
    max_checkpoint_gib: Positive | None = None
    max_retries: Index = 2


_Model = TypeVar("_Model", bound=Section)


def parse_trial(raw: Mapping[str, Any]) -> Trial:
    """Return plain values (from YAML or JSON) as a Trial. Raises ConfigError with every problem found.

    Whether its plugins fit together is checked once everything else is right, because that imports torch.
    """
    trial = parse_values(raw)
    problems = problems_of_plugins(dict(trial))
    if problems:
        raise ConfigError(problems)
    return trial


def parse_values(raw: Mapping[str, Any]) -> Trial:
    """Return a Trial after every check that does not need the code of its plugins. Raises ConfigError."""
    return _parse(Trial, raw)


def parse_machine(raw: Mapping[str, Any]) -> Machine:
    """Return plain values as a Machine. Raises ConfigError with every problem found."""
    return _parse(Machine, raw)


def parse_study(raw: Mapping[str, Any]) -> StudySettings:
    """Return plain values as StudySettings. Raises ConfigError with every problem found."""
    return _parse(StudySettings, raw)


def fingerprint(trial: Trial) -> str:
    """Return 12 hex digits that name the experiment: the sha256 of its canonical JSON (sorted keys, no blanks)."""
    canonical = json.dumps(trial.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _parse(model: type[_Model], raw: Mapping[str, Any]) -> _Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = problems_from(error, model, raw)
    if isinstance(raw, Mapping):  # one wrong section does not hide what is wrong between the others
        problems += [problem for problem in model.rules(_sound_sections(model, raw)) if problem not in problems]
    raise ConfigError(problems)


def _sound_sections(model: type[BaseModel], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a model whose values are valid by themselves."""
    sections: dict[str, Any] = {}
    for key, alone in _each_key_alone(model).items():
        try:
            sections.update(alone.model_validate({key: raw[key]} if key in raw else {}))
        except ValidationError:
            continue  # it is among the problems already
    return sections


@lru_cache
def _each_key_alone(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {
        key: create_model(f"{model.__name__}_{key}", __config__=STRICT, **{key: (field.annotation, field)})  # type: ignore[call-overload]
        for key, field in model.model_fields.items()
    }
