"""A teacher that is told more than the student: the reference answer, or instructions, inside its own prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moteach.catalogue.selves import fields_of
from moteach.catalogue.spec import ExpertSpec
from moteach.data.base import CONVERSATION, domain_of
from moteach.data.encoding import encode_chat, encode_text
from moteach.errors import ConfigError, DataError
from moteach.teachers.base import Teacher
from moteach.types import Prompt, Rollout, RolloutBatch, Support, TeacherEvidence


class PrivilegedTeacher:
    """Lets another teacher score the same completion after a longer prompt: q_t = q(. | context(x), y_<t).

    The student is still graded on p(. | x, y_<t): it learns to say without the context what the teacher says with it (OPSD,
    arXiv 2601.18734, where the context is the reference solution; OPCD, arXiv 2602.12275: experience or instructions).
    The token ids of a completion are taken over as they are and only the part before them is written anew, so the i-th
    trained token of the longer row *is* the i-th trained token of the student's row, whatever the lengths.

    Args:
        inner: Who scores.
        context: Template of the prompt: `{prompt}` is what the user wrote, `{answer}` the reference answer (a worked solution
            where the data has one). In a chat it is written into the last message of the user.
        tokenizer: The student's.
        longest: Most tokens of a row; None does not look.
    """

    def __init__(self, inner: Teacher, *, context: str, tokenizer: Any, longest: int | None = None) -> None:
        self.inner = inner
        self.context = context
        self._tokenizer = tokenizer
        self._longest = longest
        pad_id = tokenizer.pad_token_id
        self._pad_id = int(tokenizer.eos_token_id if pad_id is None else pad_id)

    @property
    def teacher_id(self) -> str:
        """Name of the expert."""
        return self.inner.teacher_id

    @property
    def supports(self) -> frozenset[Support]:
        """What the inner teacher can say."""
        return self.inner.supports

    @property
    def together(self) -> bool:
        """Whether every rank has to ask whenever one does."""
        return bool(getattr(self.inner, "together", False))

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        """Scores every trained token of these rows, see `moteach.teachers.base.Teacher.score`.

        Raises:
            DataError: A prompt has no answer that could be shown, or the row is too long with the context.
        """
        informed = self.informed(rollouts)
        if not torch.equal(informed.token_targets, rollouts.token_targets):
            raise DataError(
                f"teacher '{self.teacher_id}': expected rows that train whole completions, got {rollouts.num_tokens} trained "
                f"tokens of {informed.num_tokens}; its opinion would land on other tokens"
            )
        return self.inner.score(informed, support=support, k=k)

    def informed(self, rollouts: RolloutBatch) -> RolloutBatch:
        """The same completions after the longer prompts."""
        told: dict[str, Prompt] = {}
        rows: list[Rollout] = []
        for rollout in rollouts.rollouts:
            key = rollout.prompt.prompt_id
            if key not in told:
                told[key] = self.prompt(rollout.prompt)
            rows.append(replace(rollout, prompt=told[key]))
            length = len(told[key].token_ids) + len(rollout.completion_ids)
            if self._longest is not None and length > self._longest:
                raise DataError(
                    f"teacher '{self.teacher_id}': expected at most {self._longest} tokens with its context, got {length} for "
                    f"the prompt {key}; it would read positions that it was not made for. Shorten the context"
                )
        return RolloutBatch.from_rollouts(rows, pad_id=self._pad_id)

    def prompt(self, prompt: Prompt) -> Prompt:
        """What the teacher reads in the place of a prompt.

        Raises:
            DataError: The template shows an answer, and the prompt has none.
        """
        answer = prompt.metadata.get("solution", prompt.answer)
        if answer is None and self.shows_answer:
            raise DataError(
                f"teacher '{self.teacher_id}': expected a reference answer of the prompt {prompt.prompt_id} to show, got none; "
                "the teacher would know no more than the student. Add the column 'answer', or give it other domains"
            )
        chat = [dict(message) for message in prompt.metadata.get(CONVERSATION) or ()]
        if chat:
            last = max(place for place, message in enumerate(chat) if message["role"] == "user")
            chat[last]["content"] = self.context.format(prompt=chat[last]["content"], answer=answer)
            text, ids = encode_chat(chat, self._tokenizer)
            return replace(prompt, text=text, token_ids=ids, metadata={**prompt.metadata, CONVERSATION: chat})
        text, ids = encode_text(self.context.format(prompt=prompt.text, answer=answer), self._tokenizer)
        return replace(prompt, text=text, token_ids=ids)

    @property
    def shows_answer(self) -> bool:
        """Whether the template has a place for the reference answer."""
        return "answer" in fields_of(self.context)

    def check(self, drawn: Sequence[Prompt], *, domains: Sequence[str]) -> None:
        """Writes the longer prompts of the teacher's domains once, before the run.

        Args:
            drawn: Training prompts.
            domains: Of the teacher; none is all.

        Raises:
            DataError: One cannot be written.
            ConfigError: The context changes nothing, or its text has characters that the tokenizer does not know.
        """
        unknown = self._tokenizer.unk_token_id
        for prompt in drawn:
            if domains and domain_of(prompt) not in domains:
                continue
            informed = self.prompt(prompt)
            if unknown is not None and unknown in informed.token_ids and unknown not in prompt.token_ids:
                raise ConfigError(
                    f"teacher '{self.teacher_id}': expected a context that the tokenizer can write, got characters it does not "
                    f"know in {self.context!r}; the teacher would read something else"
                )


def contexts(
    experts: Sequence[ExpertSpec], tokenizer: Any, *, longest: int | None = None
) -> dict[str, Callable[[Teacher], Teacher]]:
    """What is put around the teachers whose cards have a `context`, by name.

    Args:
        experts: The run's experts.
        tokenizer: The student's.
        longest: Most tokens of a row.
    """

    def telling(context: str) -> Callable[[Teacher], Teacher]:
        return lambda inner: PrivilegedTeacher(inner, context=context, tokenizer=tokenizer, longest=longest)

    return {expert.name: telling(expert.context) for expert in experts if expert.context is not None}
