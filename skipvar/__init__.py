"""Distributed image generation with Infinity models, skipping late scales per image (SkipVAR, arXiv 2506.08908).

    import skipvar

    model = skipvar.load("emoji")
    for image in model.generate(["a large red apple on blue"], seed=7):
        image.save("apple.png")

Importing this loads neither torch nor Ray: `load` and `Model` are fetched when they are asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipvar.front_door import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'skipvar' has no attribute {name!r}")
    from skipvar import front_door

    return getattr(front_door, name)
