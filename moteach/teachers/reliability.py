"""How often each teacher is right in each domain: a running Beta posterior, from probes and from training itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from moteach.data.base import domain_of
from moteach.divergences.plan import full_evidence
from moteach.divergences.projection import project
from moteach.errors import ConfigError
from moteach.teachers.gating import (
    Examiner,
    Probes,
    Unverified,
    check_choices,
    check_share,
    gate_metrics,
    reweighted,
    verifiable_rows,
)
from moteach.types import Evidence, RolloutBatch, Routing, TeacherEvidence

_CHUNK = 1024


class Reliability:
    """Posterior mean (a + right) / (a + b + right + wrong) of a Beta(a, b) prior, by teacher and domain.

    `right` and `wrong` are counts that `fade` multiplies by `decay`, so that after many steps the last 1 / (1 - decay) of them
    weigh; without observations the mean goes back to the prior's, a / (a + b).

    Args:
        prior_right: a.
        prior_wrong: b.
        decay: Factor of the counts a step; 1 forgets nothing.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(self, *, prior_right: float = 1.0, prior_wrong: float = 1.0, decay: float = 0.99) -> None:
        if not (0 < prior_right < math.inf and 0 < prior_wrong < math.inf and 0 < decay <= 1):
            raise ConfigError(
                "expected prior_right > 0, prior_wrong > 0 and decay in (0, 1], got "
                f"{prior_right}, {prior_wrong} and {decay}; the reliability would not be a probability"
            )
        self._prior = (prior_right, prior_wrong)
        self._decay = decay
        self._counts: dict[str, dict[str, list[float]]] = {}

    def of(self, teacher_id: str, domain: str) -> float:
        """Posterior mean; the prior's for a pair that was never seen."""
        right, wrong = self._counts.get(teacher_id, {}).get(domain, (0.0, 0.0))
        a, b = self._prior
        return (a + right) / (a + b + right + wrong)

    def observe(self, teacher_id: str, domain: str, *, right: float = 0.0, wrong: float = 0.0) -> None:
        """Adds right and wrong answers."""
        counts = self._counts.setdefault(teacher_id, {}).setdefault(domain, [0.0, 0.0])
        counts[0] += right
        counts[1] += wrong

    def fade(self) -> None:
        """Lets a step pass."""
        for table in self._counts.values():
            for counts in table.values():
                counts[0] *= self._decay
                counts[1] *= self._decay

    def metrics(self) -> dict[str, float]:
        """Returns `reliability/<teacher>/<domain>` for every pair that was seen."""
        return {f"reliability/{name}/{d}": self.of(name, d) for name, table in self._counts.items() for d in table}

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self._counts = {name: {d: list(c) for d, c in table.items()} for name, table in state["counts"].items()}


