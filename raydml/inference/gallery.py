"""A gallery: the embeddings of a folder of images in a faiss index, and the model that made them.

    index.faiss   IndexFlatL2 of N x D float32 (60,000 x 512: 123 MB); row i is image i
    gallery.json  names: the N images, relative to root, the folder that held them
    model/        the exported model (raydml/inference/export.py), for the queries

A search needs this folder only; the images themselves are opened only for pictures. Any other faiss index (IVF, HNSW,
PQ) may replace index.faiss, provided that row i is image i and its distances are squared Euclidean ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.data.catalog import images_below, listed, log_notes
from raydml.data.formats import CONVERT, DECODED_FORMATS, count_suffixes, left_out
from raydml.images.pixels import UnreadableImage, decode, decode_in_order
from raydml.inference.export import EmbeddingModel
from raydml.ops.files import folder_written_whole, require_space, write_whole

INDEX, CARD, MODEL = "index.faiss", "gallery.json", "model"
_MAX_PARTS = 10_000_000  # of an index, such as its inverted lists


class GalleryError(ValueError):
    """A folder without images, embeddings that are not finite, or a folder that is no gallery."""


class Neighbour(NamedTuple):
    """An image of a gallery and its Euclidean distance to the embedding of the query."""

    name: str
    distance: float


class EmbeddedBatch(NamedTuple):
    """The names and embeddings (n, D) float32 of the readable images of a batch, and the faults of the others."""

    names: list[str]
    embeddings: NDArray[np.float32]
    unreadable: list[UnreadableImage]


def image_names(root: Path) -> list[str]:
    """Return the `images_below` a folder, sorted; log a note on files that cannot be decoded by their suffix.

    Raises GalleryError if the folder cannot be read or holds no image.
    """
    if not root.is_dir():
        raise GalleryError(f"FOLDER = {str(root)!r} is no folder. Cure: give the folder that holds the images")
    passed_over: list[str] = []
    names = sorted(images_below(root, "", _refuse, passed_over))
    if not names:
        found = f"; they hold {count_suffixes(passed_over)}. Cure: {CONVERT}" if passed_over else ""
        formats = ", ".join(DECODED_FORMATS)
        raise GalleryError(f"FOLDER = {str(root)!r} and its folders hold no image ({formats}){found}")
    if passed_over:
        log_notes([left_out(passed_over)])
    return names


def _refuse(error: OSError) -> None:
    raise GalleryError(f"{error.filename}: {error.strerror}. Cure: make it readable, or move it away") from error


def embed_images(
    model: EmbeddingModel, root: Path, names: Sequence[str], *, batch_size: int = 64
) -> Iterator[EmbeddedBatch]:
    """Embed the images root/name in order, one batch after another; threads decode ahead of the network."""
    decoded = zip(names, decode_in_order(root, names, model.preprocessing.resizing), strict=True)
    while batch := list(islice(decoded, batch_size)):
        readable = [(name, image) for name, image in batch if isinstance(image, np.ndarray)]
        yield EmbeddedBatch(
            [name for name, _ in readable],
            model.embed([image for _, image in readable], batch_size=batch_size),
            [image for _, image in batch if isinstance(image, UnreadableImage)],
        )


def write_gallery(
    folder: Path, model: EmbeddingModel, root: Path, names: Sequence[str], embeddings: NDArray[np.float32]
) -> Path:
    """Write the folder that `Gallery.load` reads, gallery.json last, and return it.

    root: the folder of the images; names: N paths relative to it; embeddings: (N, D) of the model. Raises GalleryError
    for embeddings with NaN or infinity.
    """
    import faiss

    assert embeddings.shape == (len(names), model.embedding_dim)
    bad = [names[row] for row in np.flatnonzero(~np.isfinite(embeddings).all(axis=1)).tolist()]
    if bad:
        raise GalleryError(f"{len(bad)} images have embeddings with NaN or infinity: {listed(bad)}. The model diverged")
    index = faiss.IndexFlatL2(model.embedding_dim)
    index.add(np.ascontiguousarray(embeddings))
    card = {"root": str(root.resolve()), "num_images": len(names), "embedding_dim": model.embedding_dim}
    require_space(folder, embeddings.nbytes, "the index")
    with folder_written_whole(folder) as inside:
        (inside / CARD).unlink(missing_ok=True)
        model.save(inside / MODEL)
        write_whole(inside / INDEX, lambda aside: faiss.write_index(index, str(aside)))
        write_whole(inside / CARD, json.dumps({**card, "names": list(names)}, indent=1) + "\n")
    return folder


def _read_index(file: Path) -> Any:
    """Read a faiss index. A size in a damaged file cannot make faiss allocate more than the file has."""
    import faiss

    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(max(file.stat().st_size, 1))
    faiss.set_deserialization_loop_limit(_MAX_PARTS)
    try:
        return faiss.read_index(str(file))
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])


class Gallery:
    """A gallery in memory. root: the folder that held the images when they were indexed; names: relative to it."""

    def __init__(self, model: EmbeddingModel, index: Any, root: Path, names: Sequence[str]) -> None:
        self.model, self.index, self.root, self.names = model, index, root, tuple(names)

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> Gallery:
        """Read a folder of `write_gallery`. Raises GalleryError for another folder, ExportError for a damaged model."""
        folder = Path(folder)
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            names, root = card["names"], Path(card["root"])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError("its names are no list of texts")
            index = _read_index(folder / INDEX)
            if index is None:
                raise ValueError("its index is empty")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:  # the last two: faiss
            said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            raise GalleryError(
                f"{folder} is no gallery ({said}). Cure: give a folder that `index TARGET FOLDER OUT` wrote"
            ) from error
        model = EmbeddingModel.load(folder / MODEL, device)
        if (index.ntotal, index.d) != (len(names), model.embedding_dim):
            raise GalleryError(
                f"{folder}: the index holds {index.ntotal} x {index.d}, but there are {len(names)} names and a model "
                f"of {model.embedding_dim} dimensions: files of different galleries. Cure: index the images again"
            )
        return cls(model, index, root, names)

    def search(self, paths: Sequence[Path | str], k: int) -> list[list[Neighbour]]:
        """Return the k nearest images of each image file, nearest first; all images of a smaller gallery.

        Raises UnreadableImage for a file that cannot be decoded, and GalleryError for k < 1.
        """
        if k < 1:
            raise GalleryError(f"k: {k} neighbours; at least 1 is needed")
        images = [decode(Path(), str(path), self.model.preprocessing.resizing) for path in paths]
        return [self._nearest(query[None], k) for query in self.model.embed(images)]

    def _nearest(self, query: NDArray[np.float32], k: int) -> list[Neighbour]:
        # One query at a time: faiss expands the square for many, and then an image is not at distance 0 from itself.
        squared, rows = self.index.search(query, min(k, len(self.names)))
        return [
            Neighbour(self.names[row], float(np.sqrt(max(distance, 0.0))))
            for row, distance in zip(rows[0].tolist(), squared[0].tolist(), strict=True)
            if row >= 0  # an approximate index may find fewer
        ]
