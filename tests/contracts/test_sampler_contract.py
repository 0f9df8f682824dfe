"""Every YAML in conf/sampler is a sampler: a new option is tested by being there."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from moteach.config.build import build, constructor_parameters, resolve_target
from moteach.data.base import PromptSet
from moteach.data.sampling import Sampler, StepFeedback
from moteach.errors import CheckpointError, ConfigError, DataError
from moteach.types import Prompt

FILES = sorted((Path(__file__).parents[2] / "conf" / "sampler").glob("*.yaml"))
SIZES = {"math": 31, "code": 40, "search": 57}
PROMPTS_PER_STEP = 13


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def node(path: Path, **overrides: Any) -> dict[str, Any]:
    """The YAML as a run would see it, with a step small enough for a test."""
    found = yaml.safe_load(path.read_text().replace("${seed}", "0"))
    return {**found, "prompts_per_step": PROMPTS_PER_STEP, **overrides}


def prompt(prompt_id: str, domain: str | None, text: str | None = None) -> Prompt:
    return Prompt(prompt_id=prompt_id, text=text or prompt_id, token_ids=(1, 2), domain=domain)


def prompts(**sizes: int) -> PromptSet:
    return PromptSet.of([prompt(f"{domain}{i}", domain) for domain, size in sizes.items() for i in range(size)])


def make(path: Path, data: PromptSet | None = None, weights: dict[str, float] | None = None, **overrides: Any) -> Any:
    sampler = build(node(path, **overrides), where="sampler")
    return sampler.bind(prompts(**SIZES) if data is None else data, weights=weights)


def feedback(step: int, drawn: list[Prompt], totals: Counter[str]) -> StepFeedback:
    """Divergences fall with the prompts of a domain; two thirds of the prompts have verified scores."""
    rates = {"math": 80.0, "code": 300.0, "search": 2000.0}
    divergence = {d: 0.01 + math.exp(-totals[d] / rates[d]) for d in rates if (step + len(d)) % 7}
    rewards = {}
    for entry in drawn:
        key = sum(entry.prompt_id.encode())
        if key % 3:
            rewards[entry.prompt_id] = [1.0, 1.0 if key % 2 or step % 5 else 0.0, 1.0, 1.0]
    return StepFeedback(step=step, divergence=divergence, rewards=rewards)


def run(sampler: Any, steps: range, totals: Counter[str]) -> list[tuple[list[str], dict[str, float]]]:
    """Draws and observes; what is fed back depends on what was drawn."""
    given = []
    for step in steps:
        drawn = sampler.next(step)
        totals.update(str(entry.domain) for entry in drawn)
        sampler.observe(feedback(step + 1, drawn, totals))
        given.append(([entry.prompt_id for entry in drawn], sampler.metrics()))
    return given


def test_there_are_options() -> None:
    assert {"fixed", "adaptive", "difficulty"} <= {path.stem for path in FILES}


def test_it_keeps_the_protocol(path: Path) -> None:
    assert isinstance(make(path), Sampler)


def test_the_yaml_lists_every_argument_and_explains_it(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    parameters = constructor_parameters(resolve_target(given["_target_"], where="sampler"))
    assert list(given) == ["_target_", *parameters]
    lines = path.read_text().splitlines()
    keys = [re.match(r"[a-z_]+(?=:)", line) for line in lines]
    bare = {key[0] for above, key in zip(lines, keys[1:], strict=False) if key and not above.startswith("#")}
    assert bare <= {"seed"}


def test_the_defaults_of_the_class_are_those_of_the_yaml(path: Path) -> None:
    given = node(path)
    parameters = constructor_parameters(resolve_target(given["_target_"], where="sampler"))
    given["prompts_per_step"] = yaml.safe_load(path.read_text())["prompts_per_step"]
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        name: value for name, value in given.items() if name != "_target_"
    }


def test_every_step_is_full_and_no_prompt_comes_twice_in_it(path: Path) -> None:
    given = run(make(path), range(60), Counter())
    assert all(len(set(ids)) == len(ids) == PROMPTS_PER_STEP for ids, _ in given)
    assert {i for ids, _ in given for i in ids} == {
        f"{domain}{i}" for domain, size in SIZES.items() for i in range(size)
    }


def test_the_logged_shares_are_a_mixture_and_the_prompts_follow_them(path: Path) -> None:
    sampler = make(path, weights={"math": 2.0, "code": 1.0, "search": 1.0})
    before = sampler.metrics()
    assert {key: value for key, value in before.items() if key.startswith("sampler/share/")} == {
        "sampler/share/math": 0.5,
        "sampler/share/code": 0.25,
        "sampler/share/search": 0.25,
    }
    owed, drawn = Counter[str](), Counter[str]()
    for ids, after in run(sampler, range(60), Counter()):
        assert all(isinstance(value, float) for value in after.values())
        for domain in SIZES:
            owed[domain] += PROMPTS_PER_STEP * before[f"sampler/share/{domain}"]
        drawn.update(re.sub(r"\d", "", i) for i in ids)
        assert all(abs(owed[domain] - drawn[domain]) < len(SIZES) for domain in SIZES)
        assert sum(after[f"sampler/share/{domain}"] for domain in SIZES) == pytest.approx(1.0, abs=1e-12)
        before = after


def test_a_mixture_of_its_own_comes_before_the_weights(path: Path) -> None:
    sampler = make(path, weights={"math": 1.0, "code": 1.0}, mixture={"search": 1.0})
    assert {entry.domain for entry in sampler.next(0)} == {"search"}


@pytest.mark.parametrize("stop", [0, 25])
def test_a_run_that_resumes_gives_what_a_run_in_one_piece_gives(path: Path, stop: int) -> None:
    expected = run(make(path), range(60), Counter())
    first, totals = make(path), Counter[str]()
    before = run(first, range(stop), totals)
    second = make(path)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, range(stop, 60), totals) == expected


def test_a_step_can_be_put_back(path: Path) -> None:
    sampler = make(path)
    state = sampler.state_dict()
    first = sampler.next(0)
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state
    assert sampler.next(0) == first


def test_the_seed_decides_the_order(path: Path) -> None:
    orders = [run(make(path, seed=seed), range(30), Counter()) for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_other_data_is_refused_on_resume(path: Path) -> None:
    state = make(path).state_dict()
    with pytest.raises(CheckpointError, match="Resume with the data and the mixture the run was started with"):
        make(path, prompts(**{**SIZES, "code": 41})).load_state_dict(state)


def test_a_step_that_showed_nothing_is_no_error(path: Path) -> None:
    sampler = make(path)
    for step in range(40):
        assert len(sampler.next(step)) == PROMPTS_PER_STEP
        sampler.observe(StepFeedback(step=step + 1, divergence={}, rewards={}))


def test_prompts_without_a_domain_are_the_default_domain(path: Path) -> None:
    sampler = make(path, PromptSet.of([prompt(f"p{i}", None) for i in range(20)]))
    for step in range(40):
        drawn = sampler.next(step)
        rewards = {entry.prompt_id: [1.0] for entry in drawn}
        sampler.observe(StepFeedback(step=step + 1, divergence={"default": 0.9**step}, rewards=rewards))
    assert sampler.metrics()["sampler/share/default"] == pytest.approx(1.0, abs=1e-12)


def test_held_out_prompts_and_small_domains_are_refused(path: Path) -> None:
    data = PromptSet.of([prompt(f"p{i}", "math") for i in range(20)], [prompt("h", "math", text=" P7 ")])
    with pytest.raises(DataError, match="'p7' is also a held-out one"):
        run(make(path, data, prompts_per_step=20), range(1), Counter())
    with pytest.raises(DataError, match="at least 13 different prompts of domain 'math' for one step, got 12"):
        make(path, prompts(math=12)).next(0)


def test_an_unbound_sampler_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler\.bind\(prompts\)"):
        build(node(path), where="sampler").next(0)
