"""The weights of a published system's release as an exported model: network, head, preprocessing and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydml.inference.export import EmbeddingModel
from raydml.models.network import build_network, preprocessing_for
from raydml.models.pretrained import WeightsError, load_exactly, read_weights
from raydml.models.releases import RELEASES, converted, name_in_release, recognised
from raydml.ops.files import digest_of
from raydml.training import checkpoint


def import_release(
    file: Path,
    release: str | None = None,
    *,
    crop_px: int | None = None,
    normalize: str | None = None,
    num_slices: int | None = None,
) -> EmbeddingModel:
    """Return the network of a release's checkpoint, with its head and the preprocessing of the release's evaluation.

    Args:
        file: a checkpoint as the release writes it; see `read_weights`.
        release: a key of RELEASES; None recognises it by the names of the tensors.
        crop_px, normalize, num_slices: in place of those of the release, where its options can change them and the file
            does not show it; num_slices are the learners of Divide & Conquer.

    The card says which release and file it is (`release`), and which tensors were left out for which reason. Raises
    WeightsError for a file that cannot be read, is of no release or of another one, or lacks or adds a layer;
    ModelError for a crop that the backbone cannot take.
    """
    state = read_weights(file)
    key = release or recognised(state)
    if key is None:
        raise WeightsError(
            f"{file} is no checkpoint of one of the releases {', '.join(RELEASES)}; its names begin "
            f"{', '.join(list(state)[:3])}. Cure: a backbone alone is evaluated as backbone:NAME:{file}; "
            "docs/weights.md shows how any other network comes in"
        )
    given = {"normalize": normalize, "num_slices": num_slices}
    changes = {name: value for name, value in given.items() if value is not None}
    facts = RELEASES[key]
    if unknown := [name for name in changes if name not in facts.options]:
        option = f"--{unknown[0].replace('_', '-')}"
        raise WeightsError(
            f"{option} = {changes[unknown[0]]}: {facts.title} has no such option, and it would be another network than "
            f"the trained one. Cure: leave out {option}"
        )
    weights = converted(key, state, str(file), changes)
    settings: dict[str, Any] = {"layer_norm": False, "freeze_batch_norm": True, **weights.network}
    preprocessing = preprocessing_for(
        settings["backbone"],
        resize_px=facts.resize_px,
        crop_px=crop_px or facts.crop_px,
        resize=facts.resize,
        interpolation=facts.interpolation,
    )
    network = build_network(**settings, weights="none", seed=0)  # all its initial values are overwritten
    load_exactly(network, weights.state, str(file), lambda name: name_in_release(key, name))
    card = {
        "network": settings,
        "release": {
            "name": key,
            "title": facts.title,
            "file": file.name,
            "sha256": digest_of(file),
            "left_out": weights.dropped,
            "recall_at": {data: list(k) for data, k in facts.recall_at.items()},
            "codes": list(facts.codes),
            "groups": list(facts.groups),
        },
        "raydml_version": checkpoint.version(),
        "git_commit": checkpoint.git_commit(),
    }
    return EmbeddingModel(network, preprocessing, card, "cpu")


def describe_release(model: EmbeddingModel) -> list[str]:
    """Return what was imported, in sentences: the network, its preprocessing, and the tensors that were left out."""
    release, network, preparation = model.card["release"], model.card["network"], model.preprocessing
    scaled = f"{'squashed to' if preparation.resize == 'squash' else 'short side'} {preparation.resize_px} px"
    slices = f" in {network['num_slices']} slices" if network.get("num_slices", 1) > 1 else ""
    norm = ", layer norm" if network["layer_norm"] else ""
    lines = [
        f"{release['title']}: {network['backbone']}, {network['embedding_dim']} dimensions, "
        f"{network.get('pooling', 'average')} pooling{norm}, normalize {network['normalize']}{slices}",
        f"images: {scaled} ({preparation.interpolation}), centre crop {preparation.crop_px} px",
    ]
    return lines + [f"left out: {len(names)} tensors, {why}" for why, names in release["left_out"].items()]
