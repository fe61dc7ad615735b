"""An exported model: one folder with weights, preprocessing and provenance, and the class that runs it.

    model.safetensors  the network, no pickle
    config.json        the network, its preprocessing and its provenance
    README.md          instructions, with and without raydml
    model.onnx         if requested: prepared pixels in, embeddings out, the normalisation inside the graph

The file names and the single JSON file follow timm's models on the Hugging Face Hub. The keys of Transformers'
preprocessor_config.json can express neither BGR nor this rounding.

Needs torch, torchvision and Pillow besides raydml itself; neither Ray nor MLflow is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from raydml.images.pixels import decode
from raydml.images.preprocessing import MAX_ASPECT, Preprocessing
from raydml.models.network import Network, build_network
from raydml.models.pretrained import load_exactly
from raydml.ops.files import digest_of, folder_written_whole, require_space, write_whole
from raydml.training import checkpoint

WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
ONNX = "model.onnx"
INPUT, OUTPUT = "images", "embeddings"
# The largest accepted difference from the network, relative to the longest embedding.
TOLERANCE = 1e-4

_README = """\
# {name}: image embeddings of {embedding_dim} dimensions

    from raydml.export import EmbeddingModel

    model = EmbeddingModel.load("path/to/this/folder")
    embeddings = model.embed(["one.jpg", "another.png"])  # float32, (2, {embedding_dim})

Images may be paths, PIL images or uint8 arrays (height, width, 3), of any sizes. Compare embeddings by Euclidean
distance. `config.json` says how the network is built, how an image is prepared and which experiment it comes from
(fingerprint {fingerprint}, weights of epoch {epoch}).{trained_on}

## Without raydml

`model.onnx`, if it is here (`export ... --onnx` writes it), is the same network with the normalisation inside:

- in: `images`, uint8 (N, {crop_px}, {crop_px}, 3), RGB, any N
- out: `embeddings`, float32 (N, {embedding_dim})

An image is turned upright (EXIF) first, {resizing}
({kernel}), and cut to its centre {crop_px} x {crop_px}.{strips}

    import numpy, onnxruntime
    from PIL import Image, ImageOps
{scaled}
    def prepared(path):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        size = {size}
        pixels = scaled(image, size)
        left, top = (round((side - {crop_px}) / 2) for side in size)
        return pixels[top : top + {crop_px}, left : left + {crop_px}]

    session = onnxruntime.InferenceSession("model.onnx")
    (embeddings,) = session.run(None, {{"images": numpy.stack([prepared("one.jpg"), prepared("another.png")])}})
{faster}"""
_STRIPS = f"""
A strip longer than {MAX_ASPECT} times its short side is first cut to its centre of that shape, which the code below
leaves out."""
_SIZES = {
    "short_side": "[int({resize_px} * side / min(image.size)) for side in image.size]",
    "squash": "({resize_px}, {resize_px})",
}
# torch's kernel (UpSampleKernelAVXAntialias.h) in numpy: its weights are whole numbers of 16 bits.
_SCALED_AS_TORCH = """
    def scaled(image, size):
        pixels = numpy.asarray(image)
        for new in size:  # the rows, then the columns
            factor = pixels.shape[1] / new
            middles = (numpy.arange(new)[:, None] + 0.5) * factor
            away = abs(numpy.arange(pixels.shape[1]) + 0.5 - middles) / max(factor, 1)
            weights = {weights}
            weights /= weights.sum(axis=1, keepdims=True)
            bits = max(n for n in range(23) if int(weights.max() * 2**n + 0.5) < 2**15)
            weights = numpy.trunc(weights * 2**bits + numpy.copysign(0.5, weights))
            columns = [row[row != 0] @ pixels[:, row != 0] for row in weights]
            pixels = numpy.floor(numpy.stack(columns) / 2**bits + 0.5).clip(0, 255).astype(numpy.uint8)
        return pixels
"""
_SCALED_AS_PILLOW = """
    def scaled(image, size):
        rows = image.resize((size[0], image.height), Image.Resampling.LANCZOS)
        return numpy.asarray(rows.resize(size, Image.Resampling.LANCZOS))
