"""Random weights that load like published ones and tell images apart."""

import torch

from raydml.models.network import build_network
from raydml.models.random_weights import write_random_weights


def test_images_of_other_colours_have_other_embeddings(tmp_path):
    write_random_weights("resnet18", tmp_path / "weights.pth")
    settings = {"embedding_dim": 8, "layer_norm": False, "normalize": "l2", "freeze_batch_norm": True, "seed": 0}
    network = build_network(backbone="resnet18", weights=str(tmp_path / "weights.pth"), **settings).eval()
    images = torch.stack([torch.full((3, 64, 64), value) for value in (-1.0, 0.0, 1.0)])
    with torch.inference_mode():
        distances = torch.cdist(network(images), network(images))
    assert distances[~torch.eye(3, dtype=torch.bool)].min() > 0.05
    write_random_weights("resnet18", tmp_path / "again.pth")
    first, second = (torch.load(tmp_path / name) for name in ("weights.pth", "again.pth"))
    assert all(torch.equal(first[name], second[name]) for name in first)
