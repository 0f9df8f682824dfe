"""What a source of prompts gives: a training set, a held-out set and the names of their domains."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from moteach.errors import DataError
from moteach.types import Prompt

DEFAULT_DOMAIN = "default"
"""Domain of the prompts that name none."""

USER_TEXT = "user_text"
"""Key of a chat prompt's metadata with what the user says; a router would see the template in every prompt otherwise."""

CONVERSATION = "conversation"
"""Key of a chat prompt's metadata with its messages, for teachers that read them in a template of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Prompts ready for use: tokenised, identified, split."""

    train: Sequence[Prompt]
    """May be lazy. A lazy sequence offers `rows_by_domain() -> Mapping[str, Sequence[int]]`, so that nobody has to draw
    every prompt to know its domain."""
    evaluation: Sequence[Prompt]
    domains: tuple[str, ...]
    """Domains of both, in order of first appearance."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """What the data proposes as the weight of a domain in training; 1 for a domain it does not name."""

    @classmethod
    def of(cls, train: Sequence[Prompt], evaluation: Sequence[Prompt] = ()) -> PromptSet:
        """Collects the domains of prompts that are already in memory."""
        domains = tuple(dict.fromkeys(domain_of(prompt) for part in (train, evaluation) for prompt in part))
        return cls(train=tuple(train), evaluation=tuple(evaluation), domains=domains)


@runtime_checkable
class PromptSource(Protocol):
    """A component of group `data`: built from flat arguments, it reads nothing until it is asked to load."""

    def load(self, tokenizer: Any, *, verifiers: Collection[str] | None = None) -> PromptSet:
        """Reads, checks, splits and tokenises the prompts.

        Args:
            tokenizer: Tokenizer of the student.
            verifiers: Names a row may use as `verifier`; None leaves them unchecked.

        Raises:
            DataError: The data cannot be used; says where, what was expected and the remedy.
        """
        ...


def domain_of(prompt: Prompt) -> str:
    """Returns the domain of a prompt, `default` when it names none."""
    return DEFAULT_DOMAIN if prompt.domain is None else prompt.domain


def words_of(prompt: Prompt) -> str:
    """Returns what the user says in a prompt: its text, or of a chat the messages of the user without the template."""
    return str(prompt.metadata.get(USER_TEXT, prompt.text))


def rows_by_domain(prompts: Sequence[Prompt]) -> Mapping[str, Sequence[int]]:
    """Groups the rows of a sequence of prompts by domain, in order; a lazy sequence answers for itself."""
    own = getattr(prompts, "rows_by_domain", None)
    if own is not None:
        answer: Mapping[str, Sequence[int]] = own()
        return answer
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(domain_of(prompt), []).append(row)
    return rows


def text_key(text: str) -> bytes:
    """Hashes a text up to case, white space and Unicode form: texts that a reader calls the same share a key."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normalised.encode(), digest_size=16).digest()


def fingerprint(prompts: PromptSet, *, sample: int = 1000) -> str:
    """Hashes ids and texts of the prompts, so that a resumed run notices other data.

    Prompts in memory all count; of a lazy training set, its length and `sample` evenly spaced prompts.
    """
    train: Sequence[Prompt] = prompts.train
    if not isinstance(train, tuple | list):
        train = [train[row] for row in range(0, len(train), max(1, len(train) // sample))]
    digest = hashlib.blake2b(str(len(prompts.train)).encode(), digest_size=16)
    for prompt in (*train, *prompts.evaluation):
        digest.update(f"{prompt.prompt_id}\0{prompt.text}\0{prompt.answer}\0".encode())
    return digest.hexdigest()


def check_disjoint(prompts: PromptSet) -> None:
    """Refuses a held-out set that shares texts with the training set, and ids that stand for two texts.

    Texts are compared by `text_key`. A lazy training set is not drawn for this: the sampler compares what it draws.

    Raises:
        DataError: Names one example and how many there are.
    """
    owners: dict[str, bytes] = {}
    train: dict[bytes, Prompt] = {}
    drawn = prompts.train if isinstance(prompts.train, tuple | list) else ()
    for part in (drawn, prompts.evaluation):
        for prompt in part:
            key = text_key(prompt.text)
            if part is drawn:
                train.setdefault(key, prompt)
            if owners.setdefault(prompt.prompt_id, key) != key:
                raise DataError(
                    f"prompt id '{prompt.prompt_id}' stands for two different texts; sampling noise and scores are keyed "
                    "by the id, so they would be mixed up. Give every prompt its own id"
                )
    shared = [(train[key], prompt) for prompt in prompts.evaluation if (key := text_key(prompt.text)) in train]
    if shared:
        left, right = shared[0]
        raise DataError(
            f"expected held-out prompts that are not trained on, got {len(shared)} that are: for instance "
            f"{_short(right.text)} (evaluation '{right.prompt_id}', train '{left.prompt_id}'); scores would measure "
            "memory. Remove them from one of the two"
        )


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
