"""A photograph has the same pixels at every door: training, evaluation, exported model, ONNX, server, gallery.

The network returns its input, so that an embedding is the pixels. They are compared with torchvision's, bit for bit.
"""

import io
import re
import textwrap
from pathlib import Path

import faiss
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional

from raydml.config.trial import Machine, parse_machine, parse_trial
from raydml.data.datasets import open_catalog
from raydml.data.seal import TestReads
from raydml.evaluation.embed import embed
from raydml.images.augmentation_settings import Augmentation
from raydml.images.loader import Loader
from raydml.images.preprocessing import Preprocessing
from raydml.inference.evaluate import Collection, embed_collection
from raydml.inference.export import EmbeddingModel, export_onnx
from raydml.inference.gallery import Gallery, embed_images
from raydml.training.trial_images import open_development

RESIZE_PX, CROP_PX = 40, 33
INTERPOLATIONS = ["bilinear", "bicubic", "lanczos"]


class Echo(nn.Module):
    """Images (B, 3, H, W) -> (B, 3 H W), the same numbers."""

    def forward(self, images):
        return images.flatten(1)


def photograph(number: int, size: tuple[int, int]) -> Image.Image:
    """Smooth shapes with grain, in RGB."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    grain = generator.integers(-20, 21, smooth.shape, dtype=np.int16)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Six classes of three files of every kind: turned, grey, for print, large, small, with a palette, a strip."""
    folder = tmp_path_factory.mktemp("photographs")
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("turned.jpg", (90, 60), "RGB", {"exif": exif}),
        ("grey.jpg", (50, 75), "L", {}),
        ("press.jpg", (64, 48), "CMYK", {}),
        ("large.jpg", (700, 600), "RGB", {"quality": 90, "progressive": True}),
        ("small.png", (23, 31), "RGB", {}),
        ("palette.gif", (61, 44), "P", {}),
        ("right_size.png", (40, 47), "RGB", {}),
        ("mosaic.webp", (80, 57), "RGB", {}),
        ("see_through.png", (44, 66), "RGBA", {}),
    ]
    for number in range(18):
        name, size, mode, settings = kinds[number % len(kinds)]
        file = folder / f"class{number % 6}" / f"{number:02}_{name}"
        file.parent.mkdir(exist_ok=True)
        photograph(number, size).convert(mode).save(file, **settings)
    return folder


