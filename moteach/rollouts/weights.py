"""How the student's weights reach a vLLM server, here as files in a folder that both see; over NCCL: `moteach.rollouts.nccl`.

Requests that are running end first, none begins while weights change, and the cache of prefixes is emptied. When a transfer
fails the server stays paused: it must not go on with half of the new weights. Of several ranks the first one speaks to the
server; the others help to gather, and learn how it ended.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError
from torch import Tensor, nn

from moteach.distributed import Ranks
from moteach.errors import ConfigError, WeightSyncError
from moteach.rollouts.parts import exhaust, weight_parts
from moteach.rollouts.wire import control_request, version_request
from moteach.teachers.http import HttpClient, RefusedError


@runtime_checkable
class Transfer(Protocol):
    """Puts weights into a paused server."""

    def send(self, student: nn.Module, parts: Iterator[Mapping[str, Tensor]], *, version: int) -> None:
        """Sends every weight; called on the first rank alone.

        Args:
            student: Causal language model of transformers, in shards where there are several ranks.
            parts: Its weights, whole, under the names the server knows; what is left unread is read by the caller.
            version: Optimizer steps it has taken.

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

    def __call__(self, student: nn.Module, *, version: int, ranks: Ranks) -> None:
        """Sends the weights; every rank must call it, and none comes back before the first one is done.

        Args:
            student: Causal language model of transformers.
            version: Optimizer steps it has taken.
            ranks: The processes that hold it together.

        Raises:
            WeightSyncError: The server did not take them; it is left paused.
            TeacherUnavailableError: It does not answer.
            ConfigError: It has no such routes.
        """
        # a rank whose completions are still being written would get the rest of them from other weights
        ranks.wait()
        parts = weight_parts(student, keep=ranks.is_first)
        if not ranks.is_first:
            exhaust(parts)
        self._stamp = ranks.agreed(lambda: self._sent(student, parts, version))

    def _sent(self, student: nn.Module, parts: Iterator[Mapping[str, Tensor]], version: int) -> str:
        try:
            return self._send(student, parts, version)
        finally:
            exhaust(parts)

    def _send(self, student: nn.Module, parts: Iterator[Mapping[str, Tensor]], version: int) -> str:
        try:
            self._post("/pause?mode=wait")
        except RefusedError as error:
            raise ConfigError(
                f"{error}. The student's weights cannot be sent: start the server with VLLM_SERVER_DEV_MODE=1 in its "
                "environment"
            ) from error
        # a server that is started anew in between forgets the first stamp, and would get the second with its old weights
        self._stamped(f"{self._run}-before-{version}")
        self._transfer.send(student, parts, version=version)
        self._post("/reset_prefix_cache")
        self.check()
        self._stamped(f"{self._run}-{version}")
        self._post("/resume")
        return self._stamp

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
        self._given = folder

    @cached_property
    def _own(self) -> tempfile.TemporaryDirectory[str]:
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        return tempfile.TemporaryDirectory(prefix="moteach-", dir=memory)

    def send(self, student: nn.Module, parts: Iterator[Mapping[str, Tensor]], *, version: int) -> None:
        """Sends every weight; see `Transfer.send`."""
        folder = Path(self._own.name if self._given is None else self._given).absolute()
        target = folder / f"student-{version}-{uuid.uuid4().hex[:8]}"
        try:
            self._write(student, parts, target)
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

    def _write(self, student: nn.Module, parts: Iterator[Mapping[str, Tensor]], target: Path) -> None:
        """One file a part; transformers writes it, which knows the names that a checkpoint of this model has."""
        model: Any = student
        try:
            target.mkdir(parents=True)
            for number, part in enumerate(parts):
                aside = target / "part"
                model.save_pretrained(
                    aside, state_dict={name: value.cpu() for name, value in part.items()}, safe_serialization=True
                )
                for file in sorted(aside.glob("*.safetensors")):
                    file.rename(target / f"{number:05d}-{file.name}")
        except (OSError, SafetensorError) as error:
            raise WeightSyncError(
                f"expected room for the student's weights in {target.parent}, got {error}; the server would go on with old "
                "ones and is left paused. Free space, or name a folder that both see (rollout.folder)"
            ) from error


def _loaded(result: object) -> bool:
    return isinstance(result, dict) and isinstance(result.get("tensors"), int) and result["tensors"] > 0
