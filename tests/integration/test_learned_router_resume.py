from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integration_runs import metrics, student_bytes, train

from moteach.checkpoint import Checkpoints
from moteach.cli.main import main
from moteach.testing import TinyWorld
from moteach.trainer import Trainer

# Asked at every second step, the router has learned before the crash and learns again after it.
LEARNED = ["router=learned", "router.ask_every=2", "eval=none", "checkpoint.every_steps=1"]


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "step_time"))} for line in metrics(run)]


def test_a_router_that_learns_goes_on_bitwise_after_a_crash(world: TinyWorld, tmp_path: Path) -> None:
    record = Trainer.record

    def stop_at_three(self: Trainer, step: int, *values: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt
        record(self, step, *values)

    same = [*world.overrides, *LEARNED]
    whole = train(tmp_path / "whole", *same)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "record", stop_at_three)
        assert main(["train", *same, f"run_dir={tmp_path / 'run'}"]) == 130
    crashed = Checkpoints(tmp_path / "run" / "checkpoints").load(2)[1]["router"]
    run = train(tmp_path / "run", *same)
    assert student_bytes(run) == student_bytes(whole)
    assert untimed(run) == untimed(whole)
    left, right = (Checkpoints(folder / "checkpoints").load(4)[1]["router"] for folder in (run, whole))
    assert left == right != crashed
