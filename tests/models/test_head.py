"""The embedding head against hand values and the four released implementations of it."""

import math

import pytest
import torch
from torch import Tensor

from raydml.losses.margin import Margin
from raydml.losses.normalized_softmax import NormalizedSoftmax
from raydml.miners.nearest_beyond_cutoff import NearestBeyondCutoff
from raydml.models.network import Head, Network
from raydml.models.pooling import pooling_layer
from tests.golden_vectors import golden_case, golden_facts, golden_tensors

CLASSIFICATION = golden_facts("classification_head")
DIVIDE_CONQUER = golden_facts("divide_conquer_head")
MIC = golden_facts("mic_network_pieces")


def make(feature_dim: int, embedding_dim: int, **settings) -> Head:
    """A head that does nothing but what the settings say, from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Head(feature_dim, embedding_dim, **{"layer_norm": False, "normalize": "none", **settings})


def features_of(num_rows: int, feature_dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, feature_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_head_standardises_before_the_linear_layer_and_normalises_last():
    torch.manual_seed(0)
    features = torch.randn(3, 8) * 5 + 2
    head = Head(8, 4, layer_norm=True, normalize="l2")
    centred = features - features.mean(dim=1, keepdim=True)
    standard = centred / (centred.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
    expected = standard @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(features), expected / expected.norm(dim=1, keepdim=True))
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]


def test_head_maps_a_zero_vector_to_zero_and_can_leave_the_norm_alone():
    head = Head(4, 2, layer_norm=False, normalize="l2")
    torch.nn.init.zeros_(head.linear.bias)
    assert torch.equal(head(torch.zeros(1, 4)), torch.zeros(1, 2))
    bare = Head(4, 2, layer_norm=False, normalize="none")
    features = torch.randn(3, 4)
    torch.testing.assert_close(bare(features), bare.linear(features))


@pytest.mark.parametrize(
    ("normalize", "training", "prefix"),
    [
        *(("mean_distance", True, "train"), ("mean_distance", False, "eval"), ("none", True, "eval")),
        *(("l2", True, "l2"), ("l2", False, "l2")),
    ],
)
def test_head_is_that_of_the_mdr_release(normalize, training, prefix):
    golden = golden_tensors("mdr_embedding")
    head = Head(20, 12, layer_norm=False, normalize=normalize).double().train(training)
    head.linear.load_state_dict({"weight": golden["W"], "bias": golden["b"]})
    features = golden["feat"].requires_grad_()
    embeddings = head(features)
    (embeddings * golden["upstream"]).sum().backward()
    found = {"out": embeddings, "grad_feat": features.grad, "grad_W": head.linear.weight.grad}
    found["grad_b"] = head.linear.bias.grad
    for key, value in found.items():
        torch.testing.assert_close(value, golden[f"{prefix}__{key}"], rtol=1e-8, atol=1e-10)


def test_after_the_mean_distance_head_the_mean_distance_is_one():
    head = Head(6, 4, layer_norm=False, normalize="mean_distance").train()
    embeddings = head(torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) * 50)
    assert torch.pdist(embeddings).mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("features", [torch.ones(1, 6), torch.ones(5, 6), torch.zeros(3, 6)])
def test_the_mean_distance_head_does_not_change_a_batch_without_distances(features):
    head = Head(6, 4, layer_norm=False, normalize="mean_distance").train()
    torch.testing.assert_close(head(features), head.linear(features))
    head(features).sum().backward()
    assert head.linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("case", CLASSIFICATION["cases"], ids=lambda case: case["case"])
def test_it_can_be_the_head_of_the_classification_release(case: dict) -> None:
    tolerance, golden = CLASSIFICATION["tolerance"], golden_case("classification_head", case["case"])
    remap = {"projection": "linear_no_bias" if case["has_remap"] else "none"}
    head = make(case["in_dim"], case["out_dim"], layer_norm=True, normalize="l2", **remap).double().train()
    head.load_state_dict({"linear.weight": golden["remap_weight"]} if case["has_remap"] else {})
    maps = golden["feature_map"].requires_grad_()
    pooled = pooling_layer("average")(maps).flatten(1)
    torch.testing.assert_close(pooled, golden["pooled"], **tolerance)
    torch.testing.assert_close(head.standardise(pooled), golden["layernormed"], **tolerance)
    embeddings = head(pooled)
    torch.testing.assert_close(embeddings, golden["embedding"], **tolerance)
    loss = NormalizedSoftmax(len(golden["class_weight"]), case["out_dim"], temperature=case["temperature"]).double()
    loss.load_state_dict({"weight": golden["class_weight"]})
    value = loss(embeddings, golden["labels"])
    value.backward()
    torch.testing.assert_close(value, golden["loss"], **tolerance)
    torch.testing.assert_close(maps.grad, golden["grad_feature_map"], **tolerance)
    torch.testing.assert_close(loss.weight.grad, golden["grad_class_weight"], **tolerance)
    if case["has_remap"]:
        torch.testing.assert_close(head.linear.weight.grad, golden["grad_remap_weight"], **tolerance)


def test_without_a_projection_there_is_nothing_to_learn() -> None:
    head = make(6, 6, projection="none")
    features = features_of(3, 6)
    assert head.linear is None
    assert list(head.state_dict()) == []
    assert torch.equal(head(features), features)


def test_the_two_heads_of_the_mic_release() -> None:
    golden = golden_tensors("mic_network_pieces")
    for name in ("class", "shared"):
        weight = golden[f"heads_W_{name}"]
        head = make(weight.shape[1], len(weight), normalize="l2").double()
        head.linear.load_state_dict({"weight": weight, "bias": golden[f"heads_b_{name}"]})
        torch.testing.assert_close(head(golden["heads_pooled"]), golden[f"heads_out_{name}"], **MIC["tolerance"])


def divide_conquer_head() -> tuple[Head, dict[str, Tensor]]:
    golden = golden_tensors("divide_conquer_head")
    num_slices = DIVIDE_CONQUER["hyperparameters"]["K"]
    weight = golden["W"]
    head = make(weight.shape[1], len(weight), normalize="l2", num_slices=num_slices).double().train()
    head.linear.load_state_dict({"weight": weight, "bias": golden["b"]})
    return head, golden


def test_slices_are_those_of_the_divide_and_conquer_release() -> None:
    head, golden = divide_conquer_head()
    embeddings = head(golden["feat"])
    torch.testing.assert_close(embeddings, golden["embedding"], **DIVIDE_CONQUER["tolerance"])
    assert (head.embedding_dim, head.num_slices) == (16, 4)


@pytest.mark.parametrize("phase", ["learner0", "learner1", "learner2", "learner3", "full"])
def test_the_losses_of_the_divide_and_conquer_release(phase: str) -> None:
    head, golden = divide_conquer_head()
    settings, tolerance = DIVIDE_CONQUER["hyperparameters"], DIVIDE_CONQUER["tolerance"]
    whole = head(golden["feat"])
    if phase == "full":
        embeddings = torch.nn.functional.normalize(whole, dim=1)
    else:
        embeddings = whole.chunk(head.num_slices, dim=1)[int(phase[-1])]
    # The release's beta is the float32 next to 1.2, also where it computes in float64.
    loss = Margin(1, margin=settings["margin"], beta=settings["beta"], class_beta=False).double()
    labels = golden["labels"]
    tuples = NearestBeyondCutoff(cutoff=settings["cutoff"])(embeddings.detach(), labels)
    value = loss(embeddings, labels, tuples)
    value.backward()
    torch.testing.assert_close(value, golden[f"{phase}__loss"], **tolerance)
    torch.testing.assert_close(head.linear.weight.grad, golden[f"{phase}__grad_W"], **tolerance)
    torch.testing.assert_close(head.linear.bias.grad, golden[f"{phase}__grad_b"], **tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalize", ["l2", "mean_distance", "none"])
def test_slices_are_heads_of_their_own(normalize: str, training: bool) -> None:
    whole = make(7, 12, normalize=normalize, num_slices=3).double().train(training)
    features = features_of(5, 7)
    found = whole(features)
    for number in range(3):
        rows = slice(4 * number, 4 * number + 4)
        alone = make(7, 4, normalize=normalize).double().train(training)
        alone.load_state_dict({key: value[rows] for key, value in whole.state_dict().items()})
        torch.testing.assert_close(found[:, rows], alone(features))


def test_a_slice_of_zeros_stays_zero_and_does_not_disturb_the_others() -> None:
    head = make(2, 4, normalize="l2", num_slices=2, projection="linear_no_bias")
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    embeddings = head(torch.tensor([[1.0, 5.0]]))
    torch.testing.assert_close(embeddings, torch.tensor([[0.6, 0.8, 0.0, 0.0]]))
    embeddings.sum().backward()
    assert head.linear.weight.grad.isfinite().all()


def test_an_empty_batch_has_no_embeddings() -> None:
    for normalize in ("l2", "mean_distance", "none"):
        head = make(3, 4, normalize=normalize, num_slices=2).train()
        assert head(torch.zeros(0, 3)).shape == (0, 4)


def normal_deviation(weight: Tensor) -> float:
    """The standard deviation of a sample that is to be normal of mean 0; fails where it is not."""
    deviation = weight.pow(2).mean().sqrt().item()
    standard = weight.flatten() / deviation
    assert standard.mean().item() == pytest.approx(0, abs=4 / math.sqrt(len(standard)))
    assert standard.pow(4).mean().item() == pytest.approx(3, rel=0.1)  # 1.8 were it uniform
    return deviation


def test_xavier_normal_is_a_layer_for_each_slice() -> None:
    head = make(2048, 128, init="xavier_normal", num_slices=8)
    # sqrt(2 / (2048 + 16)), not the 0.03032 of one layer of 128 rows.
    assert normal_deviation(head.linear.weight.detach()) == pytest.approx(0.03113, rel=0.01)
    assert make(2048, 128, init="xavier_normal").linear.weight.std().item() == pytest.approx(0.03032, rel=0.01)
    bound = 1 / math.sqrt(2048)
    assert 0.9 * bound < head.linear.bias.abs().max().item() <= bound
    assert head.linear.bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_xavier_normal_starts_as_the_divide_and_conquer_release_does() -> None:
    golden = golden_tensors("divide_conquer_head")
    weight, bias = golden["W"], golden["b"]
    head = make(24, 16, init="xavier_normal", num_slices=4)
    expected = math.sqrt(2 / (24 + 4))
    assert weight.std().item() == pytest.approx(expected, rel=0.1)  # of 384 draws: its own error is 0.036
    assert head.linear.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert max(bias.abs().max().item(), head.linear.bias.abs().max().item()) <= 1 / math.sqrt(24)


def test_kaiming_normal_is_by_the_embeddings() -> None:
    head = make(1024, 512, init="kaiming_normal")
    assert normal_deviation(head.linear.weight.detach()) == pytest.approx(math.sqrt(2 / 512), rel=0.01)
    assert torch.equal(head.linear.bias, torch.zeros(512))
    assert make(8, 4, init="kaiming_normal", projection="linear_no_bias").linear.bias is None


def test_by_default_the_first_values_are_those_of_a_linear_layer() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = torch.nn.Linear(9, 6)
    head = make(9, 6, num_slices=2)
    assert torch.equal(head.linear.weight, expected.weight)
    assert torch.equal(head.linear.bias, expected.bias)


def test_dropout_is_of_the_standardised_features_and_in_training_alone() -> None:
    head = make(4000, 4000, layer_norm=True, projection="none", dropout=0.2)
    features = features_of(2, 4000).float() * 7 + 3
    standard = head.standardise(features)
    assert torch.equal(head.eval()(features), standard)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = head.train()(features)
    is_kept = dropped != 0
    assert is_kept.float().mean().item() == pytest.approx(0.8, abs=0.02)
    torch.testing.assert_close(dropped[is_kept], standard[is_kept] / 0.8)


def test_the_neck_scales_by_the_statistics_of_the_batch_and_shifts_nothing():
    head = make(5, 3, bn_neck=True, normalize="l2").double().train()
    with torch.no_grad():
        head.neck.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    features = features_of(8, 5)
    projected = features @ head.linear.weight.T + head.linear.bias
    mean, variance = projected.mean(dim=0), projected.var(dim=0, unbiased=False)
    expected = (projected - mean) / (variance + 1e-5).sqrt() * torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(head(features), expected / expected.norm(dim=1, keepdim=True))
    running = 0.1 * mean, 0.9 + 0.1 * projected.var(dim=0)
    torch.testing.assert_close((head.neck.running_mean, head.neck.running_var), running)
    evaluated = (projected - running[0]) / (running[1] + 1e-5).sqrt() * torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(head.eval()(features), evaluated / evaluated.norm(dim=1, keepdim=True))
    assert [name for name, parameter in head.named_parameters() if not parameter.requires_grad] == ["neck.bias"]
    assert not head.neck.bias.any()


def test_a_batch_of_one_has_the_running_statistics_and_leaves_them():
    head = make(5, 3, bn_neck=True).double().train()
    head(features_of(8, 5))
    before = head.neck.running_mean.clone()
    one = head(features_of(1, 5, seed=1))
    assert torch.equal(head.neck.running_mean, before)
    torch.testing.assert_close(one, head.eval()(features_of(1, 5, seed=1)))


def test_the_neck_learns_where_the_batch_norm_of_the_backbone_is_frozen():
    trunk = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    network = Network(trunk, make(4, 2, bn_neck=True), freeze_batch_norm=True).train()
    network(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert not trunk[0].running_mean.any()
    assert network.head.neck.running_mean.any()
