"""What a model takes to embed one image: parameters, operations, time and bytes. Not what its training cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # sentences need no torch
    from collections.abc import Iterator

    import torch
    from torch import nn

    from raydml.images.preprocessing import Preprocessing

BATCHES = (1, 64)
_LEAST_RUNS, _MOST_RUNS = 3, 20
_BUDGET_S = 1.0  # for each batch, where it allows more runs than the least
_MOST_S = 10.0  # for each batch, even where that allows fewer runs than the least


class Footprint(NamedTuple):
    """The inference cost of a network.

    parameters: numbers of the network, trained or not. macs: multiply-accumulate operations for an image; None for a
    network without any that are counted. embedding_bytes: of an image's float32 embedding. ms_batch_1, ms_batch_64:
    median milliseconds for an image in a batch of this size; None for a batch that there is no memory for. device,
    threads (of torch, 0 on a GPU), precision, crop_px: how they were measured.
    """

    parameters: int
    macs: int | None
    embedding_bytes: int
    ms_batch_1: float | None
    ms_batch_64: float | None
    device: str
    threads: int
    precision: str
    crop_px: int


#: Numbers of a footprint that a model may have less of than another one, and their names for readers.
MEASURES = {
    "ms_batch_64": "ms an image (batch 64)",
    "ms_batch_1": "ms an image (batch 1)",
    "macs": "MACs an image",
    "parameters": "parameters",
    "embedding_bytes": "bytes an embedding",
}


def measure_footprint(
    network: nn.Module,
    preprocessing: Preprocessing,
    *,
    device: str,
    precision: str = "fp32",
    channels_last: bool = False,
    largest_batch: int = BATCHES[-1],
) -> Footprint:
    """Measure a network as it is evaluated; it is moved to the device.

    Time is that of the network from prepared images to embeddings on the device, without decoding: the median of 3 to
    20 runs of about a second in all for each batch, after one that is not counted; of fewer where these take more than
    ten seconds. Operations are those of convolutions, matrix products and attention, as torch counts them (two FLOPs
    are one MAC); normalisation, activations and pooling are left out, as in papers. largest_batch: of images that there
    is memory for; a larger one is not tried.
    """
    import torch

    modes = [(module, module.training) for module in network.modules()]
    network = network.to(device).eval()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    crop_px, kind = preprocessing.crop_px, torch.device(device).type

    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            found: torch.Tensor = network(batch)
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return found

    try:
        times: dict[int, float | None] = {}
        for size in BATCHES:
            if size > largest_batch:
                times[size] = None
                continue
            images = torch.zeros((size, 3, crop_px, crop_px), device=device)
            if channels_last:
                images = images.to(memory_format=torch.channels_last)
            try:
                times[size] = _median_ms(lambda images=images: run(images)) / size  # type: ignore[misc]
            except torch.OutOfMemoryError:
                times[size] = None
        one = torch.zeros((1, 3, crop_px, crop_px), device=device)
        dim, macs = run(one).shape[1], count_macs(network, one)
    finally:
        for module, training in modes:
            module.training = training
    return Footprint(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        macs=macs,
        embedding_bytes=4 * int(dim),
        ms_batch_1=times[1],
        ms_batch_64=times[64],
        device=torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        threads=torch.get_num_threads() if kind == "cpu" else 0,
        precision=precision,
        crop_px=crop_px,
    )


def count_macs(network: nn.Module, images: torch.Tensor) -> int | None:
    """Return the multiply-accumulate operations of a forward pass, None for a network without any that are counted."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), _without_fused_layers(), FlopCounterMode(display=False) as counter:
        network(images)
    return counter.get_total_flops() // 2 or None


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Let nn.MultiheadAttention run as operations that are counted, not as one that is not."""
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _median_ms(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    run()
    seconds: list[float] = []
    while sum(seconds) < (_MOST_S if len(seconds) < _LEAST_RUNS else _BUDGET_S) and len(seconds) < _MOST_RUNS:
        begin = clock()
        run()
        seconds.append(clock() - begin)
    return 1000 * median(seconds)


def footprint_text(found: Mapping[str, Any]) -> str:
    """Return a footprint in words: "25.6 M parameters, 4.09 G MACs, 21 ms an image in batches of 1, ...".

    found: the fields of a Footprint.
    """
    times = [found["ms_batch_1"], found["ms_batch_64"]]
    one, many = ("not measured in" if value is None else f"{value:.3g} ms an image in" for value in times)
    threads = f", {found['threads']} thread{'s' if found['threads'] > 1 else ''}" if found["threads"] else ""
    macs = "" if found["macs"] is None else f"{_short(found['macs'])} MACs, "
    where = f"{found['device']}{threads}, {found['precision']}, {found['crop_px']} px"
    return (
        f"{_short(found['parameters'])} parameters, {macs}{one} batches of 1, {many} batches of 64 ({where}), "
        f"{found['embedding_bytes']:,} bytes an embedding"
    )


def measure_text(name: str, value: float | None) -> str | None:
    """Return a number of a footprint for a cell: "25.6 M", "0.53", "1,024"; None for one that was not measured."""
    if value is None:
        return None
    if name.startswith("ms_"):
        return f"{value:.3g}"
    return f"{value:,.0f}" if name == "embedding_bytes" else _short(value)


def footprint_metrics(found: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the numbers of a footprint that were measured, named ``footprint_macs`` and so on; none without one."""
    values = {name: (found or {}).get(name) for name in MEASURES}
    return {f"footprint_{name}": float(value) for name, value in values.items() if value is not None}


def median_footprint(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the footprint of several networks of one configuration: the median of each time, the rest of the first.

    None without a network, as in results that have none.
    """
    if not found:
        return None
    times = {}
    for name in ("ms_batch_1", "ms_batch_64"):
        values = [one[name] for one in found if one[name] is not None]
        times[name] = median(values) if values else None
    return {**found[0], **times}


def _short(number: float) -> str:
    """Return "25.6 M", "4.1 G" or "850"."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g}"
