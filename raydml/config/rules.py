"""Rules between the sections of a trial: what fits together, with the values and a cure where it does not.

A rule runs only where the sections that it reads are valid by themselves, so that one wrong section does not hide
mistakes between the others. A hyperparameter without effect is refused, not ignored. The rules that need the code of
the plugins, which imports torch, run last, where nothing else is wrong; every other mistake is reported without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from raydml import registry
from raydml.data.catalog import OWN_IMAGES
from raydml.data.containers import CONTAINERS
from raydml.errors import Problem
from raydml.models.lookup import facts_of

if TYPE_CHECKING:
    from raydml.methods._base import Method

_Rules = tuple[tuple[tuple[str, ...], Callable[..., Iterator[Problem]]], ...]
_TOGETHER = "where both vary, put them into one choice of blocks (key `loss, miner, sampler`)"


def problems_of(sections: Mapping[str, Any]) -> list[Problem]:
    """Return what does not fit together among the given sections of a trial (key -> valid value).

    What only the code of the plugins can say is left to `problems_of_plugins`.
    """
    return _broken(_RULES, sections)


def problems_of_plugins(sections: Mapping[str, Any]) -> list[Problem]:
    """Return what does not fit together among the plugins of a trial. Imports them, and torch with them."""
    return _broken(_PLUGIN_RULES, sections)


def _broken(rules: _Rules, sections: Mapping[str, Any]) -> list[Problem]:
    return [
        problem
        for names, rule in rules
        if all(name in sections for name in names)
        for problem in rule(*(sections[name] for name in names))
    ]


def problems_of_stages(sections: Mapping[str, Any]) -> list[Problem]:
    """Return where a stage of a study needs more configurations than the stage before it leaves."""
    problems = []
    confirm, finalize, search = sections.get("confirm"), sections.get("finalize"), sections.get("search")
    refit = sections.get("refit")
    if refit is not None and confirm is not None and refit.top > confirm.top:
        message = f"is more than confirm.top: {confirm.top} configuration(s) are confirmed"
        cure = f"write at most {confirm.top}, or raise confirm.top"
        problems.append(Problem("refit.top", refit.top, message, cure=cure))
    if refit is not None and refit.classes == "development" and finalize is not None and refit.top > finalize.top:
        message = f"is more than finalize.top: {finalize.top} configuration(s) are tested"
        cure = f"write at most {finalize.top}, or raise finalize.top"
        problems.append(Problem("refit.top", refit.top, message, cure=cure))
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
    if search is not None and search.scheduler in ("sync", "promotion", "pasha") and search.max_concurrent is not None:
        message = f"cannot be kept by scheduler {search.scheduler}: trials that wait at a rung would count"
        cure = "remove max_concurrent (machine.cpus_per_trial also limits how many run at once), or scheduler: asha"
        problems.append(Problem("search.max_concurrent", search.max_concurrent, message, cure=cure))
    if search is not None and search.folds > 1 and search.scheduler == "pasha":
        message = "needs trials that have run to their end, and with scheduler pasha the best ones may not have"
        problems.append(Problem("search.folds", search.folds, message, cure="scheduler: promotion, or write 1"))
    if search is not None and search.folds > 1 and sections.get("max_checkpoint_gib") is not None:
        message = (
            "may need checkpoints that max_checkpoint_gib has dropped: the first fold does not show which is the best"
        )
        cure = "remove max_checkpoint_gib (keep_checkpoints still holds at the end of the search), or write 1"
        problems.append(Problem("search.folds", search.folds, message, cure=cure))
    return problems


#: Searchers that propose all trials without results.
WITHOUT_RESULTS = ("random", "grid")


def problems_without_validation(study: Any, trials: Sequence[Any]) -> list[Problem]:
    """Return where a study needs validation classes that its trials do not have; paths begin with study or trial.

    study: a StudySettings. trials: Trials, one of each kind that the study has. What is at its default is not refused.
    """
    without = [trial for trial in trials if trial.data.split.val_fraction == 0]
    if not without:
        return []
    if len(without) < len(trials):
        message = "some trials have validation classes and some have none, so they cannot be ranked"
        cure = "one value instead of a domain (--set trial.data.split.val_fraction=0)"
        return [Problem("trial.data.split.val_fraction", "varying", message, cure=cure)]
    why, problems = "trial.data.split.val_fraction is 0", []
    search, confirm, refit, finalize = study.search, study.confirm, study.refit, study.finalize
    if "scheduler" in search.model_fields_set and search.scheduler != "none":
        message = f"stops trials by their validation metrics, and no class validates: {why}"
        problems.append(Problem("study.search.scheduler", search.scheduler, message, cure="remove it, or write none"))
    for key in ("searcher", "balance"):
        block = getattr(search, key)
        if block is not None and getattr(block, "name", "") not in WITHOUT_RESULTS:
            message = f"proposes trials from their validation metrics, and no class validates: {why}"
            cure = f"remove it (--set study.search.{key}=null)" if key == "balance" else "write {name: random}"
            problems.append(Problem(f"study.search.{key}", block.model_dump(), message, cure=cure))
    if search.folds > 1:
        message = f"compares trials on their validation classes, and no class validates: {why}"
        problems.append(Problem("study.search.folds", search.folds, message, cure="--set study.search.folds=1"))
    written = [trial.select_on for trial in without if "select_on" in trial.model_fields_set]
    if written:
        message = f"selects nothing: {why}, so the weights of the last epoch are kept"
        cure = "remove it, or write a val_fraction above 0 such as 0.25"
        problems.append(Problem("trial.select_on", written[0], message, cure=cure))
    if confirm is not None:
        message = f"has nothing to confirm by: {why}"
        problems.append(Problem("study.confirm", confirm.model_dump(), message, cure="--set study.confirm=null"))
    if refit is None:
        message = f"is the stage that trains without validation classes ({why}), and it is missing"
        problems.append(Problem("study.refit", None, message, cure="--set 'study.refit={seeds: 3}'"))
    elif refit.epochs != "confirmed":
        message = f"has no effect: {why}, so each trial has the epochs of trial.epochs"
        cure = f"--set trial.epochs={refit.epochs}, and --set study.refit.epochs=confirmed"
        problems.append(Problem("study.refit.epochs", refit.epochs, message, cure=cure))
    if refit is not None and refit.top > 1:
        message = f"has no effect: {why}, so nothing is ranked and every configuration is trained"
        problems.append(Problem("study.refit.top", refit.top, message, cure="--set study.refit.top=1"))
    if finalize is not None:
        everything = any(trial.data.split.test_fraction == 0 for trial in without)
        if everything or (refit is not None and refit.classes == "all"):
            message = "has nothing to test: every model of the study trains on the test classes as well"
            cure = "--set study.finalize=null, or leave the test classes out of the training"
            problems.append(Problem("study.finalize", finalize.model_dump(), message, cure=cure))
        elif finalize.top > 1:
            message = f"has no effect: {why}, so nothing is ranked and every configuration is tested"
            problems.append(Problem("study.finalize.top", finalize.top, message, cure="--set study.finalize.top=1"))
    return problems


def problems_of_machine(sections: Mapping[str, Any]) -> list[Problem]:
    """Return where Ray cannot give the GPUs, or where they contradict the device, the ranks or the probe."""
    gpus, device, ranks = (sections.get(key) for key in ("gpus_per_trial", "device", "ranks_per_trial"))
    several = ranks not in (None, "auto", 1) or (gpus not in (None, "auto") and gpus > 1)
    if sections.get("probe") == "on" and several:
        message = "measures the steps of one process, and several train each trial here"
        return [Problem("probe", "on", message, cure="probe: auto, or gpus_per_trial: auto and ranks_per_trial: auto")]
    if gpus is None or gpus == "auto":
        return []
    if gpus > 1 and gpus != int(gpus):
        message = "is neither a share of one GPU nor a number of whole ones"
        return [Problem("gpus_per_trial", gpus, message, cure=f"write {int(gpus)}, or a share such as 0.5")]
    if (device == "cuda" and gpus == 0) or (device == "cpu" and gpus > 0):
        cure = "device: auto, or gpus_per_trial: auto"
        return [Problem("gpus_per_trial", gpus, f"contradicts device: {device}", cure=cure)]
    if gpus > 0 and ranks not in (None, "auto", max(1, gpus)):
        message = f"contradicts gpus_per_trial: {gpus:g}; each GPU has one rank"
        return [Problem("ranks_per_trial", ranks, message, cure="remove one of the two")]
    return []


def _schedule_and_epochs(schedule: Any, epochs: int) -> Iterator[Problem]:
    for key, value in (
        ("warmup_epochs", schedule.warmup_epochs),
        ("new_layer_warmup_epochs", schedule.new_layer_warmup_epochs),
    ):
        if value >= epochs and value > 0:
            message = f"leaves none of the trial's {epochs} epochs"
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


def _loss_and_miner(loss: Any, miner: Any) -> Iterator[Problem]:
    if miner is None:
        return
    verb = "choose a miner that fits" if _accepts(loss.name) else "remove miner"
    for message, fitting in _misfits(loss, miner):
        cure = f"{verb}, or write miner: null; {_TOGETHER}"
        yield Problem("miner.name", miner.name, message, fitting, cure=cure)


def _misfits(loss: Any, miner: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield why a miner does not fit a loss, and the miners that do."""
    accepts = _accepts(loss.name)
    yields = _yields(miner)
    if not accepts:
        yield f"loss {loss.name} learns from labels alone and takes no miner", ()
    elif yields and yields not in accepts:
        others = (name for name in registry.names("miners") if name != miner.name)
        fitting = tuple(name for name in others if _yields(_Block(name)) in accepts)
        yield f"yields {yields}, and loss {loss.name} takes {' or '.join(accepts)}", fitting


