"""The student's weights under the names that a checkpoint of the plain model has, one part after the other.

Where weights are put together for the transfer, a part is a decoder layer, or a tensor outside of them: however large the
student, a rank holds one part at once. A student that lies here whole is one part, as nothing of it is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    tied = dict(student.named_parameters(remove_duplicate=False)).keys() - dict(student.named_parameters()).keys()
    layers = adapted_layers(student)
    names = [name for name in state if name not in tied and name.partition(".lora_")[0] not in layers]
    made = bool(layers) or is_cut(student)
    for group in _grouped(names, units=_units(student)) if made else [names]:
        part = {}
        for name in group:
            owner, inside, end = name.partition(".base_layer.")
            layer = layers.get(owner) if inside else None
            value = _whole(state[name], layer if end == "weight" else None)
            if keep:
                part[name if layer is None else f"{owner}.{end}"] = value.cpu()
            del value
        yield part
        part.clear()


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
