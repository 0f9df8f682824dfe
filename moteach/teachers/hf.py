"""A teacher that is a Hugging Face model in this process."""

from __future__ import annotations

import dataclasses

from torch import nn

from moteach.teachers.mapped import MappedStore
from moteach.teachers.scoring import check_settings, score_with
from moteach.teachers.store import ModelStore
from moteach.types import Head, RolloutBatch, Support, TeacherEvidence


class HFTeacher:
    """Scores with a whole model, loaded on first use.

    Args:
        teacher_id: Name of the expert.
        model: Folder or hub id; safetensors only, no code of the repository is run.
        revision: Commit of the hub repository.
        dtype: `float32`, `bfloat16` or `auto`.
        chunk_size: Tokens whose logits exist at once (supports `topk` and `sampled`).
        max_tokens_per_forward: Padded tokens in one forward of the body.
        vocab_size: Size of the student's head; the rows of a larger teacher head beyond it are left out.
        store: Where loaded weights are kept; teachers that share a store share the models they have in common.
    """

    supports: frozenset[Support] = frozenset({"full", "topk", "sampled"})

    def __init__(
        self,
        *,
        teacher_id: str,
        model: str,
        revision: str | None = None,
        dtype: str = "float32",
        chunk_size: int = 1024,
        max_tokens_per_forward: int = 16384,
        vocab_size: int | None = None,
        store: ModelStore | MappedStore | None = None,
    ) -> None:
        check_settings(chunk_size=chunk_size, max_tokens_per_forward=max_tokens_per_forward)
        self.teacher_id = teacher_id
        self._model = model
        self._revision = revision
        self._dtype = dtype
        self._chunk_size = chunk_size
        self._max_tokens = max_tokens_per_forward
        self._vocab_size = vocab_size
        self._store = ModelStore() if store is None else store

    @property
    def model(self) -> nn.Module:
        """The frozen model, loaded when this is the first use."""
        return self._store.get(self._model, revision=self._revision, dtype=self._dtype)

    def prepare(self) -> None:
        """Begins to load the weights in the background, for a store that gave them up and has room."""
        if isinstance(self._store, MappedStore):
            self._store.prefetch(self._model, revision=self._revision, dtype=self._dtype)

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        """Scores every trained token of these rows, see `moteach.teachers.base.Teacher.score`."""
        said = score_with(
            self.model,
            rollouts,
            teacher_id=self.teacher_id,
            support=support,
            k=k,
            chunk_size=self._chunk_size,
            max_tokens_per_forward=self._max_tokens,
            vocab_size=self._vocab_size,
        )
        if isinstance(self._store, MappedStore) and isinstance(said.head, Head):
            # evidence outlives the weights: a head that it held would stay in memory until the end of the step
            rows = len(said.head.weight)
            lent = self._store.lend(self._model, revision=self._revision, dtype=self._dtype, rows=rows)
            return dataclasses.replace(said, head=lent)
        return said
