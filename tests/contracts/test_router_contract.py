"""Every YAML in conf/router is a router: a new option is tested by being there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moteach.catalogue.spec import ExpertSpec
from moteach.config.build import build
from moteach.types import Prompt, Routing

FILES = sorted((Path(__file__).parents[2] / "conf" / "router").glob("*.yaml"))
NAMES = ("math", "code", "search", "law", "tax")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def make(path: Path, experts: list[ExpertSpec]) -> Any:
    router = build(yaml.safe_load(path.read_text()), where="router")
    router.bind(experts)
    return router


def experts(count: int, *, weights: tuple[float, ...] = (1.0, 2.0, 0.5, 3.0, 1.5)) -> list[ExpertSpec]:
    """Experts with a domain each and one they share."""
    return [
        ExpertSpec(name=name, model=f"org/{name}", domains=[name, "shared"], weight=weight)
        for name, weight in zip(NAMES[:count], weights, strict=False)
    ]


def prompts(count: int) -> list[Prompt]:
    domains = [*NAMES[:count], "shared", NAMES[0]]
    return [
        Prompt(prompt_id=f"p{i}", text=f"a question of {domain}", token_ids=(1, 2), domain=domain)
        for i, domain in enumerate(domains)
    ]


def check(routing: Routing, rows: int, teachers: int) -> None:
    assert routing.weights.shape == (rows, teachers)
    assert bool((routing.weights >= 0).all())
    sums = routing.weights.sum(dim=1)
    torch.testing.assert_close(sums, (~routing.abstained).float())
    assert bool(((routing.confidence >= 0) & (routing.confidence <= 1)).all())


def test_there_are_options() -> None:
    assert {"label", "uniform"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_sum_to_one_or_abstain(path: Path, count: int) -> None:
    rows = prompts(count)
    routing = make(path, experts(count)).route(rows)
    check(routing, len(rows), count)
    assert routing.teacher_ids == NAMES[:count]
    assert routing.prompt_ids == tuple(prompt.prompt_id for prompt in rows)


def test_one_expert_teaches_everything(path: Path) -> None:
    routing = make(path, experts(1)).route(prompts(1))
    assert routing.weights.tolist() == [[1.0]] * len(prompts(1))
    assert not routing.abstained.any()


def test_permuting_the_experts_permutes_the_weights(path: Path) -> None:
    given, order = experts(5), [3, 0, 4, 1, 2]
    straight = make(path, given).route(prompts(5))
    permuted = make(path, [given[i] for i in order]).route(prompts(5))
    assert permuted.teacher_ids == tuple(NAMES[i] for i in order)
    torch.testing.assert_close(permuted.weights, straight.weights[:, order])
    torch.testing.assert_close(permuted.confidence, straight.confidence)


def test_the_order_of_the_prompts_does_not_matter(path: Path) -> None:
    router, rows = make(path, experts(3)), prompts(3)
    straight = router.route(rows).weights
    torch.testing.assert_close(router.route(rows[::-1]).weights, straight.flip(0))
    torch.testing.assert_close(torch.cat([router.route([row]).weights for row in rows]), straight)


def test_experts_of_weight_zero_get_nothing_they_share(path: Path) -> None:
    routing = make(path, experts(3, weights=(1.0, 0.0, 1.0))).route(prompts(3))
    shared = routing.weights[3]
    assert shared[1] == 0.0


def test_state_survives_json(path: Path) -> None:
    router = make(path, experts(3))
    before = router.route(prompts(3)).weights
    other = make(path, experts(3))
    other.load_state_dict(json.loads(json.dumps(router.state_dict())))
    torch.testing.assert_close(other.route(prompts(3)).weights, before, atol=0, rtol=0)


def test_a_step_without_prompts_is_no_error(path: Path) -> None:
    check(make(path, experts(2)).route([]), 0, 2)
