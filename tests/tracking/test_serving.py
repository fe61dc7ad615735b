"""A registered model: the inputs it accepts from a caller and over HTTP, and files that no request makes it open."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from mlflow.pyfunc import PythonModelContext
from PIL import Image

from raydml.inference.export import EmbeddingModel, export_model
from raydml.models.network import build_network, preprocessing_for
from raydml.study.events import ExportedModel
from raydml.tracking.models import log_exported_model
from raydml.tracking.pyfunc_model import EmbeddingPythonModel, ImagesRefused
from raydml.tracking.store import connect, default_uri, prepare_store
from raydml.training import checkpoint

pytestmark = pytest.mark.xdist_group("mlflow")
NETWORK = {"backbone": "convnet", "embedding_dim": 8, "layer_norm": True, "normalize": "l2", "freeze_batch_norm": False}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    card = {"network": NETWORK, "preprocessing": preprocessing_for("convnet", resize_px=20, crop_px=16).to_dict()}
    weights = build_network(**NETWORK, weights="none", seed=1).state_dict()
    checkpoint.save(folder / "checkpoint", state={}, model_card=card, best_weights=weights)
    return export_model(folder / "checkpoint", folder / "model")


@pytest.fixture(scope="module")
def served(exported: Path) -> EmbeddingPythonModel:
    """The model as MLflow runs it, without MLflow's server."""
    model = EmbeddingPythonModel()
    model.load_context(PythonModelContext({"model": str(exported)}, {"device": "cpu"}))
    return model


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 24, 26, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected(exported: Path, pixels: np.ndarray) -> np.ndarray:
    return EmbeddingModel.load(exported).embed(pixels)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def test_images_come_as_bytes_texts_paths_arrays_and_tables(
    served: EmbeddingPythonModel, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    files = [encoded(image) for image in pixels]
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, content in zip(paths, files, strict=True):
        path.write_bytes(content)
    texts = [base64.b64encode(content).decode() for content in files]
    ways = {
        "array": pixels,
        "numbers of JSON": np.array(pixels.tolist()),
        "list of arrays": list(pixels),
        "PIL images": [Image.fromarray(image) for image in pixels],
        "paths": paths,
        "bytes": files,
        "base64": texts,
        "base64 in lines": ["\n".join(text[i : i + 76] for i in range(0, len(text), 76)) for text in texts],
        "data: URLs": [f"data:image/png;base64,{text}" for text in texts],
        "array of texts": np.array(texts),
        "objects": np.array(paths, dtype=object),
        "one column": pd.DataFrame({"anything": files}),
        "named column": pd.DataFrame({"id": [1, 2], "image": texts}),
        "series": pd.Series(paths),
        "columns": {"id": np.array([1, 2]), "image": np.array(texts)},
        "records": [{"image": np.array(text)} for text in texts],
    }
    for way, images in ways.items():
        np.testing.assert_allclose(served.predict(None, images), expected, atol=1e-6, err_msg=way)
    many = served.predict(None, files * 70)
    np.testing.assert_allclose(many, np.tile(expected, (70, 1)), atol=1e-6, err_msg="more than one batch")
    assert served.predict(None, []).shape == (0, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4, 3)), "uint8"),
        (np.zeros((4, 4, 3), dtype=np.uint8), r"\(N, height, width, 3\)"),
        (np.full((1, 4, 4, 3), 256), "0 to 255; got 256 to 256"),
        (np.full((1, 4, 4, 3), -1), "0 to 255; got -1 to -1"),
        ("one.jpg", "got str"),
        (np.array("one.jpg"), "got str"),
        (b"one", "got bytes"),
        (pd.DataFrame({"a": [1], "b": [2]}), r"needs a column 'image'; got \['a', 'b'\]"),
        ([None], "image 0: a NoneType is no image"),
        ([b"text"], "image 0: no JPEG, PNG"),
        ([b""], "image 0: an empty file"),
        ([b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"], "no JPEG, PNG"),
        (["aGVsbG8gd29ybGQ="], "image 0: no JPEG, PNG"),
        (["é"], "image 0: 'é' is not base64"),
        ([np.zeros((4, 4, 3))], "uint8"),
        (np.zeros((1, 0, 4, 3), dtype=np.uint8), "image has no pixels"),
        ([Image.new("RGB", (0, 4))], "image has no pixels"),
        ([Path("nowhere.jpg")], "nowhere.jpg: FileNotFoundError"),
    ],
)
def test_what_is_no_image_is_refused(served: EmbeddingPythonModel, images: Any, message: str) -> None:
    with pytest.raises(ImagesRefused, match=message) as caught:
        served.predict(None, images)
    assert caught.value.get_http_status_code() == 400


def test_a_refusal_counts_the_images_and_keeps_its_words(served: EmbeddingPythonModel, pixels: np.ndarray) -> None:
    content = encoded(pixels[0])
    with pytest.raises(ImagesRefused, match="image 66: ") as caught:
        served.predict(None, [content] * 66 + [content[:60]])
    said = caught.value.message
    caught.value.message = "Failed to predict data '" + 1000 * "A"  # what MLflow's server does
    assert caught.value.message == said
    assert json.loads(caught.value.serialize_as_json())["message"] == said


