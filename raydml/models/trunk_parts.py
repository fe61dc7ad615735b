"""Parts of a trunk that the facts about a backbone and the network itself must agree on."""

from torch import nn

_BLOCKS = ("model.blocks", "encoder.layers")  # the lists of blocks of timm's networks and of torchvision's transformer


def block_ends(trunk: nn.Module, stages: tuple[str, ...]) -> list[nn.Module]:
    """Return the last module of each block of a trunk, in order.

    The blocks are those of a list named ``blocks`` or ``layers``: of a transformer, or the stages of EfficientNet and
    its kin. Without one they are the four stages. stages: their names.
    """
    return [list(block.modules())[-1] for block in _blocks(trunk, stages)]


def layers_of(trunk: nn.Module, stages: tuple[str, ...]) -> dict[str, int]:
    """Return the layer of each parameter of a trunk, by name: 0 for what comes before the blocks, then block by block.

    Of a network of timm, the layers are those of its own ``group_matcher``, which its layer-wise decay takes, too. Of
    the others they are the blocks of a transformer, or the four stages, each with what comes before it. What follows
    the last one belongs to it. stages: their names.
    """
    model = getattr(trunk, "model", None)
    if model is not None and hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        groups: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        last = max(groups.values())  # also of a pooling with parameters, which is not timm's
        return {name: groups.get(name.removeprefix("model."), last) for name, _ in trunk.named_parameters()}
    modules = list(trunk.modules())  # in the order in which they were defined, which is that of the layers
    ends = [modules.index(end) for end in block_ends(trunk, stages)]
    first = modules.index(_blocks(trunk, stages)[0])
    found = {}
    for name, _ in trunk.named_parameters():
        place = modules.index(trunk.get_submodule(name.rpartition(".")[0]))
        found[name] = 0 if place < first else 1 + min(sum(end < place for end in ends), len(ends) - 1)
    numbers = {layer: number for number, layer in enumerate(sorted(set(found.values())))}  # without empty ones
    return {name: numbers[layer] for name, layer in found.items()}


def _blocks(trunk: nn.Module, stages: tuple[str, ...]) -> list[nn.Module]:
    for path in _BLOCKS:
        try:
            return list(trunk.get_submodule(path).children())
        except AttributeError:
            continue
    return [trunk.get_submodule(name) for name in stages]


def has_batch_norm(trunk: nn.Module) -> bool:
    """Return whether a trunk has statistics of batches."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trunk.modules())
