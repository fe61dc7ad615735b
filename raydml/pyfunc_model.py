"""The code of a registered model: MLflow runs this file to turn images into embeddings ("models from code").

model = mlflow.pyfunc.load_model("models:/NAME@champion")
embeddings = model.predict(["one.jpg", "two.png"])  # (2, D) float32
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray
from PIL import Image

from raydml.export import EmbeddingModel

#: Columns of a table that may hold the images; a table of one column needs no name.
COLUMNS = ("image", "path")


class EmbeddingPythonModel(PythonModel):
    """Images to embeddings, prepared as the network was trained: the preprocessing lies in the model."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = EmbeddingModel.load(context.artifacts["model"])

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> NDArray[np.float32]:
        """N images -> (N, D) float32.

        model_input: a uint8 array (N, H, W, 3); or a list, a pandas Series or a DataFrame (column ``image`` or
        ``path``) of file paths, encoded images (bytes) or uint8 arrays (H, W, 3). Raises ValueError for other things.
        (The annotation names one kind only: from a wider one MLflow would make a schema, and refuse what is not in it.)
        """
        images = as_images(model_input)
        if len(images) == 0:
            return np.empty((0, self.model.embedding_dim), dtype=np.float32)
        return self.model.embed(images)


def as_images(model_input: Any) -> Sequence[Any] | np.ndarray:
    """What ``EmbeddingModel.embed`` takes, from what callers of a pyfunc model have."""
    if isinstance(model_input, pd.DataFrame):
        named = [name for name in COLUMNS if name in model_input.columns]
        if not named and model_input.shape[1] != 1:
            raise ValueError(
                f"a table of images needs a column {' or '.join(COLUMNS)}; got {list(model_input.columns)}"
            )
        model_input = model_input[named[0] if named else model_input.columns[0]]
    if isinstance(model_input, pd.Series):
        model_input = model_input.tolist()
    if isinstance(model_input, np.ndarray) and model_input.dtype != object:
        if model_input.ndim != 4 or model_input.shape[3] != 3 or model_input.dtype != np.uint8:
            raise ValueError(
                f"an array of images is uint8 (N, height, width, 3); got {model_input.dtype} {model_input.shape}"
            )
        return model_input
    if isinstance(model_input, (str, bytes)) or not isinstance(model_input, Sequence | np.ndarray):
        raise ValueError(f"expected a list, a table or an array of images, got {type(model_input).__name__}")
    return [_image(item) for item in model_input]


def _image(item: Any) -> Any:
    if isinstance(item, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(bytes(item)))
    return item


mlflow.models.set_model(EmbeddingPythonModel())
