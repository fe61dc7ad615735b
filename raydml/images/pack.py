"""A pack: the decoded images of many files one after the other in one file, memory-mapped by every process of a node.

    <cache_dir>/images-<key>/manifest.json      written last: a folder without it holds no pack
                             <token>.index.npy  (N, 3) int64: height, width, bytes of the source file
                             <token>.pixels     uint8 (H, W, 3) each, every image beginning at a multiple of 64 bytes
                             lock, progress.json

The key stands for the root, the files in their order, the resizing and the format, and for nothing of how these files
are divided: every fold selects rows of the same pack. A pack is current while the files have the times and sizes that
it was made from. Its bytes are not summed: that would read the whole pack at each start.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from raydml.images.decoding import Resizing, UnreadableImage, decode
from raydml.images.pixels import PackedPixels

_FORMAT = 2  # raise it when the way an image becomes pixels changes: old packs are then not opened
_ALIGNMENT_BYTES = 64
Bytes = TypeVar("Bytes", int, np.ndarray)
_DAMAGED = (FileNotFoundError, ValueError, KeyError, TypeError, EOFError)


class Pack(NamedTuple):
    """pixels: of the files that could be read, in the order of the paths. skipped: path -> reason of the others."""

    pixels: PackedPixels
    skipped: dict[str, str]


@dataclass(frozen=True, eq=False)
class Source:
    """What a pack is made from.

    root, paths: the files, N of them. modified_ns: (N,) int64, their times as listed. content: a hash over (among
    others) their sizes as listed.
    """

    root: Path
    paths: tuple[str, ...]
    modified_ns: np.ndarray
    content: str
    resizing: Resizing

    def folder(self, cache_dir: Path) -> Path:
        """Where the pack of these files lies."""
        return cache_dir / f"images-{_digest([_FORMAT, str(self.root.resolve()), self.resizing, self.paths])}"

    def modified(self) -> str:
        """A hash of the files' times."""
        return hashlib.sha256(self.modified_ns.tobytes()).hexdigest()[:16]


def aligned(num_bytes: Bytes) -> Bytes:
    """What images of so many bytes take up in a pack."""
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def offsets_of(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """sizes: (N, 2) int64, height and width -> (N,) int64 where each image begins, and the bytes of all."""
    ends = np.cumsum(aligned(sizes.prod(axis=1) * 3), dtype=np.int64)
    return ends - aligned(sizes.prod(axis=1) * 3), int(ends[-1]) if len(ends) else 0


def open_pack(folder: Path, source: Source, *, try_skipped: bool = True) -> Pack | None:
    """The pack of these files if there is a whole and current one. Files are only looked at in two cases:

    those that had no pixels are tried again (a disk may have hiccuped, a permission may be mended; not with
    try_skipped False), and where only `content` differs (an image of another part has changed, or another list names
    the same files) sizes are compared.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["modified"] != source.modified():
            return None
        skipped = dict(manifest["skipped"])
        index = np.load(folder / manifest["index"])
        file = folder / manifest["pixels"]
        offsets, num_bytes = offsets_of(index[:, :2])
        if file.stat().st_size != num_bytes or len(index) != sum(path not in skipped for path in source.paths):
            return None
        flat = np.memmap(file, dtype=np.uint8, mode="r") if num_bytes else np.empty(0, dtype=np.uint8)
    except (*_DAMAGED, IndexError):
        return None
    if try_skipped and any(_is_readable(source, path) for path in skipped):
        return None
    if manifest["content"] != source.content and not _same_sizes(source, skipped, index[:, 2]):
        return None
    # As a plain array over the same pages: np.memmap does work of its own each time it is sliced.
    return Pack(PackedPixels(np.asarray(flat), offsets, index[:, :2].astype(np.int32)), skipped)


def manifest_of(source: Source, *, token: str, skipped: dict[str, str]) -> dict[str, Any]:
    """What `open_pack` needs to know, and what tells a person what lies there."""
    return {
        "format": _FORMAT,
        "index": f"{token}.index.npy",
        "pixels": f"{token}.pixels",
        "modified": source.modified(),
        "content": source.content,
        "skipped": sorted(skipped.items()),
        "root": str(source.root),
        "num_files": len(source.paths),
        "resizing": source.resizing._asdict(),
    }


def _is_readable(source: Source, path: str) -> bool:
    try:
        decode(source.root, path, source.resizing)
    except UnreadableImage:
        return False
    return True


def _same_sizes(source: Source, skipped: dict[str, str], num_bytes: np.ndarray) -> bool:
    kept = [path for path in source.paths if path not in skipped]
    with ThreadPoolExecutor(16, thread_name_prefix="stat") as pool:
        return list(pool.map(lambda path: _size_bytes(source.root / path), kept)) == num_bytes.tolist()


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1  # gone since it was listed


def _digest(value: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
