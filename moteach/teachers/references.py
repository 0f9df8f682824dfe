"""What the checkpoints that the teachers were trained from say: the origin that a teacher's opinion is measured against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError
from moteach.teachers.base import Teacher
from moteach.teachers.hf import HFTeacher
from moteach.teachers.mapped import MappedStore
from moteach.teachers.store import ModelStore
from moteach.types import Evidence, RolloutBatch, Routing, Support, TeacherEvidence


class References:
    """Scores a batch with the origins of its teachers; an origin that several teachers share is asked once.

    Args:
        origins: The origin of each teacher, by the teacher's name. Teachers that share a checkpoint share the object.
    """

    def __init__(self, origins: Mapping[str, Teacher]) -> None:
        self._origins = dict(origins)

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[ExpertSpec],
        *,
        store: ModelStore | MappedStore,
        chunk_size: int = 1024,
        max_tokens_per_forward: int = 16384,
        vocab_size: int | None = None,
        wraps: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> References:
        """Builds the origins that the cards name: `reference`, or the `base` of an adapter.

        Args:
            experts: The run's experts; those without an origin are left out.
            store: Where loaded weights are kept.
            chunk_size: Tokens whose logits exist at once.
            max_tokens_per_forward: Padded tokens in one forward.
            vocab_size: Size of the student's head, see `HFTeacher`.
            wraps: What is put around the teachers of these names, and so around their origins.
        """
        wraps = wraps or {}
        built: dict[str, Any] = {}
        origins: dict[str, Teacher] = {}
        for spec in experts:
            place = spec.reference or spec.base
            if place is None:
                continue
            if place not in built:
                origin = HFTeacher(
                    teacher_id=place,
                    model=place,
                    revision=None if spec.reference else spec.revision,
                    dtype=spec.dtype,
                    chunk_size=chunk_size,
                    max_tokens_per_forward=max_tokens_per_forward,
                    vocab_size=None if spec.name in wraps else vocab_size,
                    store=store,
                )
                built[place] = wraps[spec.name](origin) if spec.name in wraps else origin
            origins[spec.name] = built[place]
        return cls(origins)

    def missing(self, teacher_ids: Sequence[str]) -> list[str]:
        """Returns the teachers whose origin is not known."""
        return [name for name in teacher_ids if name not in self._origins]

    def score(self, rollouts: RolloutBatch, routing: Routing, *, support: Support, k: int | None = None) -> Evidence:
        """Asks the origin of each teacher about the rows that the teacher was given.

        Args:
            rollouts: The whole batch.
            routing: Weights of its rows, of the teachers.
            support: What to ask for.
            k: Number of entries, for `topk` only.

        Returns:
            One entry a teacher with a row, under the *teacher's* name and in the order of `routing.teacher_ids`; its
            `tokens` are packed indices of the whole batch.

        Raises:
            ConfigError: The origin of a teacher with a row is not known.
        """
        rows = {name: routing.rows_of(name) for name in routing.teacher_ids}
        asked = [name for name, own in rows.items() if len(own)]
        self.require(asked)
        said: dict[int, TeacherEvidence] = {}
        for name in asked:
            origin = self._origins[name]
            if id(origin) not in said:
                sharing = [other for other in asked if self._origins[other] is origin]
                union = sorted({int(row) for other in sharing for row in rows[other]})
                tokens = torch.isin(rollouts.token_rows, torch.tensor(union)).nonzero(as_tuple=True)[0]
                answer = origin.score(rollouts.select(union), support=support, k=k)
                said[id(origin)] = dataclasses.replace(answer, tokens=tokens[answer.tokens])
        entries = []
        for name in asked:
            own = torch.isin(rollouts.token_rows, rows[name])
            shared = said[id(self._origins[name])]
            part = Evidence(teachers=(dataclasses.replace(shared, teacher_id=name),), num_tokens=rollouts.num_tokens)
            kept = part.select(own).teachers
            index = own.nonzero(as_tuple=True)[0]
            entries += [dataclasses.replace(entry, tokens=index[entry.tokens]) for entry in kept]
        return Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens)

    def require(self, teacher_ids: Sequence[str]) -> None:
        """Refuses teachers whose origin is not known.

        Raises:
            ConfigError: Naming them and the key that says it.
        """
        missing = self.missing(teacher_ids)
        if missing:
            raise ConfigError(
                f"expected the checkpoint that each teacher was trained from, got none for {', '.join(missing)}; what the "
                "teacher learned could not be told from what it knew before. Add `reference:` to the card (or "
                "experts.<name>.reference=FOLDER-OR-HUB-ID), or choose a gate and a resolver that do not compare with it"
            )
