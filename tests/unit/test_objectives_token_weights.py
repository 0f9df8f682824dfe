from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moteach.errors import ConfigError, TrainingError, UnsupportedCombinationError
from moteach.objectives.token_masks import (
    Contested,
    EntropyTop,
    FirstTokens,
    SpecialTokens,
    Teachability,
    Tip,
    fraction_of,
    min_max,
    quantile_normalised,
    top_fraction,
)
from moteach.objectives.token_weights import (
    Agreement,
    PositionBias,
    SelectKd,
    TrustRegion,
    apply_token_weights,
    quantile,
)
from moteach.types import Prompt, Rollout, RolloutBatch


def batch(*completions: tuple[int, ...]) -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(i), text="x", token_ids=(9,) * (i + 1)),
                sample=0,
                completion_ids=ids,
                rollout_logprobs=(-1.0,) * len(ids),
                finished=True,
                student_version=0,
            )
            for i, ids in enumerate(completions)
        ],
        pad_id=0,
    )


def of_lengths(*lengths: int) -> RolloutBatch:
    return batch(*(tuple(range(10, 10 + length)) for length in lengths))


def stats(abstained: list[float] | None = None, **values: list[float]) -> dict[str, Tensor]:
    length = len(next(iter(values.values()))) if values else len(abstained or [])
    made = {name: torch.tensor(given, dtype=torch.float64) for name, given in values.items()}
    return made | {"abstained": torch.tensor(abstained or [0.0] * length, dtype=torch.float64)}


class Fixed:
    """A weighting that says what it is told."""

    def __init__(self, *values: float, needs: tuple[str, ...] = ()) -> None:
        self.name = "fixed"
        self.needs = frozenset(needs)
        self.values = values

    def weights(self, rollouts: RolloutBatch, stats: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)


# --- applying -----------------------------------------------------------------------------------------------------------


def test_no_weighting_leaves_the_base_weights_as_they_are() -> None:
    base = torch.tensor([0.5, 0.25, 0.25])
    made = apply_token_weights([], of_lengths(3), stats([0.0, 0.0, 1.0]), base)
    assert made.weights is base
    assert (made.kept_fraction, made.scale) == (1.0, 1.0)


def test_the_product_is_rescaled_to_the_total_of_the_taught_tokens() -> None:
    base = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    weightings = [Fixed(1.0, 0.0, 2.0, 7.0), Fixed(3.0, 1.0, 0.5, 7.0)]
    made = apply_token_weights(weightings, of_lengths(4), stats([0.0, 0.0, 0.0, 1.0]), base)
    # products 0.3, 0, 0.3 sum to 0.6, the same as the base weights 0.1 + 0.2 + 0.3
    torch.testing.assert_close(made.weights, torch.tensor([0.3, 0.0, 0.3, 0.4], dtype=torch.float64))
    assert made.scale == pytest.approx(1.0, abs=1e-12)
    assert made.kept_fraction == pytest.approx(2 / 3)


def test_keeping_a_quarter_of_equal_tokens_weighs_each_four_times() -> None:
    base = torch.full((8,), 0.125)
    made = apply_token_weights([Fixed(*[1.0] * 2, *[0.0] * 6)], of_lengths(8), stats([0.0] * 8), base)
    assert made.weights.tolist() == [0.5, 0.5] + [0.0] * 6
    assert (made.scale, made.kept_fraction) == (4.0, 0.25)
    assert made.weights.dtype == torch.float32


def test_nothing_kept_gives_no_weight_and_no_division_by_zero() -> None:
    base = torch.full((3,), 1 / 3)
    made = apply_token_weights([Fixed(0.0, 0.0, 5.0)], of_lengths(3), stats([0.0, 0.0, 1.0]), base)
    assert made.weights.tolist() == [0.0, 0.0, 0.0]
    assert (made.scale, made.kept_fraction) == (0.0, 0.0)


def test_what_a_weighting_says_of_an_abstained_token_is_not_looked_at() -> None:
    base = torch.full((2,), 0.5)
    made = apply_token_weights([Fixed(2.0, math.nan)], of_lengths(2), stats([0.0, 1.0]), base)
    assert made.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_a_weight_that_is_no_weight_stops_the_step(bad: float) -> None:
    with pytest.raises(TrainingError, match=r"token_weights=fixed.*finite weights of at least 0.*1 of 2 taught"):
        apply_token_weights([Fixed(1.0, bad)], of_lengths(2), stats([0.0, 0.0]), torch.ones(2))


