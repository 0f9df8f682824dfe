"""The floor must do the work it stands for: otherwise the ratio to it means nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from moteach.bench._floor import Floor
from moteach.testing import tiny_model

EOS = 1
PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12), (13,)]


def floor_of(*, teachers=None, student=None) -> Floor:
    student = student or tiny_model(seed=0)
    return Floor(
        student=student,
        teacher=(teachers or {}).__getitem__,
        optimizer=torch.optim.AdamW(student.parameters(), lr=3e-3),
        eos_id=EOS,
        vocab_size=64,
    )


def alone(model, ids: list[int], count: int) -> torch.Tensor:
    """Logprobs of the last `count` tokens of one sequence that has no padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1].log_softmax(-1)


def test_padding_does_not_change_what_is_scored():
    torch.manual_seed(0)
    floor = floor_of()
    written = floor._generate(PROMPTS, 4)
    packed = floor._logprobs(floor.student, written)
    expected = []
    for row, prompt in enumerate(PROMPTS):
        completion = written.ids[row, max(map(len, PROMPTS)) :][written.kept[row]].tolist()
        expected.append(alone(floor.student, [*prompt, *completion], len(completion)))
    torch.testing.assert_close(packed.detach(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_completions_are_samples_of_the_student():
    torch.manual_seed(0)
    student = tiny_model(seed=3, scale=3.0)
    written = floor_of(student=student)._generate([(5, 6), (7, 8, 9)] * 4000, 1)
    counts = torch.bincount(written.ids[::2, -1], minlength=64) / 4000
    with torch.no_grad():
        expected = student(input_ids=torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    assert 0.5 * (counts - expected).abs().sum() < 0.06
    assert 0.5 * (counts.roll(1) - expected).abs().sum() > 0.3


def test_later_tokens_are_sampled_given_the_earlier_ones(monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda probs, count: probs.argmax(-1, keepdim=True))
    student = tiny_model(seed=3, scale=3.0)
    written = floor_of(student=student)._generate(PROMPTS, 6)
    for row, prompt in enumerate(PROMPTS):
        ids = [*prompt, *written.ids[row, 5:][written.kept[row]].tolist()]
        count = len(ids) - len(prompt)
        assert count > 3
        assert alone(student, ids, count).argmax(-1).tolist() == ids[len(prompt) :]


def test_a_completion_is_kept_up_to_its_end_of_sequence():
    torch.manual_seed(0)
    written = floor_of()._generate([(5, 6, 7)] * 300, 6)
    ended = 0
    for row, kept in zip(written.ids[:, 3:], written.kept, strict=True):
        completion = row[kept].tolist()
        assert EOS not in completion[:-1]
        assert kept.tolist() == sorted(kept.tolist(), reverse=True)
        if len(completion) < 6:
            assert completion[-1] == EOS
            ended += 1
    assert ended > 5


def test_generation_stops_when_every_row_has_ended():
    student = tiny_model(seed=0, tied=False)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    student.lm_head.register_forward_hook(lambda module, inputs, out: out.index_fill(-1, torch.tensor([EOS]), 1e4))
    assert floor_of(student=student)._generate(PROMPTS, 50).kept.shape == (3, 1)


def test_each_teacher_grades_its_own_rows():
    torch.manual_seed(0)
    student = tiny_model(seed=0)
    other = tiny_model(seed=7, scale=3.0)
    rows = {"same": torch.tensor([2, 0]), "other": torch.tensor([1])}
    floor = floor_of(student=student, teachers={"same": copy.deepcopy(student), "other": other})
    written = floor._generate(PROMPTS, 4)
    torch.manual_seed(0)
    step = floor.step(PROMPTS, rows, max_new_tokens=4, lr=0.0)
    mine, theirs = (
        alone(model, [*PROMPTS[1], *written.ids[1, 5:][written.kept[1]].tolist()], int(written.kept[1].sum()))
        for model in (student, other)
    )
    expected = (mine.exp() * (mine - theirs)).sum() / int(written.kept.sum())
    assert step.tokens == int(written.kept.sum())
    assert step.loss == pytest.approx(float(expected), rel=1e-3)
    assert set(step.seconds) == {"generate", "score", "update"}


def test_steps_bring_the_student_to_the_teacher():
    torch.manual_seed(0)
    floor = floor_of(teachers={"t": tiny_model(seed=5, scale=2.0)})
    rows = {"t": torch.arange(32)}
    losses = [floor.step([(5, 6, 7)] * 32, rows, max_new_tokens=4, lr=3e-3).loss for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
