"""A teacher with a tokenizer of its own: it reads the student's text in its own tokens, and is heard in the student's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moteach.catalogue.modeling import body_and_head
from moteach.divergences.spans import Spans, ends_of, share_logprobs, spans_of
from moteach.errors import ConfigError, IncompatibleTeacherError, UnsupportedCombinationError
from moteach.teachers.base import Teacher
from moteach.teachers.bytes import ByteTokenizer, PromptFormat, is_cut
from moteach.teachers.scoring import check_request
from moteach.types import Prompt, Rollout, RolloutBatch, Support, TeacherEvidence

_COUNTED = ("tokens", "scored", "spans", "barred", "rows_cut")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One completion in the teacher's tokens, and how both tokenizations lie on its bytes."""

    index: int
    rollout: Rollout
    spans: Spans
    count: int
    """Tokens of the student that lie in a span, the first ones."""
    barred: bool
    """The token after them is one that the teacher could not have written."""


class AlignedTeacher:
    """Wraps a teacher whose tokenizer is not the student's; support `sampled` only.

    The bytes of each completion are written in the teacher's tokens behind the prompt in the teacher's tokens, the teacher
    scores those, and the logprobs are moved over spans (`moteach.divergences.spans`). The end of a completion is the
    teacher's own end-of-sequence token.

    The teacher could not have written bytes that are no text, a character it has no token for, or a special token of the
    student inside the completion. The first such token has the logprob `floor` in the place of minus infinity; of what
    follows the teacher says nothing, and `tokens` of the evidence leaves it out. Were the token itself left out, it would be
    the one choice without a penalty, and a student learns to write nothing else (measured on a tiny model: ungraded tokens
    rose from 8 to 100 % in 18 steps). A character that the length limit cut, and a row longer than the teacher reads, are
    left out.

    Args:
        inner: The teacher, with its own vocabulary.
        tokenizer: Its tokenizer.
        student_tokenizer: The student's.
        prompt: `template` or `text`, see `ByteTokenizer.prompt`.
        end_of_sequence: Grade the end of completions too.
        floor: Logprob of a token that the teacher could not have written; None leaves it out.

    Raises:
        IncompatibleTeacherError: The tokens of either do not say which bytes they stand for.
    """

    supports: frozenset[Support] = frozenset({"sampled"})

    def __init__(
        self,
        inner: Teacher,
        *,
        tokenizer: Any,
        student_tokenizer: Any,
        prompt: PromptFormat = "template",
        end_of_sequence: bool = True,
        floor: float | None = -10.0,
    ) -> None:
        self.inner: Any = inner
        self.teacher_id = inner.teacher_id
        self.tokenizer = tokenizer
        self._own = ByteTokenizer(tokenizer, name=inner.teacher_id)
        self._student = ByteTokenizer(student_tokenizer, name="the student")
        self._form: PromptFormat = prompt
        self._end = end_of_sequence
        self._floor = floor
        self._counts = dict.fromkeys(_COUNTED, 0)

    @property
    def model(self) -> nn.Module:
        """The model that is wrapped, loaded on first use; not every teacher has one."""
        model: nn.Module = self.inner.model
        return model

    def prepare(self) -> None:
        """Begins to load the weights, for a teacher that does so in the background."""
        if hasattr(self.inner, "prepare"):
            self.inner.prepare()

    def prompt(self, prompt: Prompt) -> Prompt:
        """The same prompt in the teacher's tokens."""
        return replace(prompt, token_ids=self._own.prompt(prompt, form=self._form))

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        """Scores the tokens of these rows that share an end with the teacher's own, see `Teacher.score`.

        Raises:
            UnsupportedCombinationError: Another support than `sampled` is asked for.
        """
        check_request(self.teacher_id, support, k)
        if support != "sampled":
            raise UnsupportedCombinationError(
                f"expected support=sampled of the teacher '{self.teacher_id}', which has another tokenizer than the student, "
                f"got support={support}; its distribution is over other tokens, and entries would be compared by number alone. "
                "Choose support=sampled, or a teacher with the student's tokenizer"
            )
        rows = [self._row(index, one) for index, one in enumerate(rollouts.rollouts)]
        room = self._room()
        fitting = [row for row in rows if room is None or _length(row.rollout) <= room]
        asked = [row for row in fitting if row.count]
        said: dict[int, Float[Tensor, " own"]] = {}
        if asked:
            batch = RolloutBatch.from_rollouts([row.rollout for row in asked], pad_id=0)
            answer = self.inner.score(batch, support="sampled").sampled_logprobs.cpu()
            sizes = [len(row.rollout.completion_ids) for row in asked]
            said = {row.index: part for row, part in zip(asked, answer.split(sizes), strict=True)}
        counts = torch.tensor([len(one.completion_ids) for one in rollouts.rollouts], dtype=torch.long)
        starts = (counts.cumsum(0) - counts).tolist()
        tokens: list[Int[Tensor, " scored"]] = [torch.zeros(0, dtype=torch.long)]
        values: list[Float[Tensor, " scored"]] = [torch.zeros(0)]
        for row in fitting:
            own = torch.tensor(rollouts.rollouts[row.index].rollout_logprobs)[: len(row.spans.student)]
            if row.count:
                values.append(share_logprobs(own, said[row.index], row.spans).float())
            if row.barred and self._floor is not None:
                values.append(torch.tensor([self._floor]))
            tokens.append(starts[row.index] + torch.arange(row.count + (row.barred and self._floor is not None)))
        self._count(rollouts, fitting, counts)
        return TeacherEvidence(
            teacher_id=self.teacher_id,
            support="sampled",
            tokens=torch.cat(tokens),
            sampled_logprobs=torch.cat(values),
            partial=True,
        )

    def check(self, *, support: Support, k: int | None = None) -> None:
        """Finds, before the first step, what would end the run later or silently go wrong.

        Raises:
            UnsupportedCombinationError: Another support than `sampled` is wanted.
            IncompatibleTeacherError: The head has fewer rows than the teacher's own tokenizer has tokens.
            MoteachError: The teacher cannot be opened, or its server not be asked.
        """
        if support != "sampled":
            raise UnsupportedCombinationError(
                f"expected support=sampled for the teacher '{self.teacher_id}', which has another tokenizer than the student, "
                f"got support={support}; distributions over other tokens cannot be compared. Set support=sampled"
            )
        if hasattr(self.inner, "check"):
            self.inner.check(self.tokenizer, support=support, k=k)
            return
        rows = int(body_and_head(self.inner.model)[1].weight.shape[0])
        if rows < len(self.tokenizer):
            raise IncompatibleTeacherError(
                f"expected a head of at least {len(self.tokenizer)} rows (its tokenizer's) from the teacher "
                f"'{self.teacher_id}', got {rows}; some of its tokens could not be scored: name its own tokenizer by "
                "'tokenizer:' on the card"
            )

    def lap(self) -> dict[str, float]:
        """Counts of requests of a teacher behind a server since the last lap; empty for one in this process."""
        return dict(self.inner.lap()) if hasattr(self.inner, "lap") else {}

    def alignment_lap(self) -> dict[str, float]:
        """What was aligned since the last lap.

        Returns:
            `scored`: share of the student's tokens that lie in a span; `tokens_per_span`: of the student, 1 where both
            tokenizers agree; `barred`: tokens that the teacher could not have written; `rows_cut`: completions of which some
            token lies in no span. Nothing when nothing was asked.
        """
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        if not counts["tokens"]:
            return {}
        return {
            "scored": counts["scored"] / counts["tokens"],
            "tokens_per_span": counts["scored"] / max(counts["spans"], 1),
            "barred": float(counts["barred"]),
            "rows_cut": float(counts["rows_cut"]),
        }

    def _row(self, index: int, rollout: Rollout) -> _Row:
        """A completion in the teacher's tokens, as far as it can write them."""
        mine, text = self._student.written(rollout.completion_ids, finished=rollout.finished)
        readable = len(mine.ids) == len(rollout.completion_ids)
        ends = readable and sum(mine.lengths) > len(text)
        theirs = self._own.write(text, end=ends and self._end)
        spans = spans_of(ends_of(list(mine.lengths)), ends_of(list(theirs.lengths)))
        count = int((spans.student < spans.count).sum())
        left = len(rollout.completion_ids) - count
        # the end alone, where it is not graded, or a character that the length limit cut: neither is a fault
        spared = readable and ((ends and left == 1) or (not ends and is_cut(text, at=sum(theirs.lengths))))
        # the tokens of the teacher behind the last common end grade nothing
        ids = theirs.ids[: int((spans.teacher < spans.count).sum())]
        written = replace(
            rollout,
            prompt=self.prompt(rollout.prompt),
            completion_ids=ids,
            rollout_logprobs=(0.0,) * len(ids),
        )
        spans = replace(spans, teacher=spans.teacher[: len(ids)])
        return _Row(index=index, rollout=written, spans=spans, count=count, barred=left > 0 and not spared)

    def _room(self) -> int | None:
        """Tokens the teacher can read, where its model is in this process and says so."""
        if hasattr(self.inner, "check"):
            return None
        config = self.inner.model.config if hasattr(self.inner, "model") else None
        room = getattr(config, "max_position_embeddings", None)
        return room if isinstance(room, int) else None

    def _count(self, rollouts: RolloutBatch, fitting: list[_Row], counts: Tensor) -> None:
        if rollouts.num_tokens != int(counts.sum()):
            raise ConfigError(
                f"expected completions whose every token is trained, got {rollouts.num_tokens} of {int(counts.sum())}; the "
                f"scores of the teacher '{self.teacher_id}' would be moved to other tokens"
            )
        self._counts["tokens"] += rollouts.num_tokens
        self._counts["scored"] += sum(row.count for row in fitting)
        self._counts["spans"] += sum(row.spans.count for row in fitting)
        self._counts["barred"] += sum(row.barred for row in fitting)
        whole = sum(row.count == int(counts[row.index]) for row in fitting)
        self._counts["rows_cut"] += len(rollouts) - whole


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.completion_ids)
