"""Every YAML in conf/divergence is a divergence: a new option is tested by being there."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moteach.divergences.base import Divergence, autograd_value_and_gradient, value_and_gradient

FOLDER = Path(__file__).parents[2] / "conf" / "divergence"
FILES = sorted(FOLDER.glob("*.yaml"))


def build(path: Path) -> Any:
    """Makes the object a YAML describes, from its own words."""
    content = yaml.safe_load(path.read_text())
    module, _, name = content.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name)(**content)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def logprobs(seed: int, *, vocab: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, vocab, generator=generator, dtype=dtype).mul(2).log_softmax(-1)


def test_there_are_options():
    assert {"reverse_kl", "forward_kl", "jsd"} <= {path.stem for path in FILES}


def test_it_is_a_divergence_named_after_its_file(path: Path):
    divergence = build(path)
    assert isinstance(divergence, Divergence)
    assert divergence.name == path.stem
    assert divergence.supports


def test_its_yaml_lists_every_parameter(path: Path):
    parameters = set(inspect.signature(type(build(path))).parameters)
    assert set(yaml.safe_load(path.read_text())) - {"_target_"} == parameters


def test_it_is_zero_on_equals_and_positive_otherwise(path: Path):
    divergence, p, q = build(path), logprobs(0), logprobs(1)
    assert divergence(p, p).abs().max() < 1e-13
    assert (divergence(p, q) > 1e-3).all()
    assert divergence(p, q).shape == (40,)


def test_it_takes_any_token_axes_and_unnormalised_logits(path: Path):
    divergence, p, q = build(path), logprobs(0), logprobs(1)
    shaped = divergence((p + 2.0).reshape(5, 8, 9), (q - 1.0).reshape(5, 8, 9))
    torch.testing.assert_close(shaped.reshape(40), divergence(p, q), rtol=1e-10, atol=1e-13)


def test_its_closed_form_is_its_autograd_gradient(path: Path):
    divergence, p, q = build(path), logprobs(0), logprobs(1)
    value, gradient = value_and_gradient(divergence, p, q)
    expected_value, expected = autograd_value_and_gradient(divergence, p, q)
    torch.testing.assert_close(value, expected_value, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient.abs().max() > 1e-2
    assert gradient.sum(-1).abs().max() < 1e-12


def test_a_small_step_against_its_gradient_lowers_it(path: Path):
    divergence, p, q = build(path), logprobs(0), logprobs(1)
    value, gradient = value_and_gradient(divergence, p, q)
    assert (divergence(p - 1e-2 * gradient, q) < value).all()


def test_it_works_in_float32(path: Path):
    divergence = build(path)
    value, gradient = value_and_gradient(divergence, logprobs(0, dtype=torch.float32), logprobs(1, dtype=torch.float32))
    assert value.dtype == gradient.dtype == torch.float32
