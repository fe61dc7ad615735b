"""Images that are nearly the same: copies that were resized, compressed again, or cropped a little.

Two steps, both by plain arithmetic. Perceptual hashes find candidates: 64 signs of the lowest frequencies of the grey
image (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1), of the whole
and of parts of it, so that a copy without its margin, a side or a corner is found. The correlation of the small grey
images decides.

Memory: 1.1 kB an image. Time: that of decoding each image once, and comparing each hash with all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raydml.data.catalog import Catalog
from raydml.data.datasets import images_without_files
from raydml.images.pixels import UnreadableImage, decode_in_order
from raydml.images.preprocessing import Resizing

_SIDE_PX = 32
_NUM_FREQUENCIES = 8
_DECODED_PX = 64  # the parts are cut out of this
# What is cut off (left, top, right, bottom), as shares of the sides: nothing, two margins, a side, a corner.
_CUTS = (
    (0.0, 0.0, 0.0, 0.0),
    *((share, share, share, share) for share in (0.04, 0.08)),
    *(tuple(0.1 * (side == other) for other in range(4)) for side in range(4)),
    *((0.06, 0.06, 0.0, 0.0), (0.0, 0.06, 0.06, 0.0), (0.06, 0.0, 0.0, 0.06), (0.0, 0.0, 0.06, 0.06)),
)
_MAX_BITS = 10  # of 64 that differ; those of unrelated images differ by 32, with a deviation of 4 or more
_MIN_CORRELATION = 0.92
_WORTH_A_SEARCH = 0.6  # a correlation that another cut may raise to that
_SEARCH_STEP = 0.03
_FLAT = 4.0  # grey levels of deviation below which an image has no structure to compare
_MAX_FLAT_DIFFERENCE = 3.0  # between the means of two such images
_ROWS_AT_ONCE = 64
MAX_CANDIDATES = 2_000_000


class NearDuplicates(NamedTuple):
    """Pairs of nearly equal images among N.

    first, second: (P,) rows, first < second; the most similar pairs first. similarity: (P,) correlation of the small
    grey images, at most 1. unreadable: path -> reason of images that were not compared. is_complete: False where there
    were more than MAX_CANDIDATES candidates, of which the first ones were compared.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float64]
    unreadable: dict[str, str]
    is_complete: bool

    def kinds(self, catalog: Catalog) -> dict[str, NDArray[np.bool_]]:
        """Return which pairs (P,) are of one class, of two classes, and on both sides of the catalog's own split."""
        same = catalog.labels[self.first] == catalog.labels[self.second]
        found = {"of two classes": ~same, "of one class": same}
        if catalog.given_split is not None:
            parts = np.array(catalog.given_split)
            found["across the published training and test images"] = parts[self.first] != parts[self.second]
        return found


class _Prints(NamedTuple):
    """hashes: (N, H) uint64, of the whole image and of its parts. thumbnails: (N, 32, 32) uint8."""

    hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]


def near_duplicates(catalog: Catalog, progress: Callable[[str, int, int], None] | None = None) -> NearDuplicates:
    """Compare all images of a catalog with one another.

    progress: called with what is done, how many images are done and their total. Test images are decoded, and nothing
    is scored.
    """
    num_images = len(catalog.paths)
    hashes = np.zeros((num_images, len(_CUTS)), dtype=np.uint64)
    thumbnails = np.zeros((num_images, _SIDE_PX, _SIDE_PX), dtype=np.uint8)
    unreadable: dict[str, str] = {}
    readable: list[int] = []
    for row, image in enumerate(_small_images(catalog)):
        if isinstance(image, UnreadableImage):
            unreadable[image.path] = image.reason
        else:
            hashes[row], thumbnails[row] = _print_of(image)
            readable.append(row)
        if progress is not None and ((row + 1) % 64 == 0 or row + 1 == num_images):
            progress("reading", row + 1, num_images)
    rows = np.array(readable, dtype=np.int64)
    prints = _Prints(hashes[rows], thumbnails[rows])
    first, second, similarity, is_complete = compare_prints(*prints, progress=progress)
    return NearDuplicates(rows[first], rows[second], similarity, unreadable, is_complete)


def _small_images(catalog: Catalog) -> Iterator[NDArray[np.uint8] | UnreadableImage]:
    if catalog.root is None:
        yield from images_without_files(catalog, np.arange(len(catalog.paths)))
    else:
        resizing = Resizing(_DECODED_PX, "squash", "bilinear")
        yield from decode_in_order(Path(catalog.root), catalog.paths, resizing)


