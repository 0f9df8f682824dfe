"""The teacher that finds the student's own completion most likely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, RoutingError
from moteach.routing.base import Ask, Router, routing_of
from moteach.routing.learned import ROUTERS
from moteach.routing.policy import Policy, Weighting, decide
from moteach.routing.saved import read_router
from moteach.types import Evidence, Prompt, RolloutBatch, Routing


def completion_logprobs(
    evidence: Evidence, rollouts: RolloutBatch, teacher_ids: Sequence[str], *, per_token: bool = True
) -> Float[Tensor, "batch teacher"]:
    """Sums or averages log q(y_t | x, y_<t) over each completion, for each teacher, in nats and float64.

    NaN where a teacher did not score every token of the row: means over different tokens could not be compared.

    Args:
        evidence: Logprobs of the written tokens.
        rollouts: The batch it is about.
        teacher_ids: The teachers, in the order of the columns.
        per_token: Divide by the number of tokens.
    """
    counts = rollouts.loss_mask.sum(dim=1).cpu()
    rows = rollouts.token_rows.cpu()
    table = torch.full((len(rollouts), len(teacher_ids)), torch.nan, dtype=torch.float64)
    for column, name in enumerate(teacher_ids):
        entry = evidence.of(name)
        if entry is None or entry.sampled_logprobs is None:
            continue
        mine = rows[entry.tokens.cpu()]
        total = torch.zeros(len(rollouts), dtype=torch.float64)
        total.index_add_(0, mine, entry.sampled_logprobs.double().cpu())
        whole = (torch.bincount(mine, minlength=len(rollouts)) == counts) & (counts > 0)
        table[whole, column] = (total / counts if per_token else total)[whole]
    return table


class LikelihoodRouter:
    """Weights w_j = softmax_j(L_j / temperature), L_j the mean (or sum) of log q_j over the completion's tokens.

    **What is known to go wrong.** L_j is highest for the teacher that is *nearest to the student*, not for the one that is
    right: its expectation is -KL(student || teacher_j) - H(student). A student that answers a question badly is best explained
    by a teacher that would answer as badly, which then confirms it. Use it for analysis, or to break ties among teachers that
    another router has found (`candidates_path`); never use it as a label to train a router from.

    Evidence is asked of the candidates only, and the trainer does not ask for it a second time.

    Args:
        candidates_path: Folder of a saved router whose `candidates` heaviest experts are asked; None asks every expert.
        candidates: Experts a row is scored by, with `candidates_path`.
        length_normalise: Mean per token; False takes the sum, the likelihood of the whole completion.
        temperature: Nats a token (or a completion) that count as one unit of the softmax.
        weighting, m, cost_weight: See `Policy`; costs are counted after the division by `temperature`.
    """

    def __init__(
        self,
        *,
        candidates_path: str | None = None,
        candidates: int = 2,
        length_normalise: bool = True,
        temperature: float = 1.0,
        weighting: Weighting = "hard",
        m: int = 2,
        cost_weight: float = 0.0,
    ) -> None:
        if candidates < 1 or not temperature > 0:
            raise ConfigError(
                f"expected router.candidates >= 1 and router.temperature > 0, got {candidates} and {temperature}; nobody would "
                "be asked, or the weights would not be a distribution"
            )
        self.length_normalise = length_normalise
        self.temperature = temperature
        self.policy = Policy(weighting=weighting, m=m, cost_weight=cost_weight)
        self._first = None if candidates_path is None else _saved(candidates_path, candidates)
        self._experts: tuple[ExpertSpec, ...] = ()
        self._ask: Ask | None = None

    @property
    def needs(self) -> frozenset[str]:
        """It asks teachers before it decides."""
        return frozenset({"evidence"})

    def bind(self, experts: Sequence[ExpertSpec]) -> None:
        """Remembers the experts, and binds the router of the candidates."""
        self._experts = tuple(experts)
        if self._first is not None:
            self._first.bind(experts)

    def bind_teachers(self, ask: Ask) -> None:
        """Remembers how teachers are asked."""
        self._ask = ask

    def route(self, prompts: Sequence[Prompt], rollouts: RolloutBatch | None = None) -> Routing:
        """Asks the candidates about each completion; abstains where none of them scored it whole.

        Raises:
            RoutingError: There are no completions, or no teachers to ask.
        """
        if rollouts is None or self._ask is None:
            raise RoutingError(
                "router=likelihood: expected completions and teachers, got prompts alone; there would be nothing to "
                "compare. It works inside `moteach train`; to route prompts, choose router=embedding_prototype"
            )
        if self._first is None:
            importance = torch.tensor([expert.weight for expert in self._experts], dtype=torch.float32)
            asked = routing_of(self._experts, prompts, importance.expand(len(prompts), -1))
        else:
            asked = self._first.route(prompts, rollouts)
        said = self._ask(rollouts, asked)
        names = asked.teacher_ids
        table = completion_logprobs(said, rollouts, names, per_token=self.length_normalise) / self.temperature
        silent = table.isnan() | (asked.weights == 0)
        return decide(self.policy, self._experts, prompts, table.masked_fill(silent, -torch.inf))

    def state_dict(self) -> dict[str, Any]:
        """Nothing is learned; the state of the router of the candidates, where there is one."""
        return {} if self._first is None else self._first.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        if self._first is not None:
            self._first.load_state_dict(state)


def _saved(path: str, count: int) -> Router:
    """Opens a saved router as one that names the `count` heaviest experts."""
    saved = read_router(Path(path))
    if saved.router not in ROUTERS:
        raise ConfigError(
            f"router.candidates_path: expected a router saved by one of {', '.join(ROUTERS)}, got {saved.router}; its scores "
            "could not be read"
        )
    made: Router = ROUTERS[saved.router](**{**saved.arguments, "weighting": "top_m", "m": count, "path": path})
    return made
