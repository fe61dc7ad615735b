"""The footprint of networks against formulas."""

import pytest
import torch
from torch import nn

from raydml.images.preprocessing import Preprocessing
from raydml.inference import footprint
from raydml.inference.footprint import count_macs, footprint_text, measure_footprint, measure_text, median_footprint

PREPROCESSING = Preprocessing(resize_px=16, crop_px=12, mean=(0.0,) * 3, std=(1.0,) * 3)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).mean(dim=(2, 3)))


class Attending(nn.Module):
    """Four tokens of 8 numbers that attend to one another, with one head."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)

    def forward(self, images):
        tokens = images[:, 0, :4, :8]
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1)


def test_the_numbers_of_a_small_network():
    network = Small().train()
    network.norm.eval()
    found = measure_footprint(network, PREPROCESSING, device="cpu")
    assert found.parameters == 3 * 8 * 9 + 2 * 8 + 8 * 5 + 5
    assert found.macs == 6 * 6 * 8 * (3 * 9) + 8 * 5  # outputs of the convolution times its window, and the head
    assert found.embedding_bytes == 4 * 5
    assert (found.device, found.threads, found.precision, found.crop_px) == ("cpu", torch.get_num_threads(), "fp32", 12)
    assert 0 < found.ms_batch_64 < found.ms_batch_1 < 1000
    assert (network.training, network.norm.training) == (True, False)


def test_attention_is_counted():
    """Projections of 4 tokens: 3 times 8 x 8 in and once out; products of all pairs of tokens: twice 4 x 4 x 8."""
    network = Attending().eval()
    assert count_macs(network, torch.zeros(1, 3, 12, 12)) == 4 * 4 * 8 * 8 + 2 * 4 * 4 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_network_without_operations_has_no_count():
    assert count_macs(nn.AdaptiveAvgPool2d(1), torch.zeros(1, 3, 4, 4)) is None


@pytest.mark.parametrize(
    ("lengths", "median_ms"),
    [
        ([9, 0.5, 0.1, 0.3, 0.2, 99], 250),  # a second is reached after the fourth that counts
        ([9, 2, 1, 3, 99], 2000),  # three at least
        ([9, 6, 8, 99], 7000),  # but not above ten seconds
        ([9, *[0.001] * 20, 99], 1),  # and no more than twenty
    ],
)
def test_times_are_medians_after_a_warm_up(lengths, median_ms):
    now, left = [0.0], iter(lengths)

    def run():
        now[0] += next(left)

    assert footprint._median_ms(run, lambda: now[0]) == pytest.approx(median_ms)


def test_a_batch_without_memory_has_no_time():
    class Greedy(Small):
        def forward(self, images):
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(images)

    found = measure_footprint(Greedy(), PREPROCESSING, device="cpu")
    assert found.ms_batch_64 is None
    assert found.ms_batch_1 > 0
    assert "not measured in batches of 64" in footprint_text(found._asdict())
    small = measure_footprint(Small(), PREPROCESSING, device="cpu", largest_batch=63)
    assert small.ms_batch_64 is None


def test_footprints_in_words():
    one = {
        "parameters": 25_557_032, "macs": 4_089_184_256, "embedding_bytes": 2048, "ms_batch_1": 21.04,
        "ms_batch_64": 12.0, "device": "cpu", "threads": 2, "precision": "fp32", "crop_px": 224,
    }  # fmt: skip
    assert footprint_text(one) == (
        "25.6 M parameters, 4.09 G MACs, 21 ms an image in batches of 1, 12 ms an image in batches of 64 (cpu, 2 "
        "threads, fp32, 224 px), 2,048 bytes an embedding"
    )
    cells = [measure_text(name, one[name]) for name in ("parameters", "macs", "embedding_bytes", "ms_batch_1")]
    assert cells == ["25.6 M", "4.09 G", "2,048", "21"]
    several = [one, {**one, "ms_batch_1": 30.0, "ms_batch_64": None}, {**one, "ms_batch_1": 22.0}]
    assert median_footprint(several) == {**one, "ms_batch_1": 22.0, "ms_batch_64": 12.0}
    assert median_footprint([]) is None
