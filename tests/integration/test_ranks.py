"""Two ranks train the student that one process trains, hold a half of it each, and go on where the other number stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing

from moteach.distributed import Ranks, is_sharded, local
from moteach.sharding import shard
from moteach.students import LoRA, Student
from moteach.testing import tiny_model, tiny_tokenizer

needs_ranks = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")

SETTINGS = (
    "debug=quick",
    "eval=none",
    "sampler.prompts_per_step=7",
    "optim.micro_batch_size=3",
    "checkpoint.every_steps=2",
)
RICH = (
    "router=uniform",
    "conflict=geometric",
    "token_weights=[entropy_top]",
    "balance=token_share",
    "group_size=2",
    "mix.outcome=0.3",
    "mix.supervised=0.1",
    "mix.reference=0.05",
    "trace.gradient_cosine_every=2",
    "trace.diagnostics_every=2",
)

LORA = ("student.lora.rank=3", "optim.lr=0.01")

# the student's own gradient is zero at first, and without this Adam would make steps of its rounding
SELF = ("experiment=recovery", "optim.eps=1e-4")
TOLD = ("experts.self.student=live", "experts.self.context='{answer} {prompt}'", "router=uniform", "conflict=linear")
ONE = "sampler.prompts_per_step=1"
MEAN = ("experts.self.student=ema", "experts.self.decay=0.5")


def train(run_dir: Path, *overrides: str, ranks: int, steps: int = 4) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "moteach",
        "train",
        *SETTINGS,
        f"max_steps={steps}",
        f"run_dir={run_dir}",
    ]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("time/") and key != "step_time"}
        for line in lines
    ]


def same_student(left: Path, right: Path, **bounds: float) -> None:
    folders = [run / "student" for run in (left, right)]
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(folder / file) if (folder / file).is_file() else {} for folder in folders)
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, **(bounds or {"rtol": 1e-5, "atol": 1e-5}))


def interrupted(run_dir: Path, *overrides: str, first: int, second: int) -> None:
    """Trains two steps on some ranks and two more on others."""
    train(run_dir, *overrides, ranks=first, steps=2)
    (run_dir / "summary.json").unlink()
    identity = json.loads((run_dir / "identity.json").read_text())
    (run_dir / "identity.json").write_text(json.dumps(identity | {"max_steps": 4}))
    train(run_dir, *overrides, ranks=second)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4]


@needs_ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [(), RICH, pytest.param(LORA, marks=needs_peft), SELF, (*SELF, *TOLD), (*SELF, ONE)],
    ids=["plain", "rich", "low rank", "snapshot", "told", "one prompt"],
)
def test_two_ranks_with_uneven_shares_train_what_one_process_trains(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, *overrides, ranks=1)
    train(two, *overrides, ranks=2)
    same_student(one, two)
    assert (two / "student" / "adapter").is_dir() == (overrides == LORA)
    for alone, shared in zip(metrics(one), metrics(two), strict=True):
        assert alone.keys() == shared.keys()
        for key, value in alone.items():
            # Adam divides by the size of the gradient, so the last bits of a sum grow from step to step
            assert shared[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key
    for table in ("routing", "rollouts"):
        left, right = (pd.read_parquet(run / f"{table}.parquet") for run in (one, two))
        columns = [name for name in left.columns if name != "rollout_logprobs"]
        assert left[columns].astype(str).equals(right[columns].astype(str))


@needs_ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (2, 1, ()),
        (1, 2, ()),
        (2, 2, ()),
        pytest.param(2, 1, LORA, marks=needs_peft),
        pytest.param(1, 2, LORA, marks=needs_peft),
        (2, 1, (*SELF, *MEAN)),
        pytest.param(1, 2, (*SELF, *MEAN, *LORA), marks=needs_peft),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    tmp_path: Path, first: int, second: int, kind: tuple[str, ...]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, "optim.schedule=constant", *kind, ranks=1)
    interrupted(broken, "optim.schedule=constant", *kind, first=first, second=second)
    same_student(whole, broken)


@needs_ranks
@needs_peft
@pytest.mark.slow
def test_dropout_of_every_rank_goes_on_where_it_stopped(tmp_path: Path) -> None:
    overrides = ("optim.schedule=constant", *LORA, "student.lora.dropout=0.3")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, *overrides, ranks=2)
    interrupted(broken, *overrides, first=2, second=2)
    same_student(whole, broken, rtol=0.0, atol=0.0)


def _hold(rank: int, folder: Path, adapted: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student = Student(tiny_model(seed=3), tiny_tokenizer(), lora=LoRA(rank=4) if adapted else None)
    total = sum(parameter.numel() for parameter in student.parameters())
    shard(student, Ranks(rank=rank, size=2))
    held = sum(local(parameter).numel() for parameter in student.parameters())
    sharded = all(is_sharded(parameter) for parameter in student.parameters())
    (folder / f"{rank}.json").write_text(json.dumps([total, held, sharded]))
    dist.destroy_process_group()


@needs_ranks
@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=needs_peft)], ids=["all weights", "low rank"])
def test_no_rank_holds_all_parameters_between_steps(tmp_path: Path, adapted: bool) -> None:
    multiprocessing.spawn(_hold, args=(tmp_path, adapted), nprocs=2)
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all(sharded for _, _, sharded in parts)
    assert sum(held for _, held, _ in parts) == parts[0][0]
    assert max(held for _, held, _ in parts) <= 0.55 * parts[0][0]


def test_shares_are_strided_and_come_back_in_order() -> None:
    items = list(range(7))
    shares = [Ranks(rank=rank, size=3).share(items) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks(rank=0, size=3).joined(shares) == items
    assert Ranks().share(items) == items
