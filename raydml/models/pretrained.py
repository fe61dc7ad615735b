"""Weight files: where the published ones lie, how they are fetched, how any file becomes a state dict.

Nothing here opens a pickle that could run code: ``.pth`` files go through ``torch.load(weights_only=True)``.
"""

import http.client
import shutil
import urllib.request
from pathlib import Path

import torch

from raydml.ops.files import digest_of, write_whole

DOWNLOAD_URL = "https://download.pytorch.org/models/"
_TIMEOUT_S = 10.0  # without any network the attempt ends at once; behind a silent firewall it ends after this


class WeightsError(ValueError):
    """The weights that were asked for cannot be had, read, or do not fit the network."""


def published_weights(file_name: str) -> Path:
    """The file of published weights on this machine, downloaded when it is not there yet.

    It lies where torch itself keeps it: ``torch.hub.get_dir()/checkpoints/<file_name>`` (``TORCH_HOME`` moves
    it). The eight hex digits in the name are the start of the file's sha256 and are always checked. Raises
    WeightsError that says which file to put where.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.exists():
        _download(DOWNLOAD_URL + file_name, path)
    if not _has_named_digest(path, file_name):
        raise WeightsError(
            f"weights: default: {path} is damaged or is not what its name says (the sha256 differs). "
            f"Delete it and put a fresh copy of {DOWNLOAD_URL}{file_name} there"
        )
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict (name -> tensor on the CPU) from a ``.safetensors``, ``.pth`` or ``.pt`` file.

    Raises WeightsError for a missing file, another ending, an unreadable file, or one that holds anything
    but named tensors.
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
    """Load a state dict into a module; any missing, unexpected or misshapen tensor is a WeightsError.

    A vector may come as a matrix of one row: so Caffe keeps BatchNorm, and so the published BN-Inception has it.
    """
    own = module.state_dict()
    state = {name: _without_row(value, own.get(name)) for name, value in state.items()}
    # Old files lack the counters that BatchNorm gained in torch 0.4; they do not enter any number of ours.
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    state = {**state, **counters}
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = [
        f"{name} is {tuple(state[name].shape)}, the network wants {tuple(own[name].shape)}"
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


def _without_row(value: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """(1, C) -> (C,) where a vector of C is wanted; anything else as it is."""
    is_row = wanted is not None and wanted.ndim == 1 and value.shape == (1, *wanted.shape)
    return value.squeeze(0) if is_row else value


def _has_named_digest(path: Path, file_name: str) -> bool:
    """Whether the sha256 of a file starts with the hex digits at the end of ``file_name``'s stem."""
    return digest_of(path).startswith(Path(file_name).stem.rsplit("-", 1)[-1])


def _download(url: str, path: Path) -> None:
    """Fetch to a file beside the target, check it, rename it: several trials may do this at once."""

    def write(aside: Path) -> None:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, aside.open("wb") as file:
            shutil.copyfileobj(response, file)
        if not _has_named_digest(aside, path.name):
            raise OSError("what came back is not that file: its sha256 differs")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write, several_writers=True)
    except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
        raise WeightsError(
            f"weights: default: cannot fetch {url} ({error}). Without a network: fetch that file elsewhere "
            f"and put it at {path}, or set weights: none, or weights: PATH"
        ) from error
