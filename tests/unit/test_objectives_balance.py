from __future__ import annotations

import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moteach.errors import CheckpointError, ConfigError, TrainingError
from moteach.objectives.balance import Gap, NoBalance, Sigma, TokenShare, apply_balance, balance_metrics
from moteach.objectives.base import token_weights
from moteach.types import Prompt, Rollout, RolloutBatch


def batch(*rows: tuple[str | None, int]) -> RolloutBatch:
    """Rows of a domain and a length."""
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(i), text="x", token_ids=(9,), domain=domain),
                sample=0,
                completion_ids=tuple(range(10, 10 + length)),
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for i, (domain, length) in enumerate(rows)
        ],
        pad_id=0,
    )


def stats(log_ratio: list[float], abstained: list[float] | None = None) -> dict[str, Tensor]:
    none = [0.0] * len(log_ratio)
    return {
        "log_ratio": torch.tensor(log_ratio, dtype=torch.float64),
        "abstained": torch.tensor(abstained or none, dtype=torch.float64),
    }


def even(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


LONG_AND_SHORT = (("math", 9), ("if", 1))
"""Equal prompts, nine tenths of the tokens in one domain."""


# --- applying -----------------------------------------------------------------------------------------------------------


class Fixed:
    name = "fixed"
    needs: frozenset[str] = frozenset()

    def __init__(self, **factors: float) -> None:
        self.given = factors

    def factors(self, rollouts: RolloutBatch, stats: Any, base: Tensor) -> dict[str, float]:
        return self.given

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        return None


def test_each_token_gets_the_factor_of_its_domain() -> None:
    rollouts = batch(("a", 2), (None, 1), ("a", 1), ("b", 2))
    base = torch.arange(1.0, 7.0)
    weights = apply_balance(Fixed(a=2.0, default=10.0, b=0.0), rollouts, stats([0.0] * 6), base)
    assert weights.tolist() == [2.0, 4.0, 30.0, 8.0, 0.0, 0.0]
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("factors", [{"a": 1.0}, {"a": 1.0, "b": math.nan}, {"a": -1.0, "b": 1.0}])
def test_a_domain_without_a_usable_factor_stops_the_step(factors: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match=r"balance=fixed.*for each of the domains a, b"):
        apply_balance(Fixed(**factors), batch(("a", 1), ("b", 1)), stats([0.0, 0.0]), even(2))


def test_no_balance_changes_nothing() -> None:
    rollouts, base = batch(("a", 2), ("b", 1)), torch.tensor([0.1, 0.2, 0.7])
    assert NoBalance().factors(rollouts, stats([0.0] * 3), base) == {"a": 1.0, "b": 1.0}
    assert torch.equal(apply_balance(NoBalance(), rollouts, stats([0.0] * 3), base), base)


# --- token_share --------------------------------------------------------------------------------------------------------


def test_token_share_gives_every_domain_its_share_of_prompts() -> None:
    factors = TokenShare().factors(batch(*LONG_AND_SHORT), stats([0.0] * 10), even(10))
    # target .5 and .5 over observed .9 and .1
    assert factors == pytest.approx({"math": 5 / 9, "if": 5.0})


def test_token_share_of_a_given_target() -> None:
    balance = TokenShare(target={"math": 1, "if": 3, "code": 96})
    factors = balance.factors(batch(*LONG_AND_SHORT), stats([0.0] * 10), even(10))
    assert factors == pytest.approx({"math": 0.25 / 0.9, "if": 0.75 / 0.1})


def test_token_share_does_nothing_where_sequences_already_count_alike() -> None:
    rollouts = batch(("math", 9), ("if", 1), ("math", 4), ("code", 2))
    factors = TokenShare().factors(rollouts, stats([0.0] * 16), token_weights(rollouts, "sequence_mean"))
    assert factors == pytest.approx({"math": 1.0, "if": 1.0, "code": 1.0})


def test_token_share_counts_what_is_taught() -> None:
    # the second math row has no teacher, half of the code row neither: taught are 4 math, 2 code tokens, one row each
    rollouts = batch(("math", 4), ("math", 3), ("code", 4), ("law", 2))
    abstained = [0.0] * 4 + [1.0] * 3 + [0.0, 1.0, 0.0, 1.0] + [1.0] * 2
    factors = TokenShare().factors(rollouts, stats([0.0] * 13, abstained), even(13))
    assert factors == pytest.approx({"math": 0.5 / (4 / 6), "code": 0.5 / (2 / 6), "law": 1.0})


def test_a_domain_whose_tokens_were_all_dropped_leaves_its_target_to_the_others() -> None:
    base = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    factors = TokenShare().factors(batch(("a", 1), ("b", 1), ("c", 1)), stats([0.0] * 3), base)
    assert factors == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0})


