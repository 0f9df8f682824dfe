"""Every YAML in conf/router is a router: a new option is tested by being there."""

from __future__ import annotations

import functools
import json
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_sentences import make_sentence_encoder

from moteach.catalogue.spec import ExpertSpec
from moteach.config.build import build
from moteach.routing.base import AskingRouter, ReliabilityReader
from moteach.types import Evidence, Prompt, Rollout, RolloutBatch, Routing, TeacherEvidence

EXEMPLARS = tempfile.TemporaryDirectory()
MODELS = tempfile.TemporaryDirectory()
FOLDER = Path(EXEMPLARS.name)
FILES = sorted((Path(__file__).parents[2] / "conf" / "router").glob("*.yaml"))
NAMES = ("math", "code", "search", "law", "tax")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@functools.cache
def sentences() -> str:
    """The folder of a tiny sentence encoder, for routers that train theirs."""
    pytest.importorskip("sentence_transformers")
    return str(make_sentence_encoder(Path(MODELS.name), list(NAMES)))


def make(option: Path, experts: list[ExpertSpec], **changed: Any) -> Any:
    """Builds the option as it ships, except that seeds are numbers and encoders need no download."""
    node = {key: 0 if value == "${seed}" else value for key, value in yaml.safe_load(option.read_text()).items()}
    encoder = sentences() if "learning_rate" in node else "ngrams"
    given = {
        "encoder": encoder,
        "cache": None,
        "epochs": 8,
        "learning_rate": 0.01,
    }  # an untrained encoder has more to learn
    node |= {key: value for key, value in given.items() if key in node}
    router = build(node | changed, where="router")
    router.bind(experts)
    if isinstance(router, ReliabilityReader):
        router.bind_reliability(Record())
    if isinstance(router, AskingRouter):
        router.bind_teachers(say)
        route = router.route
        router.route = lambda prompts: route(prompts, completions(prompts))  # type: ignore[method-assign]
    return router


class Record:
    """A reliability that is a hash of teacher and domain."""

    def of(self, teacher_id: str, domain: str) -> float:
        return (1 + zlib.crc32(f"{teacher_id} {domain}".encode())) / 2.0**33


def completions(prompts: list[Prompt]) -> RolloutBatch:
    """A completion of its own for each prompt."""
    return RolloutBatch.from_rollouts(
        [
            Rollout(
                prompt=prompt,
                sample=0,
                completion_ids=(3, 4, 5),
                rollout_logprobs=(-1.0, -1.0, -1.0),
                finished=True,
                student_version=0,
            )
            for prompt in prompts
        ],
        pad_id=0,
    )


def say(rollouts: RolloutBatch, routing: Routing) -> Evidence:
    """What teachers that are only a hash of their name and the prompt say; `lost` prompts are heard by none but math."""
    said = []
    for name in routing.teacher_ids:
        rows = [
            row
            for row in routing.rows_of(name).tolist()
            if "lost" not in rollouts.rollouts[row].prompt.text or name == "math"
        ]
        tokens = torch.isin(rollouts.token_rows, torch.tensor(rows)).nonzero(as_tuple=True)[0]
        values = [
            zlib.crc32(f"{name}{rollouts.rollouts[row].prompt.text}".encode()) / -(2.0**32)
            for row in rollouts.token_rows[tokens].tolist()
        ]
        said.append(
            TeacherEvidence(
                teacher_id=name, support="sampled", tokens=tokens, sampled_logprobs=torch.tensor(values).reshape(-1)
            )
        )
    return Evidence(teachers=tuple(said), num_tokens=rollouts.num_tokens)


