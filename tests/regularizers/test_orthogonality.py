"""The orthogonal regulariser against hand values and the released implementation's numbers."""

import pytest
import torch
from torch import Tensor, nn

from raydml.models.network import Head, Network
from raydml.regularizers.orthogonality import Orthogonality
from tests.golden_vectors import golden_case, golden_cases

LABELS = torch.tensor([0, 0])


def _network(weight: Tensor) -> Network:
    head = Head(weight.shape[1], weight.shape[0], layer_norm=False, normalize="none").to(weight.dtype)
    with torch.no_grad():
        head.linear.weight.copy_(weight)
    return Network(nn.Identity(), head, freeze_batch_norm=False)


def test_by_hand() -> None:
    # Products of the three rows: 0, 2 and 6 (each twice in the matrix); 4, 1 and 13 on the diagonal do not count.
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    value = Orthogonality(_network(weight), weight=0.5)(torch.zeros(2, 3, dtype=torch.float64), LABELS)
    products = [0, 2, 2]
    assert value.item() == pytest.approx(0.5 * 2 * sum(product**2 for product in products) / 9, rel=1e-12)


@pytest.mark.parametrize("case", golden_cases("deep_metric_orthreg"))
def test_release(case: dict) -> None:
    name = case["case"]
    golden = golden_case("deep_metric_orthreg", name)
    network = _network(golden["weight"])
    term = Orthogonality(network, weight=case["cof"])(torch.zeros(2, 3, dtype=torch.float64), LABELS)
    term.backward()
    torch.testing.assert_close(golden["base_loss"] + term.detach(), golden["loss"], **case["tolerance"])
    torch.testing.assert_close(network.head.linear.weight.grad, golden["grad_weight"], **case["tolerance"])


def test_orthogonal_rows_of_any_length_cost_nothing() -> None:
    network = _network(torch.diag(torch.tensor([1.0, 5.0, 0.1])))
    assert Orthogonality(network)(torch.zeros(2, 3), LABELS).item() == 0


def test_it_follows_the_network() -> None:
    """Through what the optimiser does, and where the network is moved or takes another type."""
    network = _network(torch.eye(3))
    regularizer = Orthogonality(network)
    network.double()
    with torch.no_grad():
        network.head.linear.weight[0, 1] = 2.0
    value = regularizer(torch.zeros(2, 3), LABELS)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(2 * 2**2 / 9)


def test_the_layer_is_the_networks_alone() -> None:
    network = _network(torch.eye(3))
    both = nn.ModuleDict({"network": network, "regularizer": Orthogonality(network)})
    assert list(both.state_dict()) == ["network.head.linear.weight", "network.head.linear.bias"]


def test_a_head_without_a_layer_is_refused() -> None:
    head = Head(3, 3, layer_norm=False, normalize="none", projection="none")
    with pytest.raises(ValueError, match=r"set model\.projection to linear"):
        Orthogonality(Network(nn.Identity(), head, freeze_batch_norm=False))
