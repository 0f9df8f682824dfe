"""Every option composes, says all its arguments with values of their type, and lands where it is written."""

from __future__ import annotations

import itertools
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from moteach.config.build import constructor_parameters, resolve_target
from moteach.config.schema import COMPONENT_GROUPS, TrainConfig
from moteach.config.validate import check_support, describe, is_configurable, matches, validate
from moteach.errors import UnsupportedCombinationError
from moteach.paths import conf_dir

CONF = conf_dir()
OPTIONS = sorted(path for path in CONF.glob("*/*.yaml"))
COMPONENTS = [path for path in OPTIONS if "_target_" in yaml.safe_load(path.read_text())]
COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))
LISTS = ("tracker", "token_weights")


def name_of(path: Path) -> str:
    return f"{path.parent.name}={path.stem}"


def composed(*overrides: str, command: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, list(overrides))


def groups_of(command: str) -> set[str]:
    entries = yaml.safe_load((CONF / f"{command}.yaml").read_text())["defaults"]
    return {key for entry in entries if isinstance(entry, dict) for key in entry}


def overrides_of(path: Path) -> list[str]:
    """The override that chooses an option, and a value for each argument that has none."""
    group, content = path.parent.name, yaml.safe_load(path.read_text())
    choice = f"{group}=[{path.stem}]" if group in LISTS else f"{group}={path.stem}"
    return [choice, *(f"{group}.{key}=given" for key, value in content.items() if value == "???")]


def test_the_top_level_keys_of_a_run_are_these() -> None:
    assert sorted(composed()) == [
        "alignment", "balance", "checkpoint", "conflict", "data", "divergence", "eval", "expert_path", "experts", "gate",
        "group_size", "max_steps", "mix", "objective", "optim", "rollout", "router", "run_dir", "sampler", "seed",
        "student", "support", "teacher_gate", "teachers", "team", "threads", "token_weights", "trace", "tracker",
    ]  # fmt: skip


def test_the_shipped_default_is_valid() -> None:
    cfg = composed()
    validate(cfg)
    assert list(cfg.experts) == ["math", "code", "search"]
    assert OmegaConf.get_type(cfg) is TrainConfig


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    cfg = composed(command=command)
    assert OmegaConf.get_type(cfg).__module__ == "moteach.config.schema"


@pytest.mark.parametrize("path", OPTIONS, ids=name_of)
def test_every_option_composes_and_is_valid(path: Path) -> None:
    users = [command for command in COMMANDS if path.parent.name in groups_of(command)]
    assert users, f"no command has the group {path.parent.name}"
    found = {command: composed(*overrides_of(path), command=command) for command in users}
    if "train" in found:
        try:
            validate(found["train"])
        except UnsupportedCombinationError:
            validate(composed(*overrides_of(path), *partners(path)))


def partners(path: Path) -> tuple[str, ...]:
    """A support and an objective with which an option is defined, when it is not with the default ones."""
    supports, objectives = ([p for p in OPTIONS if p.parent.name == group] for group in ("support", "objective"))
    for support, objective in itertools.product(supports, objectives):
        chosen = tuple(name_of(p) for p in (support, objective) if p.parent != path.parent)
        try:
            check_support(composed(*overrides_of(path), *chosen))
        except UnsupportedCombinationError:
            continue
        return chosen
    pytest.fail(f"{name_of(path)} is not defined with any support and objective")


def test_every_component_group_has_options() -> None:
    assert {path.parent.name for path in COMPONENTS} >= set(COMPONENT_GROUPS)


