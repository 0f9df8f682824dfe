"""Every YAML in conf/gate is a gate: a new option is tested by being there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from moteach.config.gates import build_gate
from moteach.divergences.logprobs import chunked_token_logprobs
from moteach.routing.context import GateContext
from moteach.types import Evidence, Head, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

FILES = sorted((Path(__file__).parents[2] / "conf" / "gate").glob("*.yaml"))
VOCAB, HIDDEN = 12, 5


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(chr(ord("a") + token) for token in ids)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def gate(request: pytest.FixtureRequest) -> Any:
    whole = OmegaConf.create({"seed": 0, "gate": yaml.safe_load(request.param.read_text())})
    return build_gate(whole.gate, tokenizer=Letters())


def batch() -> RolloutBatch:
    steps = {"steps": [{"kind": "t0", "text": "xyc"}, {"kind": "t1", "text": "zz"}]}
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(row), text="x", token_ids=(1,) * (row + 1), metadata=steps),
                sample=0,
                completion_ids=tuple((2 + 3 * row + 2 * place) % VOCAB for place in range(length)),
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for row, length in enumerate((3, 1, 2))
        ],
        pad_id=0,
    )


def routing(weights: Tensor) -> Routing:
    return Routing(
        teacher_ids=tuple(f"t{i}" for i in range(weights.shape[1])),
        prompt_ids=("0", "1", "2"),
        weights=weights,
        confidence=weights.amax(dim=1),
        abstained=weights.sum(dim=1) == 0,
    )


def rows(count: int) -> Tensor:
    """A soft row, a hard row and a row without a teacher."""
    soft = torch.arange(1.0, count + 1)
    return torch.stack([soft / soft.sum(), torch.eye(count)[0], torch.zeros(count)])


def said(rollouts: RolloutBatch, weights: Tensor, *, seed: int = 10) -> Evidence:
    """What each teacher says about the rows in which it has weight, each with a hidden size of its own."""
    entries = []
    for column in range(weights.shape[1]):
        tokens = (weights[rollouts.token_rows, column] > 0).nonzero(as_tuple=True)[0]
        if not len(tokens):
            continue
        generator = torch.Generator().manual_seed(seed + column)
        hidden = torch.randn(rollouts.num_tokens, 2 + column, generator=generator)[tokens]
        head = Head(weight=torch.randn(VOCAB, 2 + column, generator=generator) * 2)
        entries.append(
            TeacherEvidence(
                teacher_id=f"t{column}",
                support="full",
                tokens=tokens,
                hidden=hidden,
                head=head,
                sampled_logprobs=chunked_token_logprobs(hidden, head, rollouts.token_targets[tokens], chunk_size=9),
            )
        )
    return Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens)


def context(weights: Tensor, *, order: list[int] | None = None, chunk_size: int = 64) -> GateContext:
    rollouts, routes = batch(), routing(weights)
    if order is not None:
        routes = replace(
            routes, teacher_ids=tuple(routes.teacher_ids[i] for i in order), weights=routes.weights[:, order]
        )
    generator = torch.Generator().manual_seed(3)
    return GateContext(
        rollouts=rollouts,
        routing=routes,
        evidence=said(rollouts, weights),
        student_hidden=torch.randn(rollouts.num_tokens, HIDDEN, generator=generator),
        student_head=Head(weight=torch.randn(VOCAB, HIDDEN, generator=generator)),
        references=said(rollouts, weights, seed=40),
        chunk_size=chunk_size,
    )


def select(whole: GateContext, kept_rows: list[int]) -> GateContext:
    """The context of some rows, as a micro-batch has it."""
    kept = torch.isin(whole.rollouts.token_rows, torch.tensor(kept_rows))
    assert whole.evidence is not None
    assert whole.references is not None
    assert whole.student_hidden is not None
    return replace(
        whole,
        rollouts=whole.rollouts.select(kept_rows),
        routing=whole.routing.select(kept_rows),
        evidence=whole.evidence.select(kept),
        references=whole.references.select(kept),
        student_hidden=whole.student_hidden[kept],
    )


def test_there_are_options() -> None:
    assert {"prompt", "confidence", "expert_align", "switch_penalty"} <= {path.stem for path in FILES}


def test_it_says_what_it_looks_at(gate: Any) -> None:
    assert gate.needs <= {"teachers", "student", "references"}
    assert gate.supports <= {"full", "topk", "sampled"}
    assert gate.trace is False


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_per_token_sum_to_one_or_abstain(gate: Any, count: int) -> None:
    given = context(rows(count))
    weights = gate.weights(given)
    assert weights.shape == (given.rollouts.num_tokens, count)
    assert bool((weights >= 0).all())
    sums = weights.sum(dim=1)
    torch.testing.assert_close(sums, (sums > 0.5).to(sums.dtype))
    assert sums[:3].any()
    assert not sums[-2:].any()


def test_a_gate_stays_within_what_the_router_let_through(gate: Any) -> None:
    given = context(rows(5))
    weights = gate.weights(given)
    assert not bool((weights[rows(5)[given.rollouts.token_rows] == 0] > 0).any())


def test_one_teacher_teaches_a_token_or_nobody_does(gate: Any) -> None:
    weights = gate.weights(context(torch.ones(3, 1)))
    assert set(weights.flatten().tolist()) <= {0.0, 1.0}
    assert bool(weights.any())


def test_permuting_the_teachers_permutes_the_weights(gate: Any) -> None:
    order = [2, 4, 0, 3, 1]
    straight = gate.weights(context(rows(5)))
    permuted = gate.weights(context(rows(5), order=order))
    torch.testing.assert_close(permuted, straight[:, order])


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[0, 1], [2]]])
def test_micro_batches_decide_as_the_whole_batch(gate: Any, parts: list[list[int]]) -> None:
    whole = context(rows(3))
    pieces = [gate.weights(select(whole, part)) for part in parts]
    torch.testing.assert_close(torch.cat(pieces), gate.weights(whole))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_size_of_a_chunk_changes_nothing(gate: Any, size: int) -> None:
    torch.testing.assert_close(gate.weights(context(rows(3), chunk_size=size)), gate.weights(context(rows(3))))


def test_the_weights_are_constants(gate: Any) -> None:
    given = context(rows(3))
    assert given.student_hidden is not None
    given.student_hidden.requires_grad_()
    assert not gate.weights(given).requires_grad
