"""How the student's weights reach a vLLM server: as files in a folder that both see, or by vLLM's own transfer over NCCL.

Requests that are running end first, none begins while weights change, and the cache of prefixes is emptied. When a transfer
fails the server stays paused: it must not go on with half of the new weights.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from moteach.errors import ConfigError, MissingDependencyError, WeightSyncError
from moteach.rollouts.wire import control_request, version_request, world_request
from moteach.teachers.http import HttpClient, RefusedError


@runtime_checkable
class Transfer(Protocol):
    """Puts weights into a paused server."""

    def send(self, student: nn.Module, *, version: int) -> None:
        """Sends every weight.

        Raises:
            WeightSyncError: The server did not take them.
        """
        ...


class WeightSync:
    """Pause, transfer, forget prefixes, stamp the version, resume.

    Args:
        client: Asks the server.
        transfer: Carries the weights.
    """

    def __init__(self, *, client: HttpClient, transfer: Transfer) -> None:
        self._client = client
        self._transfer = transfer
        self._run = uuid.uuid4().hex[:8]
        self._stamp = ""

    def __call__(self, student: nn.Module, *, version: int) -> None:
        """Sends the weights.

        Args:
            student: Causal language model of transformers.
            version: Optimizer steps it has taken.

        Raises:
            WeightSyncError: The server did not take them; it is left paused.
            TeacherUnavailableError: It does not answer.
            ConfigError: It has no such routes.
        """
        try:
            self._post("/pause?mode=wait")
        except RefusedError as error:
            raise ConfigError(
                f"{error}. The student's weights cannot be sent: start the server with VLLM_SERVER_DEV_MODE=1 in its "
                "environment"
            ) from error
        # a server that is started anew in between forgets the first stamp, and would get the second with its old weights
        self._stamped(f"{self._run}-before-{version}")
        self._transfer.send(student, version=version)
        self._post("/reset_prefix_cache")
        self.check()
        self._stamped(f"{self._run}-{version}")
        self._post("/resume")

    def check(self) -> None:
        """Finds a server that lost the weights, because it was started anew or belongs to another run too.

        Raises:
            WeightSyncError: It has other weights than those that were sent last.
        """
        said = self._client.ask({0: version_request()})[0]
        if said != self._stamp:
            raise WeightSyncError(
                f"expected the rollout server to hold weights stamped '{self._stamp}', got '{said}': it was started anew, or "
                "another run sends weights to it; completions would be those of another student and marked as this one's. "
                "Start the run again, it resumes from its checkpoint and sends the weights anew"
            )

    def _stamped(self, stamp: str) -> None:
        self._post("/update_weight_version", {"new_version": stamp})
        self._stamp = stamp

    def _post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._client.ask({0: control_request(path, {} if body is None else body)})[0]


class FolderTransfer:
    """Writes a checkpoint into a folder that the server sees, has its workers load it, and removes it.

    The server is started with `--worker-extension-cls moteach.rollouts.vllm_worker.WeightLoader`.

    Args:
        client: Asks the server.
        folder: On a disk of both. None: one in memory that nobody else reads, gone with this object.
    """

    def __init__(self, *, client: HttpClient, folder: str | None) -> None:
        self._client = client
        if folder is None:
            memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
            self._own = tempfile.TemporaryDirectory(prefix="moteach-", dir=memory)
            folder = self._own.name
        self._folder = Path(folder).absolute()

    def send(self, student: nn.Module, *, version: int) -> None:
        """Sends every weight; see `Transfer.send`."""
        target = self._folder / f"student-{version}-{uuid.uuid4().hex[:8]}"
        model: Any = student
        try:
            target.mkdir(parents=True)
            model.save_pretrained(target, safe_serialization=True)
            call = {"method": "moteach_load", "args": [str(target)]}
            answer = self._client.ask({0: control_request("/collective_rpc", call)})[0]
        finally:
            shutil.rmtree(target, ignore_errors=True)
        results = answer.get("results")
        if not isinstance(results, list) or not results or not all(_loaded(result) for result in results):
            raise WeightSyncError(
                f"expected every worker of the rollout server to load the weights of version {version}, got "
                f"{str(results)[:200]}; completions would be written with other weights. The server is left paused: look at "
                "its log, and start it with --worker-extension-cls moteach.rollouts.vllm_worker.WeightLoader"
            )


class NCCLTransfer:
    """vLLM's own weight transfer from the GPU of the student to those of the server; vLLM is imported here too.

    The server is started with `--weight-transfer-config '{"backend":"nccl"}'`. Written after vLLM 0.32; has not been run on
    a GPU yet. When a broadcast fails the group cannot be used again: start server and run anew.

    Args:
        client: Asks the server.
        url: Its address.
        address: Address of this machine that the server's workers can reach.
        port: A free port of it.
        timeout: Seconds for one transfer.
    """

    def __init__(self, *, client: HttpClient, url: str, address: str, port: int, timeout: float) -> None:
        self._client = client
        self._url = url
        self._address = address
        self._port = port
        self._timeout = timeout
        self._engine: Any = None

    def send(self, student: nn.Module, *, version: int) -> None:
        """Sends every weight; see `Transfer.send`."""
        if not all(parameter.is_cuda for parameter in student.parameters()):
            raise ConfigError(
                "rollout.transfer=nccl: expected a student on a GPU, got one on the CPU, which NCCL cannot send from; choose "
                "rollout.transfer=folder"
            )
        if self._engine is None:
            self._engine = self._connect(student)
        self._engine.send_weights()

    def _connect(self, student: nn.Module) -> Any:
        try:
            from vllm.distributed.weight_transfer import (
                HTTPVLLMWeightSyncClient,
                ModuleSource,
                WeightTransferTrainerFactory,
            )
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as missing:
            raise MissingDependencyError(
                f"expected the package vllm for rollout.transfer=nccl, got none ({missing}); install the server's vllm here "
                "too, or choose rollout.transfer=folder"
            ) from missing
        said = self._client.ask({0: world_request()})[0]
        return WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address=self._address, master_port=self._port, world_size=1 + int(said["world_size"]), rank=0
            ),
            client=HTTPVLLMWeightSyncClient(self._url, timeout=self._timeout),
            source=ModuleSource(student),
        )


def _loaded(result: object) -> bool:
    return isinstance(result, dict) and isinstance(result.get("tensors"), int) and result["tensors"] > 0
