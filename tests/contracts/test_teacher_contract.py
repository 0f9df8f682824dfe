"""What every in-process teacher promises, whichever way its weights are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from moteach.divergences.projection import project
from moteach.errors import ConfigError, MoteachError
from moteach.teachers.base import Teacher
from moteach.teachers.hf import HFTeacher
from moteach.teachers.lora import LoRATeacher
from moteach.testing import tiny_model, tiny_tokenizer
from moteach.types import Prompt, Rollout, RolloutBatch, Support, TeacherEvidence


def whole(folder: Path) -> Teacher:
    tiny_model(seed=2, scale=3.0).save_pretrained(folder / "whole")
    return HFTeacher(teacher_id="one", model=str(folder / "whole"), max_tokens_per_forward=30, chunk_size=4)


def adapter(folder: Path) -> Teacher:
    peft = pytest.importorskip("peft")
    tiny_model(seed=2, scale=3.0).save_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(tiny_model(seed=2, scale=3.0), config).save_pretrained(folder / "adapter")
    return LoRATeacher(
        teacher_id="one",
        adapter=str(folder / "adapter"),
        base=str(folder / "base"),
        max_tokens_per_forward=30,
        chunk_size=4,
    )


@pytest.fixture(params=[whole, adapter])
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Teacher:
    make: Callable[[Path], Teacher] = request.param
    return make(tmp_path)


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


ROLLOUTS = [rollout(0, 3, 5), rollout(1, 9, 1), rollout(2, 2, 0), rollout(3, 4, 17), rollout(4, 1, 6)]
PAD = tiny_tokenizer().pad_token_id


def batch(order: tuple[int, ...] = (0, 1, 2, 3, 4)) -> RolloutBatch:
    return RolloutBatch.from_rollouts([ROLLOUTS[row] for row in order], pad_id=PAD)


def ask(teacher: Teacher, rollouts: RolloutBatch, support: Support) -> TeacherEvidence:
    return teacher.score(rollouts, support=support, k=6 if support == "topk" else None)


def test_it_satisfies_the_protocol_and_offers_known_supports(teacher: Teacher) -> None:
    assert isinstance(teacher, Teacher)
    assert teacher.supports
    assert teacher.supports <= set(get_args(Support))


def test_it_scores_every_trained_token_of_the_rows_it_was_given(teacher: Teacher) -> None:
    rollouts = batch()
    for support in teacher.supports:
        evidence = ask(teacher, rollouts, support)
        assert evidence.teacher_id == teacher.teacher_id
        assert evidence.support == support
        assert evidence.tokens.tolist() == list(range(rollouts.num_tokens))


def test_logprobs_are_logprobs_and_the_supports_agree_with_each_other(teacher: Teacher) -> None:
    rollouts = batch()
    full, topk, sampled = (ask(teacher, rollouts, support) for support in ("full", "topk", "sampled"))
    assert full.hidden is not None
    assert full.head is not None
    assert topk.topk_logprobs is not None
    assert topk.topk_ids is not None
    distribution = project(full.hidden, full.head).log_softmax(-1)
    torch.testing.assert_close(topk.topk_logprobs, distribution.gather(1, topk.topk_ids), rtol=1e-4, atol=1e-4)
    assert bool((topk.topk_logprobs.diff(dim=1) <= 0).all())
    assert bool((topk.topk_logprobs.exp().sum(1) <= 1 + 1e-5).all())
    written = distribution.gather(1, rollouts.token_targets[:, None])[:, 0]
    torch.testing.assert_close(sampled.sampled_logprobs, written, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(topk.sampled_logprobs, written, rtol=1e-4, atol=1e-4)


def test_what_it_says_about_a_row_does_not_depend_on_the_rows_beside_it_or_their_order(teacher: Teacher) -> None:
    order = (3, 0, 4, 2, 1)
    whole_batch, shuffled = batch(), batch(order)
    before = ask(teacher, whole_batch, "sampled").sampled_logprobs
    after = ask(teacher, shuffled, "sampled").sampled_logprobs
    assert before is not None
    assert after is not None
    for place, row in enumerate(order):
        mine, theirs = after[shuffled.token_rows == place], before[whole_batch.token_rows == row]
        alone = ask(teacher, batch((row,)), "sampled").sampled_logprobs
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone, theirs, rtol=1e-4, atol=1e-4)


def test_a_score_is_that_of_the_written_token_given_only_what_precedes_it(teacher: Teacher) -> None:
    rollouts = batch((3,))
    base = ask(teacher, rollouts, "sampled").sampled_logprobs
    assert base is not None
    changed_ids = rollouts.input_ids.clone()
    position = 4 + 9  # the tenth completion token
    changed_ids[0, position] = (changed_ids[0, position] + 1) % 60 + 2
    changed = RolloutBatch(
        rollouts=rollouts.rollouts,
        input_ids=changed_ids,
        attention_mask=rollouts.attention_mask,
        loss_mask=rollouts.loss_mask,
        rollout_logprobs=rollouts.rollout_logprobs,
    )
    after = ask(teacher, changed, "sampled").sampled_logprobs
    assert after is not None
    torch.testing.assert_close(after[:9], base[:9], rtol=1e-4, atol=1e-4)
    assert (after[9] - base[9]).abs() > 1e-3
    assert (after[10:] - base[10:]).abs().max() > 1e-3


def test_it_keeps_no_gradient_and_says_the_same_twice(teacher: Teacher) -> None:
    for support in teacher.supports:
        one, two = ask(teacher, batch(), support), ask(teacher, batch(), support)
        for name in ("hidden", "topk_ids", "topk_logprobs", "sampled_logprobs"):
            mine, theirs = getattr(one, name), getattr(two, name)
            if mine is not None:
                assert not mine.requires_grad
                assert not mine.is_inference()
                assert torch.equal(mine, theirs)


def test_it_accepts_rows_without_a_trained_token(teacher: Teacher) -> None:
    for support in teacher.supports:
        assert len(ask(teacher, batch((2, 2)), support).tokens) == 0


def test_k_goes_with_topk_and_with_nothing_else(teacher: Teacher) -> None:
    with pytest.raises(ConfigError, match="'k'"):
        teacher.score(batch(), support="topk")
    with pytest.raises(MoteachError, match="it would be ignored"):
        teacher.score(batch(), support="sampled", k=3)
