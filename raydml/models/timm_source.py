"""What a name of timm stands for: one of its networks, or one that somebody has published on the Hugging Face hub.

vit_small_patch14_dinov2.lvd142m      of timm, with the weights of that name
hf-hub:BVRA/MegaDescriptor-T-224      of the hub: its config.json names a network of timm and its settings
hf-hub:BVRA/MegaDescriptor-T-224@v1   the same at a revision, which a later upload does not change
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raydml.models.backbones import HUB, TIMM, ModelError
from raydml.models.pretrained import WeightsError, ask_once, path_of_published, published_weights, refuse_unreachable

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

_CONFIG = "config.json"
_FILES = ("model.safetensors", "pytorch_model.bin")


class TimmSource(NamedTuple):
    """A network as timm builds it.

    name: as the user wrote it, behind ``timm:``. architecture: its name in timm, with the tag of its weights, if any.
    settings: of the architecture. weights: what timm knows of its published ones; None where there are none.
    """

    name: str
    architecture: str
    settings: Mapping[str, Any]
    weights: PretrainedCfg | None

    @property
    def is_of_hub(self) -> bool:
        return self.name.startswith(HUB)

    def create(self, *, pretrained_cfg_overlay: Mapping[str, Any] | None = None, **settings: Any) -> Any:
        """Return the network without its classifier, an nn.Module. settings: of timm.create_model, before the source's.

        pretrained_cfg_overlay: changes of what timm knows of the weights, such as a state dict; None: random weights.
        """
        import timm

        given = {**self.settings, **settings, "num_classes": 0}
        if self.is_of_hub:
            given["pretrained_cfg"] = self.weights
        if pretrained_cfg_overlay is not None:
            given |= {"pretrained": True, "pretrained_cfg_overlay": dict(pretrained_cfg_overlay)}
        return timm.create_model(self.architecture, **given)

    @property
    def address(self) -> str | None:
        """The name on the hub, or the address, of the published weights; None without any."""
        return None if self.weights is None else self.weights.hf_hub_id or self.weights.url

    @property
    def place(self) -> Path:
        """Where a copy of the published weights is looked for that a user has fetched elsewhere."""
        assert self.weights is not None
        if self.weights.hf_hub_id is None:
            return path_of_published(str(self.weights.url).rpartition("/")[2])
        suffix = Path(self._file_names[0]).suffix
        return path_of_published(f"{self.weights.hf_hub_id.replace('/', '--')}{suffix}")

    def local_weights(self) -> Path | None:
        """Return the file of the published weights that is on this machine, if there is one."""
        if self.weights is None or self.address is None:
            return None
        if self.weights.hf_hub_id is not None:
            for name in self._file_names:
                if (cached := _cached(self.weights.hf_hub_id, name)) is not None:
                    return cached
        return self.place if self.place.is_file() else None

    def fetched_weights(self, instead: str) -> Path:
        """Return the file of the published weights on this machine, fetched if necessary.

        It is looked for in the cache of the Hugging Face hub and beside the other published weights. Raises
        WeightsError for a network without weights, and where the server cannot be reached. instead: what else the user
        can do.
        """
        from huggingface_hub import hf_hub_url

        if self.weights is None or self.address is None:
            cure = f"{instead}, or another name"
            raise WeightsError(f"{TIMM}{self.name}: timm has no weights of this model. Cure: {cure}")
        if (file := self.local_weights()) is not None:
            return file
        if self.weights.hf_hub_id is None:
            address = str(self.weights.url)
            return published_weights(address.rpartition("/")[2], instead, url=address)
        repository, revision = _divided(self.weights.hf_hub_id)
        refuse_unreachable(hf_hub_url(repository, self._file_names[0], revision=revision), self.place, instead)
        try:
            return _downloaded(self.weights.hf_hub_id, *self._file_names)
        except OSError as error:
            raise WeightsError(
                f"{TIMM}{self.name}: the weights cannot be fetched: {_first_line(error)}. Cure: try again, or {instead}"
            ) from error

    @property
    def _file_names(self) -> tuple[str, ...]:
        """The names that the file of the weights may have on the hub, in the order in which they are tried."""
        assert self.weights is not None
        named = self.weights.hf_hub_filename
        return tuple(dict.fromkeys([named, *_FILES] if named else _FILES))


@lru_cache(maxsize=256)
def source_of(name: str) -> TimmSource:
    """Return what a name behind ``timm:`` stands for. One of timm's own is not checked.

    Raises ModelError where the description of a network of the hub is neither here nor can be fetched, or is none.
    """
    import timm

    if not name.startswith(HUB):
        return TimmSource(name, name, {}, timm.get_pretrained_cfg(name, allow_unregistered=True))
    file = _description_of(name.removeprefix(HUB))
    if isinstance(file, str):
        raise ModelError(
            f"{TIMM}{name}: its {_CONFIG} is not in this machine's cache of the Hugging Face hub, and cannot be "
            f"fetched: {file}. Names are {TIMM}{HUB}OWNER/NAME. Cure: without a network, run hf download OWNER/NAME "
            "on a machine that has one, and copy its cache here (HF_HOME says where it is)"
        )
    try:
        return _described(name, json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{TIMM}{name}: its {_CONFIG} does not describe a network of timm ({type(error).__name__}: {error}); only "
            "those that timm.create_model can load are backbones"
        ) from error


@lru_cache(maxsize=256)
def _description_of(identity: str) -> Path | str:
    """Return the config.json of a repository, or the reason why it cannot be fetched.

    The reason is kept as well: the check of a space asks many times.
    """
    if (file := _cached(identity, _CONFIG)) is not None:  # first, so that no trial asks the hub
        return file
    try:
        _refuse_without_connection(identity)
        return _downloaded(identity, _CONFIG)
    except (OSError, ValueError) as error:  # ValueError: no name of a repository
        return _first_line(error)


def _described(name: str, content: dict[str, Any]) -> TimmSource:
    """Return the network that a config.json describes. Older ones have the facts about the weights at the top."""
    from timm.models import PretrainedCfg

    known = PretrainedCfg.__dataclass_fields__
    facts = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in content.get("pretrained_cfg", content).items()
        if key in known
    }
    facts |= {"hf_hub_id": name.removeprefix(HUB), "url": None, "file": None, "architecture": content["architecture"]}
    settings = {key: value for key, value in (content.get("model_args") or {}).items() if key != "num_classes"}
    return TimmSource(name, content["architecture"], settings, PretrainedCfg(**facts))


def _divided(identity: str) -> tuple[str, str | None]:
    """Return the repository and the revision of OWNER/NAME@REVISION."""
    repository, _, revision = identity.partition("@")
    return repository, revision or None


def _cached(identity: str, file_name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, revision = _divided(identity)
    try:
        found = try_to_load_from_cache(repository, file_name, revision=revision)
    except HFValidationError:  # no name of a repository: the download says so
        return None
    return Path(found) if isinstance(found, str) else None


def _refuse_without_connection(identity: str) -> None:
    """Raise ConnectionError where the hub does not answer once; its own library tries for half a minute."""
    import requests
    from huggingface_hub import hf_hub_url

    repository, revision = _divided(identity)
    try:
        ask_once(hf_hub_url(repository, _CONFIG, revision=revision))
    except requests.RequestException as error:
        raise ConnectionError("no connection to the hub") from error


def _downloaded(identity: str, *file_names: str) -> Path:
    """Return the first of these files that a repository has, fetched. Raises OSError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = _divided(identity)
    for number, file_name in enumerate(file_names, 1):
        try:
            return Path(hf_hub_download(repository, file_name, revision=revision))
        except EntryNotFoundError as error:
            if number == len(file_names) or isinstance(error, LocalEntryNotFoundError):  # local: there is no network
                raise
    raise AssertionError("no name of a file")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
