"""The student as its own teacher: as it is now, averaged over the run, or as it was at an earlier stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from moteach.errors import CheckpointError, ConfigError
from moteach.teachers.scoring import check_settings, score_with
from moteach.types import Head, RolloutBatch, Support, TeacherEvidence

Stage = Literal["live", "ema", "snapshot"]


@runtime_checkable
class FollowsStudent(Protocol):
    """A teacher that has to see the student of the run."""

    def bind_student(self, model: nn.Module) -> None:
        """Hands over the live student, once, before the first step and before a checkpoint is restored."""
        ...

    def follow(self, *, version: int) -> None:
        """Called after every optimizer step; `version` counts them."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; empty for a teacher without weights of its own."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`."""
        ...


class StudentTeacher:
    """Scores with the weights of the student of this run; no gradient goes through it.

    `live`: the weights of this moment, theta (SDPO, arXiv 2601.20802; it needs more than the prompt to know better).
    `ema`: a_0 = theta_0, a_t = decay * a_{t-1} + (1 - decay) * theta_t after every step (a teacher of OPSD, arXiv
    2601.18734, and SDFT, arXiv 2601.19897). `snapshot`: theta of the last of `snapshot_steps` that is over; the
    earlier stage that reminds a later one of what it knew (cross-stage distillation of GLM-5, arXiv 2602.15763).

    Args:
        teacher_id: Name of the expert.
        stage: Which of them.
        decay: Of `ema`, from 0 to below 1.
        snapshot_steps: Of `snapshot`, optimizer steps after which a copy is taken; 0 is the start of the run.
        chunk_size: Tokens whose logits exist at once (supports `topk` and `sampled`).
        max_tokens_per_forward: Padded tokens in one forward of the body.
    """

    supports: frozenset[Support] = frozenset({"full", "topk", "sampled"})

    def __init__(
        self,
        *,
        teacher_id: str,
        stage: Stage,
        decay: float = 0.99,
        snapshot_steps: Sequence[int] = (0,),
        chunk_size: int = 1024,
        max_tokens_per_forward: int = 16384,
    ) -> None:
        check_settings(chunk_size=chunk_size, max_tokens_per_forward=max_tokens_per_forward)
        self.teacher_id = teacher_id
        self.stage = stage
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._snapshot_steps = frozenset(snapshot_steps)
        self._chunk_size = chunk_size
        self._max_tokens = max_tokens_per_forward
        self._student: nn.Module | None = None
        self._own: nn.Module | None = None

    def bind_student(self, model: nn.Module) -> None:
        """Remembers the student, and takes the first copy where one is kept."""
        self._student = model
        if self.stage != "live":
            self._own = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def follow(self, *, version: int) -> None:
        """Averages, or takes a copy when its step is over."""
        if self._own is None or (self.stage == "snapshot" and version not in self._snapshot_steps):
            return
        mine, now = list(self._own.parameters()), [value.detach() for value in self._bound().parameters()]
        if self.stage == "ema":
            self._average(mine, now, torch.tensor(version))
        else:
            for old, new in zip(mine, now, strict=True):
                old.copy_(new)

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        """Scores every trained token of these rows, see `moteach.teachers.base.Teacher.score`."""
        model = self._bound() if self._own is None else self._own
        training = model.training
        model.eval()
        try:
            said = score_with(
                model,
                rollouts,
                teacher_id=self.teacher_id,
                support=support,
                k=k,
                chunk_size=self._chunk_size,
                max_tokens_per_forward=self._max_tokens,
            )
        finally:
            model.train(training)
        if self._own is None and isinstance(said.head, Head):
            # of several updates of one batch the later ones would read hidden states of then with the head of now
            head = said.head
            bias = None if head.bias is None else head.bias.clone()
            kept = Head(weight=head.weight.clone(), bias=bias, scale=head.scale, softcap=head.softcap)
            return TeacherEvidence(
                teacher_id=said.teacher_id, support=support, tokens=said.tokens, hidden=said.hidden, head=kept
            )
        return said

    def tensors(self) -> dict[str, Tensor]:
        """The copy's parameters by name, tied ones once."""
        return {} if self._own is None else {name: value.detach() for name, value in self._own.named_parameters()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the copy.

        Raises:
            CheckpointError: The checkpoint has other tensors.
        """
        own = self.tensors()
        if own.keys() != tensors.keys():
            raise CheckpointError(
                f"expected the copy of the student that the teacher '{self.teacher_id}' is, got a checkpoint without it; the "
                "teacher would start anew. Choose another run_dir"
            )
        for name, value in tensors.items():
            own[name].copy_(value)

    def _bound(self) -> nn.Module:
        if self._student is None:
            raise ConfigError(f"expected the teacher '{self.teacher_id}' inside a run, got it alone; it has no weights")
        return self._student
