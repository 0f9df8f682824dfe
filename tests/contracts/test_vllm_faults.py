"""Everything a server can do wrong: no sample is lost, none is graded by the wrong teacher, and the counts are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM
from test_vllm_contract import BATCH, CLOSE, teacher

from moteach.errors import (
    ConfigError,
    DeadTeacherError,
    IncompatibleTeacherError,
    MoteachError,
    TeacherUnavailableError,
)
from moteach.teachers.hf import HFTeacher
from moteach.teachers.pool import TeacherPool
from moteach.teachers.vllm import VLLMTeacher
from moteach.testing import tiny_model
from moteach.types import Routing, Support

ROWS = 4
"""Rows of the batch with a trained token, each of them one request."""

PASSING = ["timeout", "slow_loris", "slow_headers", "429", "500", "503", "reset", "closed", "cut"]
DAMAGED = ["truncated_json", "wrong_length", "wrong_ids", "wrong_token", "no_choice", "list"]
DEAD = ["nan", "null", "minus_infinity", "clamped"]
FOREIGN = ["other_vocabulary", "other_model", "logits"]
REFUSED = {"redirect": "not followed", "401": "MOTEACH_TEACHER_API_KEY", "huge": "at most 200000 bytes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("one", "two")):
        tiny_model(seed=seed + 2, scale=3.0).save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def local(folder: Path) -> HFTeacher:
    return HFTeacher(teacher_id="one", model=str(folder / "one"))


@pytest.fixture
def server(local: HFTeacher) -> Iterator[FakeVLLM]:
    with FakeVLLM(local.model) as fake:
        yield fake


def ready(fake: FakeVLLM, **settings: Any) -> VLLMTeacher:
    """A teacher that has met its server; its counts start at zero."""
    one = teacher(fake, **settings)
    assert one.supports
    one.lap()
    return one


def same(one: VLLMTeacher, local: HFTeacher, support: Support = "topk", k: int | None = 6) -> None:
    mine, theirs = (each.score(BATCH, support=support, k=k) for each in (one, local))
    assert mine.tokens.tolist() == list(range(BATCH.num_tokens))
    torch.testing.assert_close(mine.sampled_logprobs, theirs.sampled_logprobs, **CLOSE)
    if support == "topk":
        assert torch.equal(mine.topk_ids, theirs.topk_ids)
        torch.testing.assert_close(mine.topk_logprobs, theirs.topk_logprobs, **CLOSE)


@pytest.mark.parametrize("fault", [*PASSING, *DAMAGED])
def test_a_passing_fault_costs_a_retry_and_nothing_else(server: FakeVLLM, local: HFTeacher, fault: str) -> None:
    one = ready(server, timeout=1.5 if fault in ("timeout", "slow_loris", "slow_headers") else 60.0)
    server.faults = [fault, fault]
    same(one, local)
    counts = one.lap()
    assert (counts["requests"], counts["retries"], counts["failures"]) == (ROWS + 2, 2, 0)
    assert counts["seconds"] > 0
    assert one.lap()["requests"] == 0


@pytest.mark.parametrize("fault", [*PASSING, *DAMAGED])
def test_a_fault_that_stays_ends_in_one_error_and_no_evidence(server: FakeVLLM, fault: str) -> None:
    one = ready(server, timeout=0.3, attempts=2, concurrency=1)
    server.always = fault
    with pytest.raises(TeacherUnavailableError, match=r"teacher 'one' at http.*\(2 attempts\); no row was graded"):
        one.score(BATCH, support="topk", k=6)
    counts = one.lap()
    assert counts["failures"] == 1
    assert counts["retries"] >= 1


@pytest.mark.parametrize("fault", [*DEAD, *FOREIGN, *REFUSED])
def test_what_would_be_repeated_is_not_repeated(server: FakeVLLM, local: HFTeacher, fault: str) -> None:
    one = ready(server, concurrency=1, max_response_bytes=200_000)
    server.faults = [fault]
    kind = DeadTeacherError if fault in DEAD else IncompatibleTeacherError if fault in FOREIGN else ConfigError
    with pytest.raises(kind, match=REFUSED.get(fault, "teacher 'one'")):
        one.score(BATCH, support="topk", k=6)
    counts = one.lap()
    assert (counts["retries"], counts["failures"]) == (0, 0)
    same(one, local)


@pytest.mark.parametrize("fault", ["cut_states", "no_metadata", "500", "reset"])
def test_damaged_hidden_states_cost_a_retry(local: HFTeacher, folder: Path, fault: str) -> None:
    with FakeVLLM(local.model, pooling=True) as fake:
        one = ready(fake, model=str(folder / "one"))
        fake.faults = [fault]
        same(one, local)
        assert one.lap()["retries"] == 1


@pytest.mark.parametrize(
    ("fault", "kind"), [("nan_states", DeadTeacherError), ("other_model", IncompatibleTeacherError)]
)
def test_hidden_states_of_nobody_are_never_used(
    local: HFTeacher, folder: Path, fault: str, kind: type[MoteachError]
) -> None:
    with FakeVLLM(local.model, pooling=True) as fake:
        one = ready(fake, model=str(folder / "one"))
        fake.faults = [fault]
        with pytest.raises(kind, match="teacher 'one'"):
            one.score(BATCH, support="full")
        same(one, local)


@pytest.mark.parametrize("fault", ["bad_npy", "wrong_ids_of_exact", "500"])
def test_damaged_scores_of_chosen_ids_cost_a_retry(server: FakeVLLM, local: HFTeacher, fault: str) -> None:
    one = ready(server)
    ids = torch.arange(5).repeat(BATCH.num_tokens, 1)
    clean = one.score_ids(BATCH, ids)
    one.lap()
    server.faults = [fault]
    assert torch.equal(one.score_ids(BATCH, ids).topk_logprobs, clean.topk_logprobs)
    assert one.lap()["retries"] == 1


def test_two_teachers_under_fire_each_grade_their_own_rows(server: FakeVLLM, folder: Path) -> None:
    two = HFTeacher(teacher_id="two", model=str(folder / "two"))
    rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    weights = torch.tensor(rows)
    routing = Routing(
        teacher_ids=("one", "two"),
        prompt_ids=tuple(one.prompt.prompt_id for one in BATCH.rollouts),
        weights=weights,
        confidence=weights.max(dim=1).values,
        abstained=weights.sum(dim=1) == 0,
    )
    with FakeVLLM(two.model, name="two") as other:
        served = [ready(server), ready(other, teacher_id="two")]
        pool = TeacherPool(served)
        server.faults = ["500", "wrong_ids", "reset"]
        other.faults = ["truncated_json", "429", "wrong_length", "closed"]
        evidence = pool.score(BATCH, routing, support="topk", k=6)
    direct = TeacherPool([HFTeacher(teacher_id="one", model=str(folder / "one")), two])
    expected = direct.score(BATCH, routing, support="topk", k=6)
    for mine, theirs in zip(evidence.teachers, expected.teachers, strict=True):
        assert mine.teacher_id == theirs.teacher_id
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.topk_ids, theirs.topk_ids)
        torch.testing.assert_close(mine.topk_logprobs, theirs.topk_logprobs, **CLOSE)
    counts = pool.lap()
    assert (counts["teacher_http/one/requests"], counts["teacher_http/one/retries"]) == (2 + 3, 3)
    assert (counts["teacher_http/two/requests"], counts["teacher_http/two/retries"]) == (3 + 4, 4)
    assert counts["teacher_http/one/failures"] == counts["teacher_http/two/failures"] == 0


def test_a_server_that_keeps_failing_is_left_alone_until_it_may_try_again(server: FakeVLLM, local: HFTeacher) -> None:
    one = ready(server, attempts=2, concurrency=1, breaker_failures=2, breaker_cool_down=1000.0)
    now = [0.0]
    one._client.breaker._clock = lambda: now[0]
    server.always = "500"
    for _ in range(2):
        with pytest.raises(TeacherUnavailableError, match="status 500"):
            one.score(BATCH, support="sampled")
    asked = len(server.seen)
    with pytest.raises(TeacherUnavailableError, match="breaker open for 1000 s more"):
        one.score(BATCH, support="sampled")
    assert len(server.seen) == asked
    counts = one.lap()
    assert (counts["failures"], counts["breaker_open"]) == (3, 1)
    now[0] = 1001.0
    with pytest.raises(TeacherUnavailableError, match=r"\(1 attempts\)"):
        one.score(BATCH, support="sampled")
    now[0] = 2002.0
    server.always = None
    same(one, local)
    assert one.lap()["breaker_open"] == 0


def test_a_call_has_a_deadline_whatever_its_attempts_are_allowed(server: FakeVLLM) -> None:
    one = ready(server, timeout=60.0, deadline=0.5)
    server.always = "timeout"
    with pytest.raises(TeacherUnavailableError, match=r"deadline of 0\.5 s"):
        one.score(BATCH, support="sampled")


def test_a_run_that_waits_asks_only_for_what_is_missing(server: FakeVLLM, local: HFTeacher) -> None:
    one = ready(server, wait=60.0, attempts=1, concurrency=1)
    server.scored.clear()
    # two answers, then down; the server is well again when it is asked how it is
    server.faults = ["", "", "503"]
    same(one, local)
    assert len(server.scored) == len(set(server.scored)) == ROWS
    counts = one.lap()
    assert (counts["requests"], counts["waits"], counts["failures"]) == (ROWS + 1 + 1, 1, 0)


def test_waiting_ends(server: FakeVLLM) -> None:
    one = ready(server, wait=0.3, attempts=1)
    server.always = "503"
    with pytest.raises(TeacherUnavailableError):
        one.score(BATCH, support="sampled")
    assert one.lap()["failures"] == 1


def test_nobody_at_the_address_is_said_in_one_line() -> None:
    one = VLLMTeacher(teacher_id="one", url="http://127.0.0.1:9", attempts=1)
    with pytest.raises(TeacherUnavailableError, match=r"teacher 'one' at http://127\.0\.0\.1:9, got ConnectError"):
        one.score(BATCH, support="sampled")


def test_a_redirect_sends_nothing_to_its_target(server: FakeVLLM, local: HFTeacher) -> None:
    one = ready(server)
    with FakeVLLM(local.model) as target:
        server.faults = ["redirect"]
        with pytest.raises(ConfigError, match="a redirect to"):
            one.score(BATCH, support="sampled")
        assert target.seen == []
