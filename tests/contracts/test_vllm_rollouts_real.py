"""Against a real vLLM on this machine's CPU: rollouts, and weights that arrive; skipped like `test_vllm_real.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_vllm_real import MODELS, PYTHON, folder, serving  # noqa: F401

from moteach.catalogue.modeling import load_causal_lm, load_tokenizer
from moteach.errors import UnsupportedCombinationError, WeightSyncError
from moteach.rollouts.decoding import generation_mode
from moteach.rollouts.sampling import truncate
from moteach.rollouts.vllm import VLLMEngine
from moteach.testing import tiny_model, tiny_prompts, write_tiny_world

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON, reason="MOTEACH_VLLM_PYTHON names no interpreter with vllm"),
]

ROOT = Path(__file__).parents[2]
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.fspath(ROOT)}
WORKER = ("--worker-extension-cls", "moteach.rollouts.vllm_worker.WeightLoader")
PROCESSED = ("--logprobs-mode", "processed_logprobs")


def nudge(student: torch.nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(by * parameter.std() * torch.randn_like(parameter))


def test_rollouts_and_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    tokenizer, student = load_tokenizer(str(folder)), load_causal_lm(str(folder), dtype="float32")
    prompts = tiny_prompts(["1+1=", "abc", "reverse xyz: "], tokenizer=tokenizer)
    with serving(folder, tmp_path / "log", *PROCESSED, *WORKER, environ=DEVELOPMENT) as url:
        engine = VLLMEngine(
            url=url,
            served_name="teacher",
            max_new_tokens=12,
            temperature=0.7,
            top_p=0.9,
            top_k=20,
            check_tolerance=1e-3,
        ).bind(student, tokenizer)
        engine.check(prompts)
        differences = []
        for version in range(4):
            engine.sync(student, version=version)
            differences.append(engine.lap()["rollouts/sync_difference"])
            batch = engine.generate(prompts, step=version, group_size=2)
            assert {rollout.student_version for rollout in batch.rollouts} == {version}
            nudge(student, 0.02)
        engine.sync(student, version=4)
        print("probe, max |difference| after each sync", differences)
        print("sync took", engine.lap()["rollouts/sync_seconds"], "s")

        batch = engine.generate(prompts, step=4, group_size=2)
        worst = 0.0
        for rollout in batch.rollouts:
            ids = [*rollout.prompt.token_ids, *rollout.completion_ids]
            start = len(rollout.prompt.token_ids)
            with generation_mode(student):
                logits = student(input_ids=torch.tensor([ids])).logits[0].double() / 0.7
            table = truncate(logits, top_k=20, top_p=0.9).log_softmax(-1)
            mine = [float(table[start + at - 1, token]) for at, token in enumerate(rollout.completion_ids)]
            assert rollout.rollout_logprobs == pytest.approx(mine, abs=1e-3)
            worst = max(worst, *(abs(a - b) for a, b in zip(mine, rollout.rollout_logprobs, strict=True)))
        print("tempered and truncated logprobs, max |difference|", worst)

        greedy = engine.generate(prompts, step=0, temperature=0.0)
        here = engine.local.bind(student, tokenizer).generate(prompts, step=0, temperature=0.0)
        assert [r.completion_ids for r in greedy.rollouts] == [r.completion_ids for r in here.rollouts]
        assert torch.equal(greedy.input_ids, here.input_ids)

        # vLLM's own way says that all is well
        nudge(student, 0.2)
        monkeypatch.setattr(engine._weights, "_transfer", _OwnReload(engine, tmp_path / "plain"))
        with pytest.raises(WeightSyncError, match="another model than the one that is trained") as caught:
            engine.sync(student, version=5)
        print("vLLM's reload_weights:", caught.value)


class _OwnReload:
    def __init__(self, engine: VLLMEngine, target: Path) -> None:
        self._engine, self._target = engine, target

    def send(self, student: torch.nn.Module, parts: object, *, version: int) -> None:
        student.save_pretrained(self._target)
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(self._target)}}
        self._engine._weights._post("/collective_rpc", call)


def test_raw_logprobs_are_told_apart(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    tokenizer, student = load_tokenizer(str(folder)), load_causal_lm(str(folder), dtype="float32")
    prompts = tiny_prompts(["1+1="], tokenizer=tokenizer)
    with serving(folder, tmp_path / "log", *WORKER, environ=DEVELOPMENT) as url:
        VLLMEngine(url=url, served_name="teacher").bind(student, tokenizer).check(prompts)
        cold = VLLMEngine(url=url, served_name="teacher", temperature=0.5).bind(student, tokenizer)
        with pytest.raises(UnsupportedCombinationError, match="--logprobs-mode processed_logprobs"):
            cold.check(prompts)


def test_runs_of_two_ranks_and_of_a_low_rank_update(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    world = write_tiny_world(tmp_path / "world")
    # heads of 16 are too small for vLLM
    tiny_model(seed=3, scale=2.0).save_pretrained(world.student)
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    runs = {
        "ranks": (ranks, []),
        "ranks ahead": (ranks, ["rollout.async_steps=1"]),
        "lora": ([], ["student.lora.rank=4"]),
    }
    with serving(world.student, tmp_path / "log", *PROCESSED, *WORKER, environ=DEVELOPMENT) as url:
        words = [*world.overrides, "rollout=vllm", f"rollout.url={url}", "rollout.served_name=teacher", "eval=none"]
        words += ["rollout.check_tolerance=1e-3", "optim.lr=0.01", "token_weights=[ratio_mask]"]
        for name, (launcher, more) in runs.items():
            run = tmp_path / name.replace(" ", "_")
            command = [sys.executable, *launcher, "-m", "moteach", "train", *words, *more, f"run_dir={run}"]
            environ = {**os.environ, "PYTHONPATH": os.fspath(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert len(lines) == 4
            print(name, "probe", [line["rollouts/sync_difference"] for line in lines])
            print(name, "log ratio", [line["rollouts/log_ratio_max"] for line in lines])
            print(name, "sync s", [round(line["rollouts/sync_seconds"], 2) for line in lines])
            stale = "rollout.async_steps=1" in more
            assert [line["rollouts/staleness_max"] for line in lines] == [0.0, *([float(stale)] * 3)]
            assert stale or all(line["rollouts/log_ratio_max"] < 1e-3 for line in lines)
