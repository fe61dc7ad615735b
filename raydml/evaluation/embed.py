"""Embeddings of images, and their evaluation under every protocol of a data set."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.trial import Machine, Trial
from raydml.data.benchmarks import BENCHMARK_OF
from raydml.data.catalog import Groups
from raydml.evaluation.protocols import (
    DISTRACTOR,
    ProtocolError,
    describe_protocol,
    num_lone_queries,
    reason_unscorable,
)
from raydml.evaluation.scoring import MetricSpec, ScoringError, primary_code, query_values, score_by_all
from raydml.evaluation.verification import Verification
from raydml.images.features import KeptFeatures
from raydml.images.loader import read_ahead
from raydml.images.pixels import Pixels, centres
from raydml.images.preprocessing import Preprocessing
from raydml.metrics.intervals import bootstrap_interval
from raydml.ops.progress import report_progress

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def embed(
    network: nn.Module,
    images: Pixels | KeptFeatures,
    preprocessing: Preprocessing,
    *,
    device: str | torch.device,
    batch_size: int,
    precision: str = "fp32",
    forward: Callable[[Tensor], Tensor] | None = None,
) -> NDArray[np.float32]:
    """Embed N resized images: embeddings (N, D) float32 on the host, in the given order.

    The network is on `device`. It runs in evaluation mode without gradients, under autocast unless precision is fp32;
    afterwards every module has its former mode. images: their pixels, or the features that the frozen backbone of the
    network gave them; the network then goes on from these. forward: a function of a batch, (B, 3, crop, crop) or
    (B, F), to (B, D) that replaces the network's output, for example by features of an inner layer.
    """
    embeddings: NDArray[np.float32] | None = None
    start = 0
    inputs = (
        images.batches(batch_size, device)
        if isinstance(images, KeptFeatures)
        else centre_batches(images, preprocessing, device=device, batch_size=batch_size)
    )
    with closing(embedded_batches(network, inputs, device=device, precision=precision, forward=forward)) as outputs:
        for rows in outputs:
            if embeddings is None:
                embeddings = np.empty((len(images), rows.shape[1]), dtype=np.float32)
            embeddings[start : start + len(rows)] = rows
            start += len(rows)
            report_progress("embedding", start, len(images), "images")
    assert embeddings is not None
    return embeddings


def centre_batches(
    pixels: Pixels, preprocessing: Preprocessing, *, device: str | torch.device, batch_size: int
) -> Generator[Tensor, None, None]:
    """Yield the centre crops of N resized images, float32 (B, 3, crop, crop), normalised, on the device, in order.

    Those of one batch are read or decoded while the batch before it is used.
    """
    starts = range(0, len(pixels), batch_size)
    calls = ((pixels, range(start, min(start + batch_size, len(pixels))), preprocessing.crop_px) for start in starts)
    with closing(read_ahead(centres, calls, num_ahead=1)) as squares_of_batches:
        for squares in squares_of_batches:
            yield preprocessing.for_evaluation(torch.from_numpy(squares).to(device))


def embedded_batches(
    network: nn.Module,
    inputs: Generator[Tensor, None, None],
    *,
    device: str | torch.device,
    precision: str,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Generator[NDArray[np.float32], None, None]:
    """Yield the output of the network for each batch, (B, D) float32 on the host; otherwise as `embed`."""
    dtype, device = AUTOCAST[precision], torch.device(device)
    with _evaluation_mode(network), torch.inference_mode(), closing(inputs):
        for batch in inputs:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = (forward or network)(batch)
            yield output.float().cpu().numpy()


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    # Module by module: frozen BatchNorm layers are in evaluation mode inside a network that trains.
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Evaluation(NamedTuple):
    """The metrics of one model on one set of images.

    metrics: by name. intervals: name -> (low, high), the 95 % bootstrap interval over the queries, class by class, of
    metrics of the first protocol. protocols: name -> description in words and numbers. All names of a test list begin
    with it. num_left_out: unreadable images of the set, which are not scored. refined: the same images scored in other
    ways, whose numbers do not compare with `metrics`; see refinements.py. verification: of all pairs, where requested.
    num_lone_queries: queries of the first protocol whose class has no other image for them to find, see
    `MetricSpec.lone_misses`.
    footprint: what the model takes to embed an image, where it was measured; see inference/footprint.py.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocols: dict[str, str]
    num_left_out: int = 0
    num_lone_queries: int = 0
    refined: tuple[RefinedEvaluation, ...] = ()
    verification: Verification | None = None
    footprint: Mapping[str, Any] | None = None


class RefinedEvaluation(NamedTuple):
    """The metrics of one refinement. name: its steps, joined by "+". settings: of each step."""

    name: str
    settings: dict[str, dict[str, Any]]
    evaluation: Evaluation


def metric_spec_of(trial: Trial) -> MetricSpec:
    """Return what a trial measures after every epoch."""
    codes = ("float", "binary") if trial.binary_codes else ("float",)
    return MetricSpec(trial.recall_at, codes, lone_misses=lone_queries_miss(trial.data.name))


