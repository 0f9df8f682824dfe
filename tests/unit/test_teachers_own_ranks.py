"""Teachers that are the student, where two ranks hold it: its scores, and a half of every copy on each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from moteach.conflict.posterior import Posterior
from moteach.distributed import ALONE, Ranks, is_sharded, local
from moteach.errors import DeadTeacherError
from moteach.objectives.conditioning import Conditioning
from moteach.sharding import blank_batch, nothing, shard, whole
from moteach.students import Student
from moteach.teachers.failover import Failover, FailurePolicy
from moteach.teachers.own import Stage, StudentTeacher
from moteach.teachers.pool import TeacherPool
from moteach.testing import tiny_model, tiny_tokenizer
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

STAGES: tuple[Stage, ...] = ("snapshot", "ema", "live")
LENGTHS = (9, 3, 5, 12, 4)


def rows(rank: int | None) -> RolloutBatch:
    """All rows; of two ranks the first has four of them and the other one."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = tuple(torch.randint(2, 60, (length,), generator=generator).tolist())
        prompt = Prompt(prompt_id=f"p{number}", text="", token_ids=ids[:2])
        written = ids[2:]
        made.append(
            Rollout(
                prompt=prompt,
                sample=0,
                completion_ids=written,
                rollout_logprobs=(0.0,) * len(written),
                finished=True,
                student_version=0,
            )
        )
    return RolloutBatch.from_rollouts(made if rank is None else made[:4] if rank == 0 else made[4:], pad_id=0)


def taught(ranks: Ranks) -> tuple[Student, TeacherPool]:
    """A student that has moved away from what it was, and its three selves."""
    student = Student(tiny_model(seed=3, scale=3.0), tiny_tokenizer())
    shard(student, ranks)
    # two rows of the longest fit into one forward, so that ranks with more rows run more of them
    teachers = [StudentTeacher(teacher_id=stage, stage=stage, decay=0.5, max_tokens_per_forward=16) for stage in STAGES]
    for teacher in teachers:
        teacher.bind_student(student.model, ranks=ranks, gathered=partial(whole, student))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.2)
    for teacher in teachers:
        teacher.follow(version=1)
    return student, TeacherPool(teachers)


def routed(
    rollouts: RolloutBatch, *, only: int | None = None, to: str | None = None, names: Sequence[str] = STAGES
) -> Routing:
    """Sends every row, or none but `only`, to all teachers or to one."""
    weights = torch.zeros((len(rollouts), len(names)))
    column = slice(None) if to is None else names.index(to)
    weights[slice(None) if only is None else slice(only, only + 1), column] = 1 / len(names) if to is None else 1.0
    return Routing(
        teacher_ids=tuple(names),
        prompt_ids=tuple(rollout.prompt.prompt_id for rollout in rollouts.rollouts),
        weights=weights,
        confidence=torch.ones(len(rollouts)),
        abstained=weights.sum(dim=1) == 0,
    )


class Dead:
    """A teacher that fails whenever it is asked."""

    teacher_id = "dead"
    supports: frozenset[Support] = frozenset({"full", "topk", "sampled"})

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        raise DeadTeacherError("as ever")


def ask(pool: TeacherPool, rollouts: RolloutBatch, *, only: int | None = None) -> Evidence:
    return pool.score(rollouts, routed(rollouts, only=only), support="full")


def replaced(pool: TeacherPool, rank: int, ranks: Ranks) -> list[str]:
    """Who answers for a teacher that fails on the second rank, whose row takes a second round of questions."""
    names = [*STAGES, "dead"]
    joined = TeacherPool([*(pool.get(name) for name in STAGES), Dead()])
    failover = Failover(policy=FailurePolicy(action="fallback", expert="snapshot"), ranks=ranks)
    routing = routed(rows(rank), to="dead" if rank else "ema", names=names)
    evidence, _ = failover.score(joined, rows(rank), routing, support="sampled")
    return [entry.teacher_id for entry in evidence.teachers]


def conditioned(pool: TeacherPool, rank: int, ranks: Ranks) -> tuple[dict[str, float], bool]:
    """Whether a right answer, which the first rank alone has, changes weights; the second one is asked along."""
    rollouts = rows(rank)
    routing = routed(rollouts)

    def ask_all(known: RolloutBatch, given: Routing) -> Evidence:
        return pool.score(known, given, support="sampled")

    conditioning = Conditioning(resolver=Posterior(ignorance=math.inf), answers=lambda prompts: None)
    rewards = [math.nan if rank else 1.0] * len(rollouts)
    found, metrics = conditioning(rollouts, routing, rewards, ask=ask_all, ranks=ranks)
    return metrics, torch.equal(found.weights, routing.weights)


def logits(evidence: Evidence, stage: Stage) -> Tensor:
    (said,) = [entry for entry in evidence.teachers if entry.teacher_id == stage]
    assert said.hidden is not None
    return said.hidden @ said.head.weight.T  # type: ignore[union-attr]


def _teach(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ranks = Ranks(rank=rank, size=2)
    student, pool = taught(ranks)
    before = [local(parameter).clone() for parameter in student.parameters()]
    with torch.no_grad():
        # leaves embedding and head of the student gathered
        student(blank_batch(), nothing)
    evidence = ask(pool, rows(rank))
    # nobody of the second rank asks
    silent = ask(pool, rows(rank), only=0 if rank == 0 else 1)
    replacing = replaced(pool, rank, ranks)
    metrics, unmoved = conditioned(pool, rank, ranks)
    after = list(student.parameters())
    torch.save({stage: logits(evidence, stage) for stage in STAGES}, folder / f"{rank}.pt")
    copies = {stage: list(pool.get(stage).tensors().values()) for stage in STAGES}  # type: ignore[attr-defined]
    found = {
        "heard": [entry.teacher_id for entry in silent.teachers],
        "replacing": replacing,
        "known": metrics["posterior/known"],
        "unmoved": unmoved,
        "same": all(torch.equal(local(now), then) for now, then in zip(after, before, strict=True)),
        "sharded": all(is_sharded(value) for value in [*after, *copies["ema"], *copies["snapshot"]]),
        "held": {stage: sum(local(value).numel() for value in values) for stage, values in copies.items()},
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_with_other_numbers_of_rows_hear_what_one_process_hears_and_hold_a_half_of_each_copy(
    tmp_path: Path,
) -> None:
    multiprocessing.spawn(_teach, args=(tmp_path,), nprocs=2)
    student, pool = taught(ALONE)
    total = sum(parameter.numel() for parameter in student.parameters())
    expected = ask(pool, rows(None))
    said = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for stage in STAGES:
        torch.testing.assert_close(
            torch.cat([part[stage] for part in said]), logits(expected, stage), rtol=1e-5, atol=1e-5
        )
    apart = [float((logits(expected, "live") - logits(expected, stage)).abs().max()) for stage in ("ema", "snapshot")]
    assert min(apart) > 0.1, "three different teachers"
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [part["heard"] for part in found] == [list(STAGES), []]
    assert [part["replacing"] for part in found] == [["ema"], ["snapshot"]]
    assert [(part["known"], part["unmoved"]) for part in found] == [(1.0, False), (0.0, True)]
    assert all(part["same"] and part["sharded"] for part in found)
    for stage, whole_copy in (("live", 0), ("ema", total), ("snapshot", total)):
        assert sum(part["held"][stage] for part in found) == whole_copy
        assert max(part["held"][stage] for part in found) <= 0.55 * whole_copy