"""
_WEIGHTS = {
    "bilinear": "numpy.maximum(1 - away, 0)",
    "bicubic": """((1.5 * away - 2.5) * away**2 + 1) * (away < 1)
            weights += (((-0.5 * away + 2.5) * away - 4) * away + 2) * ((1 <= away) & (away < 2))""",
}
_FASTER = """
`scaled` gives the pixels of the training, bit for bit. Where torchvision is installed, its
`torchvision.transforms.v2.functional.resize(tensor, size[::-1], InterpolationMode.{filter}, antialias=True)` gives
the same for a uint8 tensor, and faster. Pillow's `image.resize(size, Image.Resampling.{filter})` is faster, too; one or
two values in a thousand of a photograph are then one grey level away.
"""


class ExportError(ValueError):
    """A folder that is no exported model, or images that cannot be embedded."""


def rebuild(card: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> tuple[Network, Preprocessing]:
    """Build the network that a model card describes, with these weights, on the CPU in evaluation mode.

    Raises ExportError for a card without the required keys and WeightsError for weights that do not fit.
    """
    missing = [key for key in ("network", "preprocessing") if key not in card]
    if missing:
        raise ExportError(f"{source}: the model card lacks {', '.join(missing)}; it was not written by raydml")
    largest = max((size for tensor in weights.values() for size in tensor.shape), default=0)
    try:
        if not 0 < card["network"]["embedding_dim"] <= largest:
            raise ValueError(f"embedding_dim: {card['network']['embedding_dim']} does not fit the weights")
        # All initial values are overwritten, so the seed does not matter.
        network = build_network(**{**card["network"], "weights": "none", "seed": 0})
        preprocessing = Preprocessing.from_dict(card["preprocessing"])
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise ExportError(
            f"{source}: the model card describes no network ({type(error).__name__}: {said}); it was not "
            "written by raydml"
        ) from error
    load_exactly(network, dict(weights), source)
    return network.eval(), preprocessing


def export_model(checkpoint_folder: Path, out_folder: Path) -> Path:
    """Write the best weights of a checkpoint as a self-contained model folder, and return it.

    Raises CheckpointError for a damaged checkpoint, ExportError and WeightsError for one that describes no network.
    """
    return load_checkpoint(checkpoint_folder).save(out_folder)


def load_checkpoint(folder: Path, device: str = "cpu") -> EmbeddingModel:
    """Load the network of a checkpoint's best epoch without exporting it. Raises as `export_model` does."""
    card, weights = checkpoint.load_card(folder), checkpoint.load_weights(folder)
    network, preprocessing = rebuild(card, weights, str(folder))
    return EmbeddingModel(network, preprocessing, card, device)


