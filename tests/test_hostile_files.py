"""Files that would run code when they are unpickled, at every door that reads files: refused, and nothing runs."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from raydml.evaluation.saved_embeddings import load_embeddings
from raydml.images.pack import ImageFiles, open_pack, survey_headers, write_pack
from raydml.images.preprocessing import Resizing
from raydml.inference.export import CONFIG, WEIGHTS, EmbeddingModel
from raydml.inference.gallery import INDEX, Gallery
from raydml.models.pretrained import read_weights
from raydml.search_space.space import load_space
from raydml.study import events
from raydml.study.folder import read_json
from raydml.training import checkpoint
from tests.cli.commands import run

MARK = "code-ran"


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (Path(self.mark), "ran")


def plain(trap: Trap) -> bytes:
    return pickle.dumps(trap)


def as_torch(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(2)}, "more": trap}, file)
    return file.getvalue()


def as_old_torch(trap: Trap) -> bytes:
    file = io.BytesIO()
    torch.save({"w": trap}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_objects(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.savez(file, embeddings=np.array([trap], dtype=object), labels=np.array([trap], dtype=object))
    return file.getvalue()


def as_array(trap: Trap) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    return file.getvalue()


def as_yaml(trap: Trap) -> bytes:
    called = "!!python/object/apply:pathlib.Path"
    return f"trial: {called}.write_text [{called} [{trap.mark}], x]".encode()


FORMS = (plain, as_torch, as_old_torch, as_objects, as_array, as_yaml)


def weights(folder: Path, content: bytes) -> None:
    for suffix in (".pth", ".pt", ".safetensors", ".tar"):
        (folder / f"w{suffix}").write_bytes(content)
        refused(functools.partial(read_weights, folder / f"w{suffix}"))


def imported(folder: Path, content: bytes) -> None:
    (folder / "w.pth").write_bytes(content)
    result = run("import", folder / "w.pth", folder / "out", "--from", "mdr")
    assert result.exit_code == 2
    assert "error:" in result.stderr


def checkpoints(folder: Path, content: bytes) -> None:
    """Each file of a checkpoint with a manifest that fits it."""
    names = {
        checkpoint.STATE: checkpoint.load_state,
        checkpoint.WEIGHTS: checkpoint.load_weights,
        checkpoint.CARD: checkpoint.load_card,
    }
    for name in names:
        (folder / name).write_bytes(content)
    facts = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"files": dict.fromkeys(names, facts)}))
    for load in names.values():
        with pytest.raises(checkpoint.CheckpointError):
            load(folder)
    (folder / checkpoint.MANIFEST).write_bytes(content)
    assert checkpoint.newest_intact(folder.parent) is None


def embeddings(folder: Path, content: bytes) -> None:
    (folder / "e.npz").write_bytes(content)
    refused(lambda: load_embeddings(folder / "e.npz"))


def exported(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    card = {"network": {"embedding_dim": 2}, "preprocessing": {}, "weights_sha256": hashlib.sha256(content).hexdigest()}
    (folder / CONFIG).write_text(json.dumps(card))
    refused(lambda: EmbeddingModel.load(folder))
    (folder / CONFIG).write_bytes(content)
    refused(lambda: EmbeddingModel.load(folder))


def galleries(folder: Path, content: bytes) -> None:
    (folder / "gallery.json").write_text(json.dumps({"root": "/", "names": ["a"], "num_images": 1, "embedding_dim": 2}))
    (folder / INDEX).write_bytes(content)
    refused(lambda: Gallery.load(folder))
    (folder / "gallery.json").write_bytes(content)
    refused(lambda: Gallery.load(folder))


def packs(folder: Path, content: bytes) -> None:
    """Each file of the decoded images, with a manifest that states its sum: the images are packed anew."""
    import zlib

    from PIL import Image

    Image.new("RGB", (4, 4)).save(folder / "a.png")
    files = ImageFiles(folder, ("a.png",), Resizing(4, "short_side", "bilinear"))
    (folder / "pack").mkdir()
    write_pack(folder / "pack", files, survey_headers(files), lambda _skipped: None)
    whole = json.loads((folder / "pack" / "manifest.json").read_text())
    from raydml.images.pack import _hash_of

    for name in [path.name for path in (folder / "pack").iterdir()]:
        before = (folder / "pack" / name).read_bytes()
        (folder / "pack" / name).write_bytes(content)
        if name != "manifest.json":
            signed = {**whole, "index_crc32": zlib.crc32((folder / "pack" / whole["index"]).read_bytes())}
            signed["sum"] = _hash_of({key: value for key, value in signed.items() if key != "sum"})
            (folder / "pack" / "manifest.json").write_text(json.dumps(signed))
        assert open_pack(folder / "pack", files) is None or name == whole["sources"]
        (folder / "pack" / name).write_bytes(before)


def studies(folder: Path, content: bytes) -> None:
    """The files of a study."""
    for name in ("study.json", "ranking.json", "final.json", "summary.json"):
        (folder / name).write_bytes(content)
        refused(lambda name=name: read_json(folder / name))
    events.events_path(folder).write_bytes(content + b"\n")
    assert events.read(events.events_path(folder)) == []


def spaces(folder: Path, content: bytes) -> None:
    (folder / "space.yaml").write_bytes(content)
    refused(lambda: load_space(folder / "space.yaml"))


def is_own(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "raydml"


def refused(read: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read()
    assert is_own(caught.value), repr(caught.value)
    assert "weights_only" not in str(caught.value), "an invitation to let a file run code"


DOORS = (weights, imported, checkpoints, embeddings, exported, galleries, packs, studies, spaces)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_no_door_runs_the_code_in_a_pickle(door: Callable[[Path, bytes], None], tmp_path: Path) -> None:
    mark = tmp_path / MARK
    for form in FORMS:
        folder = tmp_path / form.__name__
        folder.mkdir()
        door(folder, form(Trap(mark)))
        assert not mark.exists(), form.__name__


@pytest.mark.parametrize("form", [plain, as_torch, as_array], ids=lambda form: form.__name__)
def test_the_trap_itself_works(form: Callable[[Trap], bytes], tmp_path: Path) -> None:
    content = form(Trap(tmp_path / MARK))
    if form is plain:
        pickle.loads(content)
    elif form is as_array:
        np.load(io.BytesIO(content), allow_pickle=True)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert (tmp_path / MARK).exists()


def test_archives_that_unpack_to_gigabytes_are_refused_unread(tmp_path: Path) -> None:
    names = ["w.pth", "e.npz", checkpoint.STATE]
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        header = (
            struct.pack("<8sH", b"\x93NUMPY\x01\x00", 118)
            + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"
        )
        archive.writestr("embeddings.npy", header.ljust(128) + bytes(150_000_000))
        archive.writestr("x/data.pkl", b"\x80\x02}.")
    content = (tmp_path / "bomb").read_bytes()
    assert len(content) < 200_000
    for name in names:
        (tmp_path / name).write_bytes(content)
    facts = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / checkpoint.MANIFEST).write_text(json.dumps({"files": {checkpoint.STATE: facts}}))
    readers = (lambda: read_weights(tmp_path / "w.pth"), lambda: load_embeddings(tmp_path / "e.npz"))
    for read in (*readers, lambda: checkpoint.load_state(tmp_path)):
        with pytest.raises(ValueError, match=r"200 times its size|cannot be read \(ValueError\)") as caught:
            read()
        assert is_own(caught.value)
