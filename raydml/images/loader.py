"""The loader: from the numbers of images to augmented, normalised batches on the device.

A thread reads and cuts the next batches while the device works on this one. It hands over uint8 crops of their own
sizes; scaling, colours and normalisation run on the device, for a whole batch. On a CPU the thread also scales, image
by image.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from raydml.images.augmentation import Draws, choose_boxes, cut_box, draw, finish, scale_one, scale_together
from raydml.images.augmentation_settings import Augmentation
from raydml.images.pixels import Pixels
from raydml.images.preprocessing import Interpolation, Preprocessing

Result = TypeVar("Result")
_PADDED_BYTES = 64 << 20  # of boxes scaled together; with their float copies a GPU needs about ten times that
_CHUNK_VALUES = 1 << 18  # floats finished together on a CPU: with temporaries of as much they stay in its cache


class BoxGroup(NamedTuple):
    """Some boxes of a batch in one array, ready to be sent to a device."""

    rows: Tensor  # (n,) int64, their places in the batch
    sizes: np.ndarray  # (n, 2) height and width of each
    pixels: Tensor  # uint8 (n, H, W, 3); beyond its size each image is undefined


class _CutBatch(NamedTuple):
    """The crops of a batch, as the reading thread hands them over."""

    draws: Draws
    scaled: Tensor | None  # for a CPU: uint8 (B, crop_px, crop_px, 3)
    groups: list[BoxGroup]  # for every other device


class Loader:
    """Training batches of some images, each augmented by its own random numbers.

    channels_last: the memory format of the batches. prefetch: how many batches are read ahead, at least 1. Each holds
    its crops as uint8, and while it is being read its whole images, which matters for photographs decoded at full size.
    The same pixels, settings and seeds give the same batches, whatever prefetch is. rows: the part of a batch of so
    many images that is prepared, all by default; an image has the same random numbers in every part.
    """

    def __init__(
        self,
        pixels: Pixels,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        channels_last: bool,
        prefetch: int = 2,
        rows: Callable[[int], slice] = slice,
    ) -> None:
        self.pixels, self.augmentation, self.preprocessing = pixels, augmentation, preprocessing
        self.device, self.prefetch, self.rows = device, prefetch, rows
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Reused on a CPU: to get fresh memory from the system costs more than to fill it.
        crop_px = preprocessing.crop_px
        self._scaled = [torch.empty(0, crop_px, crop_px, 3, dtype=torch.uint8)] * (prefetch + 1)
        self._batch = torch.empty(0, 3, crop_px, crop_px)

    def batches(
        self, plan: Sequence[np.ndarray], seeds: np.ndarray | Sequence[int], flip: np.ndarray | None = None
    ) -> Generator[Tensor, None, None]:
        """The batches of a plan: float32 (B, 3, crop_px, crop_px), normalised, on the device.

        plan: the numbers of each batch's images. seeds: one a batch, 0 or more; it seeds everything random of its
        batch, so a run resumed in the middle of an epoch draws the same. flip: (batches,) bool, False for a batch
        that is never mirrored, whatever the augmentation says; None: there is no such batch. On a CPU a batch is valid
        until the next one is read: they share their memory, so use one iterator of a loader at a time.

        An error while reading (DataError, OSError) is raised at that batch. Closing the iterator ends its threads, as
        do its end and an error.
        """
        may_flip = np.ones(len(plan), dtype=bool) if flip is None else flip
        calls = (
            (rows, int(seed), bool(flips), number % len(self._scaled))
            for number, (rows, seed, flips) in enumerate(zip(plan, seeds, may_flip, strict=True))
        )
        with closing(read_ahead(self._cut, calls, num_ahead=self.prefetch)) as cuts:
            for cut in cuts:
                yield self._finished_on_device(cut) if cut.scaled is None else self._finished_on_cpu(cut, cut.scaled)

    def _cut(self, rows: np.ndarray, seed: int, flip: bool, place: int) -> _CutBatch:
        """Read and cut a batch. place: the number of the buffer to scale into; each batch that is ahead has one."""
        part = self.rows(len(rows))
        images = self.pixels.read(rows[part])
        sizes = np.array([image.shape[:2] for image in images], dtype=np.int64).reshape(-1, 2)
        draws = draw(len(rows), seed).rows(part)
        if not flip:
            draws = draws.unmirrored()
        places = choose_boxes(self.augmentation, draws, sizes, crop_px=self.preprocessing.crop_px)
        boxes = (cut_box(image, box) for image, box in zip(images, places, strict=True))
        if self.device.type != "cpu":
            groups = group_boxes(list(boxes), max_bytes=_PADDED_BYTES, pinned=self.device.type == "cuda")
            return _CutBatch(draws, None, groups)
        crop_px = self.preprocessing.crop_px
        if len(images) > len(self._scaled[place]):
            self._scaled[place] = torch.empty(len(images), crop_px, crop_px, 3, dtype=torch.uint8)
        scaled = self._scaled[place][: len(images)]
        # Copied by numpy: torch would start threads of its own here, which compete with those that train.
        for into, box in zip(scaled.numpy(), boxes, strict=True):
            into[:] = scale_one(box, crop_px, self.preprocessing.interpolation).numpy()
        return _CutBatch(draws, scaled, [])

    def _finished_on_cpu(self, cut: _CutBatch, scaled: Tensor) -> Tensor:
        num_images, crop_px = len(scaled), self.preprocessing.crop_px
        if num_images > len(self._batch):
            self._batch = torch.empty(num_images, 3, crop_px, crop_px, memory_format=self.memory_format)
        batch = self._batch[:num_images]
        num_together = max(1, _CHUNK_VALUES // (3 * crop_px * crop_px))
        for begin in range(0, num_images, num_together):
            chunk = slice(begin, begin + num_together)
            finish(scaled[chunk], self.augmentation, cut.draws.rows(chunk), self.preprocessing, out=batch[chunk])
        return batch

    @torch.no_grad()
    def _finished_on_device(self, cut: _CutBatch) -> Tensor:
        num_images, crop_px = len(cut.draws.flip), self.preprocessing.crop_px
        pixels = scale_groups(cut.groups, num_images, crop_px, self.preprocessing.interpolation, self.device)
        batch = torch.empty((num_images, 3, crop_px, crop_px), device=self.device, memory_format=self.memory_format)
        finish(pixels, self.augmentation, cut.draws, self.preprocessing, out=batch)
        return batch


def group_boxes(boxes: list[np.ndarray], *, max_bytes: int, pinned: bool) -> list[BoxGroup]:
    """Pad boxes (height, width, 3) to arrays of at most max_bytes, or of one box; large boxes first.

    Boxes of one size, as from a cache, make one group; one huge photograph pads no other image.
    """
    largest_first = sorted(range(len(boxes)), key=lambda row: -boxes[row].size)
    groups, begin = [], 0
    while begin < len(boxes):
        end, height, width = begin, 0, 0
        for row in largest_first[begin:]:
            higher, wider = max(height, boxes[row].shape[0]), max(width, boxes[row].shape[1])
            if end > begin and (end + 1 - begin) * higher * wider * 3 > max_bytes:
                break
            end, height, width = end + 1, higher, wider
        rows = largest_first[begin:end]
        # torch keeps pinned memory until the copy out of it is done, then reuses it.
        pixels = torch.empty((len(rows), height, width, 3), dtype=torch.uint8, pin_memory=pinned)
        for padded, row in zip(pixels.numpy(), rows, strict=True):
            padded[: boxes[row].shape[0], : boxes[row].shape[1]] = boxes[row]
        sizes = np.array([boxes[row].shape[:2] for row in rows])
        groups.append(BoxGroup(torch.tensor(rows), sizes, pixels))
        begin = end
    return groups


def scale_groups(
    groups: list[BoxGroup], num_images: int, size_px: int, interpolation: Interpolation, device: torch.device
) -> Tensor:
    """Scale all boxes of a batch on the device, in the batch's order: uint8 (B, size_px, size_px, 3)."""
    scaled = torch.empty((num_images, size_px, size_px, 3), dtype=torch.uint8, device=device)
    for group in groups:
        pixels = group.pixels.to(device, non_blocking=True)
        rows = group.rows.to(device, non_blocking=True)
        scaled[rows] = scale_together(pixels, group.sizes, size_px, interpolation)
    return scaled


def read_ahead(
    read: Callable[..., Result], calls: Iterable[tuple[Any, ...]], *, num_ahead: int
) -> Generator[Result, None, None]:
    """Yield ``read(*call)`` for each of these calls, in order; a thread reads ahead while a result is used.

    num_ahead: how many are read, or about to be, while one is used; at least 1. An error of a call is raised at its
    place. The thread ends with the generator: at its end, at an error, and when it is closed.
    """
    reader = ThreadPoolExecutor(1, thread_name_prefix="raydml-read")
    try:
        ahead: deque[Future[Result]] = deque()
        for call in calls:
            ahead.append(reader.submit(read, *call))
            if len(ahead) > num_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
