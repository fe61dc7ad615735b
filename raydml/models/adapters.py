"""Low-rank adapters in the attention of a transformer: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
ICLR 2022. The package ``peft`` makes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from raydml.models.backbones import ModelError

_ATTENTION = re.compile(r"(^|.*\.)attn\.(qkv|kv|q|k|v|q_proj|k_proj|v_proj|proj|out_proj)$")
_MLP = re.compile(r"(^|.*\.)mlp\.\w+$")
_NAME = "default"  # that peft gives the adapters of a network


def adaptable_layers(model: nn.Module, images: Tensor) -> tuple[dict[str, tuple[str, ...]], str]:
    """Return the names of the linear layers of a network that adapters may go into, by what is adapted.

    They are those of its attention, and with "attention_mlp" also those of the perceptrons behind it. Without any, the
    reason in words. images: (1, 3, H, W), to find layers whose weights the attention reads itself: adapters there would
    have no effect.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = {name for name in linear if "attn_pool" not in name.split(".")}
    attention = tuple(sorted(name for name in linear if _ATTENTION.match(name)))
    if not attention:
        return {}, "has no attention with linear layers to adapt"
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: called.add(name))
        for name, module in model.named_modules()
        if name in linear
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [name for name in attention if name not in called]
    if missed:
        return {}, f"reads the weights of {missed[0]} itself, past an adapter"
    mlp = tuple(sorted(name for name in linear & called if _MLP.match(name)))
    return {"attention": attention, "attention_mlp": (*attention, *mlp)}, ""


def require_peft() -> None:
    """Raise ModelError with the cure where the package peft is not installed."""
    if find_spec("peft") is None:
        raise ModelError("model.train: lora needs the package peft, which is missing. Cure: pip install 'raydml[lora]'")


def add_adapters(model: nn.Module, layers: Sequence[str], *, rank: int, alpha: float) -> None:
    """Add an adapter to each of these linear layers of a network, in place: W x becomes W x + alpha / rank * B A x.

    A is random, from torch's global generator, and B is 0: the network computes what it did. Raises ModelError where
    peft is missing.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    # peft takes alpha as it is, although it declares a whole number.
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), bias="none")
    inject_adapter_in_model(settings, model, adapter_name=_NAME)
    assert len(_adapted(model)) == len(layers)


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merged(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a module with each adapter added to the weight of its layer, under the plain names."""
    adapted = _adapted(module)
    found = {}
    for name, tensor in state.items():
        layer, _, rest = name.rpartition(".base_layer.")
        if is_of_adapter(name):
            continue
        if layer in adapted:
            name = f"{layer}.{rest}"
            if rest == "weight":
                tensor = tensor + adapted[layer].get_delta_weight(_NAME).detach()  # type: ignore[operator]
        found[name] = tensor
    return found


def _adapted(module: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