def _auxiliary_loss_and_miner(method: Any, loss: Any, miner: Any) -> Iterator[Problem]:
    """A loss or a miner of the method's own, each by itself and with what the trial has in place of the other one."""
    blocks = {key: method.settings.get(key) for key in ("auxiliary_loss", "auxiliary_miner")}
    own = {key: _Block.of(block) for key, block in blocks.items() if block is not None}
    if not own:
        return
    for key, kind in (("auxiliary_loss", "losses"), ("auxiliary_miner", "miners")):
        if key in own:
            for problem in _construct(kind, own[key].name, own[key].settings).problems:
                yield problem._replace(path=f"method.{key}")
    used_loss, used_miner = own.get("auxiliary_loss", loss), own.get("auxiliary_miner", miner)
    if used_miner is None or ("auxiliary_miner" not in own and not _accepts(used_loss.name)):
        return
    for message, fitting in _misfits(used_loss, used_miner):
        if "auxiliary_miner" in own:
            cure = "choose a miner that fits, or write auxiliary_miner: null"
            yield Problem("method.auxiliary_miner.name", used_miner.name, message, fitting, cure=cure)
        else:
            message = f"is that of the trial, {used_miner.name}, which {message}"
            cure = "name one that fits (auxiliary_miner: {name: ...}), or choose another auxiliary_loss"
            yield Problem("method.auxiliary_miner", None, message, fitting, cure=cure)


