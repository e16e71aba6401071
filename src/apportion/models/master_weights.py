"""16-bit weights with float32 masters in 4 bytes a weight, and AdamW on them.

A float32 number is its nearest bfloat16 and a 16-bit remainder: bits = (bfloat16 bits · 2^16) + remainder. The model
computes with the first half, the optimizer joins the two exactly, so that no update is lost to rounding and no second
copy of the weights is stored or cast. Weights are processed in blocks that fit in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from apportion.distributed.grad_norm import BLOCK, block


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bfloat16, int16 remainder) of a float32 tensor: nearest, ties upwards, so that the remainder fits."""
    bits = master.clone(memory_format=torch.contiguous_format)
    weight, remainder = torch.empty_like(bits, dtype=torch.bfloat16), torch.empty_like(bits, dtype=torch.int16)
    split_into(bits, torch.empty_like(bits), weight, remainder)
    return weight, remainder


def split_into(master: Tensor, spare: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write `split` of `master` into `weight` and `remainder`; `master` and `spare` (float32) are overwritten."""
    bits, high = master.view(torch.int32), spare.view(torch.int32)
    torch.add(bits, 0x8000, out=high)
    high.bitwise_and_(-0x10000)
    weight.copy_(spare)  # exact: the lower half is 0
    remainder.copy_(bits.sub_(high))


def join(weight: Tensor, remainder: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the float32 tensor of the two halves, the inverse of `split`, in `out` if it is passed."""
    master = torch.empty_like(weight, dtype=torch.float32) if out is None else out
    master.copy_(weight).view(torch.int32).add_(remainder)
    return master


def to_sixteen_bit(*modules: nn.Module | None) -> dict[nn.Parameter, Tensor]:
    """Convert every trained float32 parameter to bfloat16, in place, and return {parameter: remainder}."""
    remainders: dict[nn.Parameter, Tensor] = {}
    for module in modules:
        for parameter in module.parameters() if module is not None else ():
            if parameter.requires_grad and parameter.dtype == torch.float32 and parameter not in remainders:
                parameter.data, remainders[parameter] = split(parameter.data)
    return remainders


def to_float32(remainders: dict[nn.Parameter, Tensor]) -> None:
    """Invert `to_sixteen_bit`: every parameter is its float32 master, and `remainders` is empty."""
    while remainders:
        parameter, remainder = remainders.popitem()
        parameter.data = join(parameter.data, remainder)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over float32 weights, plain or split into two halves.

    Args:
        remainders: the other half of each bfloat16 weight, from `to_sixteen_bit`; it is written to in place.
        moments: "float32", or "bfloat16": both moments in 16 bit with stochastic rounding, so that the small steps of
            the second moment (1 − β₂ = 0.001) are unbiased. Only for split weights.

    State of each parameter: step, exp_avg, exp_avg_sq, and remainder where it is split.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        remainders: Mapping[nn.Parameter, Tensor] | None = None,
        moments: str = "float32",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.remainders = remainders or {}
        self.moments = getattr(torch, moments)
        self.noise: Tensor | None = None
        self.blocks: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                self._init_state(parameter)
            plain = [p for p in parameters if p not in self.remainders]
            if plain:
                self._apply(group, *self._operands(plain))
            for number, parameter in enumerate(p for p in parameters if p in self.remainders):
                self._step_split(group, parameter, number)

    def _init_state(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if not state:
            split = parameter in self.remainders
            dtype = self.moments if split else torch.float32
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
            if split:
                state["remainder"] = self.remainders[parameter]

    def _operands(self, plain: list[nn.Parameter]) -> tuple[list[Tensor], ...]:
        states = [self.state[p] for p in plain]
        grads = [p.grad for p in plain if p.grad is not None]
        return (list(plain), grads, *([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step")))

    def _apply(self, group: Mapping[str, Any], params: Any, grads: Any, first: Any, second: Any, steps: Any) -> None:
        adamw(
            params,
            grads,
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_split(self, group: Mapping[str, Any], parameter: nn.Parameter, number: int) -> None:
        """Update one split weight: join a block, step it, split it."""
        state = self.state[parameter]
        assert parameter.grad is not None
        size = block(parameter.device)
        flat = [t.view(-1).split(size) for t in (parameter.data, state["remainder"])]
        flat += [parameter.grad.reshape(-1).split(size)]
        flat += [state[name].view(-1).split(size) for name in ("exp_avg", "exp_avg_sq")]
        for place, (weight, remainder, grad, first, second) in enumerate(zip(*flat, strict=True)):
            master, wide_grad, spare, *wide = self._scratch(len(weight), parameter.device)
            wide_grad.copy_(grad)
            wide = [first, second] if self.moments == torch.float32 else [wide[0].copy_(first), wide[1].copy_(second)]
            join(weight, remainder, out=master)
            self._apply(group, [master], [wide_grad], [wide[0]], [wide[1]], [state["step"].clone()])
            split_into(master, spare, weight, remainder)
            if self.moments != torch.float32:
                turn = (int(state["step"]) * 1009 + number) * 1013 + place
                first.copy_(self._rounded(wide[0], 2 * turn))
                second.copy_(self._rounded(wide[1], 2 * turn + 1))
        state["step"] += 1

    def _scratch(self, size: int, device: torch.device) -> list[Tensor]:
        """Return five float32 blocks (size,) of reused memory: allocation costs more than the step."""
        if not self.blocks or len(self.blocks[0]) < size or self.blocks[0].device != device:
            self.blocks = [torch.empty(size, device=device) for _ in range(5)]
        return [block[:size] for block in self.blocks]

    def _rounded(self, x: Tensor, turn: int) -> Tensor:
        """Round float32 `x` stochastically to bfloat16 in place; equal turns give equal results.

        The noise is one fixed block, used from another offset each turn. Its size depends on all weights, not on those
        stepped so far: the first step after a resume must round as in an uninterrupted run.
        """
        size = len(x)
        if self.noise is None:
            generator = torch.Generator(device=x.device).manual_seed(0)
            span = 2 * max(BLOCK, min(block(x.device), max(len(r.view(-1)) for r in self.remainders.values())))
            self.noise = torch.randint(0, 1 << 16, (span,), dtype=torch.int32, generator=generator, device=x.device)
        start = (turn * 2654435761) % (len(self.noise) - size + 1)
        x.view(torch.int32).add_(self.noise[start : start + size]).bitwise_and_(-0x10000)
        return x
