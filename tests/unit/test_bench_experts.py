from __future__ import annotations

import pytest

from moteach.bench.experts import Turns, run, table_rows
from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError
from moteach.testing import tiny_prompts


def test_the_experts_take_turns() -> None:
    experts = [ExpertSpec(name=f"e{index}", model="nowhere") for index in range(3)]
    routing = Turns(experts=experts).route(tiny_prompts(["1", "2", "3", "4"]))
    assert routing.teacher_ids == ("e0", "e1", "e2")
    assert routing.weights.argmax(dim=1).tolist() == [0, 1, 2, 0]
    assert routing.weights.sum(dim=1).tolist() == [1.0] * 4


def test_a_ratio_is_the_median_of_the_ratios_of_the_same_step() -> None:
    times = {
        1: [{"step": 1.0, "cpu": 1.0}, {"step": 10.0, "cpu": 1.0}, {"step": 2.0, "cpu": 1.0}],
        12: [{"step": 1.1, "cpu": 2.0}, {"step": 11.0, "cpu": 2.0}, {"step": 8.0, "cpu": 2.0}],
    }
    peaks = {
        count: {"peak_mib": peak, "mapped_mib": 1.0, "rss_growth_mib": 0.0} for count, peak in ((1, 4.0), (12, 5.0))
    }
    one, twelve = table_rows(times, peaks, {1: 2, 12: 30})
    assert (one["step_ratio"], one["cpu_ratio"], one["peak_ratio"]) == (1, 1, 1)
    assert twelve["step_ratio"] == pytest.approx(1.1), "not 8 / 2, the ratio of the medians"
    assert (twelve["cpu_ratio"], twelve["peak_ratio"], twelve["loads"]) == (2, 1.25, 30)


def test_a_size_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"size: got 'smolm'.*smollm2"):
        run(["size=smolm"])
