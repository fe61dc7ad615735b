"""Divide & Conquer: Sanakoyeu et al., Divide and Conquer the Embedding Space for Metric Learning, CVPR 2019."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from raydml.data.catalog import DataError
from raydml.methods._base import Batch, Features, MakeObjective, MakeSampler, Method, Objective
from raydml.metrics.clustering import cluster_metrics
from raydml.models.network import Network, normalised
from raydml.ops.clustering import LARGEST_SEED, KMeans, cluster, match_to_previous, without_singletons
from raydml.ops.distances import full_precision
from raydml.samplers._base import EpochPlan, Sampler
from raydml.samplers._cluster import ClusterRoundRobin, PerCluster, cluster_sampler, clusters_of_two_classes

# The settings of clustering.
_OF_CLUSTERING = (
    *("recluster_every", "full_embedding_from", "release_matching", "kmeans_iterations", "kmeans_restarts"),
    *("kmeans_points_per_centroid", "kmeans_spherical", "kmeans_seed"),
)


class DivideConquer(Method):
    """Divide & Conquer: each of K learners trains one slice of the embedding on one cluster of the training images.

    k-means on the unit features of the backbone makes K clusters. A batch comes from one cluster, and its loss uses the
    slice of the learner of that cluster only. Before every recluster_every-th epoch the images are clustered again, and
    each new cluster gets the number of the old cluster that it overlaps most. An image that is the only one of its
    class in its cluster is left out until the next clustering. The embedding is the concatenation of all slices, each
    of length 1.

    Phases, with E epochs counted from 0 and f = round(finetune_from * E). From epoch f on ("finetuning") all images are
    one cluster, of learner 0, and no clustering takes place. From the first epoch >= f * full_embedding_from on, the
    loss uses the whole embedding as in evaluation, normalised by the head's rule as one slice (to length 1, or to a
    mean distance of 1); up to f its batches still come from one cluster. The release has the constant 8/19 for this
    switch: epochs 80 and 190 of 200. finetune_from 1 never finetunes, 0 never clusters; full_embedding_from 1 uses the
    whole embedding in finetuning only, 0 always. A short run may round to f = 0 or f = E, which is the same as 0 or 1.
    num_learners 1 is the baseline: no clustering, and the trial's own sampler and objective train the embedding.
    Settings without effect are refused.

    Objectives: each learner has its own loss, miner and regularisers, for all classes and D / K dimensions. The whole
    embedding is trained with the objective of the learner where all its parameters and buffers have the same shapes for
    D dimensions (margin, triplet), as in the release. Otherwise (proxies, class vectors) one objective for D dimensions
    serves the batches of all clusters. An objective that no epoch uses is not made.

    The trial's sampler forms the batches within a cluster; the release uses class_balanced with 20 classes of 4 images.
    Each cluster gives as many batches as fit into the largest cluster, so batches_per_epoch of the sampler is refused
    (the default of random_classes, 100, has no effect). Where no cluster has two classes, all images are one cluster,
    of learner 0, until the next clustering.

    Departures from the release: images are matched as intended, new number to old, unless release_matching selects its
    inverse permutation, and clusters too small for a batch are repeated instead of ending the epoch.

    Raises DataError for K > 1 and a single class, and for what the trial's sampler refuses of all the images.
    """

    clusters: Tensor

    def __init__(
        self,
        network: Network,
        train_labels: np.ndarray,
        num_epochs: int,
        make_objective: MakeObjective,
        make_sampler: MakeSampler,
        *,
        num_learners: Annotated[
            int, Field(ge=1, description="K, slices of the embedding and clusters; 8 in the release, 1 = the baseline")
        ] = 8,
        recluster_every: Annotated[int, Field(ge=1, description="epochs between clusterings; 2 in the release")] = 2,
        finetune_from: Annotated[
            float,
            Field(ge=0, le=1, description="share of the epochs after which all images are one cluster; 190 of 200"),
        ] = 0.95,
        full_embedding_from: Annotated[
            float,
            Field(ge=0, le=1, description="share of the epochs before finetuning that train slices; 8/19, 80 of 190"),
        ] = 8 / 19,
        release_matching: Annotated[
            bool, Field(description="number new clusters by the inverse permutation, as the release does by mistake")
        ] = False,
        kmeans_iterations: Annotated[
            int, Field(ge=1, description="k-means: number of iterations; 100 in the release")
        ] = 100,
        kmeans_restarts: Annotated[
            int,
            Field(ge=1, description="k-means: number of runs, of which the best counts; 1 in effect in the release"),
        ] = 1,
        kmeans_points_per_centroid: Annotated[
            int,
            Field(ge=1, description="k-means: largest number of training images a cluster; 10^7 (all) in the release"),
        ] = 10_000_000,
        kmeans_spherical: Annotated[
            bool, Field(description="k-means: centroids of length 1; false in the release")
        ] = False,
        kmeans_seed: Annotated[
            int,
            Field(
                ge=0,
                le=LARGEST_SEED,
                description="k-means: seed, the same at each clustering so that numbers change little; 1234",
            ),
        ] = 1234,
    ) -> None:
        labels = np.asarray(train_labels)
        assert network.head.num_slices == num_learners, "the network is built with network_arguments()"
        if num_learners > 1 and (labels == labels[0]).all():
            raise DataError("method divide_conquer: all training images are of one class; give data of at least two")
        timeline = _timeline(num_epochs, num_learners, finetune_from, full_embedding_from)
        super().__init__(network, _samplers(labels, timeline, num_learners, make_sampler))
        learners, whole = _objectives(
            make_objective, int(labels.max()) + 1, network.head.embedding_dim, num_learners, timeline
        )
        self.objectives = nn.ModuleList(learners)
        self.whole_objective = whole
        self.num_learners = num_learners
        self.timeline = timeline
        self.recluster_every = recluster_every
        self.release_matching = release_matching
        self.kmeans = KMeans(
            iterations=kmeans_iterations,
            restarts=kmeans_restarts,
            max_points_per_centroid=kmeans_points_per_centroid,
            spherical=kmeans_spherical,
            seed=kmeans_seed,
        )
        self._train_labels = labels
        self.register_buffer("clusters", torch.full((len(labels),), -1))

    @classmethod
    def network_arguments(cls, **settings: Any) -> dict[str, Any]:
        """A slice for each learner, normalised on its own."""
        return {"num_slices": settings["num_learners"]}

    @classmethod
    def check_settings(cls, sampler: Mapping[str, Any], **settings: Any) -> None:
        if settings["num_learners"] == 1:
            reason = "num_learners = 1 is the baseline, which clusters nothing"
            cls.refuse_without_effect(settings, ("finetune_from", *_OF_CLUSTERING), reason)
            return
        if settings["finetune_from"] == 0:
            cls.refuse_without_effect(settings, _OF_CLUSTERING, "with finetune_from = 0 nothing is clustered")
        if "batches_per_epoch" in sampler:
            raise ValueError(
                f"sampler.batches_per_epoch = {sampler['batches_per_epoch']} has no effect: an epoch of num_learners = "
                f"{settings['num_learners']} is as long as its largest cluster needs; remove it"
            )

    def time_to_recluster(self, epoch: int) -> bool:
        return epoch < self.timeline.finetune and epoch % self.recluster_every == 0

    def recluster(self, features: Features, epoch: int, device: torch.device) -> dict[str, float]:  # noqa: ARG002
        """Cluster the training images, match the numbers to those before, and form the next epochs' batches from them.

        Returns `cluster_metrics` of the clusters, and: num_singletons, images left out; clusters_skipped,
        those that give no batch because fewer than two classes are left in them; clusters_resampled, those too small
        for the trial's sampler, in whose batches classes are repeated.
        """
        points = features(self._clustering_features)
        found = cluster(points, self.num_learners, self.kmeans, device).assignment
        last = self.clusters.cpu().numpy()
        previous = last if (last >= 0).any() else None
        if previous is not None:
            found = match_to_previous(found, previous, self.num_learners, release_matching=self.release_matching)
        metrics = cluster_metrics(found, self._train_labels, previous, self.num_learners)
        kept = without_singletons(found, self._train_labels)
        self.clusters.copy_(torch.from_numpy(kept))
        sampler = self.samplers["clusters"]
        assert isinstance(sampler, ClusterRoundRobin | PerCluster)
        num_served = len(clusters_of_two_classes(kept, self._train_labels))
        sampler.assign(_trainable(kept, num_served))
        return {
            **metrics,
            "num_singletons": float(np.count_nonzero(kept < 0)),
            "clusters_skipped": float(len(np.unique(found)) - num_served),
            "clusters_resampled": float(sampler.num_resampled),
        }

    def plan_epoch(self, epoch: int, generator: np.random.Generator) -> EpochPlan:
        return self.samplers["clusters" if epoch < self.timeline.finetune else "images"].plan(generator)

    def batch_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        if batch.epoch < self.timeline.full:
            of_learner = self.network(batch.images).chunk(self.num_learners, dim=1)[batch.learner]
            return self.objectives[batch.learner](of_learner, batch.labels, generator)
        objective = self.objectives[batch.learner] if self.whole_objective is None else self.whole_objective
        return objective(self._as_one_slice(batch.images), batch.labels, generator)

    def _as_one_slice(self, images: Tensor) -> Tensor:
        """Return the whole embedding (B, D) as the loss uses it."""
        if self.num_learners == 1:
            return self.network(images)
        head = self.network.head
        # Slices as evaluation weighs them against each other: mean_distance would scale each by itself in training.
        projected = head.project(self.network.features(images))
        slices = normalised(projected, head.normalize, self.num_learners, training=False)
        return normalised(slices, head.normalize, 1, training=head.training)

    def embed(self, images: Tensor) -> Tensor:
        return self.network(images)

    def _clustering_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the features of the backbone at length 1, (B, F)."""
        return nn.functional.normalize(full_precision(self.network.features(images)), dim=1)


