"""apportion: find out which tokens earned the reward, and train on it."""

from apportion.system import cpu

if cpu.is_command():  # OpenMP reads its environment when torch loads it, which the next line does
    cpu.before_torch()

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
