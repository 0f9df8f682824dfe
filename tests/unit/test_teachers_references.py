"""The checkpoints that teachers were trained from are asked once, about the rows of their teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError
from moteach.teachers.hf import HFTeacher
from moteach.teachers.pool import TeacherPool
from moteach.teachers.references import References
from moteach.testing import tiny_model
from moteach.types import Prompt, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

SPLIT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])


class Origin:
    """Answers with the ids it was asked about, so that misplaced tokens are seen."""

    supports: frozenset[Support] = frozenset({"sampled"})

    def __init__(self, teacher_id: str) -> None:
        self.teacher_id = teacher_id
        self.asked: list[list[str]] = []

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        self.asked.append([rollout.prompt.prompt_id for rollout in rollouts.rollouts])
        return TeacherEvidence(
            teacher_id=self.teacher_id,
            support=support,
            tokens=torch.arange(rollouts.num_tokens),
            sampled_logprobs=-rollouts.token_targets.float(),
        )


def batch() -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=f"p{row}", text="", token_ids=(row * 10,)),
                sample=0,
                completion_ids=tuple(range(row * 10 + 1, row * 10 + 1 + length)),
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for row, length in enumerate((3, 2, 4, 1))
        ],
        pad_id=0,
    )


def routing(names: tuple[str, ...] = ("math", "code", "law")) -> Routing:
    return Routing(
        teacher_ids=names,
        prompt_ids=tuple(f"p{row}" for row in range(4)),
        weights=SPLIT[:, : len(names)],
        confidence=SPLIT.amax(dim=1),
        abstained=SPLIT.sum(dim=1) == 0,
    )


def test_a_shared_origin_is_asked_once_and_answers_for_each_teacher_about_its_own_rows() -> None:
    shared, other, rollouts = Origin("base"), Origin("other"), batch()
    said = References({"law": shared, "math": shared, "code": other}).score(rollouts, routing(), support="sampled")
    assert shared.asked == [["p0", "p2"]]
    assert other.asked == [["p1"]]
    assert [entry.teacher_id for entry in said.teachers] == ["math", "code", "law"]
    for name, rows in (("math", {0, 2}), ("code", {1}), ("law", {2})):
        entry = said.of(name)
        assert entry is not None
        assert entry.tokens.tolist() == [i for i, row in enumerate(rollouts.token_rows.tolist()) if row in rows]
        assert torch.equal(entry.sampled_logprobs, -rollouts.token_targets[entry.tokens].float())


def test_a_teacher_without_an_origin_is_named_and_only_when_it_has_a_row() -> None:
    known = References({"math": Origin("base"), "code": Origin("base")})
    with pytest.raises(ConfigError, match=r"law.*reference:"):
        known.score(batch(), routing(), support="sampled")
    rollouts = batch().select([0, 1])
    assert len(known.score(rollouts, routing().select([0, 1]), support="sampled").teachers) == 2
    assert known.missing(["code", "law"]) == ["law"]


def test_the_pool_finds_the_origins_of_cards_and_shares_them_with_a_teacher(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "expert")):
        tiny_model(seed=seed, vocab_size=512).save_pretrained(tmp_path / name)
    base = str(tmp_path / "base")
    specs = {
        "math": ExpertSpec(name="math", model=str(tmp_path / "expert"), reference=base),
        "code": ExpertSpec(name="code", model=base, reference=base),
    }
    pool = TeacherPool.from_experts(specs)
    said = pool.score_references(batch(), routing(("math", "code")), support="full")
    alone = HFTeacher(teacher_id="base", model=base).score(batch(), support="full")
    for entry in said.teachers:
        assert entry.hidden is not None
        assert alone.hidden is not None
        torch.testing.assert_close(entry.hidden, alone.hidden[entry.tokens], rtol=1e-4, atol=1e-4)
        assert entry.head is not None
    ours = pool.get("code")
    assert isinstance(ours, HFTeacher)
    assert said.teachers[0].head is not None
    assert said.teachers[0].head.weight.data_ptr() == ours.model.get_output_embeddings().weight.data_ptr()
