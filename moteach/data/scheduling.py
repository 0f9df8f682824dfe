"""The mixture of domains follows the training: prompts go where the student is still far from its teachers and catches up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from moteach.data.base import PromptSet
from moteach.data.sampling import FixedMixture, StepFeedback
from moteach.errors import ConfigError, TrainingError, UnknownChoiceError, nearest
from moteach.types import Prompt


def remaining_gap(smoothed: float, initial: float, *, divergence_floor: float) -> float:
    """Part of a domain's divergence that is left: smoothed / max(initial, divergence_floor).

    Args:
        smoothed: Moving average of the divergence, nats per token.
        initial: Divergence at the start, nats per token.
        divergence_floor: Least denominator, nats per token.

    Source: D3-MOPD, arXiv 2608.24987, section 3.
    """
    return smoothed / max(initial, divergence_floor)


def descent_velocity(
    history: Sequence[float], *, window: int, windows: int, divergence_floor: float, velocity_floor: float
) -> float | None:
    """Relative decrease per window, averaged over the last windows: how fast a domain is still learnt.

    max(velocity_floor, mean over k < windows of (h[-1 - (k+1) window] - h[-1 - k window]) / max(h[-1 - (k+1) window],
    divergence_floor)); fewer windows count when the history is shorter, and a rise counts as a negative decrease.

    Args:
        history: Moving average of the divergence after each step, oldest first, nats per token.
        window: Steps of a window.
        windows: Most windows to average.
        divergence_floor: Least denominator, nats per token.
        velocity_floor: Least velocity, so that a domain that stands still keeps a claim.

    Returns:
        The velocity, or None when the history does not span a window.

    Source: D3-MOPD, arXiv 2608.24987, section 3; the paper's least velocity is 0.
    """
    spans = min(windows, (len(history) - 1) // window)
    if spans < 1:
        return None
    ends = [history[-1 - k * window] for k in range(spans + 1)]
    decreases = [(old - new) / max(old, divergence_floor) for new, old in pairwise(ends)]
    return max(velocity_floor, sum(decreases) / spans)


def scheduled_shares(
    scores: Mapping[str, float], base: Mapping[str, float], *, temperature: float, floor: float
) -> dict[str, float]:
    """Turns scores into a mixture in which every domain has at least `floor`.

    With n domains, all scored: share_i = floor + (1 - n floor) softmax(score_i / (max score * temperature)). A domain
    without a score keeps its base share (at least the floor; less than its base share only where the floors of the others
    need it), and the scored ones divide what is left. Without any score the mixture is the base one.

    Args:
        scores: Score of each scored domain, at least 0.
        base: Base share of every domain; they sum to one.
        temperature: Of the softmax; the scores are divided by their largest before.
        floor: Least share; `floor * len(base)` is at most one.

    Returns:
        Shares that sum to one, in the order of `base`.

    Source: D3-MOPD, arXiv 2608.24987, section 3; domains without a score are ours.
    """
    if not scores:
        return dict(base)
    free = max(1.0 - floor * len(base), 0.0)
    kept = {name: max(share - floor, 0.0) for name, share in base.items() if name not in scores}
    held = sum(kept.values())
    scale = min(1.0, free / held) if held > 0 else 1.0
    left = max(free - scale * held, 0.0)
    largest = max(scores.values()) or 1.0
    odds = {name: math.exp((score / largest - 1.0) / temperature) for name, score in scores.items()}
    total = sum(odds.values())
    return {name: floor + (scale * kept[name] if name in kept else left * odds[name] / total) for name in base}


@dataclass
class _Track:
    """What is remembered of a domain's divergence, nats per token."""

    first: list[float] = field(default_factory=list)
    history: list[float] = field(default_factory=list)
    """Moving average after each step since the domain was first seen; a step without the domain repeats it."""


