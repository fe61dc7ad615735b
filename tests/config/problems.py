"""The mistakes with which a configuration is refused."""

import pytest

from raydml.errors import ConfigError, Problem


def problems_of(parse, raw) -> dict[str, Problem]:
    """Path -> problem of what a parser refuses."""
    with pytest.raises(ConfigError) as caught:
        parse(raw)
    assert len({problem.path for problem in caught.value.problems}) == len(caught.value.problems)
    return {problem.path: problem for problem in caught.value.problems}
