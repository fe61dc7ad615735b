"""What every loss on disk must hold, whoever wrote it. A loss joins by having a file; so does its own test file."""

import inspect
import itertools
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raydml import registry
from raydml.ops.distances import euclidean
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs, all_triplets
from tests.batches import BATCHES, DIM, random_points, random_triplets
from tests.tuples import as_triplets, empty_kinds, listed

NUM_CLASSES = 6
LOSSES = registry.names("losses")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "autocast": torch.float32}
TAKES_PAIRS = [name for name in LOSSES if "pairs" in registry.load("losses", name).accepts]
TAKES_TRIPLETS = [name for name in LOSSES if "triplets" in registry.load("losses", name).accepts]
HERE = Path(__file__).parents[1]

# Other ways through a loss than its defaults, each held to the same.
VARIANTS = [
    ("contrastive", {"form": "squared"}),
    ("contrastive", {"form": "similarity"}),
    ("contrastive", {"average_over": "active"}),
    ("contrastive", {"average_over": "anchor_means"}),
    ("triplet", {"squared": False, "average_over": "active"}),
    ("margin", {"class_beta": False, "nu": 0.1}),
    ("margin", {"trainable_beta": False}),
    ("snr_contrastive", {"average_over": "active"}),
    ("lifted_structure", {"variant": "generalized"}),
    ("lifted_structure", {"variant": "modified"}),
    ("lifted_structure", {"hardest_negative": True}),
    ("nca", {"nearest": 3}),
    ("nt_xent", {"form": "sup_con"}),
    ("binomial_deviance", {"divide_by_scale": True}),
    ("soft_triple", {"tau": 0.0}),
]
CASES = [(name, {}) for name in LOSSES] + VARIANTS


def _case_name(case: tuple[str, dict]) -> str:
    return " ".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def test_every_choice_of_words_is_a_case() -> None:
    for name in LOSSES:
        for setting, field in registry.settings_model("losses", name).model_fields.items():
            words = [word for part in (field.annotation, *get_args(field.annotation)) for word in get_args(part)]
            for word in words:
                if isinstance(word, str) and word != field.default:
                    reached = any(case[0] == name and _reaches(case, setting, word) for case in CASES)
                    assert reached, f"{name}: {setting} = {word} is in no case"


def _reaches(case: tuple[str, dict], setting: str, word: str) -> bool:
    return getattr(_build(case[0], **case[1]), setting) == word


Tuples = Pairs | Triplets | TripletRanges


