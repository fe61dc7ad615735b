import numpy as np
import pytest
import torch

from raydml.training.randomness import PURPOSES, Randomness, seed_for


def draw(randomness):
    with randomness.seeded_layers(torch.device("cpu")):
        layers = torch.rand(2).tolist()
    torch_draws = [torch.rand(2, generator=g).tolist() for g in (randomness.augmentation, randomness.mining)]
    return [randomness.sampler.random(2).tolist(), *torch_draws, layers]


def test_purposes_and_seeds_are_all_different_and_stay_what_they_are():
    seeds = {seed_for(seed, purpose) for seed in range(50) for purpose in PURPOSES}
    assert len(seeds) == 50 * len(PURPOSES)
    assert all(0 <= seed < 2**63 for seed in seeds)
    expected = np.random.SeedSequence(7, spawn_key=(2,)).generate_state(1, np.uint64)[0] // 2
    assert seed_for(7, "sampler") == expected


def test_no_two_generators_of_a_trial_draw_the_same():
    values = draw(Randomness(0))
    assert len({str(value) for value in values}) == len(values)


def test_a_state_goes_on_where_it_was_saved_through_a_file(tmp_path):
    first = Randomness(0)
    draw(first)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    expected = [draw(first), draw(first)]
    second = Randomness(1)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw(second), draw(second)] == expected


def test_layers_get_fresh_numbers_each_time_and_the_global_state_comes_back_also_after_an_error():
    randomness = Randomness(0)
    before = torch.get_rng_state()
    first, second = draw(randomness)[-1], draw(randomness)[-1]
    assert first != second
    with pytest.raises(RuntimeError), randomness.seeded_layers(torch.device("cpu")):
        torch.rand(3).view(2)  # three numbers as two: an error after a draw
    assert torch.equal(torch.get_rng_state(), before)
