from __future__ import annotations

import builtins
import json

import pytest

from moteach.data.base import PromptSet, PromptSource, check_disjoint, text_key
from moteach.data.prompts import HFPrompts, JsonlPrompts
from moteach.errors import ConfigError, DataError, MissingDependencyError, MissingFileError, UnknownChoiceError
from moteach.testing import CHAT_TEMPLATE, tiny_tokenizer
from moteach.types import Prompt

VERIFIERS = ("arena", "exact", "math")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def write(tmp_path):
    def _write(*rows, name="train.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return _write


def _load(tokenizer, path, **settings):
    return JsonlPrompts(path=path, **settings).load(tokenizer, verifiers=VERIFIERS)


def test_every_column_reaches_the_prompt(write, tokenizer):
    path = write(
        {
            "prompt": "1+1=",
            "domain": "math",
            "answer": 2,
            "verifier": "math",
            "id": 7,
            "metadata": {"level": 3},
            "x": 0,
        },
        {"prompt": "a b", "teacher_id": "law-1"},
    )
    source = JsonlPrompts(path=path)
    assert isinstance(source, PromptSource)
    prompts = source.load(tokenizer, verifiers=VERIFIERS)
    first, second = prompts.train
    assert first == Prompt(
        prompt_id="7",
        text="1+1=",
        token_ids=(4, 40, 4, 44),
        domain="math",
        answer="2",
        verifier="math",
        metadata={"level": 3},
    )
    assert (second.domain, second.teacher_id, second.answer, second.verifier) == (None, "law-1", None, None)
    assert prompts.domains == ("math", "default")
    assert prompts.evaluation == ()


def test_an_answer_without_verifier_is_graded_by_the_default_one(write, tokenizer):
    path = write({"prompt": "1+1=", "answer": "2"})
    assert _load(tokenizer, path).train[0].verifier == "exact"
    assert _load(tokenizer, path, verifier="math").train[0].verifier == "math"


def test_ids_are_hashes_of_the_text_that_do_not_move_with_the_row(write, tokenizer):
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]
    one = [p.prompt_id for p in _load(tokenizer, write(*rows)).train]
    other = [p.prompt_id for p in _load(tokenizer, write(rows[1], rows[0])).train]
    assert one[:2] == other[::-1]
    assert one[2] == f"{one[0]}-2"


def test_chat_messages_go_through_the_template_once(write):
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
    prompt = _load(tokenizer, write({"prompt": messages})).train[0]
    assert prompt.text == "<s>be brief\n<u>1+1=\n<a>"
    assert tokenizer.decode(prompt.token_ids) == prompt.text


def test_messages_need_a_chat_template(write, tokenizer):
    path = write({"prompt": [{"role": "user", "content": "1+1="}]})
    with pytest.raises(DataError, match=r"train\.jsonl:1: expected a tokenizer with a chat template"):
        _load(tokenizer, path)


def test_a_template_that_refuses_is_reported_with_its_line(write):
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        DataError, match=r"train\.jsonl:2: the chat template refuses these messages: roles must alternate"
    ):
        _load(tokenizer, write({"prompt": "a"}, {"prompt": [{"role": "user", "content": "x"}]}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"promt": "a"},
            r"expected the column 'prompt', got the columns \['promt'\]; did you mean 'promt'\? rename it",
        ),
        (
            {"text": "a"},
            r"expected the column 'prompt', got the columns \['text'\]; rename it, or say data.columns.prompt",
        ),
        ({"prompt": 3}, r"expected the prompt to be a string or a list of messages, got a whole number \('3'\)"),
        ({"prompt": None}, "to be a string or a list of messages, got null"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": []}, "an empty list of messages"),
        ({"prompt": [{"role": "user"}]}, r"expected message 0 to be .*got \{'role': 'user'\}"),
        ({"prompt": "a", "domain": 3}, "expected 'domain' to be a string, got a whole number"),
        (
            {"prompt": "a", "answer": ["x"]},
            "expected 'answer' to be a string or a whole number or a number, got a list",
        ),
        ({"prompt": "a", "answer": True}, "expected 'answer' to be .*, got true"),
        ({"prompt": "a", "anwser": "2"}, "the column 'anwser' is not read; did you mean 'answer'"),
        ({"prompt": "a", "answer": "2", "verifier": "exat"}, "got 'exat'; did you mean 'exact'"),
        ("[1, 2]", "expected an object with the column 'prompt', got a list"),
        ('{"prompt": "a"', r'expected one JSON object a line, .* at column \d+\. A line looks like \{"prompt"'),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row, message, write, tokenizer):
    with pytest.raises(DataError, match=r"train\.jsonl:3: .*" + message):
        _load(tokenizer, write({"prompt": "ok"}, "", row))


