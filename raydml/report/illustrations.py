"""The pictures of a study's best runs: retrievals, what changed between two runs, failing classes, map, clusters."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.recipe import recipe_of
from raydml.config.trial import Machine, Trial, parse_trial
from raydml.evaluation.protocols import protocols_of
from raydml.evaluation.saved_embeddings import SavedEmbeddings, load_embeddings, save_embeddings
from raydml.images.cache import Images
from raydml.images.pixels import Pixels
from raydml.images.preprocessing import Preprocessing
from raydml.inference.evaluate import embed_as_trained
from raydml.inference.export import load_checkpoint
from raydml.ops.files import write_whole
from raydml.ops.wording import counted
from raydml.report.clusters import (
    KeptClusters,
    central_images,
    draw_clusters,
    largest_clusters,
    read_clusters,
    sample_of_clusters,
)
from raydml.report.embedding_map import draw_embedding_map, draw_image_map, embedding_map
from raydml.report.image_rows import LabelledImages
from raydml.report.mislabelled import suspects, write_suspects
from raydml.report.page import PICTURE_SECTIONS, Illustration
from raydml.report.retrievals import (
    FRAMES_IN_WORDS,
    RankedQueries,
    best_queries,
    changed_queries,
    class_failures,
    draw_class_failures,
    draw_confusions,
    draw_queries,
    draw_sample,
    rank_queries,
    worst_queries,
)
from raydml.training.trial_images import OpenedImages, open_development

INDEX = "illustrations.json"

_NUM_QUERIES, _NUM_CHANGED, _NUM_BY_HEAD = 6, 4, 4
_MAX_IN_CLUSTER = 60
_CLASS, _AUXILIARY = "class head", "auxiliary head"
_AP = "AP@R is 1 where all R images of the query's class come first, and 0 where none of the R nearest is one."
_logger = logging.getLogger("raydml")


def draw_illustrations(
    checkpoints: Mapping[str, Path], machine: Machine, device: str, folder: Path, saved_tests: Sequence[Path] = ()
) -> None:
    """Draw what the networks of these checkpoints do with the validation classes of their own trials.

    Every run gets ``retrievals-<key>.png``, the clusters it keeps (Divide & Conquer, MIC), and its validation
    embeddings as ``embeddings-<key>.npz``. The first run also gets its best and worst retrievals, its failing classes,
    the images that are probably mislabelled, with a table, and a map. The first two runs with the same validation
    classes get the queries on which they differ. Runs with different validation classes are never compared, because the
    classes of the one trained the other. No test image is opened.

    Args:
        checkpoints: key of a run -> its checkpoint folder, best first.
        machine: where the images are and how large a batch may be. device: a torch device string.
        folder: of the pictures; made when missing. ``illustrations.json`` is written last:
            [{"file", "section", "title", "caption", "trial"}] in order of display.
        saved_tests: test embeddings that were saved when the test classes were opened, see `draw_test_illustrations`.

    Raises CheckpointError for a damaged checkpoint, DataError for images other than those of a trial, RetrievalError
    for embeddings with NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Illustration] = []
    opened: dict[str, OpenedImages] = {}
    runs: list[ValidatedRun] = []
    for number, (key, path) in enumerate(checkpoints.items(), start=1):
        _logger.info("illustrates %s, %d of %d", key, number, len(checkpoints))
        run = open_run(key, path, machine, device, opened)
        saved = load_embeddings(save_run(run, folder / f"embeddings-{key}.npz"))
        drawn.append(_sample(run, folder))
        if number == 1:
            drawn += [*_best_and_worst(run, folder), _failures(key, "validation", run.ranked, saved, folder)]
            drawn += [
                *_mislabelled(run, folder),
                *_confusions(run, folder),
                *_maps(key, "validation", saved, folder, run.opened.val.pixels),
            ]
        drawn += _clusters(run, folder)
        runs.append(run)
    pairs = [(one, other) for place, one in enumerate(runs) for other in runs[place + 1 :] if one.validates_as(other)]
    if pairs:
        drawn += _changed(*pairs[0], folder)
    else:
        _logger.info("no two of these runs validate on the same classes: none are compared")
    for saved_test in saved_tests:
        drawn += draw_test_illustrations(saved_test, folder)
    drawn.sort(key=lambda picture: list(PICTURE_SECTIONS).index(picture.section))
    entries = [
        {"file": path.name, "section": section, "title": title, "caption": caption, "trial": key}
        for section, title, caption, key, path in drawn
    ]
    write_whole(folder / INDEX, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


def draw_test_illustrations(saved: Path, folder: Path) -> list[Illustration]:
    """Draw the failing classes and a map of saved test embeddings; no image is opened.

    saved: a file of ``saved_embeddings``, named for its run. Images with roles are searched by these roles.

    Raises SavedEmbeddingsError for a file without embeddings, RetrievalError for NaN.
    """
    key, found = saved.stem, load_embeddings(saved)
    ranked = rank_queries(found.embeddings, found.labels, _roles(found), groups=found.groups)
    return [_failures(key, "test", ranked, found, folder), *_maps(key, "test", found, folder)]


def _sample(run: ValidatedRun, folder: Path) -> Illustration:
    path = folder / f"retrievals-{run.key}.png"
    draw_sample(run.ranked, run.val, path, num_queries=_NUM_QUERIES, seed=run.trial.seed)
    caption = (
        f"Validation queries of {run.name} with their nearest neighbours. Half of them are drawn at random from those "
        f"whose nearest neighbour is right, half from those where it is wrong, if there are enough. {FRAMES_IN_WORDS}"
    )
    return Illustration("retrievals", f"Random queries, {run.key}", caption, run.key, path)


def _best_and_worst(run: ValidatedRun, folder: Path) -> list[Illustration]:
    images, ranked, drawn = run.val, run.ranked, []
    of_all = f"of {counted(len(ranked.queries), 'validation query', 'validation queries')}"
    best = (
        f"The queries of {run.name} with the highest AP@R, of different classes. "
        f"{(ranked.average_precision == 1).mean():.1%} {of_all} find all of their class first."
    )
    worst = (
        f"The queries of {run.name} with the lowest AP@R, of different classes, and what they are mistaken for. "
        f"For {1 - ranked.recall_at_1:.1%} {of_all} the nearest image is of another class."
    )
    for kind, choose, caption in (("best", best_queries, best), ("worst", worst_queries, worst)):
        if places := choose(ranked, images.labels, _NUM_QUERIES):
            path, title = folder / f"retrievals-{kind}-{run.key}.png", f"{kind.capitalize()} queries, {run.key}"
            draw_queries(places, {"": ranked}, images, path, title=title, within_r=kind == "best")
            drawn.append(Illustration("retrievals", title, f"{caption} {_AP} {FRAMES_IN_WORDS}", run.key, path))
    return drawn


def _changed(first: ValidatedRun, second: ValidatedRun, folder: Path) -> list[Illustration]:
    """Draw the queries that are better in the one run, and those that are better in the other."""
    images, drawn = first.val, []
    change = np.nan_to_num(first.ranked.average_precision - second.ranked.average_precision)
    counts = f"{(change > 0).sum():,} of {len(change):,} queries have a higher AP@R in {first.key}, "
    counts += f"{(change < 0).sum():,} in {second.key}."
    gained, lost = changed_queries(first.ranked, second.ranked, images.labels, _NUM_CHANGED)
    for better, worse, places in ((first, second, gained), (second, first, lost)):
        if not places:
            continue
        path = folder / f"changed-better-{better.key}-than-{worse.key}.png"
        title = f"Better in {better.key} than in {worse.key}"
        draw_queries(places, {first.key: first.ranked, second.key: second.ranked}, images, path, title=title)
        caption = (
            f"The validation queries whose AP@R differs most between {first.name} and {second.name}, in favour of "
            f"{better.key}; both validate on the same classes. {counts} {FRAMES_IN_WORDS}"
        )
        drawn.append(Illustration("changed", title, caption, first.key, path))
    return drawn


def _failures(key: str, part: str, ranked: RankedQueries, saved: SavedEmbeddings, folder: Path) -> Illustration:
    failures = class_failures(ranked, saved.labels)
    path, title = folder / f"{_prefix(part)}classes-{key}.png", f"Classes with the lowest Recall@1, {part}, {key}"
    draw_class_failures(failures, saved.class_names, path, title=title, mean_recall_at_1=ranked.recall_at_1)
    num_perfect = sum(not row.num_wrong for row in failures)
    caption = (
        f"The {part} classes that fail most, of {len(failures):,}; {num_perfect:,} have no wrong nearest neighbour. In "
        "brackets is the number of queries. The arrow points to the class that most of the wrong nearest neighbours "
        "are of, with their number."
    )
    return Illustration("classes", title, caption, key, path)


def _confusions(run: ValidatedRun, folder: Path) -> list[Illustration]:
    images = run.val
    failures = class_failures(run.ranked, images.labels)
    if not any(row.num_wrong for row in failures):
        return []
    path, title = folder / f"confusions-{run.key}.png", f"What the worst classes are mistaken for, {run.key}"
    draw_confusions(failures, run.ranked, images, path, title=title)
    caption = (
        f"The classes with the lowest Recall@1 in {run.name}, each with the class that it is most often mistaken for: "
        "queries beside their wrong nearest neighbour, the nearest first. The number is the distance."
    )
    return [Illustration("classes", title, caption, run.key, path)]


def _mislabelled(run: ValidatedRun, folder: Path) -> list[Illustration]:
    """Draw the validation images whose label is probably wrong, and list all of them in a table."""
    images, paths = run.val, run.opened.val.paths
    found = suspects(run.embeddings, images.labels, device=run.device)
    place_of = {int(row): place for place, row in enumerate(run.ranked.queries)}
    places = [place_of[one.row] for one in found if one.row in place_of]
    if not places:
        return []
    table = write_suspects(found, paths, images.class_names, folder / f"mislabelled-{run.key}.csv")
    path, title = folder / f"mislabelled-{run.key}.png", f"Labels to look at, {run.key}"
    draw_queries(places[:_NUM_QUERIES], {"": run.ranked}, images, path, title=title)
    caption = (
        f"{counted(len(found), 'validation image')} of {len(images.labels):,} in {run.name} whose nearest neighbours "
        f"are nearly all of one other class, the clearest first. Some have a wrong label, others only look like that "
        f"class. No image is left out for it. All are listed in illustrations/{table.name}. {FRAMES_IN_WORDS}"
    )
    return [Illustration("labels", title, caption, run.key, path)]


def _maps(
    key: str, part: str, saved: SavedEmbeddings, folder: Path, pixels: Pixels | None = None
) -> list[Illustration]:
    """Draw points in the colours of their classes and, with pixels, the same map made of images."""
    roles, labels = _roles(saved), saved.labels
    found = embedding_map(saved.embeddings, labels)
    path, title = folder / f"{_prefix(part)}map-{key}.png", f"Map of the {part} embedding, {key}"
    draw_embedding_map(found, labels, saved.class_names, path, title=title, roles=roles)
    which = f"All {len(labels):,} {part} images"
    if len(found.rows) < len(labels):
        which = f"{len(found.rows):,} of {len(labels):,} {part} images, the same share of each class"
    caption = (
        f"{which}, placed by {found.method}. Points near each other on the map are near in the embedding; distances "
        "between far groups and the sizes of groups mean nothing. The largest classes have colours."
    )
    hollow = " Filled marks are queries, hollow ones the gallery." if roles and "gallery" in roles else ""
    drawn = [Illustration("map", title, caption + hollow, key, path)]
    if pixels is not None:
        path, title = folder / f"map-of-images-{key}.png", f"The same map, of images, {key}"
        draw_image_map(found, pixels, path, title=title)
        caption = "Each square of a grid over the map shows the image nearest to its middle."
        drawn.append(Illustration("map", title, caption, key, path))
    return drawn


def _roles(saved: SavedEmbeddings) -> tuple[str, ...] | None:
    """Return the roles, if any image has one."""
    return saved.roles if saved.roles is not None and any(saved.roles) else None


def _prefix(part: str) -> str:
    return "" if part == "validation" else f"{part}-"


def _clusters(run: ValidatedRun, folder: Path) -> list[Illustration]:
    """Draw the clusters that a run of Divide & Conquer or MIC keeps and, for MIC, the neighbours by each of its heads.

    At most 8 clusters, and 60 images of each, are embedded.
    """
    images = run.train
    kept = read_clusters(run.checkpoint, run.trial, images.labels)
    if kept is None:
        return []
    numbers = largest_clusters(kept.assignment)
    sampled = sample_of_clusters(kept.assignment, numbers, _MAX_IN_CLUSTER, run.trial.seed)
    points = run.embedded(kept.method, images.pixels.select(sampled), kept.space)
    path = folder / f"clusters-{run.key}.png"
    title = f"Clusters of training images, {run.trial.method.name}, {run.key}"
    draw_clusters(central_images(kept.assignment, images.labels, sampled, points), images, path, title=title)
    num_all = len(np.unique(kept.assignment[kept.assignment >= 0]))
    which = f"The {len(numbers)} largest of {num_all} clusters" if num_all > len(numbers) else f"The {num_all} clusters"
    caption = (
        f"{which} of the training images at the end of {run.name}. Of up to {_MAX_IN_CLUSTER} images drawn from each, "
        f"those nearest to their mean in {kept.space_name}, different classes first."
    )
    drawn = [Illustration("clusters", title, caption, run.key, path)]
    return drawn + (_neighbours_by_head(run, kept, folder) if kept.is_auxiliary else [])


def _neighbours_by_head(run: ValidatedRun, kept: KeptClusters, folder: Path) -> list[Illustration]:
    """Draw the sample recoveries of MIC's release, by the class head and by the auxiliary one.

    The queries are those for which the auxiliary head loses most: they show what this head has learned.
    """
    images, roles = run.val, run.opened.val.roles
    rankings = {}
    for name, forward in ((_CLASS, None), (_AUXILIARY, kept.space)):
        rows = run.embedded(kept.method, images.pixels, forward)
        rankings[name] = rank_queries(rows, images.labels, roles, groups=run.opened.val.groups, device=run.device)
    places, _ = changed_queries(rankings[_CLASS], rankings[_AUXILIARY], images.labels, _NUM_BY_HEAD)
    if not places:
        return []
    path, title = folder / f"heads-{run.key}.png", f"Neighbours by each head, {run.key}"
    draw_queries(places, rankings, images, path, title=title)
    caption = (
        f"Validation queries of {run.name} with their nearest neighbours in the embedding of the classes and in the "
        "auxiliary one, which learns what classes share: the queries for which the latter loses most. Both heads are "
        f"those of the last epoch. MAP@R: {rankings[_CLASS].map_at_r:.3f} by the class head, "
        f"{rankings[_AUXILIARY].map_at_r:.3f} by the auxiliary head. {FRAMES_IN_WORDS}"
    )
    return [Illustration("clusters", title, caption, run.key, path)]


class ValidatedRun(NamedTuple):
    """The best network of a checkpoint and its embeddings of the N validation images of its trial.

    embeddings: (N, D) float32. ranked: every query of these images with its nearest neighbours.
    """

    key: str
    checkpoint: Path
    trial: Trial
    preprocessing: Preprocessing
    machine: Machine
    device: str
    opened: OpenedImages
    embeddings: NDArray[np.float32]
    ranked: RankedQueries

    @property
    def name(self) -> str:
        """``confirm-001 (mic: margin, distance_weighted)``."""
        return f"{self.key} ({recipe_of(self.trial.model_dump(mode='json'))})"

    @property
    def val(self) -> LabelledImages:
        return self._labelled(self.opened.val, self.opened.split.val)

    @property
    def train(self) -> LabelledImages:
        return self._labelled(self.opened.train, self.opened.split.train)

    def _labelled(self, images: Images, class_ids: Sequence[int]) -> LabelledImages:
        names = [self.opened.catalog.class_names[class_id] for class_id in class_ids]
        return LabelledImages(images.pixels, images.labels, names)

    def embedded(
        self, network: nn.Module, pixels: Pixels, forward: Callable[[Tensor], Tensor] | None = None
    ) -> NDArray[np.float32]:
        """Embed images by another network of this trial."""
        return embed_as_trained(self.trial, self.machine, self.device, self.preprocessing, pixels, network, forward)

    def validates_as(self, other: ValidatedRun) -> bool:
        """Return whether both validate on the same images, so that neither has trained on them."""
        one, two = self.opened, other.opened
        same_classes = (one.catalog.content, one.split.val) == (two.catalog.content, two.split.val)
        return same_classes and one.val.paths == two.val.paths


def open_run(
    key: str, checkpoint_folder: Path, machine: Machine, device: str, opened: dict[str, OpenedImages]
) -> ValidatedRun:
    """Embed and search the validation images of a checkpoint's trial.

    device: a torch device string. opened: images that are open already, by the settings they depend on; those of this
    run are added.

    Raises CheckpointError for a damaged checkpoint, DataError for images other than those of the trial, RetrievalError
    for embeddings with NaN.
    """
    model = load_checkpoint(checkpoint_folder)
    network, preprocessing, trial = model.network, model.preprocessing, parse_trial(model.card["trial"])
    images = trial.data.model_dump_json(exclude={"augmentation", "crop_px", "cache"})
    if images not in opened:
        opened[images] = open_development(trial, machine, augmented=False)
    val = opened[images].val
    embeddings = embed_as_trained(trial, machine, device, preprocessing, val.pixels, network)
    ranked = rank_queries(embeddings, val.labels, val.roles, groups=val.groups, device=device)
    return ValidatedRun(
        key, checkpoint_folder, trial, preprocessing, machine, device, opened[images], embeddings, ranked
    )


def save_run(run: ValidatedRun, path: Path) -> Path:
    """Write the validation embeddings of a run as a file of ``saved_embeddings``."""
    val = run.opened.val
    facts = {
        "dataset": run.trial.data.name,
        "part": "val",
        "protocols": list(protocols_of(val.roles, (), val.groups)),
        "recall_at": list(run.trial.recall_at),
        "checkpoint": str(run.checkpoint),
        "trial": run.key,
    }
    names = tuple(run.val.class_names)
    saved = SavedEmbeddings(run.embeddings, val.labels, names, val.paths, val.roles, facts, val.groups)
    return save_embeddings(path, saved)
