"""The student in shards: FSDP2 over the ranks of a run, the same module and the same forward as on one process.

Between steps every rank holds 1/size of each parameter, of its gradient and of the optimizer's state. Decoder layers are
gathered one at a time in forward and backward, embedding and head with the root. Of a low-rank update and the frozen weights
under it both are sharded, in the same units, and the update alone has gradients. Generation in process gathers the whole
student for as long as it lasts (vLLM rollouts do not). Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from moteach.distributed import Ranks, full
from moteach.errors import ConfigError, nearest
from moteach.students import Student
from moteach.types import Head, LossOutput, Prompt, Rollout, RolloutBatch

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shard(student: Student, ranks: Ranks, *, compute_dtype: str | None = None) -> None:
    """Shards the student's parameters over all ranks; does nothing for a process on its own.

    Gradients are summed over ranks, not averaged: token weights are already fractions of the global batch.

    Args:
        student: The root module; its decoder layers are gathered one by one.
        ranks: The processes.
        compute_dtype: Precision of forward and backward (`bfloat16`), parameters and reductions staying as they are; None
            computes in the parameters' own.

    Raises:
        ConfigError: The precision is unknown, or a process on its own is asked for another than its parameters'.
    """
    if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"student.compute_dtype: got '{compute_dtype}'; {nearest(compute_dtype, COMPUTE_DTYPES)}")
    if ranks.size == 1:
        if compute_dtype is not None:
            raise ConfigError(
                f"student.compute_dtype={compute_dtype} needs the sharded student, got one process, which would compute in "
                "the precision of its parameters. Start it with `torchrun --nproc-per-node N -m moteach train ...`, or set "
                "student.dtype"
            )
        return
    mesh = init_device_mesh(ranks.device_type, (ranks.size,))
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=COMPUTE_DTYPES[compute_dtype], reduce_dtype=torch.float32)
    student.to(ranks.device_type)
    layers = blocks(student)
    for block in layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    for module in sharded_modules(student):
        module.set_gradient_divide_factor(1.0)
        # gloo has no reduction that multiplies
        module.set_force_sum_reduction_for_comms(True)
        # a rank may have no token that reaches some parameter; the others wait for its zeros
        module.set_reduce_scatter_unused_params(True)
    _order_backward(student, layers)
    _make_root(student)


def _order_backward(student: Student, layers: Sequence[nn.Module]) -> None:
    """Says what each layer gathers ahead in backward: the one before it.

    By itself FSDP2 takes what ran before it last, and that may be generation, of which a rank without prompts has none: its
    backward would gather less than that of the others, which would wait forever.
    """
    # before the first layer comes the root, which is gathered already
    for block, before in zip(layers, [student, *layers], strict=False):
        cast(FSDPModule, block).set_modules_to_backward_prefetch([cast(FSDPModule, before)])


def blocks(student: Student) -> list[nn.Module]:
    """Returns the layers that transformers says must not be split; the units of gathering."""
    names = set(getattr(student.model, "_no_split_modules", None) or ())
    return [module for module in student.model.modules() if type(module).__name__ in names]


def sharded_modules(module: nn.Module) -> list[FSDPModule]:
    """Returns the units that FSDP2 gathers, the root among them."""
    return [child for child in module.modules() if isinstance(child, FSDPModule)]


@contextmanager
def whole(student: nn.Module) -> Iterator[None]:
    """Gathers the root's own parameters (embedding, head) for the block, as they are now.

    Layers gather themselves, one at a time; `generation_mode` gathers all of them.
    """
    if not isinstance(student, FSDPModule):
        yield
        return
    # a pass without a gradient leaves them gathered, as they were then
    student.reshard()
    student.unshard()
    try:
        yield
    finally:
        student.reshard()


def full_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Gathers every parameter and buffer, one at a time, to the CPU, tied ones once; all ranks must call it."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied = names - {name for name, _ in module.named_parameters()}
    return {name: full(value).detach().cpu() for name, value in module.state_dict().items() if name not in tied}


def blank_batch() -> RolloutBatch:
    """Returns one row of one token: what a rank runs when it has nothing left and the others still gather parameters."""
    prompt = Prompt(prompt_id="blank", text="", token_ids=(0,))
    rollout = Rollout(
        prompt=prompt, sample=0, completion_ids=(0,), rollout_logprobs=(0.0,), finished=True, student_version=0
    )
    return RolloutBatch.from_rollouts([rollout], pad_id=0)


def nothing(hidden: Tensor, head: Head) -> LossOutput:
    """A loss of zero that reaches every parameter, so that gradients are reduced on all ranks alike."""
    return LossOutput(loss=anchor(hidden, head), denominator=1.0)


def anchor(hidden: Tensor, head: Head) -> Tensor:
    """Zero, connected to the states and the head."""
    zero = hidden.sum() * 0.0 + head.weight.sum() * 0.0
    return zero if head.bias is None else zero + head.bias.sum() * 0.0


@torch.no_grad()
def _make_root(student: Student) -> None:
    """Runs one forward of the root before generation calls the inner model: FSDP2's root is the module that comes first."""
    student(blank_batch(), nothing)
    for module in sharded_modules(student):
        module.reshard()
