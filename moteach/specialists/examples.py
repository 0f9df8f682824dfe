"""Supervised examples of the arena: a prompt, its reference completion, and which of its tokens are learned."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moteach.data.arena.rules import solve
from moteach.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """Token ids of a prompt and its reference completion, and which of them carry the loss."""

    token_ids: tuple[int, ...]
    learned: tuple[bool, ...]


class ExampleMaker:
    """Turns arena texts into examples.

    Args:
        tokenizer: A tokenizer with one token per character, as the arena's is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ids: dict[str, int] = dict(tokenizer.get_vocab())
        self._eos_id = int(tokenizer.eos_token_id)

    def __call__(self, text: str, *, kinds: Collection[str] | None = None) -> Example:
        """Builds the example of a prompt text.

        Args:
            text: An arena prompt.
            kinds: Step kinds that carry the loss; None means every step. The end of sequence belongs to the last step.
        """
        token_ids = self._encode(text)
        learned = [False] * len(token_ids)
        for step in solve(text):
            token_ids += self._encode(step.text)
            learned += [kinds is None or step.kind in kinds] * len(step.text)
        return Example(token_ids=(*token_ids, self._eos_id), learned=(*learned, learned[-1]))

    def _encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise DataError(
                f"expected a character-level tokenizer that knows every character of {text!r}, and it lacks {error}; "
                "load the tokenizer that ships with the arena"
            ) from None


def collate(
    examples: Sequence[Example], *, pad_id: int
) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """Pads examples on the right.

    Returns:
        Token ids, and the mask of tokens that carry the loss.
    """
    width = max(len(example.token_ids) for example in examples)
    token_ids = torch.tensor([[*e.token_ids, *[pad_id] * (width - len(e.token_ids))] for e in examples])
    learned = torch.tensor([[*e.learned, *[False] * (width - len(e.learned))] for e in examples])
    return token_ids, learned
