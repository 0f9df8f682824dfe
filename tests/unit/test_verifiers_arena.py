from __future__ import annotations

import pytest

from moteach.data.arena.families import FAMILIES
from moteach.data.arena.source import ArenaSource, make_prompt, reference_completion
from moteach.data.arena.tokenizer import build_tokenizer
from moteach.errors import DataError, UnknownChoiceError
from moteach.types import Prompt
from moteach.verifiers.arena import ArenaVerifier, steps_right
from moteach.verifiers.base import VERIFIERS, Verifier, verifier_named
from moteach.verifiers.exact import ExactVerifier


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def prompt_of(text: str, answer: str | None = None) -> Prompt:
    return Prompt(prompt_id=text, text=text, token_ids=(3,), answer=answer)


@pytest.mark.parametrize(
    ("text", "completion", "score"),
    [
        ("12+30=", "42", 1.0),
        ("12+30=", "43", 0.0),
        ("12+30=", "042", 0.0),
        ("12+30=", " 42", 0.0),
        ("12+30=", "42 ", 0.0),
        ("12+30=", "", 0.0),
        ('rev("dbca")', "acbd", 1.0),
        ('rev("dbca")', "dbca", 0.0),
        ("A37 C80 B52?B", "52", 1.0),
        ("A37 C80 B52?B", "80", 0.0),
        ("A37 C80 BA?B", "A37", 1.0),
        ("A37 C80 BA?B", "37", 0.0),
        ("A37 B52?A+B", "A37+B52=89", 1.0),
        ("A37 B52?A+B", "A37+B52=88", 0.0),
        ("A37 B52?A+B", "A37+B51=88", 0.0),
        ("A37 B52?A+B", "89", 0.0),
    ],
)
def test_only_the_right_answer_scores(text, completion, score):
    assert ArenaVerifier().score(prompt_of(text), completion) == score


def test_the_truth_comes_from_the_text_and_not_from_the_answer_field():
    wrong = prompt_of("12+30=", answer="41")
    assert ArenaVerifier().score(wrong, "42") == 1.0
    assert ArenaVerifier().score(wrong, "41") == 0.0


def test_references_of_held_out_prompts_score_and_those_of_others_do_not(tokenizer):
    prompts = ArenaSource(evaluation_size=60, composite_size=60).load(tokenizer).evaluation
    verifier = ArenaVerifier()
    assert all(verifier.score(prompt, reference_completion(prompt)) == 1.0 for prompt in prompts)
    shifted = zip(prompts, (*prompts[1:], prompts[0]), strict=True)
    assert all(verifier.score(a, reference_completion(b)) == float(a.answer == b.answer) for a, b in shifted)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("A37+B52=89", [True, True]),
        ("A37+B52=88", [True, False]),
        ("A37+B51=89", [False, True]),
        ("A37+B52=890", [True, False]),
        ("A37+B52=", [True, False]),
        ("89", [False, False]),
    ],
)
def test_each_step_of_a_composite_is_judged(tokenizer, completion, right):
    prompt = make_prompt("A37 B52?A+B", family=FAMILIES["total"], tokenizer=tokenizer)
    verdicts = steps_right(prompt, completion)
    assert [step.kind for step, _ in verdicts] == ["search", "math"]
    assert [verdict for _, verdict in verdicts] == right


def test_verifiers_are_found_by_name_and_built_once():
    assert isinstance(verifier_named("arena"), ArenaVerifier)
    assert isinstance(verifier_named("exact"), ExactVerifier)
    assert isinstance(verifier_named("arena"), Verifier)
    assert verifier_named("arena") is verifier_named("arena")
    assert {"arena", "exact", "math", "reasoning_gym"} <= set(VERIFIERS)


def test_an_unknown_verifier_names_the_nearest_one():
    with pytest.raises(UnknownChoiceError, match="did you mean 'arena'"):
        verifier_named("arenas")


def test_exact_match_can_forgive_space_and_case():
    prompt = prompt_of("Capital of France?", answer="Paris")
    assert ExactVerifier().score(prompt, " Paris\n") == 1.0
    assert ExactVerifier().score(prompt, "paris") == 0.0
    assert ExactVerifier(case_sensitive=False).score(prompt, "paris") == 1.0
    assert ExactVerifier(strip=False).score(prompt, "Paris ") == 0.0


def test_exact_match_without_an_answer_is_refused():
    with pytest.raises(DataError, match="expected an `answer`"):
        ExactVerifier().score(prompt_of("Capital of France?"), "Paris")
