"""The only caller of Hydra's instantiate, behind an allow-list of modules."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

import hydra.utils
from omegaconf import DictConfig, OmegaConf

from moteach.errors import ConfigError, nearest

ALLOWED_PREFIXES = ("moteach.",)
"""Module prefixes a `_target_` may resolve to; installed packages add theirs by an entry point of `moteach.components`."""


@lru_cache(maxsize=1)
def allowed_prefixes() -> tuple[str, ...]:
    """Returns the shipped prefixes and those that installed packages declare (`moteach.components: name = package`)."""
    declared = tuple(f"{entry.value.split(':')[0]}." for entry in entry_points(group="moteach.components"))
    return ALLOWED_PREFIXES + declared


def resolve_target(target: str, *, where: str) -> type:
    """Imports the class that a `_target_` names and checks the module it was really defined in.

    Args:
        target: Dotted path of a class.
        where: Config key, for messages.

    Raises:
        ConfigError: When the path is outside the allow-list, does not exist, or is not a class defined there.
    """
    module_name, _, name = target.rpartition(".")
    if not f"{module_name}.".startswith(allowed_prefixes()):
        raise ConfigError(
            f"{where}._target_: expected a class below {', '.join(allowed_prefixes())}, got '{target}'; a config could run "
            "any code otherwise. Declare your package under the entry point group 'moteach.components'"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{where}._target_: there is no module '{module_name}' ({error})") from error
    cls = getattr(module, name, None)
    if cls is None:
        members = vars(module).items()
        classes = [key for key, value in members if inspect.isclass(value) and value.__module__ == module_name]
        raise ConfigError(f"{where}._target_: '{module_name}' has no '{name}'; {nearest(name, classes)}")
    if not inspect.isclass(cls) or not f"{cls.__module__}.".startswith(allowed_prefixes()):
        raise ConfigError(
            f"{where}._target_: expected a class defined below {', '.join(allowed_prefixes())}, got '{target}', which is "
            f"{type(cls).__name__} of {getattr(cls, '__module__', 'an unknown module')}"
        )
    return cls


def constructor_parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """Returns the named parameters of a component's constructor."""
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in inspect.signature(cls).parameters.items() if p.kind not in open_ended}


def build(node: DictConfig | Mapping[str, Any], *, where: str, **given: Any) -> Any:
    """Makes the object a component node describes.

    Args:
        node: `_target_` and keyword arguments.
        where: Config key of the node, for messages.
        **given: Objects offered to the constructor; those it does not take are left out.

    Raises:
        ConfigError: When the target is refused.
    """
    raw = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    if not isinstance(raw, dict) or not isinstance(raw.get("_target_"), str):
        raise ConfigError(f"{where}: expected a mapping with a '_target_', got {raw!r}")
    arguments: dict[str, Any] = {str(key): value for key, value in raw.items()}
    _refuse_nested_targets(arguments, where)
    cls = resolve_target(arguments["_target_"], where=where)
    accepted = constructor_parameters(cls)
    offered = {key: value for key, value in given.items() if key in accepted}
    plain = _whole_to_float(cls, {key: value for key, value in arguments.items() if key != "_target_"})
    # Objects are handed over outside of Hydra, which would turn those that are dataclasses into plain mappings.
    make = hydra.utils.instantiate({"_target_": arguments["_target_"], "_convert_": "all", "_partial_": True, **plain})
    return make(**offered)


def _whole_to_float(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Turns `temperature=1` into the 1.0 that the constructor is annotated with."""
    constructor = vars(cls).get("__init__")
    hints = typing.get_type_hints(constructor) if constructor is not None else {}
    taken = {key: typing.get_args(hint) or (hint,) for key, hint in hints.items()}
    return {
        key: float(value) if type(value) is int and float in taken.get(key, ()) and int not in taken[key] else value
        for key, value in arguments.items()
    }


def _refuse_nested_targets(arguments: dict[str, Any], where: str) -> None:
    """A component is flat: anything Hydra would instantiate inside its arguments is refused."""
    pending = [(where, value) for key, value in arguments.items() if key != "_target_"]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            bad = [key for key in value if isinstance(key, str) and key.startswith("_") and key.endswith("_")]
            if bad:
                raise ConfigError(
                    f"{path}: expected plain values, got a nested '{bad[0]}'; it would run code from data"
                )
            pending.extend((path, child) for child in value.values())
        elif isinstance(value, list):
            pending.extend((path, child) for child in value)
    reserved = [key for key in arguments if key.startswith("_") and key.endswith("_") and key != "_target_"]
    if reserved:
        raise ConfigError(f"{where}: expected only '_target_' and arguments, got '{reserved[0]}'")
