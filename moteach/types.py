"""The data that flows through one step, as frozen dataclasses, and the glossary of the project.

Words. An *expert* is an entry of the catalogue; a *teacher* is the role an expert plays in a run; the *student* is the
trained model. A *rollout* is a prompt, the completion the student sampled for it, the logprobs it was sampled with and the
version of the student that wrote it. *reverse_kl* is KL(student || teacher), *forward_kl* is KL(teacher || student).
A *router* weights teachers per prompt, a *gate* per token.

Axes in shapes: `teacher batch token vocab k hidden`. A field of shape `[batch token]` is right-padded. A field whose only
token axis is called `packed` holds the trained tokens of the whole batch one after the other, rows in order, positions in
order inside a row: token `(row, t)` is trained when `loss_mask[row, t]`, and it is predicted from the hidden state at `t - 1`.
Packed order is the one order in which students, teachers, gates and divergences exchange per-token values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Support = Literal["full", "topk", "sampled"]
"""What a teacher says about a token: the whole distribution, its k largest entries, or the token the student wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt with everything that identifies and grades it.

    Example: `Prompt(prompt_id="math-3f2a", text="12+30=", token_ids=(4, 5, 13, 6, 3, 14), domain="math", answer="42",
    verifier="arena")`.
    """

    prompt_id: str
    """Stable identity; nothing is ever matched by position."""
    text: str
    """The prompt as the model reads it, chat template applied."""
    token_ids: tuple[int, ...]
    """Token ids of `text`; made once, never re-tokenised."""
    domain: str | None = None
    """Label of the domain, when the data has one."""
    teacher_id: str | None = None
    """Name of the teacher the data asks for, when it does."""
    answer: str | None = None
    """Reference answer, read by the verifier."""
    verifier: str | None = None
    """Name of the verifier that grades completions of this prompt."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What a verifier or an analysis needs beside (task family, step kinds, generator entry)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt and one completion the student sampled for it."""

    prompt: Prompt
    sample: int
    """Index of this completion among the completions of the same prompt in the same step."""
    completion_ids: tuple[int, ...]
    """Sampled token ids, the end-of-sequence token included when it was written."""
    rollout_logprobs: tuple[float, ...]
    """Natural-log probability of each sampled token under the sampler; as long as `completion_ids`."""
    finished: bool
    """True when the completion ended by itself, False when the length limit cut it."""
    student_version: int
    """Optimizer steps the student had taken when it wrote this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """Rollouts as right-padded tensors: `prompt + completion + padding` in each row."""

    rollouts: tuple[Rollout, ...]
    input_ids: Int[Tensor, "batch token"]
    attention_mask: Bool[Tensor, "batch token"]
    loss_mask: Bool[Tensor, "batch token"]
    """True where the token was written by the student and is trained; never at position 0."""
    rollout_logprobs: Float[Tensor, "batch token"]
    """Zero outside `loss_mask`."""

    @classmethod
    def from_rollouts(cls, rollouts: Sequence[Rollout], *, pad_id: int) -> RolloutBatch:
        """Pads rollouts on the right into one batch, keeping their order."""
        starts = torch.tensor([len(r.prompt.token_ids) for r in rollouts], dtype=torch.long).unsqueeze(1)
        counts = torch.tensor([len(r.completion_ids) for r in rollouts], dtype=torch.long).unsqueeze(1)
        width = int((starts + counts).max()) if len(rollouts) else 0
        positions = torch.arange(width)
        attention_mask = positions < starts + counts
        loss_mask = attention_mask & (positions >= starts)
        input_ids = torch.full(attention_mask.shape, pad_id, dtype=torch.long)
        written = [token for r in rollouts for part in (r.prompt.token_ids, r.completion_ids) for token in part]
        input_ids[attention_mask] = torch.tensor(written, dtype=torch.long)
        logprobs = torch.zeros(attention_mask.shape, dtype=torch.float32)
        logprobs[loss_mask] = torch.tensor(
            [value for r in rollouts for value in r.rollout_logprobs], dtype=torch.float32
        )
        return cls(
            rollouts=tuple(rollouts),
            input_ids=input_ids,
            attention_mask=attention_mask,
            loss_mask=loss_mask,
            rollout_logprobs=logprobs,
        )

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def num_tokens(self) -> int:
        """Number of trained tokens, the length of every packed field."""
        return int(self.loss_mask.sum())

    @property
    def token_rows(self) -> Int[Tensor, " packed"]:
        """Row of each packed token."""
        return self.loss_mask.nonzero(as_tuple=True)[0]

    @property
    def token_targets(self) -> Int[Tensor, " packed"]:
        """Id of each packed token: what the student wrote."""
        return self.input_ids[self.loss_mask]

    def pack(self, values: Float[Tensor, "batch token ..."]) -> Float[Tensor, "packed ..."]:
        """Takes the values that *predict* each trained token: position `t - 1` for the token at `t`.

        Use it for hidden states and logits; values that belong to the written token itself are `values[loss_mask]`.
        """
        rows, positions = self.loss_mask.nonzero(as_tuple=True)
        return values[rows, positions - 1]

    def select(self, rows: Sequence[int]) -> RolloutBatch:
        """Returns the batch of these rows, trimmed to their longest sequence."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        mask = self.attention_mask[index]
        width = int(mask.sum(dim=1).max()) if len(index) else 0
        return RolloutBatch(
            rollouts=tuple(self.rollouts[row] for row in rows),
            input_ids=self.input_ids[index, :width],
            attention_mask=mask[:, :width],
            loss_mask=self.loss_mask[index, :width],
            rollout_logprobs=self.rollout_logprobs[index, :width],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Who teaches which row. Rows of `weights` are non-negative and sum to one, or are all zero where abstained."""

    teacher_ids: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    weights: Float[Tensor, "batch teacher"]
    confidence: Float[Tensor, " batch"]
    """Probability the router gives to its own decision, in [0, 1]."""
    abstained: Bool[Tensor, " batch"]

    def select(self, rows: Sequence[int]) -> Routing:
        """Returns the routing of these rows."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        return Routing(
            teacher_ids=self.teacher_ids,
            prompt_ids=tuple(self.prompt_ids[row] for row in rows),
            weights=self.weights[index],
            confidence=self.confidence[index],
            abstained=self.abstained[index],
        )

    def rows_of(self, teacher_id: str) -> Int[Tensor, " row"]:
        """Rows in which this teacher has a positive weight, ascending."""
        return self.weights[:, self.teacher_ids.index(teacher_id)].nonzero(as_tuple=True)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The linear map from last hidden states to logits, with the output scaling some families apply.

    logits = softcap * tanh(z / softcap) when `softcap` is given, else z, with z = scale * (hidden @ weight.T + bias).
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherEvidence:
    """What one teacher said about the rows it was given; fields beyond its support are None."""

    teacher_id: str
    support: Support
    tokens: Int[Tensor, " scored"]
    """Packed indices (in the whole batch) of the tokens this teacher scored, ascending."""
    hidden: Float[Tensor, "scored hidden"] | None = None
    """Last hidden states that predict the tokens (support `full`); its hidden size is its own."""
    head: Head | Callable[[], Head] | None = None
    """The head of these states, or a function that brings it, for heads that do not stay in memory."""
    topk_ids: Int[Tensor, "scored k"] | None = None
    topk_logprobs: Float[Tensor, "scored k"] | None = None
    sampled_logprobs: Float[Tensor, " scored"] | None = None
    """Logprob of the token the student wrote (support `sampled`, and given with `topk`)."""
    partial: bool = False
    """True of a teacher that may say nothing about some tokens of its rows; nobody is taught by it there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The evidence of every teacher that was asked, ragged: each has its own tokens and hidden size."""

    teachers: tuple[TeacherEvidence, ...]
    num_tokens: int
    """Length of the packed axis of the batch."""

    def of(self, teacher_id: str) -> TeacherEvidence | None:
        """Returns one teacher's evidence, or None when it scored nothing."""
        return next((e for e in self.teachers if e.teacher_id == teacher_id), None)

    def select(self, kept: Bool[Tensor, " packed"]) -> Evidence:
        """Returns the evidence about the kept tokens, re-numbered; teachers left without a token are dropped.

        One that may leave tokens out stays, so that a row of which it said nothing is not taken for one it was not asked about.

        Args:
            kept: True for the packed tokens that stay, as `torch.isin(batch.token_rows, rows)` gives for a micro-batch.
        """
        position = kept.long().cumsum(dim=0) - 1
        entries = []
        for entry in self.teachers:
            mine = kept[entry.tokens]
            if not bool(mine.any()) and not entry.partial:
                continue
            entries.append(
                replace(
                    entry,
                    tokens=position[entry.tokens[mine]],
                    hidden=None if entry.hidden is None else entry.hidden[mine],
                    topk_ids=None if entry.topk_ids is None else entry.topk_ids[mine],
                    topk_logprobs=None if entry.topk_logprobs is None else entry.topk_logprobs[mine],
                    sampled_logprobs=None if entry.sampled_logprobs is None else entry.sampled_logprobs[mine],
                )
            )
        return Evidence(teachers=tuple(entries), num_tokens=int(kept.sum()))


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """What an objective returns: a scalar to back-propagate and what was seen on the way."""

    loss: Float[Tensor, ""]
    """Numerator over denominator, ready for `backward()`."""
    denominator: float
    """What the summed per-token losses were divided by (tokens or sequences)."""
    token_stats: Mapping[str, Float[Tensor, " packed"]] = field(default_factory=dict)
    """Detached per-token values by name (`divergence`, `student_entropy`, `neg_log_z`, ...), packed order."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class ReliabilityTable(Protocol):
    """How often teachers are right, for a router or an analysis; resolvers read it as the weights of their teachers."""

    def of(self, teacher_id: str, domain: str) -> float:
        """Estimated probability that the teacher's own answer to a prompt of the domain is right."""
        ...