def exemplars_of(name: str) -> Path:
    """A file of exemplars: ten of the expert's own, and one that all experts share."""
    path = FOLDER / f"{name}.jsonl"
    texts = [*(f"{name} number {i} of {name}" for i in range(10)), "something for everybody"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def experts(count: int, *, weights: tuple[float, ...] = (1.0, 2.0, 0.5, 3.0, 1.5)) -> list[ExpertSpec]:
    """Experts with a domain each and one they share."""
    return [
        ExpertSpec(
            name=name, model=f"org/{name}", domains=[name, "shared"], weight=weight, exemplars=str(exemplars_of(name))
        )
        for name, weight in zip(NAMES[:count], weights, strict=False)
    ]


def prompts(count: int) -> list[Prompt]:
    domains = [*NAMES[:count], "shared", NAMES[0]]
    return [
        Prompt(prompt_id=f"p{i}", text=f"a question of {domain}", token_ids=(1, 2), domain=domain)
        for i, domain in enumerate(domains)
    ]


def check(routing: Routing, rows: int, teachers: int) -> None:
    assert routing.weights.shape == (rows, teachers)
    assert bool((routing.weights >= 0).all())
    sums = routing.weights.sum(dim=1)
    torch.testing.assert_close(sums, (~routing.abstained).float())
    assert bool(((routing.confidence >= 0) & (routing.confidence <= 1)).all())


def test_there_are_options() -> None:
    names = {"label", "uniform", "random", "oracle", "embedding_prototype", "embedding_knn", "classifier"}
    names |= {"likelihood", "learned", "finetuned", "reliability"}
    assert names <= {path.stem for path in FILES}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_sum_to_one_or_abstain(path: Path, count: int) -> None:
    rows = prompts(count)
    routing = make(path, experts(count)).route(rows)
    check(routing, len(rows), count)
    assert routing.teacher_ids == NAMES[:count]
    assert routing.prompt_ids == tuple(prompt.prompt_id for prompt in rows)


def test_one_expert_teaches_everything(path: Path) -> None:
    routing = make(path, experts(1)).route(prompts(1))
    assert routing.weights.tolist() == [[1.0]] * len(prompts(1))
    assert not routing.abstained.any()


def test_permuting_the_experts_permutes_the_weights(path: Path) -> None:
    given, order = experts(5), [3, 0, 4, 1, 2]
    straight = make(path, given).route(prompts(5))
    permuted = make(path, [given[i] for i in order]).route(prompts(5))
    assert permuted.teacher_ids == tuple(NAMES[i] for i in order)
    torch.testing.assert_close(permuted.weights, straight.weights[:, order])
    torch.testing.assert_close(permuted.confidence, straight.confidence)


def test_the_order_of_the_prompts_does_not_matter(path: Path) -> None:
    router, rows = make(path, experts(3)), prompts(3)
    straight = router.route(rows).weights
    torch.testing.assert_close(router.route(rows[::-1]).weights, straight.flip(0))
    torch.testing.assert_close(torch.cat([router.route([row]).weights for row in rows]), straight)


def test_a_dropped_or_a_failed_rollout_moves_no_other_prompt(path: Path) -> None:
    router, rows = make(path, experts(5)), prompts(5)
    straight = router.route(rows).weights
    kept = [0, 2, 3, 6]
    assert torch.equal(router.route([rows[i] for i in kept]).weights, straight[kept])
    failed = [replace(row, text=f"lost {row.text}") if i == 1 else row for i, row in enumerate(rows)]
    others = [0, 2, 3, 4, 5, 6]
    assert torch.equal(router.route(failed).weights[others], straight[others])


def test_experts_of_weight_zero_get_nothing_they_share(path: Path) -> None:
    routing = make(path, experts(3, weights=(1.0, 0.0, 1.0))).route(prompts(3))
    shared = routing.weights[3]
    assert shared[1] == 0.0


def test_state_survives_json(path: Path) -> None:
    router = make(path, experts(3))
    before = router.route(prompts(3)).weights
    other = make(path, experts(3))
    other.load_state_dict(json.loads(json.dumps(router.state_dict())))
    torch.testing.assert_close(other.route(prompts(3)).weights, before, atol=0, rtol=0)


def test_a_step_without_prompts_is_no_error(path: Path) -> None:
    check(make(path, experts(2)).route([]), 0, 2)


def test_the_same_seed_gives_the_same_routes(path: Path) -> None:
    first, second = (make(path, experts(5)).route(prompts(5)) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.confidence, second.confidence)


SOFT = [path for path in FILES if "weighting" in path.read_text()]
LEARNED = [path for path in FILES if "encoder" in path.read_text()]


@pytest.mark.parametrize("learned", SOFT, ids=lambda path: path.stem)
@pytest.mark.parametrize("weighting", ["top_m", "soft"])
def test_soft_weights_hold_the_contract_too(learned: Path, weighting: str) -> None:
    given, order = experts(5), [3, 0, 4, 1, 2]
    straight = make(learned, given, weighting=weighting, m=3).route(prompts(5))
    check(straight, 7, 5)
    assert int((straight.weights > 0).sum(dim=1).max()) == (3 if weighting == "top_m" else 5)
    permuted = make(learned, [given[i] for i in order], weighting=weighting, m=3).route(prompts(5))
    torch.testing.assert_close(permuted.weights, straight.weights[:, order], atol=0, rtol=0)


@pytest.mark.parametrize("learned", SOFT, ids=lambda path: path.stem)
def test_an_expensive_expert_gets_less_where_costs_count(learned: Path) -> None:
    given = experts(5)
    dear = [replace(expert, cost=50.0 * (expert.name == "math")) for expert in given]
    free = make(learned, given, weighting="soft").route(prompts(5)).weights
    ignored = make(learned, dear, weighting="soft").route(prompts(5)).weights
    assert torch.equal(ignored, free)
    paid = make(learned, dear, weighting="soft", cost_weight=1.0).route(prompts(5))
    check(paid, 7, 5)
    assert bool((paid.weights[:, 0] < 1e-6).all())
    left = free[:, 1:] / free[:, 1:].sum(dim=1, keepdim=True)
    torch.testing.assert_close(paid.weights[:, 1:], left, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("learned", LEARNED, ids=lambda path: path.stem)
def test_a_saved_router_routes_identically(learned: Path, tmp_path: Path) -> None:
    router = make(learned, experts(5), weighting="soft", temperature=0.7)
    straight = router.route(prompts(5))
    router.save_pretrained(tmp_path / "router")
    opened = type(router).from_pretrained(tmp_path / "router").route(prompts(5))
    assert opened.teacher_ids == straight.teacher_ids
    assert torch.equal(opened.weights, straight.weights)
    assert torch.equal(opened.confidence, straight.confidence)
    loaded = make(learned, experts(5), weighting="soft", temperature=0.7, path=str(tmp_path / "router"))
    assert torch.equal(loaded.route(prompts(5)).weights, straight.weights)
    assert loaded.state_dict() == router.state_dict()
    kept = {"README.md", "router.json", "router.safetensors"} | (
        {"encoder"} if "learning_rate" in learned.read_text() else set()
    )
    assert {file.name for file in (tmp_path / "router").iterdir()} == kept
    assert {file.suffix for file in (tmp_path / "router").rglob("*.*") if file.is_file()} == {
        ".md",
        ".json",
        ".safetensors",
    }
    assert str(FOLDER) not in (tmp_path / "router" / "router.json").read_text()


@pytest.mark.parametrize("learned", LEARNED, ids=lambda path: path.stem)
def test_a_learned_router_finds_the_expert_without_a_label(learned: Path) -> None:
    rows = [Prompt(prompt_id=name, text=f"a question of {name}", token_ids=()) for name in NAMES]
    routing = make(learned, experts(5)).route(rows)
    assert routing.weights.tolist() == torch.eye(5).tolist()
