"""An exponential moving average of a network's weights, which is evaluated in place of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raydml.models.network import Network


class WeightAverage:
    """The average of a network's weights over the steps of a training.

    It starts as the network that was built. Step t, counted from 1, makes it d * average + (1 - d) * weights with
    d = min(decay, (1 + t) / (10 + t)): a constant decay would keep a large share of the first weights, of which the
    head's are random, for thousands of steps. That is the start of TensorFlow's ExponentialMovingAverage; there is no
    further correction of a bias. Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.

    Parameters and buffers are averaged alike, and whole numbers are taken as they are, as timm's ModelEmaV3 does
    (torch's AveragedModel copies the buffers by default). Parameters that do not learn are not copied.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.network, self.decay, self.num_steps = network, decay, 0
        self._weights = {name: tensor.clone() for name, tensor in self._live().items()}

    def decay_of(self, step: int) -> float:
        """Return the share of the average that a step, counted from 1, keeps."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after a step into the average. The device is not waited for."""
        self.num_steps += 1
        live = self._live()
        floats = [name for name, tensor in live.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self._weights[name] for name in floats], [live[name] for name in floats], 1 - self.decay_of(self.num_steps)
        )
        for name in live.keys() - set(floats):
            self._weights[name].copy_(live[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the network the average inside the block, and its own weights after it, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self._live().items():
            before = tensor.clone()
            tensor.copy_(self._weights[name])
            self._weights[name].copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the averages by name."""
        return {"num_steps": self.num_steps, "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the average to a saved one of the same network."""
        assert state["weights"].keys() == self._weights.keys()
        self.num_steps = state["num_steps"]
        for name, tensor in state["weights"].items():
            self._weights[name].copy_(tensor)

    def _live(self) -> dict[str, Tensor]:
        """Return the parameters that learn and the buffers of the network itself, by name."""
        learn = {id(parameter) for parameter in self.network.trained_parameters()}
        held = {id(parameter) for parameter in self.network.trunk.parameters()} - learn
        state = self.network.state_dict(keep_vars=True)
        return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in held}