def arguments(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the YAML says, and the annotations and defaults of the constructor that a YAML can say."""
    content = yaml.safe_load(path.read_text())
    cls = resolve_target(content.pop("_target_"), where=path.parent.name)
    own = vars(cls).get("__init__")
    hints = typing.get_type_hints(own) if own is not None else {}
    names = [name for name in constructor_parameters(cls) if is_configurable(hints.get(name, Any))]
    return content, {name: hints.get(name, Any) for name in names}, dict(constructor_parameters(cls))


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_a_yaml_lists_every_argument_of_its_class_and_no_other(path: Path) -> None:
    content, hints, _ = arguments(path)
    assert set(content) == set(hints)


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_every_value_in_a_yaml_has_the_type_of_its_argument(path: Path) -> None:
    content, hints, _ = arguments(path)
    wrong = {
        key: f"{value!r} is not {describe(hints[key])}"
        for key, value in content.items()
        if value != "???" and not str(value).startswith("${") and not matches(value, hints[key])
    }
    assert wrong == {}


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_every_argument_is_annotated_and_keyword_only(path: Path) -> None:
    _, hints, parameters = arguments(path)
    for name in hints:
        assert parameters[name].kind is parameters[name].KEYWORD_ONLY, name
        assert parameters[name].annotation is not parameters[name].empty, name


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["experts=[math,code]", "experts.math.weight=2"], "experts.math.weight", 2.0),
        (["experts=[math,code]"], "experts.code.domains", ["code"]),
        (["experts=[code]"], "experts.code.weight", 1.0),
        (["conflict=linear"], "conflict._target_", "moteach.conflict.pools.Linear"),
        (["divergence=forward_kl"], "divergence._target_", "moteach.divergences.full.ForwardKL"),
        (["divergence=jsd", "divergence.beta=.3"], "divergence.beta", 0.3),
        (["router.fallback=math"], "router.fallback", "math"),
        (["seed=7"], "rollout.seed", 7),
        (["seed=7"], "sampler.seed", 7),
        (["seed=7"], "data.seed", 7),
        (["seed=7", "rollout.seed=3"], "rollout.seed", 3),
        (["eval=none"], "eval.enabled", False),
        (["tracker=[jsonl,wandb]", "tracker.wandb.mode=online"], "tracker.wandb.mode", "online"),
        (["debug=quick"], "max_steps", 10),
        (["debug=quick", "max_steps=3"], "max_steps", 3),
        (["support=sampled", "objective=policy_gradient"], "support.name", "sampled"),
        (["objective.chunk_size=64"], "objective.chunk_size", 64),
        (["sampler.mixture={math:2,code:1}"], "sampler.mixture", {"math": 2, "code": 1}),
        (["data=jsonl", "data.path=p.jsonl"], "data.path", "p.jsonl"),
        (["run_dir=here"], "run_dir", "here"),
        (["optim.micro_batch_size=4"], "optim.micro_batch_size", 4),
        (["token_weights=[tip,special_tokens]", "token_weights.tip.rho=.3"], "token_weights.tip.rho", 0.3),
        (["balance=gap", "balance.reference=anchored"], "balance.reference", "anchored"),
        (["mix.reference=0.1"], "mix.reference", 0.1),
        (["mix.outcome=0.5", "group_size=4"], "mix.outcome", 0.5),
        (["objective=topk", "objective.truncation=corrected"], "objective.truncation", "corrected"),
        (["objective=topk", "support=topk", "support.k=64", "objective.k=64"], "support.k", 64),
        (["divergence=alpha_beta", "divergence.alpha=.2"], "divergence.alpha", 0.2),
        (["sampler=adaptive", "seed=5"], "sampler.seed", 5),
    ],
)
def test_overrides_land(overrides: list[str], key: str, value: Any) -> None:
    cfg = composed(*overrides)
    validate(cfg)
    found = OmegaConf.select(cfg, key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value


def test_experts_keep_the_order_they_are_named_in() -> None:
    assert list(composed("experts=[search,math]").experts) == ["search", "math"]


def test_a_team_chooses_its_experts_and_their_weights() -> None:
    cfg = composed("team=reasoning")
    validate(cfg)
    assert cfg.team == "reasoning"
    assert {name: expert.weight for name, expert in cfg.experts.items()} == {"math": 2.0, "code": 1.0}
    assert composed("team=reasoning", "experts.math.weight=5").experts.math.weight == 5.0


def test_both_trackers_and_none() -> None:
    assert list(composed("tracker=[jsonl,wandb]").tracker) == ["jsonl", "wandb"]
    cfg = composed("tracker=[]")
    validate(cfg)
    assert not cfg.tracker
