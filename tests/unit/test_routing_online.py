from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError
from moteach.routing.base import RoutingFeedback
from moteach.routing.credit import verdicts
from moteach.routing.linear import LinearBeliefs
from moteach.routing.online import OnlineRouter
from moteach.routing.quality import auroc
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

NAMES = ("code", "math", "search")
EXPERTS = [ExpertSpec(name=name, model=f"org/{name}") for name in NAMES]


def rows(step: int, count: int = 8) -> RolloutBatch:
    """Prompts of three kinds; what a right completion is, `simulated` decides."""
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=f"{name}{step}-{i}", text=f"{name} {name} {i}", token_ids=(1,), domain=name),
                sample=0,
                completion_ids=(2, 3),
                rollout_logprobs=(-1.0, -1.0),
                finished=True,
                student_version=step,
            )
            for name in NAMES
            for i in range(count)
        ],
        pad_id=0,
    )


class World:
    """The right teacher finds right completions likelier; all teachers have a level of their own, one near the student."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rewards: tuple[float, ...] = ()
        self.asked = 0

    def start(self, rollouts: RolloutBatch, chance: dict[str, float]) -> None:
        drawn = torch.rand(len(rollouts), generator=self.generator).tolist()
        kinds = [str(rollout.prompt.domain) for rollout in rollouts.rollouts]
        self.rewards = tuple(float(u < chance[kind]) for u, kind in zip(drawn, kinds, strict=True))

    def __call__(self, rollouts: RolloutBatch, routing: Routing) -> Evidence:
        self.asked += 1
        said = []
        for name, level in zip(NAMES, (-0.1, -2.0, -4.0), strict=True):
            noise = 0.5 * torch.randn(len(rollouts), generator=self.generator)
            right = torch.tensor(
                [
                    reward if rollout.prompt.domain == name else 0.0
                    for rollout, reward in zip(rollouts.rollouts, self.rewards, strict=True)
                ]
            )
            value = (level + noise + 1.0 * right)[rollouts.token_rows]
            tokens = torch.arange(rollouts.num_tokens)
            said.append(TeacherEvidence(teacher_id=name, support="sampled", tokens=tokens, sampled_logprobs=value))
        return Evidence(teachers=tuple(said), num_tokens=rollouts.num_tokens)


def right_share(routing: Routing, rollouts: RolloutBatch) -> float:
    own = [routing.teacher_ids.index(str(rollout.prompt.domain)) for rollout in rollouts.rollouts]
    return float(routing.weights[range(len(own)), own].mean())


def simulate(router: OnlineRouter, steps: int) -> list[float]:
    """Runs the loop around the router; returns the weight of the right teachers at each step."""
    world, chance, shares = World(), dict.fromkeys(NAMES, 0.4), []
    router.bind_teachers(world)
    for step in range(steps):
        rollouts = rows(step)
        world.start(rollouts, chance)
        routing = router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
        shares.append(right_share(routing, rollouts))
        router.observe(RoutingFeedback(step=step, rollouts=rollouts, routing=routing, rewards=world.rewards))
    return shares


def made(**changed: Any) -> OnlineRouter:
    router = OnlineRouter(**{"cache": None, **changed})
    router.bind(EXPERTS)
    return router


@pytest.mark.parametrize("explore", ["thompson", "ucb"])
@pytest.mark.parametrize("features", ["ngrams", "domain"])
def test_verdicts_find_the_right_teacher_and_not_the_nearest(explore: str, features: str) -> None:
    router = made(explore=explore, features=features, ask_every=2)
    shares = simulate(router, 24)
    assert sum(shares[:2]) / 2 < 0.75
    assert sum(shares[-8:]) / 8 > 0.95


def test_all_teachers_are_asked_when_it_is_time_only() -> None:
    router = made(ask_every=3)
    world = World()
    router.bind_teachers(world)
    for step in range(7):
        rollouts = rows(step)
        world.start(rollouts, dict.fromkeys(NAMES, 0.5))
        routing = router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
        router.observe(RoutingFeedback(step=step, rollouts=rollouts, routing=routing, rewards=world.rewards))
    assert world.asked == 3


def test_evidence_of_another_batch_is_not_taken_for_this_one() -> None:
    router = made(ask_every=1)
    world = World()
    router.bind_teachers(world)
    first, second = rows(0), rows(1)
    world.start(first, dict.fromkeys(NAMES, 0.5))
    routing = router.route([rollout.prompt for rollout in first.rollouts], first)
    before = json.dumps(router.state_dict()["beliefs"])
    router.observe(RoutingFeedback(step=0, rollouts=second, routing=routing, rewards=world.rewards))
    assert json.dumps(router.state_dict()["beliefs"]) == before


def test_without_verifiers_nothing_is_learned() -> None:
    router, world = made(ask_every=1), World()
    router.bind_teachers(world)
    for step in range(3):
        rollouts = rows(step)
        world.start(rollouts, dict.fromkeys(NAMES, 0.5))
        routing = router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
        nothing = (math.nan,) * len(rollouts)
        router.observe(RoutingFeedback(step=step, rollouts=rollouts, routing=routing, rewards=nothing))
    assert router.state_dict()["beliefs"] == made().state_dict()["beliefs"]


def test_a_restored_router_continues_bitwise() -> None:
    def run(router: OnlineRouter, first: int, last: int) -> list[list[list[float]]]:
        said = []
        for step in range(first, last):
            rollouts, world = rows(step), World(step)
            router.bind_teachers(world)
            world.start(rollouts, {"code": 0.3, "math": 0.5, "search": 0.7})
            routing = router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
            said.append(routing.weights.tolist())
            router.observe(RoutingFeedback(step=step, rollouts=rollouts, routing=routing, rewards=world.rewards))
        return said

    arguments: dict[str, Any] = {"ask_every": 2, "weighting": "soft", "memory": 0.9}
    straight, broken, restored = made(**arguments), made(**arguments), made(**arguments)
    whole = run(straight, 0, 14)
    run(broken, 0, 7)
    restored.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    assert run(restored, 7, 14) == whole[7:]
    assert restored.state_dict() == straight.state_dict()


def test_a_verdict_is_the_area_under_the_roc_curve_less_a_half() -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs = torch.randn(9, 2, dtype=torch.float64, generator=generator)
    logprobs[0] = logprobs[4]
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 1, 1]).double()
    found, counts = verdicts(logprobs, rewards, torch.zeros(9, 3).double(), ["p"] * 9, sharpness=None)
    for j in range(2):
        area = auroc(logprobs[rewards == 1, j], logprobs[rewards == 0, j])
        assert float(found[rewards == 1, j].mean()) == pytest.approx(area - 0.5, abs=1e-12)
        assert float(found[rewards == 0, j].mean()) == pytest.approx(area - 0.5, abs=1e-12)
    assert counts.tolist() == [[1.0, 1.0]] * 9


def test_verdicts_by_hand_between_prompts_with_what_is_missing() -> None:
    contexts = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.2], [1.0, 0.4], [-1.0, 0.1], [1.0, 0.0]]).double(), dim=1
    )
    logprobs = torch.tensor([[-1.0], [-2.0], [-3.0], [torch.nan]]).double()
    rewards = torch.tensor([0.25, 1.0, math.nan, 0.0]).double()
    found, counts = verdicts(logprobs, rewards, contexts, ["a", "b", "c", "d"], sharpness=2.0)
    weight = 0.75 * float(contexts[0] @ contexts[1]) ** 2
    torch.testing.assert_close(counts[:, 0], torch.tensor([weight, weight, 0.0, 0.0]).double())
    assert found[:, 0].tolist() == [-0.5, -0.5, 0.0, 0.0]
    alone, nothing = verdicts(logprobs, rewards, contexts, ["a", "b", "c", "d"], sharpness=None)
    assert not alone.any()
    assert not nothing.any()


def test_beliefs_are_ridge_regressions() -> None:
    generator = torch.Generator().manual_seed(2)
    contexts = torch.randn(20, 4, dtype=torch.float64, generator=generator)
    targets = torch.randn(20, 2, dtype=torch.float64, generator=generator)
    counts = torch.rand(20, 2, dtype=torch.float64, generator=generator)
    counts[3, 1], targets[3, 1] = 0.0, math.nan
    beliefs = LinearBeliefs(("a", "b"), size=4, prior=0.3)
    beliefs.learn(contexts[:9], targets[:9], counts[:9])
    beliefs.learn(contexts[9:], targets[9:], counts[9:])
    for j in range(2):
        root = counts[:, j, None].sqrt()
        design = torch.cat([contexts * root, 0.3**0.5 * torch.eye(4).double()])
        wanted = torch.cat([torch.nan_to_num(targets[:, j, None]) * root, torch.zeros(4, 1).double()])
        theta = torch.linalg.lstsq(design, wanted).solution[:, 0]
        torch.testing.assert_close(beliefs.mean(contexts)[:, j], contexts @ theta)
        covariance = torch.linalg.inv(design.T @ design)
        spread = torch.einsum("ri,ij,rj->r", contexts, covariance, contexts).sqrt()
        torch.testing.assert_close(beliefs.spread(contexts)[:, j], spread)
        draws = torch.stack([beliefs.draw(torch.eye(4).double(), scale=2.0, key=str(i))[:, j] for i in range(1000)])
        torch.testing.assert_close(draws.mean(dim=0), theta, atol=0.3, rtol=0)
        torch.testing.assert_close(torch.cov(draws.T), 4 * covariance, atol=0.8, rtol=0.15)


def test_forgetting_goes_back_to_the_prior() -> None:
    beliefs = LinearBeliefs(("a",), size=2, prior=0.5)
    beliefs.learn(torch.eye(2).double(), torch.ones(2, 1).double(), torch.ones(2, 1).double())
    beliefs.forget(0.25)
    torch.testing.assert_close(beliefs.precision[0], (0.5 + 0.25) * torch.eye(2).double())
    torch.testing.assert_close(beliefs.moment[0], torch.full((2,), 0.25).double())


def test_wrong_numbers_are_refused() -> None:
    for wrong in ({"ask_every": 0}, {"sharpness": 0.0}, {"memory": 0.0}, {"exploration": -1.0}):
        with pytest.raises(ConfigError, match=f"router.{next(iter(wrong))}"):
            OnlineRouter(**wrong)
