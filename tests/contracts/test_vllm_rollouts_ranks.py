"""Two ranks that hold a student together ask one server: its samples, its errors and its weights are those of one process."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_rollouts import FakeRollouts
from torch import multiprocessing

from moteach.distributed import Ranks, is_sharded, local
from moteach.errors import MoteachError
from moteach.rollouts import parts
from moteach.rollouts.vllm import VLLMEngine
from moteach.sharding import shard
from moteach.students import Student
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

PROMPTS = tiny_prompts(["1+1=", "abc", "reverse xyz: "])
LAYERS = 3


def plain() -> Any:
    return tiny_model(seed=3, scale=2.0, layers=LAYERS)


def engine(url: str, model: Any) -> VLLMEngine:
    given = {"url": url, "max_new_tokens": 6, "backoff": 0.0, "attempts": 2, "check_tokens": 12}
    return VLLMEngine(**given).bind(model, tiny_tokenizer())


@torch.no_grad()
def moved(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        local(parameter).mul_(1.05)


def written(batch: Any) -> list[list[Any]]:
    return [[r.prompt.prompt_id, r.sample, list(r.completion_ids), r.student_version] for r in batch.rollouts]


def spawned(rank: int, work: Callable[[VLLMEngine, Student, Ranks], Any], url: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student, ranks = Student(plain(), tiny_tokenizer()), Ranks(rank=rank, size=2)
    student.train()
    shard(student, ranks)
    served = engine(url, student.model)
    served.join(ranks, student)
    try:
        found = work(served, student, ranks)
    except MoteachError as error:
        found = [type(error).__name__, str(error)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(work: Callable[[VLLMEngine, Student, Ranks], Any], url: str, folder: Path) -> list[Any]:
    multiprocessing.spawn(spawned, args=(work, url, folder), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def _train(served: VLLMEngine, student: Student, ranks: Ranks) -> Any:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    gather = parts._whole

    def counted(value: torch.Tensor, layer: Any) -> torch.Tensor:
        nonlocal most
        whole = gather(value, layer)
        alive.add(whole)
        most = max(most, sum(tensor.numel() for tensor in alive))
        return whole

    parts._whole = counted
    served.check(PROMPTS)
    batches = [served.generate(ranks.share(PROMPTS), step=0, group_size=2)]
    moved(student)
    served.sync(student.model, version=7)
    batches.append(served.generate(ranks.share(PROMPTS), step=1, group_size=2))
    cut = all(is_sharded(parameter) for parameter in student.parameters())
    return [[written(batch) for batch in batches], served.lap(), most, cut and student.model.training]


def test_two_ranks_get_what_one_process_gets(tmp_path: Path) -> None:
    model = plain()
    with FakeRollouts(model) as fake:
        found = run(_train, fake.url, tmp_path)
        served, syncs = fake.model, [path for path, _ in fake.requests if path == "/collective_rpc"]
        tokens = [len(body["prompt"]) for path, body in fake.requests if "prompt_logprobs" in body]
        assert len(fake.files) == LAYERS + 2, "one a layer, the embedding and the last norm"
    assert len(syncs) == 2, "one rank alone sends"
    assert tokens == [13, 13], "and compares"
    with FakeRollouts(model) as fake:
        alone = engine(fake.url, model)
        expected = [written(alone.generate(PROMPTS, step=0, group_size=2))]
        moved(model)
        alone.sync(model, version=7)
        expected.append(written(alone.generate(PROMPTS, step=1, group_size=2)))
        same = alone.lap()
    for name, value in model.state_dict().items():
        assert torch.equal(served.state_dict()[name], value), name
    total = sum(parameter.numel() for parameter in model.parameters())
    (first, lap, most, back), (second, other, most_too, back_too) = found
    for step, rows in enumerate(expected):
        shares = [[part[step][row : row + 2] for row in range(0, len(part[step]), 2)] for part in (first, second)]
        assert [row for pair in Ranks(size=2).joined(shares) for row in pair] == rows
    assert {row[3] for row in [*first[1], *second[1]]} == {7}
    assert {key for key in lap if lap[key] != other[key]} <= {"rollouts/sync_seconds"}, (
        "the log of rank 0 has all ranks' counts"
    )
    assert lap["rollouts/sync_difference"] < 1e-4
    assert lap["rollouts/sync_difference"] == pytest.approx(same["rollouts/sync_difference"], abs=1e-5)
    # what each rank asks by itself: which weights the server holds, after writing; and once how long a text may be
    assert lap["rollout_http/requests"] == same["rollout_http/requests"] + 2 + 1
    assert lap["rollout_http/bytes"] > same["rollout_http/bytes"]
    assert 0 < most < 0.5 * total
    assert most_too < most, "a rank that does not send keeps nothing"
    assert back
    assert back_too


FAULTS = {
    "no route": ({"dev_mode": False}, "ConfigError", "VLLM_SERVER_DEV_MODE=1"),
    "not loaded": ({"loading": "fail"}, "WeightSyncError", "every worker"),
    "stale": ({"loading": "keep"}, "WeightSyncError", "the very logprobs of before the sync"),
    "gone": ({"loading": "down"}, "RolloutServerError", "status 500"),
}


def _fail(urls: dict[str, str], served: VLLMEngine, student: Student, ranks: Ranks) -> Any:
    def told(work: Callable[[], Any]) -> list[str]:
        try:
            work()
        except (MoteachError, ZeroDivisionError) as error:
            return [type(error).__name__, str(error)]
        return ["nothing"]

    def sync(url: str) -> None:
        other = engine(url, student.model)
        other.join(ranks, student)
        other.sync(student.model, version=0)
        moved(student)
        other.sync(student.model, version=1)

    def defect() -> None:
        raise ZeroDivisionError("here")

    found = {name: told(lambda url=url: sync(url)) for name, url in urls.items()}
    alone = engine("http://127.0.0.1:9", student.model)
    found["not joined"] = told(lambda: alone.sync(student.model, version=0))
    found["defect"] = told(lambda: ranks.agreed(defect))
    return found


def test_what_goes_wrong_on_the_rank_that_sends_is_raised_on_all(tmp_path: Path) -> None:
    with ExitStack() as stack:
        urls = {}
        for name, (fault, _, _) in FAULTS.items():
            fake = stack.enter_context(FakeRollouts(plain()))
            vars(fake).update(fault)
            urls[name] = fake.url
        first, second = run(partial(_fail, urls), "http://127.0.0.1:9", tmp_path)
    for name, (_, kind, message) in FAULTS.items():
        assert first[name] == second[name], name
        assert first[name][0] == kind
        assert message in first[name][1]
    assert first["not joined"] == second["not joined"]
    assert first["not joined"][0] == "UnsupportedCombinationError"
    assert first["defect"] == ["ZeroDivisionError", "here"]
    assert second["defect"] == [
        "MoteachError",
        "rank 0 ended with ZeroDivisionError('here'); its own output says where",
    ]
