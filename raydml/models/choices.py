"""The words that the settings of a network take; without torch, which the check of a configuration does not need."""

from collections.abc import Mapping
from typing import Literal

Pooling = Literal["average", "max", "gem", "cls", "cls_mean", "attention"]
Normalisation = Literal["l2", "mean_distance", "none"]
Projection = Literal["linear", "linear_no_bias", "none"]

#: What of a trunk learns beside the head: all of it, nothing, or ``{"last_blocks": N}``.
TrainedPart = Literal["all", "head"] | Mapping[str, int]
HeadInit = Literal["torch", "xavier_normal", "kaiming_normal"]
