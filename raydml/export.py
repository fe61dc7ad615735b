"""A trained network to take away: one folder with weights, preprocessing and provenance, and the class that runs it.

    weights.safetensors  the network, no pickle
    model.json           how to rebuild the network, how to prepare an image, where the weights come from
    README.md            how to load it

Needs torch, torchvision and Pillow besides raydml itself; neither Ray nor MLflow is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raydml import checkpoint
from raydml.model import Network, build_network
from raydml.preprocessing import Preprocessing
from raydml.pretrained import load_exactly

WEIGHTS, CARD, README = "weights.safetensors", "model.json", "README.md"

_README = """\
# {name}: image embeddings of {embedding_dim} dimensions

    from raydml.export import EmbeddingModel

    model = EmbeddingModel.load("path/to/this/folder")
    embeddings = model.embed(["one.jpg", "another.png"])  # float32, (2, {embedding_dim})

Images may be paths, PIL images or uint8 arrays (height, width, 3), of any sizes. Compare embeddings by Euclidean
distance. `model.json` says how the network is built, how an image is prepared and which experiment it comes from
(fingerprint {fingerprint}, epoch {epoch}).
"""


class ExportError(ValueError):
    """A folder that is no exported model, or images that cannot be embedded."""


def rebuild(card: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> tuple[Network, Preprocessing]:
    """The network that a model card describes, with these weights, on the CPU in evaluation mode.

    Raises ExportError for a card without the needed keys and WeightsError for weights that do not fit.
    """
    missing = [key for key in ("network", "preprocessing") if key not in card]
    if missing:
        raise ExportError(f"{source}: the model card lacks {', '.join(missing)}; it was not written by raydml")
    # The initial values are overwritten, so neither the seed nor published weights matter.
    network = build_network(**{**card["network"], "weights": "none", "seed": 0})
    load_exactly(network, dict(weights), source)
    return network.eval(), Preprocessing.from_dict(card["preprocessing"])


def export_model(checkpoint_folder: Path, out_folder: Path) -> Path:
    """Write the best weights of a checkpoint as a self-contained model folder, and return it.

    A model that is there already is replaced, its card last; the card holds the sha256 of the weights, so that a
    folder caught in between is refused by `EmbeddingModel.load`. Raises CheckpointError for a damaged checkpoint.
    """
    from safetensors.torch import save_file  # not needed to train

    card = checkpoint.load_card(checkpoint_folder)
    weights = checkpoint.load_weights(checkpoint_folder)
    rebuild(card, weights, str(checkpoint_folder))  # what cannot be loaded is not handed out
    out_folder = Path(out_folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    _write(out_folder / WEIGHTS, lambda path: save_file(weights, path))
    text = _README.format(
        name=card["network"]["backbone"],
        embedding_dim=card["network"]["embedding_dim"],
        fingerprint=card.get("fingerprint", "unknown"),
        epoch=card.get("epoch", "unknown"),
    )
    _write(out_folder / README, lambda path: path.write_text(text, encoding="utf-8"))
    card_text = json.dumps({**card, "weights_sha256": _sha256(out_folder / WEIGHTS)}, indent=2, allow_nan=False)
    _write(out_folder / CARD, lambda path: path.write_text(card_text + "\n", encoding="utf-8"))
    return out_folder


class EmbeddingModel:
    """Images in, embeddings out. ``card`` is the whole model.json; ``embedding_dim`` is D."""

    def __init__(self, network: Network, preprocessing: Preprocessing, card: Mapping[str, Any], device: str) -> None:
        self.network = network.to(device).eval()
        self.preprocessing = preprocessing
        self.card = dict(card)
        self.device = device
        self.embedding_dim = int(card["network"]["embedding_dim"])

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> EmbeddingModel:
        """A folder written by `export_model`. Raises ExportError for one that is incomplete or damaged."""
        folder = Path(folder)
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            found = _sha256(folder / WEIGHTS)
        except (OSError, json.JSONDecodeError) as error:
            raise ExportError(
                f"{folder} is no exported model ({type(error).__name__}: {error}); "
                "give the folder that export_model wrote"
            ) from error
        if found != card.get("weights_sha256"):
            raise ExportError(f"{folder / WEIGHTS} is not as it was written (sha256 differs); export it again")
        from safetensors.torch import load_file  # not needed to train

        network, preprocessing = rebuild(card, load_file(folder / WEIGHTS), str(folder))
        return cls(network, preprocessing, card, device)

    def embed(
        self, images: Sequence[str | Path | Image.Image | np.ndarray] | np.ndarray, *, batch_size: int = 64
    ) -> NDArray[np.float32]:
        """N images -> (N, D) float32, in full precision.

        images: paths, PIL images and uint8 arrays (H, W, 3) or (H, W), mixed and of any sizes, or one uint8 array
        (N, H, W, 3). Each is prepared as in training: resized, centre crop, normalised.

        Raises ExportError for a single image that is not in a list, PreprocessingError for an array of another kind,
        and OSError for a file that is no image.
        """
        if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim != 4):
            raise ExportError(f"images: expected a list of images, got one {type(images).__name__}; write [image]")
        embeddings = np.empty((len(images), self.embedding_dim), dtype=np.float32)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            pixels = torch.from_numpy(np.stack([self.preprocessing.read(image) for image in images[rows]]))
            with torch.inference_mode():
                batch = self.preprocessing.for_evaluation(pixels.to(self.device))
                embeddings[rows] = self.network(batch).float().cpu().numpy()
        return embeddings


def _write(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    aside.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
