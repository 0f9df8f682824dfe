"""Arena prompts: an endless training stream and a fixed held-out set, which never share a text.

Which of the two a text belongs to is decided by the text itself: see `splits`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, overload

from moteach.data.arena.families import COMPOSITE, FAMILIES, Family, families_of
from moteach.data.arena.rules import completion_of, solve
from moteach.data.arena.splits import draw_distinct, draw_text
from moteach.data.base import PromptSet
from moteach.errors import ConfigError, DataError, UnknownChoiceError, nearest
from moteach.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOMAINS = ("math", "code", "search")
"""The domains that have an expert; `composite` is the fourth one and needs two of them."""

VERIFIER = "arena"
_EVALUATION_SEED = "evaluation"


def make_prompt(text: str, *, family: Family, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Builds the prompt of a text: its id is made of domain, family and a hash of the text, so equal texts share it."""
    steps = solve(text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Prompt(
        prompt_id=f"{family.domain}-{family.name}-{digest}",
        text=text,
        token_ids=tuple(tokenizer(text, add_special_tokens=False)["input_ids"]),
        domain=family.domain,
        answer="".join(step.text for step in steps),
        verifier=VERIFIER,
        metadata={"family": family.name, "steps": [{"kind": step.kind, "text": step.text} for step in steps]},
    )


def reference_completion(prompt: Prompt) -> str:
    """Returns the reference completion of an arena prompt, worked out from its text (no end-of-sequence token)."""
    return completion_of(prompt.text)


class ArenaTrain(Sequence[Prompt]):
    """The training prompts, drawn when they are asked for: prompt `i` depends on the seed and on `i` only.

    Domains take turns, and inside a domain its families do. Small families repeat a text (and its prompt id) now and then.
    """

    def __init__(self, *, domains: Sequence[str], size: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self._domains = tuple(domains)
        self._size = size
        self._seed = seed
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self._size * len(self._domains)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self._draw(position) for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        return self._draw(position)

    def rows_by_domain(self) -> Mapping[str, Sequence[int]]:
        """Returns the rows of each domain without drawing a prompt."""
        return {domain: range(first, len(self), len(self._domains)) for first, domain in enumerate(self._domains)}

    def _draw(self, position: int) -> Prompt:
        turn, which = divmod(position, len(self._domains))
        families = families_of(self._domains[which])
        family = families[turn % len(families)]
        text = draw_text(family, Random(f"train/{self._seed}/{position}"), split="train")
        return make_prompt(text, family=family, tokenizer=self._tokenizer)


class ArenaSource:
    """The prompts of the arena: a small world of verified tasks which a laptop learns in seconds.

    Args:
        seed: Seed of the training stream. The evaluation prompts do not depend on it.
        train_size: Training prompts per domain.
        evaluation_size: Held-out prompts per domain, spread evenly over its families.
        domains: Which domains to draw from: math, code, search, composite.
        composite_size: Held-out composite prompts (a look-up followed by arithmetic or by a program) that stand in the
            evaluation set as domain `composite`, whatever `domains` says; 0 leaves `composite` as `domains` has it.
        shares: Weight of a domain in training, 1 where it is not named; the weights of the experts multiply it.

    Raises:
        ConfigError: A size is out of range, or no domain or a domain twice.
        UnknownChoiceError: A domain does not exist.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        train_size: int = 20000,
        evaluation_size: int = 1000,
        domains: Sequence[str] = DOMAINS,
        composite_size: int = 0,
        shares: Mapping[str, float | int] | None = None,
    ) -> None:
        self.domains = _checked_domains(domains)
        self._shares = {} if shares is None else dict(shares)
        known = {family.domain for family in FAMILIES.values()}
        for name, share in self._shares.items():
            if name not in known or not 0 <= share < float("inf"):
                raise ConfigError(
                    f"data.shares: expected a finite number of at least 0 for a domain of the arena, got {share} for "
                    f"'{name}'; {nearest(name, known)}"
                )
        for name, size, least in (
            ("train_size", train_size, 1),
            ("evaluation_size", evaluation_size, 1),
            ("composite_size", composite_size, 0),
        ):
            if size < least:
                raise ConfigError(
                    f"expected {name} >= {least}, got {size}; an empty set would be trained or scored on nothing"
                )
        self._seed = seed
        self._train_size = train_size
        self._evaluation_sizes = dict.fromkeys(self.domains, evaluation_size)
        if composite_size:
            self._evaluation_sizes[COMPOSITE] = composite_size

    def load(self, tokenizer: PreTrainedTokenizerBase, *, verifiers: Collection[str] | None = None) -> PromptSet:
        """Draws and tokenises the evaluation prompts and makes the lazy training sequence.

        Args:
            tokenizer: Tokenizer of the student.
            verifiers: Names that may grade a prompt; the arena brings its own.

        Raises:
            DataError: A family has fewer held-out texts than asked for, or `verifiers` lacks `arena`.
        """
        if verifiers is not None and VERIFIER not in verifiers:
            raise DataError(
                f"expected a verifier '{VERIFIER}', got {sorted(verifiers)}; no arena prompt could be graded"
            )
        train = ArenaTrain(domains=self.domains, size=self._train_size, seed=self._seed, tokenizer=tokenizer)
        evaluation = [
            prompt
            for domain, size in self._evaluation_sizes.items()
            for prompt in _evaluation(domain, size, tokenizer=tokenizer)
        ]
        domains = tuple(dict.fromkeys((*self.domains, *self._evaluation_sizes)))
        return PromptSet(train=train, evaluation=tuple(evaluation), domains=domains, shares=self._shares)


def _evaluation(domain: str, size: int, *, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    prompts: list[Prompt] = []
    families = families_of(domain)
    for number, family in enumerate(families):
        count = size // len(families) + (number < size % len(families))
        texts = draw_distinct(family, count, split="evaluation", seed=_EVALUATION_SEED)
        prompts.extend(make_prompt(text, family=family, tokenizer=tokenizer) for text in texts)
    return prompts


def _checked_domains(domains: Sequence[str]) -> tuple[str, ...]:
    known = sorted({family.domain for family in FAMILIES.values()})
    for domain in domains:
        if domain not in known:
            raise UnknownChoiceError(f"expected arena domains, got {domain!r}; {nearest(domain, known)}")
    if not domains or len(set(domains)) != len(domains):
        raise ConfigError(f"expected at least one arena domain and none twice, got {list(domains)}")
    return tuple(domains)
