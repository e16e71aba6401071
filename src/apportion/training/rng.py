"""Global random states of the process: torch's, Python's and numpy's.

The library draws from its own generator alone. A user-supplied method may draw from any of these, so they are seeded
with the run and saved in its checkpoints.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Seed all global generators with `number`."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def states() -> dict[str, Tensor]:
    """Return the states as tensors, by name."""
    _, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([float(x) for x in rest], dtype=torch.float64),  # position, has_gauss, gauss
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(states: Mapping[str, Tensor]) -> None:
    """Put the global generators into `states`; CUDA's where this process has one."""
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
