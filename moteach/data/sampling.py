"""Which prompts a step takes: how many of each domain, and in which order inside a domain."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moteach.data.base import PromptSet, rows_by_domain, text_key
from moteach.errors import CheckpointError, ConfigError, DataError, nearest
from moteach.types import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFeedback:
    """What a step showed about its prompts."""

    step: int
    divergence: Mapping[str, float]
    """Mean divergence of each domain that was taught in this step, nats per token."""
    rewards: Mapping[str, Sequence[float]]
    """Prompt id to the verified scores of its completions in this step; prompts without a verifier are absent."""


@runtime_checkable
class Sampler(Protocol):
    """Gives the prompts of each step; all of its state fits in a checkpoint."""

    def next(self, step: int) -> list[Prompt]:
        """Returns the prompts of a step, none twice."""
        ...

    def observe(self, feedback: StepFeedback) -> None:
        """Takes note of what the step showed; called after each step, before the next one and before a checkpoint."""
        ...

    def metrics(self) -> dict[str, float]:
        """Returns what to log: `sampler/share/<domain>`, the mixture of the next step, and what else the sampler knows."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on from here; plain JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""
        ...


@dataclass
class _Domain:
    """A domain's rows, walked in a new order every epoch."""

    name: str
    rows: Sequence[int]
    share: float
    carried: float = 0.0
    """Prompts it was owed when the shares last changed."""
    drawn: int = 0
    """Prompts drawn since the shares last changed."""
    cursor: int = 0
    deferred: list[int] = field(default_factory=list)
    """Places that were skipped because their prompt was already in the step; they come first in the next one."""
    order: tuple[int, list[int]] | None = None


