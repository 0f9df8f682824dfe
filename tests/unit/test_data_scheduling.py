from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from moteach.data.base import PromptSet
from moteach.data.sampling import FixedMixture, Sampler, StepFeedback
from moteach.data.scheduling import AdaptiveMixture, descent_velocity, remaining_gap, scheduled_shares
from moteach.errors import CheckpointError, ConfigError, TrainingError, UnknownChoiceError
from moteach.types import Prompt

DOMAINS = ("math", "code", "search")


def _set(**sizes):
    prompts = [
        Prompt(prompt_id=f"{domain}{i}", text=f"{domain} {i}", token_ids=(3,), domain=domain)
        for domain, size in sizes.items()
        for i in range(size)
    ]
    return PromptSet.of(prompts)


def _feedback(step, **divergence):
    return StepFeedback(step=step, divergence=divergence, rewards={})


def _ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


def _bound(sizes=None, **settings):
    return AdaptiveMixture(**{"prompts_per_step": 20, **settings}).bind(_set(**(sizes or dict.fromkeys(DOMAINS, 50))))


def _shares(sampler):
    return {key.removeprefix("sampler/share/"): value for key, value in sampler.metrics().items()}


def test_it_is_a_sampler():
    assert isinstance(AdaptiveMixture(), Sampler)


def test_the_gap_is_relative_to_the_start_and_bounded_where_the_start_is_small():
    assert remaining_gap(0.30, 0.60, divergence_floor=0.15) == pytest.approx(0.5, abs=1e-15)
    assert remaining_gap(0.30, 0.10, divergence_floor=0.15) == pytest.approx(2.0, abs=1e-15)


@pytest.mark.parametrize(
    ("history", "windows", "velocity"),
    [
        ([0.8, 9.0, 0.5, 9.0, 0.4], 3, (0.375 + 0.2) / 2),
        ([0.8, 9.0, 0.5, 9.0, 0.4], 1, 0.2),
        ([0.4, 9.0, 0.5, 9.0, 0.25], 2, (0.5 - 0.25) / 2),
        ([9.0, 0.10, 9.0, 0.07], 3, 0.03 / 0.15),
        ([0.4, 9.0, 0.5], 3, 0.01),
        ([0.5, 9.0, 0.5], 3, 0.01),
        ([0.5, 0.1], 3, None),
        ([], 3, None),
    ],
)
def test_the_velocity_is_the_mean_relative_decrease_of_the_last_windows(history, windows, velocity):
    found = descent_velocity(history, window=2, windows=windows, divergence_floor=0.15, velocity_floor=0.01)
    assert found == (velocity if velocity is None else pytest.approx(velocity, abs=1e-15))


def test_a_mixture_worked_out_by_hand():
    # Scores over their largest: 1, 0.2, 0; over the temperature: 2, 0.4, 0; exp: 7.389056, 1.491825, 1 of 9.880881.
    scores = {"math": 0.5 * 0.2875, "code": 0.1 * 0.2875, "search": 0.0}
    shares = scheduled_shares(scores, dict.fromkeys(DOMAINS, 1 / 3), temperature=0.5, floor=0.10)
    assert shares == pytest.approx({"math": 0.623470, "code": 0.205687, "search": 0.170844}, abs=1e-6)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-15)


def test_scores_that_are_all_zero_give_an_equal_mixture():
    shares = scheduled_shares({"a": 0.0, "b": 0.0}, {"a": 0.8, "b": 0.2}, temperature=0.5, floor=0.1)
    assert shares == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-15)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        # The unscored domain keeps its share, the others divide the rest: 0.1 + 0.4 * (1, e^-2) / (1 + e^-2).
        ({"a": 0.4, "b": 0.3, "c": 0.3}, {"a": 0.4, "b": 0.1 + 0.4 * 0.8807970779778823, "c": 0.1 + 0.4 * 0.11920292}),
        # Its share leaves too little for the floors of the others ...
        ({"a": 0.95, "b": 0.02, "c": 0.03}, {"a": 0.8, "b": 0.1, "c": 0.1}),
        # ... or is below its own.
        (
            {"a": 0.02, "b": 0.48, "c": 0.5},
            {"a": 0.1, "b": 0.1 + 0.7 * 0.8807970779778823, "c": 0.1 + 0.7 * 0.11920292},
        ),
    ],
)
def test_a_domain_without_a_score_keeps_its_base_share_and_all_keep_the_floor(base, expected):
    shares = scheduled_shares({"b": 3.0, "c": 0.0}, base, temperature=0.5, floor=0.1)
    assert shares == pytest.approx(expected, abs=1e-8)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-15)


