"""A gate from its config node; one that composes another is given the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moteach.config.build import build
from moteach.errors import ConfigError, nearest
from moteach.paths import conf_dir
from moteach.routing.base import Gate


def build_gate(node: DictConfig | Mapping[str, Any], *, seed: int = 0, tokenizer: Any = None) -> Gate:
    """Makes a gate.

    A node with `inner` names another option of the group, whose arguments `inner_arguments` changes; that gate is made first.

    Args:
        node: `_target_` and arguments.
        seed: What `${seed}` stands for in the YAML of an inner gate.
        tokenizer: The student's, for a gate that reads text.

    Raises:
        ConfigError: There is no such inner gate, it composes another one, or it has no such argument.
    """
    given: dict[str, Any] = {}
    if tokenizer is not None:
        given["tokenizer_decode"] = lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))
    if (inner := node.get("inner")) is not None:
        made = build_gate(_inner(str(inner), node.get("inner_arguments") or {}, seed), seed=seed, tokenizer=tokenizer)
        given["gate"] = made
    gate: Gate = build(node, where="gate", **given)
    return gate


def _inner(name: str, arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    files = {path.stem: path for path in (conf_dir() / "gate").glob("*.yaml")}
    if name not in files:
        raise ConfigError(f"gate.inner: there is no option '{name}'; {nearest(name, files)}")
    whole = OmegaConf.create({"seed": seed, "gate": OmegaConf.load(files[name])})
    found = OmegaConf.to_container(whole, resolve=True)
    assert isinstance(found, dict)
    inner: dict[str, Any] = {str(key): value for key, value in found["gate"].items()}
    if "inner" in inner:
        raise ConfigError(
            f"gate.inner: expected a gate that decides by itself, got '{name}', which composes another one"
        )
    for key, value in arguments.items():
        if key not in inner or key == "_target_":
            valid = [option for option in inner if option != "_target_"]
            raise ConfigError(f"gate.inner_arguments: '{name}' has no argument '{key}'; {nearest(str(key), valid)}")
        inner[str(key)] = value
    return inner
