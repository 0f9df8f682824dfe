from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from moteach.data.base import PromptSet
from moteach.data.sampling import FixedMixture
from moteach.distributed import Ranks
from moteach.errors import RolloutServerError
from moteach.rollouts.ahead import Ahead, ahead_of, peek_at
from moteach.rollouts.base import RolloutEngine
from moteach.rollouts.hf import HFEngine
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer


class Recorder:
    """An engine that can be held back, and says who was asked what."""

    def __init__(self, *, held: bool = False) -> None:
        self.inner = HFEngine(max_new_tokens=4).bind(tiny_model(seed=2), tiny_tokenizer())
        self.calls: list[tuple[int, list[str], str]] = []
        self.gate = threading.Event()
        self.error: Exception | None = None
        if not held:
            self.gate.set()

    def generate(self, prompts, *, step, group_size=1, temperature=None, max_new_tokens=None):
        thread = threading.current_thread().name
        if thread.startswith("moteach-ahead"):
            self.gate.wait(30)
        self.calls.append((step, [p.prompt_id for p in prompts], thread))
        if self.error is not None:
            raise self.error
        return self.inner.generate(prompts, step=step, group_size=group_size, temperature=temperature)

    def sync(self, student, *, version):
        self.calls.append((version, [], "sync"))
        self.inner.version = version


@pytest.fixture
def sampler() -> FixedMixture:
    prompts = tiny_prompts([f"{i}+1=" for i in range(9)])
    return FixedMixture(prompts_per_step=3).bind(PromptSet.of(prompts))


def run(engine: Ahead, sampler: FixedMixture, steps: int):
    student = engine.engine.inner._model
    batches = []
    engine.sync(student, version=0)
    for step in range(steps):
        batches.append(engine.generate(sampler.next(step), step=step, group_size=2))
        engine.sync(student, version=step + 1)
    return batches


def test_every_rollout_is_one_step_stale_and_none_is_more(sampler: FixedMixture) -> None:
    engine = Ahead(engine=Recorder(), peek=peek_at(sampler), last_step=4)
    assert isinstance(engine, RolloutEngine)
    batches = run(engine, sampler, 4)
    versions = [{r.student_version for r in batch.rollouts} for batch in batches]
    assert versions == [{0}, {0}, {1}, {2}]
    assert engine.lap() == {"rollouts/ahead_missed": 0.0, "rollouts/ahead_wasted": 0.0}
    # nothing is written beyond the last step, and nothing twice
    assert [step for step, ids, _ in engine.engine.calls if ids] == [0, 1, 2, 3]


def test_prompts_and_samples_are_those_of_the_same_weights_in_step(sampler: FixedMixture) -> None:
    batches = run(Ahead(engine=Recorder(), peek=peek_at(sampler), last_step=3), sampler, 3)
    again = FixedMixture(prompts_per_step=3).bind(PromptSet.of(tiny_prompts([f"{i}+1=" for i in range(9)])))
    engine = Recorder()
    for step, batch in enumerate(batches):
        expected = engine.generate(again.next(step), step=step, group_size=2)
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert [(r.prompt, r.sample) for r in batch.rollouts] == [(r.prompt, r.sample) for r in expected.rollouts]


def test_generation_runs_beside_training_and_a_sync_waits_for_it(sampler: FixedMixture) -> None:
    recorder = Recorder(held=True)
    engine = Ahead(engine=recorder, peek=peek_at(sampler), last_step=3)
    engine.generate(sampler.next(0), step=0)
    # held back in its thread: training goes on meanwhile
    assert [call[0] for call in recorder.calls] == [0]
    syncing = threading.Thread(target=engine.sync, args=(recorder.inner._model,), kwargs={"version": 1})
    syncing.start()
    syncing.join(0.2)
    assert syncing.is_alive()
    recorder.gate.set()
    syncing.join(30)
    assert [(call[0], call[2]) for call in recorder.calls[1:]] == [(1, "moteach-ahead-1"), (1, "sync")]


def test_prompts_that_were_guessed_wrong_are_completed_and_counted(sampler: FixedMixture) -> None:
    recorder = Recorder()
    engine = Ahead(engine=recorder, peek=peek_at(sampler), last_step=3)
    engine.generate(sampler.next(0), step=0, group_size=2)
    guessed = peek_at(sampler)(1)
    other = replace(guessed[0], prompt_id="other")
    asked = [guessed[2], other, guessed[0]]
    batch = engine.generate(asked, step=1, group_size=2)
    assert [r.prompt.prompt_id for r in batch.rollouts[::2]] == [p.prompt_id for p in asked]
    assert engine.lap() == {"rollouts/ahead_missed": 1.0, "rollouts/ahead_wasted": 1.0}
    assert torch.equal(batch.input_ids, recorder.generate(asked, step=1, group_size=2).input_ids)


def test_peeking_leaves_the_sampler_as_it_was(sampler: FixedMixture) -> None:
    sampler.next(0)
    peek = peek_at(sampler)
    assert [p.prompt_id for p in peek(1)] == [p.prompt_id for p in peek(1)]
    assert [p.prompt_id for p in peek(1)] == [p.prompt_id for p in sampler.next(1)]


def test_what_went_wrong_ahead_is_raised_where_the_step_is_asked_for(sampler: FixedMixture) -> None:
    recorder = Recorder(held=True)
    engine = Ahead(engine=recorder, peek=peek_at(sampler), last_step=3)
    engine.generate(sampler.next(0), step=0)
    recorder.error = RolloutServerError("gone")
    recorder.gate.set()
    engine.sync(recorder.inner._model, version=1)
    with pytest.raises(RolloutServerError, match="gone"):
        engine.generate(sampler.next(1), step=1)


def test_only_an_engine_that_asks_for_it_is_wrapped(sampler: FixedMixture) -> None:
    engine = Recorder()
    assert ahead_of(engine, sampler, max_steps=3, ranks=Ranks()) is engine
    engine.async_steps = 1
    assert isinstance(ahead_of(engine, sampler, max_steps=3, ranks=Ranks()), Ahead)


def test_each_rank_writes_its_own_share_ahead(sampler: FixedMixture) -> None:
    recorder = Recorder()
    recorder.async_steps = 1
    ranks = Ranks(rank=1, size=2)
    engine = ahead_of(recorder, sampler, max_steps=2, ranks=ranks)
    engine.generate(ranks.share(sampler.next(0)), step=0)
    engine.sync(recorder.inner._model, version=1)
    asked = ranks.share(sampler.next(1))
    assert [r.prompt for r in engine.generate(asked, step=1).rollouts] == asked
    written = [(step, ids) for step, ids, thread in recorder.calls if thread.startswith("moteach-ahead")]
    assert written == [(1, [prompt.prompt_id for prompt in asked])]
    assert len(asked) == 1
