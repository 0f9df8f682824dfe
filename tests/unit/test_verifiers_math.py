from __future__ import annotations

import builtins
import threading

import pytest

from moteach.errors import DataError, MissingDependencyError
from moteach.types import Prompt
from moteach.verifiers.math import MathVerifier, final_answer

pytest.importorskip("math_verify")


def _prompt(answer):
    return Prompt(prompt_id="p", text="", token_ids=(3,), answer=answer, verifier="math")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so \\boxed{1} or rather \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{7} and then \\boxed{12", "7"),
        ("first 3, then 1,234.5.", "1,234.5"),
        ("it is -4", "-4"),
        ("half: 1/2", "1/2"),
        ("no idea", None),
    ],
)
def test_the_final_answer_is_the_last_box_else_the_last_number(completion, expected):
    assert final_answer(completion) == expected


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        ("42", "the result is 42.0", 1.0),
        ("42", "42 apples, no: 43", 0.0),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("x^2+1", "\\boxed{1+x^2}", 1.0),
        ("x^2+1", "\\boxed{1-x^2}", 0.0),
        ("1000", "about 1,000", 1.0),
        ("3", "no idea", 0.0),
        ("$\\sqrt{8}$", "\\boxed{2\\sqrt{2}}", 1.0),
    ],
)
def test_equality_is_mathematical(answer, completion, score):
    assert MathVerifier().score(_prompt(answer), completion) == score


def test_it_works_outside_the_main_thread():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(MathVerifier().score(_prompt("1/2"), "\\boxed{0.5}")))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_answers_that_are_too_long_are_wrong_unread():
    assert MathVerifier(max_length=5).score(_prompt("1"), "\\boxed{1+1-1+0}") == 0.0
    assert MathVerifier().score(_prompt("1"), "\\boxed{1+1-1+0}") == 1.0


def test_a_prompt_without_answer_is_refused():
    with pytest.raises(DataError, match="expected an `answer` in prompt 'p'"):
        MathVerifier().score(_prompt(None), "1")


def test_a_missing_package_is_answered_with_the_command(monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingDependencyError, match=r"pip install 'moteach\[math\]'"):
        MathVerifier().score(_prompt("1"), "1")
