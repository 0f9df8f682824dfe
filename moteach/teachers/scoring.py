"""What every in-process teacher does with a loaded model: run the body on few padded tokens, and say what it thinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moteach.catalogue.modeling import body_and_head, hidden_states
from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.divergences.projection import project
from moteach.errors import ConfigError, DeadTeacherError, IncompatibleTeacherError, UnsupportedCombinationError
from moteach.types import Head, RolloutBatch, Support, TeacherEvidence


@torch.no_grad()
def score_with(
    model: nn.Module,
    rollouts: RolloutBatch,
    *,
    teacher_id: str,
    support: Support,
    k: int | None,
    chunk_size: int,
    max_tokens_per_forward: int,
    vocab_size: int | None = None,
) -> TeacherEvidence:
    """Scores every trained token of a batch with a Hugging Face causal language model.

    Runs without gradient but not in inference mode: tensors made there could not be saved by the student's backward.

    Args:
        model: The teacher.
        rollouts: The rows this teacher was given.
        teacher_id: Name for the evidence and for errors.
        support: What to return, see `moteach.teachers.base.Teacher.score`.
        k: Number of entries for `topk`.
        chunk_size: Tokens whose logits exist at once: memory is `chunk_size * vocab`.
        max_tokens_per_forward: Padded tokens in one forward of the body.
        vocab_size: Size of the student's head. Rows of a larger teacher head beyond it are left out (several families
            pad their vocabulary by different amounts); a smaller head is refused.
    """
    check_request(teacher_id, support, k)
    body, head = body_and_head(model)
    head = fitted(head, vocab_size, teacher_id)
    hidden = packed_hidden(body, rollouts, max_tokens=max_tokens_per_forward)
    return evidence_of(hidden, head, rollouts, teacher_id=teacher_id, support=support, k=k, chunk_size=chunk_size)


@torch.no_grad()
def evidence_of(
    hidden: Float[Tensor, "packed hidden"],
    head: Head,
    rollouts: RolloutBatch,
    *,
    teacher_id: str,
    support: Support,
    k: int | None,
    chunk_size: int,
) -> TeacherEvidence:
    """Turns the last hidden states of every trained token into evidence, wherever they were computed.

    Args:
        hidden: What predicts each trained token, in packed order.
        head: Turns them into logits; frozen, of the student's number of rows.
        rollouts: The rows they are of.
        teacher_id: Name for the evidence and for errors.
        support: What to return, see `moteach.teachers.base.Teacher.score`.
        k: Number of entries for `topk`.
        chunk_size: Tokens whose logits exist at once.

    Raises:
        DeadTeacherError: Hidden states or logprobs are not finite.
    """
    if not bool(torch.isfinite(hidden).all()):
        raise dead(teacher_id, "hidden states")
    tokens = torch.arange(rollouts.num_tokens)
    if support == "full":
        return TeacherEvidence(teacher_id=teacher_id, support=support, tokens=tokens, hidden=hidden, head=head)
    targets = rollouts.token_targets.to(hidden.device)
    sampled = chunked_token_logprobs(hidden, head, targets, chunk_size=chunk_size)
    if not bool(torch.isfinite(sampled).all()):
        raise dead(teacher_id, "logprobs")
    if support == "sampled":
        return TeacherEvidence(teacher_id=teacher_id, support=support, tokens=tokens, sampled_logprobs=sampled)
    assert k is not None
    ids, logprobs = topk_logprobs(hidden, head, k=k, chunk_size=chunk_size)
    return TeacherEvidence(
        teacher_id=teacher_id,
        support=support,
        tokens=tokens,
        topk_ids=ids,
        topk_logprobs=logprobs,
        sampled_logprobs=sampled,
    )


def packed_hidden(
    body: nn.Module,
    rollouts: RolloutBatch,
    *,
    max_tokens: int,
    forward: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
) -> Float[Tensor, "packed hidden"]:
    """Runs a body on the rows in micro-batches of similar length and packs the states that predict trained tokens.

    The last token of a row predicts nothing that is trained, so it is not computed; rows without a trained token are
    not computed at all. The result is in packed order whatever the order of the micro-batches.

    Args:
        body: The body.
        rollouts: The rows.
        max_tokens: Padded tokens in one forward.
        forward: Runs the body on ids and row numbers, where rows differ in more than their tokens.
    """
    needed = needed_lengths(rollouts)
    counts = rollouts.loss_mask.sum(dim=1)
    starts = counts.cumsum(0) - counts
    pieces: list[Tensor] = []
    places: list[Tensor] = []
    for rows in micro_batches(needed, max_tokens=max_tokens):
        part = rollouts.select(rows)
        width = max(needed[row] for row in rows)
        ids = part.input_ids[:, :width]
        states = hidden_states(body, ids) if forward is None else forward(ids, rows)
        pieces.append(part.pack(states))
        owned = counts[rows]
        shift = starts[rows] - (owned.cumsum(0) - owned)
        places.append(torch.arange(int(owned.sum())) + shift.repeat_interleave(owned))
    if not pieces:
        parameter, config = next(body.parameters()), cast(Any, body.config)
        return torch.zeros((0, config.hidden_size), dtype=parameter.dtype, device=parameter.device)
    scattered = torch.cat(pieces)
    packed = torch.empty_like(scattered)
    packed[torch.cat(places).to(packed.device)] = scattered
    return packed


def micro_batches(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Groups rows of similar length, longest first, so that rows times the longest length stays within a budget.

    A row that is longer than the budget runs alone; rows of length 0 are left out.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    group: list[int] = []
    for row in order:
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def topk_logprobs(
    hidden: Float[Tensor, "scored hidden"], head: Head, *, k: int, chunk_size: int
) -> tuple[Int[Tensor, "scored k"], Float[Tensor, "scored k"]]:
    """Ids and logprobs of the k most likely tokens, largest first: log_softmax(logits)[top k], chunk by chunk.

    Raises:
        ConfigError: The vocabulary has fewer than k entries.
    """
    vocab = head.weight.shape[0]
    if k > vocab:
        raise ConfigError(f"expected 'k' of at most the vocabulary, {vocab}, got {k}; use support=full")
    ids = torch.empty((len(hidden), k), dtype=torch.long, device=hidden.device)
    logprobs = torch.empty((len(hidden), k), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = project(hidden[chunk], head)
        values, ids[chunk] = logits.topk(k, dim=-1)
        logprobs[chunk] = values - logits.logsumexp(dim=-1, keepdim=True)
    return ids, logprobs


def dead(teacher_id: str, what: str) -> DeadTeacherError:
    """The error for a teacher whose scores are not finite."""
    return DeadTeacherError(
        f"expected finite {what} from the teacher '{teacher_id}', got NaN or infinity; the student would be pulled "
        "towards "
        "nothing. Check its weights (moteach experts check), or load it with dtype=float32"
    )


def check_settings(*, chunk_size: int, max_tokens_per_forward: int) -> None:
    """Refuses sizes that would score nothing.

    Raises:
        ConfigError: A size is not positive.
    """
    for key, value in (("chunk_size", chunk_size), ("max_tokens_per_forward", max_tokens_per_forward)):
        if value < 1:
            raise ConfigError(f"expected a positive number of tokens for '{key}', got {value}")


def check_request(teacher_id: str, support: Support, k: int | None) -> None:
    """Refuses a request that is not defined.

    Raises:
        UnsupportedCombinationError: There is no such support.
        ConfigError: `k` is missing, not positive, or given with another support than `topk`.
    """
    if support not in ("full", "topk", "sampled"):
        raise UnsupportedCombinationError(
            f"expected support full, topk or sampled of the teacher '{teacher_id}', got '{support}'"
        )
    if support == "topk" and (k is None or k < 1):
        raise ConfigError(f"expected a positive 'k' with support=topk, got {k}; set support.k")
    if support != "topk" and k is not None:
        raise ConfigError(f"expected 'k' with support=topk only, got k={k} with support={support}; it would be ignored")


def _frozen(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return Head(weight=head.weight.detach(), bias=bias, scale=head.scale, softcap=head.softcap)


def fitted(head: Head, vocab_size: int | None, teacher_id: str) -> Head:
    """Detaches a head and cuts it to the student's vocabulary.

    Raises:
        IncompatibleTeacherError: It has fewer rows.
    """
    head = _frozen(head)
    rows = head.weight.shape[0]
    if vocab_size is None or rows == vocab_size:
        return head
    if rows < vocab_size:
        raise IncompatibleTeacherError(
            f"expected a head of at least {vocab_size} rows from the teacher '{teacher_id}' (the student's), got "
            f"{rows}; it says "
            "nothing about the rest: trim the student with student.resize_token_embeddings, or choose another teacher"
        )
    bias = None if head.bias is None else head.bias[:vocab_size]
    return Head(weight=head.weight[:vocab_size], bias=bias, scale=head.scale, softcap=head.softcap)


def needed_lengths(rollouts: RolloutBatch) -> list[int]:
    """Tokens of each row the body must read: up to the one before the last trained token; 0 when none is trained."""
    width = rollouts.loss_mask.shape[1]
    last = width - 1 - rollouts.loss_mask.flip(1).int().argmax(dim=1) if width else torch.zeros(len(rollouts))
    return [int(value) for value in torch.where(rollouts.loss_mask.any(dim=1), last, 0)]
