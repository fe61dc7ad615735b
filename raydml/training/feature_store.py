"""The features of a frozen backbone, computed once for each image and view, and shared by all trials of a machine.

    <cache_dir>/features-<key>/manifest.json   written last: a folder without it holds no features
                               <token>.npy     (V, N, F) float32
                               lock            held by the process that computes

The key is a hash of the backbone's weights, the preprocessing, the views, the precision, and the bytes of the images.
It does not depend on the split: every fold selects rows of the same array. Without a cache_dir each process keeps its
own.
"""

import hashlib
import json
import logging
import time
import uuid
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydml.config.trial import Machine, Trial
from raydml.evaluation.embed import embedded_batches
from raydml.images.augmentation import View, cut_box, place_boxes, views_of
from raydml.images.cache import Images, clear_pack, make_room, open_or_make, room_in_memory, usable_cache
from raydml.images.features import KeptFeatures
from raydml.images.loader import read_ahead
from raydml.images.pixels import Pixels
from raydml.images.preprocessing import Preprocessing
from raydml.models.network import Network
from raydml.ops.files import flush_to_disk, write_whole
from raydml.ops.progress import report_progress

_FORMAT = 1  # raise it when features of the same key would be others
_BATCH = 64  # no setting of a machine: the last bits of a feature depend on the images beside it
_BLOCK_BYTES = 1 << 24
_DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError)
_logger = logging.getLogger("raydml")


def open_features(
    trial: Trial,
    machine: Machine,
    network: Network,
    preprocessing: Preprocessing,
    parts: Sequence[Images],
    *,
    device: torch.device,
) -> list[KeptFeatures] | None:
    """Return the features of the images of these parts, one set for each, computed where they are not kept yet.

    network: on the device. None where the trial needs its pixels: its backbone learns, its augmentation is random,
    ``machine.feature_store`` is off, or there is no space for the features, which is logged as a warning.

    Raises DataError: an image that cannot be read; a cache that cannot be written.
    """
    views = views_of(trial.data.augmentation)
    if trial.model.train != "head" or not views or machine.feature_store == "off":
        return None
    work = _Work(network, preprocessing, parts, views, device, trial)
    max_bytes = None if machine.max_cache_gib is None else int(machine.max_cache_gib * 2**30)
    if machine.cache_dir is None:
        values = _in_memory(work, max_bytes)
    else:
        with usable_cache(machine.cache_dir):
            values = _shared(work, machine.cache_dir / f"features-{_key_of(work)}", max_bytes)
    return None if values is None else work.of_parts(values)


class _Work:
    """What is computed: the features of N images, ordered by their paths, in V views."""

    def __init__(
        self,
        network: Network,
        preprocessing: Preprocessing,
        parts: Sequence[Images],
        views: Sequence[View],
        device: torch.device,
        trial: Trial,
    ) -> None:
        self.network, self.preprocessing, self.views = network, preprocessing, tuple(views)
        self.device, self.trial = device, trial
        self.parts = [part for part in parts if len(part.paths)]
        self._sizes = [len(part.paths) for part in parts]
        self.paths = [path for part in self.parts for path in part.paths]
        # Training and validation images of one fold are parted otherwise in the next one.
        self.order = np.array(sorted(range(len(self.paths)), key=self.paths.__getitem__), dtype=np.int64)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.views), len(self.paths), self.network.head.feature_dim

    @property
    def num_bytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    def of_parts(self, values: np.ndarray) -> list[KeptFeatures]:
        """Return the features of each part."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(len(self.order))
        return [KeptFeatures(values, rows) for rows in np.split(places, np.cumsum(self._sizes)[:-1])]

    def batches(self) -> Iterator[np.ndarray]:
        """Yield the features of all images in the first view, then in the next, (B, F) float32."""
        begin_s, num_inputs, done = time.monotonic(), len(self.views) * len(self.paths), 0
        for view in self.views:
            inputs = self._inputs(view)
            outputs = embedded_batches(
                self.network, inputs, device=self.device, precision=self.trial.precision, forward=self.network.trunk
            )
            with closing(outputs):
                for rows in outputs:
                    yield rows
                    done += len(rows)
                    report_progress("features", done, num_inputs, "images")
        seconds = max(time.monotonic() - begin_s, 1e-9)
        _logger.info(
            "features of %s images, computed once, in %.1f s (%.0f/s)", f"{num_inputs:,}", seconds, num_inputs / seconds
        )

    def _inputs(self, view: View) -> Generator[Tensor, None, None]:
        starts = range(0, len(self.order), _BATCH)
        calls = ((self.order[start : start + _BATCH], view) for start in starts)
        with closing(read_ahead(self._squares, calls, num_ahead=1)) as squares_of_batches:
            for squares in squares_of_batches:
                yield self.preprocessing.normalise(torch.from_numpy(squares).to(self.device))

    def _squares(self, rows: np.ndarray, view: View) -> np.ndarray:
        """Return these images in a view, uint8 (B, crop_px, crop_px, 3)."""
        images = self._read(rows)
        sizes = np.array([image.shape[:2] for image in images])
        boxes = place_boxes(sizes, np.full(len(images), view.place), crop_px=self.preprocessing.crop_px)
        squares = np.stack([cut_box(image, box) for image, box in zip(images, boxes, strict=True)])
        return np.ascontiguousarray(squares[:, :, ::-1]) if view.mirrored else squares

    def _read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Read images by their numbers in ``paths``."""
        ends = np.cumsum([len(part.paths) for part in self.parts])
        part_of = np.searchsorted(ends, rows, side="right")
        images: dict[int, np.ndarray] = {}
        for number, part in enumerate(self.parts):
            own = rows[part_of == number]
            pixels: Pixels = part.pixels
            images |= zip(own.tolist(), pixels.read(own - (ends[number] - len(part.paths))), strict=True)
        return [images[row] for row in rows.tolist()]


