"""Values as text."""

import pytest

from raydml.config.recipe import value_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(None, "none"), (0.0, "0"), (1234.5, "1230"), (0.001, "0.001"), (0.000285, "2.85e-4"), (3e-06, "3e-6")],
        *[([0.08, 1.0], "[0.08, 1]"), (True, "true"), ("mean", "mean"), (50, "50"), (-0.00002, "-2e-5")],
    ],
)
def test_values_are_written_as_people_write_them(value, text):
    assert value_text(value) == text