class _Timeline(NamedTuple):
    """The first epoch with a loss on the whole embedding, the first of finetuning, and the one after the last."""

    full: int
    finetune: int
    end: int


def _timeline(num_epochs: int, num_learners: int, finetune_from: float, full_embedding_from: float) -> _Timeline:
    # A single learner has nothing to divide: all its epochs are like those of finetuning.
    finetune = round(finetune_from * num_epochs) if num_learners > 1 else 0
    # Products like 19 * (8 / 19) need not be whole in floating point.
    return _Timeline(math.ceil(round(finetune * full_embedding_from, 9)), finetune, num_epochs)


def _samplers(
    labels: np.ndarray, timeline: _Timeline, num_learners: int, make_sampler: MakeSampler
) -> dict[str, Sampler]:
    """ "clusters" for the epochs before finetuning and "images" for the others, where there are such epochs."""
    if num_learners == 1:
        return {"images": make_sampler(labels)}
    samplers: dict[str, Sampler] = {}
    if timeline.finetune > 0:
        samplers["clusters"] = cluster_sampler(labels, make_sampler)
    if timeline.finetune < timeline.end:
        together = cluster_sampler(labels, make_sampler)
        everything = without_singletons(np.zeros(len(labels), dtype=np.int64), labels)
        together.assign(_trainable(everything, len(clusters_of_two_classes(everything, labels))))
        samplers["images"] = together
    return samplers


def _trainable(clusters: np.ndarray, num_served: int) -> np.ndarray:
    """These clusters (N,), or one of all images where none of them has two classes."""
    return clusters if num_served else np.zeros_like(clusters)


def _objectives(
    make_objective: MakeObjective, num_classes: int, embedding_dim: int, num_learners: int, timeline: _Timeline
) -> tuple[list[Objective], Objective | None]:
    """One for each learner, and one for the whole embedding where those of the learners do not fit it."""
    if timeline.finetune == 0:
        return [make_objective(num_classes, embedding_dim)], None
    learners = [make_objective(num_classes, embedding_dim // num_learners) for _ in range(num_learners)]
    if timeline.full >= timeline.end:
        return learners, None
    whole = make_objective(num_classes, embedding_dim)
    if _shapes(whole) == _shapes(learners[0]):
        return learners, None
    return (learners if timeline.full > 0 else []), whole


def _shapes(objective: Objective) -> dict[str, torch.Size]:
    named = [*objective.named_parameters(), *objective.named_buffers()]
    return {name: values.shape for name, values in named}