def test_without_scores_the_base_mixture_stays():
    base = {"a": 0.95, "b": 0.05}
    assert scheduled_shares({}, base, temperature=0.5, floor=0.1) == base


def _reference(divergences, step):
    """The published rule on whole arrays, written apart from the code: divergences has a row a step, a column a domain."""
    seen = divergences[:step]
    decay = 1 - 2 / 11
    ages = np.arange(step)[:, None] - np.arange(step)[None, :]
    weights = np.where(ages >= 0, (1 - decay) * decay ** np.maximum(ages, 0), 0.0)
    weights[:, 0] = decay ** np.arange(step)
    ema = weights @ seen
    ends = ema[step - 1 :: -10][: min(3, step // 10 - 1) + 1]
    velocity = np.maximum(0.01, (-(ends[:-1] - ends[1:]) / np.maximum(ends[1:], 0.15)).mean(axis=0))
    score = ema[-1] / np.maximum(seen[:5].mean(axis=0), 0.15) * velocity
    odds = np.exp(score / score.max() / 0.5)
    return 0.10 + 0.70 * odds / odds.sum()


def test_the_mixture_after_each_update_is_that_of_the_published_rule():
    generator = np.random.default_rng(7)
    decline = np.array([0.97, 0.99, 0.93])[None, :] ** np.arange(60)[:, None]
    divergences = np.array([1.2, 0.5, 0.1]) * decline * generator.uniform(0.8, 1.25, size=(60, 3))
    sampler = _bound(jitter=0.0)
    updates = []
    for step, row in enumerate(divergences, start=1):
        sampler.next(step)
        sampler.observe(_feedback(step, **dict(zip(DOMAINS, row.tolist(), strict=True))))
        if step < 20:
            assert _shares(sampler) == pytest.approx(dict.fromkeys(DOMAINS, 1 / 3), abs=1e-15)
        elif step % 10 == 0:
            expected = _reference(divergences, step)
            updates.append(expected)
            assert list(_shares(sampler).values()) == pytest.approx(expected.tolist(), abs=1e-12)
    assert np.ptp(np.array(updates), axis=0).min() > 0.02


def test_prompts_move_from_a_finished_domain_to_one_that_learns():
    sampler = _bound(prompts_per_step=30)
    taught = Counter()
    drawn = []
    for step in range(1, 91):
        counts = Counter(prompt.domain for prompt in sampler.next(step))
        drawn.append(counts)
        taught += counts
        # math is learnt within 20 steps; code needs ten times the prompts; search is as its teacher from the start.
        divergence = {
            "math": 0.02 + 0.8 * math.exp(-taught["math"] / 50),
            "code": 0.02 + 0.8 * math.exp(-taught["code"] / 500),
            "search": 0.001,
        }
        sampler.observe(_feedback(step, **divergence))
        assert min(_shares(sampler).values()) >= 0.10
        assert sum(_shares(sampler).values()) == pytest.approx(1.0, abs=1e-12)
    early, late = sum(drawn[:20], Counter()), sum(drawn[50:80], Counter())
    assert early == {"math": 200, "code": 200, "search": 200}
    # At most 0.1 + (2/3 - 0.2) / (1 + e^-2) = 0.511 of 900, when math scores nothing.
    assert 430 < late["code"] <= 461
    assert 90 <= late["math"] < 180
    assert abs(late["search"] - 300) <= 1


def test_a_domain_that_stands_still_keeps_a_claim_through_the_velocity_floor():
    def share(velocity_floor):
        sampler = _bound(jitter=0.0, floor=0.0, velocity_floor=velocity_floor)
        for step in range(1, 41):
            sampler.observe(_feedback(step, math=0.9 * 0.99**step, code=0.9, search=0.9))
        return _shares(sampler)["code"]

    # Without the floor e^0 of e^2 + 2 e^0; with a floor above math's own velocity nobody is favoured but by its gap.
    assert share(0.0) == pytest.approx(1 / (math.e**2 + 2), abs=1e-12)
    assert share(0.01) > share(0.0)
    assert share(0.5) > 1 / 3


def test_a_domain_that_starts_at_its_teacher_is_rehearsed_at_its_base_share():
    sampler = AdaptiveMixture(prompts_per_step=20, mixture={"math": 5, "code": 3, "search": 2}).bind(
        _set(math=50, code=50, search=50)
    )
    for step in range(1, 61):
        # Its divergence rises by orders of magnitude, which no gap to a teacher explains.
        sampler.observe(_feedback(step, math=0.5 * 0.98**step, code=0.7 * 0.95**step, search=min(0.002 * step, 0.1)))
    assert _shares(sampler)["search"] == pytest.approx(0.2, abs=1e-12)
    assert _shares(sampler)["math"] != pytest.approx(0.5, abs=0.01)


def test_a_domain_that_was_hardly_seen_keeps_its_base_share():
    sampler = _bound()
    for step in range(1, 31):
        seen = {"search": 0.7} if step in (2, 9, 11, 15) else {}
        sampler.observe(_feedback(step, math=0.5 * 0.9**step, code=0.7, **seen))
    assert _shares(sampler)["search"] == pytest.approx(1 / 3, abs=1e-12)
    for step in range(31, 41):
        sampler.observe(_feedback(step, math=0.5 * 0.9**step, code=0.7, search=0.7))
    assert _shares(sampler)["search"] != pytest.approx(1 / 3, abs=1e-3)


def test_windows_are_steps_of_the_run_also_where_a_domain_was_not_seen():
    sampler = _bound(windows=1, jitter=0.0, floor=0.0)
    for step in range(1, 41):
        # code fell fast while it was seen; for two windows nobody has seen it, so nothing says that it still falls.
        seen = {"code": 0.9 * 0.8**step} if step <= 20 else {}
        sampler.observe(_feedback(step, math=0.9 * 0.97**step, search=0.9, **seen))
    shares = _shares(sampler)
    assert shares["code"] < shares["search"] < shares["math"]


def test_the_jitter_is_keyed_by_seed_and_update_and_stays_within_its_bounds():
    def mixtures(seed):
        sampler = _bound(seed=seed, floor=0.0, temperature=1.0)
        found = []
        for step in range(1, 61):
            sampler.observe(_feedback(step, math=0.9, code=0.9, search=0.9))
            if step >= 20 and step % 10 == 0:
                found.append(tuple(_shares(sampler).values()))
        return found

    first = mixtures(3)
    assert len(set(first)) == 5
    assert mixtures(3) == first
    assert set(mixtures(4)).isdisjoint(first)
    for shares in first:
        # Equal scores, so what differs is the jitter: score / largest lies in [0.7 / 1.3, 1].
        ratios = [1 + math.log(share / max(shares)) for share in shares]
        assert max(ratios) == 1.0
        assert 0.7 / 1.3 <= min(ratios) < 1


def test_after_a_change_the_mixture_of_the_past_is_not_owed():
    sampler = FixedMixture(prompts_per_step=10, mixture={"a": 0.9, "b": 0.1}).bind(_set(a=50, b=50))
    for step in range(10):
        sampler.next(step)
    sampler.set_shares({"a": 0.2, "b": 0.8})
    counts = [Counter(prompt.domain for prompt in sampler.next(step)) for step in range(10, 15)]
    assert counts == [{"a": 2, "b": 8}] * 5
    assert sampler.shares == {"a": 0.2, "b": 0.8}


def test_under_changing_shares_every_domain_is_paid_to_the_prompt():
    generator = np.random.default_rng(0)
    sampler = FixedMixture(prompts_per_step=2).bind(_set(a=50, b=50, c=50))
    owed = np.full(3, 2 / 3)
    drawn = Counter()
    for step in range(300):
        drawn += Counter(prompt.domain for prompt in sampler.next(step))
        debt = owed - [drawn[name] for name in "abc"]
        assert debt.min() > -1
        assert debt.max() < 2
        shares = 0.1 + 0.7 * generator.dirichlet([0.5, 0.5, 0.5])
        sampler.set_shares(dict(zip("abc", (shares / shares.sum()).tolist(), strict=True)))
        owed = owed + 2 * shares / shares.sum()
    assert min(drawn.values()) > 100


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 1.0}, r"shares of the domains \['a', 'b'\], got \['a'\]"),
        ({"a": 0.7, "b": 0.7}, "shares that sum to one"),
        ({"a": 1.5, "b": -0.5}, "weights of at least 0, got -0.5 for 'b'"),
    ],
)
def test_shares_that_are_no_mixture_are_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        FixedMixture().bind(_set(a=9, b=9)).set_shares(shares)


