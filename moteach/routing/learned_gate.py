"""A gate that learns, from completions known to be right, which teacher to believe at which state of the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moteach.checkpoint import flatten_optimizer, restore_optimizer, restore_tensors, trained_tensors
from moteach.errors import CheckpointError, ConfigError
from moteach.routing.context import GateContext, softmax_weights
from moteach.types import Support

Source = Literal["rollouts", "answers", "both"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """Tokens of verified completions, as a gate learns from them."""

    hidden: Float[Tensor, "packed hidden"]
    logprobs: Float[Tensor, "packed teacher"]
    """Logprob of the written token under each candidate, -inf for the others."""
    prior: Float[Tensor, "packed teacher"]


@runtime_checkable
class LearningGate(Protocol):
    """A gate with something to learn, and with state."""

    source: Source
    """Which verified completions it learns from."""

    def learn(self, lessons: Sequence[Lesson], teachers: Sequence[str]) -> dict[str, float]:
        """Takes one step; returns its metrics."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """State that is tensors; empty before the first lesson."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The rest of the state, in plain JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores both."""
        ...


class LearnedGate:
    """g(h_t) = (1 - exploration) softmax_k(f(h_t) + log prior_k) + exploration * prior, f a network on the student's state.

    Trained to make verified completions likely under the gated mixture of teachers, the marginal likelihood of Co-LLM (arXiv
    2403.03870) for any number of teachers: the mean over their tokens of
    log sum_k g_k(h_t) q_k(y_t) + entropy_bonus * H(g(h_t)) is maximised. Never the distillation loss, which would choose the
    teacher nearest to the student. The student's state drifts while it learns, so the gate takes a step at every step of the
    run. Exploration keeps every candidate's weight and gradient above zero. Before the first lesson the weights are the
    router's.

    Args:
        source: `rollouts` (the student's own of full reward), `answers` (the prompts' reference answers), or `both`.
        hidden: Units of the hidden layer.
        lr: Learning rate of the gate's own AdamW.
        exploration: Share of the router's weights in the mixture, from 0 to below 1.
        entropy_bonus: Weight of the gate's entropy beside the log-likelihood, nats.
        hard: The largest takes all; it is learned softly all the same.
        seed: Start of the first layer; the second starts at zero.
        trace: Write a row a token into `routing.parquet`.

    Raises:
        ConfigError: A number is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"student"})
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk", "sampled"})
    per_token: ClassVar[bool] = True

    def __init__(
        self,
        *,
        source: Source = "both",
        hidden: int = 64,
        lr: float = 1e-2,
        exploration: float = 0.02,
        entropy_bonus: float = 0.0,
        hard: bool = False,
        seed: int = 0,
        trace: bool = False,
    ) -> None:
        if hidden < 1 or not 0 < lr < float("inf") or not 0 <= exploration < 1 or not entropy_bonus >= 0:
            raise ConfigError(
                f"gate: expected hidden >= 1, lr > 0, 0 <= exploration < 1 and entropy_bonus >= 0, got {hidden}, {lr}, "
                f"{exploration} and {entropy_bonus}"
            )
        self.source: Source = source
        self.hidden = hidden
        self.lr = lr
        self.exploration = exploration
        self.entropy_bonus = entropy_bonus
        self.hard = hard
        self.seed = seed
        self.trace = trace
        self._teachers: tuple[str, ...] = ()
        self._net: nn.Sequential | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    @torch.no_grad()
    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """The network's weights of the candidates."""
        prior = context.prior
        if self._net is None or context.student_hidden is None:
            return prior
        soft = self._gate(context.student_hidden, prior, context.routing.teacher_ids)
        if self.hard:
            first = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
            soft = first * context.candidates
        return soft.to(prior.dtype)

    def learn(self, lessons: Sequence[Lesson], teachers: Sequence[str]) -> dict[str, float]:
        """Takes one step on the tokens of all lessons that some candidate was asked about.

        Args:
            lessons: What the batch teaches; none leaves the gate as it is.
            teachers: Names of the columns.

        Returns:
            `gate/log_likelihood` (nats a token, before the step), `gate/entropy` and `gate/tokens`.
        """
        asked = [(lesson, (lesson.prior > 0).any(-1)) for lesson in lessons]
        hidden = torch.cat([lesson.hidden[kept] for lesson, kept in asked]) if asked else torch.zeros(0, 1)
        if not len(hidden):
            return {"gate/tokens": 0.0}
        logprobs = torch.cat([lesson.logprobs[kept] for lesson, kept in asked])
        prior = torch.cat([lesson.prior[kept] for lesson, kept in asked])
        if self._net is None:
            self._build(hidden.shape[-1], teachers)
        assert self._optimizer is not None
        with torch.enable_grad():
            gate = self._gate(hidden.detach(), prior, teachers)
            likelihood = mixture_log_likelihood(gate, logprobs).mean()
            entropy = -torch.xlogy(gate, gate).sum(-1).mean()
            self._optimizer.zero_grad(set_to_none=True)
            (-likelihood - self.entropy_bonus * entropy).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {
            "gate/log_likelihood": float(likelihood.detach()),
            "gate/entropy": float(entropy.detach()),
            "gate/tokens": float(len(hidden)),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights of the network and state of its optimizer."""
        if self._net is None or self._optimizer is None:
            return {}
        moments, _ = flatten_optimizer(self._optimizer)
        net = {f"net.{name}": value for name, value in trained_tensors(self._net).items()}
        return net | {f"optimizer.{name}": value for name, value in moments.items()}

    def state_dict(self) -> dict[str, Any]:
        """The teachers of the columns and the size of the state that is read."""
        width = 0 if self._net is None else int(next(self._net.parameters()).shape[1])
        return {"teachers": list(self._teachers), "width": width}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores `state_dict` and `tensors`.

        Raises:
            CheckpointError: The network is of another shape.
        """
        self._net, self._optimizer, self._teachers = None, None, ()
        if not state["teachers"]:
            return
        if not tensors:
            raise CheckpointError(
                "the checkpoint names a trained gate and holds no tensors of it; delete the checkpoint"
            )
        self._build(int(state["width"]), state["teachers"])
        assert self._net is not None
        assert self._optimizer is not None
        parts = {
            part: {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
            for part in ("net.", "optimizer.")
        }
        restore_tensors(self._net, parts["net."])
        groups = self._optimizer.state_dict()["param_groups"]
        restore_optimizer(self._optimizer, parts["optimizer."], groups)

    def _build(self, width: int, teachers: Sequence[str]) -> None:
        """Starts a network whose output is zero: the router's weights."""
        self._teachers = tuple(sorted(teachers))
        first, second = nn.Linear(width, self.hidden), nn.Linear(self.hidden, len(self._teachers))
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            first.weight.copy_(torch.randn(first.weight.shape, generator=generator) * width**-0.5)
            for zero in (first.bias, second.weight, second.bias):
                zero.zero_()
        self._net = nn.Sequential(first, nn.Tanh(), second)
        self._optimizer = torch.optim.AdamW(self._net.parameters(), lr=self.lr, weight_decay=0.0)

    def _gate(self, hidden: Tensor, prior: Tensor, teachers: Sequence[str]) -> Tensor:
        """Weights in float64; rows without a candidate are zero."""
        assert self._net is not None
        states = torch.nn.functional.layer_norm(hidden.float(), (hidden.shape[-1],))
        scores = self._net(states)[:, [self._teachers.index(name) for name in teachers]]
        known = (prior > 0).any(-1, keepdim=True)
        share = torch.where(known, prior, torch.ones_like(prior)).double()
        soft = softmax_weights(scores, share, temperature=1.0, hard=False)
        mixed = (1 - self.exploration) * soft + self.exploration * share / share.sum(-1, keepdim=True)
        return torch.where(known, mixed, torch.zeros_like(mixed))


def mixture_log_likelihood(
    gate: Float[Tensor, "packed teacher"], logprobs: Float[Tensor, "packed teacher"]
) -> Float[Tensor, " packed"]:
    """Computes log sum_k g_k q_k(y), nats; teachers without weight may have logprob -inf."""
    silent = gate == 0
    terms = gate.masked_fill(silent, 1.0).log() + logprobs.to(gate.dtype)
    return terms.masked_fill(silent, float("-inf")).logsumexp(-1)


def learning_part(gate: object) -> LearningGate | None:
    """The gate itself, or the one it composes, where that one learns."""
    for candidate in (gate, getattr(gate, "gate", None)):
        if isinstance(candidate, LearningGate):
            return candidate
    return None
