"""The router that reads a record of the teachers."""

from __future__ import annotations

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError
from moteach.routing.reliable import ReliabilityRouter
from moteach.teachers.reliability import Reliability
from moteach.types import Prompt

EXPERTS = [ExpertSpec(name=name, model=f"org/{name}", domains=[], weight=1.0) for name in ("good", "fair", "bad")]
PROMPTS = [
    Prompt(prompt_id="a", text="", token_ids=(1,), domain="math"),
    Prompt(prompt_id="b", text="", token_ids=(1,), domain="law"),
]


def record() -> Reliability:
    found = Reliability()
    found.observe("good", "math", right=8.0)
    found.observe("fair", "math", right=5.0, wrong=3.0)
    found.observe("bad", "math", wrong=8.0)
    return found


def test_soft_weights_are_powers_of_the_posterior_means() -> None:
    router = ReliabilityRouter(sharpness=2.0, weighting="soft")
    router.bind(EXPERTS)
    router.bind_reliability(record())
    means = torch.tensor([9 / 10, 6 / 10, 1 / 10], dtype=torch.float64)
    weights = router.route(PROMPTS).weights
    torch.testing.assert_close(weights[0], (means**2 / (means**2).sum()).float())
    torch.testing.assert_close(weights[1], torch.full((3,), 1 / 3))


def test_the_most_reliable_teaches_and_what_is_learned_later_counts() -> None:
    router, found = ReliabilityRouter(), record()
    router.bind(EXPERTS)
    router.bind_reliability(found)
    assert router.route(PROMPTS).weights[0].tolist() == [1.0, 0.0, 0.0]
    found.observe("good", "math", wrong=40.0)
    assert router.route(PROMPTS).weights[0].tolist() == [0.0, 1.0, 0.0]


def test_it_refuses_to_guess() -> None:
    router = ReliabilityRouter()
    router.bind(EXPERTS)
    with pytest.raises(ConfigError, match="teacher_gate=reliable"):
        router.route(PROMPTS)
    with pytest.raises(ConfigError, match="sharpness"):
        ReliabilityRouter(sharpness=0.0)
