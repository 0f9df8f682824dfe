"""What each gate computes, against the formula written out token by token in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moteach.errors import ConfigError
from moteach.routing.confidence import ConfidenceGate
from moteach.routing.context import GateContext
from moteach.routing.displacement import TrustGate
from moteach.routing.expert_align import ExpertAlignGate
from moteach.routing.novelty import NoveltyGate, accessible_novelty
from moteach.routing.oracle_gate import kinds_of
from moteach.routing.switch_penalty import SwitchPenaltyGate, best_path, marginals
from moteach.types import Evidence, Head, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

VOCAB = 7
LENGTHS = (3, 2, 4)
PRIOR = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]])


def tables(seed: int, scale: float = 1.5) -> Tensor:
    """Logprobs `[packed, vocab]`; with an identity head they are the hidden states themselves."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(sum(LENGTHS), VOCAB, generator=generator, dtype=torch.float64) * scale).log_softmax(-1)


HEAD = Head(weight=torch.eye(VOCAB, dtype=torch.float64))
STUDENT, BASES = tables(1), [tables(20 + k) for k in range(3)]
TEACHERS = [tables(10 + k, 1.0 + k) for k in range(3)]


def evidence(said: list[Tensor], rollouts: RolloutBatch) -> Evidence:
    entries = []
    for k, table in enumerate(said):
        tokens = (PRIOR[rollouts.token_rows, k] > 0).nonzero(as_tuple=True)[0]
        entries.append(
            TeacherEvidence(teacher_id=f"t{k}", support="full", tokens=tokens, hidden=table[tokens], head=HEAD)
        )
    return Evidence(teachers=tuple(entries), num_tokens=rollouts.num_tokens)


def context(**changes: Any) -> GateContext:
    rollouts = RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=Prompt(prompt_id=str(row), text="x", token_ids=(1,)),
                sample=0,
                completion_ids=(2,) * length,
                rollout_logprobs=(-1.0,) * length,
                finished=True,
                student_version=0,
            )
            for row, length in enumerate(LENGTHS)
        ],
        pad_id=0,
    )
    given: dict[str, Any] = {
        "rollouts": rollouts,
        "routing": Routing(
            teacher_ids=("t0", "t1", "t2"),
            prompt_ids=("0", "1", "2"),
            weights=PRIOR,
            confidence=PRIOR.amax(1),
            abstained=torch.zeros(3, dtype=torch.bool),
        ),
        "evidence": evidence(TEACHERS, rollouts),
        "student_hidden": STUDENT,
        "student_head": HEAD,
        "references": evidence(BASES, rollouts),
        "chunk_size": 5,
    }
    return GateContext(**{**given, **changes})


ROWS = [row for row, length in enumerate(LENGTHS) for _ in range(length)]


def expected(score: Any) -> Tensor:
    """Normalised prior * score(token, teacher), one token and one teacher at a time."""
    found = torch.zeros(len(ROWS), 3, dtype=torch.float64)
    for t, row in enumerate(ROWS):
        values = [float(PRIOR[row, k]) * score(t, k) if PRIOR[row, k] > 0 else 0.0 for k in range(3)]
        total = sum(values)
        found[t] = torch.tensor([value / total if total else 0.0 for value in values], dtype=torch.float64)
    return found


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def divergence(p: Tensor, q: Tensor) -> float:
    return float(sum(p[v].exp() * (p[v] - q[v]) for v in range(len(p))))


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_confidence_is_a_softmax_of_negative_entropy(temperature: float) -> None:
    def score(t: int, k: int) -> float:
        entropy = -sum(math.exp(value) * value for value in TEACHERS[k][t].tolist())
        return math.exp(-entropy / temperature)

    close(ConfidenceGate(temperature=temperature).weights(context()), expected(score))


def test_top_probability_at_temperature_one_weighs_in_proportion_to_it() -> None:
    gate = ConfidenceGate(measure="top_probability", temperature=1.0)
    close(gate.weights(context()), expected(lambda t, k: math.exp(float(TEACHERS[k][t].max()))))


