"""Per-rollout traces as parquet: who taught which prompt, and what the student wrote.

While a run is going, rows are flushed in parts at every checkpoint; at its end the parts become `routing.parquet` and
`rollouts.parquet`. A resumed run drops the parts written after its checkpoint, so no row is lost or doubled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moteach.tracking.token_rows import TokenTrace, token_fields, token_rows
from moteach.types import RolloutBatch, Routing

Decode = Callable[[Sequence[int]], str]


class Traces:
    """Collects the rows of a run and writes them below `run_dir`.

    Args:
        run_dir: The run's folder.
        decode: Token ids to text.
        completions: Whether `rollouts.parquet` is written beside `routing.parquet`.
        tokens: Whether `routing.parquet` also has a row a token, see `token_rows`.
    """

    def __init__(self, run_dir: Path, *, decode: Decode, completions: bool = True, tokens: bool = False) -> None:
        self.run_dir = run_dir
        self.decode = decode
        self.tokens = tokens
        self.tables = ("routing", "rollouts") if completions else ("routing",)
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self.tables}

    @property
    def parts(self) -> Path:
        """Folder of the parts while the run is going."""
        return self.run_dir / "traces"

    def start(self, step: int) -> None:
        """Drops what was written after `step` by a life of this run that crashed."""
        self.parts.mkdir(parents=True, exist_ok=True)
        for path in self.parts.glob("*.parquet*"):
            if path.suffix != ".parquet" or int(path.stem.rpartition("-")[2]) > step:
                path.unlink()

    def record(
        self,
        step: int,
        rollouts: RolloutBatch,
        routing: Routing,
        rewards: Sequence[float],
        trace: TokenTrace | None = None,
    ) -> None:
        """Adds the rows of one step: one per prompt (and traced token) to `routing`, one per completion to `rollouts`."""
        weights = routing.weights.tolist()
        confidence = routing.confidence.tolist()
        abstained = routing.abstained.tolist()
        for row, (rollout, reward) in enumerate(zip(rollouts.rollouts, rewards, strict=True)):
            prompt = rollout.prompt
            shares = dict(zip(routing.teacher_ids, weights[row], strict=True))
            chosen = None if abstained[row] else max(shares, key=lambda name: shares[name])
            if rollout.sample == 0:
                self._rows["routing"].append(
                    {
                        "step": step,
                        "prompt_id": prompt.prompt_id,
                        "domain": prompt.domain,
                        "weights": shares,
                        "teacher": chosen,
                        "confidence": confidence[row],
                        "abstained": abstained[row],
                    }
                )
            if "rollouts" in self._rows:
                self._rows["rollouts"].append(
                    {
                        "step": step,
                        "prompt_id": prompt.prompt_id,
                        "sample": rollout.sample,
                        "domain": prompt.domain,
                        "teacher": chosen,
                        "prompt": prompt.text,
                        "completion": self.decode(rollout.completion_ids),
                        "completion_ids": list(rollout.completion_ids),
                        "rollout_logprobs": list(rollout.rollout_logprobs),
                        "finished": rollout.finished,
                        "student_version": rollout.student_version,
                        "reward": None if reward != reward else reward,
                    }
                )

        if self.tokens and trace is not None:
            self._rows["routing"] += map(dict, token_rows(step, rollouts, routing.teacher_ids, trace, self.decode))

    def flush(self, step: int) -> None:
        """Writes the rows collected so far as the parts that end at `step`."""
        for name, rows in self._rows.items():
            if rows:
                _write(
                    self.parts / f"{name}-{step:06d}.parquet",
                    pa.Table.from_pylist(rows, schema=_schema(name, rows, tokens=self.tokens)),
                )
                rows.clear()

    def finish(self) -> None:
        """Joins the parts into one file per table and removes them."""
        for name in self.tables:
            parts = sorted(self.parts.glob(f"{name}-*.parquet"))
            if not parts:
                continue
            target = self.run_dir / f"{name}.parquet"
            temporary = target.with_suffix(".parquet.tmp")
            with pq.ParquetWriter(temporary, pq.read_schema(parts[0])) as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part))
            temporary.replace(target)
        # Renamed first: a crash half-way through deleting would leave parts that look like the whole run.
        joined = self.run_dir / ".tmp-traces"
        shutil.rmtree(joined, ignore_errors=True)
        self.parts.replace(joined)
        shutil.rmtree(joined)


def _write(path: Path, table: pa.Table) -> None:
    temporary = path.with_suffix(".parquet.tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)


def _schema(name: str, rows: Sequence[dict[str, Any]], *, tokens: bool = False) -> pa.Schema:
    text, number = pa.string(), pa.float32()
    if name == "routing":
        shares = pa.struct([(teacher, number) for teacher in rows[0]["weights"]])
        return pa.schema(
            [
                ("step", pa.int64()),
                ("prompt_id", text),
                ("domain", text),
                ("weights", shares),
                ("teacher", text),
                ("confidence", number),
                ("abstained", pa.bool_()),
                *(token_fields(list(rows[0]["weights"])) if tokens else ()),
            ]
        )
    return pa.schema(
        [
            ("step", pa.int64()),
            ("prompt_id", text),
            ("sample", pa.int32()),
            ("domain", text),
            ("teacher", text),
            ("prompt", text),
            ("completion", text),
            ("completion_ids", pa.list_(pa.int32())),
            ("rollout_logprobs", pa.list_(number)),
            ("finished", pa.bool_()),
            ("student_version", pa.int64()),
            ("reward", number),
        ]
    )
