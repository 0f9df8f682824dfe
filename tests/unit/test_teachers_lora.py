from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, DeadTeacherError, MissingFileError
from moteach.teachers.failover import Failover, FailurePolicy
from moteach.teachers.lora import AdapterStore, LoRATeacher
from moteach.teachers.pool import TeacherPool, build_teachers
from moteach.testing import tiny_model
from moteach.types import Prompt, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

peft = pytest.importorskip("peft")


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A base and two adapters on it that differ."""
    tiny_model(seed=0, scale=3.0).save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("math", "code")):
        wrapped = peft.get_peft_model(
            tiny_model(seed=0, scale=3.0),
            peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(tmp_path / name)
    return tmp_path


def rollouts() -> RolloutBatch:
    generator = torch.Generator().manual_seed(0)
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=f"p{i}", text="", token_ids=(3, 4, 5)),
                sample=0,
                completion_ids=tuple(torch.randint(2, 60, (4 + i,), generator=generator).tolist()),
                rollout_logprobs=(-1.0,) * (4 + i),
                finished=True,
                student_version=0,
            )
            for i in range(3)
        ],
        pad_id=0,
    )


@torch.no_grad()
def merged_logprobs(folder: Path, name: str, batch: RolloutBatch) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(tiny_model(seed=0, scale=3.0), folder / name).merge_and_unload().eval()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    logprobs = batch.pack(logits).log_softmax(-1)
    return logprobs.gather(1, batch.token_targets[:, None])[:, 0]


def test_adapters_on_one_base_take_turns_and_each_says_what_its_merged_model_says(adapters: Path) -> None:
    base = str(adapters / "base")
    specs = {name: ExpertSpec(name=name, adapter=str(adapters / name), base=base) for name in ("math", "code")}
    batch = rollouts()
    routing = Routing(
        teacher_ids=("math", "code"),
        prompt_ids=("p0", "p1", "p2"),
        weights=torch.full((3, 2), 0.5),
        confidence=torch.full((3,), 0.5),
        abstained=torch.zeros(3, dtype=torch.bool),
    )
    pool = TeacherPool.from_experts(specs)
    for _ in range(2):
        evidence = pool.score(batch, routing, support="sampled")
        expected = {name: merged_logprobs(adapters, name, batch) for name in specs}
        assert (expected["math"] - expected["code"]).abs().max() > 0.1
        for name in specs:
            entry = evidence.of(name)
            assert entry is not None
            torch.testing.assert_close(entry.sampled_logprobs, expected[name], rtol=1e-3, atol=1e-3)


def test_the_base_is_loaded_once_and_nothing_is_trainable_after_switching(adapters: Path) -> None:
    store = AdapterStore()
    one, two = (store.get(str(adapters / name), base=str(adapters / "base")) for name in ("math", "code"))
    assert one is two
    assert store.get(str(adapters / "math"), base=str(adapters / "base")) is one
    assert not any(parameter.requires_grad for parameter in one.parameters())
    assert not one.training


def test_an_adapter_that_does_not_fit_and_a_missing_one_are_named(adapters: Path, tmp_path: Path) -> None:
    tiny_model(hidden=32).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=r"adapter at .*math' that fits the base .*small"):
        AdapterStore().get(str(adapters / "math"), base=str(tmp_path / "small"))
    with pytest.raises(MissingFileError, match="nowhere"):
        AdapterStore().get(str(tmp_path / "nowhere"), base=str(adapters / "base"))


def test_an_expert_with_an_adapter_becomes_a_lora_teacher(adapters: Path) -> None:
    spec = ExpertSpec(name="math", adapter=str(adapters / "math"), base=str(adapters / "base"))
    (teacher,) = build_teachers([spec])
    assert isinstance(teacher, LoRATeacher)
    evidence = teacher.score(rollouts(), support="full")
    assert evidence.hidden is not None
    assert evidence.hidden.shape == (15, 64)


@pytest.mark.parametrize(("support", "k"), [("full", None), ("topk", 4), ("sampled", None)])
def test_rows_of_several_adapters_in_one_forward_say_what_one_after_the_other_says(
    adapters: Path, support: Support, k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(adapters / "base")
    specs = {name: ExpertSpec(name=name, adapter=str(adapters / name), base=base) for name in ("math", "code")}
    batch = rollouts()
    routing = Routing(
        teacher_ids=("math", "code"),
        prompt_ids=("p0", "p1", "p2"),
        weights=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]),
        confidence=torch.ones(3),
        abstained=torch.zeros(3, dtype=torch.bool),
    )
    forwards: list[int] = []
    real = LoRATeacher.score
    monkeypatch.setattr(LoRATeacher, "score", lambda self, *args, **kwargs: pytest.fail("one after the other"))
    pool = TeacherPool.from_experts(specs)
    teacher = pool.get("math")
    assert isinstance(teacher, LoRATeacher)
    body = teacher.model.get_submodule("model")
    hook = body.register_forward_hook(lambda module, args, kwargs, out: forwards.append(1), with_kwargs=True)
    assert isinstance(code := pool.get("code"), LoRATeacher)
    assert code.model is teacher.model
    forwards.clear()
    evidence = pool.score(batch, routing, support=support, k=k)
    assert len(forwards) == 1
    hook.remove()
    monkeypatch.setattr(LoRATeacher, "score", real)
    for name, rows in (("math", [0, 2]), ("code", [1, 2])):
        entry, alone = evidence.of(name), pool.get(name).score(batch.select(rows), support=support, k=k)
        assert entry is not None
        assert entry.tokens.tolist() == [i for i, row in enumerate(batch.token_rows.tolist()) if row in rows]
        for field in ("hidden", "topk_ids", "topk_logprobs", "sampled_logprobs"):
            mine, theirs = getattr(entry, field), getattr(alone, field)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    if support == "sampled":
        entry = evidence.of("math")
        assert entry is not None
        other = merged_logprobs(adapters, "code", batch)[entry.tokens]
        assert (entry.sampled_logprobs - other).abs().max() > 0.1, "the other adapter would have said something else"


def three(folder: Path) -> tuple[TeacherPool, Routing]:
    """A pool of two good adapters and a broken one, and a routing that gives each of them a row."""
    state = load_file(folder / "math" / "adapter_model.safetensors")
    shutil.copytree(folder / "math", folder / "broken", dirs_exist_ok=True)
    save_file({name: tensor * math.nan for name, tensor in state.items()}, folder / "broken/adapter_model.safetensors")
    names = ("broken", "math", "code")
    specs = {name: ExpertSpec(name=name, adapter=str(folder / name), base=str(folder / "base")) for name in names}
    routing = Routing(
        teacher_ids=names,
        prompt_ids=("p0", "p1", "p2"),
        weights=torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.25, 0.25]]),
        confidence=torch.ones(3),
        abstained=torch.zeros(3, dtype=torch.bool),
    )
    return TeacherPool.from_experts(specs), routing


def test_a_broken_adapter_is_taken_out_and_the_others_still_share_one_forward(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, routing = three(adapters)
    real, alone = LoRATeacher.score, []

    def score(self: LoRATeacher, *args: Any, **named: Any) -> TeacherEvidence:
        alone.append(self.teacher_id)
        return real(self, *args, **named)

    monkeypatch.setattr(LoRATeacher, "score", score)
    failover = Failover(policy=FailurePolicy(action="renormalise"))
    evidence, after = failover.score(pool, rollouts(), routing, support="sampled")
    assert alone == ["broken"]
    assert after.weights.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0.5, 0.5]]
    assert failover.lost == {"broken": 1}
    expected = {name: merged_logprobs(adapters, name, rollouts()) for name in ("math", "code")}
    for entry in evidence.teachers:
        torch.testing.assert_close(
            entry.sampled_logprobs, expected[entry.teacher_id][entry.tokens], rtol=1e-3, atol=1e-3
        )
    with pytest.raises(DeadTeacherError, match="broken"):
        Failover().score(pool, rollouts(), routing, support="sampled")


def test_an_adapter_with_a_head_of_its_own_is_asked_alone(adapters: Path) -> None:
    wrapped = peft.get_peft_model(
        tiny_model(seed=0, scale=3.0),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
    )
    wrapped.save_pretrained(adapters / "own")
    base = str(adapters / "base")
    assert AdapterStore().mixed([str(adapters / "math"), str(adapters / "code")], base=base) is not None
    assert AdapterStore().mixed([str(adapters / "math"), str(adapters / "own")], base=base) is None
