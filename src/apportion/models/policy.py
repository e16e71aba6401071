"""The policy with its values and its reference: log-probabilities, values and entropy in one forward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.batching import at_places, without_holes
from apportion.config.sections import LoraConfig
from apportion.distributed.sharding import Sharded, Weights
from apportion.losses import entropy_of
from apportion.masking import last_index
from apportion.models.families import OTHERS, check_family, forward_errors, freeze_other_parts
from apportion.models.fast.onednn import linear
from apportion.models.fast.token_logprobs import token_logprobs
from apportion.models.loading import load_causal, locate, pick_device, pick_dtype, use_fastest_attention
from apportion.models.lora import add_adapter
from apportion.models.master_weights import to_sixteen_bit
from apportion.models.shared_prompt import Run, Shared, can_share, has_past, shared_prompts, states_after_shared_prompts
from apportion.models.tokenizers import banned_ids, load_tokenizer, needed_rows, pad_id, policy_ends
from apportion.models.value_head import ValueStart, make_head, make_trunk
from apportion.types import Rollouts


class Outputs(NamedTuple):
    """The results of one forward: (B,T) float32, 0 off the mask; `after` (B,) is V after the last token."""

    logprobs: Tensor
    values: Tensor | None
    after: Tensor | None
    entropy: Tensor | None


@dataclass
class Policy:
    """A trained causal language model, its value head, and its reference.

    Attributes:
        model: the language model, with adapters when `reference` is None.
        tokenizer: masks mark padding, so its pad token may be one that ends texts.
        value_head: d -> 1, float32 (`models.value_head`); None for a policy without values.
        value_trunk: a separate model under the value head, or None for the policy's trunk.
        reference: a frozen copy, or None: the policy with its adapters disabled.
        banned: ids that are never sampled; their logit is −inf in every log-probability.
        ends: ids that end a response where `sampling.stop` is eos; the tokenizer's EOS where none is given.
        temperature: divides the logits in sampling and in every log-probability.
        remainders: the lower halves of the float32 masters of weights that learn in 16 bit (`models.master_weights`).
        weights: how they are stored, replicated or sharded (`distributed.sharding`).
        decoding: how a class of models is sampled from, once it was tried (`generation.decoding`).
        plain: whether the logits are the output layer's own, so that they can be computed in blocks.
        shares: whether a prompt with several responses is computed once (`models.shared_prompt`).
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
    ends: tuple[int, ...] = ()
    decoding: dict[str, Any] = field(default_factory=dict, init=False)
    plain: bool = field(init=False)
    shares: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.model is not None:
            check_family("policy", type(self.model).__name__, self.model.config)
        with forward_errors("policy", self.model, "compute two tokens of text", "a causal language model", OTHERS):
            self.plain = self.model is not None and plain_head(self.model)
            self.shares = self.plain and has_past(self.model) and can_share(self.model)
        if not self.ends and self.tokenizer.eos_token_id is not None:
            self.ends = (self.tokenizer.eos_token_id,)

    @property
    def pad(self) -> int:
        """The id that fills masked places."""
        return pad_id(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def trainable(self) -> list[nn.Parameter]:
        """Return every trained parameter: adapters or all weights, the value trunk's, the value head's."""
        modules = [m for m in (self.model, self.value_head, self.value_trunk) if m is not None]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def learning(self) -> list[nn.Parameter]:
        """Return what the optimizer of this process steps for each of `trainable`: it, or this process's shard."""
        return self.weights.local_parameters(self.trainable())

    def shard(self, again: bool, end: Callable[[str], None]) -> None:
        """Shard every weight but the value head's over the processes; see `distributed.sharding.Sharded`."""
        models = [m for m in (self.model, self.value_trunk, self.reference) if m is not None]
        self.weights = Sharded(models, self.trainable(), self.remainders, again, end)

    def make_whole(self) -> None:
        """Gather the model's weights in the main process for saving; it is not trained after that."""
        self.weights.unshard_for_saving(self.model, self.remainders)

    def allowed(self, logits: Tensor) -> Tensor:
        """Return float32 logits (…,V) over the temperature, −inf on banned ids: the distribution of every pass."""
        logits = logits.float() if self.temperature == 1.0 else logits.float() / self.temperature
        return logits.index_fill(-1, torch.tensor(self.banned, dtype=torch.int64, device=logits.device), -torch.inf)

    def forward(self, rollouts: Rollouts, *, values: bool = True, entropy: bool = False) -> Outputs:
        """Return log-probabilities, values and entropy of `rollouts` in one forward of the policy (and value trunk)."""
        logprobs, entropies, hidden = self.score_tokens(self.model, rollouts, entropy)
        if not values or self.value_head is None:
            return Outputs(logprobs, None, None, entropies)
        before, after = self.values(rollouts, hidden if self.value_trunk is None else None)
        return Outputs(logprobs, before, after, entropies)

    def values(self, rollouts: Rollouts, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return V before each response token (B,T), 0 off the mask, and after the last one (B,).

        Args:
            states: (B,T+1,d) under the value head; None computes them in a forward of the value trunk.
        """
        assert self.value_head is not None
        states = trunk_states(self.value_trunk, rollouts, self.shared_prompts(rollouts)) if states is None else states
        all_values = self.value_head(states.float()).squeeze(-1)  # (B,T+1)
        after = all_values.gather(1, (last_index(rollouts.valid) + 1)[:, None]).squeeze(1)
        return torch.where(rollouts.mask, all_values[:, :-1], 0.0), after

    @torch.no_grad()
    def reference_logprobs(self, rollouts: Rollouts) -> Tensor:
        """Return log π_ref of the sampled tokens, (B,T) float32, 0 off the mask: one forward of the reference."""
        with self.as_reference() as model:
            return self.score_tokens(model, rollouts, entropy=False)[0]

    def score_tokens(self, model: Any, rollouts: Rollouts, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (log-probabilities (B,T), entropies (B,T) or None, states (B,T+1,d)) under `model`, one forward.

        Where the model's logits are its output layer's own, they are computed at the sampled tokens only, a block at a
        time; else (a soft cap, a scale) by the model.
        """
        if not self.plain:
            logits, hidden = response_logits(model, rollouts)
            logits = self.allowed(logits[:, :-1])
            with torch.no_grad():
                entropies = torch.where(rollouts.mask, entropy_of(logits), 0.0) if entropy else None
            return chosen_logprobs(logits, rollouts), entropies, hidden
        hidden = response_states(model, rollouts, self.shared_prompts(rollouts))
        head, mask = model.get_output_embeddings(), rollouts.mask
        rows, columns = mask.nonzero(as_tuple=True)
        index = rows * hidden.shape[1] + columns
        states = hidden.flatten(0, 1).index_select(0, index)
        banned = torch.tensor(self.banned, dtype=torch.int64, device=states.device)
        bias = getattr(head, "bias", None)
        chosen, entropies = token_logprobs(
            states, head.weight, bias, rollouts.response_ids[mask], banned, self.temperature, entropy
        )
        logprobs = chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)
        if entropies is not None:
            entropies = entropies.new_zeros(mask.shape).masked_scatter(mask, entropies)
        return logprobs, entropies, hidden

    def shared_prompts(self, rollouts: Rollouts) -> Shared | None:
        """Return the distinct prompts of `rollouts` where computing each once is possible and saves time.

        None where all processes must run equally many forwards: whether it saves time depends on a process's rows.
        """
        return shared_prompts(rollouts) if self.shares and not self.weights.layerwise else None

    @contextlib.contextmanager
    def without_shared_prompts(self) -> Iterator[None]:
        """Compute prompt and response of every row in one forward within the block, to capture its attention."""
        before, self.shares = self.shares, False
        try:
            yield
        finally:
            self.shares = before

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """Yield the reference model: the frozen copy, or the policy with its adapters disabled."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.disable_adapter():
                yield self.model


def response_logits(model: Any, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return logits (B,T+1,V) and the states under them (B,T+1,d): entry t is *before* response token t.

    The logits are computed at response positions only. The states are captured at the input of the output layer, so
    that they are the model's own on any architecture.
    """
    length = rollouts.response_ids.shape[1]
    rollouts, places = without_holes(rollouts)
    with contiguous_head(model) as captured:
        logits = model(**inputs_of(rollouts), use_cache=False, logits_to_keep=length + 1).logits
    return at_places(logits[:, -length - 1 :], places), at_places(captured[-1][:, -length - 1 :], places)


def response_states(model: Any, rollouts: Rollouts, shared: Shared | None = None) -> Tensor:
    """Return the states under the output layer, (B,T+1,d), without its logits: entry t is before response token t.

    With `shared` each distinct prompt is computed once.
    """

    def run(keep: int, **inputs: Any) -> Tensor:
        with contiguous_head(model, first_only=True) as captured:
            model(**inputs, logits_to_keep=keep)
        return captured[-1][:, -keep:]

    return _states(run, rollouts, shared)


@torch.no_grad()
def plain_head(model: Any) -> bool:
    """Whether the model's logits are its output layer's own, neither capped nor scaled, by a forward of two tokens."""
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        return False
    with contiguous_head(model) as captured:
        logits = model(input_ids=torch.tensor([[1, 2]], device=head.weight.device), use_cache=False).logits
    logits, states, bias = logits.flatten(0, -2), captured[-1].flatten(0, -2), getattr(head, "bias", None)
    return any(torch.equal(logits, multiply(states, head.weight, bias)) for multiply in (functional.linear, linear))


@contextlib.contextmanager
def contiguous_head(model: Any, *, first_only: bool = False) -> Iterator[list[Tensor]]:
    """Make the output layer's input contiguous, and yield a list that receives it: a strided input would be multiplied
    with a copy of the output matrix, which costs more than the rest of the forward on a CPU. With `first_only` the
    layer computes one position, for a caller who needs only its input."""
    captured: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(args[0].contiguous())
        return (captured[-1][:, :1].detach() if first_only else captured[-1], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


def trunk_states(trunk: Any, rollouts: Rollouts, shared: Shared | None = None) -> Tensor:
    """Return the last states (B,T+1,d) of a model without a head, as `response_states` does.

    A pad token that was added to the policy has no embedding in a trunk that began as the reward model: such pads are
    written with id 0, which nothing attends to.
    """

    def run(keep: int, **inputs: Any) -> Tensor:
        states: Tensor = trunk(**inputs).last_hidden_state
        return states[:, -keep:]

    count = len(trunk.get_input_embeddings().weight)
    prompts, responses = rollouts.prompt_ids, rollouts.response_ids
    prompts = prompts.masked_fill(~rollouts.prompt_mask & (prompts >= count), 0)
    responses = responses.masked_fill(~rollouts.valid & (responses >= count), 0)
    return _states(run, replace(rollouts, prompt_ids=prompts, response_ids=responses), shared)


def _states(run: Run, rollouts: Rollouts, shared: Shared | None) -> Tensor:
    """Return the states (B,T+1,d) of one forward that `run` does, or of two where prompts are shared."""
    rollouts, places = without_holes(rollouts)
    if shared is not None:
        return at_places(states_after_shared_prompts(run, rollouts, shared), places)
    return at_places(run(rollouts.response_ids.shape[1] + 1, **inputs_of(rollouts), use_cache=False), places)


def inputs_of(rollouts: Rollouts) -> dict[str, Tensor]:
    """Return ids, mask and positions (B,P+T) of prompt and response together; positions count real tokens from 0."""
    mask = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1)
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}


