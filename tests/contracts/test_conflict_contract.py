"""Every YAML in conf/conflict is a resolver: a new option is tested by being there."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moteach.conflict.base import Accumulator, Resolver, Target, resolve

FOLDER = Path(__file__).parents[2] / "conf" / "conflict"
FILES = sorted(FOLDER.glob("*.yaml"))
TOKENS, VOCAB = 30, 8


def build(path: Path) -> Any:
    """Makes the object a YAML describes, from its own words."""
    content = yaml.safe_load(path.read_text())
    module, _, name = content.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name)(**content)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def teachers(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, TOKENS, VOCAB, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def weights(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + n)
    return torch.randn(TOKENS, n, generator=generator, dtype=torch.float64).softmax(-1)


def pool(resolver: Resolver, logprobs: Tensor, weight: Tensor) -> Target:
    """Resolves, giving the pool a student when it asks for one."""
    student = torch.linspace(-1, 1, VOCAB, dtype=torch.float64).log_softmax(-1).expand(TOKENS, VOCAB)
    return resolve(resolver, logprobs, weight, **dict.fromkeys(resolver.needs, student))


def test_there_are_options():
    assert {"linear", "geometric", "select"} <= {path.stem for path in FILES}


def test_it_is_a_resolver_named_after_its_file(path: Path):
    resolver = build(path)
    assert isinstance(resolver, Resolver)
    assert resolver.name == path.stem
    assert resolver.supports
    if not resolver.needs:
        assert isinstance(resolver.accumulator(), Accumulator)


def test_its_yaml_lists_every_parameter(path: Path):
    parameters = set(inspect.signature(type(build(path))).parameters)
    assert set(yaml.safe_load(path.read_text())) - {"_target_"} == parameters


@pytest.mark.parametrize("n", [1, 2, 5])
def test_its_target_is_a_distribution(path: Path, n: int):
    target = pool(build(path), teachers(n), weights(n))
    torch.testing.assert_close(
        target.logprobs.exp().sum(-1), torch.ones(TOKENS, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert (target.neg_log_z >= 0).all()
    if target.token_weight is not None:
        assert ((target.token_weight >= 0) & target.token_weight.isfinite()).all()


def test_one_teacher_alone_is_the_target(path: Path):
    target = pool(build(path), teachers(1), weights(1))
    torch.testing.assert_close(target.logprobs, teachers(1)[0], rtol=0, atol=1e-12)
    assert target.neg_log_z.abs().max() < 1e-12


def test_the_order_of_teachers_does_not_matter(path: Path):
    order = [3, 1, 4, 0, 2]
    base = pool(build(path), teachers(5), weights(5))
    shuffled = pool(build(path), teachers(5)[order], weights(5)[:, order])
    torch.testing.assert_close(shuffled.logprobs, base.logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(shuffled.neg_log_z, base.neg_log_z, rtol=0, atol=1e-12)


def test_weights_matter(path: Path):
    one, other = weights(5), weights(5).flip(-1)
    assert not torch.allclose(
        pool(build(path), teachers(5), one).logprobs, pool(build(path), teachers(5), other).logprobs, atol=1e-2
    )


def test_sampled_logprobs_of_one_teacher_are_returned(path: Path):
    resolver = build(path)
    if "sampled" in resolver.supports:
        sampled = torch.linspace(-3, -0.1, TOKENS, dtype=torch.float64).unsqueeze(-1)
        torch.testing.assert_close(resolver.resolve_sampled(sampled, torch.ones_like(sampled)), sampled[:, 0])
