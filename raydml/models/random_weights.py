"""Files of random weights that stand for published ones where only it matters that a network trains."""

from pathlib import Path

import torch
from torch import nn

from raydml.models.lookup import facts_of
from raydml.models.pooling import pooling_layer


def write_random_weights(backbone: str, file: Path) -> None:
    """Write a state dict of a backbone: random weights, and BatchNorm statistics of coloured noise.

    With the statistics that BatchNorm starts from, every image would have nearly the same embedding.
    """
    facts = facts_of(backbone)
    size_px = facts.nearest_crop_px(64)
    generator = torch.Generator().manual_seed(0)
    colours = 0.7 * torch.randn(16, 3, 1, 1, generator=generator)
    images = colours + 0.3 * torch.randn(16, 3, size_px, size_px, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        trunk = facts.build(facts.own_pooling if facts.is_timm else pooling_layer("average")).train()
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = None  # the mean of all batches: of the one
    if norms:
        with torch.inference_mode():
            trunk(images * (70 if facts.value_range == 255 else 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(trunk.get_submodule("model" if facts.is_timm else "").state_dict(), file)