def _accepts(loss: str) -> tuple[str, ...]:
    """Return the kinds of tuples that a loss takes; none for a loss that learns from labels alone."""
    accepts: tuple[str, ...] = registry.load("losses", loss).accepts  # type: ignore[attr-defined]
    return accepts


def _yields(miner: Any) -> str:
    """Return the kind of tuples that a miner with these settings yields; "" where it cannot be built."""
    return _construct("miners", miner.name, miner.settings).yields


class _Block(NamedTuple):
    """A plugin by name with some of its settings, the others at their defaults."""

    name: str
    settings: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> _Block:
        return cls(block["name"], {key: value for key, value in block.items() if key != "name"})


def _loss_and_sampler(loss: Any, sampler: Any) -> Iterator[Problem]:
    accepts = _accepts(loss.name)
    if accepts and sampler.settings.get("images_per_class") == 1:
        message = f"leaves no positive pair in a batch, and loss {loss.name} learns from pairs or triplets"
        yield Problem("sampler.images_per_class", 1, message, cure=f"write at least 2; {_TOGETHER}")


def _loss_constructs(loss: Any) -> Iterator[Problem]:
    yield from _construct("losses", loss.name, loss.settings).problems


def _miner_constructs(miner: Any) -> Iterator[Problem]:
    if miner is not None:
        yield from _construct("miners", miner.name, miner.settings).problems


