"""Every YAML in conf/token_weights is a weighting: a new option is tested by being there."""

from __future__ import annotations

import inspect
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
from moteach.objectives.base import token_weights
from moteach.objectives.token_weights import TokenWeighting, apply_token_weights
from moteach.types import Prompt, Rollout, RolloutBatch

FILES = sorted((Path(__file__).parents[2] / "conf" / "token_weights").glob("*.yaml"))
MASS = "target_mass_on_student_topk"
GIVEN = {"tokenizer_special_ids": frozenset({0, 1, 2}), "tokenizer_eos_ids": frozenset({1})}
LENGTHS = (7, 1, 0, 120, 3, 12, 5, 30)
UNTAUGHT_ROWS = (4, 6)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def weighting(path: Path) -> Any:
    return build(yaml.safe_load(path.read_text()), where=f"token_weights.{path.stem}", **GIVEN)


def batch(lengths: tuple[int, ...] = LENGTHS) -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(row), text="x", token_ids=(3,) * (row % 3 + 1), domain=f"d{row % 3}"),
                sample=0,
                completion_ids=tuple((7 * row + 5 * t) % 11 for t in range(length)),
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for row, length in enumerate(lengths)
        ],
        pad_id=0,
    )


def measured(rollouts: RolloutBatch) -> dict[str, Tensor]:
    """Statistics like those of a step; two rows and a tenth of the other tokens have no teacher."""
    count = rollouts.num_tokens
    generator = torch.Generator().manual_seed(7)
    student, target = -3 * torch.rand(2, count, generator=generator)
    abstained = torch.rand(count, generator=generator) < 0.1
    abstained |= torch.isin(rollouts.token_rows, torch.tensor(UNTAUGHT_ROWS))
    stats = {
        "divergence": 2 * torch.rand(count, generator=generator),
        "student_entropy": 3 * torch.rand(count, generator=generator),
        "target_entropy": 3 * torch.rand(count, generator=generator),
        "student_logprobs": student,
        "target_logprobs": target,
        "log_ratio": target - student,
        MASS: torch.rand(count, generator=generator),
        "spread": 2 * torch.rand(count, generator=generator),
        "student_top1_rank": torch.randint(0, 12, (count,), generator=generator).float(),
    }
    return {name: values.masked_fill(abstained, 0.0) for name, values in stats.items()} | {
        "abstained": abstained.float()
    }


def applied(weighting: Any, rollouts: RolloutBatch, stats: dict[str, Tensor]) -> Tensor:
    return apply_token_weights([weighting], rollouts, stats, token_weights(rollouts, "token_mean")).weights


def tokens_of(rollouts: RolloutBatch, rows: list[int]) -> Tensor:
    """Packed indices of the rows' tokens, in the order of the rows."""
    return torch.cat([(rollouts.token_rows == row).nonzero().flatten() for row in rows])


def test_there_are_options() -> None:
    assert {path.stem for path in FILES} >= {
        "tip", "teachability", "selectkd", "position", "trust_region", "special_tokens", "first_tokens", "entropy_top",
        "contested", "agreement",
    }  # fmt: skip


def test_it_is_a_weighting_named_after_its_file(weighting: Any, path: Path) -> None:
    assert isinstance(weighting, TokenWeighting)
    assert weighting.name == path.stem
    assert weighting.needs <= set(measured(batch())) - {"abstained"}


def test_it_has_a_package_of_its_own_so_that_several_can_be_chosen(path: Path) -> None:
    assert path.read_text().splitlines()[0] == f"# @package token_weights.{path.stem}"


def test_its_yaml_lists_every_configurable_parameter_with_the_default_of_the_class(weighting: Any, path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    check_component(content, where=f"token_weights.{path.stem}")
    hints = inspect.get_annotations(type(weighting).__init__, eval_str=True)
    parameters = inspect.signature(type(weighting)).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    configurable = {name: p.default for name, p in parameters.items() if is_configurable(hints[name])}
    assert {key: value for key, value in content.items() if key != "_target_"} == configurable


def test_its_yaml_says_what_every_argument_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if not line.startswith(("#", "_target_")) and line.strip()]
    assert [lines[index] for index in keys if not lines[index - 1].startswith("# ")] == []


def test_weights_are_finite_at_least_zero_and_one_per_token(weighting: Any) -> None:
    rollouts = batch()
    stats = measured(rollouts)
    weights = weighting.weights(rollouts, stats)
    assert weights.shape == (rollouts.num_tokens,)
    assert bool((torch.isfinite(weights) & (weights >= 0)).all())
    taught = weights[stats["abstained"] == 0]
    assert float(taught.min()) < float(taught.max())


def test_it_needs_what_it_says_and_nothing_else(weighting: Any) -> None:
    rollouts = batch()
    stats = measured(rollouts)
    fewer = {name: stats[name] for name in weighting.needs | {"abstained"}}
    assert torch.equal(weighting.weights(rollouts, fewer), weighting.weights(rollouts, stats))


