"""Values as text."""

import pytest

from raydml.config.recipe import recipe_of, value_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(None, "none"), (0.0, "0"), (1234.5, "1230"), (0.001, "0.001"), (0.000285, "2.85e-4"), (3e-06, "3e-6")],
        *[([0.08, 1.0], "[0.08, 1]"), (True, "true"), ("mean", "mean"), (50, "50"), (-0.00002, "-2e-5")],
    ],
)
def test_values_are_written_as_people_write_them(value, text):
    assert value_text(value) == text


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ({}, "triplet"),
        ({"backbone": "resnet50"}, "triplet"),
        ({"backbone": "resnet50", "train": "head"}, "triplet; head of resnet50"),
        ({"backbone": "resnet50", "train": {"last_blocks": 1}}, "triplet; last block of resnet50"),
        ({"backbone": "timm:vit_small_patch14_dinov2.lvd142m"}, "triplet; vit_small_patch14_dinov2"),
        ({"backbone": "timm:test_vit", "train": {"last_blocks": 2}}, "triplet; last 2 blocks of test_vit"),
        ({"backbone": "timm:test_vit", "train": {"lora": {"rank": 8}}}, "triplet; adapters in test_vit"),
    ],
)
def test_a_recipe_says_what_of_a_pretrained_network_learns(model, recipe):
    assert recipe_of({"loss": {"name": "triplet"}, "model": model}) == recipe
