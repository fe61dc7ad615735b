"""The doors of raydml through which files and requests come: for each a reader, and small whole files to damage."""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.fuzz.harness import Door
from tests.fuzz.mutation import Mutator, mixed, mutator_of_bytes, mutator_of_json

_SPACE = b"""# Question: which loss?
study: {name: small, search: {num_trials: 4, scheduler: none}, confirm: null}
machine: {device: cpu}
trial:
  epochs: 2
  data: {name: digits, resize_px: 8, crop_px: 8, split: {order: sorted, val_fraction: 0.4}}
  model: {backbone: convnet, weights: none, embedding_dim: 8}
  loss: {choice: [{name: margin, beta: {uniform: [0.5, 1.5], first: 1.2}}, {name: contrastive}]}
  miner: {choice: [null, &all {name: all}, *all]}
  optimizer: {name: adamw, learning_rate: {loguniform: [1e-4, 1e-2], first: 1e-3}}
  sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: 4, batches_per_epoch: 2}
  recall_at: [1, 2]
"""


def _writer(file: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Return a reader of bytes that writes them to a file first."""

    def written(content: bytes) -> object:
        file.write_bytes(content)
        return read()

    return written


def _in_child(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """Return a reader that runs in a child of this process with 4 GiB of memory; a signal that ends it is an error.

    For readers in C that a damaged file can crash. A child that ends by an error of raydml raises ValueError here.
    """
    from tests.fuzz.harness import is_own

    def forked(content: bytes) -> object:
        inlet, outlet = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(inlet)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            text = b""
            try:
                signal.alarm(30)
                read(content)
                code = 0
            except Exception as error:
                code, text = (1, b"") if is_own(error) else (2, f"{type(error).__name__}: {error}"[:500].encode())
            os.write(outlet, text)
            os._exit(code)
        os.close(outlet)
        with os.fdopen(inlet, "rb") as pipe:
            text = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 1:
            raise _OwnError
        if code:
            raise RuntimeError(text.decode() if code == 2 else f"ended by signal {-code}")
        return None

    return forked


class _OwnError(ValueError):
    """An error of raydml in a child process."""


_OwnError.__module__ = "raydml"


def yaml(_folder: Path) -> Door:
    """A search space, as text: from YAML to its values."""
    from raydml.errors import ConfigError
    from raydml.search_space.yaml_reader import decoded_yaml, read_yaml

    def read(content: bytes) -> object:
        root, problems = read_yaml(decoded_yaml(content, "space.yaml"), "space.yaml")
        if problems:
            str(ConfigError(problems))
            raise ConfigError(problems)
        return root

    return Door(mutator_of_bytes([_SPACE]), read)


def space(folder: Path) -> Door:
    """A search space, as a file: values, rules and sampling, but not its images."""
    from raydml.search_space.space import load_space, sample_trials

    file = folder / "space.yaml"
    return Door(mutator_of_bytes([_SPACE]), _writer(file, lambda: sample_trials(load_space(file))))


def set(_folder: Path) -> Door:
    """Values of ``--set``: put into a space that is read already."""
    from raydml.config.trial import Machine, StudySettings, Trial
    from raydml.errors import ConfigError
    from raydml.search_space.domains import with_domains
    from raydml.search_space.space import with_overrides
    from raydml.search_space.yaml_reader import Node, read_yaml

    models = {"study": StudySettings, "trial": Trial, "machine": Machine}
    known = {name: list(model.model_fields) for name, model in models.items()}
    root, _ = read_yaml(_SPACE.decode(), "space.yaml")
    samples = [b"trial.loss.beta=1.5", b"trial.loss={choice: [{name: margin}, {name: triplet}]}", b"study.name=new"]
    samples += [b"trial.optimizer.learning_rate={loguniform: [1e-5, 1e-3]}", b"machine.data_root=/images", b"a=b"]

    def read(content: bytes) -> object:
        changed, problems = with_overrides(root, [content.decode("utf-8", "surrogateescape")], known)
        for key, node in changed.value.items():
            with_domains(node, key, problems)
        if problems:
            str(ConfigError(problems))
            raise ConfigError(problems)
        return changed

    assert isinstance(root, Node)
    return Door(mutator_of_bytes(samples), read)


def image_list(folder: Path) -> Door:
    """A CSV list of images."""
    from raydml.data.image_list import read_image_list

    for number in range(6):
        (folder / f"{number}.png").write_bytes(b"")
    plain = "path,label\n" + "".join(f"{number}.png,class {number % 3}\n" for number in range(6))
    full = "label;path;split;role\n" + "".join(
        f'"a{n % 3}";{n}.png;{"test" if n > 3 else "train"};\n' for n in range(6)
    )
    samples = [plain.encode(), full.encode(), plain.encode("utf-16"), b"sep=;\n" + full.encode()]
    return Door(mutator_of_bytes(samples), _writer(folder / "list.csv", lambda: read_image_list(folder, "list.csv")))


def benchmark_lists(folder: Path) -> Door:
    """The text lists of the benchmarks: one of them damaged, the others whole."""
    from raydml.data import benchmark_lists as lists

    (folder / "train_test_split").mkdir()
    (folder / "Eval").mkdir()
    texts = {
        "images.txt": "1 001.a/x.jpg\n2 001.a/y.jpg\n3 101.b/z.jpg\n",
        "image_class_labels.txt": "1 1\n2 1\n3 101\n",
        "classes.txt": "1 001.a\n101 101.b\n",
        "Ebay_train.txt": "image_id class_id super_class_id path\n1 1 1 bicycle/1_0.JPG\n2 1 1 bicycle/1_1.JPG\n",
        "Ebay_test.txt": "image_id class_id super_class_id path\n3 2 1 bicycle/2_0.JPG\n",
        "Eval/list_eval_partition.txt": (
            "3\nimage_name item_id evaluation_status\nimg/a.jpg i1 train\nimg/b.jpg i2 query\nimg/c.jpg i2 gallery\n"
        ),
        "anno_train.csv": "a.jpg,1,2,3,4,1\nb.jpg,1,2,3,4,2\n",
        "anno_test.csv": "c.jpg,1,2,3,4,99\n",
        "train_test_split/train_list.txt": "0000001 7\n0000002 7\n",
        "train_test_split/test_list_800.txt": "0000003 8\n0000004 8\n",
    }
    readers: Mapping[str, Callable[[], object]] = {
        "images.txt": lambda: lists.cub200_entries(folder),
        "image_class_labels.txt": lambda: lists.cub200_entries(folder),
        "classes.txt": lambda: lists.cub200_entries(folder),
        "Ebay_train.txt": lambda: lists.sop_entries(folder),
        "Ebay_test.txt": lambda: lists.sop_entries(folder),
        "Eval/list_eval_partition.txt": lambda: lists.inshop_entries(folder),
        "anno_train.csv": lambda: lists.cars196_entries(folder),
        "anno_test.csv": lambda: lists.cars196_entries(folder),
        "train_test_split/train_list.txt": lambda: lists.vehicleid_entries(folder, 800),
        "train_test_split/test_list_800.txt": lambda: lists.vehicleid_entries(folder, 800),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        readers[name]() if name == list(texts)[-1] else None
    return _one_of_several(folder, {name: text.encode() for name, text in texts.items()}, readers)


def _one_of_several(
    folder: Path,
    files: Mapping[str, bytes],
    readers: Mapping[str, Callable[[], object]],
    mutators: Mapping[str, Mutator] | None = None,
) -> Door:
    """Return a door at which one of several files is damaged, and whole again afterwards."""
    names = list(files)
    by_name = {name: mutator_of_bytes([files[name]]) for name in names} | dict(mutators or {})

    def mutate(random: np.random.Generator) -> bytes:
        number = int(random.integers(len(names)))
        return bytes([number]) + by_name[names[number]](random)

    def read(content: bytes) -> object:
        name = names[content[0]]
        (folder / name).write_bytes(content[1:])
        try:
            return readers[name]()
        finally:
            (folder / name).write_bytes(files[name])

    return Door(mutate, read)


def matlab(folder: Path) -> Door:
    """The annotations of Cars196, a MATLAB file; read in a child, as raydml does, but forked from this process."""
    import scipy.io

    from raydml.data import matlab_annotations

    kinds = [("relative_im_path", "O"), ("class", "O")]
    rows = np.array([(f"car_ims/{n}.jpg", n % 196 + 1) for n in range(3)], dtype=kinds)
    samples = []
    for compressed in (False, True):
        file = io.BytesIO()
        scipy.io.savemat(file, {"annotations": rows}, do_compression=compressed)
        samples.append(file.getvalue())
    path = folder / "cars_annos.mat"

    def read() -> object:
        try:
            return matlab_annotations._read(str(path), "relative_im_path")
        except Exception as error:  # what the child writes to stderr becomes UnreadableAnnotations in the parent
            raise _OwnError(str(error)) from error

    forked = _in_child(_writer(path, read))

    def own_signals(content: bytes) -> object:
        try:
            return forked(content)
        except RuntimeError as error:
            if "ended by signal" in str(error):  # the parent survives that, and says so
                raise _OwnError(str(error)) from error
            raise

    return Door(mutator_of_bytes(samples), own_signals)


def _checkpoint_files(folder: Path) -> dict[str, bytes]:
    import torch

    from raydml.training import checkpoint

    weights = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(())}
    state = {"epoch": 1, "best": None, "nested": [{"x": torch.ones(2)}], "generator": 2**70}
    checkpoint.save(folder, state=state, model_card={"epoch": 1, "network": {}}, best_weights=weights)
    names = (checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.CARD, checkpoint.MANIFEST)
    return {name: (folder / name).read_bytes() for name in names}


def _load_all(folder: Path) -> object:
    from raydml.training import checkpoint

    return checkpoint.load_state(folder), checkpoint.load_weights(folder), checkpoint.load_card(folder)


def checkpoints(folder: Path) -> Door:
    """A checkpoint with one damaged file."""
    files = _checkpoint_files(folder / "c")
    document = mutator_of_json([json.loads(files["manifest.json"])])
    manifest = mixed(document, mutator_of_bytes([files["manifest.json"]]))
    readers = {name: lambda: _load_all(folder / "c") for name in files}
    return _one_of_several(folder / "c", files, readers, {"manifest.json": manifest})


def signed_checkpoints(folder: Path) -> Door:
    """A checkpoint with one damaged file and a manifest that fits it: from somebody else."""
    from raydml.training import checkpoint

    files = _checkpoint_files(folder / "c")
    del files[checkpoint.MANIFEST]
    loaders = {
        checkpoint.STATE: checkpoint.load_state,
        checkpoint.WEIGHTS: checkpoint.load_weights,
        checkpoint.CARD: checkpoint.load_card,
    }

    def signed(name: str) -> object:
        facts = {one: checkpoint._facts(folder / "c" / one) for one in files}
        (folder / "c" / checkpoint.MANIFEST).write_text(json.dumps({"files": facts}))
        return loaders[name](folder / "c")

    readers = {name: functools.partial(signed, name) for name in files}
    card = mutator_of_json([json.loads(files[checkpoint.CARD])])
    return _one_of_several(folder / "c", files, readers, {checkpoint.CARD: card})


def weights(folder: Path) -> Door:
    """Weights from elsewhere: torch's two formats and safetensors."""
    import torch
    from safetensors.torch import save

    from raydml.models.pretrained import read_weights

    state = {"conv.weight": torch.arange(8.0).view(2, 4), "conv.bias": torch.zeros(2)}
    files = {"w.safetensors": save(state)}
    for name, zipped in (("w.pth", True), ("w.pt", False)):
        torch.save({"state_dict": state, "epoch": 3}, folder / name, _use_new_zipfile_serialization=zipped)
        files[name] = (folder / name).read_bytes()
    readers = {name: functools.partial(read_weights, folder / name) for name in files}
    return _one_of_several(folder, files, readers)


def packs(folder: Path) -> Door:
    """The images that a machine keeps decoded: manifest, index and pixels of a pack."""
    from PIL import Image

    from raydml.data.catalog import DataError
    from raydml.images.pack import ImageFiles, open_pack, survey_headers, write_pack
    from raydml.images.preprocessing import Resizing

    root, kept = folder / "images", folder / "pack"
    root.mkdir()
    kept.mkdir()
    paths = [f"{number}.png" for number in range(3)]
    for number, name in enumerate(paths):
        Image.fromarray(np.full((6, 5, 3), number, dtype=np.uint8)).save(root / name)
    made = ImageFiles(root, tuple(paths), Resizing(8, "short_side", "bilinear"))
    write_pack(kept, made, survey_headers(made), lambda _skipped: None)
    names = [file.name for file in kept.iterdir() if file.is_file() and file.name != "lock"]
    files = {name: (kept / name).read_bytes() for name in names}

    def read(damaged: str) -> object:
        for name in names:  # the manifest of a damaged pack is deleted
            if name != damaged:
                (kept / name).write_bytes(files[name])
        pack = open_pack(kept, made)
        if pack is None:
            raise DataError("packed anew")
        return pack.pixels.read([0, 1, 2])

    manifest = mixed(mutator_of_json([json.loads(files["manifest.json"])]), mutator_of_bytes([files["manifest.json"]]))
    return _one_of_several(
        kept, files, {name: functools.partial(read, name) for name in names}, {"manifest.json": manifest}
    )


def _embeddings_file() -> bytes:
    file = io.BytesIO()
    names, facts = np.array(["a", "b"]), np.array(json.dumps({"dataset": "digits", "part": "val", "recall_at": [1, 2]}))
    rows, labels = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 0, 1, 1])
    paths, roles = np.array([f"{n}.png" for n in range(4)]), np.array(["query", "gallery"] * 2)
    np.savez(file, embeddings=rows, labels=labels, class_names=names, paths=paths, facts=facts, roles=roles)
    return file.getvalue()


