"""The bytes behind token ids: what each token writes, and how a text is written in the tokens of another model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from moteach.data.base import CONVERSATION
from moteach.errors import IncompatibleTeacherError
from moteach.types import Prompt

PromptFormat = Literal["template", "text"]
"""How the teacher reads a prompt: in its own chat template, or in the words the student read."""

_SPACE = "▁"
_GUARD = "\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A completion in tokens, with the bytes each of them writes; the end of sequence writes one byte of its own."""

    ids: tuple[int, ...]
    lengths: tuple[int, ...]


class ByteTokenizer:
    """A tokenizer of which each token stands for known bytes.

    Byte-level BPE, SentencePiece with byte fallback and plain vocabularies are understood; WordPiece and the like drop
    spaces and case, so that the text cannot be told from the tokens, and are refused.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        name: Whose it is, for messages.

    Raises:
        IncompatibleTeacherError: Its tokens do not say which bytes they stand for.
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._kind = _kind_of(tokenizer, name)

    @cached_property
    def table(self) -> tuple[bytes | None, ...]:
        """Bytes of each id; None for special tokens and ids without one."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        added = self.tokenizer.added_tokens_decoder
        found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for text, index in vocabulary.items():
            if index not in added:
                found[index] = _bytes_of(text, self._kind)
            elif not added[index].special:
                found[index] = text.encode()
        return tuple(found)

    @property
    def end_id(self) -> int | None:
        """Id of the end of sequence."""
        end = self.tokenizer.eos_token_id
        return None if end is None else int(end)

    def written(self, ids: Sequence[int], *, finished: bool) -> tuple[Written, bytes]:
        """Says what a completion of the model itself writes, up to the first token that writes no bytes.

        Args:
            ids: The tokens; when `finished` the last one, if it writes no bytes, is the end.
            finished: Whether the completion ended by itself.

        Returns:
            The tokens that could be read, and their bytes; the end is among them when all others could be read.
        """
        pieces = [self.table[index] if index < len(self.table) else None for index in ids]
        ends = finished and bool(pieces) and pieces[-1] is None
        texts = _first(pieces[:-1] if ends else pieces)
        lengths = [len(piece) for piece in texts]
        if ends and len(texts) == len(ids) - 1:
            lengths.append(1)
        return Written(ids=tuple(ids[: len(lengths)]), lengths=tuple(lengths)), b"".join(texts)

    def write(self, text: bytes, *, end: bool) -> Written:
        """Writes bytes in this model's tokens, for as long as they stand for exactly these bytes.

        Bytes that are not UTF-8, characters without a token, and a normaliser that changes the text end it early.

        Args:
            text: What the completion says.
            end: Add the end of sequence, when the whole text could be written.
        """
        words = _valid_text(text)
        found = self._kept(self._encode(words), text)
        if sum(found.lengths) < len(words.encode()):
            # some tokenizers put a space before whatever they read; behind a line break it is not part of the text
            behind = self._kept(self._behind_guard(self._encode(_GUARD + words)), text)
            found = behind if sum(behind.lengths) > sum(found.lengths) else found
        if end and sum(found.lengths) == len(text) and self.end_id is not None:
            return Written(ids=(*found.ids, self.end_id), lengths=(*found.lengths, 1))
        return found

    def prompt(self, prompt: Prompt, *, form: PromptFormat) -> tuple[int, ...]:
        """Tokenises a prompt for this model: its conversation in this model's template, or the student's text.

        A plain text, and a conversation where this tokenizer has no template, is read as the student read it. Special tokens
        written in it are this model's own where it knows them; a beginning-of-sequence token is put before it.

        Raises:
            IncompatibleTeacherError: The template refuses the conversation, or nothing is left of an empty prompt.
        """
        conversation = prompt.metadata.get(CONVERSATION)
        text = prompt.text
        if form == "template" and conversation and getattr(self.tokenizer, "chat_template", None):
            try:
                text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # templates raise whatever their author raises
                raise IncompatibleTeacherError(
                    f"the chat template of the teacher '{self.name}' refuses the conversation of the prompt "
                    f"'{prompt.prompt_id}': {error}. Choose alignment.prompt=text to give it the student's format"
                ) from error
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:1] != [begin] and self.tokenizer("a")["input_ids"][:1] == [begin]:
            ids.insert(0, int(begin))
        if not ids:
            raise IncompatibleTeacherError(
                f"expected a prompt of at least one token for the teacher '{self.name}', got none of '{prompt.prompt_id}'; the "
                "first token of the completion would be predicted from nothing"
            )
        return tuple(ids)

    def _encode(self, text: str) -> list[int]:
        # what the student spelled out in letters is text, also where it reads like a special token
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _kept(self, ids: Sequence[int], text: bytes) -> Written:
        """The tokens that write the beginning of this text, up to the first that writes anything else."""
        kept: list[int] = []
        lengths: list[int] = []
        at = 0
        for index in ids:
            piece = self.table[index] if index < len(self.table) else None
            if piece is None or text[at : at + len(piece)] != piece:
                break
            kept.append(index)
            lengths.append(len(piece))
            at += len(piece)
        return Written(ids=tuple(kept), lengths=tuple(lengths))

    def _behind_guard(self, ids: Sequence[int]) -> list[int]:
        """The tokens behind the line break; none where it shares a token with what follows."""
        read = b""
        for place, index in enumerate(ids):
            read += self.table[index] or b""
            if read.lstrip(b" ") == _GUARD.encode():
                return list(ids[place + 1 :])
        return []


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same ids for the same tokens, special ones included."""
    keys = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")
    special = all(getattr(one, key, None) == getattr(other, key, None) for key in keys)
    return special and bool(one.get_vocab() == other.get_vocab())


def is_cut(text: bytes, *, at: int) -> bool:
    """Whether all that is left of these bytes from `at` on is the beginning of a character."""
    try:
        text[at:].decode()
    except UnicodeDecodeError as error:
        # an incomplete character is reported to reach to the end, a wrong byte is not
        return error.start == 0 and error.reason == "unexpected end of data"
    return at == len(text)


def _first(pieces: Sequence[bytes | None]) -> list[bytes]:
    """The pieces before the first None."""
    found: list[bytes] = []
    for piece in pieces:
        if piece is None:
            break
        found.append(piece)
    return found


def _valid_text(text: bytes) -> str:
    """The longest beginning of these bytes that is text."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start].decode()


