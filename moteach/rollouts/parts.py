"""The student's weights under the names that a checkpoint of the plain model has, one part after the other.

Where weights are put together for the transfer, a part is a decoder layer, or a tensor outside of them: however large the
student, a rank holds one part at once. A student that lies here whole is one part, as nothing of it is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moteach.distributed import full, is_sharded


def weight_parts(student: nn.Module, *, keep: bool = True) -> Iterator[dict[str, Tensor]]:
    """Yields parameters and buffers, tied ones once; the student is left as it is, a part is emptied before the next one.

    Sharded tensors are gathered one at a time, together: every rank must iterate to the end. A low-rank update is added to
    the weight it belongs to: W + (alpha / rank) B A (arXiv 2106.09685, section 4.1), tensor by tensor.

    Args:
        student: Causal language model of transformers; some of its layers may be peft's.
        keep: False on a rank that only helps to gather; it gets empty parts.
    """
    # where a shard is whole at the moment, asking for the state cuts it again
    state = student.state_dict()
    for group in _plan(student, state):
        part = {}
        for weight in group:
            value = _whole(state[weight.held], weight.layer)
            if keep:
                part[weight.name] = value
            del value
        yield part
        part.clear()


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightShape:
    """What a weight will be, before it is put together."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def weight_shapes(student: nn.Module) -> list[WeightShape]:
    """Lists what `weight_parts` yields, in its order; gathers nothing."""
    state = student.state_dict()
    return [
        WeightShape(name=weight.name, dtype=state[weight.held].dtype, shape=tuple(state[weight.held].shape))
        for group in _plan(student, state)
        for weight in group
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weight:
    name: str
    """In a checkpoint of the plain model."""
    held: str
    """In this one."""
    layer: Any
    """Holds the low-rank update that is added."""


def _plan(student: nn.Module, state: Mapping[str, Tensor]) -> list[list[_Weight]]:
    tied = dict(student.named_parameters(remove_duplicate=False)).keys() - dict(student.named_parameters()).keys()
    layers = adapted_layers(student)
    held = [name for name in state if name not in tied and name.partition(".lora_")[0] not in layers]
    made = bool(layers) or is_cut(student)
    return [
        [_weight(name, layers) for name in group]
        for group in (_grouped(held, units=_units(student)) if made else [held])
    ]


def _weight(held: str, layers: Mapping[str, Any]) -> _Weight:
    owner, inside, end = held.partition(".base_layer.")
    if not inside or owner not in layers:
        return _Weight(name=held, held=held, layer=None)
    return _Weight(name=f"{owner}.{end}", held=held, layer=layers[owner] if end == "weight" else None)


def adapted_layers(student: nn.Module) -> dict[str, Any]:
    """Returns the layers that peft put a low-rank update into, by name."""
    return {name: module for name, module in student.named_modules() if hasattr(module, "get_delta_weight")}


def is_cut(student: nn.Module) -> bool:
    """Whether this rank holds only a part of some parameter."""
    return any(is_sharded(parameter) for parameter in student.parameters())


def exhaust(parts: Iterable[object]) -> None:
    """Iterates to the end: what is left unread would leave the other ranks waiting for this one."""
    for _ in parts:
        pass


@torch.no_grad()
def _whole(value: Tensor, layer: Any) -> Tensor:
    for adapter in () if layer is None else layer.active_adapters:
        value = (value + layer.get_delta_weight(adapter)).to(value.dtype)
    return full(value).detach()


def _units(student: nn.Module) -> frozenset[str]:
    kept = set(getattr(student, "_no_split_modules", None) or ())
    # FSDP2 puts its own word before the name of the class
    kinds = ((name, type(module).__name__.removeprefix("FSDP")) for name, module in student.named_modules())
    return frozenset(name for name, kind in kinds if kind in kept)


def _grouped(names: Iterable[str], *, units: frozenset[str]) -> list[list[str]]:
    """Names of one unit together, because a checkpoint may store what a layer holds under other names and cuts."""
    groups: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        prefixes = (".".join(words[:count]) for count in range(1, len(words)))
        groups.setdefault(next((prefix for prefix in prefixes if prefix in units), name), []).append(name)
    return list(groups.values())
