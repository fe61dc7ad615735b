"""MIC: Roth, Brattoli and Ommer, Mining Interclass Characteristics for Improved Metric Learning, ICCV 2019."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from raydml.methods._base import Batch, Features, MakeObjective, MakeSampler, Method
from raydml.metrics.clustering import cluster_metrics
from raydml.models.network import Head, Network
from raydml.ops.clustering import LARGEST_SEED, KMeans, cluster
from raydml.ops.distances import full_precision
from raydml.registry import ADDED_LATER, LossSetting, MinerSetting
from raydml.samplers._base import EpochPlan, make_plan
from raydml.samplers._cluster import ClusterGroups

Standardise = Literal["mean", "mstd", "none"]

# The two learners of a batch, in the order in which they take their steps.
_CLASS, _AUXILIARY = 0, 1

# The (source, target) embeddings of the adversary of each direction.
_ADVERSARIES = {"auxiliary_to_class": (_AUXILIARY, _CLASS), "class_to_auxiliary": (_CLASS, _AUXILIARY)}

# A group of images differs in cluster from the two groups before it.
_FEWEST_CLUSTERS = 3

# Windows on a map, as MIC's release has them on the 56 pixels of ResNet50's first stage: 4 by 4 that overlap.
_WINDOW, _STRIDE = 18 / 56, 12 / 56

# A deviation below it is that of a feature which is constant within the class.
_SMALLEST_DEVIATION = 1e-12


class _Adversary(nn.Module):
    """Predicts one embedding of an image from another one; both embeddings learn to defeat it.

    With unit vectors c (target) and s (source) of D dimensions and R(s) = Linear(ReLU(Linear(s))), of unit length too,

        - mean over batch and dimensions of (c * R(s))^2

    the squares being of products of single features, not of the dot product. It is between -1/D and 0. R descends it as
    it is; the gradient of both embeddings is reversed, so that they, and the trunk behind them, ascend it
    (Roth, Brattoli and Ommer, ICCV 2019, in the form of their release).
    """

    def __init__(self, source_dim: int, target_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.predict = nn.Sequential(nn.Linear(source_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, target_dim))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source (B, S), target (B, D), of any length -> scalar, float32 or wider, also under autocast."""
        with torch.autocast(source.device.type, enabled=False):
            known, predicted = (_unit(_reversed(full_precision(points))) for points in (source, target))
            return -(predicted * _unit(self.predict(known))).square().mean()


def _reversed(points: Tensor) -> Tensor:
    """The points themselves, whose gradient arrives times -1. Doubling and subtracting is exact in floating point."""
    return 2 * points.detach() - points


def _unit(points: Tensor) -> Tensor:
    return nn.functional.normalize(points, dim=1)


def window_features(maps: Tensor) -> Tensor:
    """Return the output of a layer as one unit vector an image that keeps the position, in float32 or wider.

    maps: (B, C, H, W) -> (B, C * h * w), the averages over windows of 18/56 of a side every 12/56 of it, rounded to
    whole pixels, without padding; the windows of a channel are adjacent. A side of 56 has 4 windows (and 2 pixels
    that are in none), another one 3 to 5, or each of its pixels where it has fewer. (B, F): these features.
    For 56 by 56 this is what the release of MIC computes (Roth, Brattoli and Ommer, ICCV 2019).
    """
    features = full_precision(maps)
    if features.ndim == 4:
        sides = features.shape[-2:]
        window = [max(1, round(side * _WINDOW)) for side in sides]
        stride = [max(1, round(side * _STRIDE)) for side in sides]
        features = nn.functional.avg_pool2d(features, window, stride).flatten(1)
    return nn.functional.normalize(features, dim=1)