class AdaptiveMixture:
    """Moves prompts from domains that are learnt, or stand still, to those that are far from their teachers and improve.

    After every `update_every` steps, for each domain i: gap_i = EMA_i / max(L_i, divergence_floor), L_i the mean of its
    first `initial_steps` divergences; velocity_i as in `descent_velocity`; score_i = gap_i * velocity_i * (1 + u_i), with
    u_i uniform in [-jitter, jitter] and keyed by (seed, number of the update); shares as in `scheduled_shares`. Before
    the first update the mixture is the base one. Quotas, order and checks are those of `FixedMixture`.

    Guards: a domain that stands still keeps `velocity_floor`. A domain that starts below `rehearsal_below` has no gap to
    close, is there to be rehearsed and keeps its base share, and so does one whose divergence was not seen for long enough.

    Where it differs from the paper: the paper jitters the mixture of each batch, so that a share falls below the floor by
    up to the jitter; here the scores of each update are jittered, and the floor holds.

    Args:
        prompts_per_step: Prompts a step takes.
        mixture: Base weight of each domain, as in `FixedMixture`; None takes the weights given to `bind`, or equal ones.
        seed: Seed of the permutations and of the jitter.
        shuffle: False walks each domain in the order of the data.
        update_every: Steps between two updates of the mixture.
        window: Steps of a window of the velocity.
        windows: Most windows the velocity averages over.
        ema_window: Steps of the moving average: its weight on the newest value is 2 / (ema_window + 1).
        initial_steps: Observed steps whose mean is the initial divergence.
        divergence_floor: Least denominator of gap and velocity, nats per token.
        velocity_floor: Least velocity, relative decrease per window.
        temperature: Of the softmax over the scores.
        floor: Least share of each domain once the mixture adapts.
        jitter: Largest relative change of a score.
        rehearsal_below: Initial divergence below which a domain keeps its base share, nats per token.

    Raises:
        ConfigError: An argument is out of range.

    Source: D3-MOPD, arXiv 2608.24987, section 3.
    """

    def __init__(
        self,
        *,
        prompts_per_step: int = 192,
        mixture: Mapping[str, float | int] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        update_every: int = 10,
        window: int = 10,
        windows: int = 3,
        ema_window: int = 10,
        initial_steps: int = 5,
        divergence_floor: float = 0.15,
        velocity_floor: float = 0.01,
        temperature: float = 0.5,
        floor: float = 0.10,
        jitter: float = 0.30,
        rehearsal_below: float = 0.01,
    ) -> None:
        self._mixture = FixedMixture(prompts_per_step=prompts_per_step, mixture=mixture, seed=seed, shuffle=shuffle)
        counts = {
            "update_every": update_every,
            "window": window,
            "windows": windows,
            "ema_window": ema_window,
            "initial_steps": initial_steps,
        }
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"sampler: expected {name} to be at least 1, got {count}")
        for name, value in (("divergence_floor", divergence_floor), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ConfigError(f"sampler: expected {name} to be positive, got {value}; scores are divided by it")
        for name, value in (("velocity_floor", velocity_floor), ("rehearsal_below", rehearsal_below)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"sampler: expected {name} to be at least 0, got {value}")
        if not 0 <= jitter < 1:
            raise ConfigError(f"sampler: expected jitter in [0, 1), got {jitter}; a score would become negative")
        if not 0 <= floor <= 1:
            raise ConfigError(f"sampler: expected floor in [0, 1], got {floor}")
        self.seed = seed
        self.update_every = update_every
        self.window = window
        self.windows = windows
        self.ema_window = ema_window
        self.initial_steps = initial_steps
        self.divergence_floor = divergence_floor
        self.velocity_floor = velocity_floor
        self.temperature = temperature
        self.floor = floor
        self.jitter = jitter
        self.rehearsal_below = rehearsal_below
        self._base: dict[str, float] = {}
        self._tracks: dict[str, _Track] = {}
        self._steps = 0

    def bind(self, prompts: PromptSet, *, weights: Mapping[str, float | int] | None = None) -> AdaptiveMixture:
        """Takes the prompts to draw from and starts at the beginning; see `FixedMixture.bind`.

        Raises:
            ConfigError: The mixture names an unknown domain, or the floors of all domains add up to more than one.
            DataError: There is nothing to train on.
        """
        self._mixture.bind(prompts, weights=weights)
        self._base = self._mixture.shares
        if self.floor * len(self._base) > 1 + 1e-9:
            raise ConfigError(
                f"sampler.floor: expected at most 1/{len(self._base)} for {len(self._base)} domains, got {self.floor}; the "
                f"shares would add up to more than one. Set sampler.floor={1 / len(self._base) / 2:.2g} or lower"
            )
        self._tracks = {name: _Track() for name in self._base}
        self._steps = 0
        return self

    def next(self, step: int) -> list[Prompt]:
        """Returns the prompts of the next step under the present mixture; see `FixedMixture.next`.

        Raises:
            ConfigError: The sampler is not bound.
            DataError: A domain has fewer different prompts than a step needs, or a drawn prompt is a held-out one.
        """
        return self._mixture.next(step)

    def observe(self, feedback: StepFeedback) -> None:
        """Adds the step's divergences to the histories; after every `update_every` steps, changes the mixture.

        A negative divergence, which estimates from samples can be, counts as 0.

        Raises:
            UnknownChoiceError: A domain is not one of those drawn from.
            TrainingError: A divergence is not finite.
        """
        for name, value in feedback.divergence.items():
            if name not in self._tracks:
                raise UnknownChoiceError(
                    f"sampler: no prompts are drawn of domain '{name}'; {nearest(name, self._base)}"
                )
            if not math.isfinite(value):
                raise TrainingError(
                    f"sampler: the divergence of domain '{name}' is {value} in step {feedback.step}; every later mixture "
                    "would be undefined. Lower optim.lr, or choose a bounded divergence (divergence=jsd)"
                )
        for name, track in self._tracks.items():
            self._add(track, feedback.divergence.get(name))
        self._steps += 1
        if self._steps % self.update_every == 0:
            self._update(self._steps // self.update_every)

    def metrics(self) -> dict[str, float]:
        """Returns `sampler/share/<domain>`, the share of each domain in the next step."""
        return self._mixture.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters of the mixture, the histories and the number of observed steps; no prompts."""
        return {
            "mixture": self._mixture.state_dict(),
            "steps": self._steps,
            "tracks": {
                name: {"first": list(track.first), "history": list(track.history)}
                for name, track in self._tracks.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: The training prompts are not those of the checkpoint.
        """
        self._mixture.load_state_dict(state["mixture"])
        self._steps = int(state["steps"])
        for name, entry in state["tracks"].items():
            self._tracks[name] = _Track(first=list(entry["first"]), history=list(entry["history"]))

    def _add(self, track: _Track, value: float | None) -> None:
        if value is None:
            track.history.extend(track.history[-1:])
        else:
            seen = max(value, 0.0)
            previous = track.history[-1] if track.history else seen
            track.history.append(previous + (seen - previous) * 2 / (self.ema_window + 1))
            if len(track.first) < self.initial_steps:
                track.first.append(seen)
        del track.history[: -self.window * self.windows - 1]

    def _update(self, number: int) -> None:
        scores = {}
        for (name, track), noise in zip(self._tracks.items(), self._noise(number), strict=True):
            score = self._score(track)
            if score is not None:
                scores[name] = score * (1 + noise)
        if scores:
            shares = scheduled_shares(scores, self._base, temperature=self.temperature, floor=self.floor)
            self._mixture.set_shares(shares)

    def _score(self, track: _Track) -> float | None:
        velocity = descent_velocity(
            track.history,
            window=self.window,
            windows=self.windows,
            divergence_floor=self.divergence_floor,
            velocity_floor=self.velocity_floor,
        )
        if velocity is None or len(track.first) < self.initial_steps:
            return None
        initial = sum(track.first) / len(track.first)
        if initial < self.rehearsal_below:
            return None
        return remaining_gap(track.history[-1], initial, divergence_floor=self.divergence_floor) * velocity

    def _noise(self, number: int) -> list[float]:
        key = hashlib.blake2b(f"{self.seed}/mixture/{number}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        noise: list[float] = generator.uniform(-self.jitter, self.jitter, size=len(self._tracks)).tolist()
        return noise
