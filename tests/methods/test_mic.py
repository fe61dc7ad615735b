"""MIC: its steps against the release's numbers, its plans and clusterings against their rules."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn
from torch.nn import functional

from raydml import registry
from raydml.config.trial import parse_trial
from raydml.errors import ConfigError
from raydml.methods._base import Batch, Objective
from raydml.methods.mic import MIC, standardise_by_class
from raydml.models.network import Head, Network, build_network
from raydml.ops.clustering import KMeans, cluster
from raydml.ops.tuples import Triplets
from raydml.samplers.class_balanced import ClassBalanced
from raydml.samplers.uniform import Uniform
from raydml.training.parts import build_method, build_optimizer, build_trial_optimizer, check_every_parameter_learns
from tests.golden_vectors import golden, golden_case, golden_cases

CPU = torch.device("cpu")

# 6 classes with 4 modes, each twice: what classes share is the mode.
NUM_CLASSES, NUM_MODES = 6, 4
LABELS = np.repeat(np.arange(NUM_CLASSES), 2 * NUM_MODES)
MODES = np.tile(np.arange(NUM_MODES), 2 * NUM_CLASSES)


def images_of(modes=MODES, labels=LABELS):
    """(N, 3, 8, 8): a strong colour by class, one bright quarter by mode, a little noise."""
    generator = torch.Generator().manual_seed(0)
    colours = 2 * torch.randn(labels.max() + 1, 3, 1, 1, generator=generator)
    images = colours[labels] + 0.01 * torch.randn(len(labels), 3, 8, 8, generator=generator)
    for image, mode in zip(images, modes, strict=True):
        row, column = 4 * (mode // 2), 4 * (mode % 2)
        image[:, row : row + 4, column : column + 4] += 1.0
    return images


def network_of(embedding_dim=8, **settings):
    return build_network(
        **{
            "backbone": "convnet",
            "embedding_dim": embedding_dim,
            "layer_norm": False,
            "normalize": "l2",
            "freeze_batch_norm": False,
            "weights": "none",
            "seed": 0,
            **settings,
        }
    )


def objectives_of(loss="margin", miner="distance_weighted", regularizers=()):
    def make_objective(num_classes, embedding_dim, *, with_regularizers=True):
        sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim}
        terms = {name: registry.build("regularizers", name) for name in regularizers if with_regularizers}
        return Objective(
            registry.build("losses", loss, **sizes), registry.build("miners", miner) if miner else None, terms
        )

    return make_objective


def method_of(*, labels=LABELS, network=None, make_objective=None, make_sampler=None, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return registry.build(
            "methods",
            "mic",
            network=network or network_of(),
            train_labels=labels,
            num_epochs=10,
            make_objective=make_objective or objectives_of(),
            make_sampler=make_sampler or (lambda labels: Uniform(labels, batch_size=8)),
            **{"num_clusters": NUM_MODES, "adversary_dim": 16, **settings},
        )


def features_of(method, images):
    """What the trainer hands to `recluster`: evaluation mode, no gradients, batches."""

    def features(forward, *, inner_layers=False):  # noqa: ARG001 - all images are pixels here
        method.eval()
        with torch.inference_mode():
            rows = torch.cat([forward(batch) for batch in images.split(7)]).float().numpy()
        method.train()
        return rows

    return features


def recorded_features(method):
    """The features of the images, and a list that keeps what was computed."""
    seen = []

    def features(forward, *, inner_layers=False):  # noqa: ARG001 - all images are pixels here
        seen.append(features_of(method, images_of())(forward))
        return seen[-1].copy()

    return features, seen


def clustered(images=None, epoch=0, **settings):
    method = method_of(**settings)
    images = images_of() if images is None else images
    method.recluster(features_of(method, images), epoch, CPU)
    return method


def with_pseudo_labels(pseudo_labels, **settings):
    """A method as it is after a first clustering that gave these labels."""
    method = method_of(**settings)
    method.pseudo_labels.copy_(torch.as_tensor(pseudo_labels))
    method.num_initial_clusters.fill_(len(np.unique(pseudo_labels)))
    return method


def loss_of(method, learner, images, labels):
    return method.batch_loss(Batch(images, labels, 0, learner), torch.Generator().manual_seed(0))


def test_defaults_are_the_releases_for_cub():
    settings = dict(registry.settings_model("methods", "mic")())
    assert settings == {
        "num_clusters": 30,
        "auxiliary_dim": None,
        "class_probability": 1.0,
        "auxiliary_probability": 0.8,
        "images_per_cluster": 4,
        "label_noise": 0.2,
        "recluster_every": 4,
        "standardise": "mean",
        "standardise_updates": False,
        "initial_layer": "stage1",
        "direction": "auxiliary_to_class",
        "adversarial_weight": 2500.0,
        "adversary_dim": 512,
        "adversary_weight_decay": 1e-6,
        "auxiliary_loss": None,
        "auxiliary_miner": None,
        "class_to_auxiliary_weight": None,
        "auxiliary_flip": False,
        "kmeans_iterations": 25,
        "kmeans_restarts": 1,
        "kmeans_points_per_centroid": 256,
        "kmeans_spherical": False,
        "kmeans_seed": 1234,
    }
    assert MIC.idle_parameters_move is True


@pytest.mark.parametrize(
    "settings",
    [
        {"class_probability": 0.0},
        {"auxiliary_probability": 0.0},
        {"auxiliary_probability": 1.5},
        {"num_clusters": 2},
        {"recluster_every": 0},
        {"standardise": "norm"},
        {"initial_layer": "stage5"},
        {"direction": "neither"},
        {"label_noise": -0.1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        method_of(**settings)


def test_a_batch_without_two_groups_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"images_per_cluster = 5: .* larger than a batch of 8 images; give at most 4"):
        method_of(images_per_cluster=5)


def check(**settings):
    MIC.check_settings(
        {"name": "uniform", "batch_size": 112}, **dict(registry.settings_model("methods", "mic")(**settings))
    )


def test_updates_cannot_be_standardised_by_nothing():
    with pytest.raises(ValueError, match="standardise_updates: false"):
        check(standardise="none", standardise_updates=True)


@pytest.mark.parametrize(
    ("name", "value"), [("direction", "both"), ("adversary_dim", 64), ("adversary_weight_decay", 0.0)]
)
def test_settings_of_no_adversary_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} = {value} has no effect: .*adversarial_weight = 0.*; leave it out"):
        check(adversarial_weight=0.0, **{name: value})
    check(adversarial_weight=0.0)
    check(**{name: value})


def test_pseudo_labels_are_renewed_before_every_fourth_epoch():
    assert [epoch for epoch in range(14) if method_of().time_to_recluster(epoch)] == [0, 4, 8, 12]
    assert [epoch for epoch in range(8) if method_of(recluster_every=3).time_to_recluster(epoch)] == [0, 3, 6]


@pytest.mark.parametrize("standardise", ["mean", "mstd"])
def test_the_first_pseudo_labels_are_what_classes_share(standardise):
    method = method_of(standardise=standardise, kmeans_restarts=20)
    metrics = method.recluster(features_of(method, images_of()), 0, CPU)
    assert adjusted_rand_score(MODES, method.pseudo_labels.numpy()) == pytest.approx(1)
    assert metrics == pytest.approx({"num_clusters": 4, "cluster_balance": 1, "cluster_nmi": 0, "auxiliary_off": 0})


def test_without_standardisation_they_are_the_classes():
    method = method_of(standardise="none", num_clusters=NUM_CLASSES, kmeans_restarts=20)
    metrics = method.recluster(features_of(method, images_of()), 0, CPU)
    assert metrics["cluster_nmi"] > 0.8
    assert adjusted_rand_score(MODES, method.pseudo_labels.numpy()) < 0.1


@pytest.mark.parametrize("case", golden_cases("mic_mining_recovery"))
def test_modes_of_the_release_are_recovered(case):
    arrays = golden_case("mic_mining_recovery", case["case"])
    settings = {"labels": arrays["class_labels"].numpy(), "num_clusters": case["n_clusters"]}
    method = method_of(**settings, kmeans_restarts=20)
    method.recluster(lambda forward, **how: arrays["features"].numpy().copy(), 0, CPU)  # noqa: ARG005
    assert adjusted_rand_score(arrays["latent_mode"], method.pseudo_labels.numpy()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("layer", "shape"), [("stage1", 32 * 4 * 4), ("stage2", 64 * 4 * 4), ("stage3", 128 * 4 * 4), ("pooled", 128)]
)
def test_initial_features_are_of_the_layer_asked_for(layer, shape):
    method = method_of(initial_layer=layer)
    features, seen = recorded_features(method)
    method.recluster(features, 0, CPU)
    assert seen[0].shape == (len(LABELS), shape)
    with torch.no_grad():
        # At 8 pixels the maps are 4 by 4, of which every pixel is a window.
        expected = functional.normalize(method.network.eval().layer(images_of(), layer).flatten(1), dim=1)
    np.testing.assert_allclose(seen[0], expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("normalize", ["l2", "none"])
def test_updates_cluster_the_auxiliary_embeddings(standardised, normalize):
    method = with_pseudo_labels(
        MODES,
        network=network_of(normalize=normalize),
        standardise_updates=standardised,
        num_clusters=9,
        auxiliary_dim=5,
    )
    features, seen = recorded_features(method)
    metrics = method.recluster(features, 4, CPU)
    with torch.no_grad():
        embeddings = method.eval().auxiliary_head(method.network.trunk(images_of()))
    np.testing.assert_allclose(seen[0], functional.normalize(embeddings, dim=1), rtol=0, atol=1e-5)
    if standardised:
        standardise_by_class(seen[0], LABELS, "mean")
    # As many as the first time were not empty, not 9; faiss' own settings.
    expected = cluster(seen[0], NUM_MODES, KMeans(25, 1, 256, False, 1234), CPU)
    assert np.array_equal(method.pseudo_labels.numpy(), expected.assignment)
    assert 0 <= metrics["cluster_changed"] <= 1


def test_an_update_asks_for_as_many_clusters_as_were_not_empty_the_first_time():
    corners = np.eye(NUM_MODES, dtype=np.float32)[MODES]
    anywhere = np.random.default_rng(0).normal(size=corners.shape).astype(np.float32)
    method = method_of(num_clusters=9, standardise="none")
    assert method.recluster(lambda forward, **how: corners, 0, CPU)["num_clusters"] == NUM_MODES  # noqa: ARG005
    assert method.recluster(lambda forward: anywhere, 4, CPU)["num_clusters"] == NUM_MODES  # noqa: ARG005


def test_every_setting_of_k_means_arrives():
    method = method_of(
        kmeans_iterations=7, kmeans_restarts=3, kmeans_points_per_centroid=50, kmeans_spherical=True, kmeans_seed=9
    )
    assert method.kmeans._asdict() == {
        "iterations": 7,
        "restarts": 3,
        "max_points_per_centroid": 50,
        "spherical": True,
        "seed": 9,
    }


def steps_of(plan):
    return list(zip(plan.batches, plan.targets, plan.learners, plan.flip, strict=True))


def test_each_batch_for_classes_is_followed_by_one_for_clusters():
    method = with_pseudo_labels(MODES, auxiliary_probability=1.0, label_noise=0.0)
    plan = method.plan_epoch(0, np.random.default_rng(0))
    assert plan.learners.tolist() == [0, 1] * 6
    assert plan.flip.tolist() == [True, False] * 6
    main = Uniform(LABELS, batch_size=8).plan(np.random.default_rng(0))  # drawn first
    for expected, (rows, targets, *_) in zip(main.batches, steps_of(plan)[::2], strict=True):
        assert np.array_equal(rows, expected)
        assert np.array_equal(targets, LABELS[rows])
    for rows, targets, *_ in steps_of(plan)[1::2]:
        assert np.array_equal(targets, MODES[rows])
        assert (targets.reshape(2, 4) == targets[::4, None]).all()
        assert targets[0] != targets[4]
    assert plan.coverage == len(np.unique(np.concatenate(plan.batches))) / len(LABELS)


def test_plans_repeat_with_their_generator_and_differ_between_epochs():
    method, generator = with_pseudo_labels(MODES), np.random.default_rng(3)
    plans = [method.plan_epoch(epoch, generator).batches for epoch in range(2)]
    again = method.plan_epoch(0, np.random.default_rng(3)).batches
    assert all(np.array_equal(a, b) for a, b in zip(plans[0], again, strict=True))
    assert not np.array_equal(np.concatenate(plans[0])[:40], np.concatenate(plans[1])[:40])


def test_tasks_run_with_their_probabilities_and_independently():
    labels = np.tile(LABELS, 250)  # 1500 batches
    pseudo_labels = np.tile(MODES, 250)
    method = with_pseudo_labels(pseudo_labels, labels=labels, class_probability=0.6, auxiliary_probability=0.3)
    learners = method.plan_epoch(0, np.random.default_rng(0)).learners
    num_class, num_auxiliary = np.count_nonzero(learners == 0), np.count_nonzero(learners == 1)
    # 4 standard deviations of a binomial: 4 * sqrt(1500 p (1 - p))
    assert abs(num_class - 900) < 76
    assert abs(num_auxiliary - 450) < 71
    assert MIC.expected_steps(1500, class_probability=0.6, auxiliary_probability=0.3) == pytest.approx(900 + 450)
    # After an auxiliary step the next one is auxiliary where the next iteration that runs at all has no class step.
    num_in_a_row = np.count_nonzero((learners[:-1] == 1) & (learners[1:] == 1))
    share = 0.4 * 0.3 / (1 - 0.4 * 0.7)
    assert abs(num_in_a_row - 450 * share) < 4 * (450 * share * (1 - share)) ** 0.5 + 1


def test_label_noise_takes_images_of_any_cluster_and_keeps_the_target():
    labels, pseudo_labels = np.tile(LABELS, 100), np.tile(MODES, 100)
    method = with_pseudo_labels(pseudo_labels, labels=labels, auxiliary_probability=1.0, label_noise=0.4)
    plan = method.plan_epoch(0, np.random.default_rng(0))
    rows = np.concatenate(plan.batches[1::2])
    targets = np.concatenate(plan.targets[1::2])
    share = 0.4 * (1 - 1 / NUM_MODES)
    observed = np.mean(pseudo_labels[rows] != targets)
    assert abs(observed - share) < 4 * (share * (1 - share) / len(rows)) ** 0.5


def test_batches_for_clusters_are_mirrored_on_request():
    assert with_pseudo_labels(MODES, auxiliary_flip=True).plan_epoch(0, np.random.default_rng(0)).flip is None


def test_batches_for_clusters_hold_whole_groups_and_are_enough_for_any_sampler():
    def make_sampler(labels):
        return ClassBalanced(labels, classes_per_batch=5, images_per_class=4, batches_per_epoch=30)

    method = with_pseudo_labels(
        MODES, make_sampler=make_sampler, images_per_cluster=3, auxiliary_probability=1.0, label_noise=0.0
    )
    plan = method.plan_epoch(0, np.random.default_rng(0))
    assert [len(rows) for rows in plan.batches] == [20, 18] * 30  # an epoch of ClusterGroups has 2
    later = np.concatenate([np.concatenate(plan.batches[start : start + 2]) for start in (1, 5, 9)])
    assert len(np.unique(later)) > 24  # they are not the same ones again


def test_an_epoch_is_never_empty():
    labels = LABELS[:8]
    method = with_pseudo_labels(
        MODES[:8], labels=labels, class_probability=1e-9, auxiliary_probability=1e-9, images_per_cluster=2
    )
    plan = method.plan_epoch(0, np.random.default_rng(0))
    assert plan.learners.tolist() == [0]
    assert sorted(plan.batches[0]) == list(range(8))
    assert np.array_equal(plan.targets[0], labels[plan.batches[0]])


def test_a_plan_before_the_first_clustering_is_our_own_mistake():
    with pytest.raises(AssertionError, match="recluster"):
        method_of().plan_epoch(0, np.random.default_rng(0))


def test_both_heads_are_the_releases():
    arrays, facts = golden("mic_network_pieces")
    arrays = {key: torch.from_numpy(value) for key, value in arrays.items()}
    network = Network(nn.Identity(), Head(24, 8, layer_norm=False, normalize="l2"), freeze_batch_norm=False).double()
    method = method_of(network=network, auxiliary_dim=6).double()
    for head, name in ((method.network.head, "class"), (method.auxiliary_head, "shared")):
        with torch.no_grad():
            head.linear.weight.copy_(arrays[f"heads_W_{name}"])
            head.linear.bias.copy_(arrays[f"heads_b_{name}"])
        torch.testing.assert_close(head(arrays["heads_pooled"]), arrays[f"heads_out_{name}"], **facts["tolerance"])
    torch.testing.assert_close(method(arrays["heads_pooled"]), arrays["heads_out_class"], **facts["tolerance"])


class Listed(nn.Module):
    """A miner that yields given triplets (T, 3)."""

    def __init__(self, triplets):
        super().__init__()
        self.triplets = triplets

    def forward(self, embeddings, labels, generator=None):  # noqa: ARG002
        return Triplets(*self.triplets.T, torch.ones(len(self.triplets), dtype=torch.bool))


@pytest.mark.parametrize("idle", ["zeroed", "setnone"])
@pytest.mark.parametrize("case", golden_cases("mic_optimisation_steps"))
def test_four_steps_are_the_releases(case, idle):
    arrays = golden_case("mic_optimisation_steps", case["case"])
    miners = [Listed(arrays[f"batch_{task}_triplets"]) for task in ("class", "shared")]

    def make_objective(num_classes, embedding_dim, *, with_regularizers=True):
        loss = registry.build("losses", "margin", num_classes=num_classes, embedding_dim=embedding_dim)
        return Objective(loss, miners[0 if with_regularizers else 1])

    trunk = nn.Sequential(nn.Linear(7, 9, bias=False), nn.ReLU())
    network = Network(trunk, Head(9, 6, layer_norm=False, normalize="l2"), freeze_batch_norm=False)
    method = method_of(
        labels=np.repeat(np.arange(3), 8),
        network=network,
        make_objective=make_objective,
        num_clusters=3,
        auxiliary_dim=5,
        adversarial_weight=case["adv_weight"],
        adversary_dim=8,
    ).double()
    betas = {name: method.objectives[learner].loss.beta for learner, name in enumerate(("class", "shared"))}
    weights = {
        "trunk_w": trunk[0].weight,
        "class_w": network.head.linear.weight,
        "class_b": network.head.linear.bias,
        "shared_w": method.auxiliary_head.linear.weight,
        "shared_b": method.auxiliary_head.linear.bias,
        **dict(zip(("adv_W1", "adv_b1", "adv_W2", "adv_b2"), method.adversaries[0].parameters(), strict=True)),
    }
    named = {**weights, **{f"beta_{name}": beta for name, beta in betas.items()}}
    check_every_parameter_learns(method.named_parameters(), method.parameter_groups())
    assert {id(parameter) for parameter in method.parameters()} == {id(parameter) for parameter in named.values()}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(arrays[f"init_{name}"])
    optimizer = build_optimizer(
        "adam",
        method.parameter_groups(),
        learning_rates={"backbone": case["lr"], "head": case["lr"], "loss": case["beta_lr"]},
        weight_decay=case["weight_decay_model"],
        loss_weight_decay=case["weight_decay_betas"],
        own_weight_decays=method.weight_decays(),
    )

    def close(actual, name):
        torch.testing.assert_close({name: actual.detach()}, {name: arrays[f"{idle}_{name}"]}, **case["tolerance"])

    for step, learner in enumerate((0, 1, 0, 1)):
        task = ("class", "shared")[learner]
        images, labels = (arrays[f"batch_{task}_{what}"] for what in ("x", "labels"))
        loss = method.batch_loss(Batch(images, labels, 0, learner), torch.Generator())
        close(loss, f"step{step}_total")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if idle == "zeroed":  # as the trainer does where idle_parameters_move
            for parameter in method.parameters():
                if parameter.grad is None and parameter in optimizer.state:
                    parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, beta in betas.items():
            close(beta, f"step{step}_beta_{name}")
    for name, parameter in weights.items():
        close(parameter, f"final_{name}")


@pytest.mark.parametrize("learner", [0, 1])
@pytest.mark.parametrize("direction", ["auxiliary_to_class", "class_to_auxiliary", "both"])
def test_the_adversarial_term_is_in_the_steps_of_both(direction, learner):
    images, labels = images_of()[:16], torch.from_numpy(LABELS[:16] if learner == 0 else MODES[:16])
    settings = {"direction": direction, "auxiliary_dim": 5, "class_probability": 0.5}
    method = method_of(**settings, adversarial_weight=3.0)
    without = method_of(**settings, adversarial_weight=0.0)
    without.load_state_dict(method.state_dict(), strict=False)
    features = method.network.trunk(images)
    embeddings = {"class": method.network.head(features), "auxiliary": method.auxiliary_head(features)}
    expected = loss_of(without, learner, images, labels)
    adversaries = list(method.adversaries)
    assert len(adversaries) == (2 if direction == "both" else 1)
    for source, target in (("auxiliary", "class"), ("class", "auxiliary")):
        if direction in (f"{source}_to_{target}", "both"):
            adversary = adversaries.pop(0)
            predicted = functional.normalize(adversary.predict(embeddings[source]), dim=1)
            expected = expected - 3.0 * (embeddings[target] * predicted).square().mean()
    torch.testing.assert_close(loss_of(method, learner, images, labels), expected)


@pytest.mark.parametrize(("weights", "number"), [((3.0, 0.5), 2), ((3.0, 0.0), 1), ((0.0, 0.5), 1), ((0.0, 0.0), 0)])
def test_each_direction_has_its_own_weight(weights, number):
    images, labels = images_of()[:16], torch.from_numpy(LABELS[:16])
    method = method_of(direction="both", adversarial_weight=weights[0], class_to_auxiliary_weight=weights[1])
    without = method_of(adversarial_weight=0.0)
    without.load_state_dict(method.state_dict(), strict=False)
    features = method.network.trunk(images)
    of_classes, auxiliary = method.network.head(features), method.auxiliary_head(features)
    expected = loss_of(without, 0, images, labels)
    adversaries = list(method.adversaries)
    assert len(adversaries) == number
    for weight, source, target in ((weights[0], auxiliary, of_classes), (weights[1], of_classes, auxiliary)):
        if weight:
            predicted = functional.normalize(adversaries.pop(0).predict(source), dim=1)
            expected = expected - weight * (target * predicted).square().mean()
    torch.testing.assert_close(loss_of(method, 0, images, labels), expected)


@pytest.mark.parametrize("direction", ["auxiliary_to_class", "class_to_auxiliary"])
def test_the_weight_of_the_second_direction_needs_one(direction):
    with pytest.raises(
        ValueError, match=r"^class_to_auxiliary_weight = 2\.0 has no effect: direction .*; leave it out"
    ):
        check(direction=direction, class_to_auxiliary_weight=2.0)
    check(direction="both", class_to_auxiliary_weight=2.0)
    check(direction="both", adversarial_weight=0.0, class_to_auxiliary_weight=2.0, adversary_dim=64)


def trial_of(**changes):
    return parse_trial(
        {
            "data": {"name": "digits", "resize_px": 8, "crop_px": 8},
            "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 8},
            "loss": {"name": "margin"},
            "miner": {"name": "distance_weighted"},
            "sampler": {"name": "uniform", "batch_size": 8},
            "optimizer": {"name": "sgd", "learning_rate": 0.1, "loss_learning_rate": 0.02},
            **changes,
            "method": {"name": "mic", "num_clusters": NUM_MODES, "adversarial_weight": 0.0, **changes["method"]},
        }
    )


def test_a_step_with_another_loss_for_the_auxiliary_head_is_that_of_the_loss_by_hand():
    """Cross-entropy of cosines with class vectors for the pseudo-labels, margin loss for the classes, plain SGD."""
    trial = trial_of(method={"auxiliary_loss": {"name": "normalized_softmax", "temperature": 0.5}, "auxiliary_dim": 5})
    method, usual = (build_method(one, LABELS, CPU) for one in (trial, trial_of(method={"auxiliary_dim": 5})))
    images = images_of()[::3]
    classes, modes = torch.from_numpy(LABELS[::3]), torch.from_numpy(MODES[::3])
    torch.testing.assert_close(loss_of(method, 0, images, classes), loss_of(usual, 0, images, classes), rtol=0, atol=0)

    vectors = method.objectives[1].loss.weight
    assert vectors.shape == (NUM_MODES, 5)
    trunk, linear = method.network.trunk, method.auxiliary_head.linear
    unit = functional.normalize(functional.linear(trunk(images), linear.weight, linear.bias), dim=1)
    by_hand = functional.cross_entropy(unit @ functional.normalize(vectors, dim=1).T / 0.5, modes)
    first = next(trunk.parameters())
    learning = [first, linear.weight, vectors]
    gradients = torch.autograd.grad(by_hand, learning)
    expected = [p.detach() - rate * g for p, rate, g in zip(learning, (0.1, 0.1, 0.02), gradients, strict=True)]
    optimizer = build_trial_optimizer(trial, method)
    before = [parameter.clone() for parameter in (method.network.head.linear.weight, method.objectives[0].loss.beta)]
    loss = loss_of(method, 1, images, modes)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close([parameter.detach() for parameter in learning], expected)
    assert torch.equal(before[0], method.network.head.linear.weight)
    assert torch.equal(before[1], method.objectives[0].loss.beta)


def test_the_auxiliary_head_has_its_own_loss_and_miner_or_those_of_the_trial():
    labels_alone = {"loss": {"name": "normalized_softmax"}, "miner": None}
    margin = {"name": "margin", "beta": 0.7}
    names = {
        # settings of the method, other blocks of the trial -> loss, beta, miner
        ("Margin", 1.2, "DistanceWeighted"): ({}, {}),
        ("Margin", 0.7, "DistanceWeighted"): ({"auxiliary_loss": margin}, {}),
        ("Margin", 1.2, "All"): ({"auxiliary_miner": {"name": "all"}}, {}),
        ("Margin", 0.7, None): ({"auxiliary_loss": margin}, labels_alone),
        ("Margin", 0.7, "All"): ({"auxiliary_loss": margin, "auxiliary_miner": {"name": "all"}}, labels_alone),
        ("ProxyNCA", None, None): ({"auxiliary_loss": {"name": "proxy_nca"}}, {}),
    }
    for (loss, beta, miner), (settings, changes) in names.items():
        objective = build_method(trial_of(**changes, method=settings), LABELS, CPU).objectives[1]
        assert type(objective.loss).__name__ == loss
        assert getattr(objective.loss, "beta", torch.tensor([[beta or 0.0]])).detach().mean() == pytest.approx(
            beta or 0
        )
        assert miner == (None if objective.miner is None else type(objective.miner).__name__)


def test_without_weight_there_is_no_adversary():
    method = method_of(adversarial_weight=0.0)
    assert method.parameter_groups()["adversary"] == []
    assert not [name for name in method.state_dict() if "adversar" in name]
    loss_of(method, 0, images_of()[:8], torch.from_numpy(LABELS[:8])).backward()
    assert all(parameter.grad is None for parameter in method.auxiliary_head.parameters())
    check_every_parameter_learns(method.named_parameters(), method.parameter_groups())


@pytest.mark.parametrize("learner", [0, 1])
def test_who_learns_from_a_step(learner):
    method = method_of()
    labels = torch.from_numpy((LABELS if learner == 0 else MODES)[::3])
    loss_of(method, learner, images_of()[::3], labels).backward()
    own, other = method.objectives[learner], method.objectives[1 - learner]
    learning = [method.network.trunk, method.network.head, method.auxiliary_head, method.adversaries, own]
    for module in learning:
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in other.parameters())


def test_margins_of_clusters_belong_to_their_numbers():
    method = method_of(num_clusters=11)
    assert method.objectives[0].loss.beta.shape == (NUM_CLASSES,)
    assert method.objectives[1].loss.beta.shape == (11,)
    loss_of(method, 1, images_of()[:8], torch.tensor([7, 7, 7, 2, 2, 2, 10, 10])).backward()
    assert set(method.objectives[1].loss.beta.grad.nonzero().flatten().tolist()) <= {2, 7, 10}
    assert method.objectives[1].loss.beta.grad.any()


def test_the_class_head_is_the_only_one_in_the_network():
    method = method_of()
    assert {name.split(".")[0] for name in method.network.state_dict()} == {"trunk", "head"}
    fresh = network_of()
    assert set(method.network.state_dict()) == set(fresh.state_dict())
    before = method.eval().embed(images_of())
    with torch.no_grad():
        for parameter in method.auxiliary_head.parameters():
            parameter.add_(1.0)
    assert torch.equal(method.embed(images_of()), before)
    fresh.load_state_dict(method.network.state_dict())
    assert torch.equal(fresh.eval()(images_of()), before)


def test_groups_and_weight_decays():
    method = method_of(adversary_weight_decay=1e-3)
    groups = method.parameter_groups()
    assert set(map(id, groups["head"])) == set(
        map(id, [*method.network.head.parameters(), *method.auxiliary_head.parameters()])
    )
    assert set(map(id, groups["loss"])) == {id(objective.loss.beta) for objective in method.objectives}
    assert set(map(id, groups["adversary"])) == set(map(id, method.adversaries.parameters()))
    assert method.weight_decays() == {"adversary": 1e-3}
    check_every_parameter_learns(method.named_parameters(), groups)


@pytest.mark.parametrize(
    ("loss", "miner"),
    [
        ("triplet", "semi_hard"),
        ("proxy_nca", None),
        ("softmax", None),
        ("soft_triple", None),
        ("n_pair", "n_pair"),
        ("multi_similarity", "multi_similarity"),
    ],
)
def test_any_loss_trains_both_heads(loss, miner):
    method = clustered(make_objective=objectives_of(loss, miner), num_clusters=5, auxiliary_dim=6)
    plan = method.plan_epoch(0, np.random.default_rng(0))
    assert set(plan.learners) == {0, 1}
    for rows, targets, learner, _ in steps_of(plan)[:4]:
        total = loss_of(method, learner, images_of()[rows], torch.from_numpy(targets))
        total.backward()
        assert total.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in method.parameters())


def test_regularisers_stand_beside_the_objective_of_the_classes_only():
    method = method_of(make_objective=objectives_of(regularizers=("mdr",)))
    assert list(method.objectives[0].regularizers) == ["mdr"]
    assert list(method.objectives[1].regularizers) == []
    check_every_parameter_learns(method.named_parameters(), method.parameter_groups())


def test_the_auxiliary_head_is_built_as_the_class_head():
    for layer_norm, normalize in ((True, "l2"), (False, "mean_distance")):
        head = method_of(network=network_of(layer_norm=layer_norm, normalize=normalize)).auxiliary_head
        assert isinstance(head.standardise, nn.LayerNorm) == layer_norm
        assert head.normalize == normalize
        assert isinstance(head.dropout, nn.Identity)
        assert head.linear.bias is not None
    network = network_of(dropout=0.25, head_init="kaiming_normal", projection="linear_no_bias")
    head = method_of(network=network, auxiliary_dim=2).auxiliary_head
    assert head.dropout.p == 0.25
    assert head.linear.bias is None
    # sqrt(2 / 2); torch's own is within 1 / sqrt(128) = 0.09
    assert head.linear.weight.std().item() == pytest.approx(1.0, abs=0.2)


def test_where_the_class_head_has_no_projection_the_auxiliary_head_has_one():
    features_themselves = network_of(embedding_dim=128, projection="none", dropout=0.5)
    head = method_of(network=features_themselves, auxiliary_dim=6).auxiliary_head
    assert head.linear.weight.shape == (6, 128)
    assert head.linear.bias is not None
    assert head.dropout.p == 0.5


@pytest.mark.parametrize("learner", [0, 1])
def test_losses_are_float32_under_autocast(learner):
    method = method_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(method, learner, images_of()[:16], torch.from_numpy(MODES[:16]))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_the_state_round_trips():
    method = clustered(images_of())
    other = method_of()
    other.load_state_dict(method.state_dict())
    assert {"surrogate_labels", "num_initial_clusters"} <= set(other.state_dict())  # keys of earlier checkpoints
    assert torch.equal(other.pseudo_labels, method.pseudo_labels)
    plans = [each.plan_epoch(1, np.random.default_rng(1)) for each in (method, other)]
    for one, two in zip(*map(steps_of, plans), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    # It knows that the next clustering is not the first.
    seen = []
    other.recluster(lambda forward: seen.append(forward) or features_of(other, images_of())(forward), 4, CPU)
    assert seen == [other._auxiliary_embeddings]


def finite_steps(method, images):
    plan = method.plan_epoch(0, np.random.default_rng(0))
    for rows, targets, learner, _ in steps_of(plan):
        method.zero_grad()
        loss = loss_of(method, learner, images[rows], torch.from_numpy(targets))
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
    return plan


@pytest.mark.parametrize("standardise", ["mean", "mstd"])
def test_one_image_a_class_turns_the_auxiliary_task_off_until_the_next_clustering(standardise):
    labels = np.arange(len(LABELS))
    images = images_of()
    method = method_of(labels=labels, standardise=standardise, auxiliary_probability=1.0)
    metrics = method.recluster(features_of(method, images), 0, CPU)
    assert metrics["num_clusters"] == 1  # every image is the mean of its class
    assert metrics["auxiliary_off"] == 1
    plan = finite_steps(method, images)
    assert plan.learners.tolist() == [0] * 6
    metrics = method.recluster(features_of(method, images), 4, CPU)
    assert metrics["num_clusters"] == NUM_MODES  # asked for again
    assert metrics["auxiliary_off"] == 0
    assert finite_steps(method, images).learners.tolist() == [0, 1] * 6


@pytest.mark.parametrize("num_different", [1, 2])
def test_an_update_with_too_few_clusters_turns_it_off_too(num_different):
    method = with_pseudo_labels(MODES, auxiliary_probability=1.0)
    few = images_of()[np.arange(len(LABELS)) % num_different]
    metrics = method.recluster(features_of(method, few), 4, CPU)
    assert (metrics["num_clusters"], metrics["auxiliary_off"]) == (num_different, 1)
    assert finite_steps(method, images_of()).learners.tolist() == [0] * 6
    metrics = method.recluster(features_of(method, images_of()), 8, CPU)
    assert (metrics["num_clusters"], metrics["auxiliary_off"]) == (NUM_MODES, 0)


def test_more_clusters_than_images():
    images, labels = images_of()[:12], LABELS[:12]
    method = method_of(labels=labels, num_clusters=30, images_per_cluster=2)
    metrics = method.recluster(features_of(method, images), 0, CPU)
    assert 3 <= metrics["num_clusters"] <= 12
    finite_steps(method, images)
    assert method.recluster(features_of(method, images), 4, CPU)["num_clusters"] <= 12


def test_fewer_images_than_a_batch():
    def make_sampler(labels):
        return ClassBalanced(labels, classes_per_batch=2, images_per_class=8, batches_per_epoch=2)

    images, labels = images_of()[4:14], LABELS[4:14]
    method = clustered(images, labels=labels, make_sampler=make_sampler, images_per_cluster=4, num_clusters=3)
    plan = finite_steps(method, images)
    assert {len(rows) for rows in plan.batches} <= {16, 8}
