"""The words that the settings of a network take; without torch, which the check of a configuration does not need."""

from collections.abc import Mapping
from typing import Any, Literal

Pooling = Literal["average", "max", "gem", "cls", "cls_mean", "attention"]
Normalisation = Literal["l2", "mean_distance", "none"]
Projection = Literal["linear", "linear_no_bias", "none"]

AdaptedPart = Literal["attention", "attention_mlp"]

#: What of a trunk learns beside the head: all of it, nothing, ``{"last_blocks": N}``, or adapters,
#: ``{"lora": {"rank": R, "alpha": A, "targets": AdaptedPart}}``.
TrainedPart = Literal["all", "head"] | Mapping[str, Any]
HeadInit = Literal["torch", "xavier_normal", "kaiming_normal"]
