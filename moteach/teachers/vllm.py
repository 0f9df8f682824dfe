r"""A teacher behind a vLLM server, over HTTP: token ids out, scores in; vLLM itself is not imported.

    vllm serve MODEL --max-logprobs 64                                            support sampled, topk
    vllm serve MODEL --max-logprobs 64 --enable-scale-out                         the same, and `score_ids` (GPU)
    vllm serve MODEL --runner pooling --convert embed \
        --pooler-config '{"task":"token_embed","use_activation":false}'           support full, topk, sampled

What a server offers is found out by asking it about three tokens, not from its version. From last hidden states and the head of
`model:`, read on this machine, the whole distribution is rebuilt (DeepSeek-V4, arXiv 2606.19348, section 5.2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.catalogue.urls import LOOPBACK, check_host
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.teachers.breaker import CircuitBreaker
from moteach.teachers.handshake import Capabilities, check_vocabulary, handshake
from moteach.teachers.head import load_head
from moteach.teachers.http import HttpClient, RefusedError, Request
from moteach.teachers.scoring import check_request, evidence_of, fitted, needed_lengths
from moteach.teachers.wire import Row, RowLogprobs, completion_request, exact_request, hidden_request
from moteach.types import Head, RolloutBatch, Support, TeacherEvidence

_PROBE = ((1, 0, 1), (1, 2))
"""Ids that every vocabulary has, and the positions of them that are graded."""


class VLLMTeacher:
    """Scores with a model that a vLLM server holds; the server is asked on first use.

    Args:
        teacher_id: Name of the expert.
        url: Address of the server.
        served_name: Name the server knows the teacher by; None: `teacher_id`.
        model: This machine's copy of what is served, whose head rebuilds the whole distribution; None: support `sampled`
            and `topk` only.
        revision: Commit of a hub `model`.
        dtype: Precision of hidden states on the wire and of the head, `float32` or `bfloat16`; `auto` is `bfloat16`.
        vocab_size: Size of the student's head; the rows of a larger teacher head beyond it are left out.
        chunk_size: Tokens whose logits exist at once, where they are rebuilt here.
        allowed_hosts: Hosts that may be asked.
        concurrency, timeout, deadline, attempts, backoff, max_response_bytes, wait: See `HttpClient`.
        breaker_failures: Failed calls in a row after which the server is left alone for a while.
        breaker_cool_down: Seconds of it.

    Raises:
        ConfigError: The address is not allowed, or a number is out of range.
    """

    def __init__(
        self,
        *,
        teacher_id: str,
        url: str,
        served_name: str | None = None,
        model: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        vocab_size: int | None = None,
        chunk_size: int = 1024,
        allowed_hosts: Sequence[str] = LOOPBACK,
        concurrency: int = 8,
        timeout: float = 120.0,
        deadline: float = 600.0,
        attempts: int = 5,
        backoff: float = 0.5,
        max_response_bytes: int = 1 << 29,
        wait: float = 0.0,
        breaker_failures: int = 3,
        breaker_cool_down: float = 30.0,
    ) -> None:
        check_host(url, allowed_hosts, name=teacher_id)
        self.teacher_id = teacher_id
        self.served_name = served_name or teacher_id
        self._model = model
        self._revision = revision
        self._dtype = "bfloat16" if dtype == "auto" else dtype
        self._vocab_size = vocab_size
        self._chunk_size = chunk_size
        self._client = HttpClient(
            name=teacher_id,
            url=url,
            concurrency=concurrency,
            timeout=timeout,
            deadline=deadline,
            attempts=attempts,
            backoff=backoff,
            max_response_bytes=max_response_bytes,
            wait=wait,
            breaker=CircuitBreaker(failures=breaker_failures, cool_down=breaker_cool_down),
        )

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the server offers, asked once with three tokens.

        Raises:
            TeacherUnavailableError: It does not answer.
            UnknownChoiceError: It does not know the teacher's name.
        """
        return handshake(self._client, self._row(*_PROBE), dtype=self._dtype)

    @property
    def supports(self) -> frozenset[Support]:
        """What the server and the card together can say; asks the server on first use."""
        if self.capabilities.hidden_size is not None:
            return frozenset({"full", "topk", "sampled"} if self._model else ())
        return frozenset({"topk", "sampled"} if self.capabilities.prompt_logprobs else ())

    @cached_property
    def head(self) -> Head:
        """The head of `model`, of the student's number of rows."""
        if self._model is None:
            raise ConfigError(f"expert '{self.teacher_id}': expected 'model:' (a copy of what is served), got none")
        head = load_head(self._model, revision=self._revision, dtype=self._dtype)
        return fitted(head, self._vocab_size, self.teacher_id)

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        """Scores every trained token of these rows, see `moteach.teachers.base.Teacher.score`.

        Raises:
            TeacherUnavailableError: The server did not answer about every row in time.
            ConfigError: It refused, or a row is longer than it accepts.
            IncompatibleTeacherError: Another model answered, or not with logprobs of the student's tokens.
        """
        check_request(self.teacher_id, support, k)
        if support not in self.supports:
            raise UnsupportedCombinationError(self._unsupported(support))
        if self.capabilities.hidden_size is not None:
            return self._from_hidden(rollouts, support, k)
        rows = self._rows(rollouts)
        said = self._client.ask({index: completion_request(row, k=k or 0) for index, row in rows.items()})
        return self._evidence([said[index] for index in rows], support, k or 0)

    def score_ids(self, rollouts: RolloutBatch, ids: Int[Tensor, "packed k"]) -> TeacherEvidence:
        """Scores tokens of the vocabulary that the caller chose, such as the student's own top-k.

        Args:
            rollouts: The rows this teacher was given.
            ids: Ids to score at each trained token, in packed order.

        Returns:
            Evidence of support `topk` whose `topk_ids` are `ids`, in their order; each value is
            log softmax(teacher logits)[id], so the k of a token need not be its likeliest.

        Raises:
            UnsupportedCombinationError: The server gives neither logprobs of chosen ids nor hidden states.
            TeacherUnavailableError: The server did not answer about every row in time.
        """
        k = ids.shape[1]
        if self.capabilities.hidden_size is not None and self._model:
            full = self._from_hidden(rollouts, "full", None)
            assert full.hidden is not None
            return self._gathered(full.hidden, rollouts, ids)
        if not self.capabilities.exact_ids:
            raise UnsupportedCombinationError(
                f"expected a server of the teacher '{self.teacher_id}' that scores chosen ids, got one that does not; the "
                "student's likeliest tokens would be read as impossible. Start it with --enable-scale-out on a GPU "
                "(VLLM_USE_V2_MODEL_RUNNER=1), or as a pooling server with 'model:' on the card"
            )
        rows = self._rows(rollouts)
        requests = {index: exact_request(row, ids[rollouts.token_rows == index]) for index, row in rows.items()}
        said = self._client.ask(requests)
        return self._evidence([said[index] for index in rows], "topk", k)

    def check(self, tokenizer: Any, *, support: Support, k: int | None = None) -> None:
        """Finds, before the first step, what would end the run later or silently go wrong.

        Asks for the wanted support on three tokens, and has the server write out the student's whole vocabulary.

        Raises:
            TeacherUnavailableError: The server does not answer.
            UnsupportedCombinationError: It does not offer the support.
            ConfigError: It refuses so many entries a token.
            IncompatibleTeacherError: Its vocabulary is another one.
        """
        check_request(self.teacher_id, support, k)
        if support not in self.supports:
            raise UnsupportedCombinationError(self._unsupported(support))
        if self.capabilities.hidden_size is None:
            try:
                self._ask(completion_request(self._row(*_PROBE), k=k or 0))
            except RefusedError as error:
                raise ConfigError(f"{error}. With support.k={k}, start the server with --max-logprobs {k}") from error
        elif self.capabilities.hidden_size != self.head.weight.shape[1]:
            self._ask(hidden_request(self._row(*_PROBE), hidden_size=self.head.weight.shape[1], dtype=self._dtype))
        check_vocabulary(self._client, self._row(*_PROBE), tokenizer)

    def lap(self) -> dict[str, float]:
        """Counts of requests, retries, failures, waits, bytes and seconds since the last lap, see `Counts`."""
        return self._client.lap()

    def _row(self, ids: tuple[int, ...], graded: tuple[int, ...]) -> Row:
        return Row(
            teacher_id=self.teacher_id, model=self.served_name, ids=ids, graded=graded, vocab_size=self._vocab_size
        )

    def _rows(self, rollouts: RolloutBatch) -> dict[int, Row]:
        """The rows with a trained token, by their index."""
        limit = self.capabilities.max_model_len
        # a server that writes needs room for the one token it is made to write
        room = None if limit is None else limit - (self.capabilities.hidden_size is None)
        found: dict[int, Row] = {}
        for index, last in enumerate(needed_lengths(rollouts)):
            if last == 0:
                continue
            sent = last if self.capabilities.hidden_size is not None else last + 1
            if room is not None and sent > room:
                raise ConfigError(
                    f"expected at most {room} tokens a row for the teacher '{self.teacher_id}' (its server's limit), got "
                    f"{sent}; start it with --max-model-len {last + 2}, or lower rollout.max_new_tokens"
                )
            ids = tuple(rollouts.input_ids[index, : last + 1].tolist())
            graded = tuple(rollouts.loss_mask[index].nonzero(as_tuple=True)[0].tolist())
            found[index] = self._row(ids, graded)
        return found

    def _from_hidden(self, rollouts: RolloutBatch, support: Support, k: int | None) -> TeacherEvidence:
        head = self.head
        size = head.weight.shape[1]
        rows = self._rows(rollouts)
        said = self._client.ask(
            {index: hidden_request(row, hidden_size=size, dtype=self._dtype) for index, row in rows.items()}
        )
        hidden = torch.cat([head.weight.new_zeros(0, size), *(said[index] for index in rows)])
        return evidence_of(
            hidden,
            head,
            rollouts,
            teacher_id=self.teacher_id,
            support=support,
            k=k,
            chunk_size=self._chunk_size,
        )

    def _gathered(
        self, hidden: Float[Tensor, "packed hidden"], rollouts: RolloutBatch, ids: Int[Tensor, "packed k"]
    ) -> TeacherEvidence:
        from moteach.divergences.projection import project

        values = torch.empty(ids.shape, dtype=torch.float32)
        sampled = torch.empty(len(ids), dtype=torch.float32)
        for start in range(0, len(ids), self._chunk_size):
            chunk = slice(start, start + self._chunk_size)
            logprobs = project(hidden[chunk], self.head).log_softmax(dim=-1)
            values[chunk] = logprobs.gather(1, ids[chunk])
            sampled[chunk] = logprobs.gather(1, rollouts.token_targets[chunk].unsqueeze(1))[:, 0]
        return self._evidence([RowLogprobs(sampled=sampled, topk_ids=ids, topk=values)], "topk", ids.shape[1])

    def _evidence(self, said: Sequence[RowLogprobs], support: Support, k: int) -> TeacherEvidence:
        sampled = torch.cat([torch.zeros(0), *(row.sampled for row in said)])
        ids = [torch.zeros((0, k), dtype=torch.long), *(row.topk_ids for row in said if row.topk_ids is not None)]
        values = [torch.zeros((0, k)), *(row.topk for row in said if row.topk is not None)]
        return TeacherEvidence(
            teacher_id=self.teacher_id,
            support=support,
            tokens=torch.arange(len(sampled)),
            topk_ids=torch.cat(ids) if support == "topk" else None,
            topk_logprobs=torch.cat(values) if support == "topk" else None,
            sampled_logprobs=sampled,
        )

    def _ask(self, request: Request[Any]) -> None:
        self._client.ask({0: request})

    def _unsupported(self, support: Support) -> str:
        offers = ", ".join(sorted(self.supports)) or "nothing this run can use"
        remedy = "choose one of these"
        if support == "full" or not self.supports:
            remedy = (
                "serve it with --runner pooling --convert embed --pooler-config "
                '\'{"task":"token_embed","use_activation":false}\' and name its checkpoint by \'model:\' on the card'
            )
        return (
            f"expected support={support} of the teacher '{self.teacher_id}', whose server and card offer {offers}; {remedy}, "
            "or choose another support"
        )
