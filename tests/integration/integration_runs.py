"""What the integration tests share: starting a command, and reading what a run wrote."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load_file
from torch import Tensor

from moteach.cli.main import main

REPO = Path(__file__).resolve().parents[2]


def train(run_dir: Path, *overrides: str) -> Path:
    """Runs `moteach train` in this process and returns the run folder."""
    assert main(["train", *overrides, f"run_dir={run_dir}"]) == 0
    return run_dir


def environment(**extra: str) -> dict[str, str]:
    """The variables of a child process: one thread, this checkout, no progress bars."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("MOTEACH_EXPERTS", "WANDB_MODE")}
    return inherited | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPO)} | extra


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moteach", *arguments]


def moteach(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**extra), capture_output=True, text=True, check=False, timeout=300
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rows(run_dir: Path, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(run_dir / f"{table}.parquet").to_pylist()
    return found


def student_bytes(run_dir: Path) -> bytes:
    return (run_dir / "student" / "model.safetensors").read_bytes()


def student_tensors(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "student" / "model.safetensors")


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
