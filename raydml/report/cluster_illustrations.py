"""What a run clustered while it trained, and what MIC's two heads find: pictures with captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raydml.report.clusters import central_images, draw_clusters, largest_clusters, sample_of_clusters
from raydml.report.kept_clusters import KeptClusters, read_clusters
from raydml.report.ranked_queries import rank_queries
from raydml.report.retrievals import FRAMES_IN_WORDS, NUM_NEIGHBOURS, changed_queries, draw_two_rankings
from raydml.report.style import Picture
from raydml.report.validated_run import ValidatedRun

_MAX_IN_CLUSTER, _NUM_QUERIES = 60, 4
_CLASS, _AUXILIARY = "class head", "auxiliary head"


def illustrate_clusters(run: ValidatedRun, folder: Path) -> list[Picture]:
    """The gallery of the clusters that a run of Divide & Conquer or MIC keeps, and for MIC the neighbours by each of
    its heads; nothing of another run. At most 8 clusters, and 60 images of each, are embedded."""
    images = run.train
    kept = read_clusters(run.checkpoint, run.trial, images.labels)
    if kept is None:
        return []
    kept.method.to(run.device)
    numbers = largest_clusters(kept.assignment)
    sampled = sample_of_clusters(kept.assignment, numbers, _MAX_IN_CLUSTER, run.trial.seed)
    points = run.embedded(kept.method, images.pixels.select(sampled), kept.space)
    path = folder / f"clusters-{run.key}.png"
    title = f"Clusters of training images, {run.trial.method.name}, {run.key}"
    draw_clusters(central_images(kept.assignment, images.labels, sampled, points), images, path, title=title)
    num_all = len(np.unique(kept.assignment[kept.assignment >= 0]))
    which = f"The {len(numbers)} largest of {num_all} clusters" if num_all > len(numbers) else f"The {num_all} clusters"
    caption = (
        f"{which} of the training images as {run.name} kept them at its end. Of up to {_MAX_IN_CLUSTER} images drawn "
        f"from each, those nearest to their mean in {kept.space_name}, of different classes first."
    )
    return [Picture(path, title, caption), *(_neighbours_by_head(run, kept, folder) if kept.is_auxiliary else [])]


def _neighbours_by_head(run: ValidatedRun, kept: KeptClusters, folder: Path) -> list[Picture]:
    """The sample recoveries of MIC's release, by the class head and by the auxiliary one.

    Shown are the queries that the auxiliary head does most harm to: there one sees what it looks at.
    """
    images, roles = run.val, run.opened.val.roles
    rankings = {}
    for name, forward in ((_CLASS, None), (_AUXILIARY, kept.space)):
        rows = run.embedded(kept.method, images.pixels, forward)
        rankings[name] = rank_queries(rows, images.labels, roles, num_neighbours=NUM_NEIGHBOURS, device=run.device)
    places, _ = changed_queries(rankings[_CLASS], rankings[_AUXILIARY], images.labels, _NUM_QUERIES)
    if not places:
        return []
    path, title = folder / f"heads-{run.key}.png", f"Neighbours by each head, {run.key}"
    draw_two_rankings(places, rankings, images, path, title=title)
    caption = (
        f"Validation queries of {run.name} with their nearest neighbours in the embedding of the classes and in the "
        "auxiliary one, which learns what classes share: where the latter loses most. Both heads are those of the last "
        f"epoch. MAP@R: {rankings[_CLASS].map_at_r:.3f} by the class head, {rankings[_AUXILIARY].map_at_r:.3f} by the "
        f"auxiliary head. {FRAMES_IN_WORDS}"
    )
    return [Picture(path, title, caption)]
