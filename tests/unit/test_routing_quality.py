from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moteach.errors import ConfigError
from moteach.routing.quality import (
    accuracy,
    area_under_risk_coverage,
    auroc,
    contingency,
    coverage_at_risk,
    expected_calibration_error,
    macro_f1,
    risk_coverage,
)

CONFIDENCE = torch.tensor([0.95, 0.9, 0.8, 0.6], dtype=torch.float64)
CORRECT = torch.tensor([True, True, False, True])


def test_accuracy() -> None:
    assert accuracy(CORRECT) == 0.75


def test_contingency_and_f1_by_hand() -> None:
    """Expert 0: TP 2, FP 0, FN 1 -> .8; expert 1: TP 1, FP 1, FN 0 -> 2/3; expert 2 is never seen."""
    table = contingency(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), experts=3)
    assert table.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert macro_f1(table) == pytest.approx((0.8 + 2 / 3) / 2)
    assert macro_f1(table.T) == pytest.approx((0.8 + 2 / 3) / 2)


def test_f1_counts_an_expert_that_is_only_chosen() -> None:
    assert macro_f1(torch.tensor([[3, 1], [0, 0]])) == pytest.approx((6 / 7 + 0) / 2)


def test_calibration_error_by_hand() -> None:
    """Five bins of equal width: (.8, 1] holds .95 and .9, both right; (.6, .8] holds .8, wrong; (.4, .6] holds .6, right."""
    expected = (2 * abs(1 - 0.925) + 0.8 + 0.4) / 4
    assert expected_calibration_error(CONFIDENCE, CORRECT, bins=5) == pytest.approx(expected)
    assert expected_calibration_error(CONFIDENCE, CORRECT, bins=1) == pytest.approx(abs(0.75 - 0.8125))


def test_calibration_error_with_bins_of_equal_count() -> None:
    """Two bins: {.6 right, .8 wrong} and {.9, .95 both right}."""
    expected = (2 * abs(0.5 - 0.7) + 2 * abs(1 - 0.925)) / 4
    assert expected_calibration_error(CONFIDENCE, CORRECT, bins=2, binning="count") == pytest.approx(expected)


def test_the_ends_of_the_scale_have_a_bin() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert expected_calibration_error(ends, torch.tensor([False, True])) == 0.0
    assert expected_calibration_error(ends, torch.tensor([True, False])) == 1.0


def test_area_under_risk_coverage_by_hand() -> None:
    """Risks 0, 0, 1/3, 1/4."""
    coverage, risk = risk_coverage(CONFIDENCE, CORRECT)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert area_under_risk_coverage(CONFIDENCE, CORRECT) == pytest.approx(0.1458, abs=5e-5)


def test_ties_count_as_the_mean_over_their_orders() -> None:
    confidence, correct = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1]), torch.tensor([True, True, False, False, True])
    expected = []
    for order in itertools.permutations([1, 2, 3]):
        nudged = confidence.clone().double()
        for place, row in enumerate(order):
            nudged[row] -= 0.01 * place
        expected.append(area_under_risk_coverage(nudged, correct))
    assert len(set(expected)) > 1
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize(("risk", "coverage"), [(0.0, 0.5), (0.25, 1.0), (0.3, 1.0), (1.0, 1.0)])
def test_coverage_at_risk_by_hand(risk: float, coverage: float) -> None:
    assert coverage_at_risk(CONFIDENCE, CORRECT, risk=risk) == coverage


def test_a_threshold_does_not_split_a_tie() -> None:
    confidence, correct = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([True, True, False])
    assert coverage_at_risk(confidence, correct, risk=0.26) == pytest.approx(1 / 3)
    assert coverage_at_risk(confidence, ~correct, risk=0.0) == 0.0


def test_auroc_by_hand() -> None:
    """.9 and .5 beat both, .3 loses once and ties once."""
    assert auroc(torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.4, 0.3])) == pytest.approx((2 + 2 + 0.5) / 6)
    assert auroc(torch.tensor([0.9]), torch.tensor([0.1])) == 1.0
    assert auroc(torch.tensor([0.1]), torch.tensor([0.9])) == 0.0


@pytest.mark.parametrize(
    "measure",
    [
        lambda: accuracy(CORRECT[:0]),
        lambda: macro_f1(torch.zeros(2, 2, dtype=torch.long)),
        lambda: expected_calibration_error(CONFIDENCE[:0], CORRECT[:0]),
        lambda: area_under_risk_coverage(CONFIDENCE[:0], CORRECT[:0]),
        lambda: auroc(CONFIDENCE, CONFIDENCE[:0]),
        lambda: expected_calibration_error(CONFIDENCE * 2, CORRECT),
    ],
)
def test_nothing_to_measure_is_an_error(measure: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match="expected at least one"):
        measure()
