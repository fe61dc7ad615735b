"""A search space written for a folder of images: sizes, batches and backbone follow from what is in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raydml.config.sections import SplitSettings
from raydml.data.catalog import Catalog
from raydml.data.class_names import readable
from raydml.data.datasets import open_catalog
from raydml.data.image_list import find_list
from raydml.data.splits import used_splits
from raydml.images.pixels import Header, read_headers
from raydml.search_space.space import study_name_from

_SPLIT = SplitSettings(test_fraction=0.5, val_fraction=0.25, num_folds=4)
_USED_FOLDS = 2
_NUM_SIZES = 500  # images whose sizes are read
_SMALLEST_PRETRAINED_PX = 96  # below, published weights see little but interpolation
_IMAGES_PER_TRIAL = 200_000


@dataclass(frozen=True)
class FolderFacts:
    """What is in a folder of images. Sizes are those of development images: no file of a test class is opened.

    list_file: the CSV list that names the images, or None. num_folds: as many as the classes allow, at most 4.
    num_train_classes, num_train_images: of the smallest split. sides_px: (10 %, median, 90 %) of the shorter sides.
    images_per_class: smallest, median and largest number.
    """

    folder: Path
    list_file: str | None
    description: str
    parts: tuple[int, int, int]
    num_folds: int
    num_train_classes: int
    num_train_images: int
    num_scored: int
    sides_px: tuple[int, int, int]
    images_per_class: tuple[int, int, int]


def look_at_folder(folder: Path) -> FolderFacts:
    """List the images of a folder and read the headers of some. Raises DataError for what a study would refuse."""
    list_file = find_list(folder)
    catalog = open_catalog("image_list" if list_file else "image_folder", folder, list_file)
    search, num_folds, splits = used_splits(catalog, _USED_FOLDS, **_SPLIT.model_dump())
    counts = np.bincount(catalog.labels)
    return FolderFacts(
        folder=folder.resolve(),
        list_file=list_file,
        description=catalog.description,
        parts=(len(search.train), len(search.val), len(search.test)),
        num_folds=num_folds,
        num_train_classes=min(len(split.train) for split in splits),
        num_train_images=min(int(counts[list(split.train)].sum()) for split in splits),
        num_scored=min(int(counts[list(part)].sum()) for split in splits for part in (split.val, split.test)),
        sides_px=_sides(catalog, [*search.train, *search.val]),
        images_per_class=(int(counts.min()), int(np.median(counts)), int(counts.max())),
    )


def _sides(catalog: Catalog, development: list[int]) -> tuple[int, int, int]:
    assert catalog.root is not None
    rows = np.flatnonzero(np.isin(catalog.labels, development))
    few = rows[:: -(-len(rows) // _NUM_SIZES)]
    headers = read_headers(catalog.root, [catalog.paths[row] for row in few])
    sides = [min(header.width, header.height) for header in headers if isinstance(header, Header)]
    low, middle, high = np.percentile(sides or [64], [10, 50, 90])
    return round(low), round(middle), round(high)


def space_text(facts: FolderFacts, *, has_gpu: bool) -> str:
    """Return a search space for these images, with comments that say where each choice comes from."""
    pretrained = has_gpu and facts.sides_px[1] >= _SMALLEST_PRETRAINED_PX
    resize_px, crop_px, why_size = _size(facts, pretrained)
    smallest, middle, largest = facts.images_per_class
    train, val, test = facts.parts
    classes = sorted({min(number, facts.num_train_classes) for number in (8, 16)})
    per_class = sorted({min(number, max(2, middle)) for number in (4, 8)})
    few = [number for number in (32, 64, 128) if 3 * number <= facts.num_train_images]  # 3 steps per epoch or more
    batches = few or [min(16, facts.num_train_images)]
    recall_at = [k for k in (1, 2, 4, 8) if k < facts.num_scored]
    epochs = int(np.clip(round(_IMAGES_PER_TRIAL / facts.num_train_images), 5, 20))
    name = "image_list" if facts.list_file else "image_folder"
    list_line = f"\n    list_file: {_quoted(facts.list_file)}" if facts.list_file else ""
    if pretrained:
        why = "a GPU was found: ImageNet weights, fetched once (or put there by hand) and fine-tuned"
        model = f"resnet18        # {why}\n    weights: default\n    embedding_dim: {{choice: [128, 256]}}"
        rate, precision = "{loguniform: [1e-5, 3e-4]}", "  precision: bf16\n"
    else:
        reason = "no GPU was found" if not has_gpu else f"images below {_SMALLEST_PRETRAINED_PX} px"
        why = f"{reason}: a small network from random weights"
        model = f"convnet         # {why}\n    weights: none\n    embedding_dim: {{choice: [64, 128]}}"
        rate, precision = "{loguniform: [3e-4, 5e-3]}", ""
    return f"""\