def test_a_statistic_that_was_not_measured_is_named() -> None:
    with pytest.raises(UnsupportedCombinationError, match=r"token_weights=fixed.*without entropy"):
        apply_token_weights([Fixed(1.0, needs=("entropy",))], of_lengths(1), stats([0.0]), torch.ones(1))
    with pytest.raises(UnsupportedCombinationError, match="without abstained"):
        apply_token_weights([Fixed(1.0)], of_lengths(1), {}, torch.ones(1))


# --- arithmetic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_the_quantile_is_numpys(q: float, length: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    assert quantile(values, q) == pytest.approx(float(np.quantile(values.numpy(), q)), abs=1e-14)


def test_a_fraction_is_the_decimal_that_was_written() -> None:
    assert math.ceil(0.07 * 100) == 8
    assert [fraction_of(0.1, 30), fraction_of(0.07, 100), fraction_of(0.05, 21), fraction_of(0.5, 0)] == [3, 7, 2, 0]
    assert fraction_of(1e-05, 3) == 1


def test_equal_scores_are_kept_from_the_front() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    assert top_fraction(scores, 0.5).tolist() == [True, True, True, False, False]
    assert top_fraction(scores, 1.0).tolist() == [True] * 5


def test_min_max_and_quantile_normalisation_of_known_numbers() -> None:
    assert min_max(torch.tensor([1.0, 3.0, 2.0])).tolist() == [0.0, 1.0, 0.5]
    assert min_max(torch.tensor([4.0, 4.0])).tolist() == [0.0, 0.0]
    # 0..20: Q05 = 1, Q95 = 19
    values = torch.arange(21.0, dtype=torch.float64)
    expected = [min(max((x - 1) / 18, 0.0), 1.0) for x in range(21)]
    assert quantile_normalised(values, 0.05, 0.95).tolist() == pytest.approx(expected)
    assert quantile_normalised(torch.tensor([1.0, 1.0, 0.0, 1.0] + [1.0] * 40), 0.05, 0.95).tolist()[:4] == [1, 1, 0, 1]


# --- tip ----------------------------------------------------------------------------------------------------------------


def test_tip_keeps_the_unsure_and_the_surely_wrong() -> None:
    # h = [1, 0, 0, .5], d = [0, 1, .1, .5] normalised: scores 1, 1, .1, .75
    seen = stats(student_entropy=[2.0, 0.0, 0.0, 1.0], divergence=[3.0, 13.0, 4.0, 8.0])
    assert Tip(rho=0.5).weights(of_lengths(4), seen).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert Tip(rho=0.75).weights(of_lengths(4), seen).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert Tip(rho=0.51).weights(of_lengths(4), seen).tolist() == [1.0, 1.0, 0.0, 1.0]


def test_tips_score_is_a_soft_or_and_neither_a_sum_nor_a_maximum() -> None:
    # scores .6 + .6 - .36 = .84 (sum 1.2) against .82 + .1 - .082 = .838 (sum .92, maximum .82 > .6) and .9 (sum .9)
    seen = stats(student_entropy=[0.0, 1.0, 0.6, 0.82, 0.9], divergence=[0.0, 1.0, 0.6, 0.1, 0.0])
    assert Tip(rho=0.4).weights(of_lengths(5), seen).tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert Tip(rho=0.6).weights(of_lengths(5), seen).tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]


def test_tip_normalises_over_taught_tokens_only() -> None:
    entropy, divergence = [0.0, 1.0, 0.5, 0.6, 0.82], [-5.0, -4.5, -4.0, -4.4, -4.9]
    seen = stats([0, 0, 0, 0, 0, 1], student_entropy=[*entropy, 0.0], divergence=[*divergence, 0.0])
    # h = entropy, d = [0, .5, 1, .6, .1]: scores 0, 1, 1, .84, .838; a sixth token with divergence 0 would be the maximum
    assert Tip(rho=0.6).weights(of_lengths(6), seen).tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_tips_order_depends_on_the_maxima_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    entropy, divergence = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    weights = Tip(rho=0.3).weights(
        of_lengths(50), stats(student_entropy=entropy.tolist(), divergence=divergence.tolist())
    )
    lack = (entropy.max() - entropy) * (divergence.max() - divergence)
    assert weights.nonzero().flatten().tolist() == sorted(lack.argsort()[:15].tolist())


