"""Heads and calibrations against independent references: scikit-learn, closed forms, loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moteach.errors import ConfigError
from moteach.routing.calibration import apply_isotonic, fit_isotonic, fit_temperature, smoothed_loss
from moteach.routing.heads import ClassifierHead, NeighbourHead, PrototypeHead


def unit(rows: int, *, seed: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=1)


def labels(rows: int, experts: int = 3) -> Tensor:
    """Unequal classes: 0 0 0 1 1 2, again and again."""
    return torch.tensor([0, 0, 0, 1, 1, 2]).repeat(rows)[:rows] % experts


def one_hot(own: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(own).bool()


def prototype(aggregation: Any, top_k: int = 3) -> PrototypeHead:
    head = PrototypeHead(aggregation=aggregation, top_k=top_k, score_temperature=0.5)
    head.fit(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]), one_hot(torch.tensor([0, 0, 1, 2])))
    return head


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # cosines of (.6, .8) to the exemplars: .6, .96, .8, -.6; the three nearest are .96, .8, .6
        ("centroid", [(0.6 * 1.8 + 0.8 * 0.6) / math.sqrt(1.8**2 + 0.6**2), 0.8, -0.6]),
        ("mean", [0.78, 0.8, -1.0]),
        ("max", [0.96, 0.8, -1.0]),
        ("sum", [1.56, 0.8, -3.0]),
    ],
)
def test_prototypes_by_hand(aggregation: str, expected: list[float]) -> None:
    logits = prototype(aggregation).logits(torch.tensor([[0.6, 0.8]]))
    assert (logits[0] * 0.5).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("votes", ["uniform", "distance"])
def test_votes_are_those_of_scikit_learn(votes: Any) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    known, asked, own = unit(30, seed=0), unit(17, seed=1), labels(30)
    head = NeighbourHead(neighbours=7, votes=votes, smoothing=1e-12)
    head.fit(known, one_hot(own))
    reference = neighbors.KNeighborsClassifier(7, weights=votes).fit(known.numpy(), own.numpy())
    np.testing.assert_allclose(head.logits(asked).exp().numpy(), reference.predict_proba(asked.numpy()), atol=1e-10)


def test_smoothing_gives_every_expert_its_share() -> None:
    head = NeighbourHead(neighbours=1, votes="uniform", smoothing=0.1)
    head.fit(unit(6, seed=0), one_hot(labels(6)))
    assert head.logits(unit(1, seed=3)).exp().sort().values[0].tolist() == pytest.approx(
        [0.1 / 1.3, 0.1 / 1.3, 1.1 / 1.3]
    )


def test_the_classifier_is_softmax_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    known, asked, own = unit(30, seed=0), unit(17, seed=1), labels(30)
    head = ClassifierHead(hidden=None, l2=0.05, max_iterations=500, seed=0)
    head.fit(known, one_hot(own))
    # scikit-learn minimises C * sum of weighted losses + w^2 / 2; balanced weights sum to the number of rows
    reference = linear.LogisticRegression(C=1 / (0.05 * 30), class_weight="balanced", tol=1e-12, max_iter=10000)
    reference.fit(known.numpy(), own.numpy())
    np.testing.assert_allclose(
        head.logits(asked).softmax(dim=1).numpy(), reference.predict_proba(asked.numpy()), atol=1e-6
    )


def test_a_hidden_layer_learns_what_a_line_cannot() -> None:
    """Exclusive or."""
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    own = torch.tensor([0, 1, 1, 0])
    found = {}
    for hidden in (None, 8):
        head = ClassifierHead(hidden=hidden, l2=1e-5, max_iterations=500, seed=0)
        head.fit(corners, one_hot(own))
        found[hidden] = head.logits(corners).softmax(dim=1)
    torch.testing.assert_close(found[None], torch.full((4, 2), 0.5, dtype=torch.float64))
    assert found[8].argmax(dim=1).tolist() == own.tolist()


def test_a_shared_exemplar_is_shared() -> None:
    head = ClassifierHead(hidden=None, l2=1e-3, max_iterations=500, seed=0)
    vectors = torch.eye(3)
    head.fit(vectors, torch.tensor([[True, False], [False, True], [True, True]]))
    probabilities = head.logits(vectors).softmax(dim=1)
    assert probabilities[2].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    assert probabilities[0, 0] > 0.9 < probabilities[1, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PrototypeHead(aggregation="mean", top_k=0, score_temperature=1.0),
        lambda: NeighbourHead(neighbours=3, votes="uniform", smoothing=0.0),
        lambda: ClassifierHead(hidden=0, l2=0.1, max_iterations=5, seed=0),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"router\."):
        make()


def test_the_temperature_of_two_experts_in_closed_form() -> None:
    """Scores +-1 with three of four right: sigmoid(2 / T) = (4 * 3/4 + 1) / (4 + 2), Platt's target."""
    logits = torch.tensor([[0.0, 2.0]]).repeat(4, 1)
    temperature = fit_temperature(logits, one_hot(torch.tensor([1, 1, 1, 0])))
    assert 1 / (1 + math.exp(-2 / temperature)) == pytest.approx(4 / 6, abs=1e-6)


