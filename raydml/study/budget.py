"""What one run of a study may spend, and when its search has found enough."""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    """The limits of a search. Each ends it early enough for the stages after it.

    time_s: of this run of the study, in seconds. device_hours: of the study in all, earlier runs included: GPU-hours,
    or CPU-hours where trials hold no GPU. until_settled: end the search once the rank stability of the compared choice
    calls it settled (`raydml.analysis.rank_stability`).
    """

    time_s: float | None = None
    device_hours: float | None = None
    until_settled: bool = False

    @property
    def options(self) -> list[str]:
        """The options of `sweep` that set these limits."""
        given = {
            "--time": self.time_s is not None,
            "--max-gpu-hours": self.device_hours is not None,
            "--until-settled": self.until_settled,
        }
        return [name for name, is_given in given.items() if is_given]


#: No limit.
UNLIMITED = Budget()
