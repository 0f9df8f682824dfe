from __future__ import annotations

import json
from collections import Counter

import pytest

from moteach.data.base import PromptSet
from moteach.data.sampling import FixedMixture, Sampler
from moteach.errors import CheckpointError, ConfigError, DataError
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


def _counts(prompts):
    return Counter(prompt.domain for prompt in prompts)


def _ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


def test_it_is_a_sampler():
    assert isinstance(FixedMixture(), Sampler)


def test_domains_are_equal_by_default():
    sampler = FixedMixture(prompts_per_step=6).bind(_set(math=50, code=20, law=9))
    assert _counts(sampler.next(0)) == {"math": 2, "code": 2, "law": 2}


def test_weights_of_bind_are_used_unless_there_is_a_mixture():
    prompts = _set(math=50, code=50)
    weighted = FixedMixture(prompts_per_step=8).bind(prompts, weights={"math": 3.0, "code": 1.0})
    assert _counts(weighted.next(0)) == {"math": 6, "code": 2}
    own = FixedMixture(prompts_per_step=8, mixture={"code": 3.0, "math": 1.0}).bind(
        prompts, weights={"math": 3.0, "code": 1.0}
    )
    assert _counts(own.next(0)) == {"math": 2, "code": 6}


def test_largest_remainder_with_carry_over_keeps_the_shares_exact_at_every_step():
    mixture = {"a": 0.5, "b": 0.3, "c": 0.2}
    sampler = FixedMixture(prompts_per_step=7, mixture=mixture).bind(_set(a=40, b=40, c=40))
    drawn = Counter()
    for step in range(40):
        prompts = sampler.next(step)
        assert len(prompts) == 7
        drawn += _counts(prompts)
        for domain, share in mixture.items():
            assert abs(drawn[domain] - share * 7 * (step + 1)) < 1
    assert drawn == {"a": 140, "b": 84, "c": 56}


def test_a_rare_domain_gets_its_turn_even_with_one_prompt_a_step():
    sampler = FixedMixture(prompts_per_step=1, mixture={"a": 0.9, "b": 0.1}).bind(_set(a=5, b=5))
    assert Counter(sampler.next(step)[0].domain for step in range(100)) == {"a": 90, "b": 10}


def test_each_prompt_comes_once_an_epoch_and_none_twice_a_step():
    sampler = FixedMixture(prompts_per_step=7).bind(_set(a=10))
    steps = [_ids(sampler.next(step)) for step in range(10)]
    assert all(len(set(step)) == 7 for step in steps)
    assert set(Counter(i for step in steps for i in step).values()) == {7}
    seen = Counter()
    for step in steps:
        seen.update(step)
        assert max(seen.values()) - min(seen[f"a{i}"] for i in range(10)) <= 2


def test_epochs_seeds_and_domains_have_different_orders():
    def orders(seed, domain):
        sampler = FixedMixture(prompts_per_step=30, seed=seed).bind(_set(**{domain: 30}))
        return [tuple(i.removeprefix(domain) for i in _ids(sampler.next(step))) for step in range(2)]

    everything = orders(0, "a") + orders(1, "a") + orders(0, "b")
    assert len(set(everything)) == 6
    assert orders(0, "a") == orders(0, "a")


def test_without_shuffle_the_order_is_that_of_the_data():
    sampler = FixedMixture(prompts_per_step=3, shuffle=False).bind(_set(a=5))
    assert _ids(sampler.next(0)) == ["a0", "a1", "a2"]
    assert _ids(sampler.next(1)) == ["a3", "a4", "a0"]


@pytest.mark.parametrize("stop", [0, 1, 5, 13])
def test_resuming_from_a_checkpoint_is_exact(stop):
    def make():
        return FixedMixture(prompts_per_step=7, mixture={"a": 0.6, "b": 0.4}, seed=3).bind(_set(a=10, b=11))

    whole = make()
    expected = [_ids(whole.next(step)) for step in range(20)]
    first = make()
    for step in range(stop):
        first.next(step)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [_ids(second.next(step)) for step in range(stop, 20)] == expected[stop:]


def test_resuming_with_other_data_is_refused():
    state = FixedMixture(prompts_per_step=2).bind(_set(a=10)).state_dict()
    with pytest.raises(CheckpointError, match=r"\{'a': 10\}.*got \{'a': 9\}.*order of prompts would silently change"):
        FixedMixture(prompts_per_step=2).bind(_set(a=9)).load_state_dict(state)


def test_prompts_without_a_domain_form_the_default_domain():
    sampler = FixedMixture(prompts_per_step=4, mixture={"default": 1, "math": 1}).bind(_set(none=10, math=10))
    assert _counts(sampler.next(0)) == {None: 2, "math": 2}


def test_a_mixture_leaves_out_the_domains_it_does_not_name():
    sampler = FixedMixture(prompts_per_step=4, mixture={"math": 1.0, "law": 0.0}).bind(_set(math=10, code=10))
    assert _counts(sampler.next(0)) == {"math": 4}


def test_an_unknown_domain_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="got 'mth'; did you mean 'math'"):
        FixedMixture(mixture={"mth": 1.0}).bind(_set(math=10, code=10))


def test_a_step_larger_than_the_domain_is_refused():
    sampler = FixedMixture(prompts_per_step=11).bind(_set(math=10))
    with pytest.raises(DataError, match=r"at least 11 different prompts of domain 'math' for one step, got 10"):
        sampler.next(0)


def test_copies_of_an_id_never_meet_in_a_step():
    twins = [Prompt(prompt_id=f"p{i // 2}", text=str(i // 2), token_ids=(3,)) for i in range(12)]
    sampler = FixedMixture(prompts_per_step=4).bind(PromptSet.of(twins))
    steps = [_ids(sampler.next(step)) for step in range(9)]
    assert all(len(set(step)) == 4 for step in steps)
    assert set(Counter(i for step in steps for i in step)) == {f"p{i}" for i in range(6)}


def test_a_lazy_sequence_is_only_drawn_where_it_is_used():
    class Lazy:
        def __init__(self):
            self.drawn = []

        def __len__(self):
            return 1000

        def __getitem__(self, row):
            self.drawn.append(row)
            return Prompt(prompt_id=str(row), text=str(row), token_ids=(3,), domain="ab"[row % 2])

        def rows_by_domain(self):
            return {"a": range(0, 1000, 2), "b": range(1, 1000, 2)}

    from collections.abc import Sequence

    Sequence.register(Lazy)
    lazy = Lazy()
    prompts = PromptSet(train=lazy, evaluation=(), domains=("a", "b"))
    sampler = FixedMixture(prompts_per_step=6).bind(prompts)
    lazy.drawn.clear()
    assert _counts(sampler.next(0)) == {"a": 3, "b": 3}
    assert len(lazy.drawn) < 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts_per_step": 0}, "prompts_per_step to be at least 1, got 0"),
        ({"mixture": {"a": -1.0}}, "weights of at least 0, got -1.0 for 'a'"),
        ({"mixture": {"a": float("nan")}}, "weights of at least 0, got nan"),
        ({"mixture": {"a": 0.0}}, "at least one domain with a positive weight"),
        ({"mixture": {}}, "at least one domain with a positive weight"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FixedMixture(**settings)


def test_an_unbound_sampler_and_an_empty_set_are_refused():
    with pytest.raises(ConfigError, match=r"sampler\.bind\(prompts\)"):
        FixedMixture().next(0)
    with pytest.raises(DataError, match="at least one training prompt"):
        FixedMixture().bind(PromptSet.of([]))
