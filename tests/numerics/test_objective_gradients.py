"""Every objective's gradient by enumeration of what the student could write, against autograd on the formula."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from objective_cases import (
    START,
    Bigram,
    batch,
    completions,
    evidence,
    expected_gradient,
    run,
    scored,
    sequence_reverse_kl,
)
from torch import Tensor

from moteach.conflict.pools import Geometric, Linear
from moteach.conflict.select import Select
from moteach.divergences.full import ForwardKL, ReverseKL
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.objectives.divergence import DivergenceObjective
from moteach.objectives.mix import Mix, MixedObjective, outcome_advantages, supervised_loss
from moteach.objectives.policy_gradient import PolicyGradientObjective
from moteach.objectives.sampled_loss import SampledLossObjective
from moteach.objectives.switch import SwitchObjective
from moteach.objectives.topk import TopKObjective
from moteach.routing.token import PromptGate

STUDENT, TEACHER, OTHER = Bigram(0), Bigram(1), Bigram(2, scale=2.0)
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def make(kind: Any, **arguments: Any) -> Any:
    parts = {"gate": PromptGate(), "resolver": Select(), "divergence": ReverseKL(), "normalise": "token_mean"}
    if kind is SampledLossObjective:
        parts.pop("divergence")
    return kind(**{**parts, **arguments})


def first_position(forward: bool = False, target: Tensor | None = None) -> list[Tensor]:
    """Gradient of the KL of the first token, written out."""
    p = STUDENT.table()[START]
    q = TEACHER.table().detach()[START] if target is None else target
    value = (q.exp() * (q - p)).sum() if forward else (p.exp() * (p - q)).sum()
    return list(torch.autograd.grad(value, list(STUDENT.parameters())))


def assert_gradients(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **(tolerance or CLOSE))


def far_apart(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("support", ["sampled", "full"])
def test_the_policy_gradient_has_the_gradient_of_the_reverse_kl_on_either_support(support: Any) -> None:
    found = expected_gradient(make(PolicyGradientObjective), STUDENT, [TEACHER], support, length=1)
    assert_gradients(found, first_position())
    assert far_apart(found, first_position(forward=True)) > 0.05


@pytest.mark.parametrize(("estimator", "forward"), [("k2", False), ("k3", True)])
def test_a_back_propagated_estimate_has_the_gradient_that_its_docstring_says(estimator: str, forward: bool) -> None:
    objective = make(SampledLossObjective, estimator=estimator)
    found = expected_gradient(objective, STUDENT, [TEACHER], "sampled", length=1)
    assert_gradients(found, first_position(forward=forward))
    assert far_apart(found, first_position(forward=not forward)) > 0.05


@pytest.mark.parametrize("resolver", [Linear(), Geometric()])
def test_with_whole_distributions_the_policy_gradient_is_exact_for_a_pool_in_value_too(resolver: Any) -> None:
    logprobs = torch.stack([TEACHER.table()[START], OTHER.table()[START]]).detach()
    pooled = logprobs.exp().mean(0).log() if isinstance(resolver, Linear) else logprobs.mean(0)
    target = pooled.log_softmax(-1)
    objective = make(PolicyGradientObjective, resolver=resolver)
    found = expected_gradient(objective, STUDENT, [TEACHER, OTHER], "full", length=1)
    assert_gradients(found, first_position(target=target))
    output, _ = run(objective, STUDENT, scored(batch([[2]], STUDENT.table()), [TEACHER, OTHER], "full"))
    expected = float(target[2] - STUDENT.table().detach()[START, 2])
    assert float(output.token_stats["log_ratio"]) == pytest.approx(expected, abs=1e-9)


def second_moment(objective: Any, teacher: Bigram) -> float:
    """Mean squared length of the gradient of one sample."""
    total = 0.0
    for ids, probability in completions(STUDENT, 1):
        _, gradients = run(objective, STUDENT, scored(batch([ids], STUDENT.table()), [teacher], "full"))
        total += probability * sum(float(g.square().sum()) for g in gradients)
    return total


def test_the_baseline_keeps_the_expectation_and_centres_the_advantage() -> None:
    plain, centred = make(PolicyGradientObjective), make(PolicyGradientObjective, baseline="reverse_kl")
    assert_gradients(
        expected_gradient(centred, STUDENT, [TEACHER], "full", length=1),
        expected_gradient(plain, STUDENT, [TEACHER], "full", length=1),
    )
    mean = 0.0
    for ids, probability in completions(STUDENT, 1):
        output, _ = run(centred, STUDENT, scored(batch([ids], STUDENT.table()), [TEACHER], "full"))
        mean += probability * float(output.token_stats["advantages"])
    assert mean == pytest.approx(0.0, abs=1e-6)


def test_the_baseline_lowers_the_variance_where_the_teacher_is_far_and_not_everywhere() -> None:
    plain, centred = make(PolicyGradientObjective), make(PolicyGradientObjective, baseline="reverse_kl")
    far = Bigram(1, scale=6.0)
    assert second_moment(centred, far) < 0.9 * second_moment(plain, far)
    # the best baseline weighs by the score's length, so that minus the KL can be worse than nothing
    assert second_moment(centred, TEACHER) > second_moment(plain, TEACHER)


@pytest.mark.parametrize(
    ("kind", "support"), [(DivergenceObjective, "full"), (PolicyGradientObjective, "sampled")], ids=["exact", "sampled"]
)
def test_with_discount_one_the_expected_gradient_is_that_of_the_kl_of_whole_completions(
    kind: Any, support: Any
) -> None:
    exact = list(torch.autograd.grad(sequence_reverse_kl(STUDENT, TEACHER, 2), list(STUDENT.parameters())))
    found = expected_gradient(make(kind, discount=1.0), STUDENT, [TEACHER], support, length=2)
    assert_gradients(found, exact)
    myopic = expected_gradient(make(kind), STUDENT, [TEACHER], support, length=2)
    assert far_apart(myopic, exact) > 0.02
    half = expected_gradient(make(kind, discount=0.5), STUDENT, [TEACHER], support, length=2)
    assert_gradients(half, [(a + b) / 2 for a, b in zip(myopic, exact, strict=True)])


def test_with_exact_divergences_the_credit_has_less_variance_than_with_sampled_ones() -> None:
    spread = {}
    for kind, support in ((DivergenceObjective, "full"), (PolicyGradientObjective, "sampled")):
        objective = make(kind, discount=1.0)
        spread[kind] = sum(
            probability * sum(float(g.square().sum()) for g in gradients)
            for ids, probability in completions(STUDENT, 2)
            for gradients in [run(objective, STUDENT, scored(batch([ids], STUDENT.table()), [TEACHER], support))[1]]
        )
    assert spread[DivergenceObjective] < 0.8 * spread[PolicyGradientObjective]


def stale(ids: list[int], shift: float) -> Any:
    """A completion whose sampler gave its tokens `shift` nats less than the student does."""
    return batch([ids], STUDENT.table().detach() - shift)


@pytest.mark.parametrize(
    ("mode", "ratio", "weight"),
    [
        ("none", 1.8, 1.0),
        ("clip", 1.8, 1.8),
        ("clip", 5.0, 2.0),
        ("clip", 0.1, 0.5),
        ("truncated", 5.0, 2.0),
        ("truncated", 0.1, 0.1),
        ("masked", 1.8, 1.8),
        ("masked", 5.0, 0.0),
        ("masked", 0.1, 0.0),
    ],
)
@pytest.mark.parametrize("kind", [PolicyGradientObjective, SampledLossObjective])
def test_the_importance_weight_multiplies_the_gradient(kind: Any, mode: str, ratio: float, weight: float) -> None:
    plain = run(make(kind, importance="none"), STUDENT, scored(batch([[2]], STUDENT.table()), [TEACHER], "sampled"))[1]
    given = scored(stale([2], math.log(ratio)), [TEACHER], "sampled")
    output, found = run(make(kind, importance=mode), STUDENT, given)
    assert_gradients(found, [weight * g for g in plain])
    assert float(output.token_stats["importance_ratio"]) == pytest.approx(ratio, rel=1e-5)
    assert float(output.token_stats["masked"]) == float(mode == "masked" and weight == 0.0)


@pytest.mark.parametrize(("move", "clipped"), [(0.05, False), (0.6, True), (-0.6, False)])
def test_the_clip_around_the_proximal_policy_stops_a_token_that_has_moved_far_enough(
    move: float, clipped: bool
) -> None:
    given = scored(stale([2], 0.3), [OTHER], "sampled")
    now = STUDENT.table().detach()[START, 2]
    advantage = float((OTHER.table()[START, 2] - now).detach())
    move = math.copysign(move, advantage) * math.copysign(1.0, move)
    given = replace(given, proximal_logprobs=(now - move).reshape(1))
    objective = make(PolicyGradientObjective, ppo_clip=0.2, importance="none")
    output, found = run(objective, STUDENT, given)
    (score,) = [torch.autograd.grad(STUDENT.table()[START, 2], list(STUDENT.parameters()))]
    factor = 0.0 if clipped else -math.exp(move) * advantage
    assert_gradients(found, [factor * g for g in score])
    # the sampler is compared with the proximal policy, not with the student
    assert float(output.token_stats["importance_ratio"]) == pytest.approx(math.exp(0.3 - move), rel=1e-5)


def test_without_refresh_the_log_ratio_stays_that_of_the_proximal_policy() -> None:
    given = scored(batch([[2]], STUDENT.table()), [TEACHER], "sampled")
    now = STUDENT.table().detach()[START, 2]
    given = replace(given, proximal_logprobs=(now - 0.25).reshape(1))
    target = float(TEACHER.table()[START, 2])
    for refresh, student in ((True, float(now)), (False, float(now) - 0.25)):
        output, _ = run(make(PolicyGradientObjective, ppo_clip=0.5, refresh=refresh), STUDENT, given)
        assert float(output.token_stats["advantages"]) == pytest.approx(target - student, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"shaping": "soft_log"}, lambda p, q: math.copysign(math.log1p(abs(q - p)), q - p)),
        ({"shaping": "power", "power_alpha": 0.5}, lambda p, q: math.exp(0.5 * q) - math.exp(0.5 * p)),
        ({"log_ratio_clip": 0.3}, lambda p, q: max(-0.3, min(0.3, q - p))),
    ],
)
def test_the_advantage_is_shaped_as_asked(arguments: dict[str, Any], shape: Any) -> None:
    for token in range(4):
        output, _ = run(
            make(PolicyGradientObjective, **arguments),
            STUDENT,
            scored(batch([[token]], STUDENT.table()), [OTHER], "sampled"),
        )
        expected = shape(float(STUDENT.table()[START, token]), float(OTHER.table()[START, token]))
        assert float(output.token_stats["advantages"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PolicyGradientObjective, {"estimator": "k2"}, "k1"),
        (PolicyGradientObjective, {"estimator": "k3"}, "k1"),
        (SampledLossObjective, {"estimator": "k1"}, "policy_gradient"),
        (PolicyGradientObjective, {"advantage": "divergence"}, "expected gradient is exactly zero"),
        (PolicyGradientObjective, {"advantage": "divergence", "discount": 0.9}, "objective=divergence"),
        (PolicyGradientObjective, {"baseline": "reverse_kl", "discount": 0.5}, "baseline=reverse_kl"),
        (PolicyGradientObjective, {"baseline": "reverse_kl", "shaping": "soft_log"}, "baseline=reverse_kl"),
        (PolicyGradientObjective, {"shaping": "power", "log_ratio_clip": 1.0}, "log_ratio_clip=null"),
    ],
)
def test_what_has_no_gradient_or_a_wrong_one_is_refused_with_the_reason(
    kind: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedCombinationError, match=message):
        make(kind, **arguments)


@pytest.mark.parametrize(
    ("objective", "support", "message"),
    [
        (make(PolicyGradientObjective, baseline="reverse_kl"), "sampled", "support=full"),
        (make(TopKObjective, source="student"), "topk", "outside its own top-k"),
        (make(TopKObjective, source="union"), "topk", "outside its own top-k"),
        (make(TopKObjective, k=9), "topk", r"objective\.k=8 or support\.k=9"),
        (
            make(TopKObjective, k=2, teacher_temperature=2.0),
            "topk",
            "teacher_temperature=2.0 needs the teachers' whole",
        ),
    ],
)
def test_what_the_evidence_cannot_answer_is_refused(objective: Any, support: Any, message: str) -> None:
    objective.check("full", None)
    with pytest.raises(UnsupportedCombinationError, match=message):
        objective.check(support, 8)


@pytest.mark.parametrize("truncation", ["renormalise", "tail_bucket", "plain", "corrected"])
@pytest.mark.parametrize("source", ["teacher", "intersection"])
@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL()])
def test_a_teachers_own_top_k_gives_the_loss_that_its_whole_distribution_gives(
    divergence: Any, source: Any, truncation: Any
) -> None:
    objective = make(
        TopKObjective, divergence=divergence, k=2, source=source, truncation=truncation, chunk_size=2,
        student_temperature=1.3,
    )  # fmt: skip
    rollouts = batch([[1, 2, 3], [0], [2, 2]], STUDENT.table())
    results = {}
    for support in ("full", "topk"):
        given = scored(rollouts, [TEACHER, OTHER], support, weights=[0.3, 0.7], k=3)
        results[support] = run(objective, STUDENT, given)
    (full, full_gradients), (topk, topk_gradients) = results["full"], results["topk"]
    torch.testing.assert_close(full.loss, topk.loss, rtol=1e-6, atol=1e-7)
    assert_gradients(topk_gradients, full_gradients)
    for name in ("student_mass", "teacher_mass", "log_ratio", "student_entropy"):
        torch.testing.assert_close(
            full.token_stats[name].double(), topk.token_stats[name].double(), rtol=1e-5, atol=1e-6
        )
    assert bool((full.token_stats["student_mass"] < 1).all())


def test_the_truncated_loss_is_the_formula_on_the_teachers_two_likeliest_tokens() -> None:
    p, q = STUDENT.table()[START].exp(), TEACHER.table().detach()[START].exp()
    top = q.topk(2).indices
    expected = {
        "renormalise": (p[top] / p[top].sum() * ((p[top] / p[top].sum()) / (q[top] / q[top].sum())).log()).sum(),
        "plain": (p[top] * (p[top] / q[top]).log()).sum(),
        "corrected": (p[top] * (p[top] / q[top]).log() - p[top] + q[top]).sum(),
        "tail_bucket": (p[top] * (p[top] / q[top]).log()).sum()
        + (1 - p[top].sum()) * ((1 - p[top].sum()) / (1 - q[top].sum())).log(),
    }
    for truncation, value in expected.items():
        output, gradients = run(
            make(TopKObjective, k=2, truncation=truncation),
            STUDENT,
            scored(batch([[1]], STUDENT.table()), [TEACHER], "full"),
        )
        torch.testing.assert_close(output.loss, value.detach(), rtol=1e-7, atol=1e-9)
        assert_gradients(gradients, list(torch.autograd.grad(value, list(STUDENT.parameters()), retain_graph=True)))


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("main", ["policy_gradient", "divergence"])
@pytest.mark.parametrize("criterion", ["target_entropy", "trust"])
def test_the_switch_is_the_main_loss_and_forward_kl_on_the_tokens_it_chose(
    criterion: Any, main: Any, mode: Any
) -> None:
    rollouts = batch([[1, 2, 3], [0, 1]], STUDENT.table())
    given = scored(rollouts, [TEACHER], "full")
    before = rollouts.input_ids[rollouts.loss_mask.roll(-1, 1)]
    target = TEACHER.table().detach()[before]
    entropies = -(target.exp() * target).sum(-1)
    student = STUDENT.table()[before]
    written = rollouts.token_targets.unsqueeze(1)
    trust = (target.gather(1, written) - student.detach().gather(1, written)).squeeze(1).clamp(max=0).exp()
    scores = entropies if criterion == "target_entropy" else trust
    ordered = scores.sort().values
    threshold = float(ordered[1] + ordered[2]) / 2
    chosen = scores > threshold if criterion == "target_entropy" else scores < threshold
    assert 0 < int(chosen.sum()) < len(chosen)
    objective = make(
        SwitchObjective, main=main, criterion=criterion, threshold=threshold, mode=mode, k=4, coefficient=0.5
    )
    output, gradients = run(objective, STUDENT, given)
    assert output.token_stats["switched"].tolist() == chosen.double().tolist()
    kind = DivergenceObjective if main == "divergence" else PolicyGradientObjective
    kept = given.token_weights * (~chosen if mode == "replace" else torch.ones_like(chosen))
    expected, parts = run(make(kind), STUDENT, replace(given, token_weights=kept))
    covering = (0.5 * given.token_weights * chosen * (target.exp() * (target - student)).sum(-1)).sum()
    extra = torch.autograd.grad(covering, list(STUDENT.parameters()))
    torch.testing.assert_close(output.loss, expected.loss + covering.detach(), rtol=1e-6, atol=1e-8)
    assert_gradients(gradients, [a + b for a, b in zip(parts, extra, strict=True)])


def group(*rows: list[int]) -> Any:
    rollouts = batch(rows, STUDENT.table().detach())
    prompts = [replace(row.prompt, prompt_id=name) for row, name in zip(rollouts.rollouts, "aabb", strict=True)]
    same = tuple(replace(row, prompt=prompt) for row, prompt in zip(rollouts.rollouts, prompts, strict=True))
    return replace(rollouts, rollouts=same)


def test_the_outcome_is_compared_inside_the_group_of_a_prompt_and_lies_on_every_token() -> None:
    rollouts = group([1, 2], [3], [0], [2, 1])
    found = outcome_advantages(rollouts, [1.0, 0.0, math.nan, 1.0], Mix(outcome=0.5))
    a = 0.5 * 0.5 / (0.5 + 1e-4)
    torch.testing.assert_close(found, torch.tensor([a, a, -a, 0.0, 0.0, 0.0]))
    centred = outcome_advantages(rollouts, [1.0, 0.0, 0.5, 0.0], Mix(outcome=2.0, outcome_normalise=False))
    torch.testing.assert_close(centred, torch.tensor([1.0, 1.0, -1.0, 0.5, -0.5, -0.5]))


def test_a_masked_token_loses_the_outcome_too_and_the_log_ratio_clip_does_not_touch_it() -> None:
    given = replace(scored(stale([2], 0.1), [TEACHER], "sampled"), outcome_advantages=torch.tensor([3.0]))
    objective = MixedObjective(make(PolicyGradientObjective, log_ratio_clip=0.1), Mix(outcome=1.0))
    output, _ = run(objective, STUDENT, given)
    log_ratio = float(TEACHER.table()[START, 2] - STUDENT.table()[START, 2])
    assert float(output.token_stats["advantages"]) == pytest.approx(3.0 + math.copysign(0.1, log_ratio), abs=1e-6)
    far = replace(scored(stale([2], 3.0), [TEACHER], "sampled"), outcome_advantages=torch.tensor([3.0]))
    output, gradients = run(objective, STUDENT, far)
    assert float(output.token_stats["masked"]) == 1.0
    assert all(float(g.abs().max()) == 0.0 for g in gradients)


def test_the_outcome_teaches_a_token_without_a_teacher() -> None:
    given = scored(batch([[2]], STUDENT.table()), [TEACHER], "sampled", weights=[0.0])
    given = replace(given, outcome_advantages=torch.tensor([2.0]))
    (score,) = [torch.autograd.grad(STUDENT.table()[START, 2], list(STUDENT.parameters()))]
    _, gradients = run(MixedObjective(make(PolicyGradientObjective), Mix(outcome=1.0)), STUDENT, given)
    assert_gradients(gradients, [-2.0 * g for g in score])


@pytest.mark.parametrize("kind", [DivergenceObjective, TopKObjective])
def test_beside_a_back_propagated_loss_the_outcome_is_a_policy_gradient_of_its_own(kind: Any) -> None:
    given = scored(batch([[2], [1]], STUDENT.table()), [TEACHER], "full")
    advantages = torch.tensor([2.0, -1.0])
    _, plain = run(make(kind), STUDENT, given)
    mixed = MixedObjective(make(kind), Mix(outcome=1.0))
    # token weights are about teachers and do not reach the outcome
    weighted = replace(given, outcome_advantages=advantages, token_weights=given.base_weights * 0.0)
    output, found = run(mixed, STUDENT, weighted)
    table = STUDENT.table()[START]
    score = torch.autograd.grad(-(0.5 * 2.0 * table[2] - 0.5 * table[1]), list(STUDENT.parameters()))
    assert_gradients(found, list(score))
    _, both = run(mixed, STUDENT, replace(given, outcome_advantages=advantages))
    assert_gradients(both, [a + b for a, b in zip(plain, score, strict=True)])
    assert output.token_stats["outcome_advantages"].tolist() == [2.0, -1.0]


@pytest.mark.parametrize("support", ["full", "sampled"])
def test_the_reference_adds_its_exact_reverse_kl_on_every_support(support: Any) -> None:
    rollouts = batch([[1, 2], [0]], STUDENT.table())
    given = scored(rollouts, [TEACHER], support)
    reference = evidence(rollouts, [OTHER], "full")
    objective = make(DivergenceObjective) if support == "full" else make(PolicyGradientObjective)
    plain, parts = run(objective, STUDENT, given)
    output, found = run(MixedObjective(objective, Mix(reference=0.3)), STUDENT, replace(given, reference=reference))
    before = rollouts.input_ids[rollouts.loss_mask.roll(-1, 1)]
    p, r = STUDENT.table()[before], OTHER.table().detach()[before]
    per_token = (p.exp() * (p - r)).sum(-1)
    penalty = 0.3 * per_token.mean()
    torch.testing.assert_close(output.loss, plain.loss + penalty.detach(), rtol=1e-6, atol=1e-8)
    extra = torch.autograd.grad(penalty, list(STUDENT.parameters()))
    assert_gradients(found, [a + b for a, b in zip(parts, extra, strict=True)])
    torch.testing.assert_close(output.token_stats["reference_divergence"], per_token.detach())


def test_the_supervised_term_is_the_cross_entropy_of_what_is_written() -> None:
    rollouts = batch([[1, 2], [3]], STUDENT.table().detach())
    weights = torch.tensor([0.25, 0.25, 0.5])
    output = STUDENT(rollouts, partial(supervised_loss, rollouts=rollouts, weights=weights))
    table = STUDENT.table()
    expected = -(0.25 * table[START, 1] + 0.25 * table[1, 2] + 0.5 * table[START, 3])
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("arguments", [{"outcome": -1.0}, {"reference": math.inf}, {"supervised": math.nan}])
def test_a_weight_that_is_none_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected a finite weight of at least 0"):
        Mix(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -1.0}, "threshold >= 0"),
        ({"k": 0}, "k >= 1"),
        ({"criterion": "trust", "threshold": 2.0}, r"in \[0, 1\]"),
    ],
)
def test_a_switch_that_never_or_always_switches_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(SwitchObjective, **arguments)
