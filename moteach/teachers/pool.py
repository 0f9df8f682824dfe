"""The teachers of a run behind one call: each is asked about its own rows only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import (
    ConfigError,
    DeadTeacherError,
    RoutingError,
    TeacherUnavailableError,
    UnknownChoiceError,
    UnsupportedCombinationError,
    nearest,
)
from moteach.teachers.base import Answer, Teacher, answer_of
from moteach.teachers.hf import HFTeacher
from moteach.teachers.lora import AdapterStore, LoRATeacher
from moteach.teachers.mapped import MappedStore
from moteach.teachers.mixed import score_mixed
from moteach.teachers.own import Stage, StudentTeacher
from moteach.teachers.references import References
from moteach.teachers.scoring import dead
from moteach.teachers.store import ModelStore
from moteach.types import Evidence, RolloutBatch, Routing, Support, TeacherEvidence


class TeacherPool:
    """Scores a batch with the teachers its routing names.

    A teacher pays only for the rows in which it has a positive weight: with hard routing, ten teachers cost what one
    costs.

    Args:
        teachers: The teachers of the run.
        references: The checkpoints they were trained from, for gates and resolvers that compare with them.
        hidden_dtype: Precision in which hidden states wait for the loss; None keeps the teacher's own.

    Raises:
        ConfigError: Two teachers have the same name, or there is none.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        references: References | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        names = [teacher.teacher_id for teacher in teachers]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"expected at least one teacher, each with a name of its own, got {names}")
        self._teachers = {teacher.teacher_id: teacher for teacher in teachers}
        self.references = References({}) if references is None else references
        self._hidden_dtype = hidden_dtype

    @classmethod
    def from_experts(
        cls,
        experts: Mapping[str, ExpertSpec],
        *,
        max_tokens_per_forward: int = 16384,
        vocab_size: int | None = None,
        store: ModelStore | MappedStore | None = None,
        device: str = "cpu",
        hidden_dtype: torch.dtype | None = None,
        served: Mapping[str, Any] | None = None,
        wraps: Mapping[str, Callable[[Any], Any]] | None = None,
        contexts: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> TeacherPool:
        """Builds the pool of a run's experts with the checkpoints they were trained from, see `build_teachers`."""
        store = ModelStore(device=device) if store is None else store
        specs = list(experts.values())
        return cls(
            build_teachers(
                specs,
                max_tokens_per_forward=max_tokens_per_forward,
                vocab_size=vocab_size,
                store=store,
                device=device,
                served=served,
                wraps=wraps,
                contexts=contexts,
            ),
            references=References.from_experts(
                specs,
                store=store,
                max_tokens_per_forward=max_tokens_per_forward,
                vocab_size=vocab_size,
                wraps=wraps,
            ),
            hidden_dtype=hidden_dtype,
        )

    def lap(self) -> dict[str, float]:
        """Counts since the last lap, empty where there is nothing to count.

        Returns:
            `teacher_http/<teacher>/<count>` of the teachers behind servers, and `alignment/<teacher>/<count>` of those with
            tokens of their own.
        """
        found: dict[str, float] = {}
        for what, method in (("teacher_http", "lap"), ("alignment", "alignment_lap")):
            for name, teacher in self._teachers.items():
                counts: dict[str, float] = getattr(teacher, method, dict)()
                found |= {f"{what}/{name}/{key}": value for key, value in counts.items()}
        return found

    @property
    def teacher_ids(self) -> tuple[str, ...]:
        """Names of the teachers, in the order they were given."""
        return tuple(self._teachers)

    def get(self, teacher_id: str) -> Teacher:
        """Returns one teacher.

        Raises:
            UnknownChoiceError: No teacher of the run has this name.
        """
        if teacher_id not in self._teachers:
            raise UnknownChoiceError(
                f"expected a teacher of this run, got '{teacher_id}'; {nearest(teacher_id, self._teachers)}"
            )
        return self._teachers[teacher_id]

    def score(self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None) -> Evidence:
        """Asks each teacher about the rows it was given, in the order of `routing.teacher_ids`.

        Teachers without a trained token are not called and have no entry in the evidence.

        Args:
            rollouts: The whole batch.
            routing: Weights of its rows.
            support: What to ask for.
            k: Number of entries, for `topk` only.

        Raises:
            RoutingError: The routing is of other prompts than the batch.
            UnknownChoiceError: A teacher with weight is not in the pool.
            UnsupportedCombinationError: A teacher does not offer the support.
            DeadTeacherError: Scores are not finite.
        """
        answers = self.each(rollouts, routing, support=support, k=k)
        return Evidence(teachers=tuple(answer_of(said) for _, said in answers), num_tokens=rollouts.num_tokens)

    def each(
        self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None
    ) -> Iterator[tuple[str, Answer]]:
        """Asks as `score` does and hands over one answer after the other: evidence, or the error of a teacher that failed.

        Raises:
            MoteachError: As `score`, for what is not the failure of one teacher.
        """
        check_rows(rollouts, routing)
        asked = []
        token_rows = rollouts.token_rows
        for teacher_id in routing.teacher_ids:
            rows = routing.rows_of(teacher_id)
            tokens = torch.isin(token_rows, rows).nonzero(as_tuple=True)[0]
            # ranks that share a teacher's forwards all run them, with rows of their own or without
            if len(tokens) or getattr(self._teachers.get(teacher_id), "together", False):
                asked.append((self.get(teacher_id), rows, tokens))
        ready = score_mixed([(teacher, rows) for teacher, rows, _ in asked], rollouts, support=support, k=k)
        for place, (teacher, rows, tokens) in enumerate(asked):
            following = asked[place + 1][0] if place + 1 < len(asked) else None
            if following is not None and hasattr(following, "prepare"):
                following.prepare()
            answer: Answer
            try:
                part = rollouts.select(rows.tolist())
                answer = self._ask(teacher, part, tokens, support, k, ready.pop(teacher.teacher_id, None))
            except (DeadTeacherError, TeacherUnavailableError) as error:
                answer = error
            if len(tokens):
                yield teacher.teacher_id, answer

    def score_references(
        self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None
    ) -> Evidence:
        """Asks the checkpoint each teacher was trained from about that teacher's rows, see `References.score`."""
        return self.references.score(rollouts, routing, support=support, k=k)

    def _ask(
        self,
        teacher: Teacher,
        part: RolloutBatch,
        tokens: Int[Tensor, " scored"],
        support: Support,
        k: int | None,
        said: TeacherEvidence | None = None,
    ) -> TeacherEvidence:
        """Scores a sub-batch whose packed tokens are `tokens` of the whole batch, and maps the answer back."""
        if support not in teacher.supports:
            raise UnsupportedCombinationError(
                f"expected support={support} of the teacher '{teacher.teacher_id}', which offers "
                f"{', '.join(sorted(teacher.supports))}; choose one of these, or serve the teacher another way"
            )
        if said is None:
            said = teacher.score(part, support=support, k=k)
        for what, values in (
            ("hidden states", said.hidden),
            ("top-k logprobs", said.topk_logprobs),
            ("logprobs", said.sampled_logprobs),
        ):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise dead(teacher.teacher_id, what)
        hidden = said.hidden if said.hidden is None else said.hidden.to(self._hidden_dtype or said.hidden.dtype)
        return dataclasses.replace(said, teacher_id=teacher.teacher_id, tokens=tokens[said.tokens], hidden=hidden)


def store_of(memory: int | None, *, device: str = "cpu") -> ModelStore | MappedStore:
    """Makes the store of whole models: mapped files within a budget of bytes, or all of them loaded without one."""
    return ModelStore(device=device) if memory is None else MappedStore(memory=memory, device=device)


def check_rows(rollouts: RolloutBatch, routing: Routing) -> None:
    """Refuses a routing of other prompts than the batch.

    Raises:
        RoutingError: Says how many differ.
    """
    prompts = tuple(rollout.prompt.prompt_id for rollout in rollouts.rollouts)
    if prompts != routing.prompt_ids:
        raise RoutingError(
            f"expected a routing of the batch's own prompts, got {len(routing.prompt_ids)} prompt ids that "
            "differ from the "
            f"batch's {len(prompts)}; rows would be graded by the wrong teacher"
        )


def build_teachers(
    experts: Sequence[ExpertSpec],
    *,
    max_tokens_per_forward: int = 16384,
    chunk_size: int = 1024,
    vocab_size: int | None = None,
    store: ModelStore | MappedStore | None = None,
    device: str = "cpu",
    served: Mapping[str, Any] | None = None,
    wraps: Mapping[str, Callable[[Any], Any]] | None = None,
    contexts: Mapping[str, Callable[[Any], Any]] | None = None,
) -> list[Any]:
    """Builds teachers for experts: weights load on first use, equal checkpoints load once, servers are asked on first use.

    Args:
        experts: The run's experts.
        max_tokens_per_forward: Padded tokens in one teacher forward.
        chunk_size: Tokens whose logits exist at once.
        vocab_size: Size of the student's head, see `HFTeacher`.
        store: Where whole models are kept, see `store_of`; None keeps all of them loaded.
        device: Where adapters' bases live, and whole models without a `store`: a torch device, or `auto`.
        served: Further arguments of `VLLMTeacher`, for experts with a `url`.
        wraps: What is put around the teachers of these names, which keep a vocabulary of their own.
        contexts: What is put around the teachers of these names, which read more than the student.

    Raises:
        ConfigError: A size is not positive, or a server's host is not allowed.
    """
    models = ModelStore(device=device) if store is None else store
    adapters = AdapterStore(device=device)
    wraps = wraps or {}
    student_size = vocab_size
    teachers: list[Any] = []
    for spec in experts:
        vocab_size = None if spec.name in wraps else student_size
        if spec.url is not None:
            from moteach.teachers.vllm import VLLMTeacher

            teachers.append(
                VLLMTeacher(
                    teacher_id=spec.name,
                    url=spec.url,
                    served_name=spec.served_name,
                    model=spec.model,
                    revision=spec.revision,
                    dtype=spec.dtype,
                    chunk_size=chunk_size,
                    vocab_size=vocab_size,
                    **(served or {}),
                )
            )
            continue
        if spec.student is not None:
            teachers.append(_student(spec, chunk_size, max_tokens_per_forward))
            continue
        if spec.adapter is not None and spec.base is not None:
            teachers.append(
                LoRATeacher(
                    teacher_id=spec.name,
                    adapter=spec.adapter,
                    base=spec.base,
                    revision=spec.revision,
                    dtype=spec.dtype,
                    chunk_size=chunk_size,
                    max_tokens_per_forward=max_tokens_per_forward,
                    vocab_size=vocab_size,
                    store=adapters,
                )
            )
            continue
        teachers.append(
            HFTeacher(
                teacher_id=spec.name,
                model=spec.weights,
                revision=spec.revision,
                dtype=spec.dtype,
                chunk_size=chunk_size,
                max_tokens_per_forward=max_tokens_per_forward,
                vocab_size=vocab_size,
                store=models,
            )
        )
    teachers = [wraps[one.teacher_id](one) if one.teacher_id in wraps else one for one in teachers]
    told = contexts or {}
    return [told[one.teacher_id](one) if one.teacher_id in told else one for one in teachers]


def _student(spec: ExpertSpec, chunk_size: int, max_tokens_per_forward: int) -> StudentTeacher:
    return StudentTeacher(
        teacher_id=spec.name,
        stage=cast(Stage, spec.student),
        decay=spec.decay,
        snapshot_steps=spec.snapshot_steps,
        chunk_size=chunk_size,
        max_tokens_per_forward=max_tokens_per_forward,
    )
