"""Checks that every rollout engine makes of its settings, its model and its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moteach.errors import ConfigError, DataError
from moteach.types import Prompt


def check_setting(name: str, value: object, valid: bool, expected: str) -> None:
    """Checks one setting of a rollout engine.

    Raises:
        ConfigError: It is not valid.
    """
    if not valid:
        raise ConfigError(f"rollout: expected {name} to be {expected}, got {value!r}")


def eos_ids_of(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Finds where completions end: the tokenizer's end-of-sequence token and those of the model's `generation_config`.

    The latter are left out when they do not contain the former, for then they belong to another vocabulary.

    Raises:
        ConfigError: Neither names one, so no completion could ever end by itself.
    """
    own = getattr(tokenizer, "eos_token_id", None)
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    others = [] if given is None else [given] if isinstance(given, int) else list(given)
    belong = own is None or own in others
    ids = [] if own is None else [own]
    ids += [other for other in others if belong and other != own]
    if not ids:
        raise ConfigError(
            "expected an end-of-sequence token in the tokenizer or in the model's generation_config, got none; every "
            "completion would run to max_new_tokens. Set tokenizer.eos_token"
        )
    return tuple(int(i) for i in ids)


def context_of(model: nn.Module) -> int | None:
    """Longest sequence a model was made for; None when it does not say."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(config, "max_position_embeddings", None)
    return None if longest is None else int(longest)


def check_lengths(prompts: Sequence[Prompt], *, context: int | None, limit: int) -> None:
    """Checks that every prompt and a completion of `limit` tokens fit into the context.

    Raises:
        DataError: A prompt is empty or too long.
    """
    for prompt in prompts:
        length = len(prompt.token_ids)
        if length == 0:
            raise DataError(
                f"prompt '{prompt.prompt_id}' has no tokens; there is nothing to predict the first token from. "
                "Start it with the tokenizer's beginning-of-sequence token or drop it"
            )
        if context is not None and length + limit > context:
            raise DataError(
                f"prompt '{prompt.prompt_id}' has {length} tokens, expected at most {context - limit} (context of the "
                f"student {context} minus max_new_tokens {limit}); past it positions are untrained and the completion "
                "is noise. Drop or shorten the prompt, or lower rollout.max_new_tokens"
            )
