from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from moteach.catalogue.spec import ExpertSpec
from moteach.conflict.pools import Linear
from moteach.divergences.chunked import chunked_divergence
from moteach.divergences.full import ReverseKL
from moteach.errors import ConfigError
from moteach.teachers.mapped import MappedStore
from moteach.teachers.pool import TeacherPool, store_of
from moteach.teachers.residency import Residency, parse_bytes
from moteach.testing import tiny_model
from moteach.types import Evidence, Head, Prompt, Rollout, RolloutBatch, Routing

EXPERTS = 5


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 * 2**30), ("500MB", 500 * 10**6), ("1.5 kib", 1536), ("7B", 7), ("3TB", 3 * 10**12), ("64 MiB", 2**26)],
)
def test_amounts_of_memory_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_bytes(text, where="teachers.memory") == size


@pytest.mark.parametrize("text", ["2", "GiB", "", "-1GiB", "2 gibibytes", "0MB", "1e3MB", "0.1B"])
def test_an_amount_without_a_unit_or_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"teachers\.memory: expected an amount of memory such as 2GiB"):
        parse_bytes(text, where="teachers.memory")


def loader(log: list[str], name: str) -> Callable[[], str]:
    return lambda: (log.append(name), name)[1]


def test_the_longest_unused_goes_first_and_the_budget_is_never_exceeded() -> None:
    loaded: list[str] = []
    gone: list[str] = []
    residency = Residency(budget=10, dropped=gone.append)
    for name, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)):
        assert residency.get(name, loader(loaded, name), nbytes=size) == name
        assert residency.nbytes <= 10
    assert loaded == ["a", "b", "c", "b"]
    assert gone == ["b", "c"]
    assert (residency.peak, residency.loads) == (8, 4)
    residency.clear()
    assert residency.nbytes == 0


def test_what_could_never_fit_is_refused_before_it_is_loaded() -> None:
    loaded: list[str] = []
    with pytest.raises(ConfigError, match="at least the 11 bytes of the largest expert, got 10"):
        Residency(budget=10).get("a", loader(loaded, "a"), nbytes=11)
    assert loaded == []


def test_a_prefetch_runs_beside_and_is_taken_over() -> None:
    residency = Residency(budget=10)
    residency.get("a", lambda: "a", nbytes=4)
    seen: list[int] = []
    release = threading.Event()

    def load() -> str:
        release.wait(10)
        seen.append(threading.get_ident())
        return "b"

    assert residency.prefetch("b", load, nbytes=6)
    assert residency.nbytes == 10
    release.set()
    assert residency.get("b", lambda: pytest.fail("loaded twice"), nbytes=6) == "b"
    assert seen != [threading.get_ident()]
    assert not residency.prefetch("c", lambda: "c", nbytes=5), "it would push out what is in use"
    assert "b" in residency


def test_a_prefetch_that_failed_says_so_where_it_is_needed_and_can_be_tried_again() -> None:
    residency = Residency(budget=10)

    def broken() -> str:
        raise OSError("disk")

    residency.prefetch("a", broken, nbytes=4)
    with pytest.raises(OSError, match="disk"):
        residency.get("a", lambda: "a", nbytes=4)
    assert residency.get("a", lambda: "a", nbytes=4) == "a"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertSpec]:
    """Four experts of one architecture, one of another, and one in bfloat16 with a head of its own."""
    folder = tmp_path_factory.mktemp("experts")
    for seed in range(EXPERTS):
        tied = seed != 3
        model: nn.Module = tiny_model(seed=seed, hidden=64 if seed < 4 else 32, tied=tied, scale=3.0)
        model.to(torch.bfloat16 if seed == 2 else torch.float32).save_pretrained(folder / f"e{seed}")
    return {f"e{seed}": ExpertSpec(name=f"e{seed}", model=str(folder / f"e{seed}")) for seed in range(EXPERTS)}


def batch(rows: int = 12) -> tuple[RolloutBatch, Routing]:
    generator = torch.Generator().manual_seed(0)
    rollouts = [
        Rollout(
            prompt=Prompt(prompt_id=f"p{row}", text="", token_ids=(3, 4, 5 + row)),
            sample=0,
            completion_ids=tuple(torch.randint(2, 60, (3 + row % 5,), generator=generator).tolist()),
            rollout_logprobs=(-1.0,) * (3 + row % 5),
            finished=True,
            student_version=0,
        )
        for row in range(rows)
    ]
    weights = torch.eye(EXPERTS)[torch.arange(rows) % EXPERTS]
    weights[0] = 1 / EXPERTS  # one row is merged from all
    routing = Routing(
        teacher_ids=tuple(f"e{i}" for i in range(EXPERTS)),
        prompt_ids=tuple(f"p{row}" for row in range(rows)),
        weights=weights,
        confidence=torch.ones(rows),
        abstained=torch.zeros(rows, dtype=torch.bool),
    )
    return RolloutBatch.from_rollouts(rollouts, pad_id=0), routing


