"""Logprobs of given tokens straight from hidden states, a chunk at a time: the sampled-token half of the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moteach.divergences.projection import HeadGradient, project, through_softcap
from moteach.errors import ConfigError
from moteach.types import Head


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Logprob of each given token and the entropy of the distribution it was read from."""

    logprobs: Float[Tensor, " packed"]
    """Differentiable."""
    entropy: Float[Tensor, " packed"]
    """Nats, detached."""


def chunked_token_logprobs(
    hidden: Float[Tensor, "packed hidden"],
    head: Head,
    targets: Int[Tensor, " packed"],
    *,
    chunk_size: int,
    temperature: float = 1.0,
) -> Float[Tensor, " packed"]:
    """Computes log p(target) = logit_target / T - logsumexp(logits / T) without keeping any `[packed, vocab]` tensor.

    Differentiable in `hidden`, `head.weight` and `head.bias`: backward projects each chunk again and uses
    d log p(y) / d logits = (onehot(y) - p) / T. Under `torch.no_grad()` it is the scorer of teachers.

    Args:
        hidden: States that predict the tokens.
        head: The head of the model that made them.
        targets: Token ids.
        chunk_size: Tokens projected at once.
        temperature: Divides the logits.

    Returns:
        Logprobs in nats, float32 or float64.

    Raises:
        ConfigError: `chunk_size` or `temperature` is not positive.
    """
    return _apply(hidden, head, targets, chunk_size, temperature, False)[0]


def chunked_token_stats(
    hidden: Float[Tensor, "packed hidden"],
    head: Head,
    targets: Int[Tensor, " packed"],
    *,
    chunk_size: int,
    temperature: float = 1.0,
) -> TokenLogprobs:
    """Computes `chunked_token_logprobs` together with the entropy of each distribution, in the same pass.

    Args:
        hidden: States that predict the tokens.
        head: The head of the model that made them.
        targets: Token ids.
        chunk_size: Tokens projected at once.
        temperature: Divides the logits.

    Returns:
        Logprobs, differentiable, and entropies, detached.

    Raises:
        ConfigError: `chunk_size` or `temperature` is not positive.
    """
    logprobs, entropy = _apply(hidden, head, targets, chunk_size, temperature, True)
    return TokenLogprobs(logprobs=logprobs, entropy=entropy)


def _apply(
    hidden: Tensor, head: Head, targets: Tensor, chunk_size: int, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    if chunk_size < 1:
        raise ConfigError(f"expected chunk_size >= 1, got {chunk_size}; it is the number of tokens projected at once")
    if not temperature > 0.0:
        raise ConfigError(f"expected temperature > 0, got {temperature}; it divides the logits")
    settings = _Settings(
        scale=head.scale, softcap=head.softcap, chunk=chunk_size, temperature=temperature, entropy=with_entropy
    )
    logprobs, entropy = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, settings)  # type: ignore[no-untyped-call]
    return logprobs, entropy


@dataclass(frozen=True, kw_only=True)
class _Settings:
    scale: float
    softcap: float | None
    chunk: int
    temperature: float
    entropy: bool

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight=weight, bias=bias, scale=self.scale, softcap=self.softcap)

    def slices(self, length: int) -> list[slice]:
        return [slice(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]


class _TokenLogprobs(torch.autograd.Function):
    """Chunked forward, and a chunked backward that projects again: the incoming gradient is not known before it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        head = settings.head(weight, bias)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.zeros(len(hidden) if settings.entropy else 0, dtype=dtype, device=hidden.device)
        for rows in settings.slices(len(hidden)):
            _score_chunk(project(hidden[rows], head), targets[rows], settings, logprobs[rows], entropy[rows])
        ctx.settings = settings
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        settings: _Settings = ctx.settings
        head = settings.head(weight, bias)
        buffers = HeadGradient(hidden, head, wanted=ctx.needs_input_grad[:3])
        factor = grad_logprobs * (settings.scale / settings.temperature)
        for rows in settings.slices(len(hidden)):
            logits = project(hidden[rows], head)
            probs = (logits / settings.temperature if settings.temperature != 1.0 else logits).softmax(-1)
            gradient = probs.mul_(-factor[rows].unsqueeze(-1))
            gradient.scatter_add_(-1, targets[rows].unsqueeze(-1), factor[rows].unsqueeze(-1))
            if settings.softcap is not None:
                gradient = through_softcap(gradient, logits, settings.softcap)
            buffers.add(rows, hidden[rows], gradient)
        parameters = (hidden, weight, bias)
        grads = [
            None if gradient is None or parameter is None else gradient.to(parameter.dtype)
            for gradient, parameter in zip((buffers.hidden, buffers.weight, buffers.bias), parameters, strict=True)
        ]
        return *grads, None, None


def _score_chunk(
    logits: Tensor, targets: Tensor, settings: _Settings, logprobs_out: Tensor, entropy_out: Tensor
) -> None:
    """Writes the logprobs of one chunk, and its entropies when they are wanted; `logits` is overwritten."""
    if settings.temperature != 1.0:
        logits.div_(settings.temperature)
    normaliser = logits.logsumexp(-1)
    logprobs_out.copy_(logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser)
    if settings.entropy:
        logprobs = logits.sub_(normaliser.unsqueeze(-1))
        probs = logprobs.exp()
        # an excluded token (-inf) adds nothing to the entropy, where 0 * -inf would be NaN
        entropy_out.copy_(probs.mul_(logprobs.clamp_min_(-1e30)).sum(-1).neg_())
