"""Weights & Biases, offline by default; the only module that imports wandb."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import wandb

from moteach.tracking.base import redact

Mode = Literal["offline", "online", "disabled"]


class WandbTracker:
    """Logs to a wandb run whose id is kept in `run_dir/wandb_run.json`, so that a resumed run goes on in the same one.

    The step axis is our own `train/step` (wandb's counter cannot go back after a crash); rows that were already sent are
    not sent again. The config is redacted first: wandb stores it in clear.

    Args:
        project: Project name.
        name: Run name; None uses the name of the run folder.
        mode: `offline` writes to disk only, `online` sends, `disabled` does nothing. `WANDB_MODE` wins.
    """

    def __init__(
        self,
        *,
        project: str = "moteach",
        name: str | None = None,
        mode: Mode = "offline",
    ) -> None:
        self.project = project
        self.name = name
        self.mode = mode
        self._run: Any = None
        self._state_path = Path()
        self._sent = -1

    def start(self, *, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Starts or resumes the wandb run."""
        del step
        self._state_path = run_dir / "wandb_run.json"
        state = json.loads(self._state_path.read_text()) if self._state_path.exists() else {}
        self._sent = int(state.get("sent", -1))
        self._run = wandb.init(
            project=self.project,
            name=self.name or run_dir.name,
            id=state.get("id"),
            resume="allow",
            mode=cast(Mode, os.environ.get("WANDB_MODE", self.mode)),
            dir=str(run_dir),
            config=redact(config),
            # The metadata hold the command line in clear, secrets included.
            settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
        )
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")
        self._save_state()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends one row, unless an earlier life of this run sent it already."""
        if step <= self._sent:
            return
        self._run.log({"train/step": step, **metrics})
        self._sent = step
        self._save_state()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the closing table into the run's summary and ends it."""
        if self._run is None:
            return
        for domain, row in summary.get("domains", {}).items():
            self._run.summary.update({f"eval/{domain}/{key}": value for key, value in row.items()})
        self._run.summary.update({f"eval/{key}": summary[key] for key in ("mean", "worst") if key in summary})
        self._run.finish()
        self._run = None

    def _save_state(self) -> None:
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"id": self._run.id, "sent": self._sent}))
        temporary.replace(self._state_path)