def lone_queries_miss(dataset: str) -> bool:
    """Return whether queries without an image of their class to find count as misses in this data set.

    They do in a benchmark, as in its published scores. In other images they are left out of the means, as in
    pytorch-metric-learning.
    """
    return dataset in BENCHMARK_OF


def evaluate_embeddings(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocols: Sequence[str],
    spec: MetricSpec,
    device: str = "cpu",
    lists: Mapping[str, Sequence[int]] = MappingProxyType({}),
    groups: Groups | None = None,
) -> Evaluation:
    """Score embeddings (N, D) of labels (N,) under every protocol, with intervals if the spec has them.

    lists: name -> labels of a part of the classes; each list is also scored by itself, as if there were no other
    images. Distractors are in every list. groups: of the N images; where they are a level of labels, the images are
    scored by them besides, and all names of these scores begin with ``group_``.
    """
    found = _evaluate_all(embeddings, labels, roles, protocols, spec, device, groups)
    metrics, intervals, sentences = dict(found.metrics), dict(found.intervals), dict(found.protocols)
    distracts = np.zeros(len(labels), dtype=bool) if roles is None else np.array(roles) == DISTRACTOR
    for name, classes in lists.items():
        rows = np.flatnonzero(np.isin(labels, classes) | distracts)
        of_list = found
        if len(rows) < len(labels):
            some_roles = None if roles is None else [roles[row] for row in rows.tolist()]
            some_groups = None if groups is None else groups.select(rows)
            try:
                of_list = _evaluate_all(
                    embeddings[rows], labels[rows], some_roles, protocols, spec, device, some_groups
                )
            except (ScoringError, ProtocolError) as error:
                raise type(error)(f"the list {name}: {error}") from error
        metrics |= {f"{name}_{metric}": value for metric, value in of_list.metrics.items()}
        intervals |= {f"{name}_{metric}": bounds for metric, bounds in of_list.intervals.items()}
        sentences |= {f"{name}_{key}": f"{name} list: {sentence}" for key, sentence in of_list.protocols.items()}
    if groups is not None and not groups.are_excluded:
        names, of_group = np.unique(np.array(groups.names, dtype=np.str_)[~distracts], return_inverse=True)
        ids = np.zeros(len(labels), dtype=np.int64)
        ids[~distracts] = of_group
        # Each group may have one image, or none in the gallery, where the classes can be scored.
        recall_at = spec.recall_at if "retrieval" in spec.groups else (1,)
        reasons = {name: reason_unscorable(name, ids, roles, recall_at, noun="group") for name in protocols}
        scored = [name for name in protocols if not reasons[name]]
        if len(names) == 1:
            sentences["group"] = f"by group: not scored, because all images are of one group, {str(names[0])!r}"
        elif reasons[protocols[0]]:
            sentences["group"] = f"by group: not scored, because {reasons[protocols[0]]}"
        else:
            by_group = _evaluate_all(embeddings, ids, roles, scored, spec, device, noun="groups")
            metrics |= {f"group_{metric}": value for metric, value in by_group.metrics.items()}
            intervals |= {f"group_{metric}": bounds for metric, bounds in by_group.intervals.items()}
            sentences |= {f"group_{key}": f"by group: {sentence}" for key, sentence in by_group.protocols.items()}
            left_out = [name for name in protocols if reasons[name]]
            sentences |= {f"group_{name}": f"by group: {name} not scored, because {reasons[name]}" for name in left_out}
    return Evaluation(metrics, intervals, sentences, num_lone_queries=found.num_lone_queries)


def _evaluate_all(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocols: Sequence[str],
    spec: MetricSpec,
    device: str,
    groups: Groups | None = None,
    noun: str = "classes",
) -> Evaluation:
    scores = score_by_all(embeddings, labels, roles, protocols, spec, device, groups)
    intervals = {}
    if spec.intervals and scores.queries is not None:
        classes = labels[scores.queries.rows]
        code = primary_code(spec.codes)
        prefix = "" if code == "float" else f"{code}_"
        values = {f"{prefix}{name}": of for name, of in query_values(scores.queries, spec).items()}
        intervals = {
            name: bootstrap_interval(of_queries, groups=classes)
            for name, of_queries in values.items()
            if name in scores.metrics and len(np.unique(classes[~np.isnan(of_queries)])) > 1
        }
    misses = spec.lone_misses
    sentences = {
        name: describe_protocol(name, labels, roles, groups, lone_misses=misses, noun=noun) for name in protocols
    }
    num_lone = num_lone_queries(protocols[0], labels, roles, groups)
    return Evaluation(scores.metrics, intervals, sentences, num_lone_queries=num_lone)


def device_of(machine: Machine) -> str:
    """Return "cuda" or "cpu" for the device "auto", else the device as it is."""
    if machine.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return machine.device
