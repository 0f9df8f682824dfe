"""Heads: from the vector of a prompt and the vectors of the exemplars to one score per expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.errors import ConfigError

Aggregation = Literal["centroid", "mean", "max", "sum"]


@runtime_checkable
class Head(Protocol):
    """Learns from exemplars, then scores prompts; softmax of the scores is the probability of each expert."""

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, in JSON types."""
        ...

    def fit(self, vectors: Float[Tensor, "exemplar hidden"], owners: Bool[Tensor, "exemplar teacher"]) -> None:
        """Learns from exemplars; each belongs to at least one expert, and each expert has at least one."""
        ...

    def logits(self, vectors: Float[Tensor, "prompt hidden"]) -> Float[Tensor, "prompt teacher"]:
        """Scores the experts, in float64."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What was learned beside the exemplars themselves."""
        ...

    def load(
        self,
        tensors: Mapping[str, Tensor],
        *,
        vectors: Float[Tensor, "exemplar hidden"],
        owners: Bool[Tensor, "exemplar teacher"],
        kept: list[int],
    ) -> None:
        """Restores `tensors`; `kept` are the columns of the saved experts that take part, in the order of `owners`."""
        ...


class PrototypeHead:
    """Cosine to what is typical of an expert, divided by `score_temperature`.

    `centroid`: the cosine to the mean vector of the expert's exemplars. `mean`, `max`, `sum`: of the `top_k` exemplars nearest
    to the prompt over all experts, the mean, largest or sum of the cosines that are the expert's (the routes of
    semantic-router); an expert with none of them gets the worst value that the aggregation can take.
    """

    def __init__(self, *, aggregation: Aggregation, top_k: int, score_temperature: float) -> None:
        if top_k < 1 or not score_temperature > 0:
            raise ConfigError(
                f"expected router.top_k >= 1 and router.score_temperature > 0, got {top_k} and {score_temperature}; experts "
                "could not be compared"
            )
        self.aggregation = aggregation
        self.top_k = top_k
        self.score_temperature = score_temperature
        self._vectors = torch.zeros(0, 0, dtype=torch.float64)
        self._owners = torch.zeros(0, 0, dtype=torch.bool)

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, in JSON types."""
        return {
            "aggregation": self.aggregation,
            "top_k": self.top_k,
            "score_temperature": self.score_temperature,
        }

    def fit(self, vectors: Float[Tensor, "exemplar hidden"], owners: Bool[Tensor, "exemplar teacher"]) -> None:
        """Remembers the exemplars."""
        self._vectors, self._owners = vectors.double(), owners

    def logits(self, vectors: Float[Tensor, "prompt hidden"]) -> Float[Tensor, "prompt teacher"]:
        """Returns the aggregated cosine of each expert over `score_temperature`."""
        owners = self._owners.double()
        if self.aggregation == "centroid":
            means = torch.nn.functional.normalize(owners.T @ self._vectors / owners.sum(dim=0)[:, None], dim=1)
            return vectors.double() @ means.T / self.score_temperature
        cosines, nearest = _nearest(self._vectors, vectors, self.top_k)
        theirs = self._owners[nearest]  # prompt, nearest, teacher
        worst = -float(cosines.shape[1]) if self.aggregation == "sum" else -1.0
        if self.aggregation == "max":
            best = cosines[..., None].expand(theirs.shape).masked_fill(~theirs, worst)
            return best.amax(dim=1) / self.score_temperature
        total = (cosines[..., None] * theirs).sum(dim=1)
        count = theirs.sum(dim=1)
        value = total if self.aggregation == "sum" else total / count.clamp(min=1)
        return torch.where(count > 0, value, torch.full_like(value, worst)) / self.score_temperature

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the exemplars say it all."""
        return {}

    def load(
        self,
        tensors: Mapping[str, Tensor],
        *,
        vectors: Float[Tensor, "exemplar hidden"],
        owners: Bool[Tensor, "exemplar teacher"],
        kept: list[int],
    ) -> None:
        """Remembers the exemplars."""
        del tensors, kept
        self.fit(vectors, owners)


