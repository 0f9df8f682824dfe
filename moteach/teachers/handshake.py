"""The first words with a server: which teacher it serves, what it can say, and whether it speaks of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from moteach.errors import IncompatibleTeacherError, UnknownChoiceError, nearest
from moteach.teachers.http import HttpClient, RefusedError, Reply, Request, UnreadableError
from moteach.teachers.wire import Row, completion_request, exact_request, hidden_request

_CHUNK_IDS = 4096
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a server answered when it was asked."""

    prompt_logprobs: bool
    exact_ids: bool
    hidden_size: int | None
    """Size of the hidden states it gives; None when it gives none."""
    max_model_len: int | None


def handshake(client: HttpClient, probe: Row, *, dtype: str) -> Capabilities:
    """Asks a server for its models, then puts each kind of question once and sees which it refuses.

    Args:
        client: Asks the server.
        probe: Three tokens, of which the last two are graded.
        dtype: Precision of hidden states on the wire.

    Raises:
        TeacherUnavailableError: It does not answer.
        UnknownChoiceError: It does not know the teacher's name.
        IncompatibleTeacherError: Its hidden states are normalised, or its logprobs are none.
    """
    length = client.ask({0: Request(path="/v1/models", read=partial(_read_models, probe))})[0]
    states = _offered(client, hidden_request(probe, hidden_size=None, dtype=dtype))
    said = None if states is not None else _offered(client, completion_request(probe, k=0))
    exact = None if said is None else _offered(client, exact_request(probe, torch.tensor([[0], [0]])))
    norms = torch.zeros(0) if states is None else states.float().norm(dim=1)
    if len(norms) and bool(((norms - 1).abs() < 1e-3).all()):
        raise IncompatibleTeacherError(
            f"expected the hidden states of the teacher '{probe.teacher_id}' as they are, got states of norm 1; its logits "
            "would be almost uniform: start its server with --pooler-config "
            '\'{"task":"token_embed","use_activation":false}\''
        )
    return Capabilities(
        prompt_logprobs=said is not None,
        exact_ids=exact is not None,
        hidden_size=None if states is None else states.shape[1],
        max_model_len=length,
    )


def check_vocabulary(client: HttpClient, probe: Row, tokenizer: Any) -> None:
    """Has the server write out every id of the student's vocabulary and compares the text with the student's own.

    Args:
        client: Asks the server.
        probe: Names the teacher.
        tokenizer: The student's.

    Raises:
        IncompatibleTeacherError: Some ids stand for another text, or for none.
    """
    for start in range(0, len(tokenizer), _CHUNK_IDS):
        ids = list(range(start, min(start + _CHUNK_IDS, len(tokenizer))))
        request = Request(path="/detokenize", body={"model": probe.model, "tokens": ids}, read=_read_text)
        try:
            theirs = client.ask({0: request})[0]
        except RefusedError as error:
            theirs = f"a refusal ({error})"
        mine = str(tokenizer.decode(ids))
        if theirs != mine:
            place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), 0)
            raise IncompatibleTeacherError(
                f"expected the teacher '{probe.teacher_id}' to have the student's vocabulary, got another text for the ids "
                f"from {ids[0]} to {ids[-1]} (student {mine[place : place + 20]!r}, teacher "
                f"{theirs[place : place + 20]!r}); it would grade another text. It needs alignment=bytes (with "
                "support=sampled) and its own tokenizer by 'tokenizer:' on the card"
            )


def _offered(client: HttpClient, request: Request[T]) -> T | None:
    """The answer to a probe, or None when the server refuses that kind of question."""
    try:
        return client.ask({0: request})[0]
    except RefusedError:
        return None


def _read_models(probe: Row, reply: Reply) -> int | None:
    """The longest sequence the server takes, when it is said."""
    cards = reply.json().get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise UnreadableError("no list of models")
    names = [str(card.get("id")) for card in cards]
    if probe.model not in names:
        raise UnknownChoiceError(
            f"expected the server of the teacher '{probe.teacher_id}' to serve '{probe.model}', got others; "
            f"{nearest(probe.model, names)}. Set 'served_name:' on its card"
        )
    lengths = [card["max_model_len"] for card in cards if isinstance(card.get("max_model_len"), int)]
    return min(lengths) if lengths else None


def _read_text(reply: Reply) -> str:
    text = reply.json().get("prompt")
    if not isinstance(text, str):
        raise UnreadableError("no text")
    return text
