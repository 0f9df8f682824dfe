"""What a run does about teachers whose tokenizer is not the student's: refuse them, or align them by bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from moteach.catalogue.modeling import load_tokenizer
from moteach.catalogue.spec import ExpertSpec, require_built
from moteach.errors import ConfigError, nearest
from moteach.teachers.aligned import AlignedTeacher
from moteach.teachers.bytes import same_tokens
from moteach.types import Support

Wrap = Callable[[Any], AlignedTeacher]
"""Makes an aligned teacher of one that speaks its own tokens."""


class Alignment(Protocol):
    """Decides which teachers are asked in tokens of their own."""

    @property
    def supports(self) -> frozenset[Support]:
        """Supports of a run with it."""
        ...

    def wraps(self, experts: Sequence[ExpertSpec], student_tokenizer: Any) -> dict[str, Wrap]:
        """Says how to wrap the teachers that need it, by name."""
        ...


class NoAlignment:
    """Every teacher must have the student's tokenizer; others are refused before the first step."""

    supports: frozenset[Support] = frozenset({"full", "topk", "sampled"})

    def wraps(self, experts: Sequence[ExpertSpec], student_tokenizer: Any) -> dict[str, Wrap]:
        """Wraps nobody."""
        return {}


class ByteAlignment:
    """Teachers with another tokenizer grade the same bytes in their own tokens, see `AlignedTeacher`.

    Teachers with the student's tokens are asked as without it, to the last bit.

    Args:
        prompt: `template`: a conversation is written in the teacher's own chat template; `text`: as the student read it.
        end_of_sequence: Grade the end of completions with the teacher's own end-of-sequence token; false where its tokenizer
            names another token than the one its turns end with.
        floor: Logprob of a token that the teacher could not have written, in nats; None leaves it ungraded, and a student
            learns to write such tokens.

    Raises:
        ConfigError: There is no such format of prompts, or the floor is not below 0.
    """

    supports: frozenset[Support] = frozenset({"sampled"})

    def __init__(
        self,
        *,
        prompt: Literal["template", "text"] = "template",
        end_of_sequence: bool = True,
        floor: float | None = -10.0,
    ) -> None:
        if prompt not in ("template", "text"):
            raise ConfigError(f"alignment.prompt: got '{prompt}'; {nearest(prompt, ('template', 'text'))}")
        if floor is not None and not -math.inf < floor < 0:
            raise ConfigError(
                f"alignment.floor: expected a finite number below 0, or null, got {floor}; what a teacher cannot write "
                "would be likely, or end the run"
            )
        self._form = prompt
        self._end = end_of_sequence
        self._floor = floor

    def wraps(self, experts: Sequence[ExpertSpec], student_tokenizer: Any) -> dict[str, Wrap]:
        """Compares the tokenizers and says how to wrap the teachers whose tokens are others.

        Teachers behind servers whose card names no tokenizer must have the student's; they are asked before the first step.

        Raises:
            ConfigError: A tokenizer cannot be opened.
            MissingFileError: An expert is not built yet.
        """
        found: dict[str, Wrap] = {}
        for spec in experts:
            require_built(spec)
            place = tokenizer_place(spec)
            if place is None:
                continue
            tokenizer = load_tokenizer(place, revision=spec.revision if spec.tokenizer is None else None)
            if not same_tokens(student_tokenizer, tokenizer):
                found[spec.name] = partial(
                    AlignedTeacher,
                    tokenizer=tokenizer,
                    student_tokenizer=student_tokenizer,
                    prompt=self._form,
                    end_of_sequence=self._end,
                    floor=self._floor,
                )
        return found


def tokenizer_place(spec: ExpertSpec) -> str | None:
    """Where an expert's tokenizer is: `tokenizer`, else beside its weights; None for the student or a server alone."""
    if spec.student is not None:
        return None
    if spec.tokenizer is not None:
        return spec.tokenizer
    if spec.url is not None:
        return spec.model
    return spec.base or spec.weights
