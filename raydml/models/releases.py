"""The weight files of the five published systems: how they are recognised, and which of their tensors are the network.

The names are those of the checkpoints that each release's code writes. Sizes, pooling, normalisation and the k of
Recall@k are those of its evaluation (docs/methods.md names the five).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from raydml.models.pretrained import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from raydml.images.preprocessing import Interpolation, Resize

IMAGENET_CLASSES = 1000
_STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


class Rule(NamedTuple):
    """What becomes of the tensors whose names begin with `prefix`.

    new: the beginning of their names in raydml's network; None drops them. why: the reason. check: what must hold of
    dropped tensors. "classifier": 1,000 rows, as an ImageNet classifier has. "copy of PREFIX": equal to the tensors
    with that prefix. "": nothing, for layers that the release's embedding does not use.
    """

    prefix: str
    new: str | None
    why: str = ""
    check: str = ""


class Release(NamedTuple):
    """A published system's checkpoint and its evaluation.

    title: for people. marks: names, or beginnings of names, that its checkpoints have all of. rules: the first whose
    prefix fits decides. network: settings of `build_network` that the file does not show. resize_px,
    crop_px, resize, interpolation: of its test images. recall_at: the k that it prints, by data set. codes, groups: of
    which embeddings it prints which groups of metrics. options: settings that its own options change and its file does
    not show.
    """

    title: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    network: Mapping[str, Any]
    recall_at: Mapping[str, tuple[int, ...]]
    resize_px: int = 256
    crop_px: int = 224
    resize: Resize = "short_side"
    interpolation: Interpolation = "bilinear"
    codes: tuple[str, ...] = ("float",)
    groups: tuple[str, ...] = ("retrieval",)
    options: tuple[str, ...] = ()


_FEW, _SOP = (1, 2, 4, 8), (1, 10, 100, 1000)
_VEHICLE_SETS = ("vehicleid", "vehicleid_small", "vehicleid_medium", "vehicleid_large")
_CLASSIFIER = "the ImageNet classifier, which no embedding uses"

RELEASES: dict[str, Release] = {
    "mdr": Release(
        "MDR (Kim and Park, AAAI 2021)",
        ("base.model.", "linear."),
        (
            Rule("base.model.last_linear.", None, _CLASSIFIER, "classifier"),
            Rule("base.model.fc.", None, _CLASSIFIER, "classifier"),
            Rule("base.model.", "trunk."),
            Rule("linear.", "head.linear."),
        ),
        {"normalize": "mean_distance"},
        {"cub200": _FEW, "cars196": _FEW, "sop": _SOP, "inshop": (1, 10, 20, 30, 40)},
        resize="squash",
        interpolation="lanczos",
        options=("normalize",),
    ),
    "deep_metric": Release(
        "Deep_Metric (Wang et al.)",
        ("classifier.linear.", "conv1"),
        (
            Rule("classifier.bn.", None, "a BatchNorm that its forward pass does not use"),
            Rule("classifier.linear.", "head.linear."),
            Rule("last_linear.", None, _CLASSIFIER, "classifier"),
            Rule("", "trunk."),
        ),
        {"pooling": "max", "normalize": "l2"},
        {
            "cub200": (1, 2, 4, 8, 16, 32),
            "cars196": (1, 2, 4, 8, 16, 32),
            "sop": _SOP,
            "inshop": (1, 10, 20, 30, 40, 50),
        },
        crop_px=227,
    ),
    "divide_conquer": Release(
        "Divide & Conquer (Sanakoyeu et al., CVPR 2019)",
        ("embedding.", "features.0.", "layer1."),
        (
            *(
                Rule(f"features.{number}.", None, "the same layers under a second name", f"copy of {name}.")
                for number, name in _STAGES.items()
            ),
            Rule("fc.", None, _CLASSIFIER, "classifier"),
            Rule("embedding.", "head.linear."),
            Rule("", "trunk."),
        ),
        {"normalize": "l2", "num_slices": 8},
        {"sop": _FEW, "inshop": (1, 10, 20, 30, 50), **dict.fromkeys(_VEHICLE_SETS, _FEW)},
        options=("num_slices",),
    ),
    "classification": Release(
        "the classification baseline (Zhai and Wu, BMVC 2019)",
        ("feature.0.", "feature.7."),
        (
            *(Rule(f"feature.{number}.", f"trunk.{name}.") for number, name in _STAGES.items()),
            Rule("remap.", "head.linear."),
        ),
        {"normalize": "l2", "layer_norm": True},
        {"cub200": _FEW, "cars196": _FEW, "sop": _SOP, "inshop": (1, 10, 20, 30, 40, 50)},
        resize="squash",
        codes=("float", "binary"),
    ),
    "mic": Release(
        "MIC (Roth, Brattoli and Ommer, ICCV 2019)",
        ("model.last_linear.Class.",),
        (
            *(
                Rule(
                    f"layer_blocks.{number}.",
                    None,
                    "the same layers under a second name",
                    f"copy of model.layer{number + 1}.",
                )
                for number in range(4)
            ),
            Rule("model.last_linear.Shared.", None, "the head of its auxiliary task, which only trains"),
            Rule("model.last_linear.Class.", "head.linear."),
            Rule("model.fc.", None, _CLASSIFIER, "classifier"),
            Rule("model.", "trunk."),
        ),
        {"normalize": "l2"},
        {
            "cub200": _FEW,
            "cars196": _FEW,
            "sop": _SOP,
            "inshop": (1, 10, 20, 30, 50),
            **dict.fromkeys(_VEHICLE_SETS, (1, 5)),
        },
        groups=("retrieval", "clustering"),
    ),
}


class Converted(NamedTuple):
    """A release's weights under raydml's names.

    network: settings of `build_network`. dropped: reason -> names of the tensors that were left out for it.
    """

    state: dict[str, Tensor]
    network: dict[str, Any]
    dropped: dict[str, list[str]]


def recognised(names: Iterable[str]) -> str | None:
    """Return the key of the release whose checkpoint has tensors of these names, or None."""
    names = list(names)
    found = (
        key
        for key, release in RELEASES.items()
        if all(any(name.startswith(mark) for name in names) for mark in release.marks)
    )
    return next(found, None)


def converted(
    key: str, state: Mapping[str, Tensor], origin: str, changes: Mapping[str, Any] = MappingProxyType({})
) -> Converted:
    """Return the tensors of a release's checkpoint under the names of raydml's network, and how to build that.

    key: of RELEASES. origin: the file, for messages. changes: settings in place of the release's own `network`. Raises
    WeightsError for a file of another release, for dropped tensors that are not what they are dropped as, for a file
    without the layers that show backbone and embedding, and for slices into which the embedding cannot be cut.
    """
    release = RELEASES[key]
    found = recognised(state)
    if found != key:
        other = f"it lacks tensors named {', '.join(f'{mark}*' for mark in release.marks)}"
        if found is not None:
            other = f"it is a checkpoint of {RELEASES[found].title}. Cure: --from {found}"
        raise WeightsError(f"{origin} is no checkpoint of {release.title}: {other}")
    new: dict[str, Tensor] = {}
    dropped: dict[str, list[str]] = {}
    for name, tensor in state.items():
        rule = next((rule for rule in release.rules if name.startswith(rule.prefix)), None)
        if rule is None:
            known = ", ".join(f"{rule.prefix}*" for rule in release.rules)
            raise WeightsError(f"{origin}: {name} has no place in a checkpoint of {release.title} ({known})")
        if rule.new is None:
            _check_dropped(rule, name, tensor, state, origin)
            dropped.setdefault(rule.why, []).append(name)
        else:
            new[rule.new + name.removeprefix(rule.prefix)] = tensor
    network = {**_network_of(key, new, origin), **release.network, **changes}
    if network["embedding_dim"] % network.get("num_slices", 1):
        raise WeightsError(
            f"{origin}: {name_in_release(key, 'head.linear.weight')} makes {network['embedding_dim']} dimensions, and "
            f"they cannot be {network['num_slices']} equal slices. Cure: --num-slices with the number of its learners"
        )
    return Converted(new, network, dropped)


def name_in_release(key: str, name: str) -> str:
    """Return the name that a tensor of raydml's network has in a release's checkpoint."""
    rules = (rule for rule in RELEASES[key].rules if rule.new is not None and name.startswith(rule.new))
    rule = next(rules, None)
    return name if rule is None else rule.prefix + name.removeprefix(str(rule.new))


def _check_dropped(rule: Rule, name: str, tensor: Tensor, state: Mapping[str, Tensor], origin: str) -> None:
    if rule.check == "classifier" and (tensor.ndim == 0 or tensor.shape[0] != IMAGENET_CLASSES):
        raise WeightsError(
            f"{origin}: {name} has the shape {tuple(tensor.shape)}, and {rule.why}, has {IMAGENET_CLASSES} rows: "
            "this is a trained layer, and it is not dropped"
        )
    if rule.check.startswith("copy of "):
        twin = rule.check.removeprefix("copy of ") + name.removeprefix(rule.prefix)
        if twin not in state or not state[twin].equal(tensor):
            raise WeightsError(f"{origin}: {name} is not equal to {twin}, of which it is a second name in this release")


def _network_of(key: str, state: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """Return backbone, embedding_dim and projection, which the names and shapes show."""
    if "trunk.conv1_7x7_s2.weight" in state:
        backbone, feature_dim = "bn_inception", 1024
    elif "trunk.layer1.0.conv3.weight" in state:
        backbone, feature_dim = "resnet50", 2048
    elif "trunk.layer1.0.conv2.weight" in state:
        backbone, feature_dim = "resnet18", 512
    else:
        lacking = [name_in_release(key, name) for name in ("trunk.conv1_7x7_s2.weight", "trunk.layer1.0.conv2.weight")]
        raise WeightsError(f"{origin} has no backbone that raydml builds: neither {lacking[0]} nor {lacking[1]}")
    weight = state.get("head.linear.weight")
    if weight is None and key == "classification":  # its embedding is the feature unless it was asked for another size
        return {"backbone": backbone, "embedding_dim": feature_dim, "projection": "none"}
    if weight is None or weight.ndim != 2:
        raise WeightsError(
            f"{origin} has no matrix {name_in_release(key, 'head.linear.weight')}, which makes the embedding"
        )
    projection = "linear" if "head.linear.bias" in state else "linear_no_bias"
    if (projection == "linear_no_bias") != (key == "classification"):
        name = name_in_release(key, "head.linear.bias")
        raise WeightsError(
            f"{origin} {'has' if projection == 'linear' else 'lacks'} {name}, unlike {RELEASES[key].title}"
        )
    return {"backbone": backbone, "embedding_dim": weight.shape[0], "projection": projection}