def embeddings(folder: Path) -> Door:
    """Saved embeddings: the archive as bytes, and its arrays with others in their places."""
    from raydml.evaluation.saved_embeddings import load_embeddings

    whole = _embeddings_file()
    arrays = dict(np.load(io.BytesIO(whole)))
    others = (np.array(3), np.array([1.5]), np.array("[1]"), np.array(["x", "y"]), np.zeros((0, 3)), np.array([], int))
    others += (np.array([[1.0, np.nan, 2.0]] * 4, np.float32), np.array("[" * 5000), np.array([-1, 0, 0, 9]))

    def exchanged(random: np.random.Generator) -> bytes:
        names, file = list(arrays), io.BytesIO()
        changed = {**arrays, names[random.integers(len(names))]: others[random.integers(len(others))]}
        np.savez(file, **changed)
        return file.getvalue()

    file = folder / "e.npz"
    bytewise = mutator_of_bytes([whole])
    return Door(mixed(*[bytewise] * 9, exchanged), _writer(file, lambda: load_embeddings(file)))


def _exported(folder: Path) -> Any:
    from raydml.inference.export import EmbeddingModel
    from raydml.models.network import build_network, preprocessing_for

    network = {
        "backbone": "convnet",
        "embedding_dim": 8,
        "layer_norm": True,
        "normalize": "l2",
        "freeze_batch_norm": False,
    }
    preprocessing = preprocessing_for("convnet", resize_px=8, crop_px=8)
    card = {"network": network, "preprocessing": preprocessing.to_dict(), "epoch": 1, "best_epoch": 1}
    model = EmbeddingModel(build_network(**network, weights="none", seed=0), preprocessing, card, "cpu")
    model.save(folder)
    return model


