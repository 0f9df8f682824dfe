"""The student as its own teacher: as it is now, averaged over the run, or as it was at an earlier stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from moteach.catalogue.modeling import body_and_head, hidden_states
from moteach.distributed import ALONE, Ranks, is_sharded, like, local
from moteach.errors import CheckpointError, ConfigError
from moteach.teachers.scoring import check_settings, micro_batches, needed_lengths, score_with
from moteach.types import Head, RolloutBatch, Support, TeacherEvidence

Stage = Literal["live", "ema", "snapshot"]
Gathered = Callable[[], AbstractContextManager[None]]
"""Opens a block in which the body of a student in shards can be run by itself."""


@runtime_checkable
class FollowsStudent(Protocol):
    """A teacher that has to see the student of the run."""

    def bind_student(self, model: nn.Module, *, ranks: Ranks = ALONE, gathered: Gathered = nullcontext) -> None:
        """Hands over the live student, once, before the first step and before a checkpoint is restored.

        Args:
            model: The causal language model inside it.
            ranks: The processes that hold it together.
            gathered: How it is gathered there.
        """
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

    Of an average or a snapshot only the trained weights are kept. To score they change places with the student's and run in
    its model, so of several ranks each keeps its part of them alone, and layers are gathered as the student's are. All ranks
    are asked `together`, with rows or without, and make equally many forwards.

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
        self._ranks = ALONE
        self._gathered: Gathered = nullcontext
        self._trained: dict[str, nn.Parameter] = {}
        self._own: dict[str, Tensor] = {}

    @property
    def together(self) -> bool:
        """Whether every rank has to ask whenever one does."""
        return self._ranks.size > 1

    def bind_student(self, model: nn.Module, *, ranks: Ranks = ALONE, gathered: Gathered = nullcontext) -> None:
        """Remembers the student, and takes the first copy where one is kept."""
        self._student, self._ranks, self._gathered = model, ranks, gathered
        # once, because a layer that is gathered shows other parameters
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if self.stage != "live":
            self._own = {name: value.detach().clone() for name, value in self._trained.items()}

    @torch.no_grad()
    def follow(self, *, version: int) -> None:
        """Averages, or takes a copy when its step is over."""
        if not self._own or (self.stage == "snapshot" and version not in self._snapshot_steps):
            return
        mine = [local(value) for value in self._own.values()]
        now = [local(value.detach()) for value in self._trained.values()]
        if self.stage == "ema":
            self._average(mine, now, torch.tensor(version))
        else:
            for old, new in zip(mine, now, strict=True):
                old.copy_(new)

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        """Scores every trained token of these rows, see `moteach.teachers.base.Teacher.score`."""
        model = self._bound()
        training = model.training
        model.eval()
        try:
            with self._standing_in(), self._gathered():
                self._keep_step(model, rollouts)
                said = score_with(
                    model,
                    rollouts,
                    teacher_id=self.teacher_id,
                    support=support,
                    k=k,
                    chunk_size=self._chunk_size,
                    max_tokens_per_forward=self._max_tokens,
                )
                if isinstance(said.head, Head) and (self.together or not self._own):
                    # gathered tensors are freed, and of several updates of one batch the later ones would read hidden
                    # states of then with the head of now
                    head = said.head
                    bias = None if head.bias is None else head.bias.clone()
                    said = replace(said, head=replace(head, weight=head.weight.clone(), bias=bias))
        finally:
            model.train(training)
        return said

    @torch.no_grad()
    def _keep_step(self, model: nn.Module, rollouts: RolloutBatch) -> None:
        """Runs one token as often as other ranks have more micro-batches than this one."""
        needed = needed_lengths(rollouts)
        forwards = sum(1 for _ in micro_batches(needed, max_tokens=self._max_tokens))
        body, _ = body_and_head(model)
        for _ in range(self._ranks.most(forwards) - forwards):
            hidden_states(body, torch.zeros((1, 1), dtype=torch.long))

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Puts the copy's weights into the student for the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, own in self._own.items():
            parameter = self._trained[name]
            if not is_sharded(parameter):
                parameter.data, self._own[name] = own, parameter.data
                continue
            # layers are gathered from the storage that the parameter had when it was cut, so the values have to move
            theirs, mine = local(parameter.detach()), local(own)
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The copy's trained parameters by name, tied ones once."""
        return dict(self._own)

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
            own[name].copy_(value if is_sharded(value) else like(value, own[name]))

    def _bound(self) -> nn.Module:
        if self._student is None:
            raise ConfigError(f"expected the teacher '{self.teacher_id}' inside a run, got it alone; it has no weights")
        return self._student
