"""Training of one trial: a generator that yields one plain dictionary an epoch.

It uses neither Ray nor MLflow, and never branches on the name of a method, loss or sampler.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydml.config.refit import trained_on, trains_on_test_classes, validates
from raydml.config.trial import Machine, Trial, fingerprint
from raydml.data.catalog import digests_of_files
from raydml.data.seal import TestReads
from raydml.evaluation import embed
from raydml.evaluation.protocols import protocols_of
from raydml.evaluation.scoring import class_values, is_collapsed, score_by_all
from raydml.images.features import FeatureLoader, KeptFeatures
from raydml.images.loader import Loader
from raydml.images.pixels import Pixels
from raydml.methods._base import Batch
from raydml.models.adapters import require_peft
from raydml.models.network import fetch_weights, preprocessing_for
from raydml.ops.memory import peak_memory_bytes, reset_peak_memory
from raydml.samplers._base import EpochPlan
from raydml.training import checkpoint, parts
from raydml.training.feature_store import open_features
from raydml.training.parts import learning_rate_factor
from raydml.training.randomness import Randomness
from raydml.training.rank_group import RankGroup
from raydml.training.snapshot import Snapshots, copy_of
from raydml.training.trial_images import Catalogs, open_development
from raydml.training.uncompiled import without_compiler
from raydml.training.weight_average import WeightAverage

#: Training images that show whether a trial without validation has diverged; no setting of a machine may decide that.
_NUM_CHECKED = 256


class Trainer:
    """One trial from its configuration to its best weights.

    The constructor opens the images and builds the network. It raises ValueError (ConfigError, DataError, ModelError,
    WeightsError), with the cure, for what cannot be trained. It sets torch's number of threads for this process to
    ``machine.cpus_per_trial``; the last bits of a number depend on it, because sums are split differently. ``device``
    is a torch device string such as "cpu" or "cuda:0". ``reads``: see `open_development`. ``ranks``: the processes that
    train the trial together, each with a trainer of its own; they share the threads. All of them take the same steps
    at the same time, and rank 0 holds the history and the best weights. The state is that of one rank: a trial goes on
    with any number of them, and only rounding differs.

    ``epochs()`` continues after ``load_state_dict`` or ``restore``; on a CPU 4 epochs and 2 + restore + 2 epochs are
    the same bit for bit.

    With ``optimizer.ema`` the weights that are validated and kept are an average of those that train, see
    `WeightAverage`; a clustering takes the weights that train.

    Where the split has no validation classes (``val_fraction: 0``), results have no ``val_`` metrics and no
    ``best_<select_on>``, and the best weights are those of the last epoch.

    by_class: also keep `best_class_values`, the values of ``select_on`` at the best epoch for each validation class
    (see `raydml.evaluation.scoring.class_values`); empty without it, and on other ranks than the first.
    """

    def __init__(
        self,
        trial: Trial,
        machine: Machine,
        *,
        device: str,
        catalogs: Catalogs | None = None,
        reads: TestReads | None = None,
        ranks: RankGroup | None = None,
        by_class: bool = False,
    ) -> None:
        self.ranks = ranks or RankGroup()
        self.by_class = by_class
        torch.set_num_threads(max(1, machine.cpus_per_trial // self.ranks.num_ranks))
        self.machine = machine
        self.catalogs, self.reads = catalogs or Catalogs(machine), reads
        self.device = torch.device(device)
        reset_peak_memory(self.device)
        # Sizes and weights are checked before any image is decoded.
        self.preprocessing = preprocessing_for(
            trial.model.backbone,
            resize_px=trial.data.resize_px,
            crop_px=trial.data.crop_px,
            resize=trial.data.resize,
            interpolation=trial.data.interpolation,
        )
        fetch_weights(trial.model.backbone, trial.model.weights)
        if hasattr(trial.model.train, "lora"):
            require_peft()
        self.trial, self.catalog, self.split, self.train_images, self.val_images = open_development(
            trial, machine, catalogs=self.catalogs, reads=reads
        )
        self.train_labels = torch.from_numpy(np.array(self.train_images.labels)).to(self.device)
        self.method = parts.build_method(self.trial, self.train_images.labels, self.device, self.ranks)
        self.optimizer = parts.build_trial_optimizer(self.trial, self.method)
        ema = self.trial.optimizer.ema
        self.average = None if ema is None else WeightAverage(self.method.network, ema)
        self.randomness = Randomness(trial.seed)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=trial.precision == "fp16" and self.device.type == "cuda"
        )
        # What the network reads: pixels, or features that its frozen backbone gave them.
        self.loader: Loader | FeatureLoader
        parts_of_split = (self.train_images, self.val_images)
        features = open_features(
            self.trial, machine, self.method.network, self.preprocessing, parts_of_split, device=self.device
        )
        self.train_features = None if features is None else features[0]
        self.val_inputs: Pixels | KeptFeatures = self.val_images.pixels if features is None else features[1]
        if self.train_features is None:
            self.loader = Loader(
                self.train_images.pixels,
                trial.data.augmentation,
                self.preprocessing,
                device=self.device,
                channels_last=trial.channels_last,
                rows=self.ranks.rows,
            )
        else:
            self.loader = FeatureLoader(
                self.train_features, trial.data.augmentation, device=self.device, rows=self.ranks.rows
            )
        self.epoch = 0
        self.ended = ""
        self.epoch_state: EpochState | None = None
        self.last_result: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []  # the results of all epochs
        self.best_epoch = 0  # 0: the network as it was built
        self.best_metrics: dict[str, float] = {}
        self.best_class_values: list[float] = []
        self._class_values: list[float] = []  # of the newest validation
        self.best_weights = copy_of(self.method.network.plain_state_dict())

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Train and validate; yield a result after each epoch, until the trial has ended.

        A result holds: epoch (from 1), train_loss (mean over the batches), val_recall_at_k for each k,
        val_r_precision, val_map_at_r, the same of binary codes where the trial has them (val_binary_...),
        best_<select_on>, learning_rate (of the head, at the last step), gradient_norm (over all parameters before
        clipping, mean over the batches), sampler_coverage, sampler_duplicates, epoch_s, images_per_s (training alone),
        peak_memory_bytes (so far, see `ops/memory.py`), after a clustering the metrics of the method and clustering_s
        (features included), and ended: "" before the last epoch, then "finished", "non_finite_loss" or "collapsed".
        Every number is finite: what could not be measured is absent.
        """
        for result in self.steps():
            if result is not None:
                yield result

    def steps(self) -> Iterator[dict[str, Any] | None]:
        """Train like ``epochs``, and yield None after each batch; the state can be taken there, too.

        A trainer with a state from the middle of an epoch trains the remaining batches of it.
        """
        self._begin_alike()
        while not self.ended:
            try:
                yield from self._train()
            except _NonFiniteFeatures:
                yield self._end({"epoch": self.epoch + 1}, "non_finite_loss")
            else:
                yield self._end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on, copied to the CPU: tensors and plain values."""
        return {**copy_of(self._state()), "best_weights": dict(self.best_weights)}

    def _state(self) -> dict[str, Any]:
        """Return the state without the best weights; what is in it changes while the trial goes on."""
        with without_compiler():
            optimizer = self.optimizer.state_dict()
        return {
            "fingerprint": fingerprint(self.trial),
            "epoch": self.epoch,
            "ended": self.ended,
            "last_result": dict(self.last_result),
            "history": [dict(result) for result in self.history],
            "under_way": None if self.epoch_state is None else self.epoch_state.to_dict(),
            "method": self.method.state_dict(),
            "samplers": {name: sampler.state_dict() for name, sampler in self.method.samplers.items()},
            "optimizer": optimizer,
            **({} if self.average is None else {"average": self.average.state_dict()}),
            "scaler": self.scaler.state_dict(),
            "randomness": self.randomness.state_dict(),
            "best_epoch": self.best_epoch,
            "best_metrics": dict(self.best_metrics),
            **({"best_class_values": list(self.best_class_values)} if self.by_class else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same trial. Raises ValueError for the state of another trial."""
        own = fingerprint(self.trial)
        if state["fingerprint"] != own:
            raise ValueError(
                f"this state belongs to trial {state['fingerprint']}, this is trial {own}: "
                "a trial continues only with the configuration it was started with"
            )
        self.method.load_state_dict(state["method"])
        for name, sampler in self.method.samplers.items():
            sampler.load_state_dict(state["samplers"][name])
        # A copy: the optimiser updates the tensors of its state in place.
        with without_compiler():
            self.optimizer.load_state_dict(copy_of(state["optimizer"]))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        self.randomness.load_state_dict(state["randomness"])
        self.epoch, self.ended = state["epoch"], state["ended"]
        self.last_result = dict(state["last_result"])
        self.history = [dict(result) for result in state.get("history", ())]  # older checkpoints have none
        epoch_state = state["under_way"]  # the key that checkpoints have had from the beginning
        self.epoch_state = None if epoch_state is None else EpochState.from_dict(copy_of(epoch_state), self.device)
        self.best_epoch, self.best_metrics = state["best_epoch"], dict(state["best_metrics"])
        self.best_class_values = list(state.get("best_class_values", ()))
        self.best_weights = copy_of(state["best_weights"])

    def save(self, folder: Path) -> Path:
        """Write the state and the best weights as a checkpoint."""
        return checkpoint.save(folder, **self.contents(Snapshots()))

    def contents(self, snapshots: Snapshots) -> dict[str, Any]:
        """Return what `checkpoint.save` writes, by the names of its arguments, as a copy that `snapshots` takes."""
        return {
            "state": snapshots.take(self._state()),
            "model_card": self.model_card(),
            "best_weights": self.best_weights,  # replaced by others, and never changed
            "history": list(self.history),
        }

    def restore(self, folder: Path) -> dict[str, Any]:
        """Continue from a checkpoint; return the result of the epoch before it ({} for none).

        Raises CheckpointError when the checkpoint is damaged.
        """
        state = checkpoint.load_state(folder)
        self.load_state_dict({**state, "best_weights": checkpoint.load_weights(folder)})
        return dict(self.last_result)

    def model_card(self) -> dict[str, Any]:
        """Return plain JSON: how to rebuild the network of the best weights, its input and its origin."""
        return {
            "network": parts.plain_network_arguments(self.trial),
            "preprocessing": self.preprocessing.to_dict(),
            "trial": self.trial.model_dump(mode="json"),
            "fingerprint": fingerprint(self.trial),
            "split": self.split.to_dict(),
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "metrics": dict(self.best_metrics),
            **({} if validates(self.trial) else {"trained_on": trained_on(self.trial)}),
            **({"trained_on_files": self._trained_on_files} if trains_on_test_classes(self.trial) else {}),
        }

    @cached_property
    def _trained_on_files(self) -> str:
        """Digests of all image files, sorted, as one text: a list would have a line of the card for each."""
        return " ".join(sorted(set(digests_of_files(self.catalog).values())))

    # --- one epoch -----------------------------------------------------------------------------------------

    def _begin_alike(self) -> None:
        """Give all ranks the state of rank 0, which may come from a checkpoint."""
        if self.ranks.num_ranks == 1:
            return
        state = self.ranks.from_first(lambda: copy_of({**self._state(), "history": []}))
        if not self.ranks.is_first:
            self.load_state_dict({**state, "best_weights": {}})

    def _end_epoch(self) -> dict[str, Any]:
        assert self.epoch_state is not None
        result: dict[str, Any] = {"epoch": self.epoch + 1, **self.ranks.from_first(self.epoch_state.result)}
        num_batches = len(self.epoch_state.plan.batches)
        result["learning_rate"] = self.trial.optimizer.learning_rate * self._rate_factor(num_batches - 1, num_batches)
        trained_s, self.epoch_state = self.epoch_state.seconds, None
        start = time.perf_counter()
        with self._evaluated_weights():
            validated = self._validate() if math.isfinite(result["train_loss"]) else "non_finite_loss"
            if not isinstance(validated, str):
                self._keep_if_best(validated, self.epoch + 1)
        ended = validated if isinstance(validated, str) else ""
        if not isinstance(validated, str):
            result.update(validated)
            ended = "finished" if self.epoch + 1 == self.trial.epochs else ""
        result["peak_memory_bytes"] = peak_memory_bytes(self.device)
        result["epoch_s"] = trained_s + result.get("clustering_s", 0.0) + time.perf_counter() - start
        return self._end(result, ended)

    def _end(self, result: Mapping[str, float], ended: str) -> dict[str, Any]:
        """Close the epoch; return the finite part of its result."""
        self.epoch += 1
        self.ended = ended
        best = {f"best_{name}": value for name, value in self.best_metrics.items() if name == self.trial.select_on}
        finite = {name: value for name, value in {**result, **best}.items() if math.isfinite(value)}
        self.last_result = {**finite, "ended": ended}
        self.history.append(self.last_result)
        return dict(self.last_result)

    def _train(self) -> Iterator[None]:
        """Train the remaining batches of the epoch, after planning it where it has not begun."""
        start = time.perf_counter()
        self.method.train()
        # Without a gradient the backbone neither moves nor gathers momentum that would push it later.
        new_layers_only = self.epoch < self.trial.schedule.new_layer_warmup_epochs
        for parameter in self.method.parameter_groups()["backbone"]:
            parameter.requires_grad_(not new_layers_only)
        if self.epoch_state is None:
            clustering = self._recluster()
            start = time.perf_counter()
            if self.epoch == self.trial.schedule.new_layer_warmup_epochs > 0:
                self.optimizer.state.clear()  # all layers learn from here on, with a new optimiser state
            plan = self._plan()
            seeds = self.randomness.batch_seeds(len(plan.batches))
            self.epoch_state = EpochState(plan, seeds, self.device, clustering)
        epoch, plan = self.epoch_state, self.epoch_state.plan
        flip = None if plan.flip is None else plan.flip[epoch.position :]
        loaded = self.loader.batches(plan.batches[epoch.position :], epoch.seeds[epoch.position :], flip)
        with closing(loaded):
            for images in loaded:
                self._set_learning_rates(epoch.position, len(plan.batches))
                loss, norm = self._step(images, plan, epoch.position)
                epoch.add(loss, norm, seconds=time.perf_counter() - start)
                yield
                start = time.perf_counter()

    def _plan(self) -> EpochPlan:
        """Return the plan of the epoch, that of rank 0: a clustering on a GPU may differ from rank to rank."""
        own = self.method.plan_epoch(self.epoch, self.randomness.sampler)
        plan = self.ranks.from_first(lambda: own)
        smallest = min(map(len, plan.batches), default=self.ranks.num_ranks)
        if smallest < self.ranks.num_ranks:
            raise ValueError(
                f"machine.ranks_per_trial: {self.ranks.num_ranks} ranks cannot share a batch of {smallest} images. "
                "Cure: fewer GPUs or ranks a trial, or a sampler with larger batches"
            )
        return plan

    def _recluster(self) -> dict[str, float]:
        """Cluster where the method is due to, and return its metrics and clustering_s; {} where it is not."""
        if not self.method.time_to_recluster(self.epoch):
            return {}
        start = time.perf_counter()
        clustering = self.method.recluster(self._features, self.epoch, self.device)
        self.ranks.copy_first(self.method.buffers())
        return {**clustering, "clustering_s": time.perf_counter() - start}

    def _features(self, forward: Callable[[Tensor], Tensor], *, inner_layers: bool = False) -> NDArray[np.float32]:
        """Return forward(images), (N, F), of all training images, prepared as for evaluation."""
        images = self._training_pixels_for_eval if inner_layers else self._training_inputs_for_eval
        features = self._embed(images, forward)
        if not np.isfinite(features).all():
            raise _NonFiniteFeatures  # validation may use other layers, so its embeddings may be finite
        return features

    @property
    def _training_inputs_for_eval(self) -> Pixels | KeptFeatures:
        return self._training_pixels_for_eval if self.train_features is None else self.train_features

    @cached_property
    def _training_pixels_for_eval(self) -> Pixels:
        if self.trial.data.cache == "on":
            return self.train_images.pixels
        # The training images are files of any size.
        opened = open_development(self.trial, self.machine, augmented=False, catalogs=self.catalogs, reads=self.reads)
        return opened.train.pixels

    def _some_training_inputs(self) -> Pixels | KeptFeatures:
        """Return at most _NUM_CHECKED training images, evenly over their order, prepared as for evaluation."""
        images = self._training_inputs_for_eval
        return images.select(range(0, len(images), -(-len(images) // _NUM_CHECKED)))

    def _embed(
        self, images: Pixels | KeptFeatures, forward: Callable[[Tensor], Tensor] | None = None
    ) -> NDArray[np.float32]:
        """Embed images, each rank its part of them."""
        num_images = len(images)
        is_shared = num_images >= self.ranks.num_ranks
        rows = embed.embed(
            self.method,
            images.select(np.arange(num_images)[self.ranks.rows(num_images)]) if is_shared else images,
            self.preprocessing,
            device=self.device,
            batch_size=self.machine.evaluation_batch,
            precision=self.trial.precision,
            forward=forward,
        )
        return self.ranks.joined(rows, num_images) if is_shared else rows

    def _set_learning_rates(self, batch: int, num_batches: int) -> None:
        factor = self._rate_factor(batch, num_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def _rate_factor(self, batch: int, num_batches: int) -> float:
        schedule = self.trial.schedule
        factor = learning_rate_factor(
            schedule.name,
            epoch=self.epoch,
            batch=batch,
            num_batches=num_batches,
            num_epochs=self.trial.epochs,
            warmup_epochs=schedule.warmup_epochs,
            **schedule.model_dump(include={"milestones", "gamma"}),
        )
        return factor * (schedule.new_layer_factor if self.epoch < schedule.new_layer_warmup_epochs else 1.0)

    def _step(self, images: Tensor, plan: EpochPlan, position: int) -> tuple[Tensor, Tensor]:
        """Update the parameters once; return the loss and the norm of the gradient, both scalars on the device.

        images: (B, 3, crop, crop) normalised, this rank's rows of the batch of the plan at this position.
        """
        if plan.targets is None:
            labels = self.train_labels[_on(self.device, plan.batches[position])]
        else:
            labels = _on(self.device, plan.targets[position])
        batch = Batch(images, labels, self.epoch, 0 if plan.learners is None else int(plan.learners[position]))
        dtype = embed.AUTOCAST[self.trial.precision]
        self.ranks.num_rows = len(labels)
        with (
            self.randomness.seeded_layers(self.device),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            loss = self.method.batch_loss(batch, self.randomness.mining)
        with without_compiler():
            self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        self.ranks.sum_gradients(
            (p for group in groups if group["name"] == "backbone" for p in group["params"]),
            (p for group in groups if group["name"] != "backbone" for p in group["params"]),
        )
        self.scaler.unscale_(self.optimizer)
        if self.method.idle_parameters_move:
            for parameter in parameters:
                if parameter.grad is None and parameter in self.optimizer.state:
                    parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.trial.optimizer.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.trial.optimizer.gradient_clip, norm)
        with without_compiler():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        return loss.detach(), norm

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the network has the weights that count: their average where the trial has one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _validate(self) -> dict[str, float] | str:
        """Return the validation metrics, or the reason why the trial has to end.

        Where no class validates, there are no metrics, and some training images show whether the trial has diverged.
        """
        has_val = len(self.val_images.labels) > 0
        embeddings = self._embed(self.val_inputs if has_val else self._some_training_inputs())
        return self.ranks.from_first(lambda: self._scores_of(embeddings))

    def _scores_of(self, embeddings: NDArray[np.float32]) -> dict[str, float] | str:
        if not np.isfinite(embeddings).all():
            return "non_finite_loss"  # the last update of the epoch broke the weights
        if is_collapsed(embeddings, device=self.device):
            return "collapsed"  # the order of the neighbours is then that of the files
        if not len(self.val_images.labels):
            return {}
        labels, roles, groups = self.val_images.labels, self.val_images.roles, self.val_images.groups
        protocols = protocols_of(roles, (), groups)
        spec = embed.metric_spec_of(self.trial)
        scores = score_by_all(embeddings, labels, roles, protocols, spec, self.device, groups)
        if self.by_class:
            assert scores.queries is not None  # no protocol of validation classes draws several galleries
            self._class_values = class_values(
                scores.queries, np.asarray(labels), spec, self.trial.select_on.removeprefix("val_")
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the memory of the scores is free for training and for other trials on this GPU
        return {f"val_{name}": value for name, value in scores.metrics.items()}

    def _keep_if_best(self, metrics: Mapping[str, float], epoch: int) -> None:
        select_on = self.trial.select_on
        if not metrics or not self.best_metrics or metrics[select_on] > self.best_metrics[select_on]:
            self.best_epoch, self.best_metrics = epoch, dict(metrics)
            if not self.ranks.is_first:
                return
            self.best_class_values = self._class_values
            self.best_weights = {}  # given back first: a trial holds most memory here, with the copy of its state
            self.best_weights = copy_of(self.method.network.plain_state_dict())


class EpochState:
    """An epoch in which some batches are trained: its plan, the seed of each batch, the sums for its result.

    clustering: the metrics of the clustering before it, with its time.
    """

    def __init__(
        self, plan: EpochPlan, seeds: np.ndarray, device: torch.device, clustering: Mapping[str, float]
    ) -> None:
        self.plan, self.seeds, self.clustering = plan, seeds, dict(clustering)
        self.position = 0
        self.seconds = 0.0
        # The host reads these after the last batch only: each read makes the device wait.
        self.loss_sum = torch.zeros((), device=device)
        self.norm_sum = torch.zeros((), device=device)

    def add(self, loss: Tensor, norm: Tensor, *, seconds: float) -> None:
        """Add one trained batch."""
        self.loss_sum += loss
        self.norm_sum += norm
        self.seconds += seconds
        self.position += 1

    def result(self) -> dict[str, float]:
        """Return the training metrics of the complete epoch. Waits for the device; call it once."""
        num_batches = len(self.plan.batches)
        num_images = sum(len(indices) for indices in self.plan.batches)
        start = time.perf_counter()
        loss_sum, norm_sum = self.loss_sum.item(), self.norm_sum.item()
        self.seconds += time.perf_counter() - start  # a GPU may still have been training
        return {
            "train_loss": loss_sum / num_batches,
            "gradient_norm": norm_sum / num_batches,
            "sampler_coverage": self.plan.coverage,
            "sampler_duplicates": self.plan.num_duplicates,
            "images_per_s": num_images / self.seconds,
            **self.clustering,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the state as arrays, tensors and plain values."""
        return {**vars(self), "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], device: torch.device) -> "EpochState":
        """Return the state of `to_dict`, whose arrays have become tensors."""
        epoch = cls(EpochPlan.from_dict(values["plan"]), values["seeds"].numpy(), device, values["clustering"])
        epoch.position, epoch.seconds = values["position"], values["seconds"]
        epoch.loss_sum, epoch.norm_sum = values["loss_sum"].to(device), values["norm_sum"].to(device)
        return epoch


class _NonFiniteFeatures(ArithmeticError):
    """Training images whose features cannot be clustered: the trial has diverged."""


def _on(device: torch.device, indices: np.ndarray) -> Tensor:
    where = torch.from_numpy(indices)
    return where.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else where
