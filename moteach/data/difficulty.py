"""Prompts that have nothing left to say rest for a while: those that are always solved, or never."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moteach.data.base import PromptSet, domain_of
from moteach.data.sampling import FixedMixture, StepFeedback
from moteach.errors import ConfigError, DataError, UnknownChoiceError, nearest
from moteach.types import Prompt


class DifficultyFiltered:
    """A fixed mixture in which prompts outside a band of pass rates rest.

    The pass rate of a prompt is the mean of its last `window` verified attempts, an attempt passing from `pass_score` on.
    With at least `min_attempts` attempts, a prompt is kept while min_pass_rate <= pass rate < max_pass_rate: the lower
    bound is inclusive and the upper exclusive, so that 0 and 1 keep the never solved and rest the always solved. A resting
    prompt is passed over until its domain has given `rest_epochs` times as many prompts as it has, is then drawn and judged
    again, and rests again if it still lies outside: nothing is dropped for ever. Prompts without a verifier never rest.

    A step is always full: when a domain has too few prompts that do not rest, those that would have come back first are
    taken and counted (`sampler/recalled`). Quotas, order and checks are those of `FixedMixture`.

    In distillation prompts that are never solved teach as well as those that are always solved (arXiv 2608.16647), because
    the teacher grades every token whatever the outcome; `min_pass_rate` keeps them by default. Raise it where the outcome
    is the signal.

    Args:
        prompts_per_step: Prompts a step takes.
        mixture: Weight of each domain, as in `FixedMixture`; None takes the weights given to `bind`, or equal ones.
        seed: Seed of the permutations.
        shuffle: False walks each domain in the order of the data.
        pass_score: Least verified score of an attempt that counts as solved.
        min_pass_rate: Least pass rate that is kept, in [0, 1]; any positive value rests what is never solved.
        max_pass_rate: Pass rate from which a prompt rests, in (min_pass_rate, 1]; None keeps the always solved.
        window: Attempts the pass rate looks back on.
        min_attempts: Attempts before a prompt is judged, at most `window`.
        rest_epochs: Length of a rest; an epoch is as many prompts drawn of a domain as it has.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        prompts_per_step: int = 192,
        mixture: Mapping[str, float | int] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        pass_score: float = 0.5,
        min_pass_rate: float = 0.0,
        max_pass_rate: float | None = 1.0,
        window: int = 8,
        min_attempts: int = 4,
        rest_epochs: int = 2,
    ) -> None:
        self._mixture = FixedMixture(prompts_per_step=prompts_per_step, mixture=mixture, seed=seed, shuffle=shuffle)
        if not math.isfinite(pass_score):
            raise ConfigError(f"sampler: expected pass_score to be a finite number, got {pass_score}")
        if not 0 <= min_pass_rate <= 1:
            raise ConfigError(f"sampler: expected min_pass_rate in [0, 1], got {min_pass_rate}")
        if max_pass_rate is not None and not min_pass_rate < max_pass_rate <= 1:
            raise ConfigError(
                f"sampler: expected max_pass_rate in ({min_pass_rate}, 1], above min_pass_rate, got {max_pass_rate}; every "
                "prompt would rest, or none. Set sampler.max_pass_rate=null to let no solved prompt rest"
            )
        if not 1 <= min_attempts <= window:
            raise ConfigError(
                f"sampler: expected min_attempts between 1 and window={window}, got {min_attempts}; no prompt would ever be "
                "judged"
            )
        if rest_epochs < 1:
            raise ConfigError(f"sampler: expected rest_epochs to be at least 1, got {rest_epochs}")
        self.pass_score = pass_score
        self.min_pass_rate = min_pass_rate
        self.max_pass_rate = max_pass_rate
        self.window = window
        self.min_attempts = min_attempts
        self.rest_epochs = rest_epochs
        self._drawn: dict[str, int] = {}
        self._rests: dict[str, dict[str, int]] = {}
        self._attempts: dict[str, str] = {}
        self._asked: dict[str, str] = {}
        self._recalled = 0

    def bind(self, prompts: PromptSet, *, weights: Mapping[str, float | int] | None = None) -> DifficultyFiltered:
        """Takes the prompts to draw from and starts at the beginning; see `FixedMixture.bind`.

        Raises:
            ConfigError: The mixture names a domain that the training set does not have.
            DataError: There is nothing to train on.
        """
        self._mixture.bind(prompts, weights=weights)
        self._drawn = dict.fromkeys(self._mixture.sizes, 0)
        self._rests = {name: {} for name in self._mixture.sizes}
        self._attempts, self._asked, self._recalled = {}, {}, 0
        return self

    def next(self, step: int) -> list[Prompt]:
        """Returns the prompts of the next step, resting ones only where a domain has too few others.

        Raises:
            ConfigError: The sampler is not bound.
            DataError: A domain has fewer different prompts than a step needs, or a drawn prompt is a held-out one.
        """
        prompts = self._mixture.next(step, rest=self._left)
        self._recalled = sum(self._left(prompt) > 0 for prompt in prompts)
        self._asked = {prompt.prompt_id: domain_of(prompt) for prompt in prompts}
        for domain in self._asked.values():
            self._drawn[domain] += 1
        return prompts

    def observe(self, feedback: StepFeedback) -> None:
        """Adds the step's verified scores to the pass rates and sends prompts to rest.

        Raises:
            UnknownChoiceError: A prompt was not in the last step.
            DataError: A score is not a number.
        """
        for prompt_id, scores in feedback.rewards.items():
            if prompt_id not in self._asked:
                raise UnknownChoiceError(
                    f"sampler: expected scores of prompts of the last step, got '{prompt_id}'; "
                    f"{nearest(prompt_id, self._asked)}"
                )
            if any(math.isnan(score) for score in scores):
                raise DataError(
                    f"sampler: expected verified scores of prompt '{prompt_id}', got {list(scores)}; what is not a number "
                    "would count as a failure. Leave out prompts without a verifier"
                )
            marks = "".join("+" if score >= self.pass_score else "-" for score in scores)
            self._attempts[prompt_id] = (self._attempts.get(prompt_id, "") + marks)[-self.window :]
            self._judge(prompt_id)
        for domain, rests in self._rests.items():
            self._rests[domain] = {key: back for key, back in rests.items() if back > self._drawn[domain]}

    def metrics(self) -> dict[str, float]:
        """Returns the share of each domain, how many prompts rest and how many of the last step were recalled from a rest.

        Keys: `sampler/share/<domain>`, `sampler/filtered`, `sampler/recalled`.
        """
        return {
            **self._mixture.metrics(),
            "sampler/filtered": float(sum(len(rests) for rests in self._rests.values())),
            "sampler/recalled": float(self._recalled),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters of the mixture, the attempts of each prompt (`+` solved, `-` not) and who rests until when."""
        return {
            "mixture": self._mixture.state_dict(),
            "drawn": dict(self._drawn),
            "rests": {domain: dict(rests) for domain, rests in self._rests.items()},
            "attempts": dict(self._attempts),
            "asked": dict(self._asked),
            "recalled": self._recalled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: The training prompts are not those of the checkpoint.
        """
        self._mixture.load_state_dict(state["mixture"])
        self._drawn = dict(state["drawn"])
        self._rests = {domain: dict(rests) for domain, rests in state["rests"].items()}
        self._attempts = dict(state["attempts"])
        self._asked = dict(state["asked"])
        self._recalled = int(state["recalled"])

    def _left(self, prompt: Prompt) -> int:
        domain = domain_of(prompt)
        return max(self._rests[domain].get(prompt.prompt_id, 0) - self._drawn[domain], 0)

    def _judge(self, prompt_id: str) -> None:
        attempts, domain = self._attempts[prompt_id], self._asked[prompt_id]
        rate = attempts.count("+") / len(attempts) if attempts else 0.0
        solved = self.max_pass_rate is not None and rate >= self.max_pass_rate
        if len(attempts) >= self.min_attempts and (solved or rate < self.min_pass_rate):
            self._rests[domain][prompt_id] = self._drawn[domain] + self.rest_epochs * self._mixture.sizes[domain]
        else:
            self._rests[domain].pop(prompt_id, None)
