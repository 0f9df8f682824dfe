"""Every YAML in conf/balance is a balance between domains: a new option is tested by being there."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import pad

from moteach.config.build import build
from moteach.config.validate import check_component, is_configurable
from moteach.objectives.balance import Balance, apply_balance, balance_metrics
from moteach.objectives.base import token_weights
from moteach.types import Prompt, Rollout, RolloutBatch

FILES = sorted((Path(__file__).parents[2] / "conf" / "balance").glob("*.yaml"))
ROWS = (("math", 90), ("if", 4), ("code", 40), ("math", 70), (None, 9), ("if", 2), ("law", 3), ("code", 0), ("one", 1))
UNTAUGHT_ROWS = (3, 6)
"""A row of a domain that has another, and the only row of `law`."""


def make(path: Path) -> Any:
    return build(yaml.safe_load(path.read_text()), where="balance")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def balance(path: Path) -> Any:
    return make(path)


def batch(rows: tuple[tuple[str | None, int], ...] = ROWS) -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(row), text="x", token_ids=(3,) * (row % 3 + 1), domain=domain),
                sample=0,
                completion_ids=(5,) * length,
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for row, (domain, length) in enumerate(rows)
        ],
        pad_id=0,
    )


def measured(rollouts: RolloutBatch) -> dict[str, Tensor]:
    count = rollouts.num_tokens
    generator = torch.Generator().manual_seed(11)
    scale = torch.tensor([0.3 + 0.4 * (row % 4) for row in range(len(rollouts))])
    abstained = torch.rand(count, generator=generator) < 0.1
    rows = rollouts.token_rows
    abstained = (abstained & (rows < 4)) | torch.isin(rows, torch.tensor(UNTAUGHT_ROWS))
    ratios = torch.randn(count, generator=generator) * scale[rows]
    return {"log_ratio": ratios.masked_fill(abstained, 0.0), "abstained": abstained.float()}


def even(rollouts: RolloutBatch) -> Tensor:
    return token_weights(rollouts, "token_mean")


def tokens_of(rollouts: RolloutBatch, rows: list[int]) -> Tensor:
    return torch.cat([(rollouts.token_rows == row).nonzero().flatten() for row in rows])


def test_there_are_options() -> None:
    assert {path.stem for path in FILES} >= {"none", "token_share", "sigma", "gap"}


def test_it_is_a_balance_named_after_its_file(balance: Any, path: Path) -> None:
    assert isinstance(balance, Balance)
    assert balance.name == path.stem
    assert balance.needs <= {"log_ratio", "divergence"}


def test_its_yaml_lists_every_configurable_parameter_with_the_default_of_the_class(balance: Any, path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    check_component(content, where="balance")
    constructor = vars(type(balance)).get("__init__")
    hints = inspect.get_annotations(constructor, eval_str=True) if constructor else {}
    parameters = inspect.signature(type(balance)).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    configurable = {name: p.default for name, p in parameters.items() if is_configurable(hints[name])}
    assert {key: value for key, value in content.items() if key != "_target_"} == configurable


def test_its_yaml_says_what_every_argument_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if not line.startswith(("#", "_target_")) and line.strip()]
    assert [lines[index] for index in keys if not lines[index - 1].startswith("# ")] == []


def test_every_domain_of_the_batch_has_a_finite_factor_above_zero(balance: Any) -> None:
    rollouts = batch()
    factors = balance.factors(rollouts, measured(rollouts), even(rollouts))
    assert set(factors) == {"math", "if", "code", "default", "law", "one"}
    assert all(math.isfinite(factor) and factor > 0 for factor in factors.values())
    assert factors["law"] == 1.0


def test_weights_have_the_shape_and_type_of_the_base(balance: Any) -> None:
    rollouts = batch()
    base = even(rollouts)
    weights = apply_balance(balance, rollouts, measured(rollouts), base)
    assert (weights.shape, weights.dtype) == (base.shape, base.dtype)
    assert bool((torch.isfinite(weights) & (weights > 0)).all())
    assert torch.equal(base, even(rollouts))


@pytest.mark.parametrize("normalise", ["token_mean", "sequence_mean"])
def test_the_total_weight_stays_unless_the_option_says_otherwise(path: Path, normalise: Any) -> None:
    content = yaml.safe_load(path.read_text())
    if "renormalise" in content:
        content["renormalise"] = True
    rollouts = batch()
    stats, base = measured(rollouts), token_weights(rollouts, normalise)
    weights = apply_balance(build(content, where="balance"), rollouts, stats, base)
    taught = stats["abstained"] == 0
    assert float(weights[taught].sum()) == pytest.approx(float(base[taught].sum()), rel=1e-5)


def test_it_is_deterministic(path: Path) -> None:
    rollouts = batch()
    stats, base = measured(rollouts), even(rollouts)
    balance = make(path)
    first = balance.factors(rollouts, stats, base)
    assert balance.factors(rollouts, stats, base) == first
    assert make(path).factors(rollouts, stats, base) == first


def test_permuting_the_rows_permutes_the_weights(balance: Any) -> None:
    rollouts = batch()
    stats, base, order = measured(rollouts), even(rollouts), [5, 2, 7, 0, 8, 6, 3, 1, 4]
    index = tokens_of(rollouts, order)
    permuted = apply_balance(
        balance, rollouts.select(order), {name: values[index] for name, values in stats.items()}, base[index]
    )
    torch.testing.assert_close(permuted, apply_balance(balance, rollouts, stats, base)[index])


@pytest.mark.parametrize("garbage", [math.nan, -1e6, math.inf])
def test_abstained_tokens_are_not_looked_at(balance: Any, garbage: float) -> None:
    rollouts = batch()
    stats, base = measured(rollouts), even(rollouts)
    untaught = stats["abstained"] > 0
    spoiled = {"log_ratio": stats["log_ratio"].masked_fill(untaught, garbage), "abstained": stats["abstained"]}
    expected = balance.factors(rollouts, stats, base)
    assert balance.factors(rollouts, spoiled, base.masked_fill(untaught, 5.0)) == expected


def test_rows_without_a_teacher_do_not_influence_the_others(balance: Any) -> None:
    rollouts = batch()
    stats, base = measured(rollouts), even(rollouts)
    rows = [row for row in range(len(rollouts)) if row not in UNTAUGHT_ROWS]
    index = tokens_of(rollouts, rows)
    alone = balance.factors(rollouts.select(rows), {name: values[index] for name, values in stats.items()}, base[index])
    together = balance.factors(rollouts, stats, base)
    assert alone == pytest.approx({domain: factor for domain, factor in together.items() if domain != "law"})


def test_the_scale_of_the_base_weights_does_not_matter(balance: Any) -> None:
    rollouts = batch()
    stats, base = measured(rollouts), even(rollouts)
    assert balance.factors(rollouts, stats, 8 * base) == pytest.approx(balance.factors(rollouts, stats, base))


def test_wider_padding_changes_nothing(balance: Any) -> None:
    rollouts = batch()
    stats, base = measured(rollouts), even(rollouts)
    wider = replace(
        rollouts,
        input_ids=pad(rollouts.input_ids, (0, 9)),
        attention_mask=pad(rollouts.attention_mask, (0, 9)),
        loss_mask=pad(rollouts.loss_mask, (0, 9)),
        rollout_logprobs=pad(rollouts.rollout_logprobs, (0, 9)),
    )
    assert balance.factors(wider, stats, base) == balance.factors(rollouts, stats, base)


@pytest.mark.parametrize("rows", [(), (("a", 0),), (("a", 0), (None, 0))])
def test_a_batch_without_tokens_is_balanced(balance: Any, rows: tuple[tuple[str | None, int], ...]) -> None:
    rollouts = batch(rows)
    stats, base = measured(rollouts), even(rollouts)
    assert balance.factors(rollouts, stats, base) == {domain or "default": 1.0 for domain, _ in rows}
    assert apply_balance(balance, rollouts, stats, base).shape == (0,)
    assert balance_metrics(rollouts, stats, base, base) == {}


@pytest.mark.parametrize("ratios", [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0], [math.inf, -math.inf, 1.0]])
def test_degenerate_statistics_never_give_nan(balance: Any, ratios: list[float]) -> None:
    rollouts = batch((("a", 2), ("b", 1)))
    stats = {"log_ratio": torch.tensor(ratios), "abstained": torch.zeros(3)}
    for _ in range(2):
        factors = balance.factors(rollouts, stats, even(rollouts))
        assert all(math.isfinite(factor) and factor > 0 for factor in factors.values())
    assert all(
        math.isfinite(value) for value in balance_metrics(rollouts, stats, even(rollouts), even(rollouts)).values()
    )


def test_one_domain_alone_keeps_its_weight(balance: Any) -> None:
    rollouts = batch((("a", 4), ("a", 2)))
    factors = balance.factors(rollouts, measured(rollouts), even(rollouts))
    assert factors == pytest.approx({"a": 1.0})


def test_without_its_statistics_it_still_gives_factors(balance: Any) -> None:
    rollouts = batch()
    factors = balance.factors(rollouts, {"abstained": measured(rollouts)["abstained"]}, even(rollouts))
    assert all(math.isfinite(factor) and factor > 0 for factor in factors.values())


def test_its_state_is_plain_json_and_restores_it(path: Path) -> None:
    rollouts = batch()
    stats, base = measured(rollouts), even(rollouts)
    content = yaml.safe_load(path.read_text())
    if "reference" in content:
        content["reference"] = "anchored"
    first, second = build(content, where="balance"), build(content, where="balance")
    first.factors(rollouts, stats, base)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    later = stats | {"log_ratio": stats["log_ratio"] * (1 + torch.arange(rollouts.num_tokens) % 5)}
    assert second.factors(rollouts, later, base) == first.factors(rollouts, later, base)
    assert second.state_dict() == first.state_dict()
