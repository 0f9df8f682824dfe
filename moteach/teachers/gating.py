"""The protocol of teacher gates and what they share: verdicts on the teachers' own answers, probes, fewer teachers a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.data.base import domain_of
from moteach.errors import ConfigError
from moteach.types import Evidence, Prompt, RolloutBatch, Routing

Unverified = Literal["skip", "outcome"]
"""What becomes of rows without a teacher. `skip`: no teacher's loss, and the terms of `mix` are those of every row. `outcome`:
these rows alone learn from the verified outcome (`mix.outcome`), the taught ones from their teachers alone; the two signals
are never blended (TGOPD, arXiv 2609.02998)."""


@runtime_checkable
class Examiner(Protocol):
    """Lets teachers answer prompts and grades what they say."""

    def scores(self, teacher_id: str, prompts: Sequence[Prompt]) -> list[float]:
        """Grades a teacher's own greedy answers with the verifiers of the prompts, in [0, 1]."""
        ...

    def draw(self, domain: str, *, count: int, turn: int) -> list[Prompt]:
        """Draws training prompts of a domain that have a verifier, others in every turn; never held-out ones."""
        ...


@runtime_checkable
class TeacherGate(Protocol):
    """Decides, between routing and scoring, which of the routed teachers may teach; those it takes out are not asked."""

    name: str
    examines: bool
    """Whether it needs an examiner, hence teachers that can generate."""
    unverified: Unverified

    def bind(self, examiner: Examiner) -> None:
        """Hands over the examiner; called once before `admit` where `examines`."""
        ...

    def admit(self, step: int, rollouts: RolloutBatch, routing: Routing) -> Routing:
        """Returns the routing without the teachers that may not teach; rows where nobody is left abstain.

        Prompts without a verifier pass unchanged.
        """
        ...

    def observe(self, rollouts: RolloutBatch, evidence: Evidence, rewards: Sequence[float]) -> None:
        """Learns from what the teachers said about completions whose verified scores are known (NaN: no verifier)."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the gate continues exactly, in plain JSON types."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        ...


class NoTeacherGate:
    """Every routed teacher teaches."""

    name = "none"
    examines = False
    unverified: Unverified = "skip"

    def bind(self, examiner: Examiner) -> None:
        """Needs none."""

    def admit(self, step: int, rollouts: RolloutBatch, routing: Routing) -> Routing:
        """Returns the routing itself."""
        return routing

    def observe(self, rollouts: RolloutBatch, evidence: Evidence, rewards: Sequence[float]) -> None:
        """Learns nothing."""

    def metrics(self) -> dict[str, float]:
        """Has none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Holds nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores nothing."""


class Verdicts:
    """Scores of the teachers' own answers by teacher and prompt id: teachers are frozen, so that each is asked once."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, float]] = {}
        self.examiner: Examiner | None = None
        self.answers = 0
        """Answers that were generated since this was last set to 0."""

    def of(self, teacher_id: str, prompts: Sequence[Prompt]) -> list[float]:
        """Returns the scores of one teacher on some prompts, generating the answers that are not known yet as one batch."""
        known = self.known.setdefault(teacher_id, {})
        new = list({p.prompt_id: p for p in prompts if p.prompt_id not in known}.values())
        if new:
            scores = self.bound().scores(teacher_id, new)
            known.update({prompt.prompt_id: score for prompt, score in zip(new, scores, strict=True)})
            self.answers += len(new)
        return [known[prompt.prompt_id] for prompt in prompts]

    def bound(self) -> Examiner:
        """Returns the examiner.

        Raises:
            ConfigError: There is none yet.
        """
        if self.examiner is None:
            raise ConfigError(
                "expected a teacher gate with an examiner, got none; no teacher could be asked for its own answer. Call bind"
            )
        return self.examiner


