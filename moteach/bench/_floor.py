"""The bare floor: one on-policy distillation step in plain torch and transformers, without any framework.

What is left when everything that moteach adds is taken away. The gap between the two is what the framework costs, or
saves.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True, kw_only=True)
class FloorStep:
    """What one step took."""

    seconds: Mapping[str, float]
    """Seconds of `generate`, `score` and `update`."""
    tokens: int
    """Trained tokens."""
    loss: float
    """Mean reverse KL, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class _Written:
    """Left-padded prompts and the completions that were sampled for them."""

    ids: Int[Tensor, "batch token"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    kept: Bool[Tensor, "batch completion"]
    """True up to the end-of-sequence token, which is included."""

    def rows(self, rows: Int[Tensor, " row"]) -> _Written:
        return _Written(ids=self.ids[rows], prompt_mask=self.prompt_mask[rows], kept=self.kept[rows])


@dataclass(kw_only=True)
class Floor:
    """A student of its own, the run's teachers, and the plainest step that trains one on the other.

    Sampling is a loop of forwards with a key/value cache and `torch.multinomial`; a teacher is one forward with
    full-vocabulary `log_softmax` on its own rows; the loss is KL(student || teacher) = sum_v S_v (log S_v - log T_v),
    averaged over completion tokens, in plain autograd; then AdamW, gradients not clipped.
    """

    student: Any
    """A causal language model of transformers that nobody else trains."""
    teacher: Callable[[str], Any]
    """Name to model; the models may be shared, they are only read."""
    optimizer: torch.optim.Optimizer
    eos_id: int
    vocab_size: int
    """Rows of the student's head; what a teacher has beyond is left out."""
    _seconds: dict[str, float] = field(default_factory=dict)

    def step(
        self,
        prompts: Sequence[Sequence[int]],
        rows_of: Mapping[str, Int[Tensor, " row"]],
        *,
        max_new_tokens: int,
        lr: float,
    ) -> FloorStep:
        """Generates, scores and takes one optimizer step.

        Args:
            prompts: Token ids.
            rows_of: Rows that each teacher grades, disjoint.
            max_new_tokens: Longest completion.
            lr: Learning rate of the step.
        """
        self._seconds = {}
        with self._timed("generate"):
            written = self._generate(prompts, max_new_tokens)
        with self._timed("score"), torch.no_grad():
            target = torch.cat(
                [self._logprobs(self.teacher(name), written.rows(rows)) for name, rows in rows_of.items()]
            )
        with self._timed("update"):
            self.student.train()
            logprobs = self._logprobs(self.student, written.rows(torch.cat(list(rows_of.values()))))
            loss = (logprobs.exp() * (logprobs - target)).sum(dim=-1).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return FloorStep(seconds=self._seconds, tokens=len(target), loss=float(loss.detach()))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds[part] = time.perf_counter() - begin

    def _generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> _Written:
        width = max(len(prompt) for prompt in prompts)
        prompt_ids = torch.tensor([[self.eos_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        prompt_mask = torch.arange(width) >= width - lengths[:, None]
        self.student.eval()
        with torch.inference_mode():
            ids, mask, current = prompt_ids, prompt_mask, prompt_ids
            name = "cache" if "cache" in inspect.signature(self.student.forward).parameters else "past_key_values"
            past = {name: DynamicCache(config=self.student.config)}
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
            done = torch.zeros(len(prompts), 1, dtype=torch.bool)
            kept = []
            for _ in range(max_new_tokens):
                out = self.student(
                    input_ids=current,
                    attention_mask=_or_none(mask, prompt_mask),
                    position_ids=positions,
                    use_cache=True,
                    logits_to_keep=1,
                    **past,
                )
                current = torch.multinomial(out.logits[:, -1].float().softmax(dim=-1), 1)
                kept.append(~done)
                done = done | (current == self.eos_id)
                ids, mask = torch.cat([ids, current], dim=1), torch.cat([mask, torch.ones_like(done)], dim=1)
                positions = positions[:, -1:] + 1
                if bool(done.all()):
                    break
            written = torch.cat(kept, dim=1)
        # Tensors made in inference mode cannot be saved for the backward pass.
        return _Written(ids=ids.clone(), prompt_mask=prompt_mask, kept=written.clone())

    def _logprobs(self, model: Any, written: _Written) -> Float[Tensor, "packed vocab"]:
        """Log-probabilities over the vocabulary at every completion token, rows in order."""
        count = written.kept.shape[1]
        # The last token predicts nothing that was written.
        ids = written.ids[:, :-1]
        mask = torch.cat([written.prompt_mask, torch.ones(len(ids), count - 1, dtype=torch.bool)], dim=1)
        logits = model(
            input_ids=ids,
            attention_mask=_or_none(mask, written.prompt_mask),
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=count,
        ).logits
        packed: Tensor = logits[written.kept][:, : self.vocab_size]
        return packed.float().log_softmax(dim=-1)


def _or_none(mask: Tensor, prompt_mask: Tensor) -> Tensor | None:
    """A mask of ones only costs time: without padding there is none."""
    return None if bool(prompt_mask.all()) else mask
