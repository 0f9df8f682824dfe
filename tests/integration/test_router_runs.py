"""Runs whose router hears the teachers before it decides."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from integration_runs import metrics, train

from moteach.testing import TinyWorld


@pytest.mark.parametrize("support", [["support=full"], ["support=sampled", "objective=policy_gradient"]])
def test_the_likelihood_router_trains(support: list[str], world: TinyWorld, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *world.overrides, "eval=none", "max_steps=2", "router=likelihood", *support)
    for line in metrics(run):
        assert math.isfinite(line["loss"])
        assert line["routing/load/alpha"] + line["routing/load/beta"] + line["routing/abstain"] == pytest.approx(1.0)
