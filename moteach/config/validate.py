"""Checks between compose and construction: component arguments against their class, and choices against each other."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moteach.config.build import constructor_parameters, resolve_target
from moteach.config.parts import (
    build_balance,
    build_failure_policy,
    build_objective,
    build_teacher_gate,
    build_token_weights,
)
from moteach.config.schema import COMPONENT_GROUPS, MULTI_GROUPS
from moteach.config.teachers import hidden_dtype_of, memory_of
from moteach.errors import ConfigError, UnsupportedCombinationError, nearest
from moteach.objectives.mix import MixedObjective
from moteach.paths import conf_dir
from moteach.routing.base import Gate
from moteach.types import Support

_PLAIN = (str, int, float, bool, list, dict, type(None))
_LEAST: Mapping[str, float] = {
    "max_steps": 1,
    "group_size": 1,
    "threads": 1,
    "checkpoint.every_steps": 0,
    "checkpoint.keep_last": 1,
    "teachers.max_tokens_per_forward": 1,
    "teachers.http.concurrency": 1,
    "teachers.http.attempts": 1,
    "teachers.http.max_response_bytes": 1,
    "teachers.http.backoff": 0,
    "teachers.http.wait": 0,
    "teachers.http.breaker_failures": 1,
    "teachers.http.breaker_cool_down": 0,
    "eval.prompts_per_domain": 1,
    "eval.max_new_tokens": 1,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "optim.micro_batch_size": 1,
    "optim.updates_per_step": 1,
    "trace.gradient_cosine_every": 0,
    "trace.diagnostics_every": 0,
}


def check_components(cfg: DictConfig) -> None:
    """Checks every component node: the class exists, each argument is one of its parameters and has its type.

    Raises:
        ConfigError: Naming the key, what was expected and the nearest valid keys.
    """
    for group in COMPONENT_GROUPS:
        if group in cfg:
            check_component(cfg[group], where=group)
    for group in MULTI_GROUPS:
        for name in cfg.get(group, {}):
            check_component(cfg[group][name], where=f"{group}.{name}")


def check_component(node: Any, *, where: str) -> None:
    """Checks one component node against the constructor of its `_target_`."""
    raw = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    if not isinstance(raw, dict) or not isinstance(raw.get("_target_"), str):
        raise ConfigError(
            f"{where}: expected one of the options of the group '{where.split('.')[0]}', got {raw!r}; "
            f"{nearest(str(raw), options(where.split('.')[0]))}"
        )
    cls = resolve_target(raw["_target_"], where=where)
    parameters = constructor_parameters(cls)
    # A constructor inherited from a Protocol has no annotations of its own.
    constructor = vars(cls).get("__init__")
    hints = typing.get_type_hints(constructor) if constructor is not None else {}
    configurable = {name for name in parameters if is_configurable(hints.get(name, Any))}
    for key, value in ((str(key), value) for key, value in raw.items()):
        if key == "_target_":
            continue
        if key not in configurable:
            raise ConfigError(f"{where}.{key}: '{cls.__name__}' has no such argument; {nearest(key, configurable)}")
        if value == "???":
            raise ConfigError(
                f"{where}.{key}: expected {describe(hints.get(key, Any))}, got nothing; set {where}.{key}="
            )
        if not matches(value, hints.get(key, Any)):
            raise ConfigError(f"{where}.{key}: expected {describe(hints[key])}, got {value!r}")
    for name in configurable - set(raw):
        if parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{where}.{name}: expected {describe(hints.get(name, Any))}, got nothing")


def options(group: str) -> list[str]:
    """Returns the names of the shipped options of a config group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def is_configurable(annotation: Any) -> bool:
    """True for what a YAML can hold; False for objects that are handed over by the builder."""
    if annotation is Any or annotation in _PLAIN:
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return all(is_configurable(part) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return True
    if origin in (list, tuple, dict, Mapping, typing.Sequence) or str(origin).startswith("<class 'collections.abc"):
        return all(part is Ellipsis or is_configurable(part) for part in typing.get_args(annotation))
    return False


def matches(value: Any, annotation: Any) -> bool:
    """Tells whether a plain value is of an annotated type; an int is a float, a bool is neither."""
    if annotation is Any:
        return True
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(matches(k, parts[0]) and matches(v, parts[1]) for k, v in value.items())
    if origin is not None:
        return isinstance(value, list) and all(matches(item, parts[0]) for item in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(annotation, type) and isinstance(value, annotation)


def describe(annotation: Any) -> str:
    """Says a type in words a user of a YAML knows."""
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if annotation in words:
        return words[annotation]
    if annotation is Any:
        return "a value"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in parts)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(part) for part in parts)
    if origin is dict or origin is Mapping:
        return f"a mapping of {describe(parts[0])} to {describe(parts[1])}"
    if origin is not None and parts:
        return f"a list of {describe(parts[0])}"
    return str(annotation)