def by_torchvision(file: Path, interpolation: str) -> np.ndarray:
    """The central crop of a file, uint8 (CROP_PX, CROP_PX, 3)."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    kernel = functional.InterpolationMode(interpolation)
    if interpolation == "lanczos":  # of PIL images alone; along the rows first in every version of Pillow
        width, height = functional.resize(image, RESIZE_PX, kernel).size
        image = functional.resize(functional.resize(image, [image.height, width], kernel), [height, width], kernel)
        tensor = functional.pil_to_tensor(image)
    else:
        tensor = functional.resize(functional.pil_to_tensor(image), RESIZE_PX, kernel, antialias=True)
    return functional.center_crop(tensor, [CROP_PX, CROP_PX]).permute(1, 2, 0).numpy()


@pytest.fixture(params=INTERPOLATIONS)
def preprocessing(request) -> Preprocessing:
    return Preprocessing(
        RESIZE_PX, CROP_PX, (0.0,) * 3, (1.0,) * 3, value_range=255.0, interpolation=request.param
    )  # normalisation leaves the grey levels as they are


@pytest.fixture
def model(preprocessing) -> EmbeddingModel:
    settings = {"backbone": "echo", "embedding_dim": 3 * CROP_PX * CROP_PX}
    return EmbeddingModel(Echo(), preprocessing, {"network": settings}, "cpu")


@pytest.fixture
def expected(root, preprocessing) -> dict[str, np.ndarray]:
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    return {str(file.relative_to(root)): by_torchvision(file, preprocessing.interpolation) for file in files}


def check(names, embeddings, expected) -> None:
    """embeddings: (N, 3 * CROP_PX ** 2) of these files; at least one file."""
    assert len(names) == len(embeddings) > 0
    for name, found in zip(names, embeddings, strict=True):
        pixels = found.reshape(3, CROP_PX, CROP_PX).transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels, expected[name], err_msg=name)


def machine_of(root: Path, cache_dir: Path, **settings) -> Machine:
    return parse_machine({"data_root": str(root), "cache_dir": str(cache_dir), "device": "cpu", **settings})


def by_echo(pixels, preprocessing) -> np.ndarray:
    return embed(Echo(), pixels, preprocessing, device="cpu", batch_size=4)


@pytest.mark.parametrize("space", [{}, {"max_cache_gib": 1e-9}], ids=["pack", "no space for one"])
def test_a_trial_trains_on_them_and_validates_on_them(root, tmp_path, preprocessing, expected, space):
    settings = {"resize_px": RESIZE_PX, "crop_px": CROP_PX, "interpolation": preprocessing.interpolation}
    trial = parse_trial(
        {
            "data": {"name": "image_folder", **settings, "split": {"test_fraction": 0.33}},
            "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 8},
            "loss": {"name": "normalized_softmax"},
            "sampler": {"name": "uniform", "batch_size": 4},
            "recall_at": [1],
        }
    )
    opened = open_development(trial, machine_of(root, tmp_path, **space), augmented=False)
    check(opened.val.paths, by_echo(opened.val.pixels, preprocessing), expected)
    loader = Loader(opened.train.pixels, Augmentation(), preprocessing, device=torch.device("cpu"), channels_last=False)
    (batch,) = loader.batches([np.arange(len(opened.train.paths))], [0])
    check(opened.train.paths, batch.flatten(1).numpy(), expected)


def test_evaluate(root, tmp_path, preprocessing, expected):
    key = TestReads(tmp_path / "reads.jsonl").record(purpose="test", checkpoint="x", commit="")
    collection = Collection(open_catalog("image_folder", root), key)
    saved = embed_collection(Echo(), preprocessing, collection, machine_of(root, tmp_path / "cache"), facts={})
    check(saved.paths, saved.embeddings, expected)
    assert set(saved.paths) == set(expected)


def test_an_exported_model(root, model, expected):
    paths = [root / name for name in expected]
    check(expected, model.embed(paths), expected)
    check(expected, model.embed([str(path) for path in paths]), expected)
    images = [Image.open(io.BytesIO(path.read_bytes())) for path in paths]
    check(expected, model.embed(images), expected)
    check(
        expected, model.embed([np.asarray(ImageOps.exif_transpose(image).convert("RGB")) for image in images]), expected
    )
    crops = np.stack([model.preprocessing.read(path) for path in paths])
    check(expected, model.embed_crops(torch.from_numpy(crops)), expected)


def test_the_onnx_file_with_the_function_of_the_readme(root, tmp_path, model, expected):
    text = (model.save(tmp_path / "model") / "README.md").read_text()
    export_onnx(model, tmp_path / "model.onnx")
    (block,) = re.findall(r"^    import numpy.*?(?=^    session)", text, flags=re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(textwrap.dedent(block), names)
    crops = np.stack([names["prepared"](root / name) for name in expected])
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {"images": crops})
    check(expected, embeddings, expected)


def test_a_server(root, model, expected):
    from raydml.tracking.pyfunc_model import EmbeddingPythonModel

    served = EmbeddingPythonModel()
    served.model = model
    check(expected, served.predict(None, [root / name for name in expected]), expected)
    check(expected, served.predict(None, [(root / name).read_bytes() for name in expected]), expected)


def test_a_gallery_and_its_queries(root, model, expected):
    names, index = [], faiss.IndexFlatL2(model.embedding_dim)
    for batch in embed_images(model, root, list(expected), batch_size=5):
        check(batch.names, batch.embeddings, expected)
        names += batch.names
        index.add(batch.embeddings)
    assert names == list(expected)
    found = Gallery(model, index, root, names).search([root / name for name in names], k=1)
    assert [[tuple(one) for one in of_query] for of_query in found] == [[(name, 0.0)] for name in names]
