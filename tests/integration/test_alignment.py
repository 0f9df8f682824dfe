"""A run with a teacher that has a tokenizer of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_runs import metrics, student_bytes, train

from moteach.catalogue.modeling import load_causal_lm
from moteach.cli.main import main
from moteach.testing import TinyWorld, tiny_model, write_tiny_world

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("unit", "contracts")]

from fake_vllm import FakeVLLM
from tokenizers_of_their_own import byte_level

ALIGNED = ["alignment=bytes", "support=sampled", "objective=policy_gradient"]


def teach_digits(model: Any, tokenizer: Any) -> None:
    """Has the model answer with a digit and the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    start = tokenizer("alpha 12+5=", add_special_tokens=False)["input_ids"]
    for _ in range(60):
        digits = torch.randint(0, 10, (16,), generator=generator)
        answers = [tokenizer(str(int(digit)), add_special_tokens=False)["input_ids"] for digit in digits]
        ids = torch.tensor([[*start, *answer, tokenizer.eos_token_id] for answer in answers])
        logits = model(ids).logits[:, len(start) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, len(start) :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Expert `alpha` reads bytes in pairs and words; `beta` has the student's characters."""
    world = write_tiny_world(tmp_path_factory.mktemp("world"))
    tokenizer = byte_level()
    place = world.cards / "weights" / "alpha"
    shutil.rmtree(place)
    model: Any = tiny_model(seed=7, hidden=32, layers=1, head_dim=16, vocab_size=len(tokenizer))
    teach_digits(model, tokenizer)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return world


def test_such_a_teacher_is_refused_with_the_remedy(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *world.overrides, f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "'alpha'" in said
    assert "would grade another text" in said
    assert "alignment=bytes" in said
    assert not (tmp_path / "run").exists()
    assert main(["train", *world.overrides, "alignment=bytes", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "support=full is not defined for alignment=ByteAlignment" in capsys.readouterr().err


def test_the_check_of_experts_says_who_needs_it(world: TinyWorld, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ("student.model=", "expert_path=", "experts=", "data")
    chosen = [override for override in world.overrides if override.startswith(kept)]
    assert main(["experts", "check", *chosen, "probe_prompts=2", "max_new_tokens=2"]) == 2
    said = capsys.readouterr()
    assert "alpha: expected the teacher 'alpha' to have the student's vocabulary" in said.out
    assert "It needs alignment=bytes" in said.out
    assert "beta: expected" not in said.out.replace("the teacher 'beta'", "")


def test_the_student_comes_nearer_to_it(world: TinyWorld, tmp_path: Path) -> None:
    given = [*ALIGNED, "experts=[alpha]", "max_steps=30", "optim.lr=0.01", "sampler.prompts_per_step=32"]
    run = train(tmp_path / "run", *world.overrides, *given, "rollout.max_new_tokens=3", "optim.micro_batch_size=12")
    steps = metrics(run)
    away = [step["divergence"] for step in steps]
    assert sum(away[-5:]) < 0.5 * sum(away[:5])
    assert steps[-1]["alignment/alpha/scored"] > steps[0]["alignment/alpha/scored"]
    assert steps[-1]["alignment/alpha/barred"] < steps[0]["alignment/alpha/barred"]
    assert all(step["alignment/alpha/tokens_per_span"] >= 1 for step in steps)
    summary = json.loads((run / "summary.json").read_text())
    assert "alpha" in summary["domains"] or "alpha" in summary["raw"]


def test_a_teacher_with_the_students_tokens_is_asked_as_without_alignment(world: TinyWorld, tmp_path: Path) -> None:
    given = [*world.overrides, *ALIGNED[1:], "experts=[beta]", "eval=none"]
    plain, aligned = train(tmp_path / "plain", *given), train(tmp_path / "aligned", *given, ALIGNED[0])
    assert student_bytes(plain) == student_bytes(aligned)


def test_a_resumed_run_is_the_same_to_the_bit(world: TinyWorld, tmp_path: Path) -> None:
    given = [*world.overrides, *ALIGNED, "checkpoint.every_steps=2", "eval=none"]
    whole = train(tmp_path / "whole", *given)
    shutil.copytree(whole, tmp_path / "cut")
    *_, last = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    (tmp_path / "cut" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "student")
    assert student_bytes(train(tmp_path / "cut", *given)) == student_bytes(whole)


def test_a_served_teacher_with_its_tokenizer_on_the_card_teaches_the_same(world: TinyWorld, tmp_path: Path) -> None:
    weights = world.cards / "weights" / "alpha"
    cards = tmp_path / "cards"
    cards.mkdir()
    given = [
        *(one for one in world.overrides if not one.startswith("expert_path=")),
        *ALIGNED,
        "eval=none",
        "max_steps=2",
    ]
    given = [*given, "experts=[alpha]"]
    here = metrics(train(tmp_path / "here", *given, f"expert_path=[{world.cards}]"))
    with FakeVLLM(load_causal_lm(str(weights)).eval(), name="alpha", tokenizer=byte_level()) as fake:
        card = f"url: {fake.url}\ntokenizer: {weights}\ndomains: [alpha]\n"
        (cards / "alpha.yaml").write_text(card, encoding="utf-8")
        there = metrics(train(tmp_path / "there", *given, f"expert_path=[{cards}]"))
    for one, other in zip(here, there, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["alignment/alpha/scored"] == one["alignment/alpha/scored"]
        assert other["teacher_http/alpha/requests"] >= 1
