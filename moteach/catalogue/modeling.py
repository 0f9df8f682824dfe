"""Opening causal language models safely, and taking them apart into a body and the head of its logits.

Students, teachers and rollout engines use the same three functions, so that a model means the same thing to all of
them.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moteach.catalogue.packaged import resolve_location
from moteach.errors import ConfigError, DeadTeacherError, IncompatibleTeacherError, MissingFileError, nearest
from moteach.types import Head

_DTYPES: dict[str, torch.dtype | str] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}
_SAVED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PROBE_TOKENS = 8


def load_causal_lm(path: str, *, revision: str | None = None, dtype: str = "float32") -> Any:
    """Opens a causal language model from a folder or the hub: safetensors only, no code of the repository.

    Args:
        path: Folder, hub id, or `package:NAME` (see `moteach.catalogue.packaged`).
        revision: Commit of the hub repository.
        dtype: `float32`, `bfloat16` or `auto` (the precision the weights were saved in).

    Raises:
        ConfigError: The precision is unknown, the weights are pickles, or the model needs its own code.
        MissingFileError: The folder does not exist or holds no model.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise ConfigError(f"expected a precision for 'dtype', got '{dtype}'; {nearest(dtype, _DTYPES)}")
    path = resolve_location(path)
    local = check_weights(path)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            revision=None if local else revision,
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected a causal language model in safetensors that runs without code of its own at '{path}', got: "
            f"{_first_line(error)}"
        ) from error


def load_tokenizer(path: str, *, revision: str | None = None) -> Any:
    """Opens the tokenizer saved beside a model.

    Raises:
        MissingFileError: The folder does not exist.
        ConfigError: There is no tokenizer, or it needs its own code.
    """
    from transformers import AutoTokenizer

    path = resolve_location(path)
    local = _is_folder(path)
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=None if local else revision, trust_remote_code=False, local_files_only=local
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a tokenizer at '{path}', got: {_first_line(error)}") from error


def check_weights(path: str) -> bool:
    """Checks that a folder holds safetensors, and says whether the path is a folder at all.

    Raises:
        MissingFileError: The path looks local and does not exist, or the folder has no weights.
        ConfigError: The only weights are pickles.
    """
    path = resolve_location(path)
    if not _is_folder(path):
        return False
    folder = Path(path)
    if any(folder.glob("*.safetensors")):
        return True
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ConfigError(
            f"expected safetensors weights in {folder}, got {', '.join(pickles)}; reading a pickle runs whatever its "
            "author "
            "put in it: convert it where you trust it (model.save_pretrained(folder) writes safetensors)"
        )
    raise MissingFileError(
        f"expected weights (*.safetensors) in {folder}, got none; train or save the model there first"
    )


def weights_bytes(path: str, *, dtype: str = "auto") -> int | None:
    """Counts the bytes a model takes in memory, from the headers of its safetensors files: nothing is loaded.

    Args:
        path: Folder of the model; for a hub id the answer is None.
        dtype: Precision the floating-point tensors will be converted to; `auto` keeps that of the files.
    """
    path = resolve_location(path)
    if not check_weights(path):
        return None
    total = 0
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            saved = _SAVED_BYTES.get(entry["dtype"], 1)
            convert = dtype != "auto" and entry["dtype"] in ("F64", "F32", "F16", "BF16")
            wanted = {"float32": 4, "bfloat16": 2}[dtype] if convert else saved
            total += math.prod(entry["shape"]) * wanted
    return total


def body_and_head(model: Any) -> tuple[nn.Module, Head]:
    """Takes a causal language model apart: the module that makes last hidden states, and the map from them to logits.

    Output scaling is read from the configuration: `logit_scale` multiplies (Cohere), `logits_scaling` divides (Granite,
    MiniCPM) or multiplies (HyperCLOVA X), `lm_head_multiplier` and `output_multiplier` multiply (Falcon-H1, Muse),
    `final_logit_softcapping` caps (Gemma). The tensors of the head are the parameters of the model themselves, so
    call this inside the forward of a sharded model. `check_head` verifies the result.

    Raises:
        ConfigError: The model has no linear output layer.
    """
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(getattr(output, "weight", None), Tensor) or output.weight.ndim != 2:
        raise ConfigError(
            f"expected a model with a linear output layer, got {type(model).__name__}; its logits cannot be rebuilt "
            "from "
            "hidden states: use a causal language model, or a teacher with support=topk behind a server"
        )
    scale, softcap = _output_scaling(model.config)
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(body, nn.Module):
        raise ConfigError(f"expected a model with a body below its head, got {type(model).__name__}")
    bias = getattr(output, "bias", None)
    return body, Head(weight=output.weight, bias=bias, scale=scale, softcap=softcap)


def hidden_states(body: nn.Module, input_ids: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token hidden"]:
    """Runs a body on right-padded ids and returns its last hidden states, the final norm applied.

    The ids are moved to the device of the body. No mask is passed: a causal model does not look at the padding behind a
    token, what it says at the padding is never read, and without a mask attention takes its fastest kernel.
    """
    states: Tensor = body(input_ids=input_ids.to(next(body.parameters()).device), use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def check_head(model: nn.Module, *, name: str) -> None:
    """Checks on a few tokens that the head rebuilt by `body_and_head` gives the logits of the model itself.

    Families differ in what they do between the body and the logits; one that does something unknown here would
    distil, or be distilled from, another distribution than the one it samples from.

    Raises:
        IncompatibleTeacherError: The logits differ by more than rounding.
        DeadTeacherError: The logits are not finite.
    """
    body, head = body_and_head(model)
    device = head.weight.device
    vocab = head.weight.shape[0]
    probe = (torch.arange(_PROBE_TOKENS, device=device) * 7 % vocab).unsqueeze(0)
    training = model.training
    model.eval()
    expected = model(input_ids=probe, use_cache=False).logits[0].float()
    states = hidden_states(body, probe)[0]
    model.train(training)
    rebuilt = _logits(states, head).float()
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 5e-2
    if not bool(torch.isfinite(expected).all()):
        raise DeadTeacherError(
            f"expected finite logits from '{name}', got NaN or infinity; its weights are broken: save it again from its "
            "training run, or load it with dtype=float32"
        )
    same_shape = expected.shape == rebuilt.shape
    if not same_shape or not torch.allclose(expected, rebuilt, rtol=tolerance, atol=tolerance):
        worst = f"{(expected - rebuilt).abs().max():.3g} apart" if same_shape else "their shapes differ"
        raise IncompatibleTeacherError(
            f"expected the logits of '{name}' ({type(model).__name__}) to be its output layer applied to its last "
            "hidden "
            f"states, got others ({worst}); its full distribution cannot be rebuilt: serve it and use support=topk"
        )


def _logits(states: Float[Tensor, "token hidden"], head: Head) -> Float[Tensor, "token vocab"]:
    logits = nn.functional.linear(states, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _output_scaling(config: Any) -> tuple[float, float | None]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= float(getattr(text, key, None) or 1.0)
    scaling = float(getattr(text, "logits_scaling", None) or 1.0)
    scale = scale * scaling if text.model_type.startswith("hyperclovax") else scale / scaling
    softcap = getattr(text, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


def _is_folder(path: str) -> bool:
    place = Path(path)
    if place.is_dir():
        return True
    if place.is_absolute() or path.startswith((".", "~")):
        raise MissingFileError(
            f"expected the folder of a saved model at {place}, got nothing there; train it or correct the path"
        )
    return False


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