# --- teachability -------------------------------------------------------------------------------------------------------


def test_teachability_prefers_disagreement_within_the_students_support() -> None:
    # 21 tokens; quantiles 1 and 19 of 0..20, .05 and .95 of 0, .05, ..., 1
    divergence = [float(i) for i in range(21)]
    mass = [i / 20 for i in reversed(range(21))]
    scores = [
        min(max((d - 1) / 18, 0), 1) * min(max((m - 0.05) / 0.9, 0), 1) for d, m in zip(divergence, mass, strict=True)
    ]
    assert scores[10] == pytest.approx(0.25)
    seen = stats(divergence=divergence, target_mass_on_student_topk=mass)
    assert Teachability(budget=0.04).weights(of_lengths(21), seen).nonzero().flatten().tolist() == [10]
    kept = Teachability(budget=0.14).weights(of_lengths(21), seen).nonzero().flatten().tolist()
    assert kept == sorted(sorted(range(21), key=lambda i: -scores[i])[:3]) == [9, 10, 11]


def test_disagreement_the_student_cannot_follow_is_not_selected() -> None:
    seen = stats(divergence=[10.0, 5.0, 0.1, 0.2], target_mass_on_student_topk=[0.0, 0.9, 1.0, 1.0])
    assert Teachability(budget=0.25).weights(of_lengths(4), seen).tolist() == [0.0, 1.0, 0.0, 0.0]


# --- entropy_top --------------------------------------------------------------------------------------------------------


def test_every_sample_keeps_its_own_highest_entropies() -> None:
    entropy = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1, 0.2, 0.3, 0.01]
    seen = stats(student_entropy=entropy)
    weights = EntropyTop(fraction=0.2).weights(of_lengths(6, 1, 3), seen)
    # ceil(1.2) = 2, ceil(.2) = 1, ceil(.6) = 1
    assert weights.nonzero().flatten().tolist() == [0, 1, 6, 8]


def test_ties_of_entropy_go_to_the_earlier_token_and_abstained_tokens_do_not_count() -> None:
    seen = stats([0, 1, 0, 0, 1, 1], student_entropy=[0.5, 9.0, 0.5, 0.5, 9.0, 9.0])
    weights = EntropyTop(fraction=0.5).weights(of_lengths(4, 2), seen)
    assert weights.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_the_top_of_many_samples_is_that_of_each_alone() -> None:
    lengths = (5, 0, 13, 1, 40)
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    abstained = (torch.rand(sum(lengths), generator=generator) < 0.3).double()
    weights = EntropyTop(fraction=0.3).weights(
        of_lengths(*lengths), {"student_entropy": entropy, "abstained": abstained}
    )
    start = 0
    for length in lengths:
        mine = [i for i in range(start, start + length) if not abstained[i]]
        best = sorted(mine, key=lambda i: -float(entropy[i]))[: math.ceil(round(0.3 * len(mine), 9))]
        assert weights[start : start + length].nonzero().flatten().tolist() == sorted(i - start for i in best)
        start += length


# --- first_tokens, special_tokens ---------------------------------------------------------------------------------------


def test_the_first_tokens_are_counted_in_each_completion() -> None:
    weights = FirstTokens(count=2).weights(of_lengths(3, 1, 4), stats([0.0] * 8))
    assert weights.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_special_tokens_of_the_tokenizer_are_dropped_except_the_end() -> None:
    rollouts, seen = batch((7, 3, 2, 5, 1)), stats([0.0] * 5)
    given: dict[str, Any] = {"tokenizer_special_ids": frozenset({0, 1, 2, 3}), "tokenizer_eos_ids": frozenset({1})}
    assert SpecialTokens(**given).weights(rollouts, seen).tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert SpecialTokens(keep_eos=False, **given).weights(rollouts, seen).tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert SpecialTokens(special_ids=[5, 1], **given).weights(rollouts, seen).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert SpecialTokens(special_ids=[], **given).weights(rollouts, seen).tolist() == [1.0] * 5
    assert SpecialTokens().weights(rollouts, seen).tolist() == [1.0] * 5