class FixedMixture:
    """Draws every step from the same mixture of domains.

    Quotas are those of the largest remainder with carry-over: before a step, domain d is owed
    `share_d * (prompts so far + prompts_per_step) - drawn_d`, and each prompt of the step goes to the domain that is owed
    most. After any number of steps a domain is within one prompt of its share (within the number of domains in the worst
    case). Inside a domain every epoch is a permutation keyed by (seed, domain, epoch): each prompt comes once an epoch.

    Samplers that change the mixture, or let prompts rest, hold one of these: see `set_shares` and `next`.

    Args:
        prompts_per_step: Prompts a step takes.
        mixture: Weight of each domain, any positive scale; domains that are not named get nothing. None takes the
            weights given to `bind`, or equal ones.
        seed: Seed of the permutations.
        shuffle: False walks each domain in the order of the data.

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
    ) -> None:
        if prompts_per_step < 1:
            raise ConfigError(f"sampler: expected prompts_per_step to be at least 1, got {prompts_per_step}")
        if mixture is not None:
            _check_weights(mixture, "sampler.mixture")
        self.prompts_per_step = prompts_per_step
        self.mixture = None if mixture is None else dict(mixture)
        self.seed = seed
        self.shuffle = shuffle
        self._train: Sequence[Prompt] = ()
        self._held_out: frozenset[bytes] = frozenset()
        self._domains: list[_Domain] = []

    def bind(self, prompts: PromptSet, *, weights: Mapping[str, float | int] | None = None) -> FixedMixture:
        """Takes the prompts to draw from and starts at the beginning.

        Args:
            prompts: Its training set is used.
            weights: Weight of each domain when the sampler has no mixture of its own; None means equal.

        Raises:
            ConfigError: The mixture names a domain that the training set does not have.
            DataError: There is nothing to train on, or a step needs more prompts of a domain than there are.
        """
        rows = rows_by_domain(prompts.train)
        if not rows:
            raise DataError("sampler: expected at least one training prompt, got none")
        mixture = self.mixture if self.mixture is not None else weights
        if mixture is None:
            mixture = dict.fromkeys(rows, 1.0)
        _check_weights(mixture, "sampler.mixture" if self.mixture is not None else "weights")
        for name, weight in mixture.items():
            if weight > 0 and name not in rows:
                raise ConfigError(
                    f"sampler: expected the mixture to name domains of the training prompts, got '{name}'; "
                    f"{nearest(name, rows)}"
                )
        total = sum(mixture.values())
        shares = {name: mixture.get(name, 0.0) / total for name in rows}
        self._train = prompts.train
        self._held_out = frozenset(text_key(prompt.text) for prompt in prompts.evaluation)
        self._domains = [_Domain(name, rows[name], share) for name, share in shares.items() if share > 0]
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Share of each domain that is drawn from; they sum to one."""
        return {domain.name: domain.share for domain in self._domains}

    @property
    def sizes(self) -> dict[str, int]:
        """Training prompts of each domain that is drawn from."""
        return {domain.name: len(domain.rows) for domain in self._domains}

    def set_shares(self, shares: Mapping[str, float]) -> None:
        """Changes the mixture from the next step on.

        Prompts drawn before count by the shares that held then: what is carried over is their rounding, about one prompt,
        so that no domain is paid for the past, and none is rounded away by frequent changes.

        Args:
            shares: Share of every domain that is drawn from, summing to one.

        Raises:
            ConfigError: The domains are others, or the shares are no mixture.
        """
        names = [domain.name for domain in self._domains]
        if set(shares) != set(names):
            raise ConfigError(f"sampler: expected shares of the domains {sorted(names)}, got {sorted(shares)}")
        _check_weights(shares, "sampler shares")
        if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-9):
            raise ConfigError(
                f"sampler: expected shares that sum to one, got {dict(shares)}; steps would be larger or smaller than "
                "prompts_per_step. Divide them by their sum"
            )
        total = sum(domain.drawn for domain in self._domains)
        for domain in self._domains:
            domain.carried += domain.share * total - domain.drawn
            domain.drawn = 0
            domain.share = shares[domain.name]

    def next(self, step: int, *, rest: Callable[[Prompt], int] | None = None) -> list[Prompt]:
        """Returns the prompts of the next step, domain by domain, none twice.

        Args:
            step: Not used: the mixture is the same at every step.
            rest: How much longer a prompt rests, 0 when it may be drawn. A resting prompt is passed over; when a domain has
                too few others for the step, those with the least left are taken. None lets no prompt rest.

        Raises:
            ConfigError: The sampler is not bound.
            DataError: A domain has fewer different prompts than a step needs, or a drawn prompt is a held-out one.
        """
        del step
        if not self._domains:
            raise ConfigError("expected a bound sampler, got one without prompts; call sampler.bind(prompts) first")
        quotas = self._quotas()
        return [p for domain, quota in zip(self._domains, quotas, strict=True) for p in self._take(domain, quota, rest)]

    def observe(self, feedback: StepFeedback) -> None:
        """Ignores it: the mixture is fixed."""

    def metrics(self) -> dict[str, float]:
        """Returns `sampler/share/<domain>`, the share of each domain in the next step."""
        return {f"sampler/share/{name}": share for name, share in self.shares.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns counters per domain; no prompts."""
        return {
            "domains": {
                d.name: {
                    "share": d.share,
                    "carried": d.carried,
                    "drawn": d.drawn,
                    "cursor": d.cursor,
                    "deferred": list(d.deferred),
                    "size": len(d.rows),
                }
                for d in self._domains
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: The training prompts are not those of the checkpoint.
        """
        saved = state["domains"]
        sizes = {name: entry["size"] for name, entry in saved.items()}
        now = {domain.name: len(domain.rows) for domain in self._domains}
        if sizes != now:
            raise CheckpointError(
                f"expected the domains of the checkpoint {sizes} (prompts each), got {now}; the order of prompts would "
                "silently change. Resume with the data and the mixture the run was started with"
            )
        for domain in self._domains:
            entry = saved[domain.name]
            # Absent from checkpoints of runs whose mixture could not change.
            domain.share, domain.carried = entry.get("share", domain.share), entry.get("carried", 0.0)
            domain.drawn, domain.cursor = int(entry["drawn"]), int(entry["cursor"])
            domain.deferred = [int(place) for place in entry["deferred"]]

    def _quotas(self) -> list[int]:
        total = sum(domain.drawn for domain in self._domains) + self.prompts_per_step
        owed = [domain.carried + domain.share * total - domain.drawn for domain in self._domains]
        quotas = [0] * len(owed)
        for _ in range(self.prompts_per_step):
            most = max(range(len(owed)), key=owed.__getitem__)
            owed[most] -= 1
            quotas[most] += 1
        return quotas

    def _take(self, domain: _Domain, count: int, rest: Callable[[Prompt], int] | None) -> list[Prompt]:
        taken: dict[str, Prompt] = {}
        skipped: list[int] = []
        resting: dict[str, tuple[int, Prompt]] = {}
        seen: set[int] = set()
        while len(taken) < count and len(seen) < len(domain.rows):
            place = domain.deferred.pop(0) if domain.deferred else self._advance(domain)
            seen.add(place)
            prompt = self._trainable(domain.rows[place])
            if prompt.prompt_id in taken:
                skipped.append(place)
            elif rest is not None and (left := rest(prompt)) > 0:
                resting[prompt.prompt_id] = (left, prompt)
            else:
                taken[prompt.prompt_id] = prompt
        domain.deferred = skipped + domain.deferred
        if len(taken) < count:
            # The whole domain was seen and all that does not rest was taken: nobody waits for the next step.
            domain.deferred = []
            soonest = sorted(resting.values(), key=lambda entry: entry[0])
            taken.update((prompt.prompt_id, prompt) for _, prompt in soonest[: count - len(taken)])
        if len(taken) < count:
            raise DataError(
                f"sampler: expected at least {count} different prompts of domain '{domain.name}' for one step, got "
                f"{len(taken)}; copies would get the same samples. Lower sampler.prompts_per_step or the domain's share"
            )
        domain.drawn += count
        return list(taken.values())

    def _trainable(self, row: int) -> Prompt:
        prompt = self._train[row]
        if text_key(prompt.text) in self._held_out:
            raise DataError(
                f"sampler: the training prompt '{prompt.prompt_id}' is also a held-out one; scores would measure memory. "
                "Remove it from one of the two sets"
            )
        return prompt

    def _advance(self, domain: _Domain) -> int:
        epoch, position = divmod(domain.cursor, len(domain.rows))
        domain.cursor += 1
        if not self.shuffle:
            return position
        if domain.order is None or domain.order[0] != epoch:
            domain.order = (epoch, self._permutation(domain, epoch))
        return domain.order[1][position]

    def _permutation(self, domain: _Domain, epoch: int) -> list[int]:
        key = hashlib.blake2b(f"{self.seed}/{domain.name}/{epoch}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        order: list[int] = generator.permutation(len(domain.rows)).tolist()
        return order


def _check_weights(weights: Mapping[str, float | int], name: str) -> None:
    for domain, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"{name}: expected weights of at least 0, got {weight} for '{domain}'")
    if sum(weights.values()) <= 0:
        raise ConfigError(f"{name}: expected at least one domain with a positive weight, got {dict(weights)}")
