"""Sampling with keyed noise: one uniform number per token, from a hash of who the token is.

The number of token `position` of completion `sample` of prompt `prompt_id` at `step` of a run is

    u = hash(seed, step, prompt_id, sample, position)          in (0, 1)

and the token is the first id of the vocabulary whose cumulative probability exceeds `u`. There is no generator state:
order, batch size and number of ranks do not change samples (up to floating-point rounding of the logits themselves: a
different batch shape may move a probability by 1e-7, and a sample changes when `u` falls in that gap).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, UInt64
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_LOW64 = (1 << 64) - 1
_CHUNK_ELEMENTS = 1 << 24


def _mix(state: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words."""
    state = (state ^ (state >> np.uint64(30))) * _MIX1
    state = (state ^ (state >> np.uint64(27))) * _MIX2
    mixed: UInt64[np.ndarray, "*shape"] = state ^ (state >> np.uint64(31))
    return mixed


def _absorb(state: UInt64[np.ndarray, "*left"], word: UInt64[np.ndarray, "*right"]) -> UInt64[np.ndarray, "*both"]:
    """Folds one word of the key into the state; both broadcast."""
    return _mix(_mix(state + _GOLDEN) ^ (word * _GOLDEN + _MIX1))


def prompt_key(prompt_id: str) -> int:
    """Returns a 64-bit hash of a prompt id that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "little")


def _row_states(
    seed: int, step: int, prompt_ids: Sequence[str], samples: Sequence[int]
) -> UInt64[np.ndarray, " batch"]:
    state = np.zeros(1, dtype=np.uint64)
    for word in (seed, step):
        state = _absorb(state, np.array([word & _LOW64], dtype=np.uint64))
    state = _absorb(state, np.array([prompt_key(prompt_id) for prompt_id in prompt_ids], dtype=np.uint64))
    return _absorb(state, np.array(samples, dtype=np.int64).astype(np.uint64))


def keyed_uniforms(
    *, seed: int, step: int, prompt_ids: Sequence[str], samples: Sequence[int], length: int
) -> Float64[Tensor, "batch token"]:
    """Draws the noise of whole completions.

    Args:
        seed: Seed of the run.
        step: Step of the run.
        prompt_ids: Prompt of each row.
        samples: Index of each row among the completions of its prompt.
        length: Positions per row, counted from the first token of the completion.

    Returns:
        Numbers in the open interval (0, 1), multiples of 2^-53.
    """
    state = _row_states(seed, step, prompt_ids, samples)
    words = _absorb(state[:, None], np.arange(length, dtype=np.uint64)[None, :])
    return torch.from_numpy(((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def keyed_seeds(*, seed: int, step: int, prompt_ids: Sequence[str], samples: Sequence[int]) -> list[int]:
    """Draws a seed for each row, for a server that has a generator of its own for each request.

    Args:
        seed: Seed of the run.
        step: Step of the run.
        prompt_ids: Prompt of each row.
        samples: Index of each row among the completions of its prompt.

    Returns:
        63-bit numbers from the same hash as `keyed_uniforms`; they depend on nothing but the row's own key.
    """
    return [int(word) >> 1 for word in _row_states(seed, step, prompt_ids, samples)]


def truncate(logits: Float[Tensor, "batch vocab"], *, top_k: int, top_p: float) -> Float[Tensor, "batch vocab"]:
    """Sets to minus infinity what the sampler may not pick.

    Args:
        logits: Logits, temperature applied.
        top_k: Keep the k largest (and their ties); 0 keeps all.
        top_p: Then keep the smallest set of most probable tokens whose probability reaches `top_p`; 1 keeps all.
    """
    vocab = logits.shape[-1]
    if 0 < top_k < vocab:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        drop = (probs.cumsum(dim=-1) - probs) >= top_p
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -torch.inf)
    return logits


def _pick(
    logits: Float[Tensor, "batch vocab"],
    uniforms: Float64[Tensor, " batch"],
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[Int[Tensor, " batch"], Float64[Tensor, " batch"]]:
    logits = logits.double()
    if temperature == 0.0:
        tokens = logits.argmax(dim=-1)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    if temperature != 1.0:
        logits = logits / temperature
    if top_k > 0 or top_p < 1.0:
        logits = truncate(logits, top_k=top_k, top_p=top_p)
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    cumulative = shifted.exp().cumsum_(dim=-1)
    total = cumulative[:, -1:]
    # Below the total even when the product rounds up to it: an id past the vocabulary can never come out.
    below = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, below, right=True)
    return tokens[:, 0], (shifted.gather(1, tokens) - total.log())[:, 0]


def pick_tokens(
    logits: Float[Tensor, "batch vocab"],
    uniforms: Float64[Tensor, " batch"],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Int[Tensor, " batch"], Float64[Tensor, " batch"]]:
    """Picks one token per row by inverse CDF in vocabulary order, in float64.

    Args:
        logits: Next-token logits of each row.
        uniforms: One number in (0, 1) per row.
        temperature: Logits are divided by it; 0 takes the argmax.
        top_p: See `truncate`.
        top_k: See `truncate`.

    Returns:
        Token ids, and the logprob of each under the distribution it was drawn from: after temperature and truncation.
        With temperature 0 the logprob is that of the untempered, untruncated softmax.
    """
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        _pick(logits[i : i + rows], uniforms[i : i + rows], temperature=temperature, top_p=top_p, top_k=top_k)
        for i in range(0, len(logits), rows)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def is_any_of(tokens: Int[Tensor, "*shape"], ids: Int[Tensor, " ids"]) -> Bool[Tensor, "*shape"]:
    """True where a token is one of these ids."""
    return tokens == ids if len(ids) == 1 else torch.isin(tokens, ids)
