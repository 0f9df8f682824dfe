"""The ranks of a run: which share of the rows each takes, and how they agree on what concerns the whole batch.

Every rank draws the same prompts and takes its share of them; sampling noise is keyed by the prompt, so the completions are
those of one process. Weights of tokens are fractions of the *global* batch, so losses and gradients of the ranks simply add.
What looks at a whole batch (balance, metrics, samplers, traces) is given the whole batch on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from moteach.errors import ConfigError, MoteachError

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)
"""A rank that evaluates or loads teachers keeps the others waiting for minutes; one that died is noticed by torchrun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among those that train one student together; the default is a process on its own."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Joins the processes that `torchrun` started; without it, the process is on its own.

        Raises:
            ConfigError: This torch cannot talk to other processes.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_available():
            raise ConfigError(
                f"expected a torch with torch.distributed to train on {size} ranks, got one without; start one process"
            )
        if not dist.is_initialized():
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # both, because checkpoints and objects travel over the CPU's group even where the weights are on GPUs
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """Where sharded weights live."""
        return "cuda" if torch.cuda.is_available() and self.size > 1 else "cpu"

    def share(self, items: Sequence[T]) -> list[T]:
        """Returns this rank's items: every `size`-th, so that domains that follow each other are spread evenly."""
        return list(items[self.rank :: self.size])

    def joined(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """Puts the shares of all ranks back into the order that `share` took them from."""
        total = sum(len(share) for share in shares)
        return [shares[index % self.size][index // self.size] for index in range(total)]

    def gather(self, value: T) -> list[T]:
        """Returns the value of each rank, on each rank; only for what this program made itself (it is pickled)."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, value: T) -> T:
        """Returns rank 0's value on each rank."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[no-any-return]

    def agreed(self, work: Callable[[], T]) -> T:
        """Runs something on rank 0 while the others wait for it; every rank returns its value, or raises its error.

        Args:
            work: Called on rank 0 alone; what it returns is pickled.

        Raises:
            MoteachError: What it raised; of an error that is none, the other ranks get this in its place.
        """
        if self.size == 1:
            return work()
        outcome: tuple[Any, MoteachError | None] = (None, None)
        if self.is_first:
            try:
                outcome = (work(), None)
            except MoteachError as error:
                outcome = (None, error)
            except Exception as error:
                self.first((None, MoteachError(f"rank 0 ended with {error!r}; its own output says where")))
                raise
        value, refusal = self.first(outcome)
        if refusal is not None:
            raise refusal
        return value  # type: ignore[no-any-return]

    def sum(self, value: Tensor) -> Tensor:
        """Adds a tensor over the ranks; every rank gets the sum."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def most(self, value: int) -> int:
        """Returns the largest value of any rank."""
        return max(self.gather(value))

    def least(self, value: int) -> int:
        """Returns the smallest value of any rank."""
        return min(self.gather(value))

    def any(self, value: bool) -> bool:
        """Whether it is true on some rank."""
        return any(self.gather(value))

    def wait(self) -> None:
        """Waits until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()
"""A process on its own."""


def like(value: Tensor, model: Tensor) -> Tensor:
    """Cuts a tensor that every rank has the way another one is cut; leaves it whole beside a whole one."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def full(value: Tensor) -> Tensor:
    """Puts a tensor together from the parts of all ranks; every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value


def is_sharded(value: Tensor) -> bool:
    """Whether every rank holds only a part of it."""
    return isinstance(value, DTensor)