# yaml-language-server: $schema=schema.json
#
# Question: which of four loss families learns, from these images alone, an embedding that separates classes it has
#   never seen?
#
# Command: sweep THIS_FILE                  (add --dry-run for a forecast, --time 30m for a limit)
# Found: {facts.description} in
#   {_in_comment(str(facts.folder))}
#   {_range(smallest, largest)} images per class, {middle} in the median; shorter sides of \
{_range(facts.sides_px[0], facts.sides_px[2])} px, {facts.sides_px[1]} in the median
#   {train} classes train, {val} validate, {test} are sealed until the end
#
# How to read this file: any value below `trial` may be a domain, {{choice: [...]}}, {{uniform: [low, high]}},
#   {{loguniform: [low, high]}}, {{randint: [low, high]}} (high excluded). One choice supplies the keys `loss, miner,
#   sampler` together: each loss comes with the miners and the samplers that go with it.

study:
  name: {json.dumps(study_name_from(facts.folder.name))}
  seed: 0
  search:
    num_trials: 16          # 4 for each of the four losses; more find more
    scheduler: asha         # stops the worse trials early
    grace_epochs: {max(1, epochs // 5)}
    reduction_factor: 3
  confirm:                  # the two best again, on 2 folds with 2 seeds: means with intervals
    top: 2
    folds: {_USED_FOLDS}
    seeds: 2
  refit:                    # the best once more, on all classes that are not sealed: the model to take away
    seeds: 3
  finalize:                 # scores on the sealed classes
    top: 1

machine:
  data_root: {_quoted(str(facts.folder))}

trial:
  epochs: {epochs}
  data:
    name: {name}{list_line}
    resize_px: {resize_px}           # {why_size}
    crop_px: {crop_px}
    split:
      order: shuffled
      test_fraction: {_SPLIT.test_fraction}
      val_fraction: {_SPLIT.val_fraction}    # of the classes that are not sealed
      num_folds: {facts.num_folds}
    augmentation:
      random_resized_crop: [0.5, 1.0]
      flip: true            # false for writing, signs, anything that must not be mirrored
  model:
    backbone: {model}
  loss, miner, sampler:
    choice:
      - loss: {{name: margin, beta: {{uniform: [0.6, 1.2]}}, margin: {{choice: [0.1, 0.2, 0.3]}}}}
        miner: {{name: distance_weighted}}
        sampler: &balanced      # {facts.num_train_classes} classes train in the smallest split
          name: class_balanced
          classes_per_batch: {_choice(classes)}
          images_per_class: {_choice(per_class)}
      - loss: {{name: multi_similarity, base: {{uniform: [0.4, 0.8]}}, beta: {{choice: [20.0, 40.0]}}}}
        miner: {{name: multi_similarity, epsilon: {{uniform: [0.05, 0.3]}}}}
        sampler: *balanced
      - loss: {{name: contrastive, negative_margin: {{uniform: [0.4, 1.2]}}}}
        miner: {{choice: [null, {{name: multi_similarity}}, {{name: distance_weighted}}]}}
        sampler: *balanced
      - loss: {{name: normalized_softmax, temperature: {{loguniform: [0.03, 0.3]}}}}
        sampler: {{name: uniform, batch_size: {_choice(batches)}}}
  optimizer:
    name: adamw
    learning_rate: {rate}
    weight_decay: 1e-4
  schedule:
    name: {{choice: [constant, cosine]}}
{precision}  recall_at: [{", ".join(map(str, recall_at))}]
"""


def _in_comment(name: str) -> str:
    """Return the name of a file as text of one line."""
    return "".join(letter if letter.isprintable() else " " for letter in readable(name))


def _quoted(name: str) -> str:
    """Return the name of a file, which may have bytes that are not UTF-8, as a YAML string in double quotes."""
    text = json.dumps(name, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)


def _size(facts: FolderFacts, pretrained: bool) -> tuple[int, int, str]:
    """Return resize_px, crop_px and the reason in words."""
    middle = facts.sides_px[1]
    if pretrained and middle >= 192:
        return 256, 224, "the size that the weights were trained for"
    if pretrained:
        return 128, 112, f"half the size of the weights' images: the median side has {middle} px"
    resize_px = max(16, min(64, middle // 8 * 8))
    why = "small enough for a CPU; larger shows more and costs its square" if middle >= 64 else "as the images are"
    return resize_px, resize_px * 7 // 8, why


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _choice(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{{choice: {numbers}}}"
