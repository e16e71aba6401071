"""apportion: find out which tokens earned the reward, and train on it."""

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
