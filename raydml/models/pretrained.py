"""Weight files: downloading published ones, and reading any file into a state dict.

Pickled files are read by ``torch.load(weights_only=True)``. Objects in them that are not torch's, such as the options
of a training, become empty placeholders, so no file can run code.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from raydml.ops.files import CURES_OF_DISKS, digest_of, is_zip_bomb, require_space, write_whole
from raydml.ops.progress import report_progress

if TYPE_CHECKING:  # torch is slow to import, and weights are looked for without it
    import torch

DOWNLOAD_URL = "https://download.pytorch.org/models/"
_MEGABYTE = 1_000_000
_TIMEOUT_S = 10.0  # behind a silent firewall; without any network the attempt fails at once


class WeightsError(ValueError):
    """Weights that are not available, cannot be read, or do not fit the network."""


def path_of_published(file_name: str) -> Path:
    """Return the path of published weights on this machine, whether or not they are there.

    It is torch's own: ``torch.hub.get_dir()/checkpoints/<file_name>`` (``TORCH_HOME`` moves it).
    """
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / file_name


def published_weights(
    file_name: str, instead: str = "set weights: none, or weights: PATH", url: str | None = None
) -> Path:
    """Return the file of published weights on this machine, downloaded if necessary.

    Eight hex digits at the end of the name are the start of the file's sha256 and are always checked. url: of a file
    that is not torchvision's. Raises WeightsError that names the file, its place and what else the user can do
    (instead).
    """
    url = url or DOWNLOAD_URL + file_name
    path = path_of_published(file_name)
    if not path.exists():
        _download(url, path, instead)
    if not _has_named_digest(path, file_name):
        raise WeightsError(
            f"weights: default: {path} is damaged or another file than its name says (the sha256 differs). "
            f"Delete it and put a fresh copy of {url} there"
        )
    return path


SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict (name -> tensor on the CPU): ``.safetensors``, ``.pth``, ``.pt``, ``.pth.tar`` or ``.bin``.

    It may be the entry ``state_dict`` of a checkpoint, whose other entries are ignored, and its names may all begin
    with ``module.``, as DataParallel writes them. Raises WeightsError for a missing file, another suffix, an unreadable
    file, or one that holds other things than named tensors.
    """
    if not path.is_file():
        raise WeightsError(f"weights: no such file: {path}. Give a .pth or .safetensors file, default, or none")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights: {path} ends in {path.suffix!r}; one of {', '.join(SUFFIXES)} is read")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # not needed to train

            content: object = load_file(path)
        else:
            content = _without_code(path)
    except pickle.UnpicklingError as error:  # torch's message advises to let the file run code
        raise WeightsError(
            f"weights: {path} holds pickled objects, and loading them could run code. Cure: a file of tensors, as "
            "torch.save(model.state_dict(), FILE) writes it"
        ) from error
    except Exception as error:  # torch and safetensors raise half a dozen types for a damaged file
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(f"weights: cannot read {path}: {type(error).__name__}: {reason}") from error
    state = _state_dict_in(content)
    if state is None:
        raise WeightsError(
            f"weights: {path} is no state dict (a mapping of names to tensors), and has none as its entry state_dict"
        )
    prefix = "module."
    return {n.removeprefix(prefix): t for n, t in state.items()} if all(n.startswith(prefix) for n in state) else state


def _state_dict_in(content: object) -> dict[str, torch.Tensor] | None:
    import torch

    nested = content.get("state_dict", content) if isinstance(content, dict) else content
    is_state = isinstance(nested, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in nested.items()
    )
    return nested if is_state and isinstance(nested, dict) and nested else None


