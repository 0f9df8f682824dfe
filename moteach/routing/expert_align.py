"""Keep a teacher where what it learned is what it now asks of the student."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError
from moteach.routing.context import GateContext, normalised, put, weights_of
from moteach.types import Support

Weighting = Literal["cosine", "uniform"]


class ExpertAlignGate:
    """Keeps teacher k iff <e_k, d_k> > threshold, with weights in proportion to cos(e_k, d_k); abstains where none is kept.

    On the student's k likeliest tokens, e_k = log T_k - log B_k is the teacher's specialisation, its shift from the checkpoint
    B_k it was trained from, and d_k = log T_k - log S what it would teach. ExpertAlign of MOPD-Router (arXiv 2609.30837): a
    teacher whose lesson is not its speciality only repeats what every model of the family says. The router's weights multiply
    (they are alike in the paper). Needs `experts.<name>.reference`.

    Args:
        k: The student's likeliest tokens that are read, at most the vocabulary.
        threshold: Largest inner product that is not kept.
        weighting: `cosine`, or `uniform` over the teachers that are kept.
        hard: The largest takes all.
        trace: Write a row a token into `routing.parquet`.

    Raises:
        ConfigError: k is below 1, or the threshold below 0: a negative cosine is no weight.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teachers", "student", "references"})
    supports: ClassVar[frozenset[Support]] = frozenset({"full"})
    per_token: ClassVar[bool] = True

    def __init__(
        self,
        *,
        k: int = 16,
        threshold: float = 1e-6,
        weighting: Weighting = "cosine",
        hard: bool = False,
        trace: bool = False,
    ) -> None:
        if k < 1 or not threshold >= 0:
            raise ConfigError(f"gate: expected k >= 1 and threshold >= 0, got k={k} and threshold={threshold}")
        self.k = k
        self.threshold = threshold
        self.weighting = weighting
        self.hard = hard
        self.trace = trace

    @torch.no_grad()
    def weights(self, context: GateContext) -> Float[Tensor, "packed teacher"]:
        """Alignment of each candidate, chunk by chunk."""
        weights = weights_of(context)
        for chunk in context.chunks(student=True, references=True):
            assert chunk.student is not None
            assert chunk.references is not None
            top = chunk.student.topk(min(self.k, chunk.student.shape[-1]), dim=-1)
            scores = []
            for teacher, reference in zip(chunk.teachers, chunk.references, strict=True):
                said = teacher.gather(-1, top.indices).double()
                learned, lesson = said - reference.gather(-1, top.indices).double(), said - top.values.double()
                inner = (learned * lesson).sum(-1)
                cosine = inner / (learned.norm(dim=-1) * lesson.norm(dim=-1)).clamp(min=1e-30)
                value = cosine if self.weighting == "cosine" else torch.ones_like(cosine)
                scores.append(torch.where(inner > self.threshold, value, torch.zeros_like(value)))
            found = torch.stack(scores, dim=-1) * chunk.prior.double()
            if self.hard:
                found = torch.zeros_like(found).scatter(-1, found.argmax(-1, keepdim=True), 1.0) * (found > 0)
            put(weights, chunk, normalised(found))
        return weights
