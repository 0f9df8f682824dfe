from __future__ import annotations

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, RoutingError
from moteach.routing.base import routing_of
from moteach.routing.label import LabelRouter, UniformRouter
from moteach.types import Prompt


def expert(name: str, *domains: str, weight: float = 1.0) -> ExpertSpec:
    return ExpertSpec(name=name, model=f"org/{name}", domains=list(domains), weight=weight)


def prompt(domain: str | None = None, teacher_id: str | None = None) -> Prompt:
    return Prompt(prompt_id=f"p-{domain}", text="x", token_ids=(1,), domain=domain, teacher_id=teacher_id)


def label_router(*experts: ExpertSpec, fallback: str | None = None) -> LabelRouter:
    router = LabelRouter(fallback=fallback)
    router.bind(experts)
    return router


def test_the_domain_chooses_the_expert() -> None:
    router = label_router(expert("math", "algebra", "sums"), expert("code", "python"))
    routing = router.route([prompt("python"), prompt("sums"), prompt("algebra")])
    assert routing.teacher_ids == ("math", "code")
    assert routing.prompt_ids == ("p-python", "p-sums", "p-algebra")
    assert routing.weights.tolist() == [[0, 1], [1, 0], [1, 0]]
    assert routing.confidence.tolist() == [1, 1, 1]
    assert not routing.abstained.any()


def test_the_teacher_id_wins_over_the_domain() -> None:
    router = label_router(expert("math", "math"), expert("code", "code"))
    assert router.route([prompt("math", teacher_id="code")]).weights.tolist() == [[0, 1]]


def test_a_domain_named_like_another_expert_is_still_a_domain() -> None:
    router = label_router(expert("math", "code"), expert("code", "math"))
    assert router.route([prompt("math")]).weights.tolist() == [[0, 1]]


def test_a_shared_domain_is_shared_by_weight() -> None:
    router = label_router(expert("a", "law", weight=3.0), expert("b", "tax"), expert("c", "law", weight=1.0))
    routing = router.route([prompt("law")])
    assert routing.weights.tolist() == [[0.75, 0.0, 0.25]]
    assert routing.confidence.tolist() == [0.75]


def test_the_weight_of_the_only_expert_does_not_matter() -> None:
    router = label_router(expert("a", "law", weight=0.2), expert("b", "tax"))
    assert router.route([prompt("law")]).weights.tolist() == [[1.0, 0.0]]


def test_an_expert_of_weight_zero_leaves_its_domain_without_a_teacher() -> None:
    router = label_router(expert("a", "law", weight=0.0), expert("b", "tax"))
    routing = router.route([prompt("law"), prompt("tax")])
    assert routing.abstained.tolist() == [True, False]
    assert routing.weights.tolist() == [[0, 0], [0, 1]]
    assert routing.confidence.tolist() == [0, 1]


def test_an_unknown_domain_is_refused_with_the_nearest_one() -> None:
    router = label_router(expert("math", "math"), expert("code", "code"))
    with pytest.raises(
        RoutingError, match=r"'p-maths' has the domain 'maths'.*did you mean 'math'.*router\.fallback=<expert>"
    ):
        router.route([prompt("maths")])


def test_an_unknown_teacher_is_refused_even_when_the_domain_is_known() -> None:
    router = label_router(expert("math", "sums"), expert("code", "python"))
    with pytest.raises(RoutingError, match=r"the teacher 'cod'.*did you mean 'code'.*valid choices: code, math"):
        router.route([prompt("sums", teacher_id="cod")])


def test_a_missing_label_is_refused() -> None:
    with pytest.raises(RoutingError, match=r"has no label.*valid choices: math"):
        label_router(expert("math", "math")).route([prompt()])


def test_the_fallback_takes_what_nobody_claims_and_nothing_else() -> None:
    router = label_router(expert("math", "math"), expert("code", "code"), fallback="code")
    routing = router.route([prompt("poetry"), prompt(), prompt("math")])
    assert routing.weights.tolist() == [[0, 1], [0, 1], [1, 0]]


def test_an_unknown_fallback_is_refused_when_the_experts_are_known() -> None:
    with pytest.raises(ConfigError, match=r"router\.fallback.*got 'cod'; did you mean 'code'"):
        label_router(expert("math", "math"), expert("code", "code"), fallback="cod")


def test_no_prompts_give_an_empty_routing() -> None:
    routing = label_router(expert("a", "x"), expert("b", "y")).route([])
    assert routing.weights.shape == (0, 2)


def test_binding_again_forgets_the_earlier_experts() -> None:
    router = label_router(expert("math", "math"))
    router.bind([expert("code", "code")])
    with pytest.raises(RoutingError, match="the domain 'math'"):
        router.route([prompt("math")])


def test_the_uniform_router_gives_every_row_the_weights_of_the_experts() -> None:
    router = UniformRouter()
    router.bind([expert("a", weight=1.0), expert("b", weight=3.0), expert("c", weight=0.0)])
    routing = router.route([prompt("x"), prompt(None)])
    assert routing.weights.tolist() == [[0.25, 0.75, 0.0]] * 2
    assert routing.confidence.tolist() == [0.75, 0.75]
    assert routing.rows_of("c").tolist() == []


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_no_distribution_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match=r"non-negative.*experts\.<name>\.weight"):
        routing_of([expert("a"), expert("b")], [prompt("x")], torch.tensor([[1.0, bad]]))
