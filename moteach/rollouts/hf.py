"""Rollouts in process, from the live weights of a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moteach.errors import ConfigError
from moteach.rollouts.checks import check_lengths, check_setting, context_of, eos_ids_of
from moteach.rollouts.decoding import Decoded, SamplerSettings, decode, generation_mode
from moteach.rollouts.sampling import keyed_uniforms
from moteach.types import Prompt, Rollout, RolloutBatch


class HFEngine:
    """Samples from a transformers model that lives in this process; weights are shared, never copied.

    Build it from its settings, then `bind(model, tokenizer)` the student. `rollout_logprobs` are those of the sampler
    itself, after temperature and truncation: log softmax(logits / temperature) restricted to the kept tokens. Greedy
    decoding (temperature 0) reports log softmax(logits).

    Args:
        seed: Seed of the run; with step, prompt id, sample and position it is the whole key of the noise.
        max_new_tokens: Longest completion.
        temperature: Logits are divided by it; 0 is greedy.
        top_p: Sample from the smallest set of tokens whose probability reaches this; 1 samples from all.
        top_k: Sample from the k most probable tokens; 0 samples from all.
        batch_size: Most completions generated at once. A group is never split.
        compact_at: Finished rows leave the batch when they are at least this share of it.
        compile: Compile the forwards with `torch.compile`: once, before the first completion. Samples are those of
            the eager engine up to the rounding of logits.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_size: int = 256,
        compact_at: float = 0.25,
        compile: bool = False,
    ) -> None:
        check_setting("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "a whole number of at least 1")
        check_setting("temperature", temperature, temperature >= 0, "a number of at least 0 (0 is greedy)")
        check_setting("top_p", top_p, 0 < top_p <= 1, "a number in (0, 1] (1 keeps every token)")
        check_setting("top_k", top_k, top_k >= 0, "a whole number of at least 0 (0 keeps every token)")
        check_setting("batch_size", batch_size, batch_size >= 1, "a whole number of at least 1")
        check_setting("compact_at", compact_at, 0 < compact_at <= 1, "a number in (0, 1]")
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.batch_size = batch_size
        self.compact_at = compact_at
        self.compile = compile
        self.version = 0
        self._model: nn.Module | None = None
        self._eos_ids: tuple[int, ...] = ()
        self._pad_id = 0
        self._compiled_for: nn.Module | None = None

    def bind(self, model: nn.Module, tokenizer: Any, *, version: int = 0) -> HFEngine:
        """Takes the live student and the special tokens of its tokenizer.

        Completions end at the tokenizer's end-of-sequence token and at those of the model's `generation_config`; the
        latter are left out when they do not contain the former, for then they belong to another vocabulary.

        Args:
            model: Causal language model of transformers.
            tokenizer: Its tokenizer.
            version: Optimizer steps the model has taken.

        Raises:
            ConfigError: Neither names an end-of-sequence token, so no completion could ever end by itself.
        """
        self._eos_ids = eos_ids_of(model, tokenizer)
        pad_id = getattr(tokenizer, "pad_token_id", None)
        self._pad_id = self._eos_ids[0] if pad_id is None else int(pad_id)
        self.sync(model, version=version)
        return self

    def sync(self, student: nn.Module, *, version: int) -> None:
        """Shares the student's weights from now on and stamps this version on every rollout."""
        self._model = student
        self.version = version

    def check(self, prompts: Sequence[Prompt], *, max_new_tokens: int | None = None) -> None:
        """Checks before a run what `generate` would refuse in the middle of it.

        Raises:
            DataError: A prompt is empty, or too long for the context of the model.
            ConfigError: No model is bound, or it cannot be compiled.
            UnsupportedCombinationError: Such a model cannot be generated from with compiled forwards.
        """
        if self._model is None:
            raise ConfigError("expected a bound engine, got one without a model; call engine.bind(model, tokenizer)")
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        check_lengths(prompts, context=context_of(self._model), limit=limit)
        self._compile(self._model)

    def _compile(self, model: nn.Module) -> None:
        if not self.compile or self._compiled_for is model:
            return
        from moteach.rollouts.compiled import check_compiled

        check_compiled(model)
        self._compiled_for = model

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        group_size: int = 1,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> RolloutBatch:
        """Samples `group_size` completions of every prompt; see `RolloutEngine.generate`.

        Raises:
            DataError: A prompt is empty, or too long for the context of the model.
            ConfigError: No model is bound, or an argument is out of range.
        """
        if self._model is None:
            raise ConfigError("expected a bound engine, got one without a model; call engine.bind(model, tokenizer)")
        temperature = self.temperature if temperature is None else temperature
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        check_setting("temperature", temperature, temperature >= 0, "a number of at least 0 (0 is greedy)")
        check_setting("max_new_tokens", limit, limit >= 1, "a whole number of at least 1")
        check_setting("group_size", group_size, group_size >= 1, "a whole number of at least 1")
        check_lengths(prompts, context=context_of(self._model), limit=limit)
        self._compile(self._model)
        settings = SamplerSettings(
            temperature=temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            eos_ids=self._eos_ids,
            pad_id=self._pad_id,
            compact_at=self.compact_at,
        )
        # Longest first: a batch holds prompts of about one length, and memory runs out at once or never.
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row].token_ids))
        per_batch = max(1, self.batch_size // group_size)
        groups: list[list[Rollout]] = [[] for _ in prompts]
        with generation_mode(self._model):
            for start in range(0, len(order), per_batch):
                rows = order[start : start + per_batch]
                batch = [prompts[row] for row in rows]
                rollouts = self._complete(batch, step=step, group_size=group_size, limit=limit, settings=settings)
                for i, row in enumerate(rows):
                    groups[row] = rollouts[i * group_size : (i + 1) * group_size]
        return RolloutBatch.from_rollouts([r for group in groups for r in group], pad_id=self._pad_id)

    def _complete(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, limit: int, settings: SamplerSettings
    ) -> list[Rollout]:
        assert self._model is not None
        owners = [prompt for prompt in prompts for _ in range(group_size)]
        samples = list(range(group_size)) * len(prompts)
        uniforms = keyed_uniforms(
            seed=self.seed,
            step=step,
            prompt_ids=[prompt.prompt_id for prompt in owners],
            samples=samples,
            length=limit,
        )
        decoded = decode(
            self._model,
            [prompt.token_ids for prompt in prompts],
            uniforms,
            group_size=group_size,
            settings=settings,
            compiled=self.compile,
        )
        return self._rollouts(owners, samples, decoded)

    def _rollouts(self, owners: Sequence[Prompt], samples: Sequence[int], decoded: Decoded) -> list[Rollout]:
        columns = zip(
            owners,
            samples,
            decoded.tokens.tolist(),
            decoded.logprobs.tolist(),
            decoded.lengths.tolist(),
            decoded.finished.tolist(),
            strict=True,
        )
        return [
            Rollout(
                prompt=prompt,
                sample=sample,
                completion_ids=tuple(tokens[:length]),
                rollout_logprobs=tuple(logprobs[:length]),
                finished=finished,
                student_version=self.version,
            )
            for prompt, sample, tokens, logprobs, length, finished in columns
        ]
