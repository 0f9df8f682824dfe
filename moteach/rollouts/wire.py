"""What goes over the wire to a vLLM server (0.32) that writes completions, and how its answers are read and checked.

`POST /v1/completions` takes token ids and answers with token ids and the logprob of each; everything that a server would
otherwise fill in from the checkpoint's `generation_config` is said, and completions end at the ids that are named here alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import RolloutServerError, UnknownChoiceError, nearest
from moteach.teachers.http import Reply, Request, UnreadableError

_ROUNDING = 1e-3
_CLAMPED = -9999.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a server draws tokens and when a completion ends."""

    model: str
    temperature: float
    top_p: float
    top_k: int
    eos_ids: tuple[int, ...]
    limit: int


@dataclass(frozen=True, kw_only=True)
class Written:
    """One completion."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


def sampling_request(prompt: Sequence[int], sampling: Sampling, *, seed: int) -> Request[Written]:
    """Asks for one completion of token ids."""
    body = {
        "model": sampling.model,
        "prompt": list(prompt),
        "max_tokens": sampling.limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "ignore_eos": True,  # those of the server's checkpoint; ours are named
        "stop_token_ids": list(sampling.eos_ids),
        "logprobs": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
        "stream": False,
    }
    return Request(
        path="/v1/completions", body=body, read=lambda reply: _read_written(reply.json(), list(prompt), sampling)
    )


def scoring_request(ids: Sequence[int], *, model: str) -> Request[Float[Tensor, " token"]]:
    """Asks for the logprob of every token but the first."""
    body = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
        "stream": False,
    }
    return Request(path="/v1/completions", body=body, read=lambda reply: _read_scores(reply.json(), list(ids), model))


def models_request(model: str) -> Request[int | None]:
    """Asks for the longest sequence the server takes, and whether it serves the model."""
    return Request(path="/v1/models", read=lambda reply: _read_models(reply.json(), model))


def control_request(path: str, body: Mapping[str, Any]) -> Request[dict[str, Any]]:
    """Calls one of the routes that a server has with VLLM_SERVER_DEV_MODE=1."""
    return Request(path=path, body=body, read=_read_control)


def version_request() -> Request[str]:
    """Asks which version of the weights the server was last told it has."""
    return Request(path="/weight_info", read=lambda reply: str(reply.json().get("weight_version")))


def world_request() -> Request[dict[str, Any]]:
    """Asks over how many workers the server spreads."""
    return Request(path="/get_world_size?include_dp=true", read=_read_control)


def _read_written(answer: Mapping[str, Any], prompt: list[int], sampling: Sampling) -> Written:
    choice = _choice(answer, prompt, sampling.model)
    ids, said = choice.get("token_ids"), choice.get("logprobs")
    logprobs = said.get("token_logprobs") if isinstance(said, dict) else None
    if not isinstance(ids, list) or not isinstance(logprobs, list) or not 0 < len(ids) == len(logprobs):
        raise UnreadableError("a completion without a token id and a logprob for each token")
    if len(ids) > sampling.limit or not all(isinstance(token, int) for token in ids):
        raise UnreadableError(f"{len(ids)} tokens where at most {sampling.limit} were asked for")
    ends = [token in sampling.eos_ids for token in ids]
    reason = choice.get("finish_reason")
    if any(ends[:-1]) or reason != ("stop" if ends[-1] else "length") or (not ends[-1] and len(ids) < sampling.limit):
        raise UnreadableError(f"a completion of {len(ids)} tokens that ended for the reason '{reason}'")
    return Written(ids=tuple(ids), logprobs=tuple(_logprob(value) for value in logprobs), finished=ends[-1])


def _read_scores(answer: Mapping[str, Any], ids: list[int], model: str) -> Float[Tensor, " token"]:
    table = _choice(answer, ids, model).get("prompt_logprobs")
    if not isinstance(table, list) or len(table) != len(ids):
        raise UnreadableError("no logprobs of the tokens that were sent")
    try:
        found = [_logprob(entry[str(token)]["logprob"]) for entry, token in zip(table[1:], ids[1:], strict=True)]
    except (KeyError, TypeError) as error:
        raise UnreadableError(f"no logprob of a token that was sent ({error!r})") from error
    return torch.tensor(found, dtype=torch.float32)


def _choice(answer: Mapping[str, Any], prompt: list[int], model: str) -> dict[str, Any]:
    if answer.get("model") != model:
        raise RolloutServerError(
            f"expected an answer of the model '{model}', got one of '{answer.get('model')}'; the student would learn from "
            "what another model wrote: put only replicas of the student behind rollout.url"
        )
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise UnreadableError("an answer without exactly one choice")
    if choices[0].get("prompt_token_ids") != prompt:
        raise UnreadableError("an answer about other tokens than were sent")
    return choices[0]


def _logprob(value: object) -> float:
    if not isinstance(value, float | int) or isinstance(value, bool) or not math.isfinite(value):
        raise UnreadableError(f"the logprob {value}")
    if not _CLAMPED < value <= _ROUNDING:
        raise RolloutServerError(
            f"expected logprobs from the rollout server, got {value}; importance ratios would be noise. Start it with "
            "--logprobs-mode processed_logprobs"
        )
    return min(float(value), 0.0)


def _read_models(answer: Mapping[str, Any], model: str) -> int | None:
    cards = answer.get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise UnreadableError("no list of models")
    names = [str(card.get("id")) for card in cards]
    if model not in names:
        raise UnknownChoiceError(
            f"rollout.served_name: expected the server to serve '{model}', got others; {nearest(model, names)}"
        )
    lengths = [card["max_model_len"] for card in cards if isinstance(card.get("max_model_len"), int)]
    return min(lengths) if lengths else None


def _read_control(reply: Reply) -> dict[str, Any]:
    return reply.json() if reply.body.strip() else {}