def is_exported(folder: Path) -> bool:
    """Return whether a folder has the files of an exported model, by name; a checkpoint does not."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


class EmbeddingModel:
    """A network with its preprocessing. ``card`` is the whole config.json; ``embedding_dim`` is D."""

    def __init__(self, network: Network, preprocessing: Preprocessing, card: Mapping[str, Any], device: str) -> None:
        self.network = network.to(device).eval()
        self.preprocessing = preprocessing
        self.card = dict(card)
        self.device = device
        self.embedding_dim = int(card["network"]["embedding_dim"])

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> EmbeddingModel:
        """Load a folder that `export_model` wrote. Raises ExportError for an incomplete or damaged one."""
        folder = Path(folder)
        weights = folder / WEIGHTS
        try:
            card = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            found = digest_of(weights)
        except (OSError, ValueError, RecursionError) as error:
            raise ExportError(
                f"{folder} is no exported model ({type(error).__name__}: {error}); "
                "give the folder that `export` or export_model wrote"
            ) from error
        stated = card.get("weights_sha256") if isinstance(card, dict) else None
        if stated is None:
            raise ExportError(f"{folder} is no exported model: its JSON file states no weights_sha256")
        if found != stated:
            raise ExportError(f"{weights} is not as it was written (sha256 differs); export it again")
        from safetensors import SafetensorError  # not needed to train
        from safetensors.torch import load_file

        try:
            tensors = load_file(weights)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:  # its sha256 fits: made by somebody else
            raise ExportError(f"{weights} holds no weights ({error}); export it again") from error
        network, preprocessing = rebuild(card, tensors, str(folder))
        return cls(network, preprocessing, card, device)

    def save(self, folder: Path | str) -> Path:
        """Write the folder that `load` reads, and return it.

        A new folder appears when it is complete. An existing model is replaced, its card last. The card holds the
        sha256 of the weights, so `load` refuses a folder that was only half replaced.
        """
        from safetensors.torch import save as serialised  # not needed to train

        folder = Path(folder)
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        # Not save_file: its file is readable by the owner only.
        content = serialised(weights)
        require_space(folder, len(content), "the model")
        with folder_written_whole(folder) as inside:
            write_whole(inside / WEIGHTS, content)
            write_whole(inside / README, _readme(self.card, self.preprocessing))
            written = {"preprocessing": self.preprocessing.to_dict(), "weights_sha256": digest_of(inside / WEIGHTS)}
            card_text = json.dumps({**self.card, **written}, indent=2, allow_nan=False) + "\n"
            write_whole(inside / CONFIG, card_text)
        return folder

    def embed(
        self, images: Sequence[str | Path | Image.Image | np.ndarray] | np.ndarray, *, batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Embed N images: (N, D) float32, in full precision.

        images: paths, PIL images and uint8 arrays (H, W, 3) or (H, W), mixed and of any sizes, or one uint8 array
        (N, H, W, 3). Each is resized, cropped to its centre and normalised, as in the evaluation of its trial.

        Raises ExportError for a single image that is not in a list, PreprocessingError for another kind of array, and
        UnreadableImage for a file without pixels.
        """
        if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim != 4):
            raise ExportError(f"images: expected a list of images, got one {type(images).__name__}; write [image]")
        embeddings = np.empty((len(images), self.embedding_dim), dtype=np.float32)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            pixels = torch.from_numpy(np.stack([self._read(image) for image in images[rows]]))
            embeddings[rows] = self.embed_crops(pixels)
        return embeddings

    def _read(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(image, (str, Path)):
            image = decode(Path(), str(image), self.preprocessing.resizing)  # every format, as in a trial
        return self.preprocessing.read(image)

    @torch.inference_mode()
    def embed_crops(self, pixels: Tensor) -> NDArray[np.float32]:
        """Embed what `Preprocessing.read` returns: uint8 (B, crop_px, crop_px, 3) -> (B, D)."""
        batch = self.preprocessing.for_evaluation(pixels.to(self.device))
        embeddings: NDArray[np.float32] = self.network(batch).float().cpu().numpy()
        return embeddings


def epoch_of_weights(card: Mapping[str, Any]) -> int | str:
    """Return the epoch whose weights a model has: the best one, which is not always the last one trained."""
    epoch: int | str = card.get("best_epoch", card.get("epoch", "unknown"))
    return epoch


def _readme(card: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    interpolation, resize_px = preprocessing.interpolation, preprocessing.resize_px
    if interpolation == "lanczos":  # torch has no such kernel
        kernel, scaled, faster = "lanczos, antialiased, as Pillow does it, the rows first", _SCALED_AS_PILLOW, ""
    else:
        kernel = f"{interpolation}, antialiased, as torch and torchvision do it with uint8"
        scaled = _SCALED_AS_TORCH.format(weights=_WEIGHTS[interpolation])
        faster = _FASTER.format(filter=interpolation.upper())
    in_words = {
        "short_side": f"its short side scaled to {resize_px} pixels",
        "squash": f"both sides scaled to {resize_px} pixels",
    }
    return _README.format(
        name=card["network"]["backbone"],
        embedding_dim=card["network"]["embedding_dim"],
        fingerprint=card.get("fingerprint", "unknown"),
        epoch=epoch_of_weights(card),
        trained_on=f" It was trained on {card['trained_on']}." if "trained_on" in card else "",
        crop_px=preprocessing.crop_px,
        strips=_STRIPS if preprocessing.resize == "short_side" else "",
        kernel=kernel,
        resizing=in_words[preprocessing.resize],
        size=_SIZES[preprocessing.resize].format(resize_px=resize_px),
        scaled=scaled,
        faster=faster,
    )


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
        "epoch": epoch_of_weights(model.card),
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
        expected = model.embed_crops(torch.from_numpy(pixels))
        (found,) = session.run([OUTPUT], {INPUT: pixels})
        length = float(np.linalg.norm(expected, axis=1).max()) or 1.0
        largest = max(largest, float(np.abs(found - expected).max()) / length)
    return largest
