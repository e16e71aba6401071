"""apportion: find out which tokens earned the reward, and train on it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apportion import advantages, credit, losses, segments
    from apportion.types import Advantages, Credit, PolicyLoss, Rollouts

__version__ = "0.1.0"
__all__ = [
    "Advantages",
    "Credit",
    "PolicyLoss",
    "Rollouts",
    "__version__",
    "advantages",
    "credit",
    "losses",
    "segments",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the command must set OpenMP's environment before anything imports torch."""
    if name in ("advantages", "credit", "losses", "segments"):
        return import_module(f"apportion.{name}")
    if name in ("Advantages", "Credit", "PolicyLoss", "Rollouts"):
        return getattr(import_module("apportion.types"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