def check_support(cfg: DictConfig) -> None:
    """Refuses a support that the chosen objective, divergence or resolver is not defined on.

    Raises:
        ConfigError: There is no such support.
        UnsupportedCombinationError: Naming the choice that refuses and the supports it takes.
    """
    name = cfg.support.name
    objective = resolve_target(cfg.objective._target_, where="objective")
    if name not in typing.get_args(Support):
        raise ConfigError(f"support.name: got '{name}'; {nearest(name, typing.get_args(Support))}")
    used = ["objective", "conflict", "alignment"]
    # on the written token alone there is no distribution to compare; an objective that reads it anyway says so in `check`
    if "divergence" in constructor_parameters(objective) and name != "sampled":
        used.append("divergence")
    for group in used:
        cls = resolve_target(cfg[group]._target_, where=group)
        supports = sorted(getattr(cls, "supports", ()))
        if name not in supports:
            others = [
                option for option in options(group) if name in getattr(_option_class(group, option), "supports", ())
            ]
            instead = f", or {group}={'|'.join(others)}" if others else ""
            raise UnsupportedCombinationError(
                f"support={name} is not defined for {group}={cls.__name__}, which takes: {', '.join(supports)}. "
                f"Choose support={'|'.join(supports)}{instead}"
            )


def check_learning(cfg: DictConfig) -> None:
    """Builds the parts of the loss, which refuse what is not defined, and compares them with each other.

    Raises:
        ConfigError: An argument is out of range, or a term is asked for that nothing feeds.
        UnsupportedCombinationError: Two choices are not defined together; says what would go wrong and what to choose.
    """
    objective = build_objective(cfg)
    objective.check(cfg.support.name, cfg.support.k)
    _check_gate(objective.teaching.gate, cfg.support.name)
    known = objective.measurable(cfg.support.name)
    readers = {f"token_weights={name}": part.needs for name, part in build_token_weights(cfg).items()}
    readers[f"balance={build_balance(cfg).name}"] = build_balance(cfg).needs
    for reader, needs in readers.items():
        if not needs <= known:
            raise UnsupportedCombinationError(
                f"{reader} reads {', '.join(sorted(needs - known))}, which support={cfg.support.name} does not give "
                f"{type(objective.main).__name__}; tokens would be weighed by nothing. Choose support=full, or another option"
            )
    if not hasattr(objective.main, "credits") and (penalty := cfg.conflict.get("sequence_penalty")):
        raise UnsupportedCombinationError(
            f"conflict.sequence_penalty={penalty} is read by objective=divergence alone, got {type(objective.main).__name__}, "
            "which does not see -log Z; it would be ignored. Choose objective=divergence, or set it to 0"
        )
    check_aggregate(cfg, objective)
    build_failure_policy(cfg)
    if build_teacher_gate(cfg).unverified == "outcome" and not cfg.mix.outcome > 0:
        raise ConfigError(
            f"teacher_gate.unverified=outcome needs mix.outcome above 0, got {cfg.mix.outcome}; rows without a teacher would "
            "teach nothing. Set mix.outcome (and group_size), or choose teacher_gate.unverified=skip"
        )
    if cfg.mix.outcome > 0 and cfg.group_size < 2:
        raise ConfigError(
            f"mix.outcome={cfg.mix.outcome} needs group_size of at least 2, got {cfg.group_size}; a completion's advantage is "
            "relative to others of its prompt, and alone it is always zero"
        )