class _Placeholder:
    """Stands in for an object of a pickle that is no tensor; it takes anything and does nothing."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def _without_code(path: Path) -> object:
    """Unpickle a file of torch.save with a placeholder for every object that is not torch's own."""
    import torch

    if is_zip_bomb(path):
        raise ValueError("it would unpack to more than 200 times its size")
    names = [name for name in _globals_in(path) if not re.match(r"torch\.|collections\.(OrderedDict|Counter)$", name)]
    with torch.serialization.safe_globals([(_Placeholder, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _globals_in(path: Path) -> list[str]:
    """Return the dotted names of the Python objects that the pickles of a file name, without loading any of them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith("data.pkl")]
            pickles = [archive.read(name) for name in members]
        return [name for content in pickles for name in _globals_of(io.BytesIO(content))]
    with path.open("rb") as file:  # the format before torch 1.6: five pickles, and the tensors behind them
        return [name for _ in range(5) for name in _globals_of(file)]


def _globals_of(file: BinaryIO) -> list[str]:
    try:
        found = [str(argument) for operation, argument, _ in pickletools.genops(file) if operation.name == "GLOBAL"]
    except ValueError:  # no further pickle
        return []
    return [name.replace(" ", ".") for name in dict.fromkeys(found)]


def load_exactly(
    module: torch.nn.Module, state: dict[str, torch.Tensor], origin: str, shown: Callable[[str], str] = str
) -> None:
    """Load a state dict into a module. Raises WeightsError for a missing or unexpected tensor or another shape.

    shown: the name of a tensor in messages, where the file has other names than the module.
    A matrix of one row is accepted for a vector: Caffe stores BatchNorm that way, and so does the published
    BN-Inception.
    """
    own = module.state_dict()
    state = {name: _without_row(value, own.get(name)) for name, value in state.items()}
    # Files from before torch 0.4 lack the counters of BatchNorm, which do not affect any result.
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    state = {**state, **counters}
    differ = differences(own, state)
    missing, unexpected = ([shown(name) for name in names] for names in (differ.missing, differ.unexpected))
    misshapen = [
        f"{shown(name)} is {tuple(state[name].shape)}, the network has {tuple(own[name].shape)}"
        for name in differ.misshapen
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise WeightsError(f"weights: {origin} does not fit the network: " + "; ".join(problems))
    module.load_state_dict(state)


class Differences(NamedTuple):
    """Names of tensors, sorted: those that a state dict lacks, those that the network lacks, those of other shapes."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


def differences(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> Differences:
    """Return how a state dict differs from the one that a network has. own: of the network."""
    return Differences(
        sorted(own.keys() - state.keys()),
        sorted(state.keys() - own.keys()),
        sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape),
    )


def _without_row(value: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """Turn (1, C) into (C,) if the module has a vector of C; return anything else unchanged."""
    is_row = own is not None and own.ndim == 1 and value.shape == (1, *own.shape)
    return value.squeeze(0) if is_row else value


def _has_named_digest(path: Path, file_name: str) -> bool:
    """Return whether the sha256 of a file starts with the hex digits, if any, at the end of the stem of its name."""
    named = re.search(r"-([0-9a-f]{8,64})$", Path(file_name).stem)
    return named is None or digest_of(path).startswith(named[1])


def ask_once(url: str) -> None:
    """Ask a server for the header of a file. Raises requests.RequestException where it gives no answer."""
    import requests

    requests.head(url, timeout=_TIMEOUT_S).close()


def refuse_unreachable(url: str, path: Path, instead: str) -> None:
    """Raise WeightsError where the server of some weights gives no answer.

    path: the place on this machine for a copy that the user fetches elsewhere.
    """
    import requests

    try:
        ask_once(url)
    except requests.RequestException as error:
        raise _cannot_fetch(url, path, instead, error) from error


def _download(url: str, path: Path, instead: str) -> None:
    """Fetch a file, check it and give it its name; several trials may do this at once."""
    import requests

    def write(aside: Path) -> None:
        with requests.get(url, stream=True, timeout=_TIMEOUT_S) as response, aside.open("wb") as file:
            response.raise_for_status()
            num_bytes = int(response.headers.get("Content-Length", 0))
            require_space(path, num_bytes, "the file of the weights")
            total = num_bytes // _MEGABYTE or None
            for number, chunk in enumerate(response.iter_content(_MEGABYTE)):
                file.write(chunk)
                report_progress(f"fetching {path.name}", number, total, "MB")
        if not _has_named_digest(aside, path.name):
            raise OSError("the server sent another file: its sha256 differs")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write, several_writers=True)
    except OSError as error:  # requests' errors are OSErrors
        if error.errno in CURES_OF_DISKS:
            raise
        raise _cannot_fetch(url, path, instead, error) from error


def _cannot_fetch(url: str, path: Path, instead: str, error: OSError) -> WeightsError:
    return WeightsError(
        f"weights: default: cannot fetch {url} ({_reason(error)}). Without a network: fetch that file elsewhere and "
        f"put it at {path}, or {instead}"
    )


def _reason(error: OSError) -> str:
    """Return a few words in place of the chain of errors that requests prints."""
    import requests

    if isinstance(error, requests.Timeout):
        return f"no answer within {_TIMEOUT_S:g} s"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted"
    return "no connection" if isinstance(error, requests.ConnectionError) else str(error)