def _print_of(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    grey = Image.fromarray(image).convert("L")
    parts = [_resized(grey, cut) for cut in _CUTS]
    return np.array([_hash_of(part) for part in parts], dtype=np.uint64), parts[0]


def _resized(grey: Image.Image, cut: Sequence[float]) -> NDArray[np.uint8]:
    """Return an image without what is cut off, as (32, 32) uint8."""
    width, height = grey.size
    left, top, right, bottom = cut
    box = (width * left, height * top, width * (1 - right), height * (1 - bottom))
    return np.asarray(grey.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BILINEAR, box))


_STEPS = (np.arange(_SIDE_PX) + 0.5) * np.pi / _SIDE_PX
_COSINES = np.cos(np.arange(_NUM_FREQUENCIES)[:, None] * _STEPS)  # rows of a DCT-II


def _hash_of(thumbnail: NDArray[np.uint8]) -> np.uint64:
    spectrum = (_COSINES @ thumbnail.astype(np.float64) @ _COSINES.T).ravel()
    bits = spectrum > np.median(spectrum[1:])  # the first is the mean grey
    return np.uint64(np.packbits(bits).view(">u8")[0])


def compare_prints(
    hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8], progress: Callable[[str, int, int], None] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], bool]:
    """Return first and second row, and similarity of each pair of nearly equal images, and whether all were compared.

    hashes: (N, H), thumbnails: (N, 32, 32), see `_Prints`. Each whole image is compared with the others' wholes and
    parts.
    """
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    num_images, num_candidates = len(hashes), 0
    for start in range(0, num_images, _ROWS_AT_ONCE):
        some = hashes[start : start + _ROWS_AT_ONCE, 0]
        near = np.zeros((len(some), num_images), dtype=bool)
        for of_part in hashes.T:
            near |= np.bitwise_count(some[:, None] ^ of_part[None, :]) <= _MAX_BITS
        places, others = np.nonzero(near)
        rows = places + start
        is_other = rows != others
        pairs = _verified(thumbnails, rows[is_other], others[is_other])
        found.append(pairs)
        num_candidates += int(is_other.sum())
        if progress is not None:
            progress("comparing", min(start + _ROWS_AT_ONCE, num_images), num_images)
        if num_candidates > MAX_CANDIDATES:
            break
    first, second, similarity = (np.concatenate(of) for of in zip(*found, strict=True)) if found else _nothing()
    low, high = np.minimum(first, second), np.maximum(first, second)
    # Each pair once, by the better of its two comparisons.
    order = np.lexsort((-similarity, high, low))
    low, high, similarity = low[order], high[order], similarity[order]
    is_new = np.ones(len(low), dtype=bool)
    is_new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    low, high, similarity = low[is_new], high[is_new], similarity[is_new]
    by_similarity = np.lexsort((high, low, -similarity))
    return low[by_similarity], high[by_similarity], similarity[by_similarity], num_candidates <= MAX_CANDIDATES


def _nothing() -> Sequence[NDArray]:
    return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0)


def _verified(
    thumbnails: NDArray[np.uint8], first: NDArray[np.int64], second: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the candidates that are nearly equal: the whole first image is like the second or a part of it."""
    similarity = np.array([_similarity(thumbnails[a], thumbnails[b]) for a, b in zip(first, second, strict=True)])
    kept = similarity >= _MIN_CORRELATION if len(similarity) else np.zeros(0, dtype=bool)
    return first[kept], second[kept], similarity[kept] if len(similarity) else np.zeros(0)


def _similarity(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    one = first.astype(np.float64)
    if one.std() < _FLAT or second.std() < _FLAT:
        is_same = one.std() < _FLAT > second.std() and abs(one.mean() - second.mean()) <= _MAX_FLAT_DIFFERENCE
        return float(is_same)
    grey = Image.fromarray(second)

    def of(cut: Sequence[float]) -> float:
        return _correlation(one, _resized(grey, cut))

    best = max(_CUTS, key=of)
    similarity = of(best)
    while _WORTH_A_SEARCH <= similarity < _MIN_CORRELATION:
        around = [
            tuple(max(0.0, cut + step * (side == other)) for other, cut in enumerate(best))
            for side in range(4)
            for step in (-_SEARCH_STEP, _SEARCH_STEP)
        ]
        better = max(around, key=of)
        if of(better) <= similarity:
            break
        best, similarity = better, of(better)
    return similarity


def _correlation(one: NDArray[np.float64], other: NDArray[np.uint8]) -> float:
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm else 0.0
