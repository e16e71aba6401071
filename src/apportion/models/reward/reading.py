"""How a classifier reads a text, found out by running it on a few tokens: causality, where its score is read, padding.

No attribute of a model says reliably whether it is a decoder, which position its score is read at, or whether a padded
row scores as the row alone. Two forwards of a few tokens do.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apportion.models.families import bare, forward_errors
from apportion.models.stored_head import head_of
from apportion.models.text.render import embedding_count, position_limit
from apportion.system.memory import is_out_of_memory

LENGTH, PADS = 8, 3  # tokens of the text that is tried, and pads beside it
# largest difference, relative to the largest logit, that is rounding; a wrong position or visible padding is far above
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6}
COARSE = 0.1  # of 16-bit models
UNSEEN = {torch.float32: 1e-5, torch.float64: 1e-9}  # the same for states that a later token must not change
UNSEEN_16_BIT = 5e-3
FIX = "Use a classifier whose score depends on the text's tokens alone."


class Reading(NamedTuple):
    """How a classifier reads a batch.

    Attributes:
        causal: no state depends on a later token.
        place: where its score is read: the "first" or the "last" token, or "pooled" over several (or unknown).
        batched: a padded row scores as the row alone; where it does not, rows are read one at a time.
        position_ids: positions are passed, counted over real tokens (left padding needs them).
        skips_pads: ids equal to `pad_token_id` at the end of a text are skipped: the score is read before them.
        token_scores: the head is applied at every position, so that one forward scores every prefix.
    """

    causal: bool
    place: str
    batched: bool
    position_ids: bool
    skips_pads: bool
    token_scores: bool

    @property
    def decoder(self) -> bool:
        """Whether it reads as a decoder does: causal, its score at the last token."""
        return self.causal and self.place == "last"


def read_model(model: Any, field: str = "reward_model") -> Reading:
    """Return how the classifier `model` reads, by two forwards of at most `LENGTH` + `PADS` tokens; uses no randomness.

    Raises:
        ModelError: it cannot score a few tokens at all.
    """
    expected = "a sequence classifier that scores any text"
    with forward_errors(field, bare(model), f"score {LENGTH} tokens", expected, FIX), torch.enable_grad():
        return _read(model)


def _read(model: Any) -> Reading:
    tokens, pad = _tokens(model), own_pad(model)
    rows = _tried_rows(model, tokens, pad)
    logits, states, scored = _watched(model, rows)
    if states is None or not bool(torch.isfinite(states).all() and torch.isfinite(logits).all()):
        causal = declared_causal(model)  # nothing to compare, or no score that may be used
        unknown = "pooled" if states is None else "last" if causal else "first"
        return Reading(causal, unknown, states is not None, causal, True, scored is not None and scored.dim() == 3)
    causal = len(rows) > 1 and _is_causal(states)
    places, logits = _places(logits, states), logits.detach()
    place, length = _place(places, rows.shape[1], causal), rows.shape[1]
    reads_pad = pad is not None and places is not None and len(places) == 3 and places[-1] == [length - 1]
    ways = (True, False) if causal else (False,)  # a decoder is also padded on the left, which needs positions
    way = next((one for one in ways if _reads_padded(model, rows, logits, causal, one)), None)
    at_last = scored is not None and scored.dim() == 3 and scored.shape[:2] == rows.shape
    token_scores = causal and place == "last" and at_last and torch.equal(scored[0, -1], logits[0])  # type: ignore[index]
    return Reading(causal, place, way is not None, bool(way), not (place == "last" and reads_pad), token_scores)


def _tried_rows(model: Any, tokens: list[int], pad: int | None) -> Tensor:
    """Return ids (n,LENGTH): a text, the same with another last token, and the same with a pad id as its last token."""
    length = len(tokens) - PADS
    text = tokens[:length]
    if _has_decoder(model):  # it may read its score at EOS
        end = _ids_of(model, "eos_token_id")
        rows = [[*text[:-1], *end[:1]]] if end else [text]
    else:
        rows = [text, [*text[:-1], tokens[-1]]]
        rows += [[*text[:-1], pad]] if pad is not None else []
    return torch.tensor(rows, device=next(model.parameters()).device)


def _watched(model: Any, ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (logits, last states (n,K,d) or None, the head's own output or None) of one forward, with a graph."""
    seen: dict[str, Any] = {}

    def keep_states(module: nn.Module, args: Any, output: Any) -> None:
        found = getattr(output, "last_hidden_state", None)
        found = output[0] if found is None and isinstance(output, tuple) else found
        seen["states"] = found if isinstance(found, Tensor) and found.shape[:2] == ids.shape else None

    def keep_scores(module: nn.Module, args: Any, output: Any) -> None:
        seen["scores"] = output.detach() if isinstance(output, Tensor) else None

    handles = [bare(model).base_model.register_forward_hook(keep_states)]
    head = head_of(model)
    if head is not None:
        handles.append(head.register_forward_hook(keep_scores))
    try:
        with _learning(model), pad_set_to(model, _unused(model, ids)):
            logits = model(**inputs_of(model, ids, torch.ones_like(ids, dtype=torch.bool))).logits
    finally:
        for handle in handles:
            handle.remove()
    states = seen.get("states")
    return logits, states if states is not None and states.requires_grad else None, seen.get("scores")


