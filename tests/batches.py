"""Batches that have broken a released implementation somewhere; the contract suites run every plugin on each."""

import torch
from torch import Tensor, nn

from raydml.ops.tuples import Triplets

DIM = 8


def random_points(num_rows: int, seed: int = 0) -> Tensor:
    """Unit vectors (num_rows, DIM), float64."""
    points = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(points, dim=1)


_points = random_points
_PAIRED = torch.tensor([0, 0, 1, 1, 2, 2])

# Name -> (embeddings (B, DIM) float64, labels (B,) int64 in 0..5).
BATCHES: dict[str, tuple[Tensor, Tensor]] = {
    "balanced": (_points(12), torch.arange(12) % 4),
    "unbalanced": (_points(9), torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3])),
    "one class only": (_points(5), torch.full((5,), 2)),
    "all classes distinct": (_points(6), torch.arange(6)),
    "single row": (_points(1), torch.tensor([3])),
    "empty": (_points(0), torch.zeros(0, dtype=torch.int64)),
    "every row the same": (_points(1).repeat(6, 1), _PAIRED),
    "copies within a class": (_points(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 2])),
    "copies across classes": (_points(3).repeat(2, 1), _PAIRED),
    "nearly the same": (_points(1) + 1e-8 * _points(6, seed=1), _PAIRED),
    "all at the origin": (torch.zeros(6, DIM, dtype=torch.float64), _PAIRED),
    "one at the origin": (torch.cat([_points(5), _points(1) * 0]), _PAIRED),
    "opposite": (torch.cat([_points(3), -_points(3)]), _PAIRED),
    "far apart": (_points(8) * 1e4, torch.arange(8) % 3),
    "far from the origin": (_points(8) + 1e4, torch.arange(8) % 3),
    "tiny": (_points(8) * 1e-20, torch.arange(8) % 3),
}


def unit_batch(seed: int = 0, num_rows: int = 14, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Unit vectors (num_rows, dim) float64 of four classes in turn."""
    points, labels = torch.randn(num_rows, dim, generator=_generator(seed), dtype=torch.float64), torch.arange(num_rows)
    return nn.functional.normalize(points, dim=1), labels % 4


def uneven_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors (14, 5) of any length, of classes with one to four rows."""
    points = torch.randn(14, 5, generator=_generator(seed), dtype=torch.float64)
    return points, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 5])


def proxy_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors (13, 6) of any length, of the first five classes."""
    return torch.randn(13, 6, generator=_generator(seed), dtype=torch.float64), torch.arange(13) % 5


def mining_batch(seed: int = 0, num_rows: int = 20, num_classes: int = 5, unit: bool = True) -> tuple[Tensor, Tensor]:
    """Vectors (num_rows, 6), their classes at random."""
    generator = _generator(seed)
    points = torch.randn(num_rows, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    return nn.functional.normalize(points, dim=1) if unit else points, labels


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_triplets(labels: Tensor, seed: int = 0, num_triplets: int = 30) -> Triplets:
    """Triplets at random; those that are none by their labels are marked invalid."""
    generator = torch.Generator().manual_seed(seed)
    high = max(len(labels), 1)
    count = num_triplets if len(labels) else 0
    a, p, n = (torch.randint(high, (count,), generator=generator) for _ in range(3))
    return Triplets(a, p, n, (labels[a] == labels[p]) & (a != p) & (labels[a] != labels[n]))
