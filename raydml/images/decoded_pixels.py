"""Many image files -> their pixels, decoded in threads each time they are asked for, in order."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from raydml.images.decoding import Header, Opener, Resizing, UnreadableImage, decode, open_regular, read_header
from raydml.images.pixels import Rows

Result = TypeVar("Result")
_NUM_THREADS = 8  # more than cores: they wait for a network disk together


class DecodedPixels:
    """Images decoded from their files each time, as `Pixels`; read by several threads at once.

    root, paths: the files. resizing None: at their full resolution. The pixels are bit for bit those of a pack
    with the same resizing. num_threads: files opened and decoded at the same time; a selection shares the threads.
    opener: opens a file for reading. Threads do not survive a fork: each process makes its own.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        resizing: Resizing | None,
        *,
        num_threads: int = _NUM_THREADS,
        opener: Opener = open_regular,
    ) -> None:
        self.root, self.paths, self.resizing = root, tuple(paths), resizing
        self._opener = opener
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Rows) -> list[np.ndarray]:
        """Raises UnreadableImage (a DataError) for the first file that gives no pixels."""
        paths = [self.paths[row] for row in rows]
        return list(self._pool.map(partial(decode, self.root, resizing=self.resizing, opener=self._opener), paths))

    def select(self, rows: Rows) -> "DecodedPixels":
        chosen = object.__new__(DecodedPixels)
        chosen.__dict__.update(self.__dict__, paths=tuple(self.paths[row] for row in rows))
        return chosen


def decode_in_order(
    root: Path, paths: Sequence[str], resizing: Resizing | None
) -> Iterator[np.ndarray | UnreadableImage]:
    """The pixels of every file, or why it has none, in the order of the paths. Memory: a few images a thread."""
    return _in_order(partial(decode, root, resizing=resizing), paths)


def read_headers(root: Path, paths: Sequence[str]) -> Iterator[Header | UnreadableImage]:
    """The header of every file, or why it has none, in the order of the paths."""
    return _in_order(partial(read_header, root), paths)


def _in_order(function: Callable[[str], Result], paths: Sequence[str]) -> Iterator[Result | UnreadableImage]:
    def attempt(path: str) -> Result | UnreadableImage:
        try:
            return function(path)
        except UnreadableImage as reason:
            return reason

    num_threads = min(32, max(_NUM_THREADS, os.cpu_count() or 1))
    remaining = iter(paths)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        # Not pool.map: it would run ahead of whoever writes the images, with all of them in memory.
        ahead: deque[Future[Result | UnreadableImage]] = deque()
        try:
            ahead.extend(pool.submit(attempt, path) for path in islice(remaining, 4 * num_threads))
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(attempt, path) for path in islice(remaining, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
