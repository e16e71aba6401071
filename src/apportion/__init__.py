"""apportion: find out which tokens earned the reward, and train on it."""

from apportion import cores

if cores.is_command():  # OpenMP reads its environment when torch loads it, which the next line does
    cores.before_torch()

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
