"""Embeddings of images, and their evaluation under every protocol of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.trial import Machine, Trial
from raydml.evaluation.protocols import DISTRACTOR, ProtocolError, describe_protocol
from raydml.evaluation.scoring import MetricSpec, ScoringError, primary_code, query_values, score_by_all
from raydml.evaluation.verification import Verification
from raydml.images.loader import read_ahead
from raydml.images.pixels import Pixels, centres
from raydml.images.preprocessing import Preprocessing
from raydml.metrics.intervals import bootstrap_interval
from raydml.ops.progress import report_progress

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def embed(
    network: nn.Module,
    pixels: Pixels,
    preprocessing: Preprocessing,
    *,
    device: str | torch.device,
    batch_size: int,
    precision: str = "fp32",
    forward: Callable[[Tensor], Tensor] | None = None,
) -> NDArray[np.float32]:
    """Embed N resized images: embeddings (N, D) float32 on the host, in the given order.

    The network is on `device`. It runs in evaluation mode without gradients, under autocast unless precision is fp32;
    afterwards every module has its former mode. forward: a function of a batch (B, 3, crop, crop) to (B, D) that
    replaces the network's output, for example by features of an inner layer. The centre crops of one batch are read or
    decoded while the previous batch is embedded.
    """
    dtype, device = AUTOCAST[precision], torch.device(device)
    embeddings: NDArray[np.float32] | None = None
    starts = range(0, len(pixels), batch_size)
    calls = ((pixels, range(start, min(start + batch_size, len(pixels))), preprocessing.crop_px) for start in starts)
    with (
        _evaluation_mode(network),
        torch.inference_mode(),
        closing(read_ahead(centres, calls, num_ahead=1)) as squares_of_batches,
    ):
        for start, squares in zip(starts, squares_of_batches, strict=True):
            batch = torch.from_numpy(squares).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = (forward or network)(preprocessing.for_evaluation(batch))
            rows = output.float().cpu().numpy()
            if embeddings is None:
                embeddings = np.empty((len(pixels), rows.shape[1]), dtype=np.float32)
            embeddings[start : start + len(rows)] = rows
            report_progress("embedding", start + len(rows), len(pixels), "images")
    assert embeddings is not None
    return embeddings


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
    footprint: what the model takes to embed an image, where it was measured; see inference/footprint.py.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocols: dict[str, str]
    num_left_out: int = 0
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
    return MetricSpec(trial.recall_at, ("float", "binary") if trial.binary_codes else ("float",))


def evaluate_embeddings(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocols: Sequence[str],
    spec: MetricSpec,
    device: str = "cpu",
    lists: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Evaluation:
    """Score embeddings (N, D) of labels (N,) under every protocol, with intervals if the spec has them.

    lists: name -> labels of a part of the classes; each list is also scored by itself, as if there were no other
    images. Distractors are in every list.
    """
    found = _evaluate_all(embeddings, labels, roles, protocols, spec, device)
    metrics, intervals, sentences = dict(found.metrics), dict(found.intervals), dict(found.protocols)
    distracts = np.zeros(len(labels), dtype=bool) if roles is None else np.array(roles) == DISTRACTOR
    for name, classes in lists.items():
        rows = np.flatnonzero(np.isin(labels, classes) | distracts)
        of_list = found
        if len(rows) < len(labels):
            some_roles = None if roles is None else [roles[row] for row in rows.tolist()]
            try:
                of_list = _evaluate_all(embeddings[rows], labels[rows], some_roles, protocols, spec, device)
            except (ScoringError, ProtocolError) as error:
                raise type(error)(f"the list {name}: {error}") from error
        metrics |= {f"{name}_{metric}": value for metric, value in of_list.metrics.items()}
        intervals |= {f"{name}_{metric}": bounds for metric, bounds in of_list.intervals.items()}
        sentences |= {f"{name}_{key}": f"{name} list: {sentence}" for key, sentence in of_list.protocols.items()}
    return Evaluation(metrics, intervals, sentences)


def _evaluate_all(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocols: Sequence[str],
    spec: MetricSpec,
    device: str,
) -> Evaluation:
    scores = score_by_all(embeddings, labels, roles, protocols, spec, device)
    intervals = {}
    if spec.intervals and scores.queries is not None:
        classes = labels[scores.queries.rows]
        code = primary_code(spec.codes)
        prefix = "" if code == "float" else f"{code}_"
        values = {f"{prefix}{name}": of for name, of in query_values(scores.queries, spec.recall_at).items()}
        intervals = {
            name: bootstrap_interval(of_queries, groups=classes)
            for name, of_queries in values.items()
            if name in scores.metrics and len(np.unique(classes[~np.isnan(of_queries)])) > 1
        }
    return Evaluation(scores.metrics, intervals, {name: describe_protocol(name, labels, roles) for name in protocols})


def device_of(machine: Machine) -> str:
    """Return "cuda" or "cpu" for the device "auto", else the device as it is."""
    if machine.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return machine.device
