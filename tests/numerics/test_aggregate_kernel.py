"""The sum of divergences in the chunked kernel, against the identities that tie it to the two classical pools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objective_cases import Bigram, batch, run, scored
from torch import Tensor

from moteach.conflict.losses import SumOfDivergences
from moteach.conflict.pools import Geometric, Linear
from moteach.divergences.disagreement import generalised_jsd
from moteach.divergences.full import JSD, ForwardKL, ReverseKL
from moteach.objectives.divergence import DivergenceObjective
from moteach.objectives.topk import TopKObjective
from moteach.routing.token import PromptGate

ROWS = [(1, 2, 3), (2,), (3, 3, 1, 0)]
GIVEN = (0.2, 0.5, 0.3)
TEACHERS = [Bigram(seed, 2.0) for seed in (5, 6, 7)]


def look(
    resolver: Any, divergence: Any, *, kind: Any = DivergenceObjective, **options: Any
) -> tuple[Any, list[Tensor]]:
    student = Bigram(0)
    rollouts = batch(ROWS, student.table())
    objective = kind(gate=PromptGate(), resolver=resolver, divergence=divergence, chunk_size=3, **options)
    return run(objective, student, scored(rollouts, TEACHERS, "full", weights=GIVEN))


def same_gradients(left: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_reverse_kl_is_the_geometric_pool_up_to_log_z() -> None:
    (summed, gradients), (pooled, others) = look(SumOfDivergences(), ReverseKL()), look(Geometric(), ReverseKL())
    expected = pooled.token_stats["divergence"] + pooled.token_stats["neg_log_z"]
    torch.testing.assert_close(summed.token_stats["divergence"], expected, rtol=1e-7, atol=1e-9)
    assert (pooled.token_stats["neg_log_z"] > 0.01).all()
    same_gradients(gradients, others)


def test_forward_kl_is_the_linear_pool_plus_the_jsd_of_the_teachers() -> None:
    (summed, gradients), (pooled, others) = look(SumOfDivergences(), ForwardKL()), look(Linear(), ForwardKL())
    rollouts = batch(ROWS, Bigram(0).table())
    before = rollouts.input_ids[:, :-1][rollouts.loss_mask[:, 1:]]
    said = torch.stack([teacher.table().detach()[before] for teacher in TEACHERS])
    apart = generalised_jsd(said, torch.tensor(GIVEN, dtype=torch.float64).expand(len(before), -1))
    assert (apart > 0.01).all()
    expected = pooled.token_stats["divergence"] + apart
    torch.testing.assert_close(summed.token_stats["divergence"], expected, rtol=1e-6, atol=1e-8)
    same_gradients(gradients, others)


@pytest.mark.parametrize("pool", [Linear(), Geometric()])
def test_for_another_divergence_neither_pool_has_its_gradient(pool: Any) -> None:
    _, gradients = look(SumOfDivergences(), JSD(beta=0.3))
    _, others = look(pool, JSD(beta=0.3))
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(gradients, others, strict=True))


def test_on_k_tokens_each_teacher_has_its_own_support() -> None:
    options: dict[str, Any] = {"kind": TopKObjective, "k": 2, "truncation": "tail_bucket"}
    summed, gradients = look(SumOfDivergences(), ReverseKL(), **options)
    value, total, mass = 0.0, [torch.zeros_like(gradient) for gradient in gradients], 0.0
    for teacher, weight in zip(TEACHERS, GIVEN, strict=True):
        student = Bigram(0)
        objective = TopKObjective(
            gate=PromptGate(), resolver=Linear(), divergence=ReverseKL(), k=2, truncation="tail_bucket"
        )
        alone, own = run(objective, student, scored(batch(ROWS, student.table()), [teacher], "full"))
        value += weight * alone.token_stats["divergence"]
        mass += weight * alone.token_stats["teacher_mass"]
        total = [so_far + weight * gradient for so_far, gradient in zip(total, own, strict=True)]
    torch.testing.assert_close(summed.token_stats["divergence"], value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(summed.token_stats["teacher_mass"], mass, rtol=1e-6, atol=1e-8)
    for one, other in zip(gradients, total, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