def test_a_text_never_names_a_file_or_an_address(
    served: EmbeddingPythonModel, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are there and images, under names that are base64 and names that are not; and a server that counts."""
    monkeypatch.chdir(tmp_path)
    requested: list[str] = []

    class Counting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    (tmp_path / "abcd").write_bytes(encoded(pixels[0]))
    (tmp_path / "image.png").write_bytes(encoded(pixels[0]))
    address = f"http://127.0.0.1:{server.server_port}/image.png"
    try:
        for text in ("abcd", "image.png", str(tmp_path / "image.png"), (tmp_path / "image.png").as_uri(), address):
            for images in ([text], pd.DataFrame({"path": [text]}), pd.DataFrame({"image": [text]}), np.array([text])):
                with pytest.raises(ImagesRefused, match="image 0: "):
                    served.predict(None, images)
            with pytest.raises(ImagesRefused):
                served.predict(None, [{"path": text, "image": None}])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert requested == []
    with pytest.raises(ImagesRefused) as there:
        served.predict(None, ["image.png"])
    with pytest.raises(ImagesRefused) as not_there:
        served.predict(None, ["imaga.png"])
    assert there.value.message == not_there.value.message.replace("imaga", "image"), (
        "the message must not depend on which files exist"
    )


def test_a_small_file_that_claims_to_be_huge_is_refused_before_memory_is_spent(served: EmbeddingPythonModel) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(ImagesRefused, match="60,000 x 60,000 pixels are more than"):
        served.predict(None, [bomb])


def test_whoever_loads_a_model_chooses_its_device(exported: Path) -> None:
    model = EmbeddingPythonModel()
    model.load_context(PythonModelContext({"model": str(exported)}, {"device": "cpu:0"}))
    assert model.model.device == "cpu:0"
    model.load_context(PythonModelContext({"model": str(exported)}, None))
    assert model.model.device == "cpu", "a version that was registered without the setting"


@pytest.fixture(scope="module")
def registered(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a store that holds the model as models:/digits/1."""
    storage = tmp_path_factory.mktemp("store")
    uri = default_uri(storage)
    prepare_store(uri)
    client = connect(uri)
    run = client.create_run(client.create_experiment("serving", artifact_location=(storage / "artifacts").as_uri()))
    log_exported_model(client, run.info.run_id, ExportedModel("digits", exported, "/c"))
    return uri


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def serving(uri: str, folder: Path) -> Iterator[str]:
    """``mlflow models serve`` in a process group of its own, on the loopback; gone afterwards, to the last process."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits/1", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # the code comes from the model
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # uvicorn
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_it_answers(address, process, folder / "server.log")
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("the server left processes behind")


def wait_until_it_answers(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/ping", timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def post(address: str, body: Any, kind: str = "application/json") -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/invocations", content, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.slow
def test_a_served_model_answers_requests(
    registered: str, exported: Path, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    files = [encoded(image) for image in pixels]
    texts = [base64.b64encode(content).decode() for content in files]
    parquet, on_disk = io.BytesIO(), tmp_path / "image.png"
    pd.DataFrame({"image": files}).to_parquet(parquet)
    on_disk.write_bytes(files[0])
    with serving(registered, tmp_path) as address:
        for body in (
            {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
            {"dataframe_records": [{"image": text} for text in texts]},
            {"instances": texts},
            {"instances": [{"b64": text} for text in texts]},
            {"inputs": texts},
            {"inputs": {"image": texts}},
            {"inputs": [{"image": text} for text in texts]},
            {"inputs": pixels.tolist()},
        ):
            status, answer = post(address, body)
            assert status == 200, answer
            np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5, err_msg=str(body)[:60])
        for content, kind in (
            ("image\n" + "\n".join(texts) + "\n", "text/csv"),
            (parquet.getvalue(), "application/vnd.apache.parquet"),
        ):
            status, answer = post(address, content if isinstance(content, bytes) else content.encode(), kind)
            assert status == 200, answer
            np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5, err_msg=kind)
        long = base64.b64encode(b"no image" * 100_000).decode()
        for text, words in ((str(on_disk), "is not base64"), ("/etc/passwd", "base64"), (long, "image 0: no JPEG")):
            for body in ({"inputs": [text]}, {"dataframe_split": {"columns": ["image"], "data": [[text]]}}):
                status, answer = post(address, body)
                assert status == 400
                assert words in answer["message"]
                assert len(json.dumps(answer)) < 1000, "the request is not sent back"
        status, answer = post(address, {"inputs": [texts[1]]})
        np.testing.assert_allclose(answer["predictions"], expected[1:], atol=1e-5, err_msg="it is still there")
    with pytest.raises(OSError, match=r"refused|111"):
        urllib.request.urlopen(f"{address}/ping", timeout=5)
    # What a server reads from SERVING_MODEL_CONFIG, load_model takes as model_config.
    source = connect(registered).get_model_version("digits", "1").source
    with pytest.raises(RuntimeError, match="nonsense"):
        mlflow.pyfunc.load_model(source, model_config={"device": "nonsense"})
    assert EmbeddingModel.load(exported).device == "cpu"
