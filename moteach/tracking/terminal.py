"""The live view of a run in a terminal, and plain lines where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TerminalTracker:
    """A rich progress bar with the numbers one watches: divergence, reward per domain, tokens per second.

    Args:
        console: Where to draw.
        max_steps: Steps of the whole run.
        plain_every: Steps between lines when the console is not a terminal.
    """

    def __init__(self, *, console: Console, max_steps: int, plain_every: int = 50) -> None:
        self.console = console
        self.max_steps = max_steps
        self.plain_every = plain_every
        self._progress: Progress | None = None
        self._task: Any = None

    def start(self, *, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Opens the live view."""
        del config
        self.console.print(f"run folder [bold]{run_dir}[/bold]" + (f", resumed at step {step}" if step else ""))
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]distil"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task("distil", total=self.max_steps, completed=step, numbers="")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar, or prints a line now and then."""
        numbers = headline(metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step == 1 or step % self.plain_every == 0 or step == self.max_steps:
            self.console.print(f"step {step}/{self.max_steps}  {numbers}", highlight=False)

    def stop(self) -> None:
        """Closes the live view; what is printed next starts on a clean line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Closes the live view."""
        del summary
        self.stop()


def headline(metrics: Mapping[str, float]) -> str:
    """Picks the numbers of a step worth a glance: divergence, reward per domain, tokens a second."""
    parts = [f"divergence {metrics['divergence']:.4f}"] if "divergence" in metrics else []
    rewards = {key.split("/", 1)[1]: value for key, value in metrics.items() if key.startswith("reward/")}
    if rewards:
        parts.append("right " + " ".join(f"{domain} {value:.2f}" for domain, value in rewards.items()))
    if metrics.get("step_time"):
        parts.append(f"{metrics['num_tokens'] / metrics['step_time']:.0f} tok/s")
    return "  ".join(parts)
