"""What a teacher behind a server says equals what the same model says in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM

from moteach.divergences.projection import project
from moteach.errors import (
    ConfigError,
    DeadTeacherError,
    IncompatibleTeacherError,
    UnknownChoiceError,
    UnsupportedCombinationError,
)
from moteach.teachers.hf import HFTeacher
from moteach.teachers.http import API_KEY
from moteach.teachers.vllm import VLLMTeacher
from moteach.testing import tiny_model, tiny_tokenizer
from moteach.types import Prompt, Rollout, RolloutBatch

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def rollout(row: int, prompt: int, completion: int) -> Rollout:
    ids = torch.randint(2, 60, (prompt + completion,), generator=torch.Generator().manual_seed(row)).tolist()
    return Rollout(
        prompt=Prompt(prompt_id=f"p{row}", text="", token_ids=tuple(ids[:prompt])),
        sample=0,
        completion_ids=tuple(ids[prompt:]),
        rollout_logprobs=(-1.0,) * completion,
        finished=True,
        student_version=0,
    )


BATCH = RolloutBatch.from_rollouts(
    [rollout(0, 3, 5), rollout(1, 9, 1), rollout(2, 2, 0), rollout(3, 4, 17), rollout(4, 1, 6)], pad_id=0
)
EMPTY = BATCH.select([2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "one"
    tiny_model(seed=2, scale=3.0, tied=False).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(folder: Path) -> HFTeacher:
    return HFTeacher(teacher_id="one", model=str(folder), vocab_size=64)


@pytest.fixture
def server(local: HFTeacher) -> Iterator[FakeVLLM]:
    with FakeVLLM(local.model) as fake:
        yield fake


@pytest.fixture
def pooling(local: HFTeacher) -> Iterator[FakeVLLM]:
    with FakeVLLM(local.model, pooling=True) as fake:
        yield fake


def teacher(fake: FakeVLLM, **settings: Any) -> VLLMTeacher:
    return VLLMTeacher(**{"teacher_id": "one", "url": fake.url, "vocab_size": 64, "backoff": 0.0, **settings})


def test_logprobs_of_the_written_tokens_equal_those_in_process(server: FakeVLLM, local: HFTeacher) -> None:
    mine, theirs = (one.score(BATCH, support="sampled") for one in (teacher(server), local))
    assert mine.tokens.tolist() == list(range(BATCH.num_tokens))
    assert mine.sampled_logprobs is not None
    torch.testing.assert_close(mine.sampled_logprobs, theirs.sampled_logprobs, **CLOSE)
    assert mine.topk_ids is None
    # the last row but one has 17 trained tokens; a shift by one would score its prompt
    assert len(server.scored) == 2 + 4
    assert (BATCH.rollouts[3].prompt.token_ids + BATCH.rollouts[3].completion_ids) in server.scored


@pytest.mark.parametrize("k", [1, 6, 64])
def test_the_likeliest_tokens_equal_those_in_process(server: FakeVLLM, local: HFTeacher, k: int) -> None:
    mine, theirs = (one.score(BATCH, support="topk", k=k) for one in (teacher(server), local))
    assert torch.equal(mine.topk_ids, theirs.topk_ids)
    torch.testing.assert_close(mine.topk_logprobs, theirs.topk_logprobs, **CLOSE)
    torch.testing.assert_close(mine.sampled_logprobs, theirs.sampled_logprobs, **CLOSE)


def test_the_whole_distribution_is_rebuilt_from_hidden_states_and_the_head_alone(
    pooling: FakeVLLM, local: HFTeacher, folder: Path
) -> None:
    served = teacher(pooling, model=str(folder))
    assert served.supports == {"full", "topk", "sampled"}
    mine, theirs = (one.score(BATCH, support="full") for one in (served, local))
    assert mine.hidden is not None
    assert mine.head is not None
    assert theirs.hidden is not None
    assert theirs.head is not None
    assert torch.equal(mine.head.weight, theirs.head.weight)
    distributions = [project(one.hidden, one.head).log_softmax(-1) for one in (mine, theirs)]
    torch.testing.assert_close(*distributions, **CLOSE)
    for support, k in (("topk", 6), ("sampled", None)):
        one, other = (each.score(BATCH, support=support, k=k) for each in (served, local))
        torch.testing.assert_close(one.sampled_logprobs, other.sampled_logprobs, **CLOSE)
        if k:
            assert torch.equal(one.topk_ids, other.topk_ids)
            torch.testing.assert_close(one.topk_logprobs, other.topk_logprobs, **CLOSE)


def test_chosen_ids_are_scored_in_their_order_by_both_kinds_of_server(
    server: FakeVLLM, pooling: FakeVLLM, local: HFTeacher, folder: Path
) -> None:
    ids = torch.randint(0, 64, (BATCH.num_tokens, 5), generator=torch.Generator().manual_seed(9))
    full = local.score(BATCH, support="full")
    assert full.hidden is not None
    assert full.head is not None
    distribution = project(full.hidden, full.head).log_softmax(-1)
    for one in (teacher(server), teacher(pooling, model=str(folder), chunk_size=4)):
        said = one.score_ids(BATCH, ids)
        assert torch.equal(said.topk_ids, ids)
        torch.testing.assert_close(said.topk_logprobs, distribution.gather(1, ids), **CLOSE)
        torch.testing.assert_close(
            said.sampled_logprobs, distribution.gather(1, BATCH.token_targets[:, None])[:, 0], **CLOSE
        )


def test_chosen_ids_are_refused_where_the_server_does_not_score_them(local: HFTeacher) -> None:
    with FakeVLLM(local.model, exact=False) as fake:
        one = teacher(fake)
        assert not one.capabilities.exact_ids
        with pytest.raises(UnsupportedCombinationError, match="would be read as impossible"):
            one.score_ids(BATCH, torch.zeros((BATCH.num_tokens, 2), dtype=torch.long))


def test_bfloat16_halves_the_bytes_on_the_wire_and_stays_close(
    pooling: FakeVLLM, local: HFTeacher, folder: Path
) -> None:
    exact, half = (teacher(pooling, model=str(folder), dtype=dtype) for dtype in ("float32", "bfloat16"))
    sizes = []
    for one in (exact, half):
        assert one.supports
        one.lap()
        said = one.score(BATCH, support="full")
        sizes.append(one.lap()["bytes"])
        assert said.hidden is not None
    assert sizes[0] == 2 * sizes[1]
    assert said.hidden.dtype == torch.bfloat16
    assert said.head is not None
    torch.testing.assert_close(
        half.score(BATCH, support="sampled").sampled_logprobs,
        local.score(BATCH, support="sampled").sampled_logprobs,
        rtol=0.05,
        atol=0.15,
    )


def test_rows_without_a_trained_token_are_not_asked(server: FakeVLLM, pooling: FakeVLLM, folder: Path) -> None:
    for fake, settings in ((server, {}), (pooling, {"model": str(folder)})):
        one = teacher(fake, **settings)
        for support in one.supports:
            before = len(fake.scored)
            said = one.score(EMPTY, support=support, k=3 if support == "topk" else None)
            assert len(said.tokens) == 0
            assert len(fake.scored) == before


def test_what_a_server_and_a_card_offer_is_found_out_by_asking(
    server: FakeVLLM, pooling: FakeVLLM, folder: Path
) -> None:
    assert teacher(server).supports == {"topk", "sampled"}
    assert teacher(server, model=str(folder)).supports == {"topk", "sampled"}
    assert teacher(pooling).supports == frozenset()
    with pytest.raises(UnsupportedCombinationError, match=r"offer sampled, topk; serve it with --runner pooling"):
        teacher(server).check(tiny_tokenizer(), support="full")
    with pytest.raises(UnsupportedCombinationError, match="offer nothing this run can use; serve it with"):
        teacher(pooling).score(BATCH, support="sampled")


def test_the_check_before_a_run_passes_a_server_that_fits(server: FakeVLLM, pooling: FakeVLLM, folder: Path) -> None:
    teacher(server).check(tiny_tokenizer(), support="topk", k=64)
    teacher(server).check(tiny_tokenizer(), support="sampled")
    teacher(pooling, model=str(folder)).check(tiny_tokenizer(), support="full")


def test_a_server_of_another_name_is_refused_with_the_names_it_knows(server: FakeVLLM) -> None:
    with pytest.raises(UnknownChoiceError, match=r"to serve 'onne'.*did you mean 'one'.*served_name"):
        teacher(server, served_name="onne").check(tiny_tokenizer(), support="sampled")


def test_more_entries_than_the_server_sends_are_refused_before_the_run(local: HFTeacher) -> None:
    with FakeVLLM(local.model, max_logprobs=20) as fake, pytest.raises(ConfigError, match="--max-logprobs 32"):
        teacher(fake).check(tiny_tokenizer(), support="topk", k=32)


def test_another_vocabulary_is_refused_before_the_run(local: HFTeacher) -> None:
    other = tiny_tokenizer()
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    words = vocabulary["model"]["vocab"]
    words["7"], words["8"] = words["8"], words["7"]
    swapped = type(other)(tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(vocabulary)))
    with (
        FakeVLLM(local.model, tokenizer=swapped) as fake,
        pytest.raises(IncompatibleTeacherError, match=r"student '78.*teacher '87.*grade another text"),
    ):
        teacher(fake).check(tiny_tokenizer(), support="sampled")


def test_normalised_hidden_states_are_refused(local: HFTeacher, folder: Path) -> None:
    with (
        FakeVLLM(local.model, pooling=True, normalised=True) as fake,
        pytest.raises(IncompatibleTeacherError, match="states of norm 1"),
    ):
        teacher(fake, model=str(folder)).check(tiny_tokenizer(), support="full")


def test_hidden_states_of_another_size_than_the_heads_are_refused(pooling: FakeVLLM, tmp_path: Path) -> None:
    tiny_model(hidden=32).save_pretrained(tmp_path / "small")
    one = teacher(pooling, model=str(tmp_path / "small"))
    for ask in (
        lambda: one.check(tiny_tokenizer(), support="full"),
        lambda: one.score(BATCH, support="full"),
    ):
        with pytest.raises(IncompatibleTeacherError, match=r"size 32 \(the head's\).*got 64"):
            ask()


def test_a_row_longer_than_the_server_accepts_is_refused_before_it_is_sent(local: HFTeacher, folder: Path) -> None:
    with FakeVLLM(local.model, max_model_len=21) as fake:
        one = teacher(fake)
        with pytest.raises(ConfigError, match=r"at most 20 tokens a row.*got 21; start it with --max-model-len 22"):
            one.score(BATCH, support="sampled")
    with FakeVLLM(local.model, max_model_len=20, pooling=True) as fake:
        # the last token predicts nothing and is not sent
        teacher(fake, model=str(folder)).score(BATCH, support="full")


def test_the_key_of_the_environment_is_sent_as_bearer_token(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher(server).score(BATCH, support="sampled")
    assert not any("authorization" in {key.lower() for key in headers} for _, headers in server.seen)
    monkeypatch.setenv(API_KEY, "secret")
    teacher(server).score(BATCH, support="sampled")
    assert server.seen[-1][1]["authorization"] == "Bearer secret"


def test_requests_run_side_by_side_within_the_bound(server: FakeVLLM) -> None:
    server.delay = 0.3
    one = teacher(server, concurrency=2)
    one.score(BATCH, support="sampled")
    assert server.most_in_flight == 2


@pytest.mark.parametrize("pooled", [False, True])
def test_dead_scores_name_the_teacher(folder: Path, pooled: bool) -> None:
    dead = tiny_model(seed=2)
    with torch.no_grad():
        dead.get_parameter("model.norm.weight").fill_(float("nan"))
    with FakeVLLM(dead, pooling=pooled) as fake, pytest.raises(DeadTeacherError, match="teacher 'one'"):
        teacher(fake, model=str(folder) if pooled else None).check(tiny_tokenizer(), support="sampled")
