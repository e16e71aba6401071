"""A policy with its values and its reference: one forward gives log-probabilities, values and entropy."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apportion.config.sections import LoraConfig
from apportion.distributed.sharding import Sharded, Weights
from apportion.errors import ModelError
from apportion.losses import entropy_of
from apportion.masking import last_index
from apportion.models.loading import load_causal, load_tokenizer, locate, pick_device, pick_dtype, quick_attention
from apportion.models.lora import add_adapter
from apportion.models.master_weights import to_sixteen_bit
from apportion.models.shared_prompt import Shared, can_share, shared_prompts, states_behind
from apportion.models.token_logprobs import token_logprobs
from apportion.models.value_head import ValueStart, make_head, make_trunk
from apportion.types import Rollouts


class Outputs(NamedTuple):
    """What one forward gives: (B,T) float32, 0 off the mask; `after` (B,) is V after the last token."""

    logprobs: Tensor
    values: Tensor | None
    after: Tensor | None
    entropy: Tensor | None


@dataclass
class Policy:
    """A causal language model that is trained, the values on it, and the reference it may not leave far behind.

    Attributes:
        model: the language model, with adapters when `reference` is None.
        tokenizer: with a pad token distinct from EOS.
        value_head: d -> 1, float32 (`models.critic`); None for a policy that is only sampled and read.
        value_trunk: a model of its own under the value head, or None for the policy's trunk.
        reference: a frozen copy, or None: the policy with its adapters disabled.
        banned: ids that are never sampled; their logit is −inf in every log-probability.
        temperature: divides the logits in sampling and in every log-probability.
        remainders: the lower halves of the float32 masters of weights that learn in 16 bit (`models.masters`).
        weights: how they are kept, whole or in parts (`models.sharded`).
        plain: whether the logits are the output layer's as they come, so that they can be computed in blocks.
        shares: whether a prompt with several responses is read once (`models.prefix`).
    """

    model: Any
    tokenizer: Any
    banned: list[int]
    value_head: nn.Linear | None = None
    value_trunk: Any | None = None
    reference: Any | None = None
    temperature: float = 1.0
    remainders: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)
    plain: bool = field(init=False)
    shares: bool = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.model is not None and plain_head(self.model)
        self.shares = self.plain and can_share(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def trainable(self) -> list[nn.Parameter]:
        """Return every parameter that learns: adapters or all weights, the value trunk's, the value head's."""
        modules = [m for m in (self.model, self.value_head, self.value_trunk) if m is not None]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def learning(self) -> list[nn.Parameter]:
        """Return what the optimizer steps in this process for each of `trainable`: it, or this process's part."""
        return self.weights.local_parameters(self.trainable())

    def shard(self, again: bool, end: Callable[[str], None]) -> None:
        """Have each process keep a part of every weight but the value head's; as `models.sharded.Sharded`."""
        models = [m for m in (self.model, self.value_trunk, self.reference) if m is not None]
        self.weights = Sharded(models, self.trainable(), self.remainders, again, end)

    def make_whole(self) -> None:
        """Have the model's weights whole in the main process, to be saved; nothing is learned after."""
        self.weights.unshard_for_saving(self.model, self.remainders)

    def allowed(self, logits: Tensor) -> Tensor:
        """Return float32 logits (…,V) over the temperature, −inf on banned ids: the one distribution of all passes."""
        logits = logits.float() if self.temperature == 1.0 else logits.float() / self.temperature
        return logits.index_fill(-1, torch.tensor(self.banned, device=logits.device), -torch.inf)

    def forward(self, rollouts: Rollouts, *, values: bool = True, entropy: bool = False) -> Outputs:
        """Return log-probabilities, values and entropy of `rollouts` in one forward of the policy (and value trunk)."""
        logprobs, spread, hidden = self.read(self.model, rollouts, entropy)
        if not values or self.value_head is None:
            return Outputs(logprobs, None, None, spread)
        before, after = self.values(rollouts, hidden if self.value_trunk is None else None)
        return Outputs(logprobs, before, after, spread)

    def values(self, rollouts: Rollouts, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return V before each response token (B,T), 0 off the mask, and after the last one (B,).

        Args:
            states: (B,T+1,d) under the value head; None computes them, in a forward of the value trunk.
        """
        assert self.value_head is not None
        states = trunk_states(self.value_trunk, rollouts, self.shared(rollouts)) if states is None else states
        everywhere = self.value_head(states.float()).squeeze(-1)  # (B,T+1)
        after = everywhere.gather(1, (last_index(rollouts.valid) + 1)[:, None]).squeeze(1)
        return torch.where(rollouts.mask, everywhere[:, :-1], 0.0), after

    @torch.no_grad()
    def reference_logprobs(self, rollouts: Rollouts) -> Tensor:
        """Return log π_ref of the sampled tokens, (B,T) float32, 0 off the mask: one forward of the reference."""
        with self.as_reference() as model:
            return self.read(model, rollouts, entropy=False)[0]

    def read(self, model: Any, rollouts: Rollouts, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (log-probabilities (B,T), entropies (B,T) or None, states (B,T+1,d)) under `model`, one forward.

        Where the model's logits are its output layer's alone, they are computed at the
        sampled tokens only, a block at a time; else (a soft cap, a scale) as the model computes them.
        """
        if not self.plain:
            logits, hidden = response_logits(model, rollouts)
            logits = self.allowed(logits[:, :-1])
            with torch.no_grad():
                spread = torch.where(rollouts.mask, entropy_of(logits), 0.0) if entropy else None
            return chosen_logprobs(logits, rollouts), spread, hidden
        hidden = response_states(model, rollouts, self.shared(rollouts))
        head, mask = model.get_output_embeddings(), rollouts.mask
        rows, columns = mask.nonzero(as_tuple=True)
        index = rows * hidden.shape[1] + columns
        states = hidden.flatten(0, 1).index_select(0, index)
        banned = torch.tensor(self.banned, device=states.device)
        bias = getattr(head, "bias", None)
        chosen, spread = token_logprobs(
            states, head.weight, bias, rollouts.response_ids[mask], banned, self.temperature, entropy
        )
        logprobs = chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)
        return logprobs, None if spread is None else spread.new_zeros(mask.shape).masked_scatter(mask, spread), hidden

    def shared(self, rollouts: Rollouts) -> Shared | None:
        """Return the distinct prompts of `rollouts` where reading each once is possible and pays.

        Not where every process must make as many forwards: whether it pays depends on a process's rows.
        """
        return shared_prompts(rollouts) if self.shares and not self.weights.layerwise else None

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Have every row read whole inside, in one forward, for those who monitor it (attention rows)."""
        before, self.shares = self.shares, False
        try:
            yield
        finally:
            self.shares = before

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """Give the reference model: the frozen copy, or the policy with its adapters disabled."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.disable_adapter():
                yield self.model


