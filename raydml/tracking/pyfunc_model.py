"""The code of a registered model: MLflow runs this file to turn images into embeddings ("models from code").

    model = mlflow.pyfunc.load_model("models:/NAME@champion")
    embeddings = model.predict([Path("one.jpg"), Path("two.png")])  # (2, D) float32

The same code answers requests: ``mlflow models serve -m models:/NAME@champion --env-manager local``, then

    POST /invocations    {"dataframe_split": {"columns": ["image"], "data": [["<base64>"], ["<base64>"]]}}
                         {"dataframe_records": [{"image": "<base64>"}]}
                         {"instances": ["<base64>"]}   or   {"instances": [{"image": "<base64>"}]}   or {"b64": ...}
                         {"inputs": ["<base64>"]}      or   {"inputs": {"image": ["<base64>"]}}
                         {"inputs": [[[[red, green, blue], ...]]]}   (N, height, width, 3), 0 to 255
                         text/csv with a column image; application/vnd.apache.parquet with one of bytes

and the answer is {"predictions": [[...], ...]}, one embedding for each image; status 400 refuses what is not an image.

The type of an item decides how it is read, so that no request can make the server open a file or an address: a text is
always an image in base64, and only a ``pathlib.Path``, which no request can contain, is a file of this machine.
``load_model(..., model_config={"device": "cuda"})``, or for a server SERVING_MODEL_CONFIG='{"device": "cuda"}' in its
environment, runs the network there.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray
from PIL import Image

from raydml.data.catalog import DataError
from raydml.images.pixels import decode
from raydml.images.preprocessing import PreprocessingError, Resizing
from raydml.inference.export import EmbeddingModel

#: The column of a table that holds the images; a table of one column needs no name.
COLUMN = "image"
BATCH_SIZE = 64


class ImagesRefused(MlflowException):
    """Input that cannot be embedded. A server answers with status 400 and ``message``."""

    def __init__(self, message: str) -> None:
        self._said = message
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return self._said

    @message.setter
    def message(self, text: str) -> None:
        """Ignore the text: MLflow's server would prefix the whole request, megabytes of base64."""


class EmbeddingPythonModel(PythonModel):
    """Images to embeddings, with the preprocessing of the training, which is stored in the model."""

    def load_context(self, context: PythonModelContext) -> None:
        device = (context.model_config or {}).get("device", "cpu")
        self.model = EmbeddingModel.load(context.artifacts["model"], device)

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> NDArray[np.float32]:
        """N images -> (N, D) float32.

        model_input: an integer array (N, H, W, 3) of 0..255; or a list, a pandas Series, a DataFrame (its column
        ``image``, or its only one) or such a dictionary of pathlib.Path, encoded images (bytes, or base64 as a text or
        data: URL), PIL images or uint8 arrays (H, W, 3). Raises ImagesRefused for anything else, with its number.
        (The annotation names one type only: MLflow would make a schema from a wider one and refuse what is not in it.)
        """
        items = as_items(model_input)
        resizing = self.model.preprocessing.resizing
        embeddings = np.empty((len(items), self.model.embedding_dim), dtype=np.float32)
        for start in range(0, len(items), BATCH_SIZE):
            rows = range(start, min(start + BATCH_SIZE, len(items)))
            try:
                images = [as_image(items[row], f"image {row}", resizing) for row in rows]
                embeddings[rows.start : rows.stop] = self.model.embed(images)
            except (DataError, PreprocessingError) as error:
                raise ImagesRefused(str(error)) from error
        return embeddings


def as_items(model_input: Any) -> Sequence[Any]:
    """Return the images, not decoded, in any form that a pyfunc model is called with. Raises ImagesRefused."""
    if isinstance(model_input, list) and model_input and all(isinstance(item, Mapping) for item in model_input):
        column = _column(list(dict.fromkeys(name for item in model_input for name in item)))
        return [item.get(column) for item in model_input]
    if isinstance(model_input, (pd.DataFrame, Mapping)):
        model_input = model_input[_column(list(model_input))]
    if isinstance(model_input, pd.Series):
        return list(model_input)
    if isinstance(model_input, np.ndarray) and model_input.dtype.kind in "OU" and model_input.ndim == 1:
        return list(model_input)
    if isinstance(model_input, np.ndarray) and model_input.ndim > 0:
        return list(_pixels(model_input))
    if isinstance(model_input, (str, bytes)) or not isinstance(model_input, Sequence):
        given = model_input.item() if isinstance(model_input, np.ndarray) else model_input
        raise ImagesRefused(
            f"expected a list, a table or an array of images, got {type(given).__name__}. Cure: write [image]"
        )
    return model_input


def _column(names: list[Any]) -> Any:
    if COLUMN not in names and len(names) != 1:
        raise ImagesRefused(f"a table of images needs a column {COLUMN!r}; got {names}")
    return COLUMN if COLUMN in names else names[0]


def _pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype.kind not in "iu":
        raise ImagesRefused(
            f"an array of images is uint8 (N, height, width, 3); got {array.dtype} {array.shape}. "
            "Cure: encoded images (bytes, or base64 as a text) in a list"
        )
    if array.size and (array.min() < 0 or array.max() > 255):
        raise ImagesRefused(f"pixels go from 0 to 255; got {array.min()} to {array.max()}")
    return array.astype(np.uint8)


def as_image(item: Any, name: str, resizing: Resizing) -> np.ndarray | Image.Image:
    """Return one item as `EmbeddingModel.embed` takes it; messages call it ``name``. Files are decoded by the rules of
    raydml/images/pixels.py (formats, number of pixels). Raises ImagesRefused and UnreadableImage."""
    if isinstance(item, np.ndarray) and item.ndim == 0:
        item = item.item()  # MLflow turns a text in a record into such an array
    if isinstance(item, Path):
        return decode(Path(), str(item), resizing)
    if isinstance(item, str):
        item = _from_base64(item, name)
    if isinstance(item, (bytes, bytearray, memoryview)):
        content = bytes(item)
        return decode(Path(), name, resizing, lambda _: _as_file(content))
    if isinstance(item, (np.ndarray, Image.Image)):
        return item
    raise ImagesRefused(
        f"{name}: a {type(item).__name__} is no image. Cure: an image file in base64 (a text) or as bytes, a "
        "pathlib.Path, or a uint8 array (height, width, 3)"
    )


def _from_base64(text: str, name: str) -> bytes:
    head, _, tail = text.partition(",")
    encoded = tail if head.startswith("data:") and head.endswith(";base64") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters beyond ASCII
        shown = str(text) if len(text) <= 40 else f"{text[:40]}..."  # str: NumPy's texts show as np.str_('...')
        raise ImagesRefused(
            f"{name}: {shown!r} is not base64 ({error}). A text is an image file in base64; paths and addresses are "
            "not opened. Cure: base64 -w0 FILE; in Python, for a file of this machine, pathlib.Path(...)"
        ) from error


def _as_file(content: bytes) -> BinaryIO:
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed by its reader
    file.write(content)
    file.seek(0)
    return file


mlflow.models.set_model(EmbeddingPythonModel())
