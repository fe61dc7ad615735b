"""The words that the settings of a network take; without torch, which the check of a configuration does not need."""

from typing import Literal

Pooling = Literal["average", "max"]
Normalisation = Literal["l2", "mean_distance", "none"]
Projection = Literal["linear", "linear_no_bias", "none"]
HeadInit = Literal["torch", "xavier_normal", "kaiming_normal"]