def test_it_is_deterministic_and_leaves_its_input_alone(weighting: Any) -> None:
    rollouts = batch()
    stats = measured(rollouts)
    first, second = weighting.weights(rollouts, stats), weighting.weights(rollouts, stats)
    assert torch.equal(first, second)
    assert all(torch.equal(values, stats[name]) for name, values in measured(rollouts).items())


def test_permuting_the_rows_permutes_the_weights(weighting: Any) -> None:
    rollouts = batch()
    stats, order = measured(rollouts), [5, 2, 7, 0, 6, 3, 1, 4]
    index = tokens_of(rollouts, order)
    permuted = applied(weighting, rollouts.select(order), {name: values[index] for name, values in stats.items()})
    torch.testing.assert_close(permuted, applied(weighting, rollouts, stats)[index])


@pytest.mark.parametrize("garbage", [math.nan, -1e6, 1e6])
def test_statistics_of_abstained_tokens_are_not_looked_at(weighting: Any, garbage: float) -> None:
    rollouts = batch()
    stats = measured(rollouts)
    untaught = stats["abstained"] > 0
    spoiled = {name: v if name == "abstained" else v.masked_fill(untaught, garbage) for name, v in stats.items()}
    assert torch.equal(applied(weighting, rollouts, spoiled), applied(weighting, rollouts, stats))
    assert bool(torch.isfinite(weighting.weights(rollouts, spoiled)).all())


def test_rows_without_a_teacher_do_not_influence_the_others(weighting: Any) -> None:
    rollouts = batch()
    stats = measured(rollouts)
    rows = [row for row in range(len(rollouts)) if row not in UNTAUGHT_ROWS]
    index = tokens_of(rollouts, rows)
    alone = weighting.weights(rollouts.select(rows), {name: values[index] for name, values in stats.items()})
    torch.testing.assert_close(alone, weighting.weights(rollouts, stats)[index])


@pytest.mark.parametrize("normalise", ["token_mean", "sequence_mean"])
def test_the_total_weight_stays(weighting: Any, normalise: Any) -> None:
    rollouts = batch()
    stats, base = measured(rollouts), token_weights(rollouts, normalise)
    made = apply_token_weights([weighting], rollouts, stats, base)
    taught = stats["abstained"] == 0
    assert float(made.weights[taught].sum()) == pytest.approx(float(base[taught].sum()), rel=1e-5)
    assert 0 < made.kept_fraction <= 1
    assert made.scale >= (1.0 if weighting.name != "position" else 0.6)


def test_wider_padding_changes_nothing(weighting: Any) -> None:
    rollouts = batch()
    stats = measured(rollouts)
    wider = replace(
        rollouts,
        input_ids=pad(rollouts.input_ids, (0, 9)),
        attention_mask=pad(rollouts.attention_mask, (0, 9)),
        loss_mask=pad(rollouts.loss_mask, (0, 9)),
        rollout_logprobs=pad(rollouts.rollout_logprobs, (0, 9)),
    )
    assert torch.equal(weighting.weights(wider, stats), weighting.weights(rollouts, stats))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_a_batch_without_tokens_has_no_weights(weighting: Any, lengths: tuple[int, ...]) -> None:
    rollouts = batch(lengths)
    stats = measured(rollouts)
    assert weighting.weights(rollouts, stats).shape == (0,)
    made = apply_token_weights([weighting], rollouts, stats, token_weights(rollouts, "token_mean"))
    assert (made.weights.shape, made.kept_fraction, made.scale) == ((0,), 0.0, 0.0)


def test_a_batch_that_nobody_teaches_trains_nothing(weighting: Any) -> None:
    rollouts = batch()
    stats = {name: torch.zeros_like(values) for name, values in measured(rollouts).items()}
    stats["abstained"] = torch.ones(rollouts.num_tokens)
    assert bool(torch.isfinite(weighting.weights(rollouts, stats)).all())
    assert not applied(weighting, rollouts, stats).any()


def test_a_single_taught_token_keeps_the_whole_weight_or_none(weighting: Any) -> None:
    rollouts = batch((1,))
    stats = {name: torch.ones(1) for name in measured(rollouts)} | {"abstained": torch.zeros(1)}
    # the student finds it exp(2) times likelier than the sampler did
    dropped = weighting.name in ("special_tokens", "ratio_mask")
    assert applied(weighting, rollouts, stats).tolist() == [0.0 if dropped else 1.0]


def test_all_of_them_together_keep_the_total() -> None:
    rollouts = batch()
    stats, base = measured(rollouts), token_weights(rollouts, "token_mean")
    chosen = ("selectkd", "position", "trust_region", "special_tokens", "entropy_top", "tip")
    made_of = [
        build(yaml.safe_load(path.read_text()), where="token_weights", **GIVEN) for path in FILES if path.stem in chosen
    ]
    made = apply_token_weights(made_of, rollouts, stats, base)
    backwards = apply_token_weights(made_of[::-1], rollouts, stats, base)
    taught = stats["abstained"] == 0
    assert len(made_of) == len(chosen)
    assert float(made.weights[taught].sum()) == pytest.approx(float(base[taught].sum()), rel=1e-5)
    assert 0 < made.kept_fraction < 0.2
    torch.testing.assert_close(made.weights, backwards.weights)