# --- selectkd -----------------------------------------------------------------------------------------------------------


def test_selectkd_accepts_what_the_teacher_lists() -> None:
    seen = stats(student_top1_rank=[0.0, 4.0, 5.0, 900.0])
    assert SelectKd().weights(of_lengths(4), seen).tolist() == [1.0, 1.0, 0.01, 0.01]
    assert SelectKd(mode="mask").weights(of_lengths(4), seen).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert SelectKd(top_k=1, beta=0.5).weights(of_lengths(4), seen).tolist() == [1.0, 0.5, 0.5, 0.5]


# --- position -----------------------------------------------------------------------------------------------------------


def test_position_weights_of_the_worked_example() -> None:
    seen = stats(log_ratio=[-1.0, 3.0, 0.0, -4.0])
    assert PositionBias(w_max=1.5).weights(of_lengths(4), seen).tolist() == [1.5, 1.4375, 1.25, 1.25]


def test_position_weights_start_anew_in_each_completion() -> None:
    seen = stats([0, 0, 1, 0, 0, 0], log_ratio=[2.0, -2.0, 50.0, 4.0, 0.0, 0.0])
    weights = PositionBias(w_max=3.0).weights(of_lengths(4, 2), seen)
    # gaps 2, 2, -, 4: F before = 0, .25, -, .5; the second completion has no gap
    assert weights.tolist() == [3.0, 2.5, 0.0, 2.0, 3.0, 3.0]


def test_a_w_max_of_one_weighs_alike() -> None:
    seen = stats(log_ratio=[0.3, -0.2, 5.0])
    assert PositionBias(w_max=1.0).weights(of_lengths(3), seen).tolist() == [1.0, 1.0, 1.0]


# --- trust_region -------------------------------------------------------------------------------------------------------


def test_outliers_count_by_their_trust_or_not_at_all() -> None:
    seen = stats(log_ratio=[math.log(2.0), 0.0, math.log(0.5), math.log(0.1), -math.inf])
    rollouts = of_lengths(5)
    assert TrustRegion().weights(rollouts, seen).tolist() == pytest.approx([1.0, 1.0, 0.5, 0.1, 0.0])
    assert TrustRegion(threshold=0.3).weights(rollouts, seen).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.1, 0.0])
    assert TrustRegion(threshold=0.3, outliers="mask").weights(rollouts, seen).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_adaptive_threshold_is_a_quantile_of_the_taught_trusts() -> None:
    seen = stats([0, 0, 0, 0, 0, 1], log_ratio=[math.log(x) for x in (0.1, 0.2, 0.4, 0.8, 1.6, 1.0)])
    masked = TrustRegion(threshold=None, quantile=0.5, outliers="mask").weights(of_lengths(6), seen)
    assert masked.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    weighted = TrustRegion(threshold=None, quantile=0.25).weights(of_lengths(6), seen)
    assert weighted.tolist() == pytest.approx([0.1, 1.0, 1.0, 1.0, 1.0, 0.0])


def test_trust_ends_at_one_however_much_the_teacher_prefers_the_token() -> None:
    seen = stats(log_ratio=[math.log(x) for x in (0.5, 2.0, 4.0, 8.0)])
    weights = TrustRegion(threshold=None, quantile=0.5, outliers="mask").weights(of_lengths(4), seen)
    assert weights.tolist() == [0.0, 1.0, 1.0, 1.0]


def test_equal_trusts_have_no_adaptive_outlier() -> None:
    seen = stats(log_ratio=[-1.0] * 4)
    weights = TrustRegion(threshold=None, quantile=0.5, outliers="mask").weights(of_lengths(4), seen)
    assert weights.tolist() == [1.0] * 4


def test_the_expected_trust_is_one_minus_the_total_variation() -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(11, generator=generator, dtype=torch.float64).mul(2).softmax(0)
    teacher = torch.randn(11, generator=generator, dtype=torch.float64).mul(2).softmax(0)
    trusts = TrustRegion().weights(of_lengths(11), stats(log_ratio=(teacher / student).log().tolist()))
    variation = 0.5 * float((student - teacher).abs().sum())
    assert variation > 0.2
    assert float((student * trusts).sum()) == pytest.approx(1 - variation, abs=1e-12)


