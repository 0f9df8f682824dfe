"""Supervised training with a stop rule on held-out accuracy.

Cross entropy on the learned tokens of the examples, AdamW, warm-up, a constant learning rate until the stop rule is met, then
a linear cool-down. What is drawn follows what was measured: families that lag get more of the next batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moteach.errors import ConfigError
from moteach.specialists.examples import Example, collate

Draw = Callable[[Mapping[str, float]], Sequence[Example]]
"""Draws a batch, given the share of each group of examples."""

Validate = Callable[[nn.Module], Mapping[str, float]]
"""Measures the held-out accuracy of each group of examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTSettings:
    """Numbers of a supervised stage.

    Training stops when every group's held-out accuracy lies in `[lowest, highest]`. Each time accuracies are measured, the
    share of a group in the batches is multiplied by `exp(share_gain * (goal - accuracy))` and all are normalised, so that
    shares settle where accuracies are near the goal.
    """

    max_steps: int
    learning_rate: float
    lowest: float
    """Least accuracy of every group at which training may stop."""
    highest: float = 1.0
    """Largest accuracy of every group at which training may stop; below 1 it makes a model that has something to learn."""
    goal: float = 1.0
    share_gain: float = 1.0
    floor_share: float = 0.02
    """Least share of a group."""
    warmup_steps: int = 50
    cooldown_steps: int = 0
    validate_every: int = 25
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    micro_batches: int = 3
    """Rows are sorted by length and split into this many forward passes, to pad less."""

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest <= 1:
            raise ConfigError(
                f"expected 0 <= lowest <= highest <= 1, got {self.lowest} and {self.highest}; training could never stop"
            )
        if min(self.max_steps, self.validate_every, self.micro_batches) < 1:
            raise ConfigError("expected max_steps, validate_every and micro_batches of at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTResult:
    """What a supervised stage did."""

    steps: int
    seconds: float
    reached: bool
    """Whether the stop rule was met before `max_steps`."""
    accuracies: Mapping[str, float]
    """Held-out accuracy of each group, as last measured."""


def train_supervised(
    model: nn.Module, *, draw: Draw, validate: Validate, settings: SFTSettings, pad_id: int
) -> SFTResult:
    """Trains a model in place until the stop rule is met.

    Args:
        model: Causal language model of transformers.
        draw: Draws the batches.
        validate: Measures held-out accuracies; its keys are the groups.
        settings: The numbers.
        pad_id: Padding token.
    """
    began = time.perf_counter()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=settings.betas
    )
    accuracies = validate(model)
    shares: Mapping[str, float] = {name: 1 / len(accuracies) for name in accuracies}
    reached = False
    step = 0
    model.train()
    while step < settings.max_steps and not reached:
        warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        _update(model, optimizer, draw(shares), settings, lr=settings.learning_rate * warm, pad_id=pad_id)
        step += 1
        if step % settings.validate_every == 0 or step == settings.max_steps:
            accuracies = validate(model)
            shares = _updated(shares, accuracies, settings)
            reached = all(settings.lowest <= value <= settings.highest for value in accuracies.values())
    for done in range(settings.cooldown_steps):
        rate = settings.learning_rate * (1 - (done + 1) / (settings.cooldown_steps + 1))
        _update(model, optimizer, draw(shares), settings, lr=rate, pad_id=pad_id)
    if settings.cooldown_steps:
        accuracies = validate(model)
    model.eval()
    return SFTResult(
        steps=step + settings.cooldown_steps,
        seconds=time.perf_counter() - began,
        reached=reached,
        accuracies=dict(accuracies),
    )


def supervised_backward(model: nn.Module, examples: Sequence[Example], *, micro_batches: int, pad_id: int) -> float:
    """Back-propagates the mean cross entropy of the learned tokens of a batch and returns it.

    loss = sum over learned tokens of -log p(token | tokens before it) / number of learned tokens of the whole batch, so that
    the split into forward passes does not change the gradient.
    """
    ordered = sorted(examples, key=lambda example: len(example.token_ids))
    denominator = sum(sum(example.learned) for example in ordered)
    size = -(-len(ordered) // micro_batches)
    total = 0.0
    for start in range(0, len(ordered), size):
        token_ids, learned = collate(ordered[start : start + size], pad_id=pad_id)
        hidden = model.get_submodule("model")(input_ids=token_ids, use_cache=False).last_hidden_state
        logits = model.get_submodule("lm_head")(hidden[:, :-1][learned[:, 1:]])
        loss = F.cross_entropy(logits, token_ids[learned], reduction="sum") / denominator
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    settings: SFTSettings,
    *,
    lr: float,
    pad_id: int,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    supervised_backward(model, examples, micro_batches=settings.micro_batches, pad_id=pad_id)
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()


def _updated(shares: Mapping[str, float], accuracies: Mapping[str, float], settings: SFTSettings) -> dict[str, float]:
    raw = {
        name: share * math.exp(settings.share_gain * (settings.goal - accuracies[name]))
        for name, share in shares.items()
    }
    total = sum(raw.values())
    floored = {name: max(settings.floor_share, value / total) for name, value in raw.items()}
    return {name: value / sum(floored.values()) for name, value in floored.items()}
