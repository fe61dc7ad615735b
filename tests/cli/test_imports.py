"""`launch.py import`, and `evaluate` of a release's weights: real files on a miniature of CUB-200-2011."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from raydml.data.miniatures import build
from raydml.data.seal import TestReads
from raydml.evaluation.saved_embeddings import SavedEmbeddings, save_embeddings
from raydml.inference.export import EmbeddingModel
from tests.cli.commands import done, refused
from tests.models.release_files import as_imagenet, write_release

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def images(tmp_path):
    build("cub200", tmp_path / "data" / "CUB_200_2011")
    return tmp_path / "data"


def scored(*arguments):
    return json.loads(done("evaluate", *arguments, "--json").stdout)


def test_weights_of_a_release_are_imported_and_scored_as_the_release_does(tmp_path, images):
    file = write_release("classification", tmp_path).path
    shown = done("import", file, "model", "--from", "classification").stdout
    assert "resnet18, 512 dimensions, average pooling, layer norm, normalize l2" in shown
    assert "squashed to 256 px (bilinear), centre crop 224 px" in shown
    on_cub = ("--data", "cub200", "--on", "test", "--data-root", images)
    imported = scored("model", *on_cub)
    assert imported["protocols"] == {
        "leave_one_out": "leave one out: each of 12 images searches the 11 others; 3 classes"
    }
    k = {name.rpartition("_")[2] for name in imported["metrics"] if "recall_at" in name}
    assert k == {"1", "2", "4", "8"}
    assert "binary_recall_at_1" in imported["metrics"]
    at_once = scored(file, "--from", "classification", *on_cub)
    assert at_once["metrics"] == imported["metrics"]
    assert scored(file, *on_cub)["metrics"] == imported["metrics"]  # recognised
    reads = TestReads(tmp_path / "studies" / "test_reads.jsonl").read()
    assert [read["purpose"] for read in reads] == ["evaluate"] * 3


@pytest.mark.slow
def test_a_file_without_layers_of_the_embedding_can_be_exported_to_onnx(tmp_path):
    file = write_release("mic", tmp_path).path
    done("import", file, "model")
    done("export", "model", "copy", "--onnx")
    assert (tmp_path / "copy" / "model.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "FILE", "model", "--from", "mdrr"], "no such release"),
        (["import", "FILE", "model", "--from", "mdr"], "MIC (Roth, Brattoli and Ommer, ICCV 2019). Cure: --from mic"),
        (["import", "FILE", "model", "--crop-px", "16"], "takes crops of at least 32 px"),
        (["import", "FILE", "model", "--normalize", "l1"], "one of l2, none"),
        (["import", "gone.pth", "model"], "gone.pth: there is no such file"),
        (["import", ".", "model"], " = .: is a folder"),
        (["evaluate", "gone.pth", "--data", "digits"], "'gone.pth': there is no such file"),
        (["evaluate", "FILE", "--data", "digits", "--on", "test"], "all images of digits are scored"),
        (["evaluate", "FILE"], "has no classes of its own. Cure: --data"),
        (["evaluate", "model", "--from", "mic", "--data", "digits"], "is no weight file"),
        (["evaluate", "FILE", "--data", "digits", "--on", "val"], "all images of digits are scored"),
        (["evaluate", "backbone:resnet18:FILE", "--data", "digits"], "launch.py import FILE FOLDER --from mic"),
    ],
)
def test_what_cannot_be_imported_is_explained(tmp_path, arguments, message):
    file = str(write_release("mic", tmp_path).path)
    said = " ".join(refused(*(text.replace("FILE", file) for text in arguments)).split())
    assert message.replace("FILE", file) in said
    assert not (tmp_path / "model").exists()


def test_a_foreign_network_of_a_supported_backbone_evaluates(tmp_path):
    """The example of docs/weights.md, run word for word."""
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    network = resnet18(weights=None)
    network.fc = torch.nn.Identity()
    network.proj = torch.nn.Linear(512, 512)
    network.eval()
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    exec(compile(example, "docs/weights.md", "exec"), {})
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(network.proj(network(as_imagenet(pixels))), dim=1).numpy()
    np.testing.assert_allclose(EmbeddingModel.load("theirs-model").embed_crops(pixels), expected, atol=1e-5)
    assert scored("theirs-model", "--data", one_colour_each(tmp_path))["metrics"]["recall_at_1"] == 1
    assert "was not trained by raydml" in refused("evaluate", "theirs-model")


def one_colour_each(folder):
    """Two classes of three images, each class of one colour."""
    for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
        (folder / "colours" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 20), colour).save(folder / "colours" / name / f"{number}.png")
    return folder / "colours"


def test_images_of_one_class_are_refused(tmp_path):
    (tmp_path / "images" / "only").mkdir(parents=True)
    for number in range(6):
        pixels = np.full((20, 20, 3), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "only" / f"{number}.png")
    said = refused("evaluate", "backbone:convnet:none", "--data", tmp_path / "images")
    assert "all images are of one class, 'only'" in said
    rows = np.random.default_rng(0).random((6, 4), dtype=np.float32)
    saved = SavedEmbeddings(
        rows, np.zeros(6, dtype=np.int64), ("only", "other"), tuple("abcdef"), None, {"part": "all"}
    )
    save_embeddings(tmp_path / "kept.npz", saved)
    assert "all 6 images are of one class, 'only'" in refused("evaluate", "kept.npz")


def test_other_images_may_be_in_a_file_whose_columns_are_named(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [file.read_bytes() for file in sorted(one_colour_each(tmp_path).rglob("*.png"))]
    file = tmp_path / "colours.parquet"
    parquet.write_table(pa.table({"picture": images, "kind": ["blue"] * 3 + ["red"] * 3}), file)
    command = ["evaluate", "backbone:convnet:none", "--data", file]
    said = refused(*command)
    assert "has no column image and no column label, but picture, kind" in said
    assert "Cure: name them in --image-column, --label-column and --group" in said
    found = scored(*command[1:], "--image-column", "picture", "--label-column", "kind")
    assert found["metrics"]["recall_at_1"] == 1  # each class is of one colour
    assert "2 classes" in found["protocols"]["leave_one_out"]
    for other in ([], ["--data", tmp_path / "colours"]):
        said = refused("evaluate", "backbone:convnet:none", *other or ["--data", "digits"], "--image-column", "picture")
        assert "--image-column goes with Parquet files and tars" in said
