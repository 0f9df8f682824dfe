from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moteach.divergences.projection import project
from moteach.errors import ConfigError, DeadTeacherError, IncompatibleTeacherError
from moteach.teachers.hf import HFTeacher
from moteach.teachers.scoring import micro_batches, packed_hidden
from moteach.teachers.store import ModelStore
from moteach.testing import tiny_model
from moteach.types import Prompt, Rollout, RolloutBatch


def batch_of(lengths: Sequence[tuple[int, int]], *, vocab: int = 64, seed: int = 0) -> RolloutBatch:
    """Random rollouts of (prompt, completion) lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocab, (count,), generator=generator).tolist())

    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=f"p{i}", text="", token_ids=ids(prompt)),
                sample=0,
                completion_ids=ids(completion),
                rollout_logprobs=(-1.0,) * completion,
                finished=True,
                student_version=0,
            )
            for i, (prompt, completion) in enumerate(lengths)
        ],
        pad_id=0,
    )


@torch.no_grad()
def oracle(model: nn.Module, rollouts: RolloutBatch) -> Tensor:
    """Full logprobs of every trained token: each row alone, unpadded, through the model's own forward."""
    rows = []
    for rollout in rollouts.rollouts:
        start = len(rollout.prompt.token_ids)
        ids = torch.tensor([rollout.prompt.token_ids + rollout.completion_ids])
        rows.append(model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1))
    return torch.cat(rows)


UNEVEN = [(3, 5), (9, 1), (2, 0), (4, 17), (1, 6)]


@pytest.fixture
def saved(tmp_path: Path) -> str:
    tiny_model(seed=3, scale=3.0).save_pretrained(tmp_path / "math")
    return str(tmp_path / "math")


@pytest.mark.parametrize("budget", [1, 12, 40, 10_000])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_every_support_agrees_with_the_model_scoring_each_row_alone(saved: str, budget: int, chunk: int) -> None:
    teacher = HFTeacher(teacher_id="math", model=saved, max_tokens_per_forward=budget, chunk_size=chunk)
    rollouts = batch_of(UNEVEN)
    expected = oracle(teacher.model, rollouts)
    full = teacher.score(rollouts, support="full")
    assert full.hidden is not None
    assert full.head is not None
    torch.testing.assert_close(project(full.hidden, full.head).log_softmax(-1), expected, rtol=1e-4, atol=1e-4)

    written = expected.gather(1, rollouts.token_targets[:, None])[:, 0]
    sampled = teacher.score(rollouts, support="sampled")
    torch.testing.assert_close(sampled.sampled_logprobs, written, rtol=1e-4, atol=1e-4)
    assert sampled.hidden is None

    topk = teacher.score(rollouts, support="topk", k=5)
    values, ids = expected.topk(5)
    torch.testing.assert_close(topk.topk_logprobs, values, rtol=1e-4, atol=1e-4)
    assert torch.equal(topk.topk_ids, ids)
    torch.testing.assert_close(topk.sampled_logprobs, written, rtol=1e-4, atol=1e-4)
    for evidence in (full, sampled, topk):
        assert evidence.tokens.tolist() == list(range(rollouts.num_tokens))


def test_evidence_can_be_used_in_a_backward_and_receives_no_gradient(saved: str) -> None:
    evidence = HFTeacher(teacher_id="math", model=saved).score(batch_of(UNEVEN), support="full")
    assert evidence.hidden is not None
    assert evidence.head is not None
    assert not evidence.hidden.is_inference()
    assert not evidence.hidden.requires_grad
    assert not evidence.head.weight.requires_grad
    weight = torch.ones(evidence.hidden.shape[1], requires_grad=True)
    (evidence.hidden * weight).sum().backward()
    torch.testing.assert_close(weight.grad, evidence.hidden.sum(0))


def test_a_batch_without_trained_tokens_gives_empty_evidence(saved: str) -> None:
    evidence = HFTeacher(teacher_id="math", model=saved).score(batch_of([(3, 0), (2, 0)]), support="full")
    assert evidence.hidden is not None
    assert evidence.hidden.shape == (0, 64)
    assert len(evidence.tokens) == 0


def test_micro_batches_hold_rows_of_similar_length_within_the_budget() -> None:
    lengths = [5, 0, 9, 2, 9, 30, 3]
    groups = list(micro_batches(lengths, max_tokens=18))
    assert groups == [[5], [2, 4], [0, 6, 3]]
    assert list(micro_batches([0, 0], max_tokens=8)) == []