def test_hard_confidence_takes_the_teacher_with_the_largest_soft_weight() -> None:
    soft, hard = (ConfidenceGate(temperature=0.5, hard=hard).weights(context()) for hard in (False, True))
    assert torch.equal(hard.argmax(-1), soft.argmax(-1))
    assert set(hard.flatten().tolist()) == {0.0, 1.0}


def novelty(known: Tensor, teacher: Tensor, k: int, scale: float) -> float:
    mine = set(known.topk(k).indices.tolist())
    shared = sorted(mine & set(teacher.topk(k).indices.tolist()))
    m_s, m_t = (sum(math.exp(side[v]) for v in shared) for side in (known, teacher))
    if not shared:
        return 0.0
    p, q = ([math.exp(side[v]) / mass for v in shared] for side, mass in ((known, m_s), (teacher, m_t)))
    js = sum(
        0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b)) for a, b in zip(p, q, strict=True)
    )
    return math.sqrt(m_s * m_t) * (1 - math.exp(-js / scale))


@pytest.mark.parametrize("k", [2, 4, 50])
def test_novelty_is_the_divergence_on_what_both_find_likely(k: int) -> None:
    found = accessible_novelty(STUDENT, TEACHERS[1], k=k, scale=0.3)
    size = min(k, VOCAB)
    close(found, torch.tensor([novelty(s, t, size, 0.3) for s, t in zip(STUDENT, TEACHERS[1], strict=True)]).double())


@pytest.mark.parametrize("against", ["student", "reference"])
def test_novelty_weights(against: Any) -> None:
    def score(t: int, k: int) -> float:
        known = STUDENT[t] if against == "student" else BASES[k][t]
        return math.exp(novelty(known, TEACHERS[k][t], 4, 0.1) / 0.1)

    close(NoveltyGate(against=against, k=4).weights(context()), expected(score))


def shifts(t: int, k: int, size: int) -> tuple[list[float], list[float]]:
    top = STUDENT[t].topk(size).indices.tolist()
    learned = [float(TEACHERS[k][t][v] - BASES[k][t][v]) for v in top]
    return learned, [float(TEACHERS[k][t][v] - STUDENT[t][v]) for v in top]


@pytest.mark.parametrize("weighting", ["cosine", "uniform"])
def test_expert_align_keeps_teachers_whose_lesson_is_their_speciality(weighting: Any) -> None:
    def score(t: int, k: int) -> float:
        learned, lesson = shifts(t, k, 2)
        inner = sum(a * b for a, b in zip(learned, lesson, strict=True))
        if inner <= 1e-6:
            return 0.0
        return inner / (math.hypot(*learned) * math.hypot(*lesson)) if weighting == "cosine" else 1.0

    want = expected(score)
    assert bool((want.sum(-1) == 0).any())
    assert bool(((want > 0).sum(-1) > 1).any())
    close(ExpertAlignGate(k=2, weighting=weighting).weights(context()), want)


@pytest.mark.parametrize("calibration", ["none", "completion"])
def test_trust_is_in_proportion_to_the_displacement(calibration: Any) -> None:
    moved = torch.tensor([[divergence(TEACHERS[k][t], BASES[k][t]) for k in range(3)] for t in range(len(ROWS))])

    def score(t: int, k: int) -> float:
        mine = [u for u, row in enumerate(ROWS) if row == ROWS[t]]
        scale = float(moved[mine, k].mean()) if calibration == "completion" else 1.0
        return (float(moved[t, k]) / scale) ** 2

    close(TrustGate(calibration=calibration, sharpness=2.0).weights(context()), expected(score))


def test_a_teacher_that_never_moved_is_not_trusted() -> None:
    whole = context()
    assert whole.evidence is not None
    assert not TrustGate().weights(context(references=whole.evidence)).any()


def test_a_teacher_without_a_reference_is_refused_by_name() -> None:
    whole = context()
    assert whole.references is not None
    fewer = Evidence(teachers=whole.references.teachers[1:], num_tokens=whole.references.num_tokens)
    with pytest.raises(ConfigError, match=r"experts\.t0\.reference"):
        TrustGate().weights(context(references=fewer))


