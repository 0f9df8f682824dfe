"""What goes over the wire to a vLLM server (0.32) and how its answers are read and checked: token ids in, numbers out.

Three forms of answer, one request a row:

- `POST /v1/completions` with `prompt_logprobs=k`: for each position the logprob of the written token and the k likeliest;
- `POST /inference/v1/generate` with `prompt_logprob_token_ids`: logprobs of ids the caller chose, as a base64 `.npy`;
- `POST /pooling` with `task=token_embed`: the last hidden states, as raw bytes.

None of them carries a temperature: the server ignores it for prompt logprobs. An answer is used only when it is about the
tokens that were sent and comes from the model that was asked.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.errors import IncompatibleTeacherError
from moteach.teachers.http import Reply, Request, UnreadableError
from moteach.teachers.scoring import dead

CLAMPED = -9999.0
"""What the server writes in the place of minus infinity (`clamp_prompt_logprobs`)."""

_ROUNDING = 1e-3
_EMBED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The tokens of one row and which of them are graded, for one server."""

    teacher_id: str
    model: str
    """Name the server knows the teacher by."""
    ids: tuple[int, ...]
    """Up to the last graded token."""
    graded: tuple[int, ...]
    """Positions of the graded tokens, ascending, none of them 0."""
    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class RowLogprobs:
    """What the server said about the graded tokens of a row."""

    sampled: Float[Tensor, " scored"]
    topk_ids: Int[Tensor, "scored k"] | None = None
    topk: Float[Tensor, "scored k"] | None = None


def completion_request(row: Row, *, k: int) -> Request[RowLogprobs]:
    """Asks for the logprob of each written token, and with k > 0 for the k likeliest tokens beside it."""
    body = {
        "model": row.model,
        "prompt": list(row.ids),
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": k,
        "return_token_ids": True,
        "add_special_tokens": False,
        "stream": False,
    }
    return Request(path="/v1/completions", body=body, read=lambda reply: _read_completion(reply.json(), row, k))


def exact_request(row: Row, columns: Int[Tensor, "scored k"]) -> Request[RowLogprobs]:
    """Asks for the logprobs of chosen ids at each graded token, and of the written token beside them."""
    start = row.graded[0] - 1
    wanted = [[row.ids[position]] for position in range(start + 1, len(row.ids))]
    for position, ids in zip(row.graded, columns.tolist(), strict=True):
        wanted[position - start - 1] = [row.ids[position], *ids]
    parameters = {
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprob_token_ids": wanted,
        "prompt_logprob_start": start,
    }
    body = {
        "model": row.model,
        "token_ids": list(row.ids),
        "sampling_params": parameters,
        "return_token_ids": True,
        "stream": False,
    }
    shape = (len(wanted), columns.shape[1] + 1)
    return Request(
        path="/inference/v1/generate", body=body, read=lambda reply: _read_exact(reply.json(), row, columns, shape)
    )


def hidden_request(row: Row, *, hidden_size: int | None, dtype: str) -> Request[Float[Tensor, "scored hidden"]]:
    """Asks for the last hidden states that predict the graded tokens; the last token itself is not sent."""
    body = {
        "model": row.model,
        "input": [list(row.ids[:-1])],
        "task": "token_embed",
        "use_activation": False,  # True, the default, would divide each state by its norm
        "encoding_format": "bytes",
        "embed_dtype": dtype,
        "endianness": "little",
    }
    return Request(path="/pooling", body=body, read=lambda reply: _read_hidden(reply, row, hidden_size, dtype))


