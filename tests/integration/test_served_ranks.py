"""Two ranks whose rollouts one server writes: the run of one process, and the end of both when the first one fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integration_runs import environment, metrics, rows, student_tensors

from moteach.catalogue.modeling import load_causal_lm
from moteach.testing import TinyWorld

sys.path.append(str(Path(__file__).resolve().parents[1] / "contracts"))

from fake_rollouts import FakeRollouts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]


@pytest.fixture
def server(world: TinyWorld) -> Iterator[FakeRollouts]:
    with FakeRollouts(load_causal_lm(str(world.student)).eval()) as fake:
        yield fake


def launch(
    world: TinyWorld, server: FakeRollouts, run_dir: Path, *more: str, ranks: int
) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = [*world.overrides, "rollout=vllm", f"rollout.url={server.url}", "rollout.backoff=0.0", "group_size=2"]
    # seven prompts: shares of four and three
    words += ["sampler.prompts_per_step=7", "optim.micro_batch_size=3", *more, f"run_dir={run_dir}"]
    command = [sys.executable, *launcher, "-m", "moteach", "train", *words]
    return subprocess.run(
        command, cwd=run_dir.parent, env=environment(), capture_output=True, text=True, check=False, timeout=500
    )


def train(world: TinyWorld, server: FakeRollouts, run_dir: Path, *more: str, ranks: int) -> Path:
    done = launch(world, server, run_dir, *more, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def asked(server: FakeRollouts) -> Counter[tuple[Any, ...]]:
    """What completions were asked of the server since the last time."""
    found = Counter((tuple(body["prompt"]), body["seed"], body["max_tokens"]) for body in server.completions)
    server.requests.clear()
    return found


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if not key.startswith(("time/", "step_time", "rollout_http/", "rollouts/sync_")):
            assert right[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ["eval.prompts_per_domain=3", "eval.divergence=true"]),
        (2, ["eval=none", "rollout.async_steps=1"]),
        # one rank without a prompt
        (3, ["eval=none", "sampler.prompts_per_step=2", "max_steps=2"]),
    ],
    ids=["in step", "ahead", "idle"],
)
def test_ranks_train_what_one_process_trains(
    ranks: int, more: list[str], world: TinyWorld, server: FakeRollouts, tmp_path: Path
) -> None:
    more = [*more, "token_weights=[ratio_mask]"]
    one = train(world, server, tmp_path / "one", *more, ranks=1)
    first = asked(server)
    two = train(world, server, tmp_path / "two", *more, ranks=ranks)
    assert asked(server) == first
    held = server.model.state_dict()
    for name, value in student_tensors(one).items():
        torch.testing.assert_close(student_tensors(two)[name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(held[name], student_tensors(two)[name]), "the last sync sent the student that was written"
    for alone, shared in zip(metrics(one), metrics(two), strict=True):
        same(alone, shared)
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert shared["rollouts/sync_difference"] < 1e-3
    alone_sent, sent = (sum(line["rollout_http/requests"] for line in metrics(run)) for run in (one, two))
    # each rank asks what the server serves, and after every batch which weights it holds; a held-out one is written before
    batches = len(metrics(one)) + ("eval.divergence=true" in more)
    assert sent - alone_sent == (ranks - 1) * (1 + batches)
    kept = ("step", "prompt_id", "sample", "student_version", "completion_ids")
    left, right = ([[row[name] for name in kept if name in row] for row in rows(run, "rollouts")] for run in (one, two))
    assert left == right
    for name in ("summary.json", "baseline.json", "divergence_before.json"):
        if (one / name).is_file():
            told = [json.loads((run / name).read_text()) for run in (one, two)]
            assert told[0].keys() == told[1].keys()


def test_a_run_of_two_ranks_goes_on_from_its_checkpoint(world: TinyWorld, server: FakeRollouts, tmp_path: Path) -> None:
    more = ["eval=none", "checkpoint.every_steps=2", "optim.schedule=constant"]
    whole = train(world, server, tmp_path / "whole", *more, ranks=1)
    # one load before the run, one before the first step, one a step
    broken = iter([False] * 4 + [True])
    load = server.load
    server.load = lambda folder: None if next(broken) else load(folder)  # type: ignore[method-assign]
    done = launch(world, server, tmp_path / "run", *more, ranks=2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "moteach train:" in line]
    assert told
    assert all("every worker of the rollout server" in line and "version 3" in line for line in told)
    # torchrun has a traceback of its own
    assert "moteach/rollouts" not in done.stderr
    assert server.paused
    server.load = load  # type: ignore[method-assign]
    run = train(world, server, tmp_path / "run", *more, ranks=2)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert [row["student_version"] for row in rows(run, "rollouts")] == [
        row["student_version"] for row in rows(whole, "rollouts")
    ]
    for name, value in student_tensors(whole).items():
        torch.testing.assert_close(student_tensors(run)[name], value, rtol=1e-5, atol=1e-5)