def chain(seed: int = 5, lengths: tuple[int, ...] = (4, 1, 3), teachers: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inside = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    shares = torch.rand(len(lengths), max(lengths), teachers, generator=generator, dtype=torch.float64)
    shares[0, 1, 2] = 0.0
    return (shares / shares.sum(-1, keepdim=True)).log().masked_fill(~inside.unsqueeze(-1), 0.0), inside


def paths(emissions: Tensor, cost: float) -> dict[tuple[int, ...], float]:
    """Unnormalised probability of every sequence of teachers of one completion."""
    length, teachers = emissions.shape
    found = {}
    for path in itertools.product(range(teachers), repeat=length):
        switches = sum(a != b for a, b in itertools.pairwise(path))
        found[path] = math.exp(sum(float(emissions[t, k]) for t, k in enumerate(path)) - cost * switches)
    return found


@pytest.mark.parametrize("cost", [0.0, 0.4, 3.0])
def test_marginals_are_those_of_the_enumerated_sequences(cost: float) -> None:
    emissions, inside = chain()
    got = marginals(emissions, inside, cost)
    for row, length in enumerate(inside.sum(1).tolist()):
        every = paths(emissions[row, :length], cost)
        total = sum(every.values())
        for t, k in itertools.product(range(length), range(3)):
            want = sum(value for path, value in every.items() if path[t] == k) / total
            assert float(got[row, t, k]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("cost", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_path_is_that_of_the_enumerated_sequences(cost: float, seed: int) -> None:
    emissions, inside = chain(seed)
    got = best_path(emissions, inside, cost).argmax(-1)
    for row, length in enumerate(inside.sum(1).tolist()):
        every = paths(emissions[row, :length], cost)
        assert tuple(got[row, :length].tolist()) == max(every, key=lambda path: every[path])


def test_no_cost_gives_the_inner_gate_back_and_a_large_one_a_single_teacher() -> None:
    inner = ConfidenceGate(temperature=0.5)
    close(SwitchPenaltyGate(gate=inner, cost=0.0).weights(context()), inner.weights(context()).double())
    chosen = SwitchPenaltyGate(gate=inner, cost=50.0, hard=True).weights(context()).argmax(-1).tolist()
    assert [len(set(chosen[a:b])) for a, b in ((0, 3), (3, 5), (5, 9))] == [1, 1, 1]


def test_an_abstained_token_stays_so_and_says_nothing_about_its_neighbours() -> None:
    class Silent:
        needs: frozenset[str] = frozenset()
        supports = frozenset({"full"})
        per_token, trace = True, False

        def weights(self, context: GateContext) -> Tensor:
            weights = torch.zeros(9, 3)
            weights[0], weights[2] = torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.3, 0.3, 0.4])
            return weights

    found = SwitchPenaltyGate(gate=Silent(), cost=1.0).weights(context())
    assert found.sum(-1).tolist() == pytest.approx([1, 0, 1, 0, 0, 0, 0, 0, 0])
    every = paths(torch.tensor([[0.9, 0.1, 1e-300], [1.0, 1.0, 1.0], [0.3, 0.3, 0.4]]).double().log(), 1.0)
    want = sum(value for path, value in every.items() if path[2] == 0) / sum(every.values())
    assert float(found[2, 0]) == pytest.approx(want, abs=1e-6)


STEPS = {"steps": [{"kind": "search", "text": "A37+B52="}, {"kind": "math", "text": "89"}]}


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("A37+B52=89", "ssssssssmm"),
        ("A3=99=", "sssmmm"),
        ("+89", "sss"),
        ("", ""),
    ],
)
def test_steps_end_at_the_students_own_separators(text: str, kinds: str) -> None:
    found = kinds_of(Prompt(prompt_id="p", text="x", token_ids=(1,), metadata=STEPS), list(text))
    assert "".join(str(kind)[0] for kind in found) == kinds


def test_a_separator_that_a_step_repeats_ends_it_the_last_time() -> None:
    metadata = {"steps": [{"kind": "a", "text": "1;2;"}, {"kind": "b", "text": "3"}]}
    found = kinds_of(Prompt(prompt_id="p", text="x", token_ids=(1,), metadata=metadata), list("1;2;3"))
    assert found == ["a", "a", "a", "a", "b"]
    assert kinds_of(Prompt(prompt_id="p", text="x", token_ids=(1,)), ["1"]) == [None]
