"""The pictures of a study's best runs: retrievals, what changed between two runs, failing classes, map, clusters."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from raydml.config.trial import Machine
from raydml.evaluation.saved_embeddings import SavedEmbeddings, load_embeddings
from raydml.images.pixels import Pixels
from raydml.ops.files import write_whole
from raydml.report.class_failures import class_failures, draw_class_failures, draw_confusions
from raydml.report.cluster_illustrations import illustrate_clusters
from raydml.report.embedding_map import draw_embedding_map, draw_image_map, embedding_map
from raydml.report.ranked_queries import RankedQueries, rank_queries
from raydml.report.retrievals import (
    FRAMES_IN_WORDS,
    NUM_NEIGHBOURS,
    best_queries,
    changed_queries,
    draw_queries,
    draw_two_rankings,
    sample_retrievals,
    worst_queries,
)
from raydml.report.style import Picture, counted
from raydml.report.validated_run import ValidatedRun, open_run, save_run
from raydml.training.trial_images import OpenedImages

INDEX = "illustrations.json"
SECTIONS = ("retrievals", "changed", "classes", "map", "clusters")  # in order of display

_NUM_QUERIES, _NUM_CHANGED = 6, 4
_AP = "AP@R is 1 where all R images of the query's class come first, and 0 where none of the R nearest is one."
_logger = logging.getLogger("raydml")


def illustrate(
    checkpoints: Mapping[str, Path], machine: Machine, device: str, folder: Path, saved_tests: Sequence[Path] = ()
) -> None:
    """Draw what the networks of these checkpoints do with the validation classes of their own trials.

    Of every run: ``retrievals-<key>.png``, the clusters it keeps (Divide & Conquer, MIC), and its validation embeddings
    as ``embeddings-<key>.npz``. Of the first alone: best and worst retrievals, failing classes, map. Of the first two
    with the same validation classes: the queries on which they differ; runs whose validation classes differ are never
    compared, because what validates one has trained the other. No test image is opened.

    Args:
        checkpoints: key of a run -> its checkpoint folder, best first.
        machine: where the images lie and how large a batch may be. device: where to run, a torch device string.
        folder: where the pictures go; made when missing. ``illustrations.json`` is written last, whole or not at all:
            [{"file", "section", "title", "caption", "trial"}] in order of display.
        saved_tests: test embeddings that were saved when the test classes were opened, see `illustrate_test`.

    Raises CheckpointError for a damaged checkpoint, DataError for images other than those of a trial, RetrievalError
    for embeddings that hold NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, str]] = []
    opened: dict[str, OpenedImages] = {}
    runs: list[ValidatedRun] = []
    for number, (key, path) in enumerate(checkpoints.items(), start=1):
        _logger.info("illustrates %s, %d of %d", key, number, len(checkpoints))
        run = open_run(key, path, machine, device, opened, num_neighbours=NUM_NEIGHBOURS)
        saved = load_embeddings(save_run(run, folder / f"embeddings-{key}.npz"))
        entries += _entries("retrievals", key, _sampled(run, folder))
        if number == 1:
            entries += _entries("retrievals", key, _best_and_worst(run, folder))
            bars = _bars(key, "validation", run.ranked, saved, folder)
            entries += _entries("classes", key, [bars, *_confusions(run, folder)])
            entries += _entries("map", key, _map(key, "validation", saved, folder, run.opened.val.pixels))
        entries += _entries("clusters", key, illustrate_clusters(run, folder))
        runs.append(run)
    pairs = [(one, other) for place, one in enumerate(runs) for other in runs[place + 1 :] if one.validates_as(other)]
    if pairs:
        entries += _entries("changed", pairs[0][0].key, _changed(*pairs[0], folder))
    else:
        _logger.info("no two of these runs validate on the same classes: none are compared")
    for saved_test in saved_tests:
        entries += illustrate_test(saved_test, folder)
    entries.sort(key=lambda entry: SECTIONS.index(entry["section"]))
    write_whole(folder / INDEX, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


def illustrate_test(saved: Path, folder: Path) -> list[dict[str, str]]:
    """The failing classes and a map of a saved embedding, from its numbers alone; no image is opened.

    Images with roles are searched by them, others search one another. saved: of ``saved_embeddings``; the file's name
    says which run it is of. Returns entries as in ``illustrations.json``, which is left as it is.

    Raises SavedEmbeddingsError for a file that holds no embeddings, RetrievalError for NaN.
    """
    key, found = saved.stem, load_embeddings(saved)
    ranked = rank_queries(found.embeddings, found.labels, _searched_roles(found))
    bars = _bars(key, "test", ranked, found, folder)
    return _entries("classes", key, [bars]) + _entries("map", key, _map(key, "test", found, folder))


def _entries(section: str, key: str, pictures: Sequence[Picture]) -> list[dict[str, str]]:
    return [
        {
            "file": picture.path.name,
            "section": section,
            "title": picture.title,
            "caption": picture.caption,
            "trial": key,
        }
        for picture in pictures
    ]


# --- retrievals ------------------------------------------------------------------------------------------------------


def _sampled(run: ValidatedRun, folder: Path) -> list[Picture]:
    path = folder / f"retrievals-{run.key}.png"
    pixels, labels, class_names = run.val
    roles, seed = run.opened.val.roles, run.trial.seed
    sample_retrievals(
        pixels, labels, class_names, run.embeddings, path, roles=roles, num_queries=_NUM_QUERIES, seed=seed
    )
    caption = (
        f"Validation queries of {run.name} with their nearest neighbours. Half of them are drawn at random from those "
        "whose nearest neighbour is right, half from those where it is wrong, as far as there are. "
    )
    return [Picture(path, f"Random queries, {run.key}", caption + FRAMES_IN_WORDS)]


def _best_and_worst(run: ValidatedRun, folder: Path) -> list[Picture]:
    images, ranked, pictures = run.val, run.ranked, []
    of_all = f"of {counted(len(ranked.queries), 'validation query', 'validation queries')}"
    if best := best_queries(ranked, images.labels, _NUM_QUERIES):
        path, title = folder / f"retrievals-best-{run.key}.png", f"Best queries, {run.key}"
        draw_queries(best, ranked, images, path, title=title, within_r=True)
        caption = f"The queries of {run.name} with the highest AP@R, of different classes. "
        caption += f"{(ranked.average_precision == 1).mean():.1%} {of_all} find all of their class first."
        pictures.append(Picture(path, title, f"{caption} {_AP} {FRAMES_IN_WORDS}"))
    if worst := worst_queries(ranked, images.labels, _NUM_QUERIES):
        path, title = folder / f"retrievals-worst-{run.key}.png", f"Worst queries, {run.key}"
        draw_queries(worst, ranked, images, path, title=title)
        caption = f"The queries of {run.name} with the lowest AP@R, of different classes, and what they are taken for. "
        caption += f"For {1 - ranked.recall_at_1:.1%} {of_all} the nearest image is of another class."
        pictures.append(Picture(path, title, f"{caption} {_AP} {FRAMES_IN_WORDS}"))
    return pictures


def _changed(first: ValidatedRun, second: ValidatedRun, folder: Path) -> list[Picture]:
    """Two pictures: the queries that are better in the one run, and those that are better in the other."""
    images, pictures = first.val, []
    change = np.nan_to_num(first.ranked.average_precision - second.ranked.average_precision)
    counts = f"{(change > 0).sum():,} of {len(change):,} queries have a higher AP@R in {first.key}, "
    counts += f"{(change < 0).sum():,} in {second.key}."
    gained, lost = changed_queries(first.ranked, second.ranked, images.labels, _NUM_CHANGED)
    for better, worse, places in ((first, second, gained), (second, first, lost)):
        if not places:
            continue
        path = folder / f"changed-better-{better.key}-than-{worse.key}.png"
        title = f"Better in {better.key} than in {worse.key}"
        draw_two_rankings(places, {first.key: first.ranked, second.key: second.ranked}, images, path, title=title)
        caption = (
            f"The validation queries whose AP@R differs most between {first.name} and {second.name}, in favour of "
            f"{better.key}; both validate on the same classes. {counts} {FRAMES_IN_WORDS}"
        )
        pictures.append(Picture(path, title, caption))
    return pictures


# --- classes and map -------------------------------------------------------------------------------------------------


def _bars(key: str, part: str, ranked: RankedQueries, saved: SavedEmbeddings, folder: Path) -> Picture:
    failures = class_failures(ranked, saved.labels)
    path, title = folder / f"{_prefix(part)}classes-{key}.png", f"Classes with the lowest Recall@1, {part}, {key}"
    draw_class_failures(failures, saved.class_names, path, title=title, mean_recall_at_1=ranked.recall_at_1)
    num_perfect = sum(not row.num_wrong for row in failures)
    caption = (
        f"The {part} classes that fail most, of {len(failures):,}; {num_perfect:,} have no wrong nearest neighbour. In "
        "brackets the number of queries; the arrow names the class that most of the wrong nearest neighbours are of, "
        "and says how many of them."
    )
    return Picture(path, title, caption)


def _confusions(run: ValidatedRun, folder: Path) -> list[Picture]:
    images = run.val
    failures = class_failures(run.ranked, images.labels)
    if not any(row.num_wrong for row in failures):
        return []
    path, title = folder / f"confusions-{run.key}.png", f"What the worst classes are taken for, {run.key}"
    draw_confusions(failures, run.ranked, images, path, title=title)
    caption = (
        f"For the classes with the lowest Recall@1 in {run.name} and the class each is most often taken for: queries "
        "beside their wrong nearest neighbour, the nearest first. The number is the distance."
    )
    return [Picture(path, title, caption)]


def _map(key: str, part: str, saved: SavedEmbeddings, folder: Path, pixels: Pixels | None = None) -> list[Picture]:
    """Points in the colours of their classes and, where there are pixels, the same map of images."""
    roles, labels = _searched_roles(saved), saved.labels
    found = embedding_map(saved.embeddings, labels)
    path, title = folder / f"{_prefix(part)}map-{key}.png", f"Map of the {part} embedding, {key}"
    draw_embedding_map(found, labels, saved.class_names, path, title=title, roles=roles)
    which = f"All {len(labels):,} {part} images"
    if len(found.rows) < len(labels):
        which = f"{len(found.rows):,} of {len(labels):,} {part} images, of each class its share"
    caption = (
        f"{which}, placed by {found.method}: what is near on the map is near in the embedding; distances between far "
        "groups and the sizes of groups say nothing. The largest classes have colours."
    )
    hollow = " Filled marks are queries, hollow ones the gallery." if roles and "gallery" in roles else ""
    pictures = [Picture(path, title, caption + hollow)]
    if pixels is not None:
        path, title = folder / f"map-of-images-{key}.png", f"The same map, of images, {key}"
        draw_image_map(found, pixels, path, title=title)
        caption = "In each square of a grid over the map, the image that lies nearest to its middle."
        pictures.append(Picture(path, title, caption))
    return pictures


def _searched_roles(saved: SavedEmbeddings) -> tuple[str, ...] | None:
    """Roles, where there is an image with one."""
    return saved.roles if saved.roles is not None and any(saved.roles) else None


def _prefix(part: str) -> str:
    return "" if part == "validation" else f"{part}-"
