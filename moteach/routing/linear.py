"""Bayesian linear regression per expert: what an online router believes, and how it explores."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class LinearBeliefs:
    """For each expert j a Gaussian belief over theta_j in reward = x . theta_j, prior N(0, I / prior).

    precision_j = prior I + sum_i w_ij x_i x_i^T, moment_j = sum_i w_ij y_ij x_i, mean_j = precision_j^-1 moment_j: the
    ridge regression of LinUCB (arXiv 1003.0146, Algorithm 1) and of Thompson sampling with linear payoffs (arXiv 1209.3352,
    Algorithm 1), in float64.

    Args:
        names: The experts, in the order of the columns.
        size: Length of a context.
        prior: Precision of the prior, above 0.
    """

    def __init__(self, names: tuple[str, ...], *, size: int, prior: float) -> None:
        self.names = names
        self.prior = prior
        self.precision = prior * torch.eye(size, dtype=torch.float64).repeat(len(names), 1, 1)
        self.moment = torch.zeros(len(names), size, dtype=torch.float64)

    def learn(
        self,
        contexts: Float[Tensor, "row size"],
        targets: Float[Tensor, "row teacher"],
        counts: Float[Tensor, "row teacher"],
    ) -> None:
        """Adds observations; `counts` says how much each counts, 0 for none (its target is not read)."""
        known = torch.where(counts > 0, targets, torch.zeros_like(targets))
        self.precision += torch.einsum("rt,ri,rj->tij", counts, contexts, contexts)
        self.moment += torch.einsum("rt,ri->ti", counts * known, contexts)

    def forget(self, memory: float) -> None:
        """Shrinks what was observed by the factor `memory`, towards the prior."""
        eye = self.prior * torch.eye(self.moment.shape[1], dtype=torch.float64)
        self.precision = memory * self.precision + (1 - memory) * eye
        self.moment = memory * self.moment

    def mean(self, contexts: Float[Tensor, "row size"]) -> Float[Tensor, "row teacher"]:
        """Returns x . mean_j."""
        means: Tensor = torch.linalg.solve(self.precision, self.moment.unsqueeze(2)).squeeze(2)
        return contexts @ means.T

    def spread(self, contexts: Float[Tensor, "row size"]) -> Float[Tensor, "row teacher"]:
        """Returns sqrt(x^T precision_j^-1 x), the standard deviation of x . theta_j for noise of variance 1."""
        solved: Tensor = torch.linalg.solve(self.precision, contexts.T.expand(len(self.names), -1, -1))
        return (contexts.T * solved).sum(dim=1).clamp(min=0).sqrt().T

    def draw(self, contexts: Float[Tensor, "row size"], *, scale: float, key: str) -> Float[Tensor, "row teacher"]:
        """Returns x . theta_j of one draw theta_j ~ N(mean_j, scale^2 precision_j^-1), the same for all rows of a `key`.

        The noise of an expert is keyed by its name, so that neither its place nor the other experts change it.
        """
        noise = torch.stack([_normal(f"{key}\0{name}", self.moment.shape[1]) for name in self.names])
        factor = torch.linalg.cholesky(self.precision)
        # precision = L L^T, so L^-T z has covariance precision^-1.
        shift: Tensor = torch.linalg.solve_triangular(factor.mT, noise.unsqueeze(2), upper=True).squeeze(2)
        return self.mean(contexts) + scale * contexts @ shift.T

    def state_dict(self) -> dict[str, Any]:
        """Both statistics by the name of the expert; JSON keeps every bit of a float."""
        return {
            name: {"precision": self.precision[place].tolist(), "moment": self.moment[place].tolist()}
            for place, name in enumerate(self.names)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.precision = torch.tensor([state[name]["precision"] for name in self.names], dtype=torch.float64)
        self.moment = torch.tensor([state[name]["moment"] for name in self.names], dtype=torch.float64)


def _normal(key: str, size: int) -> Float[Tensor, " size"]:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % 2**63
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