def _build(name: str, **settings: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return registry.build("losses", name, num_classes=NUM_CLASSES, embedding_dim=DIM, **settings)


def _all_kinds(points: Tensor, labels: Tensor) -> dict[str, Tuples]:
    pairs = all_pairs(labels)
    ranges = all_triplets(euclidean(points.detach()), pairs)
    # From the second nearest negative on, so that not everything counts.
    ranges = ranges._replace(start=torch.minimum(ranges.start + 1, ranges.stop))
    return {"pairs": pairs, "triplets": random_triplets(labels), "triplet_ranges": ranges}


def _inputs(loss: nn.Module, points: Tensor, labels: Tensor) -> list[Tuples | None]:
    made = _all_kinds(points, labels)
    return [None, *(made[kind] for kind in loss.accepts)]


def test_there_are_losses() -> None:
    assert LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_it_has_a_test_file_of_its_own(name: str) -> None:
    path = HERE / "losses" / f"test_{name}.py"
    assert path.is_file(), f"raydml/losses/{name}.py has no {path.relative_to(HERE.parent)}"
    assert "def test_" in path.read_text()


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_a_module_that_says_what_it_accepts(name: str) -> None:
    cls = registry.load("losses", name)
    assert issubclass(cls, nn.Module)
    assert set(cls.accepts) <= {"pairs", "triplets", "triplet_ranges"}
    assert ("triplets" in cls.accepts) == ("triplet_ranges" in cls.accepts), "both or neither"
    parameters = list(inspect.signature(cls.forward).parameters)
    assert parameters[:4] == ["self", "embeddings", "labels", "tuples"]
    # What takes pairs takes them against other embeddings too, which is what a cross-batch memory needs.
    assert "pairs" not in cls.accepts or parameters[4:5] == ["references"]


@pytest.mark.parametrize("case", CASES, ids=_case_name)
def test_it_is_finite_with_finite_gradients(case: tuple[str, dict]) -> None:
    """On every batch, in every precision, with every kind of tuples that it accepts; all failures in one message."""
    failures = []
    for precision, (batch, (points, labels)) in itertools.product(PRECISIONS, BATCHES.items()):
        loss = _build(case[0], **case[1])
        if precision == "float64":
            loss = loss.double()
        for tuples in _inputs(loss, points, labels):
            loss.zero_grad()
            embeddings = points.to(PRECISIONS[precision], copy=True).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
                value = loss(embeddings, labels, tuples)
            value.backward()
            gradients = {"embeddings": embeddings, **dict(loss.named_parameters())}
            wrong = [key for key, leaf in gradients.items() if leaf.grad is None or not leaf.grad.isfinite().all()]
            dtype = torch.float64 if precision == "float64" else torch.float32
            if wrong or value.shape != () or value.dtype != dtype or not math.isfinite(value.item()):
                failures.append(f"{precision}, {batch}, {type(tuples).__name__}: {value}, gradients of {wrong}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_change_the_number(name: str) -> None:
    """A loss that is used without a trial's objective computes in float32 too."""
    points, labels = BATCHES["balanced"]
    loss, embeddings = _build(name), points.float()
    for tuples in _inputs(loss, points, labels):
        plain = loss(embeddings, labels, tuples)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(embeddings, labels, tuples), plain)
    assert loss(embeddings, labels).item() == pytest.approx(loss.double()(points, labels).item(), rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=_case_name)
def test_it_is_zero_in_the_graph_when_nothing_is_left(case: tuple[str, dict]) -> None:
    loss = _build(case[0], **case[1])
    points, labels = BATCHES["balanced"]
    kinds = empty_kinds(len(labels))
    for tuples in [kinds[kind] for kind in loss.accepts]:
        embeddings = points.clone().requires_grad_()
        value = loss(embeddings, labels, tuples)
        assert value.item() == 0
        assert value.requires_grad
        value.backward()
        assert not embeddings.grad.any()


# Circle loss holds its weights constant, by its definition: tests/losses/test_circle.py compares that gradient.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "circle"])
def test_gradients_are_those_of_the_value(name: str) -> None:
    loss = _build(name).double()
    points, labels = BATCHES["unbalanced"]
    keys = [key for key, _ in loss.named_parameters()]
    for tuples in _inputs(loss, points, labels):

        def value(embeddings: Tensor, *parameters: Tensor, tuples: Pairs | Triplets | None = tuples) -> Tensor:
            named = dict(zip(keys, parameters, strict=True))
            return torch.func.functional_call(loss, named, (embeddings, labels, tuples))

        leaves = [points.clone(), *(p.detach().clone() for p in loss.parameters())]
        assert torch.autograd.gradcheck(value, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_takes_part(name: str) -> None:
    """A parameter that no batch moves would be a hyperparameter in disguise."""
    loss = _build(name)
    points, labels = random_points(24).float(), torch.arange(24) % NUM_CLASSES
    loss(points.requires_grad_(), labels).backward()
    for key, parameter in loss.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    loss = _build(name).double()
    points, labels = BATCHES["unbalanced"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    place = order.argsort()  # where an old row went
    for tuples in _inputs(loss, points, labels):
        moved = tuples
        if isinstance(tuples, Pairs):
            moved = Pairs(*(mask[order][:, order] for mask in tuples))
        elif isinstance(tuples, Triplets):
            moved = Triplets(*(place[index] for index in tuples[:3]), tuples.valid)
        elif isinstance(tuples, TripletRanges):
            positive, start, stop = (tuples[part][order][:, order] for part in (0, 2, 3))
            moved = TripletRanges(positive, place[tuples.order[order]], start, stop)
        torch.testing.assert_close(loss(points[order], labels[order], moved), loss(points, labels, tuples))


@pytest.mark.parametrize("name", TAKES_TRIPLETS)
def test_invalid_triplets_do_not_count(name: str) -> None:
    loss = _build(name).double()
    points, labels = BATCHES["balanced"]
    some = random_triplets(labels)
    assert some.valid.any()
    assert not some.valid.all()
    kept = Triplets(*(column[some.valid] for column in some))
    torch.testing.assert_close(loss(points, labels, some), loss(points, labels, kept))


@pytest.mark.parametrize("name", TAKES_TRIPLETS)
def test_ranges_are_their_triplets_one_by_one(name: str) -> None:
    """Value and gradient; the list is made by a loop that knows nothing of counting."""
    points, labels = BATCHES["unbalanced"]
    ranges = _all_kinds(points, labels)["triplet_ranges"]
    one_by_one = as_triplets(listed(ranges))
    assert (labels[one_by_one.anchor] != labels[one_by_one.negative]).all()
    assert len(one_by_one.anchor) > 20
    results = []
    for tuples in (ranges, one_by_one):
        loss, leaf = _build(name).double(), points.clone().requires_grad_()
        value = loss(leaf, labels, tuples)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", TAKES_PAIRS)
def test_references_are_the_columns_of_the_pairs(name: str) -> None:
    """The batch itself as the other side gives the same value; columns that no pair names change nothing."""
    loss = _build(name).double()
    points, labels = BATCHES["unbalanced"]
    pairs = all_pairs(labels)
    expected = loss(points, labels, pairs)
    torch.testing.assert_close(loss(points, labels, pairs, references=points), expected)
    more = torch.cat([random_points(4, seed=7), points])
    wider = Pairs(*(nn.functional.pad(mask, (4, 0)) for mask in pairs))
    leaf = points.clone().requires_grad_()
    value = loss(leaf, labels, wider, references=more)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LOSSES)
def test_it_compiles_without_a_break(name: str, backend: str) -> None:
    points, labels = BATCHES["unbalanced"]
    for tuples in _inputs(_build(name), points, labels):
        torch._dynamo.reset()
        loss = _build(name)
        compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=False)
        plain, traced = (points.float().requires_grad_() for _ in range(2))
        loss(plain, labels, tuples).backward()
        expected = loss(plain, labels, tuples)
        value = compiled(traced, labels, tuples)
        value.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(traced.grad, plain.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_tuples_of_the_wrong_kind_are_refused_with_a_cure(name: str) -> None:
    loss = _build(name)
    points, labels = BATCHES["balanced"]
    accepted = " or ".join(loss.accepts)
    cure = f"works on {accepted}, not on .*; choose a miner that yields {accepted}" if accepted else "set miner to null"
    kinds = {**_all_kinds(points, labels), "no kind": (labels, labels, labels, labels)}
    for kind, tuples in kinds.items():
        if kind not in loss.accepts:
            with pytest.raises(ValueError, match=cure):
                loss(points.float(), labels, tuples)


@pytest.mark.parametrize("case", CASES, ids=_case_name)
def test_it_never_waits_for_the_device(case: tuple[str, dict]) -> None:
    """A fake tensor has a shape and no content: .item(), nonzero and reading by a mask raise on it."""
    with FakeTensorMode():
        loss = _build(case[0], **case[1])
        labels, made = torch.zeros(12, dtype=torch.int64), empty_kinds(12)
        for tuples in [None, *(made[kind] for kind in loss.accepts)]:
            loss(torch.zeros(12, DIM, requires_grad=True), labels, tuples).backward()


@pytest.mark.parametrize("name", LOSSES)
def test_the_input_is_left_alone(name: str) -> None:
    loss = _build(name)
    points, labels = BATCHES["balanced"]
    for tuples in _inputs(loss, points, labels):
        embeddings, given = points.float(), labels.clone()
        loss(embeddings, given, tuples)
        assert torch.equal(embeddings, points.float())
        assert torch.equal(given, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_its_state_makes_the_round_trip(name: str) -> None:
    points, labels = BATCHES["balanced"]
    trained, fresh = _build(name), _build(name)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.rand_like(parameter))
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(fresh(points.float(), labels), trained(points.float(), labels))


@pytest.mark.parametrize("name", LOSSES)
def test_a_fresh_one_depends_on_the_seed_alone(name: str) -> None:
    one, other = _build(name), _build(name)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.parametrize("name", LOSSES)
def test_going_down_its_gradient_brings_classes_together(name: str) -> None:
    """Free points under the loss alone: at the end every point's nearest neighbour is of its class."""
    points, labels = random_points(16, seed=5).requires_grad_(), torch.arange(16) % 4
    before = torch.cdist(points.detach(), points.detach()).fill_diagonal_(math.inf)
    assert (labels[before.argmin(dim=1)] != labels).any()
    # With several centres a class and few items, each item may keep a centre of its own: these losses are content then.
    loss = _build(name, **({"num_centers": 1} if name in ("soft_triple", "sub_center_arcface") else {})).double()
    optimizer = torch.optim.Adam([points, *loss.parameters()], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(nn.functional.normalize(points, dim=1), labels).backward()
        optimizer.step()
    distance = torch.cdist(*[nn.functional.normalize(points.detach(), dim=1)] * 2).fill_diagonal_(math.inf)
    assert torch.equal(labels[distance.argmin(dim=1)], labels)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("case", CASES, ids=_case_name)
def test_broken_embeddings_do_not_crash_it(case: tuple[str, dict], broken: float) -> None:
    """A trial that has diverged is to end as such, by the value of its loss or at validation."""
    points, labels = BATCHES["balanced"]
    loss, embeddings = _build(case[0], **case[1]), points.float()
    embeddings[3] = broken
    for tuples in _inputs(loss, points, labels):
        loss(embeddings.clone().requires_grad_(), labels, tuples).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu_it_gives_the_same_without_a_host_sync(name: str) -> None:
    points, labels = BATCHES["balanced"]
    loss = _build(name)
    for tuples in _inputs(loss, points, labels):
        expected = loss.cpu()(points.float(), labels, tuples).item()
        loss.cuda()
        there = None if tuples is None else type(tuples)(*(column.cuda() for column in tuples))
        embeddings, given = points.float().cuda().requires_grad_(), labels.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = loss(embeddings, given, there)
            value.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert value.item() == pytest.approx(expected, rel=1e-4)
