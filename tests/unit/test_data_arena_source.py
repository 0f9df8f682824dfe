from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moteach.data.arena.source as source_module
from moteach.data.arena.families import FAMILIES
from moteach.data.arena.source import ArenaSource, reference_completion
from moteach.data.arena.splits import draw_distinct, draw_text, split_of
from moteach.data.arena.tokenizer import ALPHABET, build_tokenizer
from moteach.data.base import PromptSource, check_disjoint, text_key
from moteach.errors import ConfigError, DataError, UnknownChoiceError


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return ArenaSource(composite_size=100).load(tokenizer)


def test_the_same_seed_draws_the_same_prompts_and_another_seed_others(tokenizer):
    first, again, other = (ArenaSource(seed=seed, evaluation_size=1).load(tokenizer).train for seed in (3, 3, 4))
    assert first[:30] == again[:30]
    assert [prompt.text for prompt in first[:30]] != [prompt.text for prompt in other[:30]]
    assert first[29] == again[-len(again) + 29]


def test_evaluation_is_the_same_for_every_seed_and_training_size(tokenizer, prompts):
    other = ArenaSource(seed=9, train_size=10, composite_size=100).load(tokenizer)
    assert prompts.evaluation == other.evaluation
    assert prompts.train[0] != other.train[0]


def test_evaluation_has_the_asked_size_per_domain_spread_over_families(prompts):
    assert Counter(prompt.domain for prompt in prompts.evaluation) == {
        "math": 1000,
        "code": 1000,
        "search": 1000,
        "composite": 100,
    }
    sizes = Counter(prompt.metadata["family"] for prompt in prompts.evaluation)
    assert sizes["add"] == sizes["subtract"] == 500
    assert {sizes["reverse"], sizes["sort"], sizes["rotate"]} == {333, 334}
    assert prompts.domains == ("math", "code", "search", "composite")


def test_no_evaluation_text_comes_twice(prompts):
    assert len({text_key(prompt.text) for prompt in prompts.evaluation}) == len(prompts.evaluation)
    assert len({prompt.prompt_id for prompt in prompts.evaluation}) == len(prompts.evaluation)
    check_disjoint(prompts)


@pytest.fixture(scope="module")
def held_out(prompts):
    return {text_key(prompt.text) for prompt in prompts.evaluation}


@given(seed=st.integers(0, 10**9), start=st.integers(0, 59_000))
@settings(max_examples=30, deadline=None)
def test_training_never_shows_a_held_out_text(tokenizer, held_out, seed, start):
    # the training stream does not know the size of the held-out set, which `prompts` has drawn whole
    for prompt in ArenaSource(seed=seed, evaluation_size=1).load(tokenizer).train[start : start + 20]:
        assert split_of(prompt.text) == "train"
        assert text_key(prompt.text) not in held_out


def test_held_out_texts_are_in_the_evaluation_split(prompts):
    assert {split_of(prompt.text) for prompt in prompts.evaluation} == {"evaluation"}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_splits_have_their_shares_and_do_not_overlap(name):
    rng = Random(5)
    texts = {FAMILIES[name].draw(rng) for _ in range(3000)}
    shares = Counter(split_of(text) for text in texts)
    assert 0.11 < shares["evaluation"] / len(texts) < 0.19
    assert 0.03 < shares["validation"] / len(texts) < 0.08


def test_the_split_ignores_case_and_white_space():
    rng = Random(0)
    for _ in range(100):
        text = draw_text(FAMILIES["lookup"], rng, split="evaluation")
        assert split_of(f" {text.lower()}\n") == "evaluation"


def test_prompts_carry_answer_steps_and_ids_made_of_their_text(tokenizer, prompts):
    ids: dict[str, str] = {}
    for prompt in (*prompts.evaluation[::7], *prompts.train[:300]):
        assert prompt.answer == reference_completion(prompt) == "".join(s["text"] for s in prompt.metadata["steps"])
        assert prompt.verifier == "arena"
        assert prompt.prompt_id.startswith(f"{prompt.domain}-{prompt.metadata['family']}-")
        assert ids.setdefault(prompt.prompt_id, prompt.text) == prompt.text
        assert tokenizer.decode(list(prompt.token_ids)) == prompt.text


def test_training_takes_turns_and_answers_for_its_rows(tokenizer):
    train = ArenaSource(train_size=50, domains=["search", "math"]).load(tokenizer).train
    assert len(train) == 100
    assert [prompt.domain for prompt in train[:4]] == ["search", "math"] * 2
    assert {domain: list(rows) for domain, rows in train.rows_by_domain().items()} == {
        "search": list(range(0, 100, 2)),
        "math": list(range(1, 100, 2)),
    }
    assert all(train[row].domain == "math" for row in train.rows_by_domain()["math"])
    assert len(list(train)) == 100
    with pytest.raises(IndexError):
        train[100]


def test_composites_are_left_out_unless_asked_for(tokenizer):
    plain = ArenaSource(evaluation_size=20).load(tokenizer)
    assert "composite" not in {prompt.domain for prompt in (*plain.evaluation, *plain.train[:90])}
    assert plain.domains == ("math", "code", "search")
    trained = ArenaSource(evaluation_size=20, domains=["composite"]).load(tokenizer)
    assert {prompt.domain for prompt in trained.train[:10]} == {"composite"}


def test_loading_draws_next_to_no_training_prompts_and_asking_for_one_draws_one(tokenizer, monkeypatch):
    drawn = []
    draw = source_module.draw_text
    monkeypatch.setattr(source_module, "draw_text", lambda *given, **named: drawn.append(1) or draw(*given, **named))
    source = ArenaSource(train_size=10**7, evaluation_size=20).load(tokenizer)
    assert len(drawn) < 10
    drawn.clear()
    assert source.train[10**7].text
    assert len(drawn) == 1
    assert isinstance(ArenaSource(), PromptSource)


def test_bad_settings_are_refused(tokenizer):
    with pytest.raises(UnknownChoiceError, match="did you mean 'math'"):
        ArenaSource(domains=["maths"])
    with pytest.raises(ConfigError, match="none twice"):
        ArenaSource(domains=["math", "math"])
    with pytest.raises(ConfigError, match="at least one"):
        ArenaSource(domains=[])
    with pytest.raises(ConfigError, match="evaluation_size >= 1"):
        ArenaSource(evaluation_size=0)
    with pytest.raises(ConfigError, match="composite_size >= 0"):
        ArenaSource(composite_size=-1)
    with pytest.raises(DataError, match="no arena prompt could be graded"):
        ArenaSource().load(tokenizer, verifiers=["exact"])


def test_asking_for_more_held_out_texts_than_a_family_has_is_refused():
    with pytest.raises(DataError, match="different evaluation texts of family 'subtract'"):
        draw_distinct(FAMILIES["subtract"], 700, split="evaluation")


def test_the_tokenizer_restores_every_character(tokenizer):
    assert len(tokenizer) <= 96
    assert tokenizer(ALPHABET, add_special_tokens=False)["input_ids"] == list(range(3, 3 + len(ALPHABET)))
    assert tokenizer.decode(tokenizer(ALPHABET)["input_ids"]) == ALPHABET
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


def test_the_tokenizer_survives_saving_and_loading(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = 'A37 Bdbca?rev(B) "x" 1+2='
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text