def check_aggregate(cfg: DictConfig, objective: MixedObjective) -> None:
    """Refuses a resolver that makes no target of its teachers for an objective that reads one.

    Raises:
        UnsupportedCombinationError: Saying what would be compared with what, and what to choose instead.
    """
    resolver = resolve_target(cfg.conflict._target_, where="conflict")
    if hasattr(resolver, "combine"):
        if objective.teaching.gate.per_token:
            raise UnsupportedCombinationError(
                f"conflict={getattr(resolver, 'name', resolver.__name__)} takes each teacher's gradient over its own "
                f"prompts, got gate={type(objective.teaching.gate).__name__}, which splits completions between teachers; "
                "choose gate=prompt, or a pool: conflict=select|linear"
            )
        # one teacher at a time is a target for any objective; a term without a teacher has no gradient to combine
        if cfg.mix.outcome > 0 or cfg.mix.reference > 0:
            raise UnsupportedCombinationError(
                f"conflict={getattr(resolver, 'name', resolver.__name__)} combines gradients of teachers, got "
                f"mix.outcome={cfg.mix.outcome}, mix.reference={cfg.mix.reference}, which belong to none and would be counted "
                "once a teacher. Set both to 0, or choose conflict=sum_of_divergences|linear|geometric"
            )
        return
    if getattr(resolver, "aggregates", False) and not getattr(objective.main, "compares_each", False):
        raise UnsupportedCombinationError(
            f"conflict={getattr(resolver, 'name', resolver.__name__)} keeps one loss a teacher, got objective="
            f"{type(objective.main).__name__}, which reads one target; it would get the linear pool instead. Choose "
            "objective=divergence|topk, or a pool: conflict=linear|geometric"
        )


def _check_gate(gate: Gate, support: Support) -> None:
    """Refuses a gate that reads what the teachers do not send."""
    if support not in gate.supports:
        raise UnsupportedCombinationError(
            f"gate={type(gate).__name__} reads whole distributions of the teachers, got support={support}; it could not "
            f"compare them. Choose support={'|'.join(sorted(gate.supports))}, or gate=prompt"
        )


def _option_class(group: str, option: str) -> type:
    node = OmegaConf.load(conf_dir() / group / f"{option}.yaml")
    return resolve_target(str(OmegaConf.select(node, "_target_")), where=group)


def check_keys(cfg: DictConfig, *, where: str = "") -> None:
    """Refuses keys that nobody reads, which Hydra's `+` adds to a schema without a word.

    Raises:
        ConfigError: Naming the key and the nearest valid ones.
    """
    schema = OmegaConf.get_type(cfg)
    known = [item.name for item in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else None
    for key in map(str, cfg):
        if known is not None and key not in known:
            place = f"in '{where.rstrip('.')}': " if where else ""
            raise ConfigError(f"there is no key '{where}{key}'; {place}{nearest(key, known)}")
        child = None if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key) else cfg[key]
        if isinstance(child, DictConfig):
            check_keys(child, where=f"{where}{key}.")


def check_run(cfg: DictConfig) -> None:
    """Checks the keys that no single group owns.

    Raises:
        ConfigError: Naming the key, what was expected and what was given.
    """
    if not cfg.experts:
        raise ConfigError(
            "experts: expected at least one expert, got none; nobody would teach. Try experts=[math,code]"
        )
    for key, least in _LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not value >= least:
            raise ConfigError(f"{key}: expected at least {least}, got {value}")
    _check_optim(cfg.optim)
    memory_of(cfg.teachers)
    hidden_dtype_of(cfg.teachers)
    if (cfg.support.name == "topk") != (cfg.support.k is not None):
        raise ConfigError(f"support.k: expected a number with support=topk and null otherwise, got {cfg.support.k}")
    weights = {name: expert.weight for name, expert in cfg.experts.items()}
    if not any(weight > 0 for weight in weights.values()):
        raise ConfigError(f"experts: expected at least one weight above 0, got {weights}; nobody would teach")


def _check_optim(optim: DictConfig) -> None:
    for key in ("lr", "eps", "max_grad_norm"):
        if not optim[key] > 0 or (key != "max_grad_norm" and not math.isfinite(optim[key])):
            raise ConfigError(f"optim.{key}: expected a finite number above 0, got {optim[key]}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas: expected two numbers from 0 to below 1, got {list(optim.betas)}")
    if optim.schedule not in ("cosine", "linear", "constant"):
        raise ConfigError(
            f"optim.schedule: got '{optim.schedule}'; {nearest(optim.schedule, ('cosine', 'linear', 'constant'))}"
        )
    if not 0 <= optim.final_lr_fraction <= 1:
        raise ConfigError(f"optim.final_lr_fraction: expected a number from 0 to 1, got {optim.final_lr_fraction}")


def validate(cfg: DictConfig) -> None:
    """Runs every check that needs no model: call it right after composition, before anything is written."""
    check_keys(cfg)
    check_components(cfg)
    check_run(cfg)
    check_support(cfg)
    check_learning(cfg)
