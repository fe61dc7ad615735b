"""What any configuration of a tabulated space would do: curves predicted from the trials of benchmarks/search_table.py.

    python benchmarks/search_surrogate.py           # how good the predictions are, for each table

A forest of trees predicts the curve of a configuration, all epochs at once (a surrogate benchmark, Eggensperger et
al., AAAI 2015). What a simulated trial reports is that curve plus the difference between two real runs of one
configuration with different seeds, divided by the square root of 2. Everything is a function of point and seed.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from search_table import FOLDER, METRIC, Row, read_table, space_of

from raydml.search_space.domains import Choice
from raydml.search_space.points import Point, domains_of, key_of, to_unit
from raydml.search_space.space import SearchSpace

NUM_TREES = 200
Curve = NDArray[np.float64]


class Coordinates:
    """A point as numbers: 0 to 1 for a range (of its logarithm for loguniform), 0 or 1 for each item of a choice.

    A range that the point does not come to is -1; a choice, 0 for each item.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._domains = list(domains_of(space.trial))

    def __call__(self, point: Point) -> NDArray[np.float32]:
        found: list[float] = []
        for address, domain in self._domains:
            if isinstance(domain, Choice):
                found += [float(point.get(address) == item) for item in range(len(domain.items))]
            else:
                found.append(to_unit(domain, point[address]) if address in point else -1.0)
        return np.array(found, np.float32)


def fit(inputs: NDArray[np.float32], curves: Curve) -> list:
    """Return the trees of a forest. Curves: (N, epochs)."""
    from sklearn.ensemble import ExtraTreesRegressor

    forest = ExtraTreesRegressor(NUM_TREES, min_samples_leaf=1, max_features=0.5, random_state=0)
    # scikit-learn's own `predict` checks its input for each tree: ten times the time for one row.
    return [tree.tree_ for tree in forest.fit(inputs, curves).estimators_]


def predict(trees: list, row: NDArray[np.float32]) -> Curve:
    """Return the mean of the trees: (epochs,)."""
    return np.mean([tree.predict(row[None])[0, :, 0] for tree in trees], axis=0)


def whole(row: Row, num_epochs: int) -> Curve:
    """Return the curve of a trial; one that ended early keeps its last value."""
    return np.pad(np.array(row.curve), (0, num_epochs - len(row.curve)), mode="edge")


@dataclass
class Surrogate:
    """The curves of a space. noises: what runs of one configuration differ from their mean by."""

    space: SearchSpace
    num_epochs: int
    rows: Sequence[Row]
    noises: Sequence[Curve] = ()
    _trees: list = field(default_factory=list)
    _known: dict[frozenset, Curve] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str) -> "Surrogate":
        """Return the surrogate of a table."""
        space = space_of(name)
        num_epochs = int(space.trial.value["epochs"].value)
        table = read_table(name)
        rows = [row for row in table if row.seed == 0]
        curves = {row.index: whole(row, num_epochs) for row in rows}
        noises = [
            (whole(row, num_epochs) - curves[row.index]) * sign / 2**0.5
            for row in table if row.seed for sign in (-1, 1)
        ]  # fmt: skip
        return cls(space, num_epochs, rows, noises)

    def __post_init__(self) -> None:
        self.coordinates = Coordinates(self.space)
        self._inputs = np.stack([self.coordinates(row.point) for row in self.rows])
        self._curves = np.stack([whole(row, self.num_epochs) for row in self.rows])
        self._trees = fit(self._inputs, self._curves)

    def truth(self, point: Point) -> Curve:
        """Return the predicted curve of a configuration: (epochs,)."""
        key = frozenset(point.items())
        if key not in self._known:
            self._known[key] = predict(self._trees, self.coordinates(point))
        return self._known[key]

    def observed(self, point: Point, seed: int) -> Curve:
        """Return the curve of one run of a configuration: (epochs,)."""
        if not self.noises:
            return self.truth(point)
        written = sorted((key_of(address), value) for address, value in point.items())
        place = zlib.crc32(repr((seed, written)).encode()) % len(self.noises)
        return self.truth(point) + self.noises[place]

    def left_out(self) -> Curve:
        """Return for each trial of the table what a forest of all others predicts: (N, epochs)."""
        others = ~np.eye(len(self.rows), dtype=bool)
        return np.stack(
            [predict(fit(self._inputs[kept], self._curves[kept]), self._inputs[~kept][0]) for kept in others]
        )


def main() -> None:
    """Print how well the curves of trials that were left out are predicted."""
    from scipy.stats import spearmanr

    for path in sorted(FOLDER.glob("*.json")):
        surrogate = Surrogate.of(path.stem)
        curves = np.stack([whole(row, surrogate.num_epochs) for row in surrogate.rows])
        guesses = surrogate.left_out()
        best, guess = curves.max(axis=1), guesses.max(axis=1)
        ranks = [spearmanr(curves[:, epoch], guesses[:, epoch])[0] for epoch in (0, 1, 5, surrogate.num_epochs - 1)]
        print(
            f"{path.stem}: {len(surrogate.rows)} trials, {METRIC} {best.min():.3f} to {best.max():.3f}; left out: rank "
            f"correlation of the best value {spearmanr(best, guess)[0]:.2f} (of epochs 1, 2, 6 and the last: "
            f"{', '.join(f'{rank:.2f}' for rank in ranks)}), mean error {np.abs(best - guess).mean():.3f}; "
            f"noise {np.std(surrogate.noises) if surrogate.noises else 0:.4f}"
        )  # fmt: skip
        for loss in dict.fromkeys(row.loss for row in surrogate.rows):
            own = [value for value, row in zip(best, surrogate.rows, strict=True) if row.loss == loss]
            print(f"  {loss:20} {len(own):3} trials, best {max(own):.3f}, median {np.median(own):.3f}")


if __name__ == "__main__":
    main()
