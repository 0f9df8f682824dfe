"""Rows of several adapters of one base in one forward of the base."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moteach.catalogue.modeling import body_and_head
from moteach.errors import DeadTeacherError
from moteach.teachers.base import Teacher
from moteach.teachers.lora import LoRATeacher
from moteach.teachers.scoring import check_request, evidence_of, fitted, packed_hidden
from moteach.types import RolloutBatch, Support, TeacherEvidence


@torch.no_grad()
def score_mixed(
    asked: Sequence[tuple[Teacher, Int[Tensor, " _"]]], rollouts: RolloutBatch, *, support: Support, k: int | None
) -> dict[str, TeacherEvidence]:
    """Scores the rows of LoRA teachers that share a base together, each row under its own teacher's adapter.

    N experts of few rows then cost the forwards of one expert of many. The same up to rounding as one adapter after the
    other: rows are padded to other lengths.

    Args:
        asked: The teachers and the rows each was given; teachers of other kinds are left to themselves.
        rollouts: The whole batch.
        support: See `Teacher.score`.
        k: See `Teacher.score`.

    Returns:
        What each teacher said about its own rows, as `Teacher.score` would; teachers that share no base are not in it, nor
        those that are dead, which say so when they are asked alone.
    """
    groups: dict[tuple[Any, ...], list[tuple[LoRATeacher, list[int]]]] = {}
    for teacher, rows in asked:
        if isinstance(teacher, LoRATeacher):
            groups.setdefault(teacher.shares, []).append((teacher, rows.tolist()))
    found: dict[str, TeacherEvidence] = {}
    for group in groups.values():
        if len(group) > 1:
            opened = [entry for entry in group if _opens(entry[0])]
            found |= _score_group(opened, rollouts, support=support, k=k) if len(opened) > 1 else {}
    return found


def _opens(teacher: LoRATeacher) -> bool:
    """Checks the head of an adapter on its first use."""
    try:
        return teacher.model is not None
    except DeadTeacherError:
        return False


def _score_group(
    group: Sequence[tuple[LoRATeacher, list[int]]], rollouts: RolloutBatch, *, support: Support, k: int | None
) -> dict[str, TeacherEvidence]:
    for teacher, _ in group:
        check_request(teacher.teacher_id, support, k)
    opened = group[0][0].with_others([teacher for teacher, _ in group])
    if opened is None:
        return {}
    wrapped, names = opened
    body, head = body_and_head(wrapped.get_base_model())
    adapters = [names[teacher.teacher_id] for teacher, rows in group for _ in rows]
    together = rollouts.select([row for _, rows in group for row in rows])
    takes_few = "logits_to_keep" in inspect.signature(wrapped.get_base_model().forward).parameters
    caught: list[Tensor] = []

    def forward(ids: Tensor, rows: Sequence[int]) -> Tensor:
        # peft takes the names through the whole model alone; of its logits one position is made and thrown away
        wrapped(
            input_ids=ids.to(head.weight.device),
            use_cache=False,
            adapter_names=[adapters[row] for row in rows],
            **({"logits_to_keep": 1} if takes_few else {}),
        )
        return caught.pop()

    hook = body.register_forward_hook(lambda module, args, out: caught.append(out.last_hidden_state))
    try:
        hidden = packed_hidden(body, together, max_tokens=group[0][0].max_tokens, forward=forward)
    finally:
        hook.remove()
    found: dict[str, TeacherEvidence] = {}
    start = 0
    for teacher, rows in group:
        part = rollouts.select(rows)
        own = hidden[start : start + part.num_tokens]
        start += part.num_tokens
        fit = fitted(head, teacher.vocab_size, teacher.teacher_id)
        with suppress(DeadTeacherError):
            found[teacher.teacher_id] = evidence_of(
                own, fit, part, teacher_id=teacher.teacher_id, support=support, k=k, chunk_size=teacher.chunk_size
            )
    return found