def test_trust_bounds_the_signal_of_a_rejected_token_by_one_over_e() -> None:
    ratios = torch.linspace(-60.0, 0.0, 6001, dtype=torch.float64)
    signal = TrustRegion().weights(of_lengths(6001), stats(log_ratio=ratios.tolist())) * ratios.abs()
    assert float(signal.max()) == pytest.approx(1 / math.e, abs=1e-9)
    assert float(ratios[signal.argmax()]) == pytest.approx(-1.0, abs=1e-9)


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (Tip, {"rho": 0.0}, r"tip\.rho.*above 0"),
        (Tip, {"rho": 1.5}, r"tip\.rho.*at most 1"),
        (Teachability, {"budget": 0.0}, r"teachability\.budget"),
        (Teachability, {"low": 0.9, "high": 0.9}, r"low < high"),
        (EntropyTop, {"fraction": -0.1}, r"entropy_top\.fraction"),
        (FirstTokens, {"count": 0}, r"at least 1 token"),
        (SpecialTokens, {"special_ids": [-1]}, r"at least 0"),
        (SelectKd, {"top_k": 0}, r"top_k.*every token would be rejected"),
        (SelectKd, {"beta": 1.5}, r"beta"),
        (PositionBias, {"w_max": 0.5}, r"w_max.*at least 1"),
        (PositionBias, {"w_max": math.inf}, r"w_max"),
        (TrustRegion, {"threshold": 0.0}, r"threshold"),
        (TrustRegion, {"quantile": 0.5}, r"either a threshold or a quantile.*Set the other to null"),
        (TrustRegion, {"threshold": None}, r"either a threshold or a quantile"),
        (TrustRegion, {"threshold": None, "quantile": 1.0}, r"between 0 and 1"),
    ],
)
def test_arguments_out_of_range_are_refused(cls: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**arguments)


def test_contested_tokens_are_dropped_at_a_threshold_in_nats() -> None:
    seen = stats(spread=[0.0, 0.9, 1.0, 1.1, math.inf])
    assert Contested(nats=1.0).weights(of_lengths(5), seen).tolist() == [1, 1, 1, 0, 0]


def test_contested_tokens_are_dropped_at_a_quantile_of_the_taught_ones() -> None:
    seen = stats(spread=[4.0, 1.0, 2.0, 3.0, math.inf, 0.0], abstained=[0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert Contested(nats=None, quantile=0.5).weights(of_lengths(6), seen).tolist() == [0, 1, 1, 1, 0, 0]
    assert Contested(nats=None, quantile=0.0).weights(of_lengths(6), seen).tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("nats", "quantile"), [(None, None), (1.0, 0.5), (-1.0, None), (None, 1.5), (math.nan, None)])
def test_contested_takes_one_threshold(nats: float | None, quantile: float | None) -> None:
    with pytest.raises(ConfigError, match=r"token_weights\.contested: expected"):
        Contested(nats=nats, quantile=quantile)


def test_agreement_is_its_formula_with_a_unit_from_the_batch_a_cap_and_a_floor() -> None:
    apart = [0.0, 1.0, 2.0, 3.0, math.inf, 9.0]
    seen = stats(neg_log_z=apart, abstained=[0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    weighting = Agreement(gamma=2.0, of="neg_log_z", scale_quantile=0.5, cap=3.0, floor=0.15)
    assert weighting.needs == {"neg_log_z"}
    expected = [1.0, 1 / 2.0, 1 / 3.0, 1 / 4.0, 0.15, 0.0]
    assert weighting.weights(of_lengths(6), seen).tolist() == pytest.approx(expected)
    flat = stats(spread=[0.0, 0.0])
    assert Agreement().weights(of_lengths(2), flat).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "bad", [{"gamma": -1.0}, {"scale_quantile": 0.0}, {"cap": 0.0}, {"floor": 1.5}, {"gamma": math.nan}]
)
def test_meaningless_agreements_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"token_weights\.agreement: expected"):
        Agreement(**bad)
