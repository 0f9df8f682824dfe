from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moteach.conflict.base import Resolver, resolve
from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.select import Select
from moteach.errors import RoutingError, UnsupportedCombinationError

INF = math.inf
ALL: list[Resolver] = [Linear(), Geometric(), Select()]


def ids(value: object) -> str:
    return str(getattr(value, "name", value))


def teachers(n: int, *token: int, vocab: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *token, vocab, generator=generator, dtype=dtype).mul(2).log_softmax(-1)


def weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).add(0.1).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("resolver", ALL, ids=ids)
def test_one_hot_weights_return_that_teacher_bitwise(resolver: Resolver, dtype: torch.dtype):
    q = teachers(3, 5, dtype=dtype)
    chosen = torch.tensor([2, 0, 1, 2, 0])
    target = resolve(resolver, q, torch.eye(3, dtype=dtype)[chosen])
    assert torch.equal(target.logprobs, q[chosen, torch.arange(5)])
    assert (target.neg_log_z == 0).all()


@pytest.mark.parametrize("resolver", [Linear(), Geometric()], ids=ids)
def test_one_hot_tokens_stay_bitwise_beside_mixed_ones(resolver: Resolver):
    q = teachers(2, 2)
    target = resolve(resolver, q, torch.tensor([[0.0, 1.0], [0.4, 0.6]], dtype=torch.float64))
    assert torch.equal(target.logprobs[0], q[1, 0])
    assert not torch.allclose(target.logprobs[1], q[1, 1])


@pytest.mark.parametrize("resolver", ALL, ids=ids)
def test_identical_teachers_return_that_teacher(resolver: Resolver):
    q = teachers(1, 5).expand(4, -1, -1)
    target = resolve(resolver, q, weights(5, 4))
    torch.testing.assert_close(target.logprobs, q[0], rtol=0, atol=1e-12)
    assert target.neg_log_z.abs().max() < 1e-12


@pytest.mark.parametrize("resolver", ALL, ids=ids)
def test_a_zero_weight_silences_a_teacher_that_excludes_tokens(resolver: Resolver):
    q = teachers(3, 4)
    q[1] = -INF
    w = weights(4, 3)
    w[:, 1] = 0.0
    w = w / w.sum(-1, keepdim=True)
    target = resolve(resolver, q, w)
    expected = resolve(resolver, q[[0, 2]], w[:, [0, 2]])
    assert not target.logprobs.isnan().any()
    torch.testing.assert_close(target.logprobs, expected.logprobs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(target.neg_log_z, expected.neg_log_z, rtol=1e-13, atol=1e-13)


def test_an_exclusion_vetoes_geometrically_and_dilutes_linearly():
    q = torch.tensor([[[0.5, 0.5, 0.0]], [[0.2, 0.2, 0.6]]], dtype=torch.float64).log()
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    assert resolve(Geometric(), q, half).logprobs[0, 2] == -INF
    torch.testing.assert_close(resolve(Linear(), q, half).logprobs.exp()[0], q.exp().mean(0)[0])


def test_teachers_without_a_shared_token_have_no_geometric_pool():
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()
    half = torch.tensor([[0.5, 0.5]])
    with pytest.raises(UnsupportedCombinationError, match=r"got 1 position.*conflict=linear"):
        resolve(Geometric(), q, half)
    assert resolve(Linear(), q, half).logprobs.exp().tolist() == [[0.5, 0.5]]


def test_select_takes_the_largest_weight_and_the_first_of_a_tie():
    q = teachers(3, 3)
    w = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [0.3, 0.3, 0.4]], dtype=torch.float64)
    target = resolve(Select(), q, w)
    assert torch.equal(target.logprobs, torch.stack([q[1, 0], q[0, 1], q[2, 2]]))
    sampled = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64).neg()
    assert Select().resolve_sampled(sampled, w).tolist() == [-2.0, -4.0, -9.0]


@pytest.mark.parametrize("resolver", ALL, ids=ids)
def test_token_axes_of_any_number_are_kept(resolver: Resolver):
    q, w = teachers(2, 3, 4), weights(3, 4, 2)
    target = resolve(resolver, q, w)
    flat = resolve(resolver, q.reshape(2, 12, -1), w.reshape(12, 2))
    assert target.logprobs.shape == (3, 4, 6)
    assert target.neg_log_z.shape == (3, 4)
    assert torch.equal(target.logprobs.reshape(12, -1), flat.logprobs)


@pytest.mark.parametrize("resolver", ALL, ids=ids)
def test_resolve_leaves_its_inputs_alone_and_detaches(resolver: Resolver):
    q, w = teachers(3, 4).requires_grad_(), weights(4, 3)
    before = q.detach().clone(), w.clone()
    target = resolve(resolver, q, w)
    assert not target.logprobs.requires_grad
    assert torch.equal(q, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.parametrize("resolver", ALL, ids=ids)
def test_sampled_logprobs_of_a_silent_teacher_are_not_read(resolver: Resolver):
    sampled = torch.tensor([[-1.0, math.nan, -2.0], [-1.5, -INF, -0.5]], dtype=torch.float64)
    w = torch.tensor([[0.25, 0.0, 0.75], [0.75, 0.0, 0.25]], dtype=torch.float64)
    pooled = resolver.resolve_sampled(sampled, w)
    expected = resolver.resolve_sampled(sampled[:, [0, 2]], w[:, [0, 2]])
    torch.testing.assert_close(pooled, expected, rtol=1e-14, atol=0)
    assert torch.isfinite(pooled).all()


@pytest.mark.parametrize("resolver", ALL, ids=ids)
@pytest.mark.parametrize("bad", [[0.5, 0.4], [1.5, -0.5], [0.0, 0.0], [math.nan, 1.0]])
def test_weights_that_are_not_a_distribution_are_refused(resolver: Resolver, bad: list[float]):
    w = torch.tensor([[0.5, 0.5], bad], dtype=torch.float64)
    with pytest.raises(RoutingError, match=r"got 1 token\(s\) that do not.*abstained"):
        resolve(resolver, teachers(2, 2), w)
    with pytest.raises(RoutingError, match=r"got 1 token\(s\) that do not"):
        resolver.resolve_sampled(torch.zeros(2, 2, dtype=torch.float64), w)


@pytest.mark.parametrize("resolver", ALL, ids=ids)
def test_members_say_what_they_are(resolver: Resolver):
    assert isinstance(resolver, Resolver)
    assert resolver.needs == frozenset()
    assert resolver.streams
    assert {"full", "sampled"} <= resolver.supports
    assert ("topk" in resolver.supports) == (resolver.name in ("select", "linear"))
