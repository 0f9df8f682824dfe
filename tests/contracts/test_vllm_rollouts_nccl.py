"""vLLM's own transfer, against a stand-in that checks and loads what it is handed as vLLM 0.32's trainer engine does."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_rollouts import FakeRollouts

from moteach.errors import ConfigError, MissingDependencyError, WeightSyncError
from moteach.rollouts import nccl
from moteach.rollouts.parts import weight_parts, weight_shapes
from moteach.rollouts.vllm import VLLMEngine
from moteach.students import LoRA, Student
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer


def plain() -> Any:
    return tiny_model(seed=3, scale=2.0)


def adapted() -> Student:
    pytest.importorskip("peft")
    student = Student(plain(), tiny_tokenizer(), lora=LoRA(rank=3, alpha=5.0)).train()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    return student


def engine(url: str, model: Any) -> VLLMEngine:
    given = {
        "url": url,
        "max_new_tokens": 6,
        "backoff": 0.0,
        "attempts": 1,
        "check_tokens": 16,
        "check_tolerance": 1e-4,
    }
    return VLLMEngine(**given, transfer="nccl").bind(model, tiny_tokenizer())


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Modules of vLLM's names, and a student that counts as one on a GPU."""
    there = SimpleNamespace(model=None, connected=[], sent=0)

    class Sender:
        def __init__(self, info: Any, *, client: Any, source: Any) -> None:
            there.connected.append((info, client))
            self.source = source

        def send_weights(self) -> None:
            declared, loaded = self.source.metadata(), {}
            for index, (name, value) in enumerate(self.source):
                said = declared[index]
                assert (name, value.dtype, tuple(value.shape)) == (said.name, said.dtype, said.shape)
                loaded[name] = value.clone()
            assert len(loaded) == len(declared)
            there.sent += 1
            there.model.load_state_dict(loaded, strict=False)

    root = "vllm.distributed.weight_transfer"
    for name in ("vllm", "vllm.distributed", root, f"{root}.nccl_engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules[root]
    module.HTTPVLLMWeightSyncClient = lambda url, timeout: (url, timeout)  # type: ignore[attr-defined]
    module.WeightTransferTrainerFactory = SimpleNamespace(trainer_init=Sender)  # type: ignore[attr-defined]
    sys.modules[f"{root}.nccl_engine"].NCCLTrainerInitInfo = lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setattr(nccl, "_on_gpu", lambda student: True)
    return there


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_declared_is_what_is_handed_over(lora: bool) -> None:
    student = adapted().model if lora else plain()
    handed = [(name, value.dtype, tuple(value.shape)) for part in weight_parts(student) for name, value in part.items()]
    assert handed == [(said.name, said.dtype, said.shape) for said in weight_shapes(student)]
    assert {name for name, _, _ in handed} == dict(plain().named_parameters()).keys()


@pytest.mark.parametrize("lora", [False, True])
def test_every_sync_sends_the_weights_of_now_over_one_connection(lora: bool, vllm: SimpleNamespace) -> None:
    student = adapted().model if lora else plain()
    with FakeRollouts(tiny_model(seed=9, scale=2.0)) as fake:
        vllm.model = fake.model
        served = engine(fake.url, student)
        for version in (0, 1):
            with torch.no_grad():
                next(p for p in student.parameters() if p.requires_grad).mul_(1.1)
            served.sync(student, version=version)
            assert served.lap()["rollouts/sync_difference"] < 1e-4
        assert vllm.sent == 2
        ((info, client),) = vllm.connected
        assert info["rank"] == 0
        assert info["world_size"] == 3
        assert client[0] == fake.url


def test_weights_that_did_not_arrive_are_noticed(vllm: SimpleNamespace) -> None:
    with FakeRollouts(tiny_model(seed=9, scale=2.0)) as fake:
        vllm.model = tiny_model(seed=9)
        with pytest.raises(WeightSyncError, match="logprobs"):
            engine(fake.url, plain()).sync(plain(), version=0)


def test_a_student_on_the_cpu_is_refused_before_anything_is_sent() -> None:
    with FakeRollouts(plain()) as fake, pytest.raises(ConfigError, match=r"rollout.transfer=folder"):
        engine(fake.url, plain()).check(tiny_prompts(["1"]))


def test_without_vllm_here_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_on_gpu", lambda student: True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with FakeRollouts(plain()) as fake, pytest.raises(MissingDependencyError, match="vllm"):
        engine(fake.url, plain()).check(tiny_prompts(["1"]))
