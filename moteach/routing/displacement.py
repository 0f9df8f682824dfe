"""Trust each teacher where its training moved it away from where it started."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError
from moteach.routing.context import GateContext, normalised, put, weights_of
from moteach.types import Support

Calibration = Literal["none", "completion"]


class TrustGate:
    """w_k in proportion to prior_k (d_k / scale_k)^sharpness, d_k = KL(T_k || B_k) at this prefix, in nats.

    TrustMOPD (arXiv 2609.23697): a specialist's displacement from the checkpoint B_k it was trained from, at each prefix of the
    student, tells where it learned something. Its abstract says so and that the displacement is calibrated across teachers; the
    score and the calibration themselves could not be read, so the direction of the divergence, the power, and `completion` are
    ours: scale_k is the teacher's mean displacement over the tokens of the completion, so that a teacher that is far from its
    reference everywhere does not outweigh one that moved at a few tokens. A token at which no candidate moved is not taught.
    Needs `experts.<name>.reference`.

    Args:
        calibration: `completion`, or `none` for scale_k = 1.
        sharpness: 1 is in proportion; larger is closer to `hard`.
        hard: The largest takes all.
        trace: Write a row a token into `routing.parquet`.

    Raises:
        ConfigError: The sharpness is not positive and finite.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teachers", "references"})
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    per_token: ClassVar[bool] = True

    def __init__(
        self,
        *,
        calibration: Calibration = "completion",
        sharpness: float = 1.0,
        hard: bool = False,
        trace: bool = False,
    ) -> None:
        if not 0 < sharpness < math.inf:
            raise ConfigError(f"gate.sharpness: expected a finite number above 0, got {sharpness}")
        self.calibration = calibration
        self.sharpness = sharpness
        self.hard = hard
        self.trace = trace

    @torch.no_grad()
    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """Displacement of each candidate, chunk by chunk, then its calibration over each completion."""
        moved = weights_of(context).double()
        for chunk in context.chunks(references=True):
            assert chunk.references is not None
            # an entry that both exclude (-inf) is no displacement
            gaps = (chunk.teachers - chunk.references).double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            put(moved, chunk, (chunk.teachers.double().exp() * gaps).sum(-1).clamp(min=0.0).T)
        if self.calibration == "completion":
            moved = moved / _mean_of_completion(moved, context).clamp(min=1e-30)
        found = context.prior.double() * moved**self.sharpness
        if self.hard:
            found = torch.zeros_like(found).scatter(-1, found.argmax(-1, keepdim=True), 1.0) * (found > 0)
        return normalised(found).float()


def _mean_of_completion(values: Tensor, context: GateContext) -> Tensor:
    rows = context.rollouts.token_rows
    sums = torch.zeros(len(context.rollouts), values.shape[1], dtype=values.dtype).index_add_(0, rows, values)
    counts = torch.bincount(rows, minlength=len(context.rollouts)).clamp(min=1).unsqueeze(-1)
    return (sums / counts)[rows]
