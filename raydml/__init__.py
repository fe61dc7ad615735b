"""raydml: fair metric-learning studies on Ray. ``from raydml import Study, load_model`` is the door for Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydml.api import Study, load_model

__all__ = ["Study", "load_model"]


def __getattr__(name: str) -> Any:
    # At the first use only: `import raydml.losses` must not import what a study needs.
    if name in __all__:
        from raydml import api

        return getattr(api, name)
    raise AttributeError(f"module 'raydml' has no attribute {name!r}")
