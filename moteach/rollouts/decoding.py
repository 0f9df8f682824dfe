"""The generation loop of one batch: prefill once, then one forward per token with a key/value cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from moteach.rollouts.sampling import is_any_of, pick_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Completions of one batch as right-padded tensors."""

    tokens: Int[Tensor, "batch token"]
    logprobs: Float[Tensor, "batch token"]
    lengths: Int[Tensor, " batch"]
    """Tokens written, the end-of-sequence token included."""
    finished: Bool[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSettings:
    """How tokens are drawn from logits and when a completion ends."""

    temperature: float
    top_p: float
    top_k: int
    eos_ids: tuple[int, ...]
    pad_id: int
    compact_at: float
    """Finished rows leave the batch when they are at least this share of it."""


def sharded_modules(model: nn.Module) -> list[Any]:
    """Lists the parts of a model whose weights FSDP shards over ranks."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def generation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd, sharded weights gathered once; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    sharded = sharded_modules(model)
    model.eval()
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        with torch.no_grad() if sharded else torch.inference_mode():
            yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
        for module in training:
            module.training = True


def _left_pad(
    prompts: Sequence[Sequence[int]], *, pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    width = max(len(ids) for ids in prompts)
    rows = [[pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
    starts = torch.tensor([width - len(ids) for ids in prompts], device=device)
    return torch.tensor(rows, device=device), torch.arange(width, device=device)[None, :] >= starts[:, None]


@runtime_checkable
class Forward(Protocol):
    """The two forwards of a causal language model that generation needs, and the cache between them."""

    def __call__(
        self,
        ids: Int[Tensor, "batch query"],
        mask: Bool[Tensor, "batch key"] | None,
        positions: Int[Tensor, "batch query"],
    ) -> Float[Tensor, "batch vocab"]:
        """Reads prompts, or then a token a row, and returns the logits after the last one; no mask: nothing is padded."""
        ...

    def take(self, rows: Int[Tensor, " row"]) -> None:
        """Makes these rows, repeats allowed, the batch of the cache."""
        ...


def forward_options(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Names the argument of a model that takes the cache, and its other options."""
    parameters = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True, "return_dict": True}
    if "logits_to_keep" in parameters:
        options["logits_to_keep"] = 1
    # transformers 5.2x renames the argument and warns about the old one at every call
    return "cache" if "cache" in parameters else "past_key_values", options


class EagerForward:
    """`Forward` as transformers has it."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache: Any = DynamicCache(config=model.config)
        name, self._options = forward_options(model)
        self._options[name] = self._cache

    def __call__(
        self,
        ids: Int[Tensor, "batch query"],
        mask: Bool[Tensor, "batch key"] | None,
        positions: Int[Tensor, "batch query"],
    ) -> Float[Tensor, "batch vocab"]:
        """Returns the logits after the last token."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **self._options,
        )
        logits: Tensor = output.logits
        return logits[:, -1]

    def take(self, rows: Int[Tensor, " row"]) -> None:
        """Makes these rows, repeats allowed, the batch of the cache."""
        self._cache.reorder_cache(rows)


def _forward(model: nn.Module, *, limit: int, compiled: bool) -> Forward:
    if not compiled:
        return EagerForward(model)
    from moteach.rollouts.compiled import CompiledForward

    return CompiledForward(model, limit=limit)


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    uniforms: Float64[Tensor, "batch token"],
    *,
    group_size: int,
    settings: SamplerSettings,
    compiled: bool = False,
) -> Decoded:
    """Completes prompts, `group_size` times each; a prompt is read once for its whole group.

    Args:
        model: Causal language model of transformers, in `generation_mode`.
        prompts: Token ids, any lengths.
        uniforms: Noise of each row and position; its width is the most tokens a completion may have. Rows are
            prompt-major.
        group_size: Completions per prompt.
        settings: How tokens are drawn.
        compiled: Use the forwards of `moteach.rollouts.compiled`; `check_compiled` must have let the model pass.
    """
    device = next(model.parameters()).device
    ids, mask = _left_pad(prompts, pad_id=settings.pad_id, device=device)
    uniforms = uniforms.to(device)
    rows, limit = uniforms.shape
    padded = compiled or not bool(mask.all())
    forward = _forward(model, limit=limit, compiled=compiled)
    logits = forward(ids, mask if padded else None, (mask.cumsum(dim=1) - 1).clamp_(min=0))
    positions = mask.sum(dim=1, keepdim=True)
    mask = torch.cat([mask, mask.new_ones(len(prompts), limit)], dim=1)
    if group_size > 1:
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        forward.take(repeat)
        logits, positions, mask = logits[repeat], positions[repeat], mask[repeat]

    tokens = torch.full((rows, limit), settings.pad_id, device=device)
    logprobs = torch.zeros((rows, limit), device=device)
    eos = torch.tensor(settings.eos_ids, dtype=torch.long, device=device)
    live = torch.arange(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for position in range(limit):
        chosen, chosen_logprobs = pick_tokens(
            logits,
            uniforms[live, position],
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
        )
        # A finished row that is still in the batch goes on writing: `_trim` cuts at its first end-of-sequence.
        tokens[live, position] = chosen
        logprobs[live, position] = chosen_logprobs.float()
        done = done | is_any_of(chosen, eos)
        count = int(done.sum())
        if count == len(live) or position + 1 == limit:
            break
        if count >= settings.compact_at * len(live):
            keep = (~done).nonzero()[:, 0]
            forward.take(keep)
            live, done, chosen, positions, mask = live[keep], done[keep], chosen[keep], positions[keep], mask[keep]
        seen = ids.shape[1] + position + 1
        logits = forward(chosen[:, None], mask[:, :seen] if padded else None, positions + position)
    return _trim(tokens, logprobs, eos)


def _trim(
    tokens: Int[Tensor, "batch token"], logprobs: Float[Tensor, "batch token"], eos: Int[Tensor, " ids"]
) -> Decoded:
    ends = is_any_of(tokens, eos)
    finished = ends.any(dim=1)
    lengths = torch.where(finished, ends.int().argmax(dim=1) + 1, tokens.shape[1])
    return Decoded(tokens=tokens, logprobs=logprobs, lengths=lengths, finished=finished)
