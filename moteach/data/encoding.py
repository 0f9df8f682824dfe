"""From what the user wrote to the token ids the student reads; done once per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moteach.errors import DataError


def has_chat_template(tokenizer: Any) -> bool:
    """True when the tokenizer knows how to write a conversation."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_text(text: str, tokenizer: Any) -> tuple[str, tuple[int, ...]]:
    """Tokenises a plain prompt, with the beginning-of-sequence token when the tokenizer adds one.

    An end-of-sequence token that the tokenizer appends is taken off: the student has to continue the prompt.
    """
    ids = tokenizer(text)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return text, tuple(ids)


def encode_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[str, tuple[int, ...]]:
    """Writes a conversation with the tokenizer's chat template, opened for the answer, and tokenises it.

    Raises:
        DataError: The tokenizer has no chat template, or its template refuses these messages.
    """
    if not has_chat_template(tokenizer):
        raise DataError(
            "expected a tokenizer with a chat template, because the prompt is a list of messages; got one without. "
            "Set tokenizer.chat_template, or write prompts as plain strings"
        )
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Templates raise whatever Jinja or their author raises.
        raise DataError(f"the chat template refuses these messages: {error}") from error
    # The template writes special tokens itself; adding them again would put two at the start.
    return text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
