"""Parts of a trunk that the facts about a backbone and the network itself must agree on."""

from torch import nn


def block_ends(trunk: nn.Module, stages: tuple[str, ...]) -> list[nn.Module]:
    """Return the last module of each block of a trunk, in order.

    The blocks are those of a list named ``blocks`` or ``layers``: of a transformer, or the stages of EfficientNet and
    its kin. Without one they are the four stages. stages: their names.
    """
    for path in ("model.blocks", "encoder.layers"):
        try:
            blocks = list(trunk.get_submodule(path).children())
        except AttributeError:
            continue
        return [list(block.modules())[-1] for block in blocks]
    return [list(trunk.get_submodule(name).modules())[-1] for name in stages]


def has_batch_norm(trunk: nn.Module) -> bool:
    """Return whether a trunk has statistics of batches."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trunk.modules())
