from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, RoutingError
from moteach.routing.learned import ClassifierRouter
from moteach.routing.likelihood import LikelihoodRouter, completion_logprobs
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

NAMES = ("math", "code", "law")
LENGTHS = (3, 1, 0, 5)


def batch(texts: tuple[str, ...] = ("a", "b", "c", "d"), lengths: tuple[int, ...] = LENGTHS) -> RolloutBatch:
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=text, text=text, token_ids=(1, 2)),
                sample=0,
                completion_ids=tuple(range(3, 3 + length)),
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for text, length in zip(texts, lengths, strict=True)
        ],
        pad_id=0,
    )


class Witness:
    """Teachers whose logprobs are drawn per packed token; remembers what it was asked, and may fall silent."""

    def __init__(self, rollouts: RolloutBatch, silent: tuple[str, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(3)
        self.table = {name: -3 * torch.rand(rollouts.num_tokens, generator=generator) for name in NAMES}
        self.silent = silent
        self.asked: dict[str, list[int]] = {}

    def __call__(self, rollouts: RolloutBatch, routing: Routing) -> Evidence:
        said = []
        for name in routing.teacher_ids:
            rows = routing.rows_of(name)
            self.asked[name] = rows.tolist()
            tokens = torch.isin(rollouts.token_rows, rows).nonzero(as_tuple=True)[0]
            if len(tokens) and name not in self.silent:
                said.append(
                    TeacherEvidence(
                        teacher_id=name, support="sampled", tokens=tokens, sampled_logprobs=self.table[name][tokens]
                    )
                )
        return Evidence(teachers=tuple(said), num_tokens=rollouts.num_tokens)


def experts(**cost: float) -> list[ExpertSpec]:
    return [ExpertSpec(name=name, model=f"org/{name}", cost=cost.get(name, 0.0)) for name in NAMES]


def routed(rollouts: RolloutBatch, ask: Witness, **changed: object) -> Routing:
    router = LikelihoodRouter(**changed)  # type: ignore[arg-type]
    router.bind(experts())
    router.bind_teachers(ask)
    return router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)


def by_hand(ask: Witness, *, mean: bool) -> list[list[float]]:
    table, start = [], 0
    for length in LENGTHS:
        row = [float(ask.table[name][start : start + length].double().sum()) for name in NAMES]
        table.append([value / length if mean and length else value for value in row])
        start += length
    return table


@pytest.mark.parametrize("mean", [True, False])
def test_soft_weights_are_the_softmax_of_the_completions_logprobs(mean: bool) -> None:
    rollouts = batch()
    ask = Witness(rollouts)
    routing = routed(rollouts, ask, weighting="soft", temperature=0.7, length_normalise=mean)
    expected = (torch.tensor(by_hand(ask, mean=mean)).double() / 0.7).softmax(dim=1).float()
    torch.testing.assert_close(routing.weights[[0, 1, 3]], expected[[0, 1, 3]])
    assert routing.abstained.tolist() == [False, False, True, False]
    torch.testing.assert_close(routing.confidence[[0, 1, 3]], expected[[0, 1, 3]].amax(dim=1))


def test_hard_takes_the_best_explanation_and_top_m_renormalises() -> None:
    rollouts = batch()
    ask = Witness(rollouts)
    table = torch.tensor(by_hand(ask, mean=True))
    hard = routed(rollouts, ask)
    assert hard.weights[[0, 1, 3]].argmax(dim=1).tolist() == table[[0, 1, 3]].argmax(dim=1).tolist()
    assert hard.weights.sum(dim=1).tolist() == [1.0, 1.0, 0.0, 1.0]
    top = routed(rollouts, ask, weighting="top_m", m=2)
    best = table[0].topk(2)
    torch.testing.assert_close(top.weights[0, best.indices], best.values.softmax(dim=0))


def test_an_underflowing_sum_is_still_compared() -> None:
    rollouts = batch()
    ask = Witness(rollouts)
    ask.table = {name: values * 1000 for name, values in ask.table.items()}
    routing = routed(rollouts, ask, weighting="soft", temperature=1000.0, length_normalise=False)
    assert 0.0 < float(routing.weights[3].min()) < float(routing.weights[3].max()) < 1.0


def test_a_silent_teacher_loses_its_rows_and_moves_nobody_elses() -> None:
    rollouts = batch()
    whole = routed(rollouts, Witness(rollouts), weighting="soft").weights
    left = routed(rollouts, Witness(rollouts, silent=("code",)), weighting="soft").weights
    torch.testing.assert_close(left[:, 1], torch.zeros(4))
    kept = whole[:, [0, 2]] / whole[:, [0, 2]].sum(dim=1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(left[:, [0, 2]], kept)
    assert routed(rollouts, Witness(rollouts, silent=NAMES)).abstained.all()


def test_a_row_scored_in_part_is_not_compared() -> None:
    rollouts = batch()
    entry = TeacherEvidence(
        teacher_id="math", support="sampled", tokens=torch.tensor([0, 1, 3]), sampled_logprobs=torch.full((3,), -2.0)
    )
    table = completion_logprobs(Evidence(teachers=(entry,), num_tokens=9), rollouts, NAMES)
    assert table[1].tolist()[0] == -2.0
    assert int((~table.isnan()).sum()) == 1


def test_only_the_candidates_of_a_saved_router_are_asked(tmp_path: Path) -> None:
    cards = []
    for name in NAMES:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name} number {i} of {name}"}) + "\n" for i in range(6)))
        cards.append(ExpertSpec(name=name, model=f"org/{name}", exemplars=str(path)))
    first = ClassifierRouter(encoder="ngrams", cache=None)
    first.bind(cards)
    first.save_pretrained(tmp_path / "router")
    rollouts = batch(("ask math of math", "a code of code"), (2, 2))
    ask = Witness(rollouts)
    router = LikelihoodRouter(candidates_path=str(tmp_path / "router"), candidates=1)
    router.bind(cards)
    router.bind_teachers(ask)
    routing = router.route([rollout.prompt for rollout in rollouts.rollouts], rollouts)
    assert ask.asked == {"math": [0], "code": [1], "law": []}
    assert routing.weights.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_prompts_alone_and_wrong_numbers_are_refused() -> None:
    router = LikelihoodRouter()
    router.bind(experts())
    with pytest.raises(RoutingError, match="expected completions and teachers"):
        router.route([Prompt(prompt_id="a", text="a", token_ids=())])
    with pytest.raises(ConfigError, match="temperature"):
        LikelihoodRouter(temperature=0.0)
