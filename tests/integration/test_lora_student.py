"""Runs that train a low-rank update of the student alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from integration_runs import metrics, student_bytes, student_tensors, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moteach.cli.main import main
from moteach.testing import TinyWorld, tiny_model, tiny_tokenizer

pytest.importorskip("peft")

LORA = ["eval=none", "student.lora.rank=4", "optim.lr=0.01"]


def test_the_update_alone_is_trained_and_the_written_student_has_it(world: TinyWorld, tmp_path: Path) -> None:
    from peft import PeftModel

    run = train(tmp_path / "run", *world.overrides, *LORA)
    before = load_file(world.student / "model.safetensors")
    after = student_tensors(run)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if "_proj" in name}
    assert changed == linear, "every linear layer, and nothing else"
    for name in linear:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) <= 4
    base = AutoModelForCausalLM.from_pretrained(world.student)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(run / "student").eval()(ids).logits
        added = PeftModel.from_pretrained(base, run / "student" / "adapter").eval()(ids).logits
    torch.testing.assert_close(added, whole, atol=1e-5, rtol=1e-5)
    (state,) = (run / "checkpoints").glob("*/")
    held = sum(value.numel() for path in state.rglob("*student*.safetensors") for value in load_file(path).values())
    assert 0 < held < sum(value.numel() for value in before.values()) / 2


def test_an_interrupted_run_ends_with_the_same_bits(world: TinyWorld, tmp_path: Path) -> None:
    arguments = [*world.overrides, *LORA, "student.lora.dropout=0.2", "max_steps=6", "optim.schedule=constant"]
    arguments += ["checkpoint.keep_last=9"]
    whole = train(tmp_path / "whole", *arguments)
    part = train(tmp_path / "part", *arguments, "checkpoint.every_steps=3")
    shutil.rmtree(part / "checkpoints" / "step-000006")
    (part / "summary.json").unlink()
    train(part, *arguments, "checkpoint.every_steps=3")
    assert student_bytes(part) == student_bytes(whole)


def test_teachers_that_are_adapters_of_the_same_base_do_not_touch_it(world: TinyWorld, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    cards = tmp_path / "cards"
    for seed, name in enumerate(("alpha", "beta")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(world.student), config).save_pretrained(cards / name)
        (cards / f"{name}.yaml").write_text(f"adapter: ./{name}\nbase: {world.student}\ndomains: [{name}]\n")
    kept = [word for word in world.overrides if not word.startswith("expert_path")]
    run = train(tmp_path / "run", *kept, f"expert_path=[{cards}]", *LORA, "max_steps=12")
    first, *_, last = (line["divergence"] for line in metrics(run))
    assert last < first
    before, after = load_file(world.student / "model.safetensors"), student_tensors(run)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        n for n in before if "_proj" in n
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student.lora.rank=0"], "rank >= 1"),
        (["student.lora.alpha=3"], "expected a rank beside the other values"),
        (["student.lora.rank=2", "student.lora.targets=[nothing]"], "student.lora.targets: "),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    words: list[str], message: str, world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["train", *world.overrides, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_nothing_changes_before_the_first_step() -> None:
    from moteach.students import LoRA, Student

    model, plain = (tiny_model(seed=0, hidden=32, layers=1, head_dim=16) for _ in range(2))
    student = Student(model, tiny_tokenizer(), lora=LoRA(rank=3, targets=("q_proj",)))
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(student.model(ids).logits, plain(ids).logits)
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert all("q_proj.lora_" in name for name in trained)
    assert student.adapted
