"""Teachers that are the student, and teachers that are told more than it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moteach.catalogue.cards import read_card
from moteach.catalogue.spec import ExpertSpec
from moteach.errors import CheckpointError, ConfigError, DataError, ExpertCardError
from moteach.teachers.hf import HFTeacher
from moteach.teachers.own import StudentTeacher
from moteach.teachers.pool import TeacherPool
from moteach.teachers.privileged import PrivilegedTeacher, contexts
from moteach.testing import tiny_model, tiny_tokenizer
from moteach.types import Prompt, Rollout, RolloutBatch, Support, TeacherEvidence

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def batch(*rows: tuple[str, str, str | None]) -> RolloutBatch:
    """Rows of prompt, completion and answer."""
    rollouts = []
    for number, (text, completion, answer) in enumerate(rows):
        prompt = Prompt(prompt_id=f"p{number}", text=text, token_ids=ids(text), domain="math", answer=answer)
        written = ids(completion)
        rollouts.append(
            Rollout(
                prompt=prompt,
                sample=0,
                completion_ids=written,
                rollout_logprobs=(0.0,) * len(written),
                finished=True,
                student_version=0,
            )
        )
    return RolloutBatch.from_rollouts(rollouts, pad_id=0)


ROWS = batch(("1+2=", "3", "3"), ("10+20=", "30", "30"), ("7=", "7777", "7"))


def logprobs_by_hand(model: Any, prompt: str, completion: str) -> list[float]:
    """Reads one row by itself, without padding."""
    before, written = ids(prompt), ids(completion)
    with torch.no_grad():
        said = model(torch.tensor([before + written])).logits.log_softmax(-1)[0]
    return [float(said[len(before) - 1 + place, token]) for place, token in enumerate(written)]


def student(seed: int = 0) -> Any:
    return tiny_model(seed=seed, hidden=32, layers=1, head_dim=16, scale=3.0)


def live(model: Any) -> StudentTeacher:
    teacher = StudentTeacher(teacher_id="self", stage="live")
    teacher.bind_student(model)
    return teacher


def test_a_longer_prompt_moves_no_token_of_the_completion() -> None:
    model = student()
    teacher = PrivilegedTeacher(live(model), context="={answer}. {prompt}", tokenizer=TOKENIZER)
    said = teacher.score(ROWS, support="sampled")
    assert said.tokens.tolist() == list(range(ROWS.num_tokens))
    assert said.sampled_logprobs is not None
    expected = [
        value
        for prompt, completion, answer in (("1+2=", "3", "3"), ("10+20=", "30", "30"), ("7=", "7777", "7"))
        for value in logprobs_by_hand(model, f"={answer}. {prompt}", completion)
    ]
    torch.testing.assert_close(said.sampled_logprobs, torch.tensor(expected), atol=1e-5, rtol=0)
    plain = live(model).score(ROWS, support="sampled").sampled_logprobs
    assert plain is not None
    assert float((plain - said.sampled_logprobs).abs().max()) > 0.01


@pytest.mark.parametrize("support", ["full", "topk", "sampled"])
def test_a_context_that_adds_nothing_changes_no_bit(support: Support) -> None:
    inner = live(student())
    k = 4 if support == "topk" else None
    plain = inner.score(ROWS, support=support, k=k)
    told = PrivilegedTeacher(inner, context="{prompt}", tokenizer=TOKENIZER).score(ROWS, support=support, k=k)
    for name in ("hidden", "topk_ids", "topk_logprobs", "sampled_logprobs"):
        left, right = getattr(plain, name), getattr(told, name)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


def test_a_prompt_without_an_answer_is_never_silently_unprivileged() -> None:
    teacher = PrivilegedTeacher(live(student()), context="{answer} {prompt}", tokenizer=TOKENIZER)
    rows = batch(("1+2=", "3", None))
    with pytest.raises(DataError, match="the prompt p0 to show, got none"):
        teacher.score(rows, support="sampled")
    with pytest.raises(DataError, match="answer"):
        teacher.check([rows.rollouts[0].prompt], domains=["math"])
    teacher.check([rows.rollouts[0].prompt], domains=["code"])
    short = PrivilegedTeacher(live(student()), context="{answer} {prompt}", tokenizer=TOKENIZER, longest=8)
    with pytest.raises(DataError, match="at most 8 tokens"):
        short.score(ROWS, support="sampled")


def said_by(teacher: StudentTeacher) -> torch.Tensor:
    found = teacher.score(ROWS, support="sampled").sampled_logprobs
    assert found is not None
    return found


def of(model: Any) -> torch.Tensor:
    return said_by(live(model))


def test_live_follows_every_change_and_keeps_the_head_it_answered_with() -> None:
    model = student()
    teacher = live(model)
    before: TeacherEvidence = teacher.score(ROWS, support="full")
    first = said_by(teacher)
    assert before.head is not None
    weight = before.head.weight.clone()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert float((said_by(teacher) - first).abs().max()) > 1e-3
    assert torch.equal(before.head.weight, weight)  # type: ignore[union-attr]
    assert not said_by(teacher).requires_grad
    model.train()
    said_by(teacher)
    assert model.training


def test_a_snapshot_is_what_the_student_was_after_its_steps() -> None:
    model = student()
    teacher = StudentTeacher(teacher_id="self", stage="snapshot", snapshot_steps=(0, 2))
    teacher.bind_student(model)
    seen = [of(model)]
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        teacher.follow(version=step)
        seen.append(of(model))
        assert torch.equal(said_by(teacher), seen[0 if step < 2 else 2])


def test_ema_is_the_average_of_the_definition() -> None:
    model = student()
    teacher = StudentTeacher(teacher_id="self", stage="ema", decay=0.75)
    teacher.bind_student(model)
    expected = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
                expected[name] = 0.75 * expected[name] + 0.25 * parameter.double()
        teacher.follow(version=step)
    for name, value in teacher.tensors().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-5)
    other = StudentTeacher(teacher_id="self", stage="ema", decay=0.75)
    other.bind_student(student(1))
    other.load_tensors(teacher.tensors())
    assert torch.equal(said_by(other), said_by(teacher))
    with pytest.raises(CheckpointError, match="without it"):
        other.load_tensors({})


def test_outside_of_a_run_there_is_no_student() -> None:
    with pytest.raises(ConfigError, match="inside a run"):
        said_by(StudentTeacher(teacher_id="self", stage="live"))


def test_a_frozen_model_may_be_told_more_too(tmp_path: Path) -> None:
    model = student(3)
    model.save_pretrained(tmp_path / "m")
    spec = ExpertSpec(name="told", model=str(tmp_path / "m"), context="{answer}; {prompt}")
    teacher = TeacherPool.from_experts({"told": spec}, contexts=contexts([spec], TOKENIZER)).get("told")
    assert isinstance(teacher, PrivilegedTeacher)
    assert isinstance(teacher.inner, HFTeacher)
    found = teacher.score(batch(("1+2=", "3", "3")), support="sampled").sampled_logprobs
    torch.testing.assert_close(found, torch.tensor(logprobs_by_hand(model, "3; 1+2=", "3")), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: lived\n", "did you mean 'live'"),
        ("student: live\n", "expected 'context'"),
        ("student: ema\ndecay: 1.0\n", "below 1 for 'decay'"),
        ("student: snapshot\nsnapshot_steps: []\n", "snapshot_steps"),
        ("student: ema\nmodel: org/x\n", "expected no 'model' beside 'student'"),
        ("model: org/x\ncontext: 'no place'\n", "expected {prompt} in 'context'"),
        ("model: org/x\ncontext: '{prompt} {anwser}'\n", "got {anwser}"),
        ("model: org/x\ncontext: '{prompt'\n", "cannot be read"),
    ],
)
def test_cards_that_cannot_work_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ExpertCardError) as error:
        read_card(path)
    assert message in str(error.value)


def test_in_a_chat_the_context_is_written_into_the_last_message_of_the_user() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    said = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2="},
    ]
    prompt = Prompt(prompt_id="c", text="", token_ids=(1,), answer="4", metadata={"conversation": said})
    teacher = PrivilegedTeacher(live(student()), context="it is {answer}. {prompt}", tokenizer=tokenizer)
    assert teacher.prompt(prompt).text == "s:be brief;u:1+1=;a:2;u:it is 4. 2+2=;a:"
    assert said[-1]["content"] == "2+2=", "the prompt itself stays"
