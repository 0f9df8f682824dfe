r"""Rollouts from a vLLM server, over HTTP: token ids out, token ids and logprobs in; the weights are sent after every step.

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model STUDENT --served-model-name student \
        --logprobs-mode processed_logprobs --worker-extension-cls moteach.rollouts.vllm_worker.WeightLoader

Routes of VLLM_SERVER_DEV_MODE ask for no key: the server belongs on loopback or a private network.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

from torch import nn

from moteach.catalogue.urls import LOOPBACK, check_host
from moteach.distributed import Ranks
from moteach.errors import ConfigError, RolloutServerError, TeacherUnavailableError, UnsupportedCombinationError
from moteach.rollouts.checks import check_lengths, check_setting, context_of, eos_ids_of
from moteach.rollouts.hf import HFEngine
from moteach.rollouts.nccl import NCCLTransfer
from moteach.rollouts.parts import is_cut
from moteach.rollouts.probe import WeightCheck
from moteach.rollouts.sampling import keyed_seeds
from moteach.rollouts.weights import FolderTransfer, WeightSync
from moteach.rollouts.wire import Sampling, Written, models_request, sampling_request, scoring_request
from moteach.teachers.http import HttpClient, Request
from moteach.types import Prompt, Rollout, RolloutBatch

T = TypeVar("T")


class VLLMEngine:
    """Samples from a vLLM server that holds the student; build it from its settings, then `bind(model, tokenizer)`.

    `rollout_logprobs` mean what those of `HFEngine` mean: after temperature and truncation, log softmax(logits) when greedy.
    That is vLLM's `--logprobs-mode processed_logprobs`; with its default, raw logprobs, anything but temperature 1 without
    truncation is refused. Each request has a seed of its own, keyed by (seed, step, prompt id, sample); the samples are not
    those of `HFEngine`, and rounding may differ with what else the server computes at the time, so that a resumed run is
    the same run but not bitwise. Several ranks, see `join`, ask one server, each for its own prompts.

    Args:
        url: Address of the server.
        served_name: Name it serves the student by.
        transfer: How weights travel: `folder` (files that both see) or `nccl` (GPU to GPU, not yet run on one).
        folder: For `folder`, a place on a disk of both; null: one in memory, on this machine.
        nccl_address: For `nccl`, this machine's address as the server's workers see it.
        nccl_port: A free port of it.
        check_tokens: Length of the text whose logprobs are compared after every sync.
        check_tolerance: Largest difference, in nats.
        async_steps: 1 writes the completions of the next step while the student learns, see `moteach.rollouts.ahead`; 0 not.
        seed: Seed of the run.
        max_new_tokens: Longest completion.
        temperature: Logits are divided by it; 0 is greedy.
        top_p: Sample from the smallest set of tokens whose probability reaches this; 1 samples from all.
        top_k: Sample from the k most probable tokens; 0 samples from all.
        batch_size: Most completions generated at once where a model is evaluated, which happens in this process.
        allowed_hosts: Hosts that may be asked; null: loopback.
        concurrency: Requests in flight at most.
        timeout: Seconds of one attempt, also of one sync.
        deadline: Seconds of one call with all its requests and repetitions.
        attempts: Attempts of one request at most.
        backoff: Seconds before the second attempt; doubled each time.
        max_response_bytes: Largest answer that is read.
        wait: Seconds for which a call waits for a server that is down.

    Raises:
        ConfigError: A setting is out of range, or the address is not allowed.
    """

    served: bool = True
    """Completions are written elsewhere: nothing of the student has to be gathered here for them."""
    version: int = 0
    """Optimizer steps the student had taken when its weights were sent."""
    _check: WeightCheck | None = None
    _model: nn.Module | None = None
    _ranks: Ranks = Ranks()
    _root: nn.Module | None = None
    _eos_ids: tuple[int, ...] = ()
    _pad_id: int = 0
    _synced: bool = False

    def __init__(
        self,
        *,
        url: str,
        served_name: str = "student",
        transfer: Literal["folder", "nccl"] = "folder",
        folder: str | None = None,
        nccl_address: str = "127.0.0.1",
        nccl_port: int = 29600,
        check_tokens: int = 64,
        check_tolerance: float = 0.25,
        async_steps: int = 0,
        seed: int = 0,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_size: int = 256,
        allowed_hosts: list[str] | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        deadline: float = 3600.0,
        attempts: int = 5,
        backoff: float = 0.5,
        max_response_bytes: int = 1 << 26,
        wait: float = 0.0,
    ) -> None:
        hosts = LOOPBACK if allowed_hosts is None else tuple(allowed_hosts)
        check_host(url, hosts, name=served_name, role="rollout server", keys="rollout")
        check_setting("transfer", transfer, transfer in ("folder", "nccl"), "folder or nccl")
        check_setting("check_tokens", check_tokens, check_tokens >= 1, "a whole number of at least 1")
        check_setting("check_tolerance", check_tolerance, check_tolerance > 0, "a number above 0")
        check_setting("async_steps", async_steps, async_steps in (0, 1), "0 or 1: more is not written ahead")
        self.async_steps = async_steps
        self.local = HFEngine(
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            batch_size=batch_size,
        )
        """The same settings in this process, for models that the server does not hold."""
        self.served_name = served_name
        self._client = HttpClient(
            name=served_name,
            url=url,
            concurrency=concurrency,
            timeout=timeout,
            deadline=deadline,
            attempts=attempts,
            backoff=backoff,
            max_response_bytes=max_response_bytes,
            wait=wait,
            role="rollout server",
            keys="rollout",
        )
        self._weights = WeightSync(
            client=self._client,
            transfer=NCCLTransfer(client=self._client, url=url, address=nccl_address, port=nccl_port, timeout=timeout)
            if transfer == "nccl"
            else FolderTransfer(client=self._client, folder=folder),
        )
        self._check_settings = (check_tokens, check_tolerance)
        self._seen: dict[str, float] = {}

    def bind(self, model: nn.Module, tokenizer: Any, *, version: int = 0) -> VLLMEngine:
        """Takes the live student and its special tokens; the server is asked on first use.

        Raises:
            ConfigError: Nothing names an end-of-sequence token.
        """
        self._eos_ids = eos_ids_of(model, tokenizer)
        pad_id = getattr(tokenizer, "pad_token_id", None)
        self._pad_id = self._eos_ids[0] if pad_id is None else int(pad_id)
        begin = getattr(tokenizer, "bos_token_id", None)
        tokens, tolerance = self._check_settings
        self._check = WeightCheck(
            tokens=tokens, tolerance=tolerance, start_id=self._eos_ids[0] if begin is None else int(begin)
        )
        self._model, self.version, self._synced = model, version, False
        return self

    def join(self, ranks: Ranks, root: nn.Module) -> None:
        """Takes the ranks that hold the student together: each asks for its own rows, the first one sends the weights.

        From then on `sync`, `check` and `lap` must be called by all of them, and what goes wrong in a sync is raised on all.

        Args:
            ranks: The processes.
            root: What gathers the student's shards, see `moteach.students.Student.forward`.
        """
        self._ranks, self._root = ranks, root

    def sync(self, student: nn.Module, *, version: int) -> None:
        """Sends the weights, compares the logprobs of a fixed text, and stamps this version on every rollout from now on.

        Raises:
            WeightSyncError: The server did not take the weights, or does not compute with them.
            RolloutServerError: It does not answer.
            ConfigError: It refuses.
            UnsupportedCombinationError: It has no way to take weights of such a student.
        """
        assert self._check is not None, "bind() makes it"
        if self._ranks.size == 1 and is_cut(student):
            raise UnsupportedCombinationError(
                "rollout=vllm: expected engine.join(ranks, root) before a student in shards, got none; each rank would send "
                "the weights by itself"
            )
        self._model, self.version, self._synced = student, version, False
        begin = time.monotonic()
        try:
            self._weights(student, version=version, ranks=self._ranks)
        except TeacherUnavailableError as error:
            raise RolloutServerError(str(error)) from error
        ask = self._ask
        found = self._check(
            student,
            version=version,
            ask=lambda ids: ask({0: scoring_request(ids, model=self.served_name)})[0],
            ranks=self._ranks,
            root=self._root,
        )
        self._seen = {"rollouts/sync_seconds": time.monotonic() - begin, "rollouts/sync_difference": found}
        self._synced = True

    def check(self, prompts: Sequence[Prompt], *, max_new_tokens: int | None = None) -> None:
        """Checks before a run what `generate` would refuse in the middle of it; sends the weights once.

        Raises:
            DataError: A prompt is empty or too long.
            ConfigError: No model is bound, or the server cannot take weights.
            WeightSyncError: It did not.
            UnsupportedCombinationError: The server's logprobs are not those of the sampler.
        """
        limit = self.local.max_new_tokens if max_new_tokens is None else max_new_tokens
        self._check_fit(prompts, limit)
        self._ensure_synced()
        self._check_logprobs(self.local.temperature)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        group_size: int = 1,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> RolloutBatch:
        """Samples `group_size` completions of every prompt; see `RolloutEngine.generate`.

        Raises:
            DataError: A prompt is empty or too long.
            ConfigError: No model is bound, or an argument is out of range.
            RolloutServerError: The server does not answer, or not as it must.
            WeightSyncError: It does not hold the weights that were sent last.
        """
        temperature = self.local.temperature if temperature is None else temperature
        limit = self.local.max_new_tokens if max_new_tokens is None else max_new_tokens
        check_setting("temperature", temperature, temperature >= 0, "a number of at least 0 (0 is greedy)")
        check_setting("max_new_tokens", limit, limit >= 1, "a whole number of at least 1")
        check_setting("group_size", group_size, group_size >= 1, "a whole number of at least 1")
        self._check_fit(prompts, limit)
        self._check_logprobs(temperature)
        self._ensure_synced()
        version = self.version
        owners = [prompt for prompt in prompts for _ in range(group_size)]
        samples = list(range(group_size)) * len(prompts)
        seeds = keyed_seeds(
            seed=self.local.seed, step=step, prompt_ids=[prompt.prompt_id for prompt in owners], samples=samples
        )
        how = self._sampling(temperature, limit)
        rows = {row: sampling_request(prompt.token_ids, how, seed=seeds[row]) for row, prompt in enumerate(owners)}
        written = self._ask(rows)
        self._weights.check()
        made = [
            _rollout(prompt, sample, written[row], version)
            for row, (prompt, sample) in enumerate(zip(owners, samples, strict=True))
        ]
        return RolloutBatch.from_rollouts(made, pad_id=self._pad_id)

    def lap(self) -> dict[str, float]:
        """Counts of requests, retries, bytes since the last lap, and what the last sync took; of all ranks together.

        Seconds are those of the slowest rank.
        """
        laps = self._ranks.gather(self._client.lap())
        most = ("seconds", "breaker_open")
        counts = {key: (max if key in most else sum)(lap[key] for lap in laps) for key in laps[0]}
        return {**{f"rollout_http/{key}": float(value) for key, value in counts.items()}, **self._seen}

    def _ask(self, requests: Mapping[int, Request[T]]) -> dict[int, T]:
        try:
            return self._client.ask(requests)
        except TeacherUnavailableError as error:
            raise RolloutServerError(str(error)) from error

    def _sampling(self, temperature: float, limit: int) -> Sampling:
        return Sampling(
            model=self.served_name,
            temperature=temperature,
            top_p=self.local.top_p,
            top_k=self.local.top_k,
            eos_ids=self._eos_ids,
            limit=limit,
        )

    def _ensure_synced(self) -> None:
        if not self._synced and self._model is not None:
            self.sync(self._model, version=self.version)

    @cached_property
    def _longest(self) -> int | None:
        return self._ask({0: models_request(self.served_name)})[0]

    @cached_property
    def _of_sampler(self) -> bool:
        """Whether the server's logprobs are those it samples with."""
        self._ensure_synced()  # a server that was left paused writes nothing
        # of one kept token the sampler's logprob is 0, the raw one is not
        how = Sampling(model=self.served_name, temperature=1.0, top_p=1.0, top_k=1, eos_ids=(), limit=1)
        said = self._ask({0: sampling_request([self._eos_ids[0]], how, seed=0)})[0]
        return abs(said.logprobs[0]) < 1e-5

    def _check_fit(self, prompts: Sequence[Prompt], limit: int) -> None:
        if self._model is None:
            raise ConfigError("expected a bound engine, got one without a model; call engine.bind(model, tokenizer)")
        known = [size for size in (context_of(self._model), self._longest) if size is not None]
        check_lengths(prompts, context=min(known, default=None), limit=limit)

    def _check_logprobs(self, temperature: float) -> None:
        plain = temperature == 0.0 or (temperature == 1.0 and self.local.top_p == 1.0 and self.local.top_k == 0)
        if not plain and not self._of_sampler:
            raise UnsupportedCombinationError(
                f"expected a rollout server whose logprobs are those it samples with, for temperature={temperature:g}, "
                f"top_p={self.local.top_p:g}, top_k={self.local.top_k}, got raw ones; importance ratios would be of another "
                "distribution. Start it with --logprobs-mode processed_logprobs, or sample with temperature 1 and without "
                "truncation"
            )


def _rollout(prompt: Prompt, sample: int, written: Written, version: int) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample=sample,
        completion_ids=written.ids,
        rollout_logprobs=written.logprobs,
        finished=written.finished,
        student_version=version,
    )