def _is_causal(states: Tensor) -> bool:
    """Whether states (n,K,d) of two texts that differ only in their last token are equal before it."""
    before = states.detach()[:2, :-1].float()
    change = float((before[0] - before[1]).abs().max())
    return change <= UNSEEN.get(states.dtype, UNSEEN_16_BIT) * float(before.abs().max())


def _places(logits: Tensor, states: Tensor) -> list[list[int]] | None:
    """Return the positions of each text whose last state its score depends on; None where that is not known."""
    weights = torch.linspace(1.0, 1.7, logits.shape[-1], device=logits.device)  # labels may be opposites
    (gradient,) = torch.autograd.grad((logits.float() * weights).sum(), states, allow_unused=True)
    if gradient is None:
        return None
    return [row.nonzero()[:, 0].tolist() for row in (gradient != 0).any(dim=-1)]


def _place(places: list[list[int]] | None, length: int, causal: bool) -> str:
    if places is None:
        return "pooled"
    if not places[0]:  # a head of zeros depends on nothing
        return "last" if causal else "first"
    return {0: "first", length - 1: "last"}.get(places[0][0], "pooled") if len(places[0]) == 1 else "pooled"


@torch.no_grad()
def _reads_padded(model: Any, rows: Tensor, alone: Tensor, causal: bool, position_ids: bool) -> bool:
    """Whether the text rows[0] scores as `alone[0]` when padded: on the right, and a decoder on the left too.

    `alone` (n,labels) are the logits of all rows: one near 0 is the difference of large numbers, and says nothing of
    how large rounding is; the largest of several texts does.
    """
    text, length = rows[0].tolist(), rows.shape[1]
    fill = fill_id(model, rows, torch.ones_like(rows, dtype=torch.bool)) or 0
    padded, real = [text + [fill] * PADS], [[True] * length + [False] * PADS]
    if causal:
        padded, real = [*padded, [fill] * PADS + text], [*real, [False] * PADS + [True] * length]
    count = len(padded)
    if not _has_decoder(model):  # a row that fills the batch, so that no column is padding in every row
        padded, real = [*padded, rows[-1].tolist() + (text * PADS)[:PADS]], [*real, [True] * (length + PADS)]
    ids, mask = (torch.tensor(values, device=rows.device) for values in (padded, real))
    try:
        with pad_set_to(model, fill):
            logits = model(**inputs_of(model, ids, mask, position_ids)).logits.float()
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    largest = float(torch.cat([logits, alone.float()]).abs().max())
    return bool((logits[:count] - alone[0].float()).abs().max() <= ROUNDING.get(alone.dtype, COARSE) * largest)


def inputs_of(model: Any, ids: Tensor, mask: Tensor, position_ids: bool = False) -> dict[str, Tensor]:
    """Return the keyword arguments of a forward of ids and mask, both (B,K), with pads filled in already."""
    inputs = {"input_ids": ids}
    if _accepts(model, "attention_mask"):  # FNet has none
        inputs["attention_mask"] = mask.long()
    if position_ids:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return inputs


def own_pad(model: Any) -> int | None:
    """Return the id that the model's configuration names for padding, or None where it names no id of its own."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < embedding_count(model) else None


@contextmanager
def pad_set_to(model: Any, pad: int | None) -> Iterator[None]:
    """Set the configuration's pad id inside the block, where the model has none of its own; None changes nothing.

    A classifier then reads the last token of each row, as it does for one text: `pad` occurs in no row.
    """
    if pad is None or own_pad(model) is not None:
        yield
        return
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    before = {key: getattr(config, "pad_token_id", None) for key, config in configs.items()}
    try:
        for config in configs.values():
            config.pad_token_id = pad
        yield
    finally:
        for key, config in configs.items():
            config.pad_token_id = before[key]


def fill_id(model: Any, ids: Tensor, mask: Tensor) -> int | None:
    """Return the id to write on pads: the model's own, else one that no row of ids (B,K) has on mask (B,K).

    None where every id occurs.
    """
    own = own_pad(model)
    return _unused(model, ids[mask]) if own is None else own


def _unused(model: Any, ids: Tensor) -> int | None:
    if own_pad(model) is not None:
        return None
    free = torch.ones(embedding_count(model), dtype=torch.bool, device=ids.device)
    free[ids[ids < len(free)]] = False  # an id without an embedding is refused by name where it is read
    return int(free.int().argmax()) if bool(free.any()) else None


def declared_causal(model: Any) -> bool:
    """Whether the model's attention modules say that they are causal; only where running it tells nothing."""
    causal = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    return bool(causal[-1]) if causal else True


@contextmanager
def _learning(model: Any) -> Iterator[None]:
    """Let every weight have a gradient inside the block, so that the forward keeps a graph."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _accepts(model: Any, name: str) -> bool:
    parameters = inspect.signature(bare(model).forward).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _has_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _ids_of(model: Any, name: str) -> list[int]:
    value = getattr(model.config.get_text_config(), name, None)
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, int)]


def _tokens(model: Any) -> list[int]:
    """Return ids to try: those of the text, and `PADS` more; none of them special, as far as the model has enough."""
    count, limit = embedding_count(model), position_limit(model)
    length = max(2, LENGTH if limit is None else min(LENGTH, limit - PADS)) + PADS
    names = [name for name in vars(model.config.get_text_config()) if name.endswith("token_id")]
    special = {i for name in names for i in _ids_of(model, name)}
    ordinary = [i for i in range(count) if i not in special] or list(range(count))
    return [ordinary[(i + 1) * len(ordinary) // (length + 1) % len(ordinary)] for i in range(length)]