def _regularizers_and_loss(regularizers: Any, loss: Any, miner: Any) -> Iterator[Problem]:
    accepts = _accepts(loss.name)
    for name, settings in regularizers.items():
        cls = registry.load("regularizers", name)
        path = f"regularizers.{name}"
        if cls.needs_pairs and "pairs" not in accepts:  # type: ignore[attr-defined]
            fitting = tuple(other for other in registry.names("losses") if "pairs" in _accepts(other))
            message = f"needs a loss that takes pairs, and loss {loss.name} takes {' or '.join(accepts) or 'none'}"
            yield Problem(path, settings, message, fitting, cure=f"choose such a loss, or remove {name}")
        rewrites: tuple[str, ...] = cls.rewrites  # type: ignore[attr-defined]
        if rewrites and (miner is None or _yields(miner) not in rewrites):
            fitting = tuple(other for other in registry.names("miners") if _yields(_Block(other)) in rewrites)
            given = "there is no miner" if miner is None else f"miner {miner.name} yields {_yields(miner)}"
            message = f"changes the {' or '.join(rewrites)} that a miner yields, and {given}"
            yield Problem(path, settings, message, fitting, cure=f"choose such a miner, or remove {name}")


def _regularizers_and_model(regularizers: Any, model: Any) -> Iterator[Problem]:
    if "embedding_norm" in regularizers and model.normalize == "l2":
        message = "has no effect: model.normalize is l2, so every embedding has length 1"
        cure = "remove it, or write model.normalize: none"
        yield Problem("regularizers.embedding_norm", regularizers["embedding_norm"], message, cure=cure)
    dims = list(regularizers["matryoshka"]["dims"]) if "matryoshka" in regularizers else []
    path = "regularizers.matryoshka.dims"
    if dims != sorted(set(dims)):
        yield Problem(path, dims, "must rise", cure=f"write {sorted(set(dims))}")
    elif dims and dims[-1] > model.embedding_dim:
        message = f"has prefixes longer than the embedding, whose model.embedding_dim is {model.embedding_dim}"
        fitting = [dim for dim in dims if dim <= model.embedding_dim]
        shorter = f"write {fitting}" if fitting else "write shorter ones"
        cure = f"{shorter}, or raise embedding_dim; both vary: one choice for both (`model, regularizers`)"
        yield Problem(path, dims, message, cure=cure)
    elif dims == [model.embedding_dim]:
        message = f"has no effect: it is the whole embedding (model.embedding_dim: {dims[0]}), which the loss is on"
        yield Problem(path, dims, message, cure="add shorter prefixes, or remove matryoshka")


def _method_and_model(method: Any, model: Any) -> Iterator[Problem]:
    num_slices = _method_class(method).network_arguments(**method.settings).get("num_slices", 1)
    if model.embedding_dim % num_slices:
        message = f"cannot be cut into the {num_slices} equal slices that method {method.name} needs"
        nearest = max(num_slices, round(model.embedding_dim / num_slices) * num_slices)
        cure = f"write {nearest}, or another number of learners; both vary: one choice for both (`method, model`)"
        yield Problem("model.embedding_dim", model.embedding_dim, message, cure=cure)


def _method_and_regularizers(method: Any, regularizers: Any) -> Iterator[Problem]:
    num_slices = _method_class(method).network_arguments(**method.settings).get("num_slices", 1)
    if num_slices > 1 and "matryoshka" in regularizers:
        message = f"needs one loss on the whole embedding, and method {method.name} trains {num_slices} slices of it"
        cure = "remove it, or choose another method"
        yield Problem("regularizers.matryoshka", regularizers["matryoshka"], message, cure=cure)


def _method_and_sampler(method: Any, sampler: Any) -> Iterator[Problem]:
    defaults = registry.settings_model("samplers", sampler.name)().model_dump()
    changed = {key: value for key, value in sampler.settings.items() if value != defaults[key]}
    try:
        _method_class(method).check_settings(
            {"name": sampler.name, **changed, "batch_size": batch_size_of(sampler.settings)}, **method.settings
        )
    except ValueError as error:
        message, _, cure = str(error).partition("; ")
        yield Problem("method", {"name": method.name, **method.settings}, message, cure=cure)


def _method_and_data(method: Any, data: Any) -> Iterator[Problem]:
    if method.settings.get("auxiliary_flip") and not data.augmentation.flip:
        message = "has no effect: data.augmentation.flip is false, so no batch is mirrored"
        yield Problem("method.auxiliary_flip", True, message, cure="remove it, or write data.augmentation.flip: true")


def _method_class(method: Any) -> type[Method]:
    cls: type[Method] = registry.load("methods", method.name)
    return cls