def _key_of(work: _Work) -> str:
    """Return a hash of everything that the features depend on, but for rounding that differs between processors."""
    import timm
    import torchvision

    trial = work.trial
    digest = hashlib.sha256()
    plain = {
        "format": _FORMAT,
        "versions": [torch.__version__, torchvision.__version__, timm.__version__],
        "backbone": [trial.model.backbone, trial.model.pooling],
        "computed": [trial.precision, trial.channels_last, trial.compile],
        "preprocessing": work.preprocessing.to_dict(),
        "views": work.views,
        "device": work.device.type,
        "images": [trial.data.name, trial.data.content],
        "paths": [work.paths[row] for row in work.order],
    }
    digest.update(json.dumps(plain).encode())
    if all(part.digests is not None for part in work.parts):  # data sets without files are made by the code
        digest.update(np.concatenate([part.digests for part in work.parts])[work.order].tobytes())
    for name, tensor in work.network.trunk.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _in_memory(work: _Work, max_bytes: int | None) -> np.ndarray | None:
    if shortage := room_in_memory(work.num_bytes, max_bytes):
        _warn_of_space(work, *shortage)
        return None
    values = np.empty(work.shape, dtype=np.float32)
    flat, start = values.reshape(-1, work.shape[2]), 0
    for rows in work.batches():
        flat[start : start + len(rows)] = rows
        start += len(rows)
    return values


def _shared(work: _Work, folder: Path, max_bytes: int | None) -> np.ndarray | None:
    """Open the features of a folder, or compute them; of several processes one computes and the others wait."""

    def made() -> np.ndarray | None:
        in_use = {part.folder for part in work.parts if part.folder is not None}
        if shortage := make_room(folder, work.num_bytes, max_bytes, in_use):
            _warn_of_space(work, *shortage)
            return None
        _write(folder, work)
        values = _opened(folder, work.shape)
        assert values is not None, "features just written are whole"
        return values

    def opened(report_damage: bool) -> np.ndarray | None:
        return _opened(folder, work.shape, report_damage=report_damage)

    return open_or_make(folder, opened, made, "computes these features")


def _write(folder: Path, work: _Work) -> None:
    """Compute the features and write them, in place of any others; the caller holds the lock.

    Not through a memory map: there a full disk would kill the process instead of raising OSError.
    """
    file, total = folder / f"{uuid.uuid4().hex[:8]}.npy", 0
    try:
        with open(file, "wb") as handle:
            header = {"descr": "<f4", "fortran_order": False, "shape": work.shape}
            np.lib.format.write_array_header_1_0(handle, header)
            for rows in work.batches():
                block = np.ascontiguousarray(rows, dtype="<f4").data
                handle.write(block)
                total = zlib.crc32(block, total)
        flush_to_disk(file)
        manifest: dict[str, Any] = {"format": _FORMAT, "values": file.name, "shape": work.shape, "crc32": total}
        write_whole(folder / "manifest.json", json.dumps(manifest, indent=1), fsync=True)
    except BaseException:
        clear_pack(folder)
        raise


def _opened(folder: Path, shape: tuple[int, int, int], *, report_damage: bool = False) -> np.ndarray | None:
    """Open the features of a folder, memory-mapped; None where there are none, or they are damaged.

    report_damage: log a warning about those that are.
    """
    if not (folder / "manifest.json").exists():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return None
        file = folder / manifest["values"]
        values = np.load(file, mmap_mode="r", allow_pickle=False)
        if values.shape != shape or values.dtype != np.float32 or _sum_of(values) != manifest["crc32"]:
            raise ValueError("its values have changed")
    except _DAMAGED as error:
        if report_damage:
            _logger.warning("warning: the features in %s are damaged (%s): they are computed anew", folder, error)
        return None
    return np.asarray(values)  # as a plain array over the same pages: each slice of an np.memmap does work of its own


def _sum_of(values: np.ndarray) -> int:
    flat, total = values.reshape(-1), 0
    for start in range(0, flat.size, _BLOCK_BYTES // 4):
        total = zlib.crc32(np.ascontiguousarray(flat[start : start + _BLOCK_BYTES // 4]).data, total)
    return total


def _warn_of_space(work: _Work, available: str, cure: str) -> None:
    _logger.warning(
        "warning: the features of %s images in %d views need %.3f GiB, but %s. They are not kept: the backbone runs "
        "for every image again at each use. Cure: %s",
        f"{len(work.paths):,}",
        len(work.views),
        work.num_bytes / 2**30,
        available,
        cure,
    )