def _run(sampler, steps, counts):
    """Runs in a closed loop: the divergences depend on what was drawn."""
    given = []
    for step in steps:
        prompts = sampler.next(step)
        given.append((_ids(prompts), _shares(sampler)))
        for prompt in prompts:
            counts[prompt.domain] += 1
        rates = dict(zip(DOMAINS, (80, 300, 2000), strict=True))
        divergence = {name: 0.01 + math.exp(-counts[name] / rates[name]) for name in DOMAINS if (step + len(name)) % 7}
        sampler.observe(_feedback(step, **divergence))
    return given


@pytest.mark.parametrize("stop", [0, 7, 25, 30])
def test_resuming_from_a_checkpoint_is_exact(stop):
    def make():
        return _bound(dict(zip(DOMAINS, (31, 40, 57), strict=True)), prompts_per_step=13, seed=5)

    expected = _run(make(), range(60), Counter())
    counts = Counter()
    first = make()
    before = _run(first, range(stop), counts)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert before + _run(second, range(stop, 60), counts) == expected
    assert len({tuple(shares.values()) for _, shares in expected}) == 5


def test_a_saved_state_does_not_change_with_the_sampler():
    sampler = _bound()
    _run(sampler, range(20), Counter())
    state = sampler.state_dict()
    saved = json.dumps(state)
    _run(sampler, range(20, 40), Counter())
    assert json.dumps(state) == saved


