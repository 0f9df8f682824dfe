"""Gates that go by the verified answers of the teachers themselves: by domain, or on each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moteach.teachers.gating import (
    Examiner,
    Probes,
    Unverified,
    Verdicts,
    check_choices,
    check_share,
    gate_metrics,
    reweighted,
    verifiable_rows,
)
from moteach.types import Evidence, RolloutBatch, Routing


class VerifiedDomains:
    """A teacher teaches a domain where its own greedy answers are right often enough.

    Accuracy is measured on training prompts that have a verifier, per teacher and domain, at the first step that routes such
    a pair and every `probe_every` steps. Below `threshold` the teacher loses every verifiable prompt of that domain. This is
    TGOPD's rule (arXiv 2609.02998: verified probes; pass to distillation, fail to the outcome's reward, never blended),
    pooled over the domain so that a teacher need not answer each prompt; its own rule, a probe for each prompt, is
    `teacher_gate=always`.

    Args:
        threshold: Least share of right answers.
        probe_prompts: Prompts of a probe.
        probe_every: Steps between probes of a pair, each on other prompts, all of which count; 0 probes once.
        passing: Score from which an answer is right.
        unverified: What becomes of rows without a teacher, see `moteach.teachers.gating.Unverified`.

    Raises:
        ConfigError: An argument is out of range.
    """

    name = "verified"
    examines = True

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        probe_prompts: int = 64,
        probe_every: int = 0,
        passing: float = 1.0,
        unverified: Unverified = "skip",
    ) -> None:
        check_choices(unverified=unverified, passing=passing)
        check_share("threshold", threshold)
        self.threshold = threshold
        self.passing = passing
        self.unverified: Unverified = unverified
        self._probes = Probes(count=probe_prompts, every=probe_every)
        self._metrics: dict[str, float] = {}

    def bind(self, examiner: Examiner) -> None:
        """Takes the examiner."""
        self._probes.verdicts.examiner = examiner

    def admit(self, step: int, rollouts: RolloutBatch, routing: Routing) -> Routing:
        """Takes out the teachers that are too often wrong in the domain of a row; a domain without any probe passes."""
        factors = torch.ones_like(routing.weights)
        seen: dict[str, float] = {}
        for column, teacher in enumerate(routing.teacher_ids):
            for domain, rows in verifiable_rows(rollouts, routing, teacher).items():
                self._probes.update(step, teacher, domain)
                accuracy = self._probes.accuracy(teacher, domain, passing=self.passing)
                if accuracy is None:
                    continue
                seen[f"teacher_gate/accuracy/{teacher}/{domain}"] = accuracy
                if accuracy < self.threshold:
                    factors[rows, column] = 0.0
        gated = reweighted(routing, factors)
        self._metrics = gate_metrics(rollouts, routing, gated, self._probes.verdicts) | seen
        return gated

    def observe(self, rollouts: RolloutBatch, evidence: Evidence, rewards: Sequence[float]) -> None:
        """Learns nothing: probes are all it goes by."""

    def metrics(self) -> dict[str, float]:
        """Counts of the last step, see `gate_metrics`, and the accuracy of each pair that was routed."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """The probes."""
        return self._probes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self._probes.load_state_dict(state)


class VerifiedAnswers:
    """A teacher teaches a prompt where its own greedy answer to that very prompt is right.

    MT-SDPO's eligibility (arXiv 2609.02548) and, with `unverified=outcome`, TGOPD's (arXiv 2609.02998). MT-SDPO's anchor, the
    student's own success, is not part of it. Every different prompt costs one answer of each teacher it is routed to, once in
    the run; verdicts are kept in the checkpoint.

    Args:
        passing: Score from which an answer is right.
        unverified: What becomes of rows without a teacher, see `moteach.teachers.gating.Unverified`.

    Raises:
        ConfigError: An argument is out of range.
    """

    name = "always"
    examines = True

    def __init__(self, *, passing: float = 1.0, unverified: Unverified = "skip") -> None:
        check_choices(unverified=unverified, passing=passing)
        self.passing = passing
        self.unverified: Unverified = unverified
        self._verdicts = Verdicts()
        self._metrics: dict[str, float] = {}

    def bind(self, examiner: Examiner) -> None:
        """Takes the examiner."""
        self._verdicts.examiner = examiner

    def admit(self, step: int, rollouts: RolloutBatch, routing: Routing) -> Routing:
        """Takes out the teachers whose own answer to the prompt of a row is wrong."""
        factors = torch.ones_like(routing.weights)
        for column, teacher in enumerate(routing.teacher_ids):
            rows = [row for own in verifiable_rows(rollouts, routing, teacher).values() for row in own]
            scores = self._verdicts.of(teacher, [rollouts.rollouts[row].prompt for row in rows])
            wrong = [row for row, score in zip(rows, scores, strict=True) if score < self.passing]
            factors[wrong, column] = 0.0
        gated = reweighted(routing, factors)
        self._metrics = gate_metrics(rollouts, routing, gated, self._verdicts)
        return gated

    def observe(self, rollouts: RolloutBatch, evidence: Evidence, rewards: Sequence[float]) -> None:
        """Learns nothing: the teachers' own answers are all it goes by."""

    def metrics(self) -> dict[str, float]:
        """Counts of the last step, see `gate_metrics`."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """The verdicts."""
        return {"known": self._verdicts.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self._verdicts.known = {name: dict(table) for name, table in state["known"].items()}