def exported_models(folder: Path) -> Door:
    """An exported model with a damaged card or other weights."""
    from raydml.inference.export import CONFIG, WEIGHTS, EmbeddingModel
    from raydml.ops.files import digest_of

    _exported(folder / "m")
    files = {name: (folder / "m" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    card = json.loads(files[CONFIG])

    def signed() -> object:
        stated = {**card, "weights_sha256": digest_of(folder / "m" / WEIGHTS)}
        (folder / "m" / CONFIG).write_text(json.dumps(stated))
        try:
            return EmbeddingModel.load(folder / "m")
        finally:
            (folder / "m" / CONFIG).write_bytes(files[CONFIG])

    readers = {CONFIG: lambda: EmbeddingModel.load(folder / "m"), WEIGHTS: signed}
    return _one_of_several(
        folder / "m", files, readers, {CONFIG: mixed(mutator_of_json([card]), mutator_of_bytes([files[CONFIG]]))}
    )


def galleries(folder: Path) -> Door:
    """A gallery with a damaged index or card; the model in it is whole. The index is read in a child: faiss is C++."""
    from raydml.inference import gallery
    from raydml.inference.export import EmbeddingModel

    model = _exported(folder / "model")
    rows = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    out = gallery.write_gallery(folder / "g", model, folder, ["a.png", "b.png", "c.png"], rows)
    files = {name: (out / name).read_bytes() for name in (gallery.INDEX, gallery.CARD)}

    def read() -> object:
        found = gallery.Gallery.load(out)
        return found._nearest(rows[:1], 2)

    # The model takes 50 ms to load, and has a door of its own.
    gallery.EmbeddingModel = SimpleNamespace(load=lambda *_: model)  # type: ignore[misc,assignment]
    assert EmbeddingModel is not gallery.EmbeddingModel
    card = mixed(mutator_of_json([json.loads(files[gallery.CARD])]), mutator_of_bytes([files[gallery.CARD]]))
    door = _one_of_several(out, files, dict.fromkeys(files, read), {gallery.CARD: card})
    return Door(door.mutate, _in_child(door.read))


def _event_lines() -> list[bytes]:
    from tests.report.written_study import _events

    return [json.dumps({"time": 1000.0 + number, **event}).encode() for number, event in enumerate(_sample(_events(3)))]


def mutator_of_event(lines: list[bytes]) -> Mutator:
    """Return a mutator of one of these lines."""
    return mixed(mutator_of_bytes(lines), mutator_of_json([json.loads(line) for line in lines]))


def event_lines(_folder: Path) -> Door:
    """One damaged line among the events of a study: whether it is an event, and the state after it."""
    from raydml.study.events import parse_line, reduce_event, reduce_events
    from raydml.study.folder import StudyError

    lines = _event_lines()
    state = reduce_events([event for event in map(parse_line, lines) if event is not None])

    def read(line: bytes) -> object:
        event = parse_line(line)
        if event is None:
            raise StudyError("skipped")
        return reduce_event(state, event)

    return Door(mutator_of_event(lines), read)


def events(_folder: Path) -> Door:
    """The events of a study with one damaged line: the reduction, and everything that shows it."""
    from rich.console import Console

    from raydml.analysis.cost import cost_of
    from raydml.cli import tables
    from raydml.cli.live_view import line as line_of
    from raydml.report.tables import epochs_csv
    from raydml.study.events import Record, letters_of, parse_line, rank, reduce_event, reduce_events
    from raydml.study.pace import remaining_s
    from raydml.tracking.updates import updates_of

    lines = _event_lines()
    damaged = mutator_of_event(lines)
    console = Console(file=io.StringIO(), width=100)

    def mutate(random: np.random.Generator) -> bytes:
        number = int(random.integers(len(lines)))
        return b"\n".join([*lines[:number], damaged(random), *lines[number + 1 :]]) + b"\n"

    def read(content: bytes) -> object:
        found = [event for event in map(parse_line, content.splitlines()) if event is not None]
        state = None
        for event in found:
            state = reduce_event(state or reduce_events([]), event)
            line_of(state, event)
        assert state is not None
        letters_of(state), rank(state.trials.values()), remaining_s(state), epochs_csv(list(state.trials.values()))
        cost_of(list(state.trials.values()), cpus=state.cpus, gpus=state.gpus)
        updates_of([Record(event, number) for number, event in enumerate(found, 1)], reduce_events([]), {}, Path("/x"))
        console.print(tables.studies([tables.StudyRow("x", state, False, 1.0)], width=100))
        return console.print(tables.trials(state, width=100))

    return Door(mutate, read)


def _sample(several: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most two events of each kind and stage in their order, and some of kinds that the others lack."""
    counts: dict[Any, int] = {}
    kept = []
    for event in several:
        kind = (event["event"], event.get("stage"))
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= 2:
            kept.append(event)
    kept += [
        {"event": "artifact", "trial": None, "path": "/x/y/report", "artifact_path": "report"},
        {"event": "model", "trial": None, "name": "raydml-x", "folder": "/x/y/model", "checkpoint": "/x/y/c"},
        {"event": "test_read", "stage": "finalize", "trial": "confirm-000", "checkpoint": "/x/c", "commit": "abc"},
        {"event": "summary", "metrics": {"test_map_at_r": 0.3}, "tags": {"winner": "confirm-000"}},
        {"event": "step", "name": "testing", "number": 1, "total": 3},
        {"event": "note", "text": "so it is"},
        {"event": "trial_retried", "stage": "search", "trial": "search-000", "error": "killed"},
        {"event": "search_extended", "num_trials_before": 4},
        {"event": "trials_reopened", "stage": "search", "trials": ["search-000"], "was_over": True},
        {"event": "interrupted", "signal": 2},
        {"event": "study_finished"},
    ]
    return kept


def studies(folder: Path) -> Door:
    """The folder of a finished study with one damaged file: what the commands show of it."""
    from raydml.report.page import read_illustrations, write_report
    from raydml.study.results import best_that_validates, is_finished, mean_of_runs
    from raydml.study.summary import histories, summarise
    from tests.report.written_study import add_refits, write_study

    made = add_refits(write_study(folder / "s"))
    facts = json.loads((made / "study.json").read_text())
    more = {"study_id": "0" * 32, "storage": str(folder), "specification": "0" * 64, "tracking_uri": None}
    (made / "study.json").write_text(json.dumps({**facts, **more}))
    names = ("study.json", "events.jsonl", "ranking.json", "confirmed.json", "refit.json", "final.json")
    names += ("test_reads.jsonl", "illustrations/illustrations.json")
    files = {name: (made / name).read_bytes() for name in names}

    def read() -> object:
        is_finished(made)
        summary = summarise(made)
        mean_of_runs(made, "confirm-000", "val")
        write_report(folder / "out", summary, histories(made), read_illustrations(made), ("md", "latex", "csv"))
        return best_that_validates(made)

    return _one_of_several(made, files, dict.fromkeys(files, read))


def requests(folder: Path) -> Door:
    """Requests to a served model, as MLflow hands them over: JSON values with images in base64."""
    import base64
    import logging

    from PIL import Image

    from raydml.tracking.pyfunc_model import EmbeddingPythonModel

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    model = EmbeddingPythonModel()
    model.model = _exported(folder / "m")
    images: list[bytes] = []
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(file, kind)
        images.append(file.getvalue())
    texts = [base64.b64encode(one).decode() for one in images]
    pixels = np.zeros((1, 2, 2, 3), dtype=int).tolist()
    documents = [texts[:2], [{"image": texts[0]}], {"image": texts}, {"b64": texts[:1]}, pixels, [texts[0]]]
    values = mutator_of_json(documents)
    damaged = mutator_of_bytes(images)

    def mutate(random: np.random.Generator) -> bytes:
        if random.random() < 0.5:
            return json.dumps([base64.b64encode(damaged(random)).decode()]).encode()
        return values(random)

    def read(content: bytes) -> object:
        value = json.loads(content)
        return model.predict(None, _as_served(value))  # type: ignore[arg-type]

    return Door(mutate, read)


def _as_served(value: Any) -> Any:
    """Return numbers as an array, as MLflow hands them over; other values as they are."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        return value
    return array if array.dtype.kind in "iufb" else value


#: Name -> what makes the door, given an empty folder.
DOORS: dict[str, Callable[[Path], Door]] = {
    "yaml": yaml,
    "space": space,
    "set": set,
    "image_list": image_list,
    "benchmark_lists": benchmark_lists,
    "matlab": matlab,
    "checkpoints": checkpoints,
    "signed_checkpoints": signed_checkpoints,
    "weights": weights,
    "packs": packs,
    "embeddings": embeddings,
    "exported_models": exported_models,
    "galleries": galleries,
    "event_lines": event_lines,
    "events": events,
    "studies": studies,
    "requests": requests,
}