def chosen_logprobs(logits: Tensor, rollouts: Rollouts) -> Tensor:
    """Return log-probabilities of the sampled tokens (B,T) from logits (B,T,V), 0 off the mask."""
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
    fast_kernels: bool = True,
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
        fast_kernels: compute with the equivalents of `models.fast`.

    Raises:
        ModelError, ConfigError: as the loaders, `add_adapter` and `make_trunk` do.
    """
    folder, where = locate("policy", name), pick_device(device)
    tokenizer = load_tokenizer("policy", folder, pad_token)
    ends = policy_ends(folder, tokenizer, stop)
    compute, values = pick_dtype(dtype, where), values or ValueStart()
    adapters = lora.rank > 0
    settings: dict[str, Any] = {"fast_kernels": fast_kernels, "rows": needed_rows(tokenizer, pad_token)}
    model: Any = load_causal("policy", folder, compute if adapters else torch.float32, where, **settings)
    banned = banned_ids(tokenizer, stop, ends, width_of(model))
    use_fastest_attention(model, where, max_length)
    model.requires_grad_(not adapters)
    freeze_other_parts(model)
    reference = None if adapters else copy.deepcopy(model).requires_grad_(False).to(compute)
    trunk = make_trunk(model, values, lora, max_length)
    if adapters:
        model = add_adapter(model, lora).eval()
    head = make_head(model, values)
    remainders = to_sixteen_bit(model, trunk) if not adapters and compute == torch.bfloat16 else {}
    return Policy(model, tokenizer, banned, head, trunk, reference, temperature, remainders, ends=ends)


def frozen_policy(
    field: str,
    folder: str,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    pad_token: str | None,
    stop: str,
    temperature: float,
    fast_kernels: bool = True,
) -> Policy:
    """Return the model in `folder` as a policy to sample from and to score with: no values, no reference, no adapters.

    Args: as `load_policy`; `tokenizer` is the folder's, from `load_tokenizer`.

    Raises:
        ModelError: as the loaders do.
    """
    ends = policy_ends(folder, tokenizer, stop)
    rows = needed_rows(tokenizer, pad_token)
    model: Any = load_causal(field, folder, dtype, device, fast_kernels=fast_kernels, rows=rows)
    banned = banned_ids(tokenizer, stop, ends, width_of(model))
    return Policy(model, tokenizer, banned, temperature=temperature, ends=ends)


def width_of(model: Any) -> int:
    """Return the number of the model's logits."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return int(model.config.get_text_config().vocab_size) if weight is None else int(weight.shape[0])