def test_bytes_that_are_not_utf8_are_named_by_line_and_column(tmp_path, tokenizer):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:2: expected UTF-8 text, got the byte 0xe9 at column 16.*iconv"):
        _load(tokenizer, str(path))


def test_a_byte_order_mark_is_accepted(tmp_path, tokenizer):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\n')
    assert _load(tokenizer, str(path)).train[0].text == "a"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(content, tmp_path, tokenizer):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: expected at least one prompt, got an empty file"):
        _load(tokenizer, str(path))


def test_duplicate_ids_name_both_lines(write, tokenizer):
    path = write({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"})
    with pytest.raises(DataError, match=r"train\.jsonl:2: the id 'x' is already that of .*train\.jsonl:1;"):
        _load(tokenizer, path)


def test_a_missing_file_is_answered_with_the_nearest(write, tokenizer, tmp_path):
    write({"prompt": "a"}, name="prompts_train.jsonl")
    with pytest.raises(MissingFileError, match=r"prompt_train\.jsonl'; in .* did you mean 'prompts_train\.jsonl'"):
        _load(tokenizer, str(tmp_path / "prompt_train.jsonl"))
    with pytest.raises(MissingFileError, match=r"in '.*': did you mean|valid choices"):
        _load(tokenizer, str(tmp_path / "nowhere" / "prompt_train.jsonl"))


def test_a_folder_is_refused_with_the_way_out(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"expected a JSONL file, got a folder; .*data=hf"):
        _load(tokenizer, str(tmp_path))


def test_prompts_that_are_too_long_are_refused(write, tokenizer):
    path = write({"prompt": "abc"}, {"prompt": "abcd"})
    with pytest.raises(DataError, match=r":2: the prompt has 4 tokens, expected at most 3"):
        _load(tokenizer, path, max_prompt_tokens=3)


def test_columns_can_be_renamed(write, tokenizer):
    path = write({"question": "1+1=", "solution": "2", "prompts": "x"})
    prompt = _load(tokenizer, path, columns={"prompt": "question", "answer": "solution"}).train[0]
    assert (prompt.text, prompt.answer) == ("1+1=", "2")


def test_evaluation_comes_from_its_own_file(write, tokenizer):
    held_out = write({"prompt": "b", "domain": "law"}, name="eval.jsonl")
    prompts = _load(tokenizer, write({"prompt": "a"}), evaluation_path=held_out)
    assert [p.text for p in prompts.evaluation] == ["b"]
    assert prompts.domains == ("default", "law")


def test_a_held_out_fraction_is_stable_and_keeps_copies_together(write, tokenizer):
    rows = [{"prompt": f"question {i}"} for i in range(400)]
    prompts = _load(tokenizer, write(*rows, *rows[:50]), evaluation_fraction=0.25)
    held_out = {p.text for p in prompts.evaluation}
    assert 70 <= len(held_out) <= 130
    assert not held_out & {p.text for p in prompts.train}
    assert len(prompts.train) + len(prompts.evaluation) == 450
    fewer = _load(tokenizer, write(*rows[:200]), evaluation_fraction=0.25)
    assert {p.text for p in fewer.evaluation} == held_out & {r["prompt"] for r in rows[:200]}


def test_a_fraction_that_leaves_nothing_is_refused(write, tokenizer):
    with pytest.raises(DataError, match=r"leaves . to train on and . to evaluate on"):
        _load(tokenizer, write({"prompt": "a"}), evaluation_fraction=0.5)


def test_held_out_prompts_that_are_trained_on_are_named(write, tokenizer):
    held_out = write({"prompt": "new"}, {"prompt": " One  PLUS one", "id": "e1"}, name="eval.jsonl")
    path = write({"prompt": "one plus one", "id": "t9"})
    with pytest.raises(
        DataError, match=r"got 1 that are: for instance ' One  PLUS one' \(evaluation 'e1', train 't9'\)"
    ):
        _load(tokenizer, path, evaluation_path=held_out)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"evaluation_fraction": 1.0}, ConfigError, r"evaluation_fraction to be a number in \[0, 1\)"),
        (
            {"evaluation_fraction": 0.1, "evaluation_path": "e"},
            ConfigError,
            "either evaluation_path or evaluation_fraction",
        ),
        ({"columns": {"promt": "x"}}, ConfigError, "got 'promt'; did you mean 'prompt'"),
        ({"max_prompt_tokens": 0}, ConfigError, "max_prompt_tokens to be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        JsonlPrompts(path="x.jsonl", **settings)


def test_an_unknown_default_verifier_is_refused(write, tokenizer):
    with pytest.raises(UnknownChoiceError, match=r"data\.verifier: got 'mth'; did you mean 'math'"):
        _load(tokenizer, write({"prompt": "a"}), verifier="mth")


def test_one_id_for_two_texts_is_refused():
    left = Prompt(prompt_id="x", text="a", token_ids=(3,))
    right = Prompt(prompt_id="x", text="b", token_ids=(3,))
    with pytest.raises(DataError, match="prompt id 'x' stands for two different texts"):
        check_disjoint(PromptSet.of([left], [right]))
    check_disjoint(PromptSet.of([left, left], [Prompt(prompt_id="y", text="b", token_ids=(3,))]))


def test_texts_are_compared_up_to_case_space_and_unicode_form():
    assert text_key("Cafe\u0301  au lait\n") == text_key("caf\u00e9 AU lait")
    assert text_key("a") != text_key("b")


def test_plain_prompts_lose_an_appended_end_token(write):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<eos>", 1), ("<unk>", 2)]
    )
    assert tokenizer("12")["input_ids"] == [2, 4, 5, 1]
    assert _load(tokenizer, write({"prompt": "12"})).train[0].token_ids == (2, 4, 5)