def test_the_temperature_is_where_the_loss_is_least() -> None:
    logits, owners = 7 * torch.randn(40, 3, generator=torch.Generator().manual_seed(3)), one_hot(labels(40))
    owners[::7, 1] = True
    found = fit_temperature(logits, owners)
    grid = torch.linspace(-3, 5, 4001, dtype=torch.float64).exp().tolist()
    least = min(smoothed_loss(logits, owners, temperature=t) for t in grid)
    assert smoothed_loss(logits, owners, temperature=found) <= least + 1e-9


def test_separated_exemplars_do_not_make_certainty() -> None:
    """The most that 9 prompts of 3 experts can be sure of is 10 / 12."""
    own = labels(9)
    logits = one_hot(own).double()
    temperature = fit_temperature(logits, one_hot(own))
    assert (logits / temperature).softmax(dim=1).max(dim=1).values.tolist() == pytest.approx([10 / 12] * 9, abs=1e-6)


def test_the_smoothed_loss_by_hand() -> None:
    """One prompt, two experts, p = (.8, .2), the first is right: -(1/3 ln .8 + 1/3 ln .8 + 1/3 ln .2)."""
    value = smoothed_loss(
        torch.tensor([[math.log(0.8), math.log(0.2)]]), torch.tensor([[True, False]]), temperature=1.0
    )
    assert value == pytest.approx(-(2 * math.log(0.8) + math.log(0.2)) / 3, abs=1e-7)


def test_isotonic_regression_is_that_of_scikit_learn() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    generator = torch.Generator().manual_seed(0)
    confidence = (torch.rand(60, dtype=torch.float64, generator=generator) * 40).round() / 40
    correct = torch.rand(60, dtype=torch.float64, generator=generator) < confidence**2
    asked = torch.linspace(-0.1, 1.1, 101, dtype=torch.float64)
    reference = isotonic.IsotonicRegression(out_of_bounds="clip").fit(confidence.numpy(), correct.double().numpy())
    found = apply_isotonic(asked, *fit_isotonic(confidence, correct))
    np.testing.assert_allclose(found.numpy(), (60 * reference.predict(asked.numpy()) + 1) / 62, atol=1e-12)


def test_isotonic_regression_by_hand() -> None:
    knots, values = fit_isotonic(torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([False, True, False, True]))
    assert knots == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values == pytest.approx([1 / 6, 1 / 2, 1 / 2, 5 / 6])
    assert apply_isotonic(torch.tensor([0.3, 0.5, 0.9]), knots, values).tolist() == pytest.approx([1 / 3, 1 / 2, 5 / 6])


def test_one_point_is_flat() -> None:
    knots, values = fit_isotonic(torch.tensor([0.5, 0.5]), torch.tensor([True, False]))
    assert apply_isotonic(torch.tensor([0.1, 0.9]), knots, values).tolist() == [0.5, 0.5]