class Probes:
    """Verified accuracy of teachers by domain, on training prompts drawn for the purpose.

    A pair of teacher and domain is probed the first time the router gives such a prompt to that teacher, and again with
    other prompts `every` steps later; pairs that are never routed cost nothing.

    Args:
        count: Prompts of one turn.
        every: Steps between turns; 0 probes once.

    Raises:
        ConfigError: `count` is not positive, or `every` is negative.
    """

    def __init__(self, *, count: int, every: int) -> None:
        if count < 1 or every < 0:
            raise ConfigError(
                f"teacher_gate: expected probe_prompts >= 1 and probe_every >= 0 (0 probes once), got {count} and {every}; "
                "nothing would be known about the teachers"
            )
        self._count = count
        self._every = every
        self.verdicts = Verdicts()
        self._turns: dict[str, dict[str, list[int]]] = {}
        self._seen: dict[str, dict[str, dict[str, float]]] = {}

    def update(self, step: int, teacher_id: str, domain: str) -> list[float]:
        """Probes a pair when it is due; returns the scores on prompts that it was not probed on before."""
        turn, last = self._turns.setdefault(teacher_id, {}).get(domain, [0, -1])
        if turn and (not self._every or step - last < self._every):
            return []
        prompts = self.verdicts.bound().draw(domain, count=self._count, turn=turn)
        self._turns[teacher_id][domain] = [turn + 1, step]
        seen = self._seen.setdefault(teacher_id, {}).setdefault(domain, {})
        new = [prompt for prompt in prompts if prompt.prompt_id not in seen]
        scores = self.verdicts.of(teacher_id, new)
        seen.update({prompt.prompt_id: score for prompt, score in zip(new, scores, strict=True)})
        return scores

    def accuracy(self, teacher_id: str, domain: str, *, passing: float) -> float | None:
        """Share of the probes with at least a `passing` score; None without any."""
        scores = self._seen.get(teacher_id, {}).get(domain, {}).values()
        return sum(score >= passing for score in scores) / len(scores) if scores else None

    def state_dict(self) -> dict[str, Any]:
        """Verdicts, turns and what was probed."""
        return {"known": self.verdicts.known, "turns": self._turns, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.verdicts.known = {name: dict(table) for name, table in state["known"].items()}
        self._turns = {name: {domain: list(v) for domain, v in t.items()} for name, t in state["turns"].items()}
        self._seen = {name: {domain: dict(v) for domain, v in t.items()} for name, t in state["seen"].items()}


def reweighted(routing: Routing, factors: Float[Tensor, "batch teacher"]) -> Routing:
    """Multiplies the weights of a routing and renormalises each row; rows that nothing happens to stay the same to the bit.

    Args:
        routing: Who would teach.
        factors: At least 0; a row that is left without weight abstains, with confidence 0.
    """
    raw = routing.weights * factors
    touched = (raw != routing.weights).any(dim=1)
    total = raw.sum(dim=1, keepdim=True)
    normalised = raw / torch.where(total == 0, torch.ones_like(total), total)
    closed = touched & (total.squeeze(1) == 0)
    return replace(
        routing,
        weights=torch.where(touched.unsqueeze(1), normalised, routing.weights),
        abstained=routing.abstained | closed,
        confidence=torch.where(closed, torch.zeros_like(routing.confidence), routing.confidence),
    )


def verifiable_rows(rollouts: RolloutBatch, routing: Routing, teacher_id: str) -> dict[str, list[int]]:
    """Rows that a teacher is to teach and whose prompt has a verifier, by domain."""
    found: dict[str, list[int]] = {}
    for row in routing.rows_of(teacher_id).tolist():
        prompt = rollouts.rollouts[row].prompt
        if prompt.verifier:
            found.setdefault(domain_of(prompt), []).append(row)
    return found


def gate_metrics(rollouts: RolloutBatch, before: Routing, after: Routing, verdicts: Verdicts) -> dict[str, float]:
    """Counts what a gate did, and starts counting answers anew.

    Returns:
        `teacher_gate/closed` (rows that lost their last teacher), `teacher_gate/unverifiable` (rows whose prompt has no
        verifier, which pass), `teacher_gate/answers` (answers that teachers generated) and `teacher_gate/dropped/<teacher>`
        (rows that a teacher was routed to and may not teach).
    """
    lost = (before.weights > 0) & (after.weights == 0)
    metrics = {
        "teacher_gate/closed": float((after.abstained & ~before.abstained).sum()),
        "teacher_gate/unverifiable": float(sum(not rollout.prompt.verifier for rollout in rollouts.rollouts)),
        "teacher_gate/answers": float(verdicts.answers),
    }
    verdicts.answers = 0
    names: Mapping[str, int] = {name: column for column, name in enumerate(before.teacher_ids)}
    return metrics | {f"teacher_gate/dropped/{name}": float(lost[:, column].sum()) for name, column in names.items()}


def check_choices(*, unverified: str, passing: float) -> None:
    """Refuses what no gate knows.

    Raises:
        ConfigError: Names the key.
    """
    if unverified not in ("skip", "outcome"):
        raise ConfigError(f"teacher_gate.unverified: expected skip or outcome, got '{unverified}'")
    check_share("passing", passing)


def check_share(name: str, value: float) -> None:
    """Refuses a value outside [0, 1].

    Raises:
        ConfigError: Names the key.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"teacher_gate.{name}: expected a number from 0 to 1, got {value}")
