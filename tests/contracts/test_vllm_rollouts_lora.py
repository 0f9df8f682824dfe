"""A low-rank update is sent as the weights of the plain model, merged; the student that is trained stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_rollouts import FakeRollouts

from moteach.rollouts.parts import weight_parts
from moteach.rollouts.vllm import VLLMEngine
from moteach.students import LoRA, Student
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer

pytest.importorskip("peft")

TARGETS = [None, ["q_proj", "down_proj"]]


def plain(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model(seed=3, scale=2.0).to(dtype)


def adapted(targets: list[str] | None, dtype: torch.dtype = torch.float32) -> Student:
    """With an update that is not zero, as after some steps."""
    lora = LoRA(rank=3, alpha=5.0, dropout=0.5, targets=targets)
    student = Student(plain(dtype), tiny_tokenizer(), lora=lora).train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def engine(url: str, model: Any, **settings: Any) -> VLLMEngine:
    given = {"url": url, "max_new_tokens": 6, "backoff": 0.0, "check_tokens": 16, "check_tolerance": 1e-4, **settings}
    return VLLMEngine(**given).bind(model, tiny_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", TARGETS)
def test_parts_are_the_merged_model_bit_by_bit(targets: list[str] | None, dtype: torch.dtype) -> None:
    student = adapted(targets, dtype)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    sent = {name: value.clone() for part in weight_parts(student.model) for name, value in part.items()}
    merged = copy.deepcopy(student._adapted[0]).merge_and_unload()
    # the head is the embedding, and goes once
    expected = {name: value for name, value in merged.state_dict().items() if name != "lm_head.weight"}
    assert sent.keys() == expected.keys() == dict(plain().named_parameters()).keys()
    for name, value in expected.items():
        assert torch.equal(sent[name], value), name
        assert sent[name].dtype == dtype
    changed = {
        name for name, value in plain(dtype).state_dict().items() if name in sent and not torch.equal(sent[name], value)
    }
    assert changed == {name for name in sent if any(end in name for end in targets or ["_proj"])}
    assert before.keys() == student.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_the_server_holds_the_merged_model_after_a_sync(tmp_path: Any) -> None:
    student = adapted(None)
    with FakeRollouts(plain()) as fake:
        served = engine(fake.url, student.model)
        batch = served.generate(tiny_prompts(["1+1=", "abc"]), step=0, temperature=0.0)
        assert served.lap()["rollouts/sync_difference"] < 1e-4
        student.save_pretrained(tmp_path)
        held = fake.model.state_dict()
    here = served.local.bind(student.model, tiny_tokenizer()).generate(
        tiny_prompts(["1+1=", "abc"]), step=0, temperature=0.0
    )
    assert [r.completion_ids for r in batch.rollouts] == [r.completion_ids for r in here.rollouts]
    from safetensors.torch import load_file

    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(held[name], value), name
    assert student.training
    assert not any(getattr(module, "merged", False) for module in student.modules())
