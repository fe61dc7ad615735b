"""The facts about any backbone by its name; without torch for those of the table."""

from raydml.models.backbones import BACKBONES, HUB, TIMM, BackboneFacts, ModelError


def facts_of(backbone: str) -> BackboneFacts:
    """Return the facts about a backbone of the table, or about ``timm:NAME``. Raises ModelError for an unknown name."""
    if backbone.startswith(TIMM):
        from raydml.models.timm_trunk import facts_of_timm  # imports torch and timm

        return facts_of_timm(backbone)
    if backbone not in BACKBONES:
        raise ModelError(f"backbone: {backbone!r}; one of {', '.join(BACKBONES)}, or {TIMM}NAME")
    return BACKBONES[backbone]


def with_prefix_of_timm(name: str) -> str | None:
    """Return ``timm:NAME`` where timm has a network of this name, or can load it from the hub; None otherwise."""
    if name.startswith(HUB):
        return f"{TIMM}{name}"
    import timm  # 2 s, which only a name that is not in the table costs

    return f"{TIMM}{name}" if timm.is_model(name) else None