class NeighbourHead:
    """Votes of the `neighbours` nearest exemplars (arXiv 2505.12601).

    A vote weighs 1 (`uniform`) or 1 / distance (`distance`, Euclidean between vectors of length one); the share v_j of an
    expert becomes (v_j + smoothing) / (sum v + teachers * smoothing), whose logarithm is the score.
    """

    def __init__(self, *, neighbours: int, votes: Literal["uniform", "distance"], smoothing: float) -> None:
        if neighbours < 1 or not smoothing > 0:
            raise ConfigError(
                f"expected router.neighbours >= 1 and router.smoothing > 0, got {neighbours} and {smoothing}; an expert "
                "without a vote would be impossible, and no calibration could correct it"
            )
        self.neighbours = neighbours
        self.votes = votes
        self.smoothing = smoothing
        self._vectors = torch.zeros(0, 0, dtype=torch.float64)
        self._owners = torch.zeros(0, 0, dtype=torch.bool)

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, in JSON types."""
        return {"neighbours": self.neighbours, "votes": self.votes, "smoothing": self.smoothing}

    def fit(self, vectors: Float[Tensor, "exemplar hidden"], owners: Bool[Tensor, "exemplar teacher"]) -> None:
        """Remembers the exemplars."""
        self._vectors, self._owners = vectors.double(), owners

    def logits(self, vectors: Float[Tensor, "prompt hidden"]) -> Float[Tensor, "prompt teacher"]:
        """Returns the logarithm of each expert's smoothed share of the votes."""
        cosines, nearest = _nearest(self._vectors, vectors, self.neighbours)
        weights = torch.ones_like(cosines)
        if self.votes == "distance":
            weights = 1.0 / (2.0 - 2.0 * cosines).clamp(min=1e-12).sqrt()
        shares = (weights[..., None] * self._owners[nearest]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
        smoothed = shares + self.smoothing
        return (smoothed / smoothed.sum(dim=1, keepdim=True)).log()

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the exemplars say it all."""
        return {}

    def load(
        self,
        tensors: Mapping[str, Tensor],
        *,
        vectors: Float[Tensor, "exemplar hidden"],
        owners: Bool[Tensor, "exemplar teacher"],
        kept: list[int],
    ) -> None:
        """Remembers the exemplars."""
        del tensors, kept
        self.fit(vectors, owners)


class ClassifierHead:
    """Softmax regression on the vectors, or with one hidden layer of tanh units, trained to the end by L-BFGS in float64.

    Minimises sum_i c_i CE(owners_i / |owners_i|, softmax(scores_i)) + l2 / 2 * (squared weights, biases left out), where c_i
    gives every expert the same total whatever its number of exemplars. Full batch and zero start of the last layer: the same
    exemplars give the same router, and no expert depends on its place. `hidden` weights start from `seed`.
    """

    def __init__(self, *, hidden: int | None, l2: float, max_iterations: int, seed: int) -> None:
        if (hidden is not None and hidden < 1) or not l2 >= 0 or max_iterations < 1:
            raise ConfigError(
                "expected router.hidden null or >= 1, router.l2 >= 0 and router.max_iterations >= 1, got "
                f"{hidden}, {l2} and {max_iterations}; there would be nothing to train"
            )
        self.hidden = hidden
        self.l2 = l2
        self.max_iterations = max_iterations
        self.seed = seed
        self._layers: dict[str, Tensor] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, in JSON types."""
        return {"hidden": self.hidden, "l2": self.l2, "max_iterations": self.max_iterations, "seed": self.seed}

    def fit(self, vectors: Float[Tensor, "exemplar hidden"], owners: Bool[Tensor, "exemplar teacher"]) -> None:
        """Trains from scratch."""
        given, targets = vectors.double(), owners.double() / owners.sum(dim=1, keepdim=True)
        shares = (targets / targets.sum(dim=0)).sum(dim=1) / targets.shape[1]
        width = given.shape[1] if self.hidden is None else self.hidden
        layers = {
            "weight": torch.zeros(width, targets.shape[1], dtype=torch.float64),
            "bias": torch.zeros(targets.shape[1], dtype=torch.float64),
        }
        if self.hidden is not None:
            generator = torch.Generator().manual_seed(self.seed)
            start = torch.randn(given.shape[1], width, dtype=torch.float64, generator=generator)
            layers |= {"hidden_weight": start / width**0.5, "hidden_bias": torch.zeros(width, dtype=torch.float64)}
        self._layers = layers
        parameters = [layer.requires_grad_() for layer in layers.values()]
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=self.max_iterations,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            entropy = -(targets * self._scores(given).log_softmax(dim=1)).sum(dim=1)
            decay = torch.stack([(layer**2).sum() for name, layer in layers.items() if "bias" not in name]).sum()
            value = (shares * entropy).sum() + self.l2 / 2 * decay
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        self._layers = {name: layer.detach() for name, layer in layers.items()}

    def logits(self, vectors: Float[Tensor, "prompt hidden"]) -> Float[Tensor, "prompt teacher"]:
        """Returns the scores of the last layer."""
        with torch.no_grad():
            return self._scores(vectors.double())

    def _scores(self, given: Tensor) -> Tensor:
        layers = self._layers
        if "hidden_weight" in layers:
            given = torch.tanh(given @ layers["hidden_weight"] + layers["hidden_bias"])
        return given @ layers["weight"] + layers["bias"]

    def tensors(self) -> dict[str, Tensor]:
        """The layers."""
        return dict(self._layers)

    def load(
        self,
        tensors: Mapping[str, Tensor],
        *,
        vectors: Float[Tensor, "exemplar hidden"],
        owners: Bool[Tensor, "exemplar teacher"],
        kept: list[int],
    ) -> None:
        """Takes the layers, and of the last one the columns of the experts that take part."""
        del vectors, owners
        self._layers = dict(tensors) | {name: tensors[name][..., kept] for name in ("weight", "bias")}


def _nearest(
    exemplars: Float[Tensor, "exemplar hidden"], vectors: Float[Tensor, "prompt hidden"], count: int
) -> tuple[Tensor, Tensor]:
    """Cosines and rows of the nearest exemplars of each prompt, nearest first."""
    found = (vectors.double() @ exemplars.T).topk(min(count, len(exemplars)), dim=1)
    return found.values, found.indices
