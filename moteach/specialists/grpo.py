"""The verifier-reward stage: group-relative policy gradient (GRPO, arXiv 2402.03300, eq. 3 and 21), on policy.

For completions o_1..o_G of one prompt with rewards r_1..r_G:

    advantage_i = (r_i - mean(r)) / (std(r) + eps)
    loss = - sum_i sum_t advantage_i * log p(o_it | prompt, o_i<t) / number of tokens

One update per batch, so that the ratio to the sampling policy is one and nothing is clipped. Groups whose rewards are all equal
say nothing and are left out of the denominator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moteach.divergences.advantages import group_advantages
from moteach.errors import ConfigError
from moteach.types import Prompt, RolloutBatch

Grade = Callable[[Prompt, Sequence[int]], float]
"""Scores the token ids of a completion, in [0, 1]."""


@runtime_checkable
class Sampler(Protocol):
    """The part of a rollout engine that this stage needs; every rollout engine has it."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        group_size: int = 1,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> RolloutBatch:
        """Samples `group_size` completions of every prompt, prompt by prompt."""
        ...

    def sync(self, student: nn.Module, *, version: int) -> None:
        """Samples from these weights from now on."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOSettings:
    """Numbers of a verifier-reward stage."""

    steps: int
    prompts_per_step: int = 48
    group_size: int = 8
    learning_rate: float = 2e-4
    temperature: float = 1.0
    max_new_tokens: int = 16
    max_grad_norm: float = 1.0
    epsilon: float = 1e-4
    """Added to the standard deviation of a group."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                f"expected group_size of at least 2, got {self.group_size}; the advantage of a group of one is always zero"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOResult:
    """What a verifier-reward stage did."""

    steps: int
    seconds: float
    rewards: tuple[float, ...]
    """Mean reward of each step."""


def policy_gradient_loss(
    model: nn.Module, batch: RolloutBatch, advantages: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Returns the loss of this module on a batch, ready for `backward()`.

    Args:
        model: The policy, with the weights that sampled the batch.
        batch: Its completions.
        advantages: One per row; rows with advantage zero count neither above nor below the fraction bar.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits
    logprobs = torch.log_softmax(batch.pack(logits.float()), dim=-1)
    written = logprobs.gather(1, batch.token_targets[:, None])[:, 0]
    per_token = advantages[batch.token_rows]
    informative = (per_token != 0).sum().clamp(min=1)
    return -(per_token * written).sum() / informative


def train_grpo(
    model: nn.Module,
    *,
    prompts: Sequence[Prompt],
    engine: Sampler,
    grade: Grade,
    settings: GRPOSettings,
    seed: int = 0,
) -> GRPOResult:
    """Trains a model in place by the rewards of a verifier.

    Args:
        model: Causal language model of transformers.
        prompts: Where each step draws its prompts from.
        engine: Samples completions from the model.
        grade: The verifier.
        settings: The numbers.
        seed: Seed of the order of the prompts; the noise of the completions is the engine's.
    """
    began = time.perf_counter()
    rng = Random(f"grpo/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    mean_rewards = []
    for step in range(settings.steps):
        engine.sync(model, version=step)
        chosen = [prompts[rng.randrange(len(prompts))] for _ in range(settings.prompts_per_step)]
        batch = engine.generate(
            _distinct(chosen),
            step=step,
            group_size=settings.group_size,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
        )
        rewards = torch.tensor([grade(rollout.prompt, rollout.completion_ids) for rollout in batch.rollouts])
        grouped = rewards.view(-1, settings.group_size)
        advantages = group_advantages(grouped, epsilon=settings.epsilon).flatten()
        optimizer.zero_grad(set_to_none=True)
        policy_gradient_loss(model, batch, advantages).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        mean_rewards.append(float(rewards.mean()))
    engine.sync(model, version=settings.steps)
    model.eval()
    return GRPOResult(steps=settings.steps, seconds=time.perf_counter() - began, rewards=tuple(mean_rewards))


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    return list({prompt.prompt_id: prompt for prompt in prompts}.values())
