"""What every router that learns from exemplars does: learn at `bind`, calibrate, decide, explain, save."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.data.base import text_key, words_of
from moteach.errors import CheckpointError, ConfigError
from moteach.routing.calibration import apply_isotonic, fit_isotonic, fit_temperature
from moteach.routing.cross_fit import cross_fitted
from moteach.routing.encoders import Embedder, embedder_named
from moteach.routing.exemplars import Exemplars, check_leak, gather, read_exemplars, read_labelled
from moteach.routing.heads import Head
from moteach.routing.policy import Policy
from moteach.routing.saved import SavedRouter, read_router, write_router
from moteach.routing.settings import LearnerSettings
from moteach.routing.tuning import Tuner
from moteach.types import Prompt, Routing


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a router thinks of prompts before it decides, experts in the order they were bound."""

    probabilities: Float[Tensor, "prompt teacher"]
    """Zero for experts of weight zero."""
    confidence: Float[Tensor, " prompt"]
    """Calibrated probability of the first expert."""
    similarity: Float[Tensor, " prompt"]
    """Largest cosine to an exemplar; low for prompts unlike all of them."""
    energy: Float[Tensor, " prompt"]
    """ln sum exp of the scores over the experts."""


class Learner:
    """The part of a router that learns.

    Args:
        router: Name of the router's class, written into what is saved.
        head: Scores the experts.
        policy: Makes weights of the scores.
        settings: Where it learns from.
        arguments: Constructor arguments of the router, written into what is saved.
        tuner: Teaches the encoder the exemplars before the head learns from its vectors; None leaves the encoder as it is.
    """

    def __init__(
        self,
        *,
        router: str,
        head: Head,
        policy: Policy,
        settings: LearnerSettings,
        arguments: dict[str, Any],
        tuner: Tuner | None = None,
    ) -> None:
        self.router = router
        self.head = head
        self.policy = policy
        self.settings = settings
        self.arguments = arguments
        self.tuner = tuner
        self._encoder_folder: Path | None = None
        self._held_out: Float[Tensor, "exemplar teacher"] | None = None
        self.exemplars = Exemplars(names=(), texts=(), owners=torch.zeros(0, 0, dtype=torch.bool))
        self._embedder: Embedder | None = None
        self._vectors = torch.zeros(0, 1)
        self._names: tuple[str, ...] = ()
        self._importance = torch.zeros(0, dtype=torch.float64)
        self._costs = torch.zeros(0, dtype=torch.float64)
        self.domains: dict[str, list[str]] = {}
        self._temperature = 1.0
        self._isotonic: tuple[list[float], list[float]] | None = None

    @property
    def embedder(self) -> Embedder:
        """The encoder behind its cache, opened at first use."""
        if self._embedder is None:
            self._embedder = embedder_named(self.settings.encoder, cache=self.settings.cache)
        return self._embedder

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Learns from the exemplars of the experts, or takes the saved router that `path` names.

        Raises:
            ConfigError: There is nothing to learn from, or the saved router does not fit.
            DataError: A file cannot be read, or what is calibrated on was learned from.
        """
        self._take({expert.name: (expert.weight, expert.cost) for expert in experts})
        self.domains = {expert.name: list(expert.domains) for expert in experts}
        if self.settings.path is not None:
            self._restore(read_router(Path(self.settings.path)))
            return
        # Inside, experts are in the order of their names: sums, ties and searches cannot depend on how they were listed.
        ordered = sorted(experts, key=lambda expert: expert.name)
        self.exemplars = read_exemplars(ordered, labelled_path=self.settings.labelled_path)
        self._held_out = None
        if self.tuner is not None:
            cache, taught = self.settings.cache, (self.exemplars.texts, self.exemplars.owners)
            self._encoder_folder = self.tuner.kept(self.settings.encoder, *taught, cache=cache)
            self._embedder = embedder_named(str(self._encoder_folder), cache=cache)
        self._vectors = self.embedder(self.exemplars.texts)
        self.head.fit(self._vectors, self.exemplars.owners)
        self._calibrate(ordered)

    def bind_saved(self) -> None:
        """Takes the saved router that `path` names with the experts, domains and weights it was saved with."""
        saved = read_router(Path(str(self.settings.path)))
        self._take({row["name"]: (float(row["weight"]), float(row.get("cost", 0.0))) for row in saved.experts})
        self.domains = {row["name"]: list(row["domains"]) for row in saved.experts}
        self._restore(saved)

    def _take(self, numbers: dict[str, tuple[float, float]]) -> None:
        self._names = tuple(numbers)
        self.policy.check(self._names)
        self._importance = torch.tensor([numbers[name][0] for name in sorted(numbers)], dtype=torch.float64)
        self._costs = torch.tensor([numbers[name][1] for name in sorted(numbers)], dtype=torch.float64)

    def _calibrate(self, experts: Sequence[ExpertSpec]) -> None:
        """Fits the calibration on scores of texts that the scoring head has not seen."""
        self._temperature, self._isotonic = 1.0, None
        if self.settings.calibration == "none" or len(experts) < 2:
            return
        if self.settings.calibration_path is not None:
            path = Path(self.settings.calibration_path).expanduser()
            rows = [row for row in read_labelled(path, experts) if row[1]]
            held_out = gather([expert.name for expert in experts], rows)
            prompts = [Prompt(prompt_id=text[:40], text=text, token_ids=()) for text in held_out.texts]
            check_leak(self.exemplars.texts, prompts, what="router.calibration_path")
            logits, owners = self.head.logits(self.embedder(held_out.texts)), held_out.owners
        else:
            logits, owners = self._cross_fitted(), self.exemplars.owners
        if self.settings.calibration == "temperature":
            self._temperature = fit_temperature(logits, owners)
        else:
            first = logits.softmax(dim=1).max(dim=1)
            self._isotonic = fit_isotonic(first.values, owners.gather(1, first.indices[:, None])[:, 0])

    def _cross_fitted(self) -> Float[Tensor, "exemplar teacher"]:
        if self._held_out is None:
            self._held_out = cross_fitted(self.head, self.exemplars, folds=self.settings.folds, vectors=self._taught_on)
        return self._held_out

    def _taught_on(self, rows: Bool[Tensor, " exemplar"]) -> Float[Tensor, "exemplar hidden"]:
        """Vectors of all exemplars, from an encoder that has learned from these rows alone, if it learns at all."""
        if self.tuner is None:
            return self._vectors
        texts = [text for text, stays in zip(self.exemplars.texts, rows.tolist(), strict=True) if stays]
        return self.tuner.taught(self.settings.encoder, texts, self.exemplars.owners[rows]).encode(self.exemplars.texts)

    def held_out_accuracy(self) -> float | None:
        """Share of the exemplars that a head which has not seen them gives to a right expert; None where there are too few."""
        owners = self.exemplars.owners
        if owners.shape[1] < 2 or int(owners.sum(dim=0).min()) < self.settings.folds:
            return None
        chosen = self._cross_fitted().argmax(dim=1, keepdim=True)
        return float(owners.gather(1, chosen).double().mean())

    def scores(self, texts: Sequence[str]) -> Scores:
        """Scores texts without deciding."""
        if not texts:
            none = torch.zeros(0, dtype=torch.float64)
            return Scores(
                probabilities=torch.zeros(0, len(self._names)).double(), confidence=none, similarity=none, energy=none
            )
        vectors = self.embedder(texts)
        logits = self.head.logits(vectors) / self._temperature
        allowed = logits.masked_fill(self._importance == 0, -torch.inf)
        energy = allowed.logsumexp(dim=1)
        # Where no expert may teach every score is -inf and the softmax is undefined.
        probabilities = torch.nan_to_num(allowed.softmax(dim=1), nan=0.0)
        confidence = probabilities.amax(dim=1)
        if self._isotonic is not None:
            confidence = apply_isotonic(confidence, *self._isotonic)
        similarity = (vectors.double() @ self._vectors.double().T).amax(dim=1)
        columns = self._columns(self._names)
        return Scores(
            probabilities=probabilities[:, columns], confidence=confidence, similarity=similarity, energy=energy
        )

    def _columns(self, names: Sequence[str]) -> list[int]:
        places = {name: place for place, name in enumerate(sorted(self._names))}
        return [places[name] for name in names]

    def route(self, prompts: Sequence[Prompt]) -> Routing:
        """Weights the experts of each prompt."""
        routing, _, _ = self.decide([words_of(prompt) for prompt in prompts])
        return Routing(
            teacher_ids=routing.teacher_ids,
            prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
            weights=routing.weights,
            confidence=routing.confidence,
            abstained=routing.abstained,
        )

    def decide(self, texts: Sequence[str]) -> tuple[Routing, Scores, Bool[Tensor, " prompt"]]:
        """Routes texts.

        Returns:
            The routing (prompt ids are the texts), the scores it comes from, and where a threshold was not reached:
            with `on_abstain: skip` those rows have no weight, otherwise they have the weights of what happens instead.
        """
        scores = self.scores(texts)
        unsure = self.policy.abstains(scores.confidence, scores.similarity, scores.energy)
        columns = self._columns(self._names)
        inverse = [columns.index(place) for place in range(len(columns))]
        weights = self.policy.weights(
            scores.probabilities[:, inverse],
            unsure,
            importance=self._importance,
            names=sorted(self._names),
            costs=self._costs,
        )[:, columns].float()
        abstained = weights.sum(dim=1) == 0
        confidence = scores.confidence
        if self.policy.cost_weight > 0 and weights.shape[1]:
            # A price may choose another expert than the most probable one, of which nothing more than its probability is known.
            chosen = scores.probabilities.gather(1, weights.argmax(dim=1, keepdim=True))[:, 0]
            confidence = torch.minimum(confidence, chosen)
        confidence = confidence.float().clamp(0, 1).masked_fill(abstained, 0.0)
        routing = Routing(
            teacher_ids=self._names,
            prompt_ids=tuple(texts),
            weights=weights,
            confidence=confidence,
            abstained=abstained,
        )
        return routing, scores, unsure

    def nearest(self, text: str, *, count: int = 5) -> list[tuple[str, tuple[str, ...], float]]:
        """Returns the exemplars nearest to a text: the exemplar, its experts and the cosine."""
        cosines = (self.embedder([text]).double() @ self._vectors.double().T)[0]
        found = cosines.topk(min(count, len(cosines)))
        owners = self.exemplars.owners
        return [
            (
                self.exemplars.texts[row],
                tuple(name for name, mine in zip(self.exemplars.names, owners[row].tolist(), strict=True) if mine),
                cosine,
            )
            for cosine, row in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """A hash of everything that the routes depend on: learning again gives the same, so nothing else is stored."""
        said = {
            "router": self.router,
            "head": self.head.settings,
            "encoder": self.embedder.encoder.identity,
            "experts": list(self.exemplars.names),
            "exemplars": [text_key(text).hex() for text in self.exemplars.texts],
            "owners": self.exemplars.owners.int().tolist(),
            "calibration": [self.settings.calibration, self.settings.folds],
        }
        return {"fingerprint": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that this router is the one that was checkpointed.

        Raises:
            CheckpointError: Exemplars, experts, encoder or settings differ.
        """
        if state != self.state_dict():
            raise CheckpointError(
                "router: expected the exemplars, experts, encoder and settings of the checkpoint, got others; prompts would go "
                "to other teachers from here on. Restore the exemplar files, or start a new run_dir"
            )

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the router so that `from_pretrained` and `router.path` route identically without its exemplar files.

        Args:
            folder: Made or replaced as a whole: `router.safetensors`, `router.json` and a model card.

        Raises:
            ConfigError: Nothing was learned yet.
        """
        if not self.exemplars.names:
            raise ConfigError(
                "expected a router that has learned, got one without experts; call `bind` before saving it"
            )
        knots = None if self._isotonic is None else {"knots": self._isotonic[0], "values": self._isotonic[1]}
        weights = dict(zip(sorted(self._names), self._importance.tolist(), strict=True))
        costs = dict(zip(sorted(self._names), self._costs.tolist(), strict=True))
        experts = [{"name": n, "domains": self.domains[n], "weight": weights[n], "cost": costs[n]} for n in self._names]
        saved = SavedRouter(
            router=self.router,
            head=self.head.settings,
            arguments=self.arguments,
            encoder=self.settings.encoder,
            encoder_identity=self.embedder.encoder.identity,
            experts=tuple(experts),
            exemplars=self.exemplars,
            vectors=self._vectors,
            tensors=self.head.tensors(),
            temperature=self._temperature,
            isotonic=knots,
            encoder_folder=self._encoder_folder,
        )
        write_router(Path(folder), saved)

    def _restore(self, saved: SavedRouter) -> None:
        """Takes what was saved, for the experts of this run."""
        if saved.router != self.router:
            raise ConfigError(
                f"router.path: expected a saved {self.router}, got a {saved.router} in {self.settings.path}; its scores would "
                "mean something else. Choose the router it was saved by"
            )
        unknown = sorted(set(self._names) - set(saved.exemplars.names))
        if unknown:
            raise ConfigError(
                f"router.path: the saved router does not know the experts {', '.join(unknown)}, which would never be given a "
                f"prompt; it knows {', '.join(saved.exemplars.names)}. Fit a router for these experts: moteach route fit"
            )
        # Saved again, it has to say what it is made of, not what it was asked for.
        self.settings = replace(self.settings, encoder=saved.encoder)
        self.arguments = {**self.arguments, **saved.head, "encoder": saved.encoder}
        if self.tuner is not None:
            tuned = {name: saved.arguments[name] for name in self.tuner.settings}
            self.arguments, self.tuner = self.arguments | tuned, Tuner(**tuned)
        self._encoder_folder, self._held_out = saved.encoder_folder, None
        self._embedder = embedder_named(str(saved.encoder_folder or saved.encoder), cache=self.settings.cache)
        if self._embedder.encoder.identity != saved.encoder_identity:
            raise ConfigError(
                f"router.path: expected the encoder {saved.encoder_identity} that the router was saved with, got "
                f"{self._embedder.encoder.identity}; prompts could not be compared with its exemplars. Fit the router again"
            )
        names = sorted(self._names)
        kept = [saved.exemplars.names.index(name) for name in names]
        owners = saved.exemplars.owners[:, kept]
        rows = owners.any(dim=1)
        texts = [text for text, stays in zip(saved.exemplars.texts, rows.tolist(), strict=True) if stays]
        self.exemplars = Exemplars(names=tuple(names), texts=tuple(texts), owners=owners[rows])
        self._vectors = saved.vectors[rows]
        self.head = type(self.head)(**saved.head)
        self.head.load(saved.tensors, vectors=self._vectors, owners=self.exemplars.owners, kept=kept)
        self._temperature = saved.temperature
        self._isotonic = None if saved.isotonic is None else (saved.isotonic["knots"], saved.isotonic["values"])
