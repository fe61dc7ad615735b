"""Weight files: downloading published ones, and reading any file into a state dict.

``.pth`` files are read by ``torch.load(weights_only=True)``, so no pickle can run code.
"""

import http.client
import shutil
import urllib.request
from pathlib import Path

import torch

from raydml.ops.files import digest_of, write_whole

DOWNLOAD_URL = "https://download.pytorch.org/models/"
_TIMEOUT_S = 10.0  # behind a silent firewall; without any network the attempt fails at once


class WeightsError(ValueError):
    """Weights that are not available, cannot be read, or do not fit the network."""


def path_of_published(file_name: str) -> Path:
    """Return the path of published weights on this machine, whether or not they are there.

    It is torch's own: ``torch.hub.get_dir()/checkpoints/<file_name>`` (``TORCH_HOME`` moves it).
    """
    return Path(torch.hub.get_dir()) / "checkpoints" / file_name


def published_weights(file_name: str) -> Path:
    """Return the file of published weights on this machine, downloaded if necessary.

    The eight hex digits in the name are the start of the file's sha256 and are always checked. Raises WeightsError that
    names the file and its place.
    """
    path = path_of_published(file_name)
    if not path.exists():
        _download(DOWNLOAD_URL + file_name, path)
    if not _has_named_digest(path, file_name):
        raise WeightsError(
            f"weights: default: {path} is damaged or another file than its name says (the sha256 differs). "
            f"Delete it and put a fresh copy of {DOWNLOAD_URL}{file_name} there"
        )
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict (name -> tensor on the CPU) from a ``.safetensors``, ``.pth`` or ``.pt`` file.

    Raises WeightsError for a missing file, another suffix, an unreadable file, or one that holds other things than
    named tensors.
    """
    if not path.is_file():
        raise WeightsError(f"weights: no such file: {path}. Give a .pth or .safetensors file, default, or none")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise WeightsError(f"weights: {path} ends in {path.suffix!r}; one of .safetensors, .pth, .pt is read")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # not needed to train

            tensors: object = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise half a dozen types for a damaged file
        raise WeightsError(f"weights: cannot read {path}: {type(error).__name__}: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise WeightsError(f"weights: {path} is not a state dict (a mapping of names to tensors)")
    return tensors


def load_exactly(module: torch.nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Load a state dict into a module. Raises WeightsError for a missing or unexpected tensor or another shape.

    A matrix of one row is accepted for a vector: Caffe stores BatchNorm that way, and so does the published
    BN-Inception.
    """
    own = module.state_dict()
    state = {name: _without_row(value, own.get(name)) for name, value in state.items()}
    # Files from before torch 0.4 lack the counters of BatchNorm, which do not affect any result.
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    state = {**state, **counters}
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = [
        f"{name} is {tuple(state[name].shape)}, the network has {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise WeightsError(f"weights: {origin} does not fit the network: " + "; ".join(problems))
    module.load_state_dict(state)


def _without_row(value: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """Turn (1, C) into (C,) if the module has a vector of C; return anything else unchanged."""
    is_row = own is not None and own.ndim == 1 and value.shape == (1, *own.shape)
    return value.squeeze(0) if is_row else value


def _has_named_digest(path: Path, file_name: str) -> bool:
    """Return whether the sha256 of a file starts with the hex digits at the end of the stem of ``file_name``."""
    return digest_of(path).startswith(Path(file_name).stem.rsplit("-", 1)[-1])


def _download(url: str, path: Path) -> None:
    """Fetch a file, check it and give it its name; several trials may do this at once."""

    def write(aside: Path) -> None:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, aside.open("wb") as file:
            shutil.copyfileobj(response, file)
        if not _has_named_digest(aside, path.name):
            raise OSError("the server sent another file: its sha256 differs")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write, several_writers=True)
    except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
        raise WeightsError(
            f"weights: default: cannot fetch {url} ({error}). Without a network: fetch that file elsewhere "
            f"and put it at {path}, or set weights: none, or weights: PATH"
        ) from error