def test_a_domain_that_the_target_forgets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"without if; those domains would get no weight"):
        TokenShare(target={"math": 1.0}).factors(batch(*LONG_AND_SHORT), stats([0.0] * 10), even(10))


# --- sigma --------------------------------------------------------------------------------------------------------------


def test_sigma_is_the_pooled_spread_over_the_domains() -> None:
    values = {"a": [1.0, 3.0, 5.0], "b": [-2.0, -2.5]}
    pooled = statistics.pstdev(values["a"] + values["b"])
    factors = Sigma().factors(batch(("a", 3), ("b", 2)), stats(values["a"] + values["b"]), even(5))
    assert factors["a"] == pytest.approx(pooled / statistics.pstdev(values["a"]), abs=1e-14)
    # sqrt(8.24) / .25 = 11.48 is above the bound
    assert pooled / statistics.pstdev(values["b"]) == pytest.approx(4 * math.sqrt(8.24))
    assert factors["b"] == 4.0


def test_sigma_makes_the_spread_of_an_unclipped_domain_the_pooled_one() -> None:
    generator = torch.Generator().manual_seed(5)
    ratios = torch.randn(60, generator=generator, dtype=torch.float64) * torch.tensor([0.7, 1.6]).repeat_interleave(30)
    rollouts = batch(("a", 30), ("b", 30))
    factors = Sigma().factors(rollouts, stats(ratios.tolist()), even(60))
    for domain, mine in (("a", ratios[:30]), ("b", ratios[30:])):
        assert 0.25 < factors[domain] < 4
        assert np.std(factors[domain] * mine.numpy()) == pytest.approx(np.std(ratios.numpy()), abs=1e-12)
    assert abs(factors["a"] - 1) > 0.1


def test_sigma_clips_a_wide_domain_at_the_lower_bound() -> None:
    narrow = [0.0, 0.001] * 50
    factors = Sigma(low=0.5, high=2.0).factors(batch(("a", 100), ("b", 4)), stats([*narrow, 9, -9, 9, -9]), even(104))
    assert factors == {"a": 2.0, "b": 0.5}


