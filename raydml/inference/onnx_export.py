"""An exported model as one ONNX file: prepared pixels in, embeddings out, the normalisation inside the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.images.preprocessing import MAX_ASPECT, Preprocessing
from raydml.inference.export import EmbeddingModel, ExportError
from raydml.models.network import Network
from raydml.ops.files import write_whole

ONNX = "model.onnx"
INPUT, OUTPUT = "images", "embeddings"
# The largest accepted difference from the network, relative to the longest embedding.
TOLERANCE = 1e-4


class PixelsToEmbeddings(nn.Module):
    """uint8 (N, crop_px, crop_px, 3), RGB -> float32 (N, D): `Preprocessing.normalise` and the network."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: Network, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.is_bgr = preprocessing.channels == "BGR"
        # Buffers, because the tensors that `normalise` caches must not come from a tracer.
        scale, shift = preprocessing.scale_and_shift(torch.device("cpu"))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        if self.is_bgr:
            pixels = pixels.flip(1)
        embeddings: Tensor = self.network(pixels * self.scale + self.shift)
        return embeddings


def export_onnx(model: EmbeddingModel | Path | str, path: Path | str) -> float:
    """Write a model as one ONNX file and return the largest difference between its embeddings and the network's.

    model: an `EmbeddingModel` on the CPU, or the folder of one. The graph takes ``images``, uint8 (N, crop_px, crop_px,
    3), RGB, as `Preprocessing.read` returns them, for any N from 1, and yields ``embeddings``, float32 (N, D). Channel
    order, mean, deviation and range are inside the graph. Reading, resizing and cropping are not; their settings are in
    the metadata of the file (resize, resize_px, interpolation, crop_px, max_aspect) and in the folder's README.md.

    Before the file gets its name, ONNX Runtime runs it on random pixels, one image and three at a time.

    Raises ExportError if a package of the extra ``onnx`` is missing, for a model that is not on the CPU, and for a file
    whose embeddings differ by more than TOLERANCE.
    """
    require_packages()
    model = model if isinstance(model, EmbeddingModel) else EmbeddingModel.load(model)
    if model.device != "cpu":
        raise ExportError(f"the model is on {model.device}; load it on the CPU to export it to ONNX")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    differences: list[float] = []

    def write(aside: Path) -> None:
        _write(model, aside)
        differences.append(_difference(model, aside))
        if not differences[0] <= TOLERANCE:
            raise ExportError(
                f"the embeddings of the ONNX file differ from the network's by {differences[0]:.1e} of their length, "
                f"more than {TOLERANCE:.0e}; it was not kept. Cure: another version of torch, onnxscript or onnxruntime"
            )

    write_whole(path, write)
    return differences[0]


def require_packages() -> None:
    """Raise ExportError with the cure if a package for writing and checking ONNX files is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"ONNX needs a package that is not installed ({error}). Cure: pip install 'raydml[onnx]'"
        ) from error


def _write(model: EmbeddingModel, path: Path) -> None:
    crop_px = model.preprocessing.crop_px
    program = torch.onnx.export(
        PixelsToEmbeddings(model.network, model.preprocessing).eval(),
        # Two images, because torch.export takes a batch size of one for a constant.
        (torch.zeros(2, crop_px, crop_px, 3, dtype=torch.uint8),),
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(_metadata(model))
    program.save(path, external_data=False)


def _metadata(model: EmbeddingModel) -> dict[str, str]:
    preparation = model.preprocessing
    facts: dict[str, Any] = {
        "input": f"uint8 (N, {preparation.crop_px}, {preparation.crop_px}, 3), RGB, resized and cropped",
        "output": f"float32 (N, {model.embedding_dim}); compare by Euclidean distance",
        "resize": preparation.resize,
        "resize_px": preparation.resize_px,
        "interpolation": preparation.interpolation,
        "crop_px": preparation.crop_px,
        "max_aspect": MAX_ASPECT,
        "embedding_dim": model.embedding_dim,
        "fingerprint": model.card.get("fingerprint", "unknown"),
        "epoch": model.card.get("epoch", "unknown"),
        "raydml_version": model.card.get("raydml_version", "unknown"),
        "preprocessing": json.dumps(preparation.to_dict()),
    }
    return {name: str(value) for name, value in facts.items()}


def _difference(model: EmbeddingModel, path: Path) -> float:
    """Return the largest difference of any component, relative to the longest embedding, on one image and on three."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    largest = 0.0
    for num_images in (1, 3):
        crop_px = model.preprocessing.crop_px
        pixels = random.integers(0, 256, (num_images, crop_px, crop_px, 3), dtype=np.uint8)
        expected = _embeddings_of_crops(model, pixels)
        (found,) = session.run([OUTPUT], {INPUT: pixels})
        length = float(np.linalg.norm(expected, axis=1).max()) or 1.0
        largest = max(largest, float(np.abs(found - expected).max()) / length)
    return largest


def _embeddings_of_crops(model: EmbeddingModel, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.inference_mode():
        batch = model.preprocessing.for_evaluation(torch.from_numpy(pixels))
        embeddings: NDArray[np.float32] = model.network(batch).float().numpy()
    return embeddings
