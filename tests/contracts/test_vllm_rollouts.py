"""Completions of a server mean what those of this process mean; a server with other weights than the student's is caught."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_rollouts import FakeRollouts

from moteach.errors import ConfigError, DataError, RolloutServerError, UnsupportedCombinationError, WeightSyncError
from moteach.rollouts.base import RolloutEngine
from moteach.rollouts.decoding import generation_mode
from moteach.rollouts.probe import token_logprobs
from moteach.rollouts.sampling import keyed_seeds, truncate
from moteach.rollouts.vllm import VLLMEngine
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer

PROMPTS = tiny_prompts(["1+1=", "abc", "reverse xyz: "])


@pytest.fixture
def student() -> Any:
    return tiny_model(seed=3, scale=2.0)


@pytest.fixture
def server(student: Any) -> Iterator[FakeRollouts]:
    with FakeRollouts(student) as fake:
        yield fake


def engine(fake: FakeRollouts, student: Any, **settings: Any) -> VLLMEngine:
    given = {"url": fake.url, "max_new_tokens": 6, "backoff": 0.0, "attempts": 2, "check_tokens": 16, **settings}
    return VLLMEngine(**given).bind(student, tiny_tokenizer())


def nudged(student: Any, by: float) -> Any:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return student


def written(batch: Any) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(r.prompt.prompt_id, r.sample): r.completion_ids for r in batch.rollouts}


def test_greedy_completions_and_logprobs_are_those_of_this_process(server: FakeRollouts, student: Any) -> None:
    served = engine(server, student)
    assert isinstance(served, RolloutEngine)
    mine = served.generate(PROMPTS, step=0, group_size=2, temperature=0.0)
    theirs = served.local.bind(student, tiny_tokenizer()).generate(PROMPTS, step=0, group_size=2, temperature=0.0)
    for left, right in zip(mine.rollouts, theirs.rollouts, strict=True):
        assert (left.prompt, left.sample, left.completion_ids) == (right.prompt, right.sample, right.completion_ids)
        assert (left.finished, left.student_version) == (right.finished, right.student_version)
        assert left.rollout_logprobs == pytest.approx(right.rollout_logprobs, abs=1e-5)


def test_logprobs_are_those_of_the_tempered_and_truncated_sampler(server: FakeRollouts, student: Any) -> None:
    batch = engine(server, student, temperature=0.5, top_p=0.8, top_k=9).generate(PROMPTS, step=1, group_size=3)
    for rollout in batch.rollouts:
        ids = [*rollout.prompt.token_ids, *rollout.completion_ids]
        start = len(rollout.prompt.token_ids)
        logits = student(input_ids=torch.tensor([ids])).logits[0].detach().double() / 0.5
        table = truncate(logits, top_k=9, top_p=0.8).log_softmax(-1)
        expected = [float(table[start + at - 1, token]) for at, token in enumerate(rollout.completion_ids)]
        assert rollout.rollout_logprobs == pytest.approx(expected, abs=1e-5)


def test_raw_logprobs_are_refused_unless_they_are_those_of_the_sampler(student: Any) -> None:
    with FakeRollouts(student, raw=True) as fake:
        assert len(engine(fake, student).generate(PROMPTS, step=0)) == 3
        for cut in ({"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}):
            with pytest.raises(UnsupportedCombinationError, match="--logprobs-mode processed_logprobs"):
                engine(fake, student, **cut).check(PROMPTS)


def test_every_request_has_a_seed_of_its_own_that_depends_on_its_key_alone(server: FakeRollouts, student: Any) -> None:
    served = engine(server, student, seed=5)
    whole = written(served.generate(PROMPTS, step=3, group_size=2))
    seeds = [body["seed"] for body in server.completions if body["max_tokens"] == 6]
    assert len(set(seeds)) == 6
    assert sorted(seeds) == sorted(
        keyed_seeds(seed=5, step=3, prompt_ids=["p0", "p0", "p1", "p1", "p2", "p2"], samples=[0, 1] * 3)
    )
    assert written(served.generate(PROMPTS[::-1], step=3, group_size=2)) == whole
    assert written(served.generate(PROMPTS[1:2], step=3)).items() <= whole.items()
    assert written(served.generate(PROMPTS, step=4, group_size=2)) != whole


def test_a_request_leaves_nothing_to_the_servers_defaults(server: FakeRollouts, student: Any) -> None:
    engine(server, student, temperature=0.7, top_p=0.9, top_k=4).generate(PROMPTS[:1], step=0)
    body = server.completions[-1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.7, 0.9, 4, 0.0)
    assert (body["ignore_eos"], body["stop_token_ids"], body["repetition_penalty"]) == (True, [1], 1.0)


def test_sync_sends_the_weights_and_stamps_the_version(server: FakeRollouts, student: Any) -> None:
    served = engine(server, student)
    served.generate(PROMPTS, step=0)
    nudged(student, 0.05)
    served.sync(student, version=7)
    batch = served.generate(PROMPTS, step=0, temperature=0.0)
    assert {r.student_version for r in batch.rollouts} == {7}
    first = batch.rollouts[0]
    with generation_mode(student):
        expected = token_logprobs(student, [*first.prompt.token_ids, *first.completion_ids])
    assert first.rollout_logprobs == pytest.approx(expected[-len(first.completion_ids) :].tolist(), abs=1e-5)
    assert served.lap()["rollouts/sync_difference"] < 1e-4
    assert server.folders
    assert not any(folder.exists() for folder in server.folders)
    assert len(server.files) == 1, "nothing is put together first"


@pytest.mark.parametrize("by", [0.05, 1e-4])
def test_a_server_that_says_ok_and_keeps_old_weights_is_caught(server: FakeRollouts, student: Any, by: float) -> None:
    served = engine(server, student)
    served.sync(student, version=0)
    server.loading = "keep"
    nudged(student, by)
    with pytest.raises(WeightSyncError, match="the very logprobs of before the sync"):
        served.sync(student, version=1)


def test_an_update_too_small_for_the_tolerance_alone_is_not_called_stale_when_it_arrives(
    server: FakeRollouts, student: Any
) -> None:
    served = engine(server, student)
    for version in range(3):
        served.sync(nudged(student, 1e-4), version=version)
    served.sync(student, version=3)


def test_a_server_with_half_of_the_weights_is_caught(server: FakeRollouts, student: Any) -> None:
    served = engine(server, student)
    served.sync(student, version=0)
    server.loading = "half"
    with pytest.raises(
        WeightSyncError, match=r"within 0.25 nats after the sync of version 1, got differences of up to"
    ):
        served.sync(nudged(student, 0.3), version=1)


def test_a_server_that_holds_another_model_is_caught_at_the_first_sync(student: Any) -> None:
    with FakeRollouts(tiny_model(seed=8, scale=2.0)) as fake:
        fake.loading = "keep"
        with pytest.raises(WeightSyncError, match="another model than the one that is trained"):
            engine(fake, student).generate(PROMPTS, step=0)


def test_a_failed_load_leaves_the_server_paused(server: FakeRollouts, student: Any) -> None:
    server.loading = "fail"
    with pytest.raises(WeightSyncError, match=r"every worker .* got \[None\]; .* left paused"):
        engine(server, student).sync(student, version=0)
    assert server.paused


def test_a_folder_that_cannot_be_written_ends_the_run_in_one_line(
    server: FakeRollouts, student: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightSyncError, match=r"expected room for the student's weights in .*; .* left paused"):
        engine(server, student, folder=str(tmp_path / "file" / "below")).sync(student, version=0)
    assert server.paused
    assert not server.folders


def test_a_server_that_was_started_anew_is_noticed(server: FakeRollouts, student: Any) -> None:
    served = engine(server, student)
    served.generate(PROMPTS, step=0)
    server.weight_version = "default"
    with pytest.raises(WeightSyncError, match="got 'default': it was started anew"):
        served.generate(PROMPTS, step=1)


def test_a_server_that_is_started_anew_during_a_sync_is_noticed(server: FakeRollouts, student: Any) -> None:
    served = engine(server, student)
    load = server.load

    def restarted(folder: Any) -> Any:
        answer = load(folder)
        server.model, server.weight_version = tiny_model(seed=3, scale=2.0), "default"
        return answer

    server.load = restarted  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="-before-0', got 'default'"):
        served.sync(student, version=0)


def test_a_server_without_the_routes_is_refused_with_the_remedy(server: FakeRollouts, student: Any) -> None:
    server.dev_mode = False
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        engine(server, student).generate(PROMPTS, step=0)


def _changed(**fields: Any) -> Any:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        answer = copy.deepcopy(answer)
        answer["choices"][0].update(fields)
        return answer

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        _changed(token_ids=[5]),
        _changed(finish_reason="abort"),
        _changed(prompt_token_ids=[9]),
        _changed(token_ids=[5] * 9, logprobs={"token_logprobs": [-1.0] * 9}),
        _changed(token_ids=[5, 1, 5], logprobs={"token_logprobs": [-1.0] * 3}, finish_reason="length"),
        _changed(logprobs={"token_logprobs": [float("nan")] * 6}),
    ],
)
def test_answers_that_cannot_be_used_are_asked_again_and_then_end_the_run(
    server: FakeRollouts, student: Any, spoil: Any
) -> None:
    served = engine(server, student)
    served.generate(PROMPTS, step=0)
    server.spoil = spoil
    with pytest.raises(RolloutServerError, match=r"rollout server 'student' at .*an answer that cannot be used"):
        served.generate(PROMPTS, step=1)


def test_another_model_behind_the_address_and_long_prompts_are_refused(server: FakeRollouts, student: Any) -> None:
    served = engine(server, student)
    served.generate(PROMPTS, step=0)
    with pytest.raises(DataError, match="expected at most 58"):
        served.check(tiny_prompts(["1" * 59]))
    server.spoil = lambda answer: {**answer, "model": "impostor"}
    with pytest.raises(RolloutServerError, match="got one of 'impostor'"):
        served.generate(PROMPTS, step=1)
    with pytest.raises(ConfigError, match=r"rollout.allowed_hosts="):
        VLLMEngine(url="http://example.org:8000")
