"""What a process of Ray does before its first trial or task. Ray runs `prepare` there by its name."""

from __future__ import annotations

from raydml.ops.garbage import imports_uncollected


def prepare() -> None:
    """Import what every trial needs: torch, Ray Tune and raydml."""
    with imports_uncollected():
        import raydml.study.actor  # noqa: F401
