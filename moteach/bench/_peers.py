"""The loss kernels of TRL and Liger, each as one function from hidden states and heads to the mean of the loss.

Both are optional (`pip install 'moteach[dev]'`) and both are called as their own trainers call them on a CPU.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.divergences.base import Divergence


@runtime_checkable
class PeerLoss(Protocol):
    """The loss of another library, averaged over the tokens and differentiable in the student."""

    def __call__(
        self,
        student_hidden: Float[Tensor, "packed hidden"],
        student_weight: Float[Tensor, "vocab hidden"],
        teacher_hidden: Float[Tensor, "packed hidden"],
        teacher_weight: Float[Tensor, "vocab hidden"],
        *,
        beta: float,
        chunk_size: int,
    ) -> Float[Tensor, ""]:
        """Computes the loss; `beta` as `peer_beta` gives it, `chunk_size` tokens at a time where that can be chosen."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library that is installed."""

    name: str
    version: str
    loss: PeerLoss


def peer_beta(divergence: Divergence) -> float | None:
    """The `beta` under which TRL and Liger compute this divergence, None when they cannot.

    In both, 0 is KL(teacher || student), 1 is KL(student || teacher), and anything between is the generalised
    Jensen-Shannon divergence with `beta` on the teacher, as in GKD (arXiv 2306.13649, eq. 1).
    """
    if divergence.name == "jsd":
        return float(vars(divergence)["beta"])
    return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(divergence.name)


def find_peers() -> tuple[list[Peer], list[str]]:
    """Imports the peers.

    Returns:
        Those that can be used, and for each of the others a line that says how to get it.
    """
    found, missing = [], []
    for name, package, module, attribute, loss in (
        ("trl", "trl", "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", _trl),
        ("liger", "liger-kernel", "liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss", _liger),
    ):
        try:
            kernel = getattr(importlib.import_module(module), attribute)
            found.append(Peer(name=name, version=version(package), loss=loss(kernel)))
        except (ImportError, AttributeError, PackageNotFoundError) as error:
            missing.append(f"{name} is left out ({error}); pip install 'moteach[dev]' brings it")
    return found, missing


def _trl(function: Any) -> PeerLoss:
    """`trl.kernels.chunked_divergence`: tiles of 4096 tokens and 32768 entries of the vocabulary, not to be chosen."""

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        *,
        beta: float,
        chunk_size: int,
    ) -> Tensor:
        del chunk_size
        values: Tensor = function.apply(
            student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, beta
        )[0]
        return values.mean()

    return loss


def _liger(module: Any) -> PeerLoss:
    """`liger_kernel.chunked_loss`: the soft loss alone, not compiled, which would need a C++ compiler.

    Its chunks are up to twice `chunk_size`: it makes tokens // chunk_size of them.
    """

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        *,
        beta: float,
        chunk_size: int,
    ) -> Tensor:
        kernel = module(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=chunk_size)
        # The labels only say which tokens count: all but those that are `ignore_index`.
        labels = torch.zeros(len(student_hidden), dtype=torch.long)
        value: Tensor = kernel(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
        return value

    return loss