def batch_size_of(settings: Mapping[str, Any]) -> int | None:
    """Return the images in a batch of a sampler: its setting batch_size, or classes_per_batch times images_per_class.

    None for a sampler with other settings, which has to be built from labels first.
    """
    size: int = settings.get("batch_size") or settings.get("classes_per_batch", 0) * settings.get("images_per_class", 0)
    return size or None


def _regularizers_and_sampler(regularizers: Any, sampler: Any) -> Iterator[Problem]:
    memory = regularizers.get("cross_batch_memory")
    if memory is None:
        return
    batch = batch_size_of(sampler.settings)
    if batch is not None and memory["size"] < batch:
        message = f"is less than the {batch} images of a batch, all of which the memory must hold"
        cure = f"write at least {batch}, preferably many times that"
        yield Problem("regularizers.cross_batch_memory.size", memory["size"], message, cure=cure)


def _loss_group(method: Any, loss: Any, regularizers: Any, optimizer: Any) -> Iterator[Problem]:
    """Yield settings of the optimiser for parameters that do not exist."""
    auxiliary = method.settings.get("auxiliary_loss")
    losses = [loss, *([] if auxiliary is None else [_Block.of(auxiliary)])]
    made = [_construct("losses", one.name, one.settings) for one in losses]
    made += [_construct("regularizers", name, settings) for name, settings in regularizers.items()]
    if any(one.problems or one.has_parameters for one in made):
        return
    names = " and ".join(dict.fromkeys(one.name for one in losses))
    several = bool(regularizers) or " and " in names
    own = "loss and regularizers have" if regularizers else f"loss {names} {'have' if several else 'has'}"
    message = f"has no effect: {own} no parameters of {'their' if several else 'its'} own"
    cure = "remove it, or put loss and optimizer into one choice of blocks (key `loss, optimizer`)"
    if optimizer.loss_learning_rate is not None:
        yield Problem("optimizer.loss_learning_rate", optimizer.loss_learning_rate, message, cure=cure)
    if optimizer.loss_weight_decay:
        yield Problem("optimizer.loss_weight_decay", optimizer.loss_weight_decay, message, cure=cure)


class _Constructed(NamedTuple):
    """The result of building a plugin for a tiny trial: problems, whether it has parameters, what a miner yields."""

    problems: tuple[Problem, ...] = ()
    has_parameters: bool = False
    yields: str = ""


def _construct(kind: str, name: str, settings: Mapping[str, Any]) -> _Constructed:
    return _construct_once(kind, name, json.dumps(dict(settings), sort_keys=True))


@lru_cache(maxsize=4096)
def _construct_once(kind: str, name: str, settings: str) -> _Constructed:
    """Build a plugin: its constructor raises ValueError where its own settings exclude each other."""
    import torch

    from raydml.models.network import Head, Network

    given = json.loads(settings)
    try:
        with torch.random.fork_rng(devices=[]):
            network = Network(
                torch.nn.Identity(), Head(2, 2, layer_norm=False, normalize="none"), freeze_batch_norm=False
            )
            parts = {"network": network, "loss": None, "make_loss": torch.nn.Identity, "miner": None}
            plugin = registry.build(kind, name, num_classes=2, embedding_dim=2, **parts, **given)
    except ValueError as error:
        path = {"losses": "loss", "miners": "miner", "regularizers": f"regularizers.{name}"}[kind]
        return _Constructed((Problem(path, given if kind == "regularizers" else {"name": name, **given}, str(error)),))
    has_parameters = any(True for _ in plugin.parameters())
    return _Constructed((), has_parameters, getattr(plugin, "yields", ""))


def _data(data: Any) -> Iterator[Problem]:
    if data.crop_px > data.resize_px:
        message = f"is larger than resize_px, {data.resize_px}: the crop is cut out of the resized image"
        yield Problem("data.crop_px", data.crop_px, message, cure=f"write at most {data.resize_px}, or raise resize_px")
    yield from _images(data, data.name, "data")
    names = [extra.name for extra in data.extra_tests]
    for number, extra in enumerate(data.extra_tests):
        yield from _images(extra, extra.data, f"data.extra_tests[{number}]")
        if names.index(extra.name) < number:
            message = "is the name of two extra tests"
            yield Problem(f"data.extra_tests[{number}].name", extra.name, message, cure="rename one of them")
        if before := [name for name in names if extra.name.startswith(f"{name}_")]:
            message = f"begins with {before[0]}_, as the metrics of the extra test {before[0]} do"
            yield Problem(f"data.extra_tests[{number}].name", extra.name, message, cure="rename one of them")
    split = data.split
    if split.fold is not None and split.fold >= split.num_folds:
        message = f"there are {split.num_folds} folds (num_folds), counted from 0"
        yield Problem("data.split.fold", split.fold, message, cure=f"write 0 to {split.num_folds - 1}, or null")
    if split.fold is not None and split.val_fraction == 0:
        message = "is the fold that validates, and with val_fraction 0 nothing validates: all development classes train"
        yield Problem("data.split.fold", split.fold, message, cure="write null, or a val_fraction above 0")
    if split.test_fraction == 0 and split.val_fraction > 0:
        message = "seals no class, so the winner of a search cannot be tested"
        cure = "write a test_fraction above 0 such as 0.5, or val_fraction: 0 as well, to train on every class"
        yield Problem("data.split.test_fraction", split.test_fraction, message, cure=cure)