def _read_completion(answer: Mapping[str, Any], row: Row, k: int) -> RowLogprobs:
    check_model(answer.get("model"), row)
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise UnreadableError("an answer without exactly one choice")
    _check_ids(choices[0].get("prompt_token_ids"), row)
    table = choices[0].get("prompt_logprobs")
    if not isinstance(table, list) or len(table) != len(row.ids):
        got = len(table) if isinstance(table, list) else "no"
        raise UnreadableError(f"{got} positions for the {len(row.ids)} tokens that were sent")
    sampled, ids, values = [], [], []
    for position in row.graded:
        entries = _entries(table[position], row)
        if row.ids[position] not in entries:
            raise UnreadableError(f"no logprob of the token that was written at position {position}")
        sampled.append(entries[row.ids[position]])
        if k:
            likeliest = sorted(entries.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
            if len(likeliest) < k:
                raise UnreadableError(f"{len(likeliest)} entries at position {position} where {k} were asked for")
            ids.append([token for token, _ in likeliest])
            values.append([value for _, value in likeliest])
    found = RowLogprobs(
        sampled=torch.tensor(sampled, dtype=torch.float32),
        topk_ids=torch.tensor(ids, dtype=torch.long) if k else None,
        topk=torch.tensor(values, dtype=torch.float32) if k else None,
    )
    check_distribution(found, row)
    return found


def _entries(entry: Any, row: Row) -> dict[int, float]:
    """The logprobs of one position by token id."""
    if not isinstance(entry, dict):
        raise UnreadableError("a position without logprobs")
    found = {}
    for key, said in entry.items():
        if not key.isdecimal() or not isinstance(said, dict) or "logprob" not in said:
            raise UnreadableError(f"an entry '{key[:20]}' that is not the logprob of a token id")
        value = said["logprob"]
        # some encoders write null for NaN
        if value is None or (isinstance(value, float) and not (math.isfinite(value) and value > CLAMPED)):
            raise dead(row.teacher_id, "logprobs")
        if not isinstance(value, float | int) or isinstance(value, bool):
            raise UnreadableError(f"a logprob of type {type(value).__name__}")
        found[int(key)] = float(value)
    return found


def _read_exact(
    answer: Mapping[str, Any], row: Row, columns: Int[Tensor, "scored k"], shape: tuple[int, int]
) -> RowLogprobs:
    check_model(answer.get("model"), row)
    _check_ids(answer.get("prompt_token_ids"), row)
    try:
        raw = base64.b64decode(answer["prompt_token_id_logprobs"], validate=True)
        table = np.load(io.BytesIO(raw), allow_pickle=False)
    except (KeyError, TypeError, ValueError, EOFError, binascii.Error) as error:
        raise UnreadableError(f"no readable 'prompt_token_id_logprobs' ({error})") from error
    if table.shape != shape or table.dtype.kind != "f":
        raise UnreadableError(f"{table.dtype} logprobs of shape {table.shape} where {shape} were asked for")
    graded = torch.tensor(row.graded) - row.graded[0]
    values = torch.from_numpy(np.array(table, dtype=np.float32))[graded]
    if not bool(torch.isfinite(values).all()) or bool((values <= CLAMPED).any()):
        raise dead(row.teacher_id, "logprobs")
    found = RowLogprobs(sampled=values[:, 0], topk_ids=columns, topk=values[:, 1:])
    check_distribution(found, row)
    return found


def _read_hidden(reply: Reply, row: Row, hidden_size: int | None, dtype: str) -> Float[Tensor, "scored hidden"]:
    try:
        said = json.loads(reply.headers["metadata"])
        (item,) = said["data"]
        shape = tuple(int(size) for size in item["shape"])
        sent = item["embed_dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableError(f"no readable header 'metadata' ({error})") from error
    check_model(said.get("model"), row)
    if len(shape) != 2 or shape[0] != len(row.ids) - 1 or sent != dtype:
        raise UnreadableError(f"{sent} states of shape {shape} for {len(row.ids) - 1} tokens in {dtype}")
    if hidden_size is not None and shape[1] != hidden_size:
        raise IncompatibleTeacherError(
            f"expected hidden states of size {hidden_size} (the head's) from the teacher '{row.teacher_id}', got {shape[1]}; "
            "its logits would be of another model: serve the checkpoint that 'model:' of its card names"
        )
    width = torch.tensor([], dtype=_EMBED_DTYPES[dtype]).element_size()
    if len(reply.body) != shape[0] * shape[1] * width:
        raise UnreadableError(f"{len(reply.body)} bytes for states of shape {shape}")
    states = torch.frombuffer(bytearray(reply.body), dtype=_EMBED_DTYPES[dtype]).view(*shape)
    picked = states[torch.tensor(row.graded) - 1]
    if not bool(torch.isfinite(picked).all()):
        raise dead(row.teacher_id, "hidden states")
    return picked


def check_model(said: object, row: Row) -> None:
    """Checks who answered.

    Raises:
        IncompatibleTeacherError: Another model did.
    """
    if said != row.model:
        raise IncompatibleTeacherError(
            f"expected an answer of the model '{row.model}' from the teacher '{row.teacher_id}', got one of '{said}'; rows "
            "would be graded by another teacher: put only replicas of one model behind its address"
        )


def _check_ids(said: object, row: Row) -> None:
    if said != list(row.ids):
        raise UnreadableError("an answer about other tokens than were sent")


def check_distribution(found: RowLogprobs, row: Row) -> None:
    """Checks that the numbers can be logprobs, of ids the student has.

    Raises:
        IncompatibleTeacherError: Their exponentials sum to more than one, or ids lie beyond the student's vocabulary.
    """
    mass = found.sampled.exp() if found.topk is None else torch.maximum(found.sampled.exp(), _mass(found))
    if bool((mass > 1 + _ROUNDING).any()):
        raise IncompatibleTeacherError(
            f"expected logprobs from the teacher '{row.teacher_id}', got numbers whose exponentials sum to "
            f"{float(mass.max()):.3g}; divergences would be of no distribution: start its server with "
            "--logprobs-mode raw_logprobs"
        )
    if found.topk_ids is not None and row.vocab_size is not None and int(found.topk_ids.max()) >= row.vocab_size:
        raise IncompatibleTeacherError(
            f"expected token ids below {row.vocab_size} (the student's vocabulary) from the teacher '{row.teacher_id}', got "
            f"{int(found.topk_ids.max())}; it speaks of tokens the student does not have: choose another teacher, or a "
            "smaller support.k if these are rows of padding"
        )


def _mass(found: RowLogprobs) -> Float[Tensor, " scored"]:
    assert found.topk is not None
    assert found.topk_ids is not None
    distinct = found.topk_ids.sort(dim=1).values.diff(dim=1).ne(0).all(dim=1)
    return torch.where(distinct, found.topk.exp().sum(dim=1), found.topk.exp().amax(dim=1))
