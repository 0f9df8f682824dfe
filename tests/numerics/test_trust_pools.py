"""Pools that trust less where teachers disagree, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moteach.conflict.base import resolve
from moteach.conflict.contested import Consensus, Mask
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.power import Power
from moteach.conflict.select import Select
from moteach.conflict.trust import Agreement, Anchored, Trimmed, moved
from moteach.errors import ConfigError, UnsupportedCombinationError

TOKENS, VOCAB = 8, 7
INF = math.inf


def teachers(n: int = 3, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, TOKENS, VOCAB, generator=generator, dtype=torch.float64).mul(scale).log_softmax(-1)


def weights(n: int = 3) -> Tensor:
    return torch.rand(TOKENS, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).mul(2).softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    middle = ((p.exp() + q.exp()) / 2).log()
    return (divergence(p, middle) + divergence(q, middle)) / 2


# trimmed


@pytest.mark.parametrize(("n", "drop"), [(3, 1), (5, 1), (5, 2), (5, 9)])
def test_trimming_drops_the_farthest_one_after_the_other_down_to_two(n: int, drop: int):
    q, w = teachers(n), weights(n)
    target = resolve(Trimmed(drop=drop, r=0.4), q, w)
    dropped = set()
    for t in range(TOKENS):
        kept = list(range(n))
        for _ in range(min(drop, n - 2)):
            far = {
                k: sum(w[t, j] * js(q[k, t], q[j, t]) for j in kept if j != k) / sum(w[t, j] for j in kept if j != k)
                for k in kept
            }
            kept.remove(max(far, key=lambda k: float(far[k])))
        dropped |= set(range(n)) - set(kept)
        left = w[t : t + 1, kept]
        expected = resolve(Power(r=0.4), q[kept, t : t + 1], left / left.sum())
        torch.testing.assert_close(target.logprobs[t], expected.logprobs[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(target.neg_log_z[t], expected.neg_log_z[0], rtol=1e-11, atol=1e-13)
    assert len(dropped) > 1


def test_trimming_keeps_the_geometric_pool_from_the_veto_of_one():
    q = torch.tensor([[0.97, 0.02, 0.01], [0.95, 0.03, 0.02], [1e-6, 0.6, 0.4]], dtype=torch.float64)
    q = (q / q.sum(-1, keepdim=True)).log().unsqueeze(1)
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    assert resolve(Geometric(), q, third).logprobs.exp()[0, 0] < 0.1
    for order in ([0, 1, 2], [2, 0, 1], [0, 2, 1]):
        assert resolve(Trimmed(), q[order], third).logprobs.exp()[0, 0] > 0.95


def test_two_teachers_are_both_kept_and_so_are_two_with_weight():
    q, w = teachers(2), weights(2)
    assert torch.equal(resolve(Trimmed(), q, w).logprobs, resolve(Power(r=0.0), q, w).logprobs)
    padded = torch.cat([w, torch.zeros(TOKENS, 1, dtype=torch.float64)], dim=-1)
    more = torch.cat([q, teachers(1, seed=9)])
    assert torch.equal(resolve(Trimmed(), more, padded).logprobs, resolve(Power(r=0.0), q, w).logprobs)


def test_trimming_drops_a_teacher_that_excludes_what_the_others_say():
    q = teachers(3, scale=0.3)
    q[1] = torch.full((TOKENS, VOCAB), -INF, dtype=torch.float64)
    q[1, :, 0] = 0.0
    even = torch.full((TOKENS, 3), 1 / 3, dtype=torch.float64)
    half = torch.full((TOKENS, 2), 1 / 2, dtype=torch.float64)
    target = resolve(Trimmed(), q, even)
    torch.testing.assert_close(target.logprobs, resolve(Geometric(), q[[0, 2]], half).logprobs, rtol=0, atol=1e-13)


# agreement


def test_agreement_weighs_by_the_generalised_jsd():
    q, w = teachers(), weights()
    linear = resolve(Linear(), q, w).logprobs
    apart = sum(w[:, k] * divergence(q[k], linear) for k in range(3))
    assert (apart > 0.01).all()
    target = resolve(Agreement(gamma=3.0), q, w)
    torch.testing.assert_close(target.token_weight, 1 / (1 + 3.0 * apart), rtol=1e-12, atol=0)
    torch.testing.assert_close(target.logprobs, linear, rtol=0, atol=1e-13)
    assert (apart <= -(w * w.log()).sum(-1)).all()


def test_agreement_weighs_by_log_z_of_the_geometric_pool_whatever_the_target():
    q, w = teachers(), weights()
    price = resolve(Geometric(), q, w).neg_log_z
    target = resolve(Agreement(gamma=2.0, disagreement="neg_log_z", r=0.5), q, w)
    torch.testing.assert_close(target.token_weight, 1 / (1 + 2.0 * price), rtol=1e-12, atol=0)
    torch.testing.assert_close(target.logprobs, resolve(Power(r=0.5), q, w).logprobs, rtol=0, atol=1e-13)
    assert not torch.allclose(target.neg_log_z, price)


def test_agreement_is_finite_where_teachers_exclude_each_other():
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64).log()
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    target = resolve(Agreement(gamma=1.0), q, half)
    assert target.token_weight is not None
    assert target.token_weight.item() == pytest.approx(1 / (1 + math.log(2)), abs=1e-15)
    with pytest.raises(UnsupportedCombinationError):
        resolve(Agreement(disagreement="neg_log_z"), q, half)


# anchored


@pytest.mark.parametrize("r", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("nats", [1e-4, 0.05, 0.4])
def test_anchored_spends_its_whole_budget_or_arrives(r: float, nats: float):
    q, w = teachers(), weights()
    target = resolve(Anchored(nats=nats, r=r), q, w).logprobs
    anchor, pool = resolve(Select(), q, w).logprobs, resolve(Power(r=r), q, w).logprobs
    near = divergence(pool, anchor) <= nats
    torch.testing.assert_close(target[near], pool[near], rtol=0, atol=0)
    spent = divergence(target, anchor)[~near]
    assert len(spent) > 0
    torch.testing.assert_close(spent, torch.full_like(spent, nats), rtol=1e-11, atol=1e-14)
    # on the path: log(target / anchor) is a multiple of log(pool / anchor), up to a constant
    tilt, moved_by = (x - x.mean(-1, keepdim=True) for x in (pool - anchor, target - anchor))
    part = (tilt * moved_by).sum(-1, keepdim=True) / tilt.square().sum(-1, keepdim=True)
    torch.testing.assert_close(moved_by, part * tilt, rtol=1e-9, atol=1e-11)
    assert ((part > 0) & (part <= 1 + 1e-12)).all()


def test_anchored_is_the_nearest_to_the_pool_within_the_budget():
    q, w = teachers(scale=1.5), weights()
    anchor, pool = resolve(Select(), q, w).logprobs, resolve(Linear(), q, w).logprobs
    target = resolve(Anchored(nats=0.03, r=1.0), q, w).logprobs
    active = divergence(pool, anchor) > 0.03
    assert active.sum() > 2
    generator = torch.Generator().manual_seed(4)
    for _ in range(300):
        noise = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
        other = moved(anchor, (target + 0.3 * noise).log_softmax(-1), 0.03)
        assert (divergence(other, anchor) <= 0.03 + 1e-12).all()
        assert (divergence(other, pool) > divergence(target, pool) - 1e-12)[active].all()


def test_anchored_is_select_without_a_budget_and_the_pool_with_all_of_it():
    q, w = teachers(), weights()
    q[0, :, 3] = -INF
    q = q.log_softmax(-1)
    assert torch.equal(resolve(Anchored(nats=0.0, r=1.0), q, w).logprobs, resolve(Select(), q, w).logprobs)
    everything = resolve(Anchored(nats=INF, r=1.0), q, w).logprobs
    assert torch.equal(everything, resolve(Power(r=1.0), q, w).logprobs)


def test_anchored_stays_where_no_step_fits():
    """A geometric pool that vetoes half of the anchor is ln 2 nats away from its first step on."""
    anchor = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    vetoing = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    assert torch.equal(moved(anchor, vetoing, 0.69), anchor)
    assert torch.equal(moved(anchor, vetoing, 0.70), vetoing)


def test_anchored_never_teaches_what_the_anchor_excludes():
    anchor = torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64).log()
    pool = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    target = moved(anchor, pool, 5.0)
    assert target[0, 2] == -INF
    torch.testing.assert_close(
        target.exp()[0, :2], torch.tensor([2 / 7, 5 / 7], dtype=torch.float64), rtol=0, atol=1e-12
    )


# contested tokens


def contested_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, w = teachers(), weights()
    student = teachers(1, seed=5)[0]
    said = q[:, torch.arange(TOKENS), student.argmax(-1)]
    return q, w, student, said.amax(0) - said.amin(0)


def test_mask_switches_off_contested_tokens_of_the_routed_teacher():
    q, w, student, spread = contested_case()
    nats = float(spread.median())
    target = resolve(Mask(nats=nats), q, w, student_logprobs=student)
    assert target.token_weight is not None
    assert target.token_weight.tolist() == (spread <= nats).double().tolist()
    assert 0 < target.token_weight.sum() < TOKENS
    assert torch.equal(target.logprobs, resolve(Select(), q, w).logprobs)


def test_consensus_takes_the_plain_mean_where_teachers_agree_and_the_routed_one_elsewhere():
    q, w, student, spread = contested_case()
    nats = float(spread.median())
    target = resolve(Consensus(nats=nats), q, w, student_logprobs=student)
    agreed = spread <= nats
    assert 0 < agreed.sum() < TOKENS
    torch.testing.assert_close(target.logprobs[agreed], q.mean(0).log_softmax(-1)[agreed], rtol=0, atol=1e-13)
    torch.testing.assert_close(target.neg_log_z[agreed], -q.mean(0).logsumexp(-1)[agreed], rtol=0, atol=1e-13)
    assert torch.equal(target.logprobs[~agreed], resolve(Select(), q, w).logprobs[~agreed])
    assert (target.neg_log_z[~agreed] == 0).all()


def test_only_teachers_with_weight_contest():
    q, _, student, _ = contested_case()
    routed = torch.eye(3, dtype=torch.float64)[torch.arange(TOKENS) % 3]
    target = resolve(Mask(nats=0.0), q, routed, student_logprobs=student)
    assert target.token_weight is not None
    assert target.token_weight.sum() == TOKENS


def test_teachers_that_exclude_each_other_are_contested_and_need_no_mean():
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64).log()
    w = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    student = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
    assert torch.equal(resolve(Consensus(nats=50.0), q, w, student_logprobs=student).logprobs, q[1])


def test_a_token_that_all_teachers_exclude_is_agreed_on():
    q = torch.tensor([[[0.5, 0.5, 0.0]], [[0.2, 0.8, 0.0]]], dtype=torch.float64).log()
    w = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    student = torch.tensor([[0.1, 0.1, 0.8]], dtype=torch.float64).log()
    target = resolve(Mask(nats=0.0), q, w, student_logprobs=student)
    assert target.token_weight is not None
    assert target.token_weight.item() == 1.0


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Trimmed(drop=0), "drop"),
        (lambda: Trimmed(r=INF), "r"),
        (lambda: Agreement(gamma=-1.0), "gamma"),
        (lambda: Agreement(gamma=math.nan), "gamma"),
        (lambda: Anchored(nats=-0.1), "nats"),
        (lambda: Anchored(nats=math.nan), "nats"),
        (lambda: Mask(nats=-1.0), "nats"),
        (lambda: Consensus(nats=math.nan), "nats"),
    ],
)
def test_meaningless_settings_are_refused(make, key: str):
    with pytest.raises(ConfigError, match=rf"conflict\.{key}: expected"):
        make()
