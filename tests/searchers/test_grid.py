"""The combinations of a grid, counted by hand."""

import itertools

from raydml.study.draws import TrialDraws
from tests.searchers.spaces import with_searcher
from tests.searchers.test_contract import drawn_by

TEXT = """
study: {name: grid, search: {num_trials: 12}}
trial:
  data: {name: digits, resize_px: 16, crop_px: 16}
  model: {backbone: convnet, weights: none, embedding_dim: {choice: [16, 32]}}
  loss:
    choice:
      - {name: margin, beta: {uniform: [0.6, 1.4]}}
      - {name: contrastive}
  sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: {randint: [4, 6]}}
  optimizer: {name: adamw, learning_rate: 1.0e-3}
"""


def test_every_combination_is_run_once_and_in_another_order_for_another_seed(tmp_path):
    """2 dimensions x (3 numbers of beta + 1) x 2 sizes of groups are 16 combinations."""
    orders = []
    for seed in (0, 1):
        draws = TrialDraws(
            with_searcher(tmp_path, "grid", "study.search.num_trials=16", f"study.seed={seed}", text=TEXT)
        )
        found, _ = drawn_by(draws, 16)
        orders.append(
            [
                (
                    one.trial.model.embedding_dim, one.trial.loss.settings.get("beta"),
                    one.trial.sampler.settings["images_per_class"],
                )
                for one in found
            ]
        )  # fmt: skip
    margins = itertools.product((16, 32), (0.6, 1.0, 1.4), (4, 5))
    expected = {*margins, *itertools.product((16, 32), (None,), (4, 5))}
    for order in orders:
        found = [(dim, None if beta not in (0.6, 1.0, 1.4) else beta, size) for dim, beta, size in order]
        assert len(found) == 16
        assert set(found) == expected
    assert orders[0] != orders[1]


def test_numbers_of_a_loguniform_range_are_evenly_spaced_in_their_logarithms(tmp_path):
    text = TEXT.replace("learning_rate: 1.0e-3", "learning_rate: {loguniform: [1.0e-6, 1.0e-2]}")
    draws = TrialDraws(with_searcher(tmp_path, "grid, points: 5", "study.search.num_trials=40", text=text))
    found, _ = drawn_by(draws, 40)
    assert {one.trial.optimizer.learning_rate for one in found} == {1e-6, 1e-5, 1e-4, 1e-3, 1e-2}


def test_a_grid_of_very_many_combinations_takes_all_of_them_equally_and_none_twice(tmp_path):
    draws = TrialDraws(with_searcher(tmp_path, "grid, points: 101", "study.search.num_trials=200"))
    found = [draws.draw(index) for index in range(200)]
    assert len({str(one.point) for one in found}) == 200
    assert {one.trial.model.embedding_dim for one in found} == {16, 32, 64}
    assert len({one.trial.optimizer.learning_rate for one in found}) > 60
