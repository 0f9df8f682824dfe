"""The student's weights over NCCL: vLLM's own weight transfer, from the GPU of the first rank to those of the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moteach.errors import ConfigError, MissingDependencyError
from moteach.rollouts.parts import WeightShape, weight_shapes
from moteach.rollouts.wire import world_request
from moteach.teachers.http import HttpClient


class NCCLTransfer:
    """Broadcasts the weights to the server's workers, a part at a time; vLLM is imported here too.

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
        self._source: PartsSource | None = None
        self._engine: Any = None

    def send(self, student: nn.Module, parts: Iterator[Mapping[str, Tensor]], *, version: int) -> None:
        """Sends every weight; see `moteach.rollouts.weights.Transfer.send`.

        Raises:
            ConfigError: The student is not on a GPU.
            MissingDependencyError: vLLM is not installed here.
        """
        del version
        if not _on_gpu(student):
            raise ConfigError(
                "rollout.transfer=nccl: expected a student on a GPU, got one on the CPU, which NCCL cannot send from; choose "
                "rollout.transfer=folder"
            )
        if self._source is None:
            self._source = PartsSource(weight_shapes(student))
            self._engine = self._connect(self._source)
        self._source.parts = parts
        self._engine.send_weights()

    def _connect(self, source: PartsSource) -> Any:
        try:
            from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as missing:
            raise MissingDependencyError(
                f"expected the package vllm for rollout.transfer=nccl, got none ({missing}); install the server's vllm here "
                "too, or choose rollout.transfer=folder"
            ) from missing
        said = self._client.ask({0: world_request()})[0]
        # the first rank alone is in the group; the others gather shards where `WeightSync` iterates over the parts
        return WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                master_address=self._address, master_port=self._port, world_size=1 + int(said["world_size"]), rank=0
            ),
            client=HTTPVLLMWeightSyncClient(self._url, timeout=self._timeout),
            source=source,
        )


def _on_gpu(student: nn.Module) -> bool:
    return all(parameter.is_cuda for parameter in student.parameters())


class PartsSource:
    """What vLLM calls a source of weights: it says their names, precisions and shapes, then hands them over in that order.

    Args:
        shapes: Of every weight.
    """

    def __init__(self, shapes: Sequence[WeightShape]) -> None:
        self._shapes = list(shapes)
        self.parts: Iterator[Mapping[str, Tensor]] = iter(())
        """Of this transfer; they can be read once."""

    def metadata(self) -> list[WeightShape]:
        """Returns what iteration will hand over."""
        return self._shapes

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts:
            yield from part.items()
