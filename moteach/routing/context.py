"""What a token gate may look at: the batch, and chunk by chunk what teachers, student and references say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.divergences.plan import Group, full_evidence, make_plan
from moteach.divergences.projection import project
from moteach.errors import ConfigError, RoutingError, UnsupportedCombinationError
from moteach.types import Evidence, Head, RolloutBatch, Routing, TeacherEvidence


@dataclass(frozen=True, kw_only=True, slots=True)
class GateChunk:
    """Tokens with the same candidates, and what is said about each entry of the vocabulary; all of it detached."""

    tokens: Int[Tensor, " token"]
    """Packed indices."""
    columns: tuple[int, ...]
    """The candidates, as columns of the routing."""
    prior: Float[Tensor, "token candidate"]
    """The router's weights of the candidates; positive."""
    teachers: Float[Tensor, "candidate token vocab"]
    """Logprobs of the candidates."""
    student: Float[Tensor, "token vocab"] | None = None
    references: Float[Tensor, "candidate token vocab"] | None = None
    """Logprobs of the checkpoint each candidate was trained from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateContext:
    """Everything a gate may look at; nothing here carries a gradient.

    A gate says what it `needs` (`teachers`, `student`, `references`); what it does not name may be None.
    """

    rollouts: RolloutBatch
    routing: Routing
    evidence: Evidence | None = None
    student_hidden: Float[Tensor, "packed hidden"] | None = None
    """The student's states that predict the trained tokens, detached."""
    student_head: Head | None = None
    references: Evidence | None = None
    """Entries carry the teacher's id and what the checkpoint it was trained from says of the same tokens."""
    chunk_size: int = 1024
    """Tokens whose logits of one model exist at a time; a chunk has fewer where several models are held."""

    @property
    def prior(self) -> Float[Tensor, "packed teacher"]:
        """The router's weights of each token's row."""
        return self.routing.weights.to(self.rollouts.input_ids.device)[self.rollouts.token_rows]

    @property
    def candidates(self) -> Bool[Tensor, "packed teacher"]:
        """True for the teachers that the router let through."""
        return self.prior > 0

    def said(self) -> Evidence:
        """The candidates' evidence.

        Raises:
            RoutingError: There is none.
        """
        if self.evidence is None:
            raise RoutingError(
                "the gate reads what the teachers say and was given no evidence; it could only repeat the router. Score the "
                "rows first, or choose gate=prompt"
            )
        return self.evidence

    def written(self) -> Float[Tensor, "packed teacher"]:
        """Logprob that each candidate gives to the written token; -inf for teachers that were not asked.

        Works on every support: the value that was sent, or the one made from hidden states.
        """
        evidence, names = self.said(), self.routing.teacher_ids
        targets = self.rollouts.token_targets
        found = torch.full((len(targets), len(names)), float("-inf"))
        for entry in evidence.teachers:
            found[entry.tokens, names.index(entry.teacher_id)] = _written(entry, targets, self.chunk_size).float()
        return found

    @torch.no_grad()
    def chunks(self, *, student: bool = False, references: bool = False) -> Iterator[GateChunk]:
        """Walks over the tokens that have a candidate; nothing of the size `[packed, vocab]` is ever held.

        Args:
            student: Also give the student's logprobs.
            references: Also give those of the references.

        Raises:
            RoutingError: A candidate did not score a token, or has no reference.
            UnsupportedCombinationError: Evidence is not of support `full`.
        """
        entries = self.said().teachers
        columns = [self.routing.teacher_ids.index(entry.teacher_id) for entry in entries]
        prior = self.prior
        models = 2 if references else 1
        size = max(1, self.chunk_size // (models * max(len(entries), 1) + student))
        vocab = full_evidence(entries[0])[1].weight.shape[0] if entries else 0
        plan = make_plan(teachers=entries, weights=prior[:, columns], vocab=vocab, chunk_size=size)
        for group in plan.chunks():
            mine = [entries[column] for column in group.columns]
            places = [plan.positions[column].index_select(0, group.tokens) for column in group.columns]
            at = tuple(columns[column] for column in group.columns)
            yield GateChunk(
                tokens=group.tokens,
                columns=at,
                prior=prior[group.tokens][:, list(at)],
                teachers=torch.stack([_logprobs(entry, place) for entry, place in zip(mine, places, strict=True)]),
                student=self._student(group) if student else None,
                references=self._references(mine, group) if references else None,
            )

    def _student(self, group: Group) -> Tensor:
        if self.student_hidden is None or self.student_head is None:
            raise RoutingError(
                "the gate reads the student's distribution and was not given its hidden states; call it inside the forward"
            )
        hidden = self.student_hidden.detach().index_select(0, group.tokens)
        return project(hidden, self.student_head).log_softmax(-1)

    def _references(self, mine: list[TeacherEvidence], group: Group) -> Tensor:
        found = []
        for entry in mine:
            base = None if self.references is None else self.references.of(entry.teacher_id)
            if base is None:
                raise ConfigError(
                    f"the gate compares each teacher with the checkpoint it was trained from, and '{entry.teacher_id}' names "
                    f"none; set experts.{entry.teacher_id}.reference, or choose another gate"
                )
            found.append(_logprobs(base, torch.searchsorted(base.tokens, group.tokens)))
        return torch.stack(found)


def weights_of(context: GateContext) -> Float[Tensor, "packed teacher"]:
    """All-zero weights of the right shape, to be filled chunk by chunk."""
    return torch.zeros(context.rollouts.num_tokens, len(context.routing.teacher_ids))


def put(weights: Tensor, chunk: GateChunk, values: Float[Tensor, "token candidate"]) -> None:
    """Writes the weights of one chunk's candidates into the rows of its tokens, in place."""
    full = torch.zeros(len(chunk.tokens), weights.shape[1], dtype=weights.dtype)
    full[:, list(chunk.columns)] = values.to(weights.dtype)
    weights[chunk.tokens] = full


def softmax_weights(
    scores: Float[Tensor, "token candidate"],
    prior: Float[Tensor, "token candidate"],
    *,
    temperature: float,
    hard: bool,
) -> Float[Tensor, "token candidate"]:
    """w_k = prior_k exp(score_k / temperature) / sum_j ..., or all of it on the largest (the first of a tie)."""
    logits = scores.double() / temperature + prior.double().log()
    if hard:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return logits.softmax(-1)


def normalised(values: Float[Tensor, "token candidate"]) -> Float[Tensor, "token candidate"]:
    """Divides each row by its sum; rows of zeros stay, they abstain."""
    total = values.sum(-1, keepdim=True)
    return values / torch.where(total == 0, torch.ones_like(total), total)


def check_temperature(value: float) -> None:
    """Refuses a temperature that divides by nothing.

    Raises:
        ConfigError: It is not positive and finite.
    """
    if not 0 < value < float("inf"):
        raise ConfigError(f"gate.temperature: expected a finite number above 0, got {value}; it divides the scores")


def _logprobs(entry: TeacherEvidence, places: Tensor) -> Tensor:
    hidden, head = full_evidence(entry)
    return project(hidden.detach().index_select(0, places), head).log_softmax(-1)


@torch.no_grad()
def _written(entry: TeacherEvidence, targets: Tensor, chunk_size: int) -> Tensor:
    if entry.sampled_logprobs is not None:
        return entry.sampled_logprobs
    if entry.hidden is None or entry.head is None:
        raise UnsupportedCombinationError(
            f"expected what the teacher '{entry.teacher_id}' gives the written token, got evidence of support "
            f"{entry.support} without it; the gate would compare nothing. Set support=full or support=sampled"
        )
    hidden, head = full_evidence(entry)
    return chunked_token_logprobs(hidden.detach(), head, targets[entry.tokens], chunk_size=chunk_size)
