from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from moteach.data.base import PromptSet
from moteach.data.difficulty import DifficultyFiltered
from moteach.data.sampling import FixedMixture, Sampler, StepFeedback
from moteach.errors import CheckpointError, ConfigError, DataError, UnknownChoiceError
from moteach.types import Prompt


def _set(**sizes):
    prompts = [
        Prompt(
            prompt_id=f"{domain}{i}", text=f"{domain} {i}", token_ids=(3,), domain=None if domain == "none" else domain
        )
        for domain, size in sizes.items()
        for i in range(size)
    ]
    return PromptSet.of(prompts)


def _ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


def _step(sampler, step, score):
    """Draws a step, scores each prompt by `score(prompt_id)` (None: no verifier) and gives the scores back."""
    ids = _ids(sampler.next(step))
    rewards = {i: scores for i in ids if (scores := score(i)) is not None}
    sampler.observe(StepFeedback(step=step, divergence={}, rewards=rewards))
    return ids


def _solved(*easy):
    """Scores of a group of two: the easy ones are always solved, the others every second time."""
    return lambda i: [1.0, 1.0] if i in easy else [0.0, 1.0]


def _make(sizes=None, **settings):
    defaults = {"prompts_per_step": 2, "shuffle": False, "window": 4, "min_attempts": 2, "rest_epochs": 1}
    return DifficultyFiltered(**{**defaults, **settings}).bind(_set(**(sizes or {"a": 6})))


def test_it_is_a_sampler():
    assert isinstance(DifficultyFiltered(), Sampler)


def test_a_solved_prompt_is_passed_over_for_an_epoch_and_then_tried_again():
    sampler = _make()
    steps, filtered = [], []
    for step in range(9):
        steps.append(_step(sampler, step, _solved("a0", "a3")))
        filtered.append(sampler.metrics()["sampler/filtered"])
    assert steps == [
        ["a0", "a1"],  # a0 is solved after 2 prompts: it rests until 8 were drawn
        ["a2", "a3"],  # a3 rests until 10
        ["a4", "a5"],
        ["a1", "a2"],  # 8 drawn
        ["a4", "a5"],  # a3 still rests; 10 drawn
        ["a0", "a1"],  # tried again, still solved: rests until 18
        ["a2", "a3"],  # rests until 20
        ["a4", "a5"],  # 16 drawn
        ["a1", "a2"],  # 18 drawn
    ]
    assert filtered == [1, 2, 2, 1, 0, 1, 2, 2, 1]


def test_a_prompt_that_is_no_longer_solved_stays():
    sampler = _make()
    for step in range(5):
        _step(sampler, step, _solved("a0"))
    drawn = [_step(sampler, step, _solved()) for step in range(5, 14)]
    assert Counter(i for ids in drawn for i in ids)["a0"] == 3
    assert sampler.metrics()["sampler/filtered"] == 0.0


@pytest.mark.parametrize(
    ("settings", "scores", "rests"),
    [
        ({}, [1.0, 1.0], True),
        ({}, [0.5, 0.7], True),
        ({}, [0.49, 1.0], False),
        ({}, [0.0, 0.0], False),
        ({}, [1.0], False),
        ({}, None, False),
        ({"pass_score": 0.8}, [0.7, 0.7], False),
        ({"min_pass_rate": 0.1}, [0.0, 0.0], True),
        ({"min_pass_rate": 0.5}, [0.0, 1.0], False),
        ({"min_pass_rate": 0.51}, [0.0, 1.0], True),
        ({"max_pass_rate": 0.5}, [0.0, 1.0], True),
        ({"max_pass_rate": None}, [1.0, 1.0], False),
        ({"min_attempts": 3}, [1.0, 1.0], False),
        ({"min_attempts": 3}, [1.0, 1.0, 1.0], True),
        # Only the last four attempts count.
        ({}, [0.0, 1.0, 1.0, 1.0, 1.0], True),
        ({}, [0.0, 1.0, 1.0, 1.0], False),
    ],
)
def test_the_band_of_pass_rates_decides_who_rests(settings, scores, rests):
    sampler = _make(**settings)
    _step(sampler, 0, {"a0": scores, "a1": [0.0, 1.0]}.get if scores else {"a1": [0.0, 1.0]}.get)
    expected = 1.0 if rests else 0.0
    # a1 passes every second time and rests itself where the band excludes one half.
    a1_rests = settings.get("max_pass_rate") == 0.5 or settings.get("min_pass_rate") == 0.51
    assert sampler.metrics()["sampler/filtered"] == expected + a1_rests