def test_resuming_with_other_data_is_refused():
    state = _bound(prompts_per_step=3).state_dict()
    with pytest.raises(CheckpointError, match="order of prompts would silently change"):
        _bound({"math": 50, "code": 50, "search": 49}, prompts_per_step=3).load_state_dict(state)


def test_floors_that_leave_no_mixture_are_refused():
    with pytest.raises(ConfigError, match=r"sampler.floor: expected at most 1/3 for 3 domains, got 0.4"):
        _bound(floor=0.4)
    assert _bound(floor=1 / 3).metrics()


def test_feedback_that_does_not_belong_is_refused():
    sampler = _bound()
    with pytest.raises(UnknownChoiceError, match="of domain 'mth'; did you mean 'math'"):
        sampler.observe(_feedback(1, mth=0.1))
    with pytest.raises(TrainingError, match="divergence of domain 'math' is nan in step 4"):
        sampler.observe(_feedback(4, math=float("nan")))


def test_an_estimate_below_zero_counts_as_zero():
    below, zero = _bound(), _bound()
    for step in range(1, 21):
        below.observe(_feedback(step, math=0.5, code=-0.3 if step > 10 else 0.4))
        zero.observe(_feedback(step, math=0.5, code=0.0 if step > 10 else 0.4))
    assert below.state_dict() == zero.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_every": 0}, "update_every to be at least 1, got 0"),
        ({"window": 0}, "window to be at least 1"),
        ({"windows": 0}, "windows to be at least 1"),
        ({"ema_window": 0}, "ema_window to be at least 1"),
        ({"initial_steps": 0}, "initial_steps to be at least 1"),
        ({"divergence_floor": 0.0}, "divergence_floor to be positive"),
        ({"temperature": 0.0}, "temperature to be positive"),
        ({"velocity_floor": -0.1}, "velocity_floor to be at least 0"),
        ({"rehearsal_below": float("nan")}, "rehearsal_below to be at least 0, got nan"),
        ({"jitter": 1.0}, r"jitter in \[0, 1\), got 1.0"),
        ({"floor": -0.1}, r"floor in \[0, 1\]"),
        ({"prompts_per_step": 0}, "prompts_per_step to be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveMixture(**settings)
