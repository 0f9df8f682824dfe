"""What a checkpoint of a run holds: everything the next step depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moteach.checkpoint import flatten_optimizer, optimized, restore_optimizer, restore_tensors, trained_tensors
from moteach.teachers.following import following_tensors, load_following

if TYPE_CHECKING:
    from moteach.trainer import Trainer


def save(trainer: Trainer, step: int) -> None:
    """Flushes the traces, then writes a checkpoint with everything the next step depends on."""
    if trainer.ranks.is_first:
        trainer.traces.flush(step)
    buffers, groups = flatten_optimizer(trainer.optimizer)
    state = {
        "step": step,
        "identity": dict(trainer.identity),
        "optimizer_groups": groups,
        "sampler": trainer.sampler.state_dict(),
        "router": trainer.router.state_dict(),
        "balance": trainer.learner.balance.state_dict(),
        "teacher_gate": trainer.teacher_gate.state_dict(),
    }
    tensors = {
        "student": trained_tensors(trainer.student),
        "optimizer": buffers,
        "rng": _noise(trainer),
    }
    if copies := following_tensors(trainer.teachers):
        tensors["teachers"] = copies
    if trainer.lessons is not None:
        state["gate"] = trainer.lessons.gate.state_dict()
        tensors["gate"] = trainer.lessons.gate.tensors()
    trainer.checkpoints.save(step, tensors=tensors, state=state)


def resume(trainer: Trainer, step: int) -> None:
    """Restores the checkpoint of `step`."""
    like = {
        "student": trained_tensors(trainer.student),
        "optimizer": {str(index): parameter for index, parameter in enumerate(optimized(trainer.optimizer))},
        "teachers": following_tensors(trainer.teachers),
    }
    tensors, state = trainer.checkpoints.load(step, like=like)
    restore_tensors(trainer.student, tensors["student"])
    restore_optimizer(trainer.optimizer, tensors.get("optimizer", {}), state["optimizer_groups"])
    noise = tensors["rng"]
    torch.set_rng_state(noise.get(_noise_of(trainer.ranks.rank), noise["torch"]))
    trainer.sampler.load_state_dict(state["sampler"])
    trainer.router.load_state_dict(state["router"])
    trainer.learner.balance.load_state_dict(state["balance"])
    trainer.teacher_gate.load_state_dict(state["teacher_gate"])
    load_following(trainer.teachers, tensors.get("teachers", {}))
    if trainer.lessons is not None:
        trainer.lessons.gate.load_state_dict(state["gate"], tensors.get("gate", {}))


def _noise(trainer: Trainer) -> dict[str, Tensor]:
    """States of the ranks' generators: dropout draws from them, as often as a rank has rows."""
    return {_noise_of(rank): state for rank, state in enumerate(trainer.ranks.gather(torch.get_rng_state()))}


def _noise_of(rank: int) -> str:
    return f"torch.{rank}" if rank else "torch"