def test_attempts_add_up_over_steps():
    sampler = _make({"a": 2}, min_attempts=3)
    filtered = []
    for step in range(3):
        _step(sampler, step, {"a0": [1.0], "a1": [0.0]}.get)
        filtered.append(sampler.metrics()["sampler/filtered"])
    assert filtered == [0.0, 0.0, 1.0]


def test_never_solved_prompts_are_kept_by_default():
    sampler = _make()
    drawn = Counter(i for step in range(30) for i in _step(sampler, step, lambda i: [0.0, 0.0]))
    assert set(drawn.values()) == {10}


def test_a_step_is_full_when_everything_rests_and_takes_who_would_come_back_first():
    sampler = _make(rest_epochs=50)
    steps, recalled = [], []
    for step in range(9):
        steps.append(_step(sampler, step, lambda i: [1.0, 1.0]))
        recalled.append(sampler.metrics()["sampler/recalled"])
    # First come, first recalled: each recalled prompt rests anew and goes to the end of the queue.
    assert steps == [["a0", "a1"], ["a2", "a3"], ["a4", "a5"]] * 3
    assert recalled == [0.0] * 3 + [2.0] * 6


def test_only_as_many_as_are_missing_are_recalled():
    sampler = _make(prompts_per_step=3, rest_epochs=50)
    easy = _solved("a0", "a1", "a2", "a3")
    steps = [_step(sampler, step, easy) for step in range(6)]
    assert steps[:2] == [["a0", "a1", "a2"], ["a3", "a4", "a5"]]
    for step, oldest in zip(steps[2:], ("a0", "a1", "a2", "a3"), strict=True):
        assert sorted(step[:2]) == ["a4", "a5"]
        assert step[2:] == [oldest]
    assert sampler.metrics()["sampler/recalled"] == 1.0
    assert sampler.metrics()["sampler/filtered"] == 4.0


def test_the_order_of_recall_does_not_follow_the_walk():
    sampler = _make({"a": 5}, rest_epochs=50, window=2)
    solved = [{"a1"}, {}, {"a0"}, {}, {}, {"a3", "a4"}]
    steps = [_step(sampler, step, _solved(*easy)) for step, easy in enumerate(solved)]
    assert steps == [["a0", "a1"], ["a2", "a3"], ["a4", "a0"], ["a2", "a3"], ["a4", "a2"], ["a3", "a4"]]
    # The walk comes by a0 first, but a1 has rested for longer.
    assert _ids(sampler.next(6)) == ["a2", "a1"]


def test_prompts_without_a_verifier_never_rest():
    sampler = _make({"a": 6, "none": 4}, prompts_per_step=4)
    score = lambda i: [1.0, 1.0] if i.startswith("a") else None  # noqa: E731
    drawn = Counter(i for step in range(12) for i in _step(sampler, step, score))
    assert {drawn[f"none{i}"] for i in range(4)} == {6}


def test_a_starved_domain_does_not_take_from_the_others_and_the_shares_hold():
    sampler = DifficultyFiltered(prompts_per_step=8, mixture={"a": 3, "b": 1}, rest_epochs=9, min_attempts=2).bind(
        _set(a=20, b=20)
    )
    drawn = Counter()
    for step in range(40):
        ids = _step(sampler, step, lambda i: [1.0, 1.0] if i.startswith("a") else [0.0, 1.0])
        assert len(set(ids)) == 8
        drawn += Counter(i[0] for i in ids)
    assert drawn == {"a": 240, "b": 80}
    assert sampler.metrics()["sampler/filtered"] == 20.0


def test_resting_prompts_leave_their_places_to_the_others():
    hard = {f"a{i}" for i in range(10)}
    sampler = DifficultyFiltered(prompts_per_step=8, rest_epochs=4, min_attempts=2).bind(_set(a=100))
    plain = FixedMixture(prompts_per_step=8).bind(_set(a=100))
    score = lambda i: [0.0, 1.0] if i in hard else [1.0, 1.0]  # noqa: E731
    filtered = Counter(i for step in range(200) for i in _step(sampler, step, score))
    unfiltered = Counter(i for step in range(200) for i in _ids(plain.next(step)))
    assert sum(unfiltered[i] for i in hard) == 160
    assert sum(filtered[i] for i in hard) > 3 * 160
    # Nothing is dropped for ever: every easy prompt came back.
    assert min(filtered[f"a{i}"] for i in range(10, 100)) >= 3


