from __future__ import annotations

from dataclasses import replace

import pytest

from moteach.config.connect import check_router_needs
from moteach.errors import ConfigError
from moteach.routing.label import UniformRouter
from moteach.routing.online import OnlineRouter
from moteach.types import Prompt


def test_a_router_that_learns_from_rewards_refuses_prompts_without_a_verifier() -> None:
    prompt = Prompt(prompt_id="a", text="a", token_ids=(1,))
    with pytest.raises(ConfigError, match="'verifier'"):
        check_router_needs(OnlineRouter(), [prompt])
    check_router_needs(OnlineRouter(), [prompt, replace(prompt, verifier="exact")])
    check_router_needs(UniformRouter(), [prompt])