def standardise_by_class(features: NDArray[np.float32], labels: NDArray[np.int64], how: Standardise) -> None:
    """Remove from features (N, F), in place, the information on the class of their image: labels (N,).

    "mean" subtracts the mean of the class; "mstd" also divides by its deviation (of the population), feature by
    feature; "none" does nothing. Lengths are not made 1 again. In place because N * F is 1 GB on SOP.

    MIC's release subtracts the mean only; according to secondary sources (unchecked) its paper also divides. Departures
    from the release: a feature that is constant within a class (as in a class of one image) is 0 after "mstd", not NaN;
    "none" does nothing, where the release does "mean"; sums are float64.
    """
    if how == "none":
        return
    by_class = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[by_class], return_index=True)
    for rows in np.split(by_class, starts[1:]):
        own = features[rows].astype(np.float64)
        own -= own.mean(axis=0)
        if how == "mstd":
            deviation = own.std(axis=0)
            own /= np.where(deviation < _SMALLEST_DEVIATION, 1, deviation)
        features[rows] = own


class _Step(NamedTuple):
    """One optimiser step: images (B,) row numbers, targets (B,), learner."""

    images: np.ndarray
    targets: np.ndarray
    learner: int


def _groups_of_clusters(
    train_labels: np.ndarray, batch_size: int, images_per_cluster: int, label_noise: float
) -> ClusterGroups:
    """Return the sampler for batches of as many whole groups as fit into batch_size."""
    num_groups = _groups_in(min(batch_size, len(train_labels)), images_per_cluster)
    return ClusterGroups(
        train_labels,
        batch_size=num_groups * images_per_cluster,
        images_per_cluster=images_per_cluster,
        random_cluster_probability=label_noise,
    )


def _groups_in(batch_size: int, images_per_cluster: int) -> int:
    num_groups = batch_size // images_per_cluster
    if num_groups < 2:
        raise ValueError(
            f"images_per_cluster = {images_per_cluster}: two groups of this size are larger than a batch of "
            f"{batch_size} images; give at most {batch_size // 2}, or the sampler a larger batch"
        )
    return num_groups