def _images(data: Any, name: str, key: str) -> Iterator[Problem]:
    """Yield what does not fit together in the settings of images. name: of the data set. key: of the settings."""
    if name == "image_list" and data.list_file is None:
        cure = "name the CSV, relative to machine.data_root"
        yield Problem(f"{key}.list_file", None, "is required by image_list", cure=cure)
    if name != "image_list" and data.list_file is not None:
        message = f"is not used by {name}; it is by image_list"
        yield Problem(f"{key}.list_file", data.list_file, message, cure="remove it, or set data.name to image_list")
    if name not in OWN_IMAGES and data.min_images_per_class != 1:
        message = f"is not used by {name}, whose classes are fixed; it is by {', '.join(OWN_IMAGES)}"
        yield Problem(f"{key}.min_images_per_class", data.min_images_per_class, message, cure="remove it")
    if name not in OWN_IMAGES and data.group is not None:
        message = f"is not used by {name}; it is by {', '.join(OWN_IMAGES)}"
        yield Problem(f"{key}.group", data.group, message, cure="remove it")
    for setting, default in (("path", None), ("image", "image"), ("label", "label")):
        if name not in CONTAINERS and getattr(data, setting) != default:
            message = f"is not used by {name}; it is by {', '.join(CONTAINERS)}"
            yield Problem(f"{key}.{setting}", getattr(data, setting), message, cure="remove it")
    if name == "image_folder" and data.group not in (None, "parent"):
        message = "is not known for image_folder, whose groups are the folders above the class folders"
        yield Problem(f"{key}.group", data.group, message, cure="write parent, or use an image_list with such a column")
    if data.exclude_same == "group" and data.group is None:
        cure = f"name the column of the groups in {key}.group"
        yield Problem(f"{key}.exclude_same", data.exclude_same, "needs groups, and group names none", cure=cure)


def _augmentation(data: Any) -> Iterator[Problem]:
    augmentation, root = data.augmentation, "data.augmentation"
    scale, blur, erasing = augmentation.random_resized_crop, augmentation.blur, augmentation.erasing
    shares = {"random_resized_crop": scale, "erasing.scale": erasing and erasing.scale}
    for key, share in shares.items():
        if share is not None and not share[0] <= share[1] <= 1:
            message = "must be the smallest and the largest share of the area, at most 1"
            yield Problem(f"{root}.{key}", list(share), message, cure="write for example [0.2, 1.0]")
    ranges = {
        "aspect_ratio": augmentation.aspect_ratio,
        "blur.sigma": blur and blur.sigma,
        "erasing.ratio": erasing and erasing.ratio,
    }
    for key, bounds in ranges.items():
        if bounds is not None and bounds[0] > bounds[1]:
            yield Problem(f"{root}.{key}", list(bounds), "must rise", cure=f"write {list(bounds[::-1])}")
    if scale is None and augmentation.aspect_ratio != type(augmentation)().aspect_ratio:
        message = "has no effect without random_resized_crop"
        yield Problem(f"{root}.aspect_ratio", list(augmentation.aspect_ratio), message, cure="remove it")
    if data.cache == "off" and (scale is None or data.resize == "squash"):
        message = "has no effect but longer loading: only a random_resized_crop can be cut before the image is resized"
        if data.resize == "squash":
            message = "contradicts resize: squash, which resizes before it crops"
        yield Problem("data.cache", "off", message, cure="remove it")
    if scale is not None and augmentation.random_crop:
        message = "excludes random_resized_crop: a crop is either resized or not"
        yield Problem(f"{root}.random_crop", True, message, cure="remove one of them")
    if augmentation.five_crops and (scale is not None or augmentation.random_crop):
        message = "excludes random_resized_crop and random_crop: each of the three decides where the crop lies"
        yield Problem(f"{root}.five_crops", True, message, cure="remove one of them")
    if augmentation.five_crops and data.resize == "squash" and data.crop_px == data.resize_px:
        message = "has no effect: at this resize_px the five crops are one"
        yield Problem(f"{root}.five_crops", True, message, cure="remove it, or a resize_px above crop_px")
    if augmentation.padding_px and not augmentation.random_crop:
        message = "has no effect without random_crop"
        yield Problem(f"{root}.padding_px", augmentation.padding_px, message, cure="remove it, or random_crop: true")
    if augmentation.padding_px >= data.crop_px:
        message = f"would allow crops of {data.crop_px} px without a pixel of the image"
        yield Problem(f"{root}.padding_px", augmentation.padding_px, message, cure=f"write at most {data.crop_px - 1}")
    jitter = augmentation.color_jitter
    if jitter is not None and not (jitter.brightness or jitter.contrast or jitter.saturation or jitter.hue):
        yield Problem(f"{root}.color_jitter", jitter.model_dump(), "changes nothing", cure="give one of its settings")


