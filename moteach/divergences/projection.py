"""From hidden states to logits and back: the linear head with its scale, bias and softcap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moteach.types import Head


def project(hidden: Float[Tensor, "token hidden"], head: Head) -> Float[Tensor, "token vocab"]:
    """Computes logits = softcap * tanh(z / softcap), or z without softcap, with z = scale * (hidden @ weight.T + bias).

    The product is made in the head's dtype and everything after it in float32, or float64 when the head is float64.

    Args:
        hidden: Last hidden states.
        head: The head of the model that made them.

    Returns:
        Logits in float32 or float64.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if head.scale != 1.0:
        logits = logits.mul_(head.scale)
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_() * head.softcap
    return logits


def through_softcap(
    gradient: Float[Tensor, "token vocab"], logits: Float[Tensor, "token vocab"], softcap: float
) -> Float[Tensor, "token vocab"]:
    """Takes a gradient through the softcap, in place: d logits / d z = 1 - (logits / softcap)^2.

    Args:
        gradient: Derivative with respect to the capped logits; overwritten.
        logits: The capped logits; overwritten.
        softcap: The cap.

    Returns:
        The derivative with respect to z.
    """
    return gradient.mul_(logits.div_(softcap).square_().neg_().add_(1.0))


class HeadGradient:
    """Sums, over chunks, the gradients that flow into hidden states, weight and bias of a head.

    Buffers are float32 (float64 for a float64 head) whatever the dtype of the parameters, so that many small chunks add
    up without rounding.
    """

    def __init__(self, hidden: Float[Tensor, "packed hidden"], head: Head, *, wanted: tuple[bool, bool, bool]) -> None:
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        for_hidden, for_weight, for_bias = wanted
        self._head = head
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if for_hidden else None
        self.weight = torch.zeros_like(head.weight, dtype=dtype) if for_weight else None
        self.bias = torch.zeros_like(head.bias, dtype=dtype) if for_bias and head.bias is not None else None

    def add(
        self,
        tokens: Tensor | slice,
        hidden: Float[Tensor, "token hidden"],
        gradient: Float[Tensor, "token vocab"],
    ) -> None:
        """Adds one chunk.

        Args:
            tokens: Where the chunk lies in the packed axis; no token may come twice.
            hidden: Its hidden states.
            gradient: Derivative with respect to hidden @ weight.T + bias.
        """
        weight = self._head.weight
        if self.bias is not None:
            self.bias.add_(gradient.sum(0))
        if gradient.dtype != weight.dtype:
            gradient = gradient.to(weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if self.hidden is not None:
                chunk = (gradient @ weight).to(self.hidden.dtype)
                if isinstance(tokens, slice):
                    self.hidden[tokens] = chunk
                else:
                    self.hidden.index_copy_(0, tokens, chunk)
            if self.weight is not None and self.weight.dtype == weight.dtype:
                self.weight.addmm_(gradient.t(), hidden.to(weight.dtype))
            elif self.weight is not None:
                self.weight.add_(gradient.t() @ hidden.to(weight.dtype))