def largest(experts: dict[str, ExpertSpec]) -> int:
    store = MappedStore(memory=2**30)
    for spec in experts.values():
        store.get(spec.weights)
    return max(expert.nbytes for expert in store._experts.values())


def loss_of(evidence: Evidence, routing: Routing, rollouts: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(evidence.num_tokens, 16, generator=generator).requires_grad_()
    out = chunked_divergence(
        student_hidden=hidden,
        student_head=Head(weight=torch.randn(64, 16, generator=generator)),
        teachers=evidence.teachers,
        weights=routing.weights[rollouts.token_rows],
        token_weights=torch.full((evidence.num_tokens,), 0.1),
        divergence=ReverseKL(),
        resolver=Linear(),
        chunk_size=7,
    )
    out.loss.backward()
    assert hidden.grad is not None
    return out.loss, hidden.grad


@pytest.mark.parametrize("budget", [1, 2, 100], ids=["one at a time", "with prefetch", "all"])
def test_scores_loss_and_gradient_are_bitwise_the_same_whatever_the_budget(
    experts: dict[str, ExpertSpec], budget: int
) -> None:
    rollouts, routing = batch()
    kept, mapped = (
        TeacherPool.from_experts(experts, store=store_of(memory)) for memory in (None, budget * largest(experts))
    )
    for _ in range(2):
        for support, k in (("sampled", None), ("topk", 5), ("full", None)):
            one = kept.score(rollouts, routing, support=support, k=k)
            other = mapped.score(rollouts, routing, support=support, k=k)
            for mine, theirs in zip(one.teachers, other.teachers, strict=True):
                assert torch.equal(mine.tokens, theirs.tokens)
                for name in ("hidden", "topk_ids", "topk_logprobs", "sampled_logprobs"):
                    first, second = getattr(mine, name), getattr(theirs, name)
                    assert (first is None and second is None) or torch.equal(first, second)
        losses = [loss_of(evidence, routing, rollouts) for evidence in (one, other)]
        assert torch.equal(losses[0][0], losses[1][0])
        assert torch.equal(losses[0][1], losses[1][1])
        assert float(losses[0][0].detach()) > 0.1


def test_a_budget_of_one_holds_one_and_experts_of_one_architecture_share_a_module(
    experts: dict[str, ExpertSpec],
) -> None:
    size = largest(experts)
    store = MappedStore(memory=size)
    modules = [store.get(spec.weights) for spec in experts.values()]
    assert modules[0] is modules[1]
    assert modules[0] is not modules[4]
    assert all(parameter.device.type == "meta" for parameter in modules[0].parameters()), "given up, so let go"
    assert not modules[4].training
    assert not any(parameter.requires_grad for parameter in modules[4].parameters())
    head = store.lend(experts["e1"].weights, revision=None, dtype="float32", rows=60)()
    assert head.weight.shape == (60, 64)
    assert store.residency.peak <= size


def file_behind(tensor: torch.Tensor) -> str:
    """The file that is mapped where a tensor lies, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.split()[5] if len(line.split()) > 5 else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the mappings that Linux tells")
def test_weights_are_views_of_the_mapped_file_unless_the_precision_differs(
    experts: dict[str, ExpertSpec], tmp_path: Path
) -> None:
    store = MappedStore(memory=2**30)
    found = {name: file_behind(store.get(spec.weights).get_input_embeddings().weight) for name, spec in experts.items()}
    for name in ("e0", "e1", "e3", "e4"):
        assert found[name] == f"{experts[name].weights}/model.safetensors"
    assert not found["e2"].endswith("safetensors"), "converted to float32"
    head = store.lend(experts["e1"].weights, revision=None, dtype="float32", rows=60)()
    assert file_behind(head.weight) == f"{experts['e1'].weights}/model.safetensors"
    store.residency.clear()
    del head
    gc.collect()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert not mapped, "given up, so unmapped"


def test_two_names_of_one_checkpoint_are_held_once(experts: dict[str, ExpertSpec], tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(experts["e0"].weights)
    store = MappedStore(memory=2**30)
    store.get(experts["e0"].weights)
    before = store.residency.nbytes
    store.get(str(tmp_path / "alias"))
    assert store.residency.nbytes == before


def test_hidden_states_wait_in_the_precision_that_was_asked_for(experts: dict[str, ExpertSpec]) -> None:
    rollouts, routing = batch()
    exact, rounded = (
        TeacherPool.from_experts(experts, hidden_dtype=dtype).score(rollouts, routing, support="full")
        for dtype in (None, torch.bfloat16)
    )
    for one, other in zip(exact.teachers, rounded.teachers, strict=True):
        assert one.hidden is not None
        assert other.hidden is not None
        assert other.hidden.dtype == torch.bfloat16
        torch.testing.assert_close(other.hidden.float(), one.hidden, rtol=2**-8, atol=0)
    near = [float(loss_of(evidence, routing, rollouts)[0].detach()) for evidence in (exact, rounded)]
    assert near[0] != near[1]
    assert near[1] == pytest.approx(near[0], rel=0.02)