def test_sigma_as_published_moves_the_total_and_renormalised_keeps_it() -> None:
    rollouts, seen = batch(("a", 3), ("b", 2)), stats([1.0, 3.0, 5.0, -2.0, -2.5])
    published = apply_balance(Sigma(), rollouts, seen, even(5))
    kept = apply_balance(Sigma(renormalise=True), rollouts, seen, even(5))
    assert float(published.sum()) > 1.5
    assert float(kept.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(kept, published / published.sum())


def test_sigma_of_a_degenerate_domain_is_one() -> None:
    rollouts = batch(("one", 1), ("flat", 2), ("mute", 2), ("b", 2))
    factors = Sigma().factors(rollouts, stats([3.0, 1.0, 1.0, 0.0, 0.0, -1.0, 2.0], [0, 0, 0, 1, 1, 0, 0]), even(7))
    pooled = statistics.pstdev([3.0, 1.0, 1.0, -1.0, 2.0])
    assert factors == pytest.approx({"one": 1.0, "flat": 1.0, "mute": 1.0, "b": pooled / 1.5})


def test_a_token_the_teacher_excludes_does_not_swallow_its_domain() -> None:
    rollouts = batch(("a", 3), ("b", 2))
    with_hole = Sigma().factors(rollouts, stats([0.0, 1.0, -math.inf, 2.0, 5.0]), even(5))
    expected = statistics.pstdev([0.0, 1.0, 2.0, 5.0])
    assert with_hole == pytest.approx({"a": expected / 0.5, "b": expected / 1.5})


def test_without_a_log_ratio_sigma_is_one_and_gap_is_token_share() -> None:
    rollouts, seen = batch(*LONG_AND_SHORT), {"abstained": torch.zeros(10, dtype=torch.float64)}
    assert Sigma().factors(rollouts, seen, even(10)) == {"math": 1.0, "if": 1.0}
    assert Gap().factors(rollouts, seen, even(10)) == TokenShare().factors(rollouts, seen, even(10))


# --- gap ----------------------------------------------------------------------------------------------------------------


def test_gap_gives_domains_target_times_gap() -> None:
    # math: mean |r| .5, if: 1.5; weights of token_share 5/9 and 5, ratios proportional to .5 and 1.5
    seen = stats([0.5, -0.5, 0.5] * 3 + [-1.5])
    factors = Gap().factors(batch(*LONG_AND_SHORT), seen, even(10))
    raw = {"math": 0.5 / 0.9 * 0.5, "if": 0.5 / 0.1 * 1.5}
    mean = 0.9 * raw["math"] + 0.1 * raw["if"]
    assert factors == pytest.approx({domain: value / mean for domain, value in raw.items()})
    # the weight shares are those of prompts times gaps: .25 and .75
    assert 0.9 * factors["math"] == pytest.approx(0.25)


def test_gap_multiplies_so_the_nearly_learned_domain_loses() -> None:
    rollouts, base = batch(("a", 4), ("b", 4)), even(8)
    factors = Gap().factors(rollouts, stats([1.0] * 4 + [0.1] * 4), base)
    assert factors["a"] > 1 > factors["b"]
    half = Gap(alpha=0.5).factors(rollouts, stats([1.0] * 4 + [0.1] * 4), base)
    assert half["a"] / half["b"] == pytest.approx(math.sqrt(10))
    assert Gap(alpha=0.0).factors(rollouts, stats([1.0] * 4 + [0.1] * 4), base) == pytest.approx({"a": 1, "b": 1})


def test_the_batch_reference_is_the_token_share_weighted_mean_and_matters_at_the_bounds() -> None:
    # weights of token_share: 5/9 and 5; reference (5/9 * 1 + 5 * .1) / (5/9 + 5) = .19: ratios 5.26 and .526
    seen = stats([1.0] * 9 + [0.1])
    reference = (5 / 9 * 1.0 + 5 * 0.1) / (5 / 9 + 5)
    raw = {"math": 5 / 9 * 2.0, "if": 5 * 0.1 / reference}
    mean = 0.9 * raw["math"] + 0.1 * raw["if"]
    factors = Gap(low=0.5, high=2.0).factors(batch(*LONG_AND_SHORT), seen, even(10))
    assert factors == pytest.approx({domain: value / mean for domain, value in raw.items()})
    free = Gap().factors(batch(*LONG_AND_SHORT), seen, even(10))
    assert free["math"] / free["if"] == pytest.approx((5 / 9 * 1.0) / (5 * 0.1))


def test_a_high_quantile_reads_the_tokens_that_carry_the_signal() -> None:
    long = [0.0] * 7 + [-2.0, 2.0]
    by_mean = Gap().factors(batch(*LONG_AND_SHORT), stats([*long, 2.0]), even(10))
    by_quantile = Gap(quantile=0.9).factors(batch(*LONG_AND_SHORT), stats([*long, 2.0]), even(10))
    share = TokenShare().factors(batch(*LONG_AND_SHORT), stats([*long, 2.0]), even(10))
    assert np.quantile(np.abs(long), 0.9) == 2.0
    assert by_quantile == pytest.approx(share)
    assert by_mean["if"] > 1.5 * share["if"]


def test_an_anchored_gap_starts_as_token_share_and_follows_the_drift() -> None:
    rollouts, base = batch(("a", 3), ("b", 1)), even(4)
    share = TokenShare().factors(rollouts, stats([0.0] * 4), base)
    balance = Gap(reference="anchored")
    assert balance.factors(rollouts, stats([3.0, -3.0, 3.0, 0.4]), base) == pytest.approx(share)
    later = balance.factors(rollouts, stats([1.5, 1.5, -1.5, 0.04]), base)
    # a has half of its gap left, b a tenth
    assert later["a"] / later["b"] == pytest.approx(share["a"] * 0.5 / (share["b"] * 0.1))
    assert 0.75 * later["a"] + 0.25 * later["b"] == pytest.approx(1.0)


def test_anchors_go_through_a_checkpoint() -> None:
    rollouts, base = batch(("a", 2), ("b", 2)), even(4)
    first, second = stats([2.0, 2.0, 1.0, 1.0]), stats([1.0, 1.0, 1.0, 1.0])
    balance = Gap(reference="anchored")
    balance.factors(rollouts, first, base)
    resumed = Gap(reference="anchored")
    resumed.load_state_dict(json.loads(json.dumps(balance.state_dict())))
    assert balance.state_dict() == {"anchors": {"a": 2.0, "b": 1.0}}
    assert resumed.factors(rollouts, second, base) == balance.factors(rollouts, second, base)
    assert resumed.factors(rollouts, second, base) != pytest.approx(Gap().factors(rollouts, second, base), rel=1e-3)


@pytest.mark.parametrize("state", [{}, {"anchors": {"a": 0.0}}, {"anchors": {"a": "x"}}, {"anchors": [1.0]}])
def test_a_checkpoint_without_usable_anchors_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="anchors above 0"):
        Gap().load_state_dict(state)


