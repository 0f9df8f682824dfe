"""The parts of the loss, from their config nodes; building them needs no model."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from moteach.config.build import build
from moteach.config.gates import build_gate
from moteach.conflict.posterior import Conditioned
from moteach.errors import ConfigError
from moteach.objectives.answers import Answers
from moteach.objectives.balance import Balance
from moteach.objectives.conditioning import Conditioning
from moteach.objectives.lessons import GateLessons
from moteach.objectives.mix import Mix, MixedObjective
from moteach.objectives.token_weights import TokenWeighting
from moteach.routing.learned_gate import learning_part
from moteach.students import LoRA
from moteach.teachers.failover import FailurePolicy
from moteach.teachers.gating import TeacherGate


def build_objective(cfg: DictConfig, tokenizer: Any = None) -> MixedObjective:
    """Makes the objective with the gate, resolver and divergence it asks for, and what is mixed into it."""
    parts = {
        "gate": build_gate(cfg.gate, seed=cfg.seed, tokenizer=tokenizer),
        "resolver": build(cfg.conflict, where="conflict"),
        "divergence": build(cfg.divergence, where="divergence"),
    }
    return MixedObjective(build(cfg.objective, where="objective", **parts), build_mix(cfg))


def build_conditioning(objective: MixedObjective, answers: Answers) -> Conditioning | None:
    """Makes what conditions the teachers on right answers, for a resolver that does.

    Not under a gate that decides per token: where no teacher knows the whole answer, none would be left to decide between.
    """
    resolver = objective.teaching.resolver
    wanted = isinstance(resolver, Conditioned) and not objective.teaching.gate.per_token
    return Conditioning(resolver=resolver, answers=answers) if wanted else None


def build_lessons(objective: MixedObjective, answers: Answers) -> GateLessons | None:
    """What the gate is taught with, for one that learns."""
    learns = learning_part(getattr(objective.teaching, "gate", None))
    return None if learns is None else GateLessons(gate=learns, answers=answers)


def build_mix(cfg: DictConfig) -> Mix:
    """Reads the weights of the terms beside the teachers' loss."""
    mix = cfg.mix
    return Mix(
        outcome=mix.outcome,
        outcome_normalise=mix.outcome_normalise,
        reference=mix.reference,
        supervised=mix.supervised,
    )


def build_token_weights(cfg: DictConfig, tokenizer: Any = None) -> dict[str, TokenWeighting]:
    """Makes the token weights by name; some are told the tokenizer's special tokens."""
    given: dict[str, Any] = {}
    if tokenizer is not None:
        eos = getattr(tokenizer, "eos_token_id", None)
        given["tokenizer_special_ids"] = frozenset(int(token) for token in tokenizer.all_special_ids)
        given["tokenizer_eos_ids"] = frozenset(() if eos is None else (int(eos),))
    return {
        str(name): build(cfg.token_weights[name], where=f"token_weights.{name}", **given) for name in cfg.token_weights
    }


def build_balance(cfg: DictConfig) -> Balance:
    """Makes the balance between domains."""
    balance: Balance = build(cfg.balance, where="balance")
    return balance


def build_teacher_gate(cfg: DictConfig) -> TeacherGate:
    """Makes the gate between routing and scoring."""
    gate: TeacherGate = build(cfg.teacher_gate, where="teacher_gate")
    return gate


def build_failure_policy(cfg: DictConfig) -> FailurePolicy:
    """Reads what happens when a teacher fails."""
    return FailurePolicy.parse(cfg.teachers.on_failure, experts=[str(name) for name in cfg.experts])


def lora_of(cfg: DictConfig) -> LoRA | None:
    """Reads `student.lora`; None where all weights are trained.

    Raises:
        ConfigError: A value is out of range, or is said without a rank.
    """
    if cfg.rank is None:
        if cfg.alpha is not None or cfg.dropout or cfg.targets is not None:
            raise ConfigError(
                "student.lora: expected a rank beside the other values, got none; all weights would be trained"
            )
        return None
    targets = None if cfg.targets is None else tuple(str(name) for name in cfg.targets)
    return LoRA(rank=cfg.rank, alpha=cfg.alpha, dropout=cfg.dropout, targets=targets)
