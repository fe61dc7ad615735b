"""Copies of a state: they stay as they are, and the memory of one is used for the next."""

import numpy as np
import pytest
import torch

from raydml.training.snapshot import Snapshots, copy_of


def state():
    weights = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": weights * 2}}
    return {"weights": weights, "moments": moments, "rows": [np.arange(3), (torch.ones(2), "text", None, 1.5)]}


def test_a_copy_does_not_follow_its_source():
    source = state()
    taken = copy_of(source)
    source["weights"] += 1
    source["moments"][0]["step"] += 1
    source["rows"][0][:] = 7
    source["rows"].append(1)
    expected = state()
    assert torch.equal(taken["weights"], expected["weights"])
    assert taken["weights"].stride() == expected["weights"].stride(), "an optimiser is slower with another layout"
    assert taken["moments"][0]["step"] == 3
    assert torch.equal(taken["rows"][0], torch.arange(3)), "an array becomes a tensor, which torch.load reads safely"
    assert torch.equal(taken["rows"][1][0], torch.ones(2))
    assert (len(taken["rows"]), taken["rows"][1][1:]) == (2, ("text", None, 1.5))


def test_a_copy_of_a_parameter_has_no_graph():
    assert not copy_of({"p": torch.nn.Parameter(torch.ones(2))})["p"].requires_grad


def test_the_memory_of_the_copy_before_is_used_where_it_fits():
    snapshots, source = Snapshots(), state()
    first = snapshots.take(source)
    places = [first["weights"].data_ptr(), first["moments"][0]["exp_avg"].data_ptr()]
    source["weights"] += 1
    again = snapshots.take(source)
    assert [again["weights"].data_ptr(), again["moments"][0]["exp_avg"].data_ptr()] == places
    assert torch.equal(again["weights"], state()["weights"] + 1)
    source["weights"] = torch.zeros(5)
    source["moments"][0]["exp_avg"] = source["moments"][0]["exp_avg"].contiguous()
    other = snapshots.take(source)
    assert torch.equal(other["weights"], torch.zeros(5))
    assert other["moments"][0]["exp_avg"].stride() == (24, 12, 4, 1)
    assert torch.equal(again["weights"], state()["weights"] + 1), "its memory was not given to another shape"


@pytest.mark.gpu
def test_a_copy_of_what_is_on_a_gpu_is_whole_when_it_is_returned():
    snapshots, source = Snapshots(), torch.arange(2.0**22, device="cuda")
    for turn in range(3):
        taken = snapshots.take({"weights": source})["weights"]
        assert taken.is_pinned()
        assert torch.equal(taken, torch.arange(2.0**22) + turn)
        source += 1
