"""The loader: from the numbers of images to augmented, normalised batches on the device.

A thread reads and cuts the next batches while the device works on this one; what it hands over is as small as the
crops. Scaling, colours and normalisation are the device's: on a CPU image by image, on a GPU for the batch at once.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydml.data.catalog import DataError
from raydml.images import crops, transforms
from raydml.images.pixels import Pixels
from raydml.images.transforms import Augmentation, Draws
from raydml.preprocessing import Interpolation, Preprocessing

_PADDED_BYTES = 64 << 20  # of boxes scaled together; with their float copies a GPU needs about ten times that
_CHUNK_VALUES = 1 << 18  # floats finished together on a CPU: with temporaries of as much they stay in its cache


class Group(NamedTuple):
    """Some boxes of a batch in one array, ready to be sent to a device."""

    rows: Tensor  # (n,) int64, their places in the batch
    sizes: np.ndarray  # (n, 2) height and width of each
    pixels: Tensor  # uint8 (n, H, W, 3); beyond its size each image is undefined


class _Cut(NamedTuple):
    """What the reading thread hands over."""

    draws: Draws
    boxes: list[np.ndarray]  # for a CPU
    groups: list[Group]  # for every other device


class Loader:
    """Training batches of some images, each augmented by its own draw.

    num_threads: how many scale images at once where the device is a CPU (torch's own threads do the rest).
    channels_last: the memory format of the batches. prefetch: how many batches are read ahead, at least 1; each holds
    its crops as uint8, and while it is being read its whole images, which matters for photographs decoded at full size.
    The same pixels, settings and seeds give the same batches, whatever num_threads and prefetch are.

    Raises DataError for fewer than one thread or batch ahead.
    """

    def __init__(
        self,
        pixels: Pixels,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        num_threads: int,
        channels_last: bool,
        prefetch: int = 2,
    ) -> None:
        for key, value in (("num_threads", num_threads), ("prefetch", prefetch)):
            if value < 1:
                raise DataError(f"{key}: {value} is less than 1; give 1 or more")
        self.pixels, self.augmentation, self.preprocessing = pixels, augmentation, preprocessing
        self.device, self.num_threads, self.prefetch = device, num_threads, prefetch
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Used again and again on a CPU: memory fresh from the system costs more than what is written into it.
        crop_px = preprocessing.crop_px
        self._scaled = torch.empty(0, crop_px, crop_px, 3, dtype=torch.uint8)
        self._batch = torch.empty(0, 3, crop_px, crop_px)

    def batches(self, plan: Sequence[np.ndarray], seeds: np.ndarray | Sequence[int]) -> Generator[Tensor, None, None]:
        """The batches of a plan: float32 (B, 3, crop_px, crop_px), normalised, on the device.

        plan: the numbers of each batch's images. seeds: one a batch, 0 or more; it seeds everything random of its
        batch, so a run resumed in the middle of an epoch draws the same. On a CPU a batch is valid until the next one
        is asked for: they share their memory, so one iterator of a loader is used at a time.

        An error while reading (DataError, OSError) is raised at that batch. Closing the iterator ends its threads, as
        do its end and an error. Raises DataError at once when there are not as many seeds as batches.
        """
        if len(plan) != len(seeds):
            raise DataError(f"seeds: {len(seeds)} for {len(plan)} batches; give one seed a batch")
        return self._batches(plan, [int(seed) for seed in seeds])

    def _batches(self, plan: Sequence[np.ndarray], seeds: list[int]) -> Generator[Tensor, None, None]:
        with ExitStack() as threads:
            reader = _pool(1, "raydml-read", threads)
            on_cpu = self.device.type == "cpu"
            scalers = _pool(self.num_threads, "raydml-scale", threads) if on_cpu and self.num_threads > 1 else None
            todo = iter(zip(plan, seeds, strict=True))
            ahead: deque[Future[_Cut]] = deque()
            for _ in plan:
                while len(ahead) <= self.prefetch and (batch := next(todo, None)) is not None:
                    ahead.append(reader.submit(self._cut, *batch))
                cut = ahead.popleft().result()
                yield self._finished_on_cpu(cut, scalers) if on_cpu else self._finished_on_device(cut)

    def _cut(self, rows: np.ndarray, seed: int) -> _Cut:
        images = self.pixels.read(rows)
        sizes = np.array([image.shape[:2] for image in images], dtype=np.int64).reshape(-1, 2)
        draws = transforms.draw(len(images), seed)
        places = transforms.boxes(self.augmentation, draws, sizes, crop_px=self.preprocessing.crop_px)
        boxes = [crops.cut(image, place) for image, place in zip(images, places, strict=True)]
        if self.device.type == "cpu":
            return _Cut(draws, boxes, [])
        return _Cut(draws, [], grouped(boxes, max_bytes=_PADDED_BYTES, pinned=self.device.type == "cuda"))

    def _finished_on_cpu(self, cut: _Cut, scalers: ThreadPoolExecutor | None) -> Tensor:
        num_images, crop_px = len(cut.boxes), self.preprocessing.crop_px
        if num_images > len(self._batch):
            self._scaled = torch.empty(num_images, crop_px, crop_px, 3, dtype=torch.uint8)
            self._batch = torch.empty(num_images, 3, crop_px, crop_px, memory_format=self.memory_format)
        scaled, batch = self._scaled[:num_images], self._batch[:num_images]
        as_array = scaled.numpy()  # copies by numpy: torch would start threads of its own in each of ours

        def scale(row: int) -> None:
            as_array[row] = crops.scaled(cut.boxes[row], crop_px, self.preprocessing.interpolation).numpy()

        _for_each(scale, num_images, scalers, self.num_threads)
        num_together = max(1, _CHUNK_VALUES // (3 * crop_px * crop_px))
        for begin in range(0, num_images, num_together):
            chunk = slice(begin, begin + num_together)
            transforms.finish(
                scaled[chunk], self.augmentation, cut.draws.rows(chunk), self.preprocessing, out=batch[chunk]
            )
        return batch

    @torch.no_grad()
    def _finished_on_device(self, cut: _Cut) -> Tensor:
        num_images, crop_px = len(cut.draws.flip), self.preprocessing.crop_px
        pixels = scaled_groups(cut.groups, num_images, crop_px, self.preprocessing.interpolation, self.device)
        batch = torch.empty((num_images, 3, crop_px, crop_px), device=self.device, memory_format=self.memory_format)
        transforms.finish(pixels, self.augmentation, cut.draws, self.preprocessing, out=batch)
        return batch


def grouped(boxes: list[np.ndarray], *, max_bytes: int, pinned: bool) -> list[Group]:
    """Boxes (height, width, 3) padded to arrays of at most max_bytes, or of one box; large boxes first.

    Where all boxes are of a size, as from a cache, that is one group; one huge photograph pads no other image.
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
        # torch keeps pinned memory until the copy out of it is done, then hands it out again.
        pixels = torch.empty((len(rows), height, width, 3), dtype=torch.uint8, pin_memory=pinned)
        for padded, row in zip(pixels.numpy(), rows, strict=True):
            padded[: boxes[row].shape[0], : boxes[row].shape[1]] = boxes[row]
        sizes = np.array([boxes[row].shape[:2] for row in rows])
        groups.append(Group(torch.tensor(rows), sizes, pixels))
        begin = end
    return groups


def scaled_groups(
    groups: list[Group], num_images: int, size_px: int, interpolation: Interpolation, device: torch.device
) -> Tensor:
    """All boxes of a batch, scaled on the device, in the batch's order: uint8 (B, size_px, size_px, 3)."""
    scaled = torch.empty((num_images, size_px, size_px, 3), dtype=torch.uint8, device=device)
    for group in groups:
        pixels = group.pixels.to(device, non_blocking=True)
        rows = group.rows.to(device, non_blocking=True)
        scaled[rows] = crops.scaled_together(pixels, group.sizes, size_px, interpolation)
    return scaled


def _pool(num_threads: int, name: str, threads: ExitStack) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    threads.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool


def _for_each(function: Callable[[int], None], number: int, pool: ThreadPoolExecutor | None, num_threads: int) -> None:
    """Call function with 0..number-1; with a pool, each thread takes one stretch of the numbers."""
    if pool is None:
        for index in range(number):
            function(index)
        return

    def stretch(indices: np.ndarray) -> None:
        for index in indices.tolist():
            function(index)

    for done in [pool.submit(stretch, indices) for indices in np.array_split(np.arange(number), num_threads)]:
        done.result()