def test_padding_and_tokens_that_predict_nothing_are_not_computed(saved: str) -> None:
    model = ModelStore().get(saved)
    seen: list[tuple[int, ...]] = []
    body = model.model
    body.register_forward_pre_hook(lambda *args: seen.append(tuple(args[2]["input_ids"].shape)), with_kwargs=True)
    packed_hidden(body, batch_of([(3, 5), (90, 0), (4, 26), (2, 28)]), max_tokens=60)
    assert seen == [(2, 29), (1, 7)]


def test_bad_requests_are_refused(saved: str) -> None:
    teacher = HFTeacher(teacher_id="math", model=saved)
    rollouts = batch_of([(2, 2)])
    with pytest.raises(ConfigError, match=r"positive 'k' with support=topk, got None; set support\.k"):
        teacher.score(rollouts, support="topk")
    with pytest.raises(ConfigError, match="got k=4 with support=full"):
        teacher.score(rollouts, support="full", k=4)
    with pytest.raises(ConfigError, match="at most the vocabulary, 64, got 65"):
        teacher.score(rollouts, support="topk", k=65)
    with pytest.raises(ConfigError, match="'chunk_size', got 0"):
        HFTeacher(teacher_id="math", model=saved, chunk_size=0)
    with pytest.raises(ConfigError, match="'max_tokens_per_forward', got -1"):
        HFTeacher(teacher_id="math", model=saved, max_tokens_per_forward=-1)


def test_a_teacher_with_a_padded_vocabulary_is_cut_to_the_students(tmp_path: Path) -> None:
    tiny_model(vocab_size=80, scale=3.0).save_pretrained(tmp_path)
    rollouts = batch_of(UNEVEN)
    teacher = HFTeacher(teacher_id="math", model=str(tmp_path), vocab_size=64)
    evidence = teacher.score(rollouts, support="sampled")
    logits = oracle(teacher.model, rollouts)[:, :64]
    expected = logits.log_softmax(-1).gather(1, rollouts.token_targets[:, None])[:, 0]
    torch.testing.assert_close(evidence.sampled_logprobs, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(IncompatibleTeacherError, match=r"at least 100 rows from the teacher 'math'.*got 80"):
        HFTeacher(teacher_id="math", model=str(tmp_path), vocab_size=100).score(rollouts, support="sampled")


@pytest.mark.parametrize("support", ["full", "sampled", "topk"])
@pytest.mark.parametrize("where", ["model.norm.weight", "lm_head.weight"])
def test_broken_weights_are_a_dead_teacher_not_a_number(tmp_path: Path, support: str, where: str) -> None:
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.get_parameter(where)[0] = float("nan")
    model.save_pretrained(tmp_path / "law")
    teacher = HFTeacher(teacher_id="law", model=str(tmp_path / "law"))
    with pytest.raises(DeadTeacherError, match=r"from .*law.*, got NaN or infinity"):
        teacher.score(batch_of([(2, 3)]), support=support, k=3 if support == "topk" else None)  # type: ignore[arg-type]


def test_weights_are_loaded_on_first_use_frozen_and_in_evaluation_mode(saved: str) -> None:
    store = ModelStore()
    teacher = HFTeacher(teacher_id="math", model=saved, store=store)
    assert len(store) == 0
    teacher.score(batch_of([(2, 2)]), support="sampled")
    assert len(store) == 1
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_store_shares_equal_checkpoints_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        tiny_model(seed=ord(name)).save_pretrained(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    store = ModelStore(max_resident=2)
    a = store.get(str(tmp_path / "a"))
    assert store.get(str(tmp_path / "link")) is a
    assert store.get(str(tmp_path / "b" / ".." / "a")) is a
    b = store.get(str(tmp_path / "b"))
    assert b is not a
    assert store.get(str(tmp_path / "a")) is a
    store.get(str(tmp_path / "c"))
    assert len(store) == 2
    assert store.get(str(tmp_path / "a")) is a
    assert store.get(str(tmp_path / "b")) is not b
    assert ModelStore().get(str(tmp_path / "a"), dtype="bfloat16") is not a
    with pytest.raises(ConfigError, match="'max_resident'"):
        ModelStore(max_resident=0)


def test_states_that_stop_being_finite_after_loading_are_noticed_when_scoring(saved: str) -> None:
    teacher = HFTeacher(teacher_id="law", model=saved)
    rollouts = batch_of([(2, 3)])
    teacher.score(rollouts, support="sampled")
    with torch.no_grad():
        teacher.model.get_parameter("model.norm.weight")[0] = float("inf")
    for support in ("full", "sampled"):
        with pytest.raises(DeadTeacherError, match="finite hidden states from the teacher 'law'"):
            teacher.score(rollouts, support=support)