def test_a_domain_is_anchored_when_it_first_has_a_gap() -> None:
    balance = Gap(reference="anchored")
    balance.factors(batch(("a", 1)), stats([2.0]), even(1))
    factors = balance.factors(batch(("a", 1), ("b", 1)), stats([2.0, 0.0]), even(2))
    assert factors == pytest.approx({"a": 1.0, "b": 1.0})
    assert balance.state_dict() == {"anchors": {"a": 2.0}}


@pytest.mark.parametrize("reference", ["batch", "anchored"])
def test_no_gap_anywhere_and_one_vanished_gap_stay_finite(reference: Any) -> None:
    rollouts, base = batch(("a", 2), ("b", 2)), even(4)
    assert Gap(reference=reference).factors(rollouts, stats([0.0] * 4), base) == pytest.approx({"a": 1.0, "b": 1.0})
    balance = Gap(reference=reference)
    balance.factors(rollouts, stats([1.0] * 4), base)
    factors = balance.factors(rollouts, stats([1.0, 1.0, 0.0, 0.0]), base)
    ratios = {"a": 2.0 if reference == "batch" else 1.0, "b": 0.05}
    mean = 0.5 * ratios["a"] + 0.5 * ratios["b"]
    assert factors == pytest.approx({domain: ratio / mean for domain, ratio in ratios.items()})


# --- metrics ------------------------------------------------------------------------------------------------------------


def test_metrics_say_what_each_domain_has_and_gets() -> None:
    rollouts = batch(("a", 3), ("b", 1), ("a", 0), ("b", 1))
    seen = stats([1.0, -3.0, 1.0, 4.0, 9.0], [0, 0, 0, 0, 1])
    before, after = even(5), torch.tensor([0.1, 0.1, 0.1, 0.5, 9.0], dtype=torch.float64)
    metrics = balance_metrics(rollouts, seen, before, after)
    assert metrics == pytest.approx(
        {
            "balance/prompt_share/a": 0.5,
            "balance/prompt_share/b": 0.5,
            "balance/token_share/a": 0.75,
            "balance/token_share/b": 0.25,
            "balance/weight_share/a": 0.375,
            "balance/weight_share/b": 0.625,
            "balance/factor/a": 0.5,
            "balance/factor/b": 2.5,
            "balance/log_ratio_sigma/a": math.sqrt(32) / 3,
            "balance/log_ratio_sigma/b": 0.0,
            "balance/advantage_abs/a": 5 / 3,
            "balance/advantage_abs/b": 4.0,
        }
    )


def test_metrics_without_a_log_ratio_leave_its_names_out() -> None:
    metrics = balance_metrics(batch(("a", 1)), {"abstained": torch.zeros(1)}, even(1).float(), even(1).float())
    assert set(metrics) == {f"balance/{name}/a" for name in ("prompt_share", "token_share", "weight_share", "factor")}


def test_a_domain_that_lost_all_its_weight_is_still_reported() -> None:
    after = torch.tensor([0.0, 1.0], dtype=torch.float64)
    metrics = balance_metrics(batch(("a", 1), ("b", 1)), stats([1.0, 1.0]), even(2), after)
    assert (metrics["balance/weight_share/a"], metrics["balance/factor/a"]) == (0.0, 0.0)


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (TokenShare, {"target": {}}, r"balance\.target.*above 0"),
        (TokenShare, {"target": {"a": 0.0}}, r"balance\.target.*sampler's mixture"),
        (Gap, {"target": {"a": math.inf}}, r"balance\.target"),
        (Sigma, {"low": 2.0}, r"low <= 1 <= high"),
        (Sigma, {"high": math.inf}, r"low <= 1 <= high"),
        (Gap, {"low": 0.0}, r"low <= 1 <= high"),
        (Gap, {"alpha": -1.0}, r"alpha.*divides by the gap"),
        (Gap, {"quantile": 1.0}, r"quantile.*between 0 and 1"),
    ],
)
def test_arguments_out_of_range_are_refused(cls: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**arguments)
