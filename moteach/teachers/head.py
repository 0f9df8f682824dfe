"""The output layer of a checkpoint alone: what rebuilds logits from hidden states that came from elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moteach.catalogue.modeling import body_and_head, check_weights, load_causal_lm
from moteach.catalogue.packaged import resolve_location
from moteach.errors import ConfigError
from moteach.types import Head

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_head(path: str, *, revision: str | None = None, dtype: str = "float32") -> Head:
    """Reads the head of a causal language model; of a local folder no other tensor is read.

    Args:
        path: Folder, hub id (the whole model is then loaded once, and dropped) or `package:NAME`.
        revision: Commit of the hub repository.
        dtype: `float32`, `bfloat16` or `auto` (as saved).

    Raises:
        ConfigError: It is no causal language model in safetensors, or has no linear output layer.
        MissingFileError: The folder does not exist or holds no weights.
    """
    path = resolve_location(path)
    head = _from_folder(Path(path), dtype) if check_weights(path) else None
    if head is None:
        _, head = body_and_head(load_causal_lm(path, revision=revision, dtype=dtype))
    bias = None if head.bias is None else head.bias.detach().clone()
    return dataclasses.replace(head, weight=head.weight.detach().clone(), bias=bias)


def _from_folder(folder: Path, dtype: str) -> Head | None:
    """Finds the head by the names its parameters have in the model; None when they are saved under other names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a causal language model at '{folder}', got: {error}") from error
    _, head = body_and_head(model)
    weight = _read(folder, _names(model, head.weight), dtype)
    bias = None if head.bias is None else _read(folder, _names(model, head.bias), dtype)
    if weight is None or weight.shape != head.weight.shape or (head.bias is not None and bias is None):
        return None
    return dataclasses.replace(head, weight=weight, bias=bias)


def _names(model: Any, wanted: Tensor) -> list[str]:
    """Every name of a parameter: a head that is tied to the embeddings is saved under theirs."""
    model.tie_weights()
    output = model.get_output_embeddings()
    mine = output.weight if wanted.ndim == 2 else output.bias
    return [name for name, value in model.named_parameters(remove_duplicate=False) if value is mine]


def _read(folder: Path, names: list[str], dtype: str) -> Tensor | None:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                if name in tensors.keys():  # noqa: SIM118 - not a mapping
                    value: Tensor = tensors.get_tensor(name)
                    return value if dtype == "auto" else value.to(_DTYPES[dtype])
    return None
