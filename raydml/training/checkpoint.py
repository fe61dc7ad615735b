"""Checkpoints: a trial's state on disk, written so that an incomplete one is recognised.

    state.pt             everything needed to continue: tensors and plain values
    weights.safetensors  the best network so far
    model.json           the model card: how to rebuild the network, its input, its origin
    history.json         the result of every epoch so far; checkpoints of older versions have none
    manifest.json        size and sha256 of the others, written last: no manifest, no checkpoint

No file is opened in a way that could run code inside it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from raydml.ops.files import digest_of, is_zip_bomb, require_space, write_whole

if TYPE_CHECKING:  # torch is slow to import, and most commands only look for checkpoints
    from torch import Tensor

STATE, WEIGHTS, CARD, MANIFEST = "state.pt", "weights.safetensors", "model.json", "manifest.json"
HISTORY = "history.json"
#: In the package, where it was copied to another machine without its repository: the commit that it had there.
COMMIT_FILE = "commit.txt"
NUM_KEPT = 2  # of a trial that trains: the newest may be damaged by what ends the trial
FILES = (STATE, WEIGHTS, CARD, HISTORY)  # those that the manifest states


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or damaged."""


def save(
    folder: Path,
    *,
    state: Mapping[str, Any],
    model_card: Mapping[str, Any],
    best_weights: Mapping[str, Tensor],
    history: Sequence[Mapping[str, Any]] = (),
    weights_of: Path | None = None,
) -> Path:
    """Write a checkpoint into ``folder`` (made when missing) and return it.

    state: tensors, numbers, strings, None and lists, tuples and dictionaries of them. model_card: plain
    JSON values; ``raydml_version`` and ``git_commit`` are added. best_weights: name -> tensor.
    history: the results of the epochs so far, plain JSON values. weights_of: a checkpoint that has the same best
    weights, whose file this one then shares where the file system can do that. A new folder
    appears under its name only when complete; in one that exists already the old manifest goes first and the
    new one comes last, so that a kill in between leaves a folder that ``is_intact`` refuses. Raises ValueError
    for a card with a number JSON cannot hold (NaN, infinity).
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    card = {**model_card, "raydml_version": version(), "git_commit": git_commit()}
    card_text = json.dumps(card, indent=2, allow_nan=False) + "\n"
    # safetensors stores plain layouts only, so channels_last weights are rewritten; the copy is of values.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in best_weights.items()}
    target = folder if folder.exists() else folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    require_space(target, _num_bytes(state) + _num_bytes(weights), "a checkpoint")
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).unlink(missing_ok=True)
        files = {STATE: _written(target / STATE, lambda file: torch.save(dict(state), cast(IO[bytes], file)))}
        shared = None if weights_of is None else _linked_weights(weights_of, target)
        if shared is None:
            write_whole(target / WEIGHTS, lambda path: save_file(weights, path))
        files[WEIGHTS] = shared or _facts(target / WEIGHTS)
        write_whole(target / CARD, card_text)
        write_whole(target / HISTORY, json.dumps({"epochs": list(history)}, allow_nan=False) + "\n")
        files |= {name: _facts(target / name) for name in (CARD, HISTORY)}
        write_whole(target / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
        if target != folder:
            target.rename(folder)
    finally:
        if target != folder:  # on a full disk, half a checkpoint would keep the disk full
            shutil.rmtree(target, ignore_errors=True)
    return folder


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._num_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def facts(self) -> dict[str, Any]:
        return {"size_bytes": self._num_bytes, "sha256": self._digest.hexdigest()}


def _written(path: Path, write: Callable[[_HashedFile], object]) -> dict[str, Any]:
    """Write a file, and return what the manifest states of it."""
    facts: dict[str, Any] = {}

    def content(aside: Path) -> None:
        with open(aside, "wb") as file:
            hashed = _HashedFile(file)
            write(hashed)
        facts.update(hashed.facts())

    write_whole(path, content)
    return facts


def _linked_weights(checkpoint: Path, target: Path) -> dict[str, Any] | None:
    """Let a folder share the file of the weights of a checkpoint, and return what the manifest states of that file.

    Return None where that cannot be done: the file may be gone or damaged, and some file systems have no links.
    """
    try:
        file = _checked(checkpoint, WEIGHTS)
        (target / WEIGHTS).unlink(missing_ok=True)
        os.link(file, target / WEIGHTS)
    except (OSError, CheckpointError):
        return None
    return dict(_stated(checkpoint)[WEIGHTS])


def _num_bytes(value: Any) -> int:
    """Bytes of the tensors in a state; what else is in it is small."""
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return int(getattr(value, "nbytes", 0))


def load_state(folder: Path) -> dict[str, Any]:
    """The state as saved, tensors on the CPU. Raises CheckpointError when the file is not as written, or unreadable."""
    import torch

    state: dict[str, Any] = _read(folder, STATE, lambda path: torch.load(path, map_location="cpu", weights_only=True))
    return state


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The best network's state dict on the CPU. Raises CheckpointError like `load_state`."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = _read(folder, WEIGHTS, load_file)
    return weights


def load_card(folder: Path) -> dict[str, Any]:
    """The model card. Raises CheckpointError when the file is not as written, or is no JSON object."""
    card: dict[str, Any] = _read(folder, CARD, lambda path: json.loads(path.read_text(encoding="utf-8")))
    return card


def load_history(folder: Path) -> list[dict[str, Any]]:
    """The results of the epochs so far, oldest first; none of a checkpoint that an older version has written.

    Raises CheckpointError when the file is not as written.
    """
    if HISTORY not in _stated(folder):
        return []
    read = _read(folder, HISTORY, lambda path: json.loads(path.read_text(encoding="utf-8")))
    epochs = read.get("epochs")
    if not isinstance(epochs, list) or not all(isinstance(one, dict) and "epoch" in one for one in epochs):
        raise CheckpointError(f"{folder / HISTORY} lists no epochs; use an older checkpoint")
    return epochs


def damage_of(folder: Path, names: Sequence[str] = FILES) -> str | None:
    """In words what is wrong with a checkpoint; None where each file has the size and sha256 that its manifest has.

    names: the files that are looked at. Checkpoints of older versions have no history.
    """
    try:
        stated = _stated(folder)
        for name in names:
            if name != HISTORY or HISTORY in stated:
                _checked(folder, name)
    except CheckpointError as error:
        return str(error)
    return None


def is_intact(folder: Path) -> bool:
    """Whether every file of a checkpoint is there with the size and sha256 that its manifest states."""
    return damage_of(folder) is None


def newest_intact(parent: Path, damaged: list[str] | None = None) -> Path | None:
    """The intact checkpoint with the highest number in its name among ``parent``'s folders, or None.

    Names are compared by their last whole number (``checkpoint_000010`` after ``checkpoint_9``), then as
    text. Folders that are no intact checkpoint are passed over; what is wrong with each is added to ``damaged``.
    """
    parent = Path(parent)
    if not parent.is_dir():
        return None
    for folder in newest_first(parent):
        if (damage := damage_of(folder)) is None:
            return folder
        if damaged is not None and any(folder.iterdir()):  # an empty one is none, and nothing in it is lost
            damaged.append(damage)
    return None


def newest_first(parent: Path) -> list[Path]:
    """The folders of ``parent``, whole checkpoints or not, in the order in which `newest_intact` looks at them."""
    return in_order([path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")])


def in_order(folders: Sequence[Path]) -> list[Path]:
    """Return folders of checkpoints, the newest first by their names."""
    return sorted(folders, key=_age, reverse=True)


def version() -> str:
    """The installed version of raydml, "unknown" when it runs from a plain copy of its sources."""
    try:
        return importlib.metadata.version("raydml")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def git_commit() -> str | None:
    """The commit of raydml's own sources, with "-dirty" when tracked files differ; None outside a repository.

    A package installed into an environment inside another repository is not tracked there: None. A copy that was sent
    to another machine has the commit of its original.
    """
    source = Path(__file__).resolve()
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        copied = source.parents[1] / COMMIT_FILE
        return (copied.read_text(encoding="utf-8").strip() or None) if copied.is_file() else None
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def short_commit(commit: str) -> str:
    """Return a commit with 12 of its digits, for people."""
    return re.sub("(?<=^[0-9a-f]{12})[0-9a-f]+", "", commit)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine: the commit is unknown, which is no error
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _age(folder: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", folder.name)
    return (int(numbers[-1]) if numbers else -1, folder.name)


def _facts(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": digest_of(path)}


def _stated(folder: Path) -> dict[str, Any]:
    """Return what the manifest states of each file. Raises CheckpointError where it is missing or damaged."""
    try:
        files = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["files"]
        return dict(files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint ({type(error).__name__}: {error}); "
            "use an older one from the same folder"
        ) from error


def _checked(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file after checking its size and sha256 against the manifest."""
    folder, files = Path(folder), _stated(folder)
    try:
        stated = files[name]
        found = _facts(folder / name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint ({type(error).__name__}: {error}); "
            "use an older one from the same folder"
        ) from error
    if found != stated:
        raise CheckpointError(f"{folder / name} is not as it was written (size or sha256 differ); use an older one")
    return folder / name


def _read(folder: Path, name: str, read: Callable[[Path], object]) -> Any:
    """Return the dictionary in a file of a checkpoint, from a reader that runs no code.

    A file that is as its manifest states can still be unreadable: the checkpoint may have been made by somebody else.
    torch, safetensors and json raise a dozen types then, and torch advises to let the file run code.
    """
    path = _checked(folder, name)
    try:
        if is_zip_bomb(path):
            raise ValueError("it would unpack to more than 200 times its size")
        value = read(path)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}): it is no file that raydml wrote; use another checkpoint"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no dictionary, but {type(value).__name__}; use another checkpoint")
    return value