def _save(tmp_path, rows, **splits):
    datasets = pytest.importorskip("datasets")
    parts = {"train": rows, **splits}
    path = tmp_path / "saved"
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(
        str(path)
    )
    return str(path)


def test_a_saved_data_set_gives_the_prompts_of_its_splits(tmp_path, tokenizer):
    path = _save(
        tmp_path, [{"question": "1+1=", "answer": "2"}, {"question": "x", "answer": None}], test=[{"question": "y"}]
    )
    source = HFPrompts(path=path, evaluation_split="test", columns={"prompt": "question"})
    prompts = source.load(tokenizer, verifiers=VERIFIERS)
    assert [(p.text, p.answer, p.verifier) for p in prompts.train] == [("1+1=", "2", "exact"), ("x", None, None)]
    assert [p.text for p in prompts.evaluation] == ["y"]


def test_a_data_set_file_is_read_in_place(write, tokenizer):
    pytest.importorskip("datasets")
    path = write(*[{"prompt": f"q {i}"} for i in range(40)], name="rows.jsonl")
    prompts = HFPrompts(path=path, evaluation_fraction=0.3).load(tokenizer)
    assert len(prompts.train) + len(prompts.evaluation) == 40
    assert prompts.evaluation


def test_rows_and_splits_of_a_data_set_are_named(tmp_path, tokenizer):
    path = _save(tmp_path, [{"prompt": "a"}, {"prompt": " "}])
    with pytest.raises(DataError, match=r"saved\[train\] row 1: the prompt is empty"):
        HFPrompts(path=path).load(tokenizer)
    with pytest.raises(DataError, match=r"got 'trian'; did you mean 'train'"):
        HFPrompts(path=path, split="trian").load(tokenizer)


def test_a_missing_data_set_file_is_answered_with_the_nearest(write, tokenizer, tmp_path):
    pytest.importorskip("datasets")
    write({"prompt": "a"}, name="rows.parquet")
    with pytest.raises(MissingFileError, match=r"did you mean 'rows\.parquet'"):
        HFPrompts(path=str(tmp_path / "row.parquet")).load(tokenizer)


def test_a_missing_package_is_answered_with_the_command(monkeypatch, tokenizer):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingDependencyError, match=r"pip install 'moteach\[data\]'"):
        HFPrompts(path="x").load(tokenizer)
