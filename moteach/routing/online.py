"""A router that is trained while the student is: from verified rewards, never from the distillation loss."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.data.base import domain_of, words_of
from moteach.errors import ConfigError
from moteach.routing.base import Ask, RoutingFeedback, routing_of
from moteach.routing.credit import verdicts
from moteach.routing.encoders import embedder_named
from moteach.routing.likelihood import completion_logprobs
from moteach.routing.linear import LinearBeliefs
from moteach.routing.policy import Policy, Weighting, decide
from moteach.types import Prompt, RolloutBatch, Routing

Exploration = Literal["thompson", "ucb"]
DOMAIN = "domain"
"""`features` of a router that knows the domain of a prompt, but not whose it is."""


class OnlineRouter:
    """A contextual bandit over teachers: linear beliefs about what a teacher is worth on a prompt, and exploration.

    Every `ask_every` steps all teachers score all completions of the step, and each is judged by whether it finds the verified
    right ones likelier than the wrong ones, see `verdicts`. There is no delay, every teacher is judged on every row whoever
    taught it, and nearness to the student does not help a teacher: it is compared with itself. In between, the beliefs of the
    last verdicts route.

    The contexts are vectors of length one. `thompson` draws one theta a step, keyed by seed and step; `ucb` adds `exploration`
    standard deviations. `exploration: 0` is greedy.

    Args:
        features: `ngrams`, `domain`, or a sentence-transformers model, see `encoder_named`.
        size: Length of a context; vectors of the encoder are projected to it at random.
        cache: See `LearnerSettings`.
        explore: `thompson` or `ucb`.
        exploration: Standard deviations of the belief that are drawn or added.
        prior: Precision of the prior of each weight of a belief.
        memory: Share of what was learned that is kept at each question; 1 forgets nothing.
        ask_every: Steps from one question to all teachers to the next.
        sharpness: How fast rows of other prompts stop counting as comparable; None compares completions of one prompt only,
            which needs `group_size` of at least 2.
        temperature: Weights are softmax(value / temperature).
        seed: Of the exploration and the projection.
        weighting, m, cost_weight: See `Policy`; costs are counted after the division by `temperature`.
    """

    def __init__(
        self,
        *,
        features: str = "ngrams",
        size: int = 64,
        cache: str | None = "cache:embeddings",
        explore: Exploration = "thompson",
        exploration: float = 0.3,
        prior: float = 1.0,
        memory: float = 1.0,
        ask_every: int = 4,
        sharpness: float | None = 4.0,
        temperature: float = 0.1,
        seed: int = 0,
        weighting: Weighting = "hard",
        m: int = 2,
        cost_weight: float = 0.0,
    ) -> None:
        if size < 1 or ask_every < 1 or (sharpness is not None and not sharpness > 0):
            raise ConfigError(
                "expected router.size >= 1, router.ask_every >= 1 and router.sharpness null or > 0, got "
                f"{size}, {ask_every} and {sharpness}; the router would learn from nothing"
            )
        if not prior > 0 or not exploration >= 0 or not 0 < memory <= 1 or not temperature > 0:
            raise ConfigError(
                "expected router.prior > 0, router.exploration >= 0, router.memory in (0, 1] and router.temperature > 0, got "
                f"{prior}, {exploration}, {memory} and {temperature}; beliefs would not be distributions"
            )
        self.features, self.size, self.cache = features, size, cache
        self.explore, self.exploration, self.prior, self.memory = explore, exploration, prior, memory
        self.ask_every, self.sharpness = ask_every, sharpness
        self.temperature, self.seed = temperature, seed
        self.policy = Policy(weighting=weighting, m=m, cost_weight=cost_weight)
        self._experts: tuple[ExpertSpec, ...] = ()
        self._columns: list[int] = []
        self._beliefs = LinearBeliefs((), size=size, prior=prior)
        self._steps = 0
        self._embedder: Any = None
        self._ask: Ask | None = None
        self._heard: tuple[RolloutBatch, Float[Tensor, "batch teacher"]] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Verified rewards, and what teachers say."""
        return frozenset({"rewards", "evidence"})

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Starts from the prior."""
        self._experts = tuple(experts)
        names = tuple(sorted(expert.name for expert in experts))
        self._columns = [names.index(expert.name) for expert in experts]
        self._beliefs = LinearBeliefs(names, size=self.size, prior=self.prior)

    def bind_teachers(self, ask: Ask) -> None:
        """Remembers how teachers are asked."""
        self._ask = ask

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Weights the teachers by their drawn or optimistic values, and asks all of them when it is time."""
        contexts = self._contexts(prompts)
        if self.explore == "thompson":
            values = self._beliefs.draw(contexts, scale=self.exploration, key=f"{self.seed}\0{self._steps}")
        else:
            values = self._beliefs.mean(contexts) + self.exploration * self._beliefs.spread(contexts)
        routing = decide(self.policy, self._experts, prompts, values[:, self._columns] / self.temperature)
        if self._ask is not None and rollouts is not None:
            self._listen(prompts, rollouts, self._ask)
        return routing

    def _listen(self, prompts: Sequence[Prompt], rollouts: RolloutBatch, ask: Ask) -> None:
        if self._steps % self.ask_every or not len(prompts):
            return
        everybody = routing_of(self._experts, prompts, torch.ones(len(prompts), len(self._experts)))
        said = ask(rollouts, everybody)
        self._heard = (rollouts, completion_logprobs(said, rollouts, self._beliefs.names))

    def observe(self, feedback: RoutingFeedback) -> None:
        """Learns from the verified rewards of one step."""
        if self._heard is not None and self._heard[0] is feedback.rollouts:
            prompts = [rollout.prompt for rollout in feedback.rollouts.rollouts]
            found, counts = verdicts(
                self._heard[1],
                torch.tensor(feedback.rewards, dtype=torch.float64),
                self._contexts(prompts),
                [prompt.prompt_id for prompt in prompts],
                sharpness=self.sharpness,
            )
            self._beliefs.forget(self.memory)
            self._beliefs.learn(self._contexts(prompts), found, counts)
        self._heard = None
        self._steps += 1

    def _contexts(self, prompts: Sequence[Prompt]) -> Float[Tensor, "row size"]:
        if not prompts:
            return torch.zeros(0, self.size, dtype=torch.float64)
        if self.features == DOMAIN:
            vectors = torch.stack([_random_vector(domain_of(prompt), self.size) for prompt in prompts])
        else:
            if self._embedder is None:
                self._embedder = embedder_named(self.features, cache=self.cache)
            given = self._embedder([words_of(prompt) for prompt in prompts]).double()
            generator = torch.Generator().manual_seed(self.seed)
            vectors = given @ torch.randn(given.shape[1], self.size, dtype=torch.float64, generator=generator)
        return torch.nn.functional.normalize(vectors, dim=1)

    def state_dict(self) -> dict[str, Any]:
        """The beliefs, and how many steps they have seen."""
        return {"steps": self._steps, "beliefs": self._beliefs.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self._steps = int(state["steps"])
        self._beliefs.load_state_dict(state["beliefs"])


def _random_vector(name: str, size: int) -> Float[Tensor, " size"]:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % 2**63
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