def _kind_of(tokenizer: Any, name: str) -> Literal["level", "piece", "plain"]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str()).get("decoder")
    kinds = [part["type"] for part in _parts(decoder)]
    if kinds == ["ByteLevel"]:
        return "level"
    if kinds == ["Fuse"]:
        return "plain"
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and _marks_spaces(decoder):
        return "piece"
    raise IncompatibleTeacherError(
        f"expected a tokenizer of '{name}' whose tokens say which bytes they stand for (byte-level BPE, or SentencePiece with "
        f"byte fallback), got one with the decoder {' and '.join(kinds) or 'none'}; spaces or case of the text would be lost, "
        "and scores would be moved to the wrong tokens: leave this expert out"
    )


def _parts(decoder: Any) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    else:
        yield decoder


def _marks_spaces(decoder: Any) -> bool:
    return all(
        part.get("replacement", _SPACE) == _SPACE
        if part["type"] == "Metaspace"
        else part["pattern"].get("String") == _SPACE and part["content"] == " "
        for part in _parts(decoder)
        if part["type"] in ("Metaspace", "Replace")
    )


def _bytes_of(token: str, kind: Literal["level", "piece", "plain"]) -> bytes | None:
    if kind == "level":
        return bytes(_LEVEL[letter] for letter in token) if all(letter in _LEVEL for letter in token) else None
    if kind == "plain":
        return token.encode()
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes the 256 bytes with (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in plain]
    return {chr(value): value for value in plain} | {chr(256 + place): value for place, value in enumerate(others)}


_LEVEL = _byte_letters()