def _data_and_model(data: Any, model: Any) -> Iterator[Problem]:
    facts = facts_of(model.backbone)
    if not facts.takes_crop(data.crop_px):
        message = f"backbone {model.backbone} takes crops of {facts.crops} px"
        nearest = facts.nearest_crop_px(data.crop_px)
        cure = f"write crop_px: {nearest} and a resize_px at least as large, or choose another backbone"
        yield Problem("data.crop_px", data.crop_px, message, cure=cure)


def _model(model: Any) -> Iterator[Problem]:
    facts = facts_of(model.backbone)
    if model.weights == "default" and facts.weights_file is None:
        message = f"backbone {model.backbone} has no published weights to fetch"
        yield Problem("model.weights", model.weights, message, ("none", "PATH"), cure=facts.weights_cure)
    if model.weights == "none" and model.freeze_batch_norm:
        message = "freezes statistics that were never trained: weights is none"
        yield Problem("model.freeze_batch_norm", True, message, cure="remove it, or start from trained weights")
    if model.pooling not in facts.pooling_names:
        if facts.has_pooling:
            message = f"backbone {model.backbone} does not have it"
        else:
            message = f"has no effect: backbone {model.backbone} has no map to pool"
        yield Problem(
            "model.pooling", model.pooling, message, facts.pooling_names, cure="remove it, or choose another backbone"
        )
    for key, can in (("drop_path", facts.takes_drop_path), ("gradient_checkpointing", facts.can_checkpoint)):
        if getattr(model, key) and not can:
            message = f"backbone {model.backbone} does not have it; many networks of timm do"
            yield Problem(f"model.{key}", getattr(model, key), message, cure="remove it, or choose another backbone")
    if model.gradient_checkpointing and facts.can_checkpoint and facts.has_batch_norm and not model.freeze_batch_norm:
        message = "would move the statistics of BatchNorm twice a step"
        cure = "remove it" if model.weights == "none" else "write model.freeze_batch_norm: true, or remove it"
        yield Problem("model.gradient_checkpointing", True, message, cure=cure)
    lora = getattr(model.train, "lora", None)
    if lora is not None and lora.targets not in facts.adaptable:
        message = f"backbone {model.backbone} {facts.why_not_adaptable}"
        cure = "write model.train: {last_blocks: 2}, or another backbone such as timm:vit_small_patch14_dinov2.lvd142m"
        yield Problem("model.train.lora", lora.model_dump(), message, cure=cure)
    if hasattr(model.train, "last_blocks") and model.train.last_blocks > facts.num_blocks:
        message = f"backbone {model.backbone} has {facts.num_blocks} blocks"
        cure = f"write at most {facts.num_blocks}" if facts.num_blocks else "write model.train: head, or all"
        yield Problem("model.train.last_blocks", model.train.last_blocks, message, cure=cure)
    if model.train == "head" and model.projection == "none" and not model.bn_neck:
        message = "lets nothing of the network learn: model.projection is none"
        yield Problem("model.train", model.train, message, cure="write model.projection: linear, or train: all")
    if (model.train == "head" or lora is not None) and model.weights == "none":
        message = "leaves random weights as they are: weights is none"
        value = "head" if lora is None else {"lora": lora.model_dump()}
        yield Problem("model.train", value, message, cure="remove it, or start from trained weights")