def test_no_place_waits_for_the_next_step_while_a_domain_is_starved():
    sampler = _make({"a": 6}, prompts_per_step=4, rest_epochs=50, shuffle=True)
    for step in range(50):
        _step(sampler, step, _solved("a0", "a1", "a2", "a3"))
        if sampler.metrics()["sampler/recalled"]:
            assert sampler.state_dict()["mixture"]["domains"]["a"]["deferred"] == []
    assert sampler.metrics()["sampler/recalled"] == 2.0


def test_a_recalled_prompt_that_is_no_longer_solved_rests_no_more():
    sampler = _make(rest_epochs=50)
    for step in range(3):
        _step(sampler, step, lambda i: [1.0, 1.0])
    assert sampler.metrics()["sampler/filtered"] == 6.0
    assert _step(sampler, 3, _solved()) == ["a0", "a1"]
    assert sampler.metrics()["sampler/filtered"] == 4.0


def test_too_few_different_prompts_are_still_refused():
    with pytest.raises(DataError, match=r"at least 7 different prompts of domain 'a' for one step, got 6"):
        _make(prompts_per_step=7).next(0)


def test_held_out_prompts_are_still_refused():
    train = _set(a=4).train
    held_out = [Prompt(prompt_id="h", text="A  2", token_ids=(3,), domain="a")]
    sampler = DifficultyFiltered(prompts_per_step=4).bind(PromptSet.of(train, held_out))
    with pytest.raises(DataError, match="'a2' is also a held-out one"):
        sampler.next(0)


def _outcome(seed):
    def score(prompt_id):
        if prompt_id.startswith("c"):
            return None
        skill = (sum(prompt_id.encode()) * 37 % 100) / 60
        key = np.random.default_rng([seed, *prompt_id.encode()])
        return [float(value < skill) for value in key.uniform(size=2)]

    return score


@pytest.mark.parametrize("stop", [0, 1, 25, 43])
def test_resuming_from_a_checkpoint_is_exact(stop):
    def make():
        return DifficultyFiltered(
            prompts_per_step=11,
            mixture={"a": 3, "b": 2, "c": 1},
            seed=4,
            min_attempts=2,
            rest_epochs=2,
            min_pass_rate=0.2,
        ).bind(_set(a=23, b=17, c=9))

    def run(sampler, steps):
        return [(_step(sampler, step, _outcome(step)), sampler.metrics()) for step in steps]

    expected = run(make(), range(60))
    first = make()
    before = run(first, range(stop))
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert before + run(second, range(stop, 60)) == expected
    assert len({metrics["sampler/filtered"] for _, metrics in expected}) > 5
    assert any(metrics["sampler/recalled"] for _, metrics in expected)


def test_resuming_between_drawing_and_scoring_is_exact():
    first = _make()
    ids = _ids(first.next(0))
    second = _make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.observe(StepFeedback(step=0, divergence={}, rewards={ids[0]: [1.0, 1.0]}))
    assert second.metrics()["sampler/filtered"] == 1.0


def test_resuming_with_other_data_is_refused():
    state = _make().state_dict()
    with pytest.raises(CheckpointError, match="order of prompts would silently change"):
        _make({"a": 7}).load_state_dict(state)


def test_scores_that_do_not_belong_are_refused():
    sampler = _make()
    sampler.next(0)
    with pytest.raises(UnknownChoiceError, match="expected scores of prompts of the last step, got 'a5'"):
        sampler.observe(StepFeedback(step=0, divergence={}, rewards={"a5": [1.0]}))
    with pytest.raises(DataError, match=r"'a0', got .*would count as a failure"):
        sampler.observe(StepFeedback(step=0, divergence={}, rewards={"a0": [1.0, float("nan")]}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pass_score": float("nan")}, "pass_score to be a finite number"),
        ({"min_pass_rate": -0.1}, r"min_pass_rate in \[0, 1\], got -0.1"),
        ({"max_pass_rate": 0.0}, r"max_pass_rate in \(0.0, 1\]"),
        ({"min_pass_rate": 0.6, "max_pass_rate": 0.5}, r"max_pass_rate in \(0.6, 1\]"),
        ({"max_pass_rate": 1.5}, "got 1.5"),
        ({"min_attempts": 0}, "min_attempts between 1 and window=8, got 0"),
        ({"min_attempts": 9}, "min_attempts between 1 and window=8, got 9"),
        ({"rest_epochs": 0}, "rest_epochs to be at least 1"),
        ({"prompts_per_step": 0}, "prompts_per_step to be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DifficultyFiltered(**settings)
