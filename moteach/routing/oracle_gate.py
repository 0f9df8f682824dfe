"""The gate that knows the answer: what token gates are measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError
from moteach.routing.context import GateContext, weights_of
from moteach.types import Prompt, Support

Decode = Callable[[Sequence[int]], str]


class OracleGate:
    """Each token is taught by the expert of its step's kind, from the `steps` in the prompt's metadata.

    A step ends where the student itself has written the last character of the step's reference text as often as that text
    holds it (`=` ends `A37+B52=`): where the student writes the reference, that is the reference's own boundary, and where
    it deviates, its own separators decide. A prompt without steps, and a step whose expert the router did not let through,
    is not taught. An upper bound for the built-in world, not a method.

    Args:
        kinds: Expert of a kind of step, where its name is not that of the kind.
        trace: Write a row a token into `routing.parquet`.
        tokenizer_decode: Token ids to text.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    supports: ClassVar[frozenset[Support]] = frozenset({"full", "topk", "sampled"})
    per_token: ClassVar[bool] = True

    def __init__(
        self,
        *,
        kinds: Mapping[str, str] | None = None,
        trace: bool = False,
        tokenizer_decode: Decode | None = None,
    ) -> None:
        self.kinds = dict(kinds or {})
        self.trace = trace
        self._decode = tokenizer_decode

    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """All the weight of a token on the expert of its step.

        Raises:
            ConfigError: The gate was not given a tokenizer.
        """
        if self._decode is None:
            raise ConfigError(
                "gate=oracle finds the steps in the student's text and was given no tokenizer; pass `tokenizer_decode`"
            )
        weights, names = weights_of(context), context.routing.teacher_ids
        owners: list[int] = []
        for rollout in context.rollouts.rollouts:
            pieces = [self._decode([token]) for token in rollout.completion_ids]
            kinds = kinds_of(rollout.prompt, pieces)
            experts = [None if kind is None else self.kinds.get(kind, kind) for kind in kinds]
            owners += [names.index(expert) if expert in names else -1 for expert in experts]
        column = torch.tensor(owners, dtype=torch.long)
        known = column >= 0
        weights[known.nonzero(as_tuple=True)[0], column[known]] = 1.0
        return weights * context.candidates


def kinds_of(prompt: Prompt, pieces: Sequence[str]) -> list[str | None]:
    """Kind of the step each written token belongs to; None where the prompt has no steps."""
    steps: Sequence[Mapping[str, Any]] = prompt.metadata.get("steps", ())
    if not steps:
        return [None] * len(pieces)
    found: list[str | None] = []
    index, text = 0, ""
    for piece in pieces:
        found.append(str(steps[index]["kind"]))
        text += piece
        goal = str(steps[index]["text"])
        if index < len(steps) - 1 and goal and text.count(goal[-1]) >= goal.count(goal[-1]):
            index, text = index + 1, ""
    return found
