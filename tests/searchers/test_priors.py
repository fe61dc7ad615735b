"""Where `priors` draws: a third near good points, and these are the best trials once there are some."""

import math

from raydml.searchers._base import DrawnBefore
from raydml.study.draws import TrialDraws
from tests.searchers.spaces import with_searcher

TEXT = """
study: {name: priors, search: {num_trials: 300}}
trial:
  data: {name: digits, resize_px: 16, crop_px: 16}
  model: {backbone: convnet, weights: none, embedding_dim: 16}
  loss: {name: margin, margin: {uniform: [0.0001, 1.0]}, beta: {uniform: [0.0001, 2.0]}}
  sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: 4}
  optimizer: {name: adamw, learning_rate: {loguniform: [1.0e-6, 1.0e-2]}}
"""


def places(draws, indices, before=()):
    """(margin, beta, learning rate) of some trials, each between 0 and 1."""
    found = [draws.draw(index, before).trial for index in indices]
    rates = [(math.log10(one.optimizer.learning_rate) + 6) / 4 for one in found]
    settings = [one.loss.settings for one in found]
    return [(one["margin"], one["beta"] / 2, rate) for one, rate in zip(settings, rates, strict=True)]


def distance(place, centre):
    return math.dist(place, centre)


def test_every_third_trial_is_near_the_published_defaults_and_the_others_are_random(tmp_path):
    """The defaults of the margin loss are margin 0.2 and beta 1.2; an optimizer has none, so the middle counts."""
    draws = TrialDraws(with_searcher(tmp_path, "priors", text=TEXT))
    centre = (0.2, 0.6, 0.5)
    near = places(draws, range(2, 300, 3))
    random = places(draws, [index for index in range(300) if index % 3 != 2])
    # Of a uniform draw, the mean of |x - c| is (c^2 + (1 - c)^2) / 2: 0.34, 0.26, 0.25. Around the centre it is about
    # 0.25 sqrt(2 / pi) = 0.2, less where the end of the range folds it back.
    for place in range(3):
        of_near = sum(abs(one[place] - centre[place]) for one in near) / len(near)
        of_random = sum(abs(one[place] - centre[place]) for one in random) / len(random)
        uniform = (centre[place] ** 2 + (1 - centre[place]) ** 2) / 2
        assert abs(of_random - uniform) < 0.03
        assert of_near < 0.22


def test_the_best_trials_take_the_place_of_a_point_that_misleads(tmp_path):
    draws = TrialDraws(with_searcher(tmp_path, "priors", text=TEXT))
    best = (0.95, 0.05, 0.95)
    before = []
    for index in range(12):
        drawn = draws.draw(index)
        place = places(draws, [index])[0]
        before.append(DrawnBefore(drawn.point, 1 - distance(place, best), 9, True))
    good = draws.draw(0)
    point = dict(good.point)
    margin, beta, rate = sorted(point, key=str)[0], sorted(point, key=str)[1], sorted(point, key=str)[2]
    assert [str(address[-1]) for address in (margin, beta, rate)] == ["beta", "margin", "learning_rate"]
    for offset in (0.0, 0.01, 0.02, 0.03):
        near = {margin: 2 * 0.05 + offset, beta: 0.95 - offset, rate: 10 ** (0.95 * 4 - 6)}
        before.append(DrawnBefore(near, 0.99 - offset, 9, True))
    misled = [distance(one, best) for one in places(draws, range(17, 300, 3))]
    known = [distance(one, best) for one in places(draws, range(17, 300, 3), before)]
    assert sum(known) / len(known) < 0.6 * sum(misled) / len(misled)
