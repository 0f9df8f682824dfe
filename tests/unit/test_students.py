from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from moteach.divergences.projection import project
from moteach.errors import ConfigError
from moteach.sharding import full_tensors
from moteach.students import LoRA, Student
from moteach.testing import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from moteach.types import Head, LossOutput, Prompt, Rollout, RolloutBatch


def batch() -> RolloutBatch:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, (prompt, completion) in enumerate([(3, 5), (9, 1), (2, 0), (4, 11)]):
        ids = tuple(torch.randint(2, 60, (prompt + completion,), generator=generator).tolist())
        rows.append(
            Rollout(
                prompt=Prompt(prompt_id=f"p{i}", text="", token_ids=ids[:prompt]),
                sample=0,
                completion_ids=ids[prompt:],
                rollout_logprobs=(-1.0,) * completion,
                finished=True,
                student_version=0,
            )
        )
    return RolloutBatch.from_rollouts(rows, pad_id=0)


def cross_entropy(rollouts: RolloutBatch) -> Callable[[Float[Tensor, "packed hidden"], Head], LossOutput]:
    def loss(hidden: Float[Tensor, "packed hidden"], head: Head) -> LossOutput:
        value = torch.nn.functional.cross_entropy(project(hidden, head), rollouts.token_targets)
        return LossOutput(loss=value, denominator=float(rollouts.num_tokens))

    return loss


def unpadded_loss(model: Any, rollouts: RolloutBatch) -> Tensor:
    """The same cross entropy, each row alone and unpadded, through the model's own logits."""
    losses = []
    for rollout in rollouts.rollouts:
        start = len(rollout.prompt.token_ids)
        ids = torch.tensor([rollout.prompt.token_ids + rollout.completion_ids])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-logprobs[t - 1, ids[0, t]] for t in range(start, ids.shape[1])]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_and_its_gradient_are_those_of_the_plain_model(tied: bool) -> None:
    rollouts = batch()
    student = Student(tiny_model(scale=2.0, tied=tied), tiny_tokenizer())
    output = student(rollouts, cross_entropy(rollouts))
    output.loss.backward()
    plain = tiny_model(scale=2.0, tied=tied)
    expected = unpadded_loss(plain, rollouts)
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    for (name, mine), (_, theirs) in zip(student.model.named_parameters(), plain.named_parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_loss_is_called_inside_the_forward_with_the_live_head() -> None:
    student = Student(tiny_model(), tiny_tokenizer())
    inside: list[bool] = []
    active = [False]
    student.register_forward_pre_hook(lambda *_: active.__setitem__(0, True))
    student.register_forward_hook(lambda *_: active.__setitem__(0, False))
    rollouts = batch()

    def loss(hidden: Float[Tensor, "packed hidden"], head: Head) -> LossOutput:
        inside.append(active[0])
        assert head.weight is student.model.lm_head.weight
        assert hidden.shape == (rollouts.num_tokens, 64)
        return LossOutput(loss=hidden.sum(), denominator=1.0)

    student(rollouts, loss)
    assert inside == [True]


def test_a_saved_student_reopens_with_the_same_weights_tokenizer_and_template(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = Student(tiny_model(seed=4), tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    student.model.generation_config.max_new_tokens = 17
    student.save_pretrained(tmp_path / "final")
    files = {file.name for file in (tmp_path / "final").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= files
    assert not any(name.endswith((".bin", ".pt")) for name in files)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for name, value in student.model.state_dict().items():
        assert torch.equal(reopened.state_dict()[name], value), name
    assert reopened.generation_config.max_new_tokens == 17
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    again = Student.from_pretrained(str(tmp_path / "final"))
    assert torch.equal(again.model.lm_head.weight, student.model.lm_head.weight)


def test_parameters_are_float32_and_trainable_unless_asked_otherwise(tmp_path: Path) -> None:
    Student(tiny_model().to(torch.bfloat16), tiny_tokenizer()).save_pretrained(tmp_path)
    student = Student.from_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.training
    assert student.vocab_size == 64
    assert next(Student.from_pretrained(str(tmp_path), dtype="bfloat16").parameters()).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="float8"):
        Student.from_pretrained(str(tmp_path), dtype="float8")


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(tmp_path: Path) -> None:
    Student(tiny_model(scale=2.0), tiny_tokenizer()).save_pretrained(tmp_path)
    rollouts = batch()
    grads, calls = [], []
    for checkpointing in (False, True):
        student = Student.from_pretrained(str(tmp_path), gradient_checkpointing=checkpointing)
        count = [0]
        student.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        student(rollouts, cross_entropy(rollouts)).loss.backward()
        grads.append([parameter.grad for parameter in student.parameters()])
        calls.append(count[0])
    assert calls == [1, 2]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_student_whose_logits_cannot_be_rebuilt_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear output layer"):
        Student(tiny_model().model, tiny_tokenizer())


@pytest.mark.parametrize("tied", [True, False])
def test_a_student_of_gathered_tensors_is_written_as_one_that_is_whole(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    student = Student(tiny_model(scale=2.0, tied=tied), tiny_tokenizer(), lora=LoRA(rank=3))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    gathered = full_tensors(student.model)
    student.save_pretrained(tmp_path / "whole")
    student.save_pretrained(tmp_path / "gathered", weights=gathered)
    assert any("lora_" in name for name in student.state_dict()), "the student itself stays as it is"
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("whole", "gathered"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