def response_logits(model: Any, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return logits (B,T+1,V) and the states under them (B,T+1,d): entry t is *before* response token t.

    The logits are computed at response positions only. The states are caught at the input of the output layer, so
    that they are what the model itself reads, on any architecture.
    """
    length = rollouts.response_ids.shape[1]
    with contiguous_head(model) as caught:
        logits = model(**inputs_of(rollouts), use_cache=False, logits_to_keep=length + 1).logits
    return logits[:, -length - 1 :], caught[-1][:, -length - 1 :]


def response_states(model: Any, rollouts: Rollouts, shared: Shared | None = None) -> Tensor:
    """Return the states under the output layer, (B,T+1,d), without its logits: entry t is before response token t.

    With `shared` each distinct prompt is read once.
    """

    def run(keep: int, **inputs: Any) -> Tensor:
        with contiguous_head(model, first_only=True) as caught:
            model(**inputs, logits_to_keep=keep)
        return caught[-1][:, -keep:]

    if shared is not None:
        return states_behind(run, rollouts, shared)
    return run(rollouts.response_ids.shape[1] + 1, **inputs_of(rollouts), use_cache=False)


@torch.no_grad()
def plain_head(model: Any) -> bool:
    """Whether the model's logits are its output layer's as they come, neither capped nor scaled: it is tried out."""
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        return False
    with contiguous_head(model) as caught:
        logits = model(input_ids=torch.tensor([[1, 2]], device=head.weight.device), use_cache=False).logits
    return torch.equal(logits, torch.nn.functional.linear(caught[-1], head.weight, getattr(head, "bias", None)))


@contextlib.contextmanager
def contiguous_head(model: Any, *, first_only: bool = False) -> Iterator[list[Tensor]]:
    """Make the output layer's input contiguous, and catch it: a strided one is multiplied through a copy of the
    whole output matrix, which costs more than the rest of the forward on a CPU. With `first_only` the layer itself
    computes one position, for a caller who wants what is caught."""
    caught: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0].contiguous())
        return (caught[-1][:, :1].detach() if first_only else caught[-1], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


def trunk_states(trunk: Any, rollouts: Rollouts, shared: Shared | None = None) -> Tensor:
    """Return the last states (B,T+1,d) of a model without a head, as `response_states` does."""

    def run(keep: int, **inputs: Any) -> Tensor:
        states: Tensor = trunk(**inputs).last_hidden_state
        return states[:, -keep:]

    if shared is not None:
        return states_behind(run, rollouts, shared)
    return run(rollouts.response_ids.shape[1] + 1, **inputs_of(rollouts), use_cache=False)


def inputs_of(rollouts: Rollouts) -> dict[str, Tensor]:
    """Return ids, mask and positions (B,P+T) of prompt and response together; positions count real tokens from 0."""
    mask = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1)
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}


def chosen_logprobs(logits: Tensor, rollouts: Rollouts) -> Tensor:
    """Return log-probabilities of the sampled tokens (B,T) from logits (B,T,V), 0 off the mask, no full softmax."""
    chosen = logits.gather(-1, rollouts.response_ids[..., None]).squeeze(-1)
    # off the mask the pad's logit is −inf: replace it before the subtraction, so that no gradient is NaN
    chosen = torch.where(rollouts.mask, chosen, 0.0)
    return torch.where(rollouts.mask, chosen - logits.logsumexp(dim=-1), 0.0)


def load_policy(
    name: str,
    *,
    lora: LoraConfig,
    max_length: int,
    dtype: str = "auto",
    device: str = "auto",
    pad_token: str | None = None,
    stop: str = "eos",
    temperature: float = 1.0,
    values: ValueStart | None = None,
) -> Policy:
    """Return a policy to train: float32 adapters over a 16-bit base, or all weights with a frozen copy as reference.

    Where all weights learn in 16 bit, each has a float32 master (`models.master_weights`).

    Args:
        name: `smollm2`, a folder, or a hub id. pad_token: as `load_tokenizer` takes it.
        lora: adapters; rank 0 trains all weights.
        max_length: the most tokens of a prompt and its response, by which the attention kernel is chosen.
        dtype, device: as `pick_dtype` and `pick_device` take them.
        stop: "eos", or "length" where EOS is never sampled.
        values: how values are initialised; None for a head at zero on the policy's trunk.

    Raises:
        ModelError, ConfigError: as the loaders, `add_adapter` and `make_trunk` do.
    """
    folder, where = locate("policy", name), pick_device(device)
    tokenizer = load_tokenizer("policy", folder, pad_token)
    banned = banned_ids(tokenizer, stop)
    compute, values = pick_dtype(dtype, where), values or ValueStart()
    adapters = lora.rank > 0
    model: Any = load_causal("policy", folder, compute if adapters else torch.float32, where)
    quick_attention(model, where, max_length)
    model.requires_grad_(not adapters)
    reference = None if adapters else copy.deepcopy(model).requires_grad_(False).to(compute)
    trunk = make_trunk(model, values, lora, max_length)
    if adapters:
        model = add_adapter(model, lora).eval()
    head = make_head(model, values)
    remainders = to_sixteen_bit(model, trunk) if not adapters and compute == torch.bfloat16 else {}
    return Policy(model, tokenizer, banned, head, trunk, reference, temperature, remainders)


def banned_ids(tokenizer: Any, stop: str) -> list[int]:
    """Return the ids that are never sampled: the pad token, and EOS too when every response has a fixed length.

    Raises:
        ModelError: responses end at EOS and the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        if stop == "eos":
            fix = "Set eos_token in its tokenizer_config.json, or use --sampling.stop length."
            raise ModelError("policy's tokenizer", "no EOS token", "one, as sampling.stop is eos", fix)
        return [tokenizer.pad_token_id]
    return [tokenizer.pad_token_id] + ([tokenizer.eos_token_id] if stop == "length" else [])