class MIC(Method):
    """MIC: an auxiliary head learns properties that classes share, so that the class head need not.

    The network has two heads on one trunk. The class head learns the classes, and it alone makes the embeddings of the
    trained model. The auxiliary head learns pseudo-labels. Each batch trains one head in one step of the optimiser on

        objective of the head + adversarial_weight * _Adversary of both embeddings of the same images

    or, with direction "both", on the terms of two adversaries, each with its own weight.

    Pseudo-labels are k-means clusters. The first clustering uses the output of ``initial_layer`` for the training
    images, averaged over windows, normalised to length 1 and standardised within each class. Before every
    recluster_every-th epoch, the normalised auxiliary embeddings are clustered again, into as many clusters as were not
    empty in the first clustering. The numbers of clusters are not matched to those before, as in the release: a
    parameter of cluster 7, such as its margin, then belongs to another cluster.

    In an epoch, each batch of the trial's sampler is paired with a batch of ClusterGroups of the same size (rounded
    down to whole groups). Each of the two is trained with its own probability, the class batch first. Cluster batches
    are not mirrored. Adam's momentum also moves the parameters that a step does not use.

    Defaults are those of the release for CUB. For other data the release sets num_clusters, adversarial_weight and
    auxiliary_probability as follows: Cars 150, 500, 0.8; In-Shop 150, 250, 0.8; SOP and VehicleID 50, 250, 0.5.

    Departures from the release:
    - The auxiliary objective has num_clusters classes, also where some clusters are empty.
    - With fewer than 3 clusters that are not empty, only the classes are trained until the next clustering. If it was
      the first clustering, the next one makes num_clusters clusters again.
    - An epoch in which no batch is drawn trains its first class batch.
    - Where the sampler has more batches than ClusterGroups, ClusterGroups are planned again.
    - The auxiliary head is built like the class head (layer norm, dropout, projection, head_init, normalisation), with
      projection "linear" where the class head has none, because its dimension may differ. It has the loss and the miner
      of the trial, or its own, but no regulariser.
    - The parameters of both losses have one learning rate; the release has one of each task.

    Raises ValueError where a batch has no room for two groups.
    """

    idle_parameters_move: ClassVar[bool] = True

    surrogate_labels: Tensor
    num_initial_clusters: Tensor

    def __init__(
        self,
        network: Network,
        train_labels: np.ndarray,
        make_objective: MakeObjective,
        make_sampler: MakeSampler,
        *,
        num_clusters: Annotated[
            int, Field(ge=3, description="number of pseudo-classes; 30 on CUB, 150 on Cars and In-Shop, 50 on SOP")
        ] = 30,
        auxiliary_dim: Annotated[
            int | None, Field(ge=1, description="dimensions of the auxiliary embedding; null: model.embedding_dim")
        ] = None,
        class_probability: Annotated[
            float, Field(gt=0, le=1, description="share of the class batches that are trained")
        ] = 1.0,
        auxiliary_probability: Annotated[
            float, Field(gt=0, le=1, description="share of the cluster batches that are trained; 0.5 on SOP")
        ] = 0.8,
        images_per_cluster: Annotated[
            int, Field(ge=1, description="images of one cluster in a group of a cluster batch")
        ] = 4,
        label_noise: Annotated[
            float,
            Field(
                ge=0, le=1, description="share of a group's images that come from a random cluster; 0.2 in the release"
            ),
        ] = 0.2,
        recluster_every: Annotated[
            int, Field(ge=1, description="epochs between clusterings; 4 in the release (which says 3 and adds 1)")
        ] = 4,
        standardise: Annotated[
            Standardise,
            Field(description="initial features of a class: mean subtracts the mean (release), mstd also divides"),
        ] = "mean",
        standardise_updates: Annotated[
            bool, Field(description="standardise also the auxiliary embeddings before they are clustered")
        ] = False,
        initial_layer: Annotated[
            Literal["stage1", "stage2", "stage3", "stage4", "pooled"],
            Field(description="layer of the backbone whose output is clustered first"),
        ] = "stage1",
        direction: Annotated[
            Literal["auxiliary_to_class", "class_to_auxiliary", "both"],
            Field(description="source and target of the adversary's prediction; auxiliary_to_class in the paper"),
        ] = "auxiliary_to_class",
        adversarial_weight: Annotated[
            float, Field(ge=0, description="2500 on CUB, 500 on Cars, 250 on SOP and In-Shop; 0: no adversary")
        ] = 2500.0,
        class_to_auxiliary_weight: Annotated[
            float | None,
            ADDED_LATER,
            Field(ge=0, description="with direction both, of that adversary; null: adversarial_weight"),
        ] = None,
        adversary_dim: Annotated[int, Field(ge=1, description="width of an adversary's hidden layer")] = 512,
        adversary_weight_decay: Annotated[float, Field(ge=0, description="weight decay of the adversary")] = 1e-6,
        auxiliary_loss: Annotated[
            LossSetting | None,
            ADDED_LATER,
            Field(description="loss of the auxiliary head, a block as the key loss has it; null: that of the trial"),
        ] = None,
        auxiliary_miner: Annotated[
            MinerSetting | None,
            ADDED_LATER,
            Field(description="its miner, a block; null: that of the trial, or none for a loss from labels alone"),
        ] = None,
        auxiliary_flip: Annotated[
            bool, Field(description="mirror the images of cluster batches too; false in the release")
        ] = False,
        kmeans_iterations: Annotated[int, Field(ge=1, description="k-means: number of iterations")] = 25,
        kmeans_restarts: Annotated[
            int, Field(ge=1, description="k-means: number of runs, of which the best counts")
        ] = 1,
        kmeans_points_per_centroid: Annotated[
            int, Field(ge=1, description="k-means: largest number of training images a cluster")
        ] = 256,
        kmeans_spherical: Annotated[bool, Field(description="k-means: centroids of length 1")] = False,
        kmeans_seed: Annotated[
            int, Field(ge=0, le=LARGEST_SEED, description="k-means: seed of the first centroids")
        ] = 1234,
    ) -> None:
        classes = make_sampler(train_labels)
        super().__init__(network, {"classes": classes})
        # Not among the samplers, whose states are saved: its state is the pseudo-labels, which are saved.
        self.groups = _groups_of_clusters(train_labels, classes.batch_size, images_per_cluster, label_noise)
        head = network.head
        dims = (head.embedding_dim, auxiliary_dim or head.embedding_dim)
        blocks = {"loss": auxiliary_loss, "miner": auxiliary_miner}
        of_auxiliary = {name: block for name, block in blocks.items() if block is not None}
        self.objectives = nn.ModuleList(
            [
                make_objective(int(train_labels.max()) + 1, dims[_CLASS]),
                make_objective(num_clusters, dims[_AUXILIARY], with_regularizers=False, **of_auxiliary),
            ]
        )
        projection = "linear" if head.linear is None else head.settings["projection"]
        self.auxiliary_head = Head(head.feature_dim, dims[_AUXILIARY], **{**head.settings, "projection": projection})
        weights = dict.fromkeys(_ADVERSARIES if direction == "both" else (direction,), adversarial_weight)
        if class_to_auxiliary_weight is not None:
            weights["class_to_auxiliary"] = class_to_auxiliary_weight
        self.directions = [(*_ADVERSARIES[name], weight) for name, weight in weights.items() if weight > 0]
        self.adversaries = nn.ModuleList(
            _Adversary(dims[source], dims[target], adversary_dim) for source, target, _ in self.directions
        )
        self.adversary_weight_decay = adversary_weight_decay
        self.train_labels = train_labels
        self.num_clusters = num_clusters
        self.probabilities = class_probability, auxiliary_probability
        self.recluster_every = recluster_every
        self.standardise, self.standardise_updates = standardise, standardise_updates
        self.initial_layer = initial_layer
        self.auxiliary_flip = auxiliary_flip
        self.kmeans = KMeans(
            kmeans_iterations, kmeans_restarts, kmeans_points_per_centroid, kmeans_spherical, kmeans_seed
        )
        # Checkpoints hold the pseudo-labels under this older name: studies interrupted before the rename resume.
        self.register_buffer("surrogate_labels", torch.full((len(train_labels),), -1))
        self.register_buffer("num_initial_clusters", torch.zeros((), dtype=torch.int64))  # 0: not clustered yet

    @property
    def pseudo_labels(self) -> Tensor:
        """Pseudo-labels (N,) of the training images; -1 before the first clustering."""
        return self.surrogate_labels

    @classmethod
    def check_settings(cls, sampler: Mapping[str, Any], **settings: Any) -> None:
        if settings["standardise_updates"] and settings["standardise"] == "none":
            raise ValueError(
                "standardise_updates = true, standardise = none: there is nothing to standardise; write "
                "standardise_updates: false, or standardise: mean or mstd"
            )
        if settings["direction"] != "both":
            reason = f"direction {settings['direction']} has one adversary, whose weight is adversarial_weight"
            cls.refuse_without_effect(settings, ("class_to_auxiliary_weight",), reason)
        if settings["adversarial_weight"] == 0 and not settings.get("class_to_auxiliary_weight"):
            of_adversary = ("direction", "adversary_dim", "adversary_weight_decay")
            cls.refuse_without_effect(settings, of_adversary, "with adversarial_weight = 0 there is no adversary")
        if sampler["batch_size"] is not None:
            _groups_in(sampler["batch_size"], settings["images_per_cluster"])

    @classmethod
    def expected_steps(cls, batches_per_epoch: int, **settings: Any) -> float:
        """Each batch is trained with its own probability; there are as many of clusters as of classes."""
        shares: float = settings["class_probability"] + settings["auxiliary_probability"]
        return batches_per_epoch * shares

    @classmethod
    def cut_to(cls, batch_size: int, **settings: Any) -> dict[str, Any]:
        return {**settings, "images_per_cluster": min(settings["images_per_cluster"], max(1, batch_size // 2))}

    def time_to_recluster(self, epoch: int) -> bool:
        return epoch % self.recluster_every == 0

    def recluster(self, features: Features, epoch: int, device: torch.device) -> dict[str, float]:  # noqa: ARG002
        """Make new pseudo-labels, the first ones from the initial layer.

        Returns ``cluster_metrics`` (their NMI with the classes should be low) and auxiliary_off,
        1 where there are too few clusters to train on.
        """
        num_initial = int(self.num_initial_clusters)
        initial = num_initial == 0
        if initial:
            points = features(self._initial_features, inner_layers=True)
        else:
            points = features(self._auxiliary_embeddings)
        if initial or self.standardise_updates:
            standardise_by_class(points, self.train_labels, self.standardise)
        num_clusters = num_initial if num_initial >= _FEWEST_CLUSTERS else self.num_clusters
        clusters = cluster(points, num_clusters, self.kmeans, device).assignment
        num_found = len(np.unique(clusters))
        previous = None if initial else self.pseudo_labels.cpu().numpy()
        metrics = cluster_metrics(clusters, self.train_labels, previous, self.num_clusters)
        self.pseudo_labels.copy_(torch.from_numpy(clusters))
        if initial:
            self.num_initial_clusters.fill_(num_found)
        return {**metrics, "auxiliary_off": float(num_found < _FEWEST_CLUSTERS)}

    def _initial_features(self, images: Tensor) -> Tensor:
        return window_features(self.network.layer(images, self.initial_layer))

    def _auxiliary_embeddings(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.auxiliary_head(self.network.features(images)), dim=1)

    def plan_epoch(self, epoch: int, generator: np.random.Generator) -> EpochPlan:  # noqa: ARG002
        assert int(self.num_initial_clusters) > 0, "recluster before the first epoch"
        images = self.samplers["classes"].plan(generator).batches
        for_classes = [_Step(rows, self.train_labels[rows], _CLASS) for rows in images]
        for_clusters = self._steps_for_clusters(generator)
        steps = []
        for step, taken in zip(for_classes, generator.random((len(images), 2)) < self.probabilities, strict=True):
            pair = (step, next(for_clusters, None))
            steps += [each for each, runs in zip(pair, taken, strict=True) if runs and each is not None]
        steps = steps or for_classes[:1]
        learners = np.array([step.learner for step in steps])
        return make_plan(
            [step.images for step in steps],
            len(self.train_labels),
            learners=learners,
            targets=[step.targets for step in steps],
            flip=None if self.auxiliary_flip else learners == _CLASS,
        )

    def _steps_for_clusters(self, generator: np.random.Generator) -> Iterator[_Step]:
        """Yield cluster steps without end; none where there are too few clusters."""
        pseudo_labels = self.pseudo_labels.cpu().numpy()
        if len(np.unique(pseudo_labels)) < _FEWEST_CLUSTERS:
            return
        self.groups.assign(pseudo_labels)
        while True:
            plan = self.groups.plan(generator)
            assert plan.targets is not None
            for rows, targets in zip(plan.batches, plan.targets, strict=True):
                yield _Step(rows, targets, _AUXILIARY)

    def batch_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        features = self.network.features(batch.images)
        embeddings = (self.network.head(features), self.auxiliary_head(features))
        loss: Tensor = self.objectives[batch.learner](embeddings[batch.learner], batch.labels, generator)
        for adversary, (source, target, weight) in zip(self.adversaries, self.directions, strict=True):
            loss = loss + weight * adversary(embeddings[source], embeddings[target])
        return loss

    def embed(self, images: Tensor) -> Tensor:
        return self.network(images)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().parameter_groups()
        heads = [*groups["head"], *self.auxiliary_head.parameters()]
        return {**groups, "head": heads, "adversary": list(self.adversaries.parameters())}

    def weight_decays(self) -> dict[str, float]:
        return {"adversary": self.adversary_weight_decay}
