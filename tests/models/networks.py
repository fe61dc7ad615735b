"""Small networks of any backbone."""

from raydml.models.network import Network, build_network

SETTINGS = {"embedding_dim": 16, "layer_norm": False, "normalize": "l2", "freeze_batch_norm": True}


def make(backbone: str = "convnet", **changes) -> Network:
    """A network of random weights from seed 0, with changed settings."""
    return build_network(**{**SETTINGS, "backbone": backbone, "weights": "none", "seed": 0, **changes})
