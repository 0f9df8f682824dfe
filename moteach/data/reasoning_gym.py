"""Prompts from the procedural generators of the package reasoning-gym (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from moteach.data.base import CONVERSATION, USER_TEXT, PromptSet, check_disjoint, text_key
from moteach.data.encoding import encode_chat, encode_text, has_chat_template
from moteach.errors import ConfigError, DataError, MissingDependencyError, UnknownChoiceError, nearest
from moteach.types import Prompt

VERIFIER = "reasoning_gym"
METADATA_KEY = "reasoning_gym"
"""`Prompt.metadata[METADATA_KEY]` is `{"task", "config", "entry"}`: all that the package's own scorer reads."""

_DRAWS_PER_PROMPT = 5


class ReasoningGymPrompts:
    """Generated tasks with their own scorers; train and evaluation come from different seeds and share no text.

    Needs the package `reasoning-gym`. Questions go through the tokenizer's chat template when it has one.

    Args:
        tasks: Names of generators per domain: `{math: [chain_sum, gcd], code: [spell_backward]}`.
        train_size: Training prompts per domain, spread evenly over its tasks.
        evaluation_size: Held-out prompts per domain.
        seed: Seed of the generators.
        configs: Arguments of a generator per task: `{chain_sum: {max_terms: 3}}`.
        instruction: Text added after every question, on a line of its own.
        system_prompt: System message, for tokenizers with a chat template.

    Raises:
        ConfigError: An argument is out of range or missing.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Sequence[str]],
        train_size: int = 2000,
        evaluation_size: int = 200,
        seed: int = 0,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
        instruction: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        if not tasks or not all(tasks.values()):
            raise ConfigError(f"data.tasks: expected at least one task for every domain, got {dict(tasks)}")
        for name, value in (("train_size", train_size), ("evaluation_size", evaluation_size)):
            if value < 1:
                raise ConfigError(f"data.{name}: expected at least 1, got {value}")
        names = {task for group in tasks.values() for task in group}
        for task in configs or {}:
            if task not in names:
                raise ConfigError(f"data.configs: expected one of data.tasks, got '{task}'; {nearest(task, names)}")
        self.tasks = {domain: tuple(group) for domain, group in tasks.items()}
        self.train_size = train_size
        self.evaluation_size = evaluation_size
        self.seed = seed
        self.configs = {task: dict(config) for task, config in (configs or {}).items()}
        self.instruction = instruction
        self.system_prompt = system_prompt

    def load(self, tokenizer: Any, *, verifiers: Collection[str] | None = None) -> PromptSet:
        """Generates the prompts; see `PromptSource.load`.

        Raises:
            MissingDependencyError: The package `reasoning-gym` is not installed.
            UnknownChoiceError: A task that the package does not have.
            DataError: A task cannot make that many different questions.
        """
        if verifiers is not None and VERIFIER not in verifiers:
            raise UnknownChoiceError(
                f"data=reasoning_gym needs the verifier '{VERIFIER}'; {nearest(VERIFIER, verifiers)}"
            )
        seen: set[bytes] = set()
        # Held-out prompts first: a small task runs out of training questions, never of held-out ones.
        evaluation = self._draw("evaluation", self.evaluation_size, tokenizer, seen)
        train = self._draw("train", self.train_size, tokenizer, seen)
        prompts = PromptSet(train=tuple(train), evaluation=tuple(evaluation), domains=tuple(self.tasks))
        check_disjoint(prompts)
        return prompts

    def _draw(self, split: str, size: int, tokenizer: Any, seen: set[bytes]) -> list[Prompt]:
        prompts = []
        for domain, group in self.tasks.items():
            for number, task in enumerate(group):
                count = size // len(group) + (number < size % len(group))
                for entry in self._entries(task, count, split, seen):
                    prompts.append(self._prompt(entry, task=task, domain=domain, tokenizer=tokenizer))  # noqa: PERF401
        return prompts

    def _entries(self, task: str, count: int, split: str, seen: set[bytes]) -> Iterator[dict[str, Any]]:
        config = self.configs.get(task, {})
        key = hashlib.blake2b(f"{self.seed}/{split}/{task}".encode(), digest_size=4).digest()
        draws = count * _DRAWS_PER_PROMPT
        found = 0
        with silenced():
            generator = create(task, config, seed=int.from_bytes(key, "little"), size=draws)
        for index in range(draws):
            if found == count:
                return
            with silenced():
                entry: dict[str, Any] = generator[index]
            text = text_key(entry["question"])
            # The package scores every empty answer 0, right or not.
            if text not in seen and entry.get("answer") != "":
                seen.add(text)
                found += 1
                yield entry
        if found < count:
            raise DataError(
                f"reasoning-gym task '{task}': expected {count} different {split} questions, got {found} in {draws} draws; "
                f"lower data.{split}_size, or widen the task with data.configs.{task}"
            )

    def _prompt(self, entry: dict[str, Any], *, task: str, domain: str, tokenizer: Any) -> Prompt:
        question = entry["question"] if self.instruction is None else f"{entry['question']}\n{self.instruction}"
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        conversation = [*system, {"role": "user", "content": question}]
        if has_chat_template(tokenizer):
            text, ids = encode_chat(conversation, tokenizer)
        else:
            text, ids = encode_text(question, tokenizer)
        digest = hashlib.blake2b(entry["question"].encode(), digest_size=8).hexdigest()
        return Prompt(
            prompt_id=f"{task}-{digest}",
            text=text,
            token_ids=ids,
            domain=domain,
            answer=None if entry.get("answer") is None else str(entry["answer"]),
            verifier=VERIFIER,
            metadata={
                METADATA_KEY: {"task": task, "config": self.configs.get(task, {}), "entry": entry},
                USER_TEXT: question,
                CONVERSATION: conversation,
            },
        )


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Swallows what the generators print (`bf` prints dots, `codeio` its errors)."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def create(task: str, config: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """Builds a generator of the package.

    Raises:
        MissingDependencyError: The package is not installed.
        UnknownChoiceError: There is no such task.
        ConfigError: The task refuses the configuration.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingDependencyError(
            "data=reasoning_gym needs the package 'reasoning-gym', which is not installed: "
            "pip install 'moteach[reasoning-gym]'"
        ) from error
    if task not in DATASETS:
        raise UnknownChoiceError(
            f"data.tasks: expected a task of reasoning-gym, got '{task}'; {nearest(task, DATASETS)}"
        )
    try:
        return reasoning_gym.create_dataset(task, **{**config, "seed": seed, "size": size})
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"data.configs.{task}: reasoning-gym refuses {dict(config)}: {error}") from error