class ReliableTeachers:
    """Multiplies the router's weights by reliability ** sharpness and renormalises; drops teachers below a floor.

    The reliability of a teacher in a domain is learned from probes (as in `teacher_gate=verified`) and, with `free`, from
    the batch itself: where a teacher's likeliest token is the written one at every token of a completion, the completion is
    the teacher's own greedy answer, and its verified score is the teacher's. That evidence is about prompts on which teacher
    and student agree, hence not a fair sample: keep the probes for the level. Support `sampled` does not show the likeliest
    token, so that probes are all there.

    Args:
        sharpness: Exponent; 0 leaves the weights of the teachers above the floor alone.
        floor: Reliability below which a teacher is dropped.
        probe_prompts: Training prompts of a probe.
        probe_every: Steps between probes of a pair; 0 probes once.
        free: Learn from the batch.
        unique_answers: Also count a teacher as wrong that disagrees somewhere with a right completion; only true where a right
            answer can be written in one way.
        prior_right: a of the prior Beta(a, b).
        prior_wrong: b.
        decay: Factor of the counts a step.
        passing: Score from which an answer is right.
        unverified: What becomes of rows without a teacher, see `moteach.teachers.gating.Unverified`.

    Raises:
        ConfigError: An argument is out of range.
    """

    name = "reliable"
    examines = True

    def __init__(
        self,
        *,
        sharpness: float = 4.0,
        floor: float = 0.2,
        probe_prompts: int = 32,
        probe_every: int = 100,
        free: bool = True,
        unique_answers: bool = False,
        prior_right: float = 1.0,
        prior_wrong: float = 1.0,
        decay: float = 0.99,
        passing: float = 1.0,
        unverified: Unverified = "skip",
    ) -> None:
        check_choices(unverified=unverified, passing=passing)
        check_share("floor", floor)
        if not 0 <= sharpness < math.inf:
            raise ConfigError(f"teacher_gate.sharpness: expected a finite number of at least 0, got {sharpness}")
        self.sharpness = sharpness
        self.floor = floor
        self.free = free
        self.unique_answers = unique_answers
        self.passing = passing
        self.unverified: Unverified = unverified
        self.reliability = Reliability(prior_right=prior_right, prior_wrong=prior_wrong, decay=decay)
        self._probes = Probes(count=probe_prompts, every=probe_every)
        self._metrics: dict[str, float] = {}

    def bind(self, examiner: Examiner) -> None:
        """Takes the examiner."""
        self._probes.verdicts.examiner = examiner

    def admit(self, step: int, rollouts: RolloutBatch, routing: Routing) -> Routing:
        """Weighs the teachers of each verifiable row by their reliability in its domain."""
        self.reliability.fade()
        factors = torch.ones_like(routing.weights)
        for column, teacher in enumerate(routing.teacher_ids):
            for domain, rows in verifiable_rows(rollouts, routing, teacher).items():
                scores = self._probes.update(step, teacher, domain)
                right = sum(score >= self.passing for score in scores)
                self.reliability.observe(teacher, domain, right=float(right), wrong=float(len(scores) - right))
                reliability = self.reliability.of(teacher, domain)
                factors[rows, column] = 0.0 if reliability < self.floor else reliability**self.sharpness
        gated = reweighted(routing, factors)
        self._metrics = gate_metrics(rollouts, routing, gated, self._probes.verdicts)
        return gated

    def observe(self, rollouts: RolloutBatch, evidence: Evidence, rewards: Sequence[float]) -> None:
        """Learns from completions that a teacher would have written itself; a prompt counts once a step."""
        if not self.free:
            return
        for entry in evidence.teachers:
            agrees = argmax_agrees(entry, rollouts)
            if agrees is None:
                continue
            verdicts: dict[str, tuple[str, bool]] = {}
            asked = set(rollouts.token_rows[entry.tokens.cpu()].tolist())
            for row in sorted(asked):
                prompt, reward = rollouts.rollouts[row].prompt, rewards[row]
                if math.isnan(reward):
                    continue
                right = reward >= self.passing
                if bool(agrees[row]):
                    verdicts[prompt.prompt_id] = (domain_of(prompt), right)
                elif right and self.unique_answers:
                    verdicts.setdefault(prompt.prompt_id, (domain_of(prompt), False))
            for domain, right in verdicts.values():
                self.reliability.observe(entry.teacher_id, domain, right=float(right), wrong=float(not right))

    def metrics(self) -> dict[str, float]:
        """Counts of the last step, see `gate_metrics`, and `reliability/<teacher>/<domain>`."""
        return self._metrics | self.reliability.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The counts and the probes."""
        return {"reliability": self.reliability.state_dict(), "probes": self._probes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.reliability.load_state_dict(state["reliability"])
        self._probes.load_state_dict(state["probes"])


def argmax_agrees(said: TeacherEvidence, rollouts: RolloutBatch) -> Bool[Tensor, " batch"] | None:
    """True for the rows of which every token is the teacher's likeliest one; None on support `sampled`.

    Rows that the teacher did not score are False. On support `full` the scored tokens are projected once more.
    """
    targets = rollouts.token_targets[said.tokens.cpu()]
    if said.topk_ids is not None and said.topk_logprobs is not None:
        first = said.topk_logprobs.argmax(dim=1, keepdim=True)
        likeliest = said.topk_ids.gather(1, first).squeeze(1).cpu()
    elif said.hidden is not None and said.head is not None:
        hidden, head = full_evidence(said)
        chunks = [project(part, head).argmax(dim=-1) for part in torch.split(hidden, _CHUNK)]
        likeliest = torch.cat(chunks).cpu() if chunks else targets
    else:
        return None
    rows = rollouts.token_rows[said.tokens.cpu()]
    agreed = torch.zeros(len(rollouts), dtype=torch.long).index_add_(0, rows, (likeliest == targets).long())
    counts = rollouts.loss_mask.sum(dim=1)
    return (agreed == counts) & (counts > 0)