def _model_and_chunks(model: Any, chunk_size: int | None) -> Iterator[Problem]:
    if chunk_size is None or model.freeze_batch_norm or model.train == "head" or hasattr(model.train, "lora"):
        return
    if facts_of(model.backbone).has_batch_norm:
        message = (
            f"backbone {model.backbone} learns with BatchNorm, and the statistics of a chunk are not those of a batch"
        )
        cure = "write model.freeze_batch_norm: true, or chunk_size: null"
        if model.weights == "none":
            cure = "start from trained weights (with model.freeze_batch_norm: true), or write chunk_size: null"
        yield Problem("chunk_size", chunk_size, message, cure=cure)


def _projection(model: Any) -> Iterator[Problem]:
    if model.projection != "none":
        return
    feature_dim = facts_of(model.backbone).features(model.pooling)
    if feature_dim is not None and model.embedding_dim != feature_dim:
        message = f"backbone {model.backbone} has {feature_dim} features, and projection none keeps them as they are"
        cure = f"write embedding_dim: {feature_dim}, or projection: linear or linear_no_bias"
        yield Problem("model.embedding_dim", model.embedding_dim, message, cure=cure)
    if model.head_init != "torch":
        message = "has no effect: with projection none there is no layer to initialise"
        yield Problem("model.head_init", model.head_init, message, cure="remove it, or projection: linear")


def _train_and_optimizer(model: Any, optimizer: Any, schedule: Any) -> Iterator[Problem]:
    if optimizer.layer_decay != 1 and not facts_of(model.backbone).has_layers:
        message = f"backbone {model.backbone} has no order of layers in timm"
        yield Problem("optimizer.layer_decay", optimizer.layer_decay, message, cure="write 1, or another backbone")
    if model.train != "head":
        return
    message = "has no effect: with model.train: head nothing of the backbone learns"
    if optimizer.backbone_learning_rate is not None:
        yield Problem("optimizer.backbone_learning_rate", optimizer.backbone_learning_rate, message, cure="remove it")
    if optimizer.layer_decay != 1:
        yield Problem("optimizer.layer_decay", optimizer.layer_decay, message, cure="remove it")
    if schedule.new_layer_warmup_epochs:
        yield Problem("schedule.new_layer_warmup_epochs", schedule.new_layer_warmup_epochs, message, cure="remove it")


def _projection_and_regularizers(model: Any, regularizers: Any) -> Iterator[Problem]:
    if model.projection == "none" and "orthogonality" in regularizers:
        message = "needs a linear layer in the head, and model.projection is none"
        cure = "remove it, or write model.projection: linear or linear_no_bias"
        yield Problem("regularizers.orthogonality", regularizers["orthogonality"], message, cure=cure)


# The sections that a rule reads, and the rule. A rule runs where all its sections are valid by themselves.
_RULES: _Rules = (
    (("method", "data"), _method_and_data),
    (("regularizers", "model"), _regularizers_and_model),
    (("regularizers", "sampler"), _regularizers_and_sampler),
    (("data",), _data),
    (("data",), _augmentation),
    (("data", "model"), _data_and_model),
    (("model",), _model),
    (("model",), _projection),
    (("model", "chunk_size"), _model_and_chunks),
    (("model", "regularizers"), _projection_and_regularizers),
    (("model", "optimizer", "schedule"), _train_and_optimizer),
    (("schedule", "epochs"), _schedule_and_epochs),
    (("recall_at",), _recall_at),
    (("recall_at", "select_on"), _select_on),
)
_PLUGIN_RULES: _Rules = (
    (("loss", "miner"), _loss_and_miner),
    (("method", "model"), _method_and_model),
    (("method", "regularizers"), _method_and_regularizers),
    (("method", "sampler"), _method_and_sampler),
    (("loss", "sampler"), _loss_and_sampler),
    (("loss",), _loss_constructs),
    (("miner",), _miner_constructs),
    (("regularizers", "loss", "miner"), _regularizers_and_loss),
    (("method", "loss", "miner"), _auxiliary_loss_and_miner),
    (("method", "loss", "regularizers", "optimizer"), _loss_group),
)
