"""The whole batch of a step, put together from the ranks' shares: what metrics, balance, samplers and traces look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moteach.distributed import Ranks
from moteach.types import Evidence, LossOutput, Rollout, RolloutBatch, Routing, Support, TeacherEvidence

Stats = Mapping[str, Float[Tensor, " packed"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """The rows of all ranks, in the order in which one process would have them."""

    rollouts: RolloutBatch
    routing: Routing
    evidence: Evidence
    """Who scored which tokens; the scores themselves stay where they are."""
    rewards: list[float]
    stats: dict[str, Float[Tensor, " packed"]]


def gather_whole(
    ranks: Ranks,
    *,
    rollouts: RolloutBatch,
    routing: Routing,
    evidence: Evidence,
    rewards: Sequence[float],
    stats: Stats,
    group_size: int,
) -> Whole:
    """Puts the shares of all ranks together, on every rank; a process on its own gets its own back.

    Args:
        ranks: The processes; each took every `size`-th prompt, with `group_size` completions a prompt.
        rollouts: This rank's rows.
        routing: Of these rows.
        evidence: Of these rows.
        rewards: Of these rows.
        stats: Per-token values, in packed order.
        group_size: Completions a prompt.
    """
    if ranks.size == 1:
        return Whole(rollouts=rollouts, routing=routing, evidence=evidence, rewards=list(rewards), stats=dict(stats))
    asked = {entry.teacher_id: entry.tokens for entry in evidence.teachers}
    support = next((entry.support for entry in evidence.teachers), None)
    mine = (rollouts.rollouts, routing, asked, support, list(rewards), dict(stats))
    parts = ranks.gather(mine)
    rows = _row_order(ranks, [len(part[0]) for part in parts], group_size)
    joined = [rollout for part in parts for rollout in part[0]]
    tokens = _token_order(joined, rows)
    batch = RolloutBatch.from_rollouts([joined[row] for row in rows], pad_id=0)
    counts = [sum(len(rollout.completion_ids) for rollout in part[0]) for part in parts]
    return Whole(
        rollouts=batch,
        routing=join_routings([part[1] for part in parts]).select(rows),
        evidence=_evidence(
            routing.teacher_ids,
            next((part[3] for part in parts if part[3] is not None), None),
            [part[2] for part in parts],
            counts,
            tokens,
        ),
        rewards=[[reward for part in parts for reward in part[4]][row] for row in rows],
        stats={name: values[tokens] for name, values in join_stats([part[5] for part in parts], counts).items()},
    )


def join_routings(routings: Sequence[Routing]) -> Routing:
    """Puts routings of the same teachers one below the other."""
    return replace(
        routings[0],
        prompt_ids=tuple(name for routing in routings for name in routing.prompt_ids),
        weights=torch.cat([routing.weights for routing in routings]),
        confidence=torch.cat([routing.confidence for routing in routings]),
        abstained=torch.cat([routing.abstained for routing in routings]),
    )


def join_stats(parts: Sequence[Stats], counts: Sequence[int]) -> dict[str, Float[Tensor, " packed"]]:
    """Puts per-token values of the ranks one behind the other; a rank that did not measure a statistic has zeros."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: torch.cat([_values(part, name, count) for part, count in zip(parts, counts, strict=True)])
        for name in names
    }


def _values(stats: Stats, name: str, count: int) -> Tensor:
    return stats[name] if name in stats else torch.zeros(count)


def _row_order(ranks: Ranks, counts: Sequence[int], group_size: int) -> list[int]:
    """Where the rows of the whole batch lie when the shares are put one behind the other."""
    starts = [sum(counts[:rank]) for rank in range(ranks.size)]
    groups = [
        [range(start + first, start + first + group_size) for first in range(0, count, group_size)]
        for start, count in zip(starts, counts, strict=True)
    ]
    return [row for group in ranks.joined(groups) for row in group]


def _token_order(rollouts: Sequence[Rollout], rows: Sequence[int]) -> Int[Tensor, " packed"]:
    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
    starts = lengths.cumsum(0) - lengths
    return torch.cat([torch.arange(int(starts[row]), int(starts[row] + lengths[row])) for row in rows])


def _evidence(
    names: Sequence[str],
    support: Support | None,
    asked: Sequence[Mapping[str, Tensor]],
    counts: Sequence[int],
    order: Int[Tensor, " packed"],
) -> Evidence:
    entries = []
    for name in names:
        scored = torch.zeros(sum(counts), dtype=torch.bool)
        for rank, part in enumerate(asked):
            if name in part:
                scored[part[name] + sum(counts[:rank])] = True
        if support is not None and bool(scored.any()):
            tokens = scored[order].nonzero(as_tuple=True)[0]
            entries.append(TeacherEvidence(teacher_id=name, support=support, tokens=tokens))
    return Evidence(teachers=tuple(entries), num_tokens=sum(counts))


def join_outputs(outputs: Sequence[LossOutput], places: Sequence[Tensor]) -> LossOutput:
    """Means of the updates' losses and metrics, and their per-token values in the packed order of the whole batch."""
    stats: dict[str, Tensor] = {}
    for output, kept in zip(outputs, places, strict=True):
        for name, values in output.token_stats.items():
            stats.setdefault(name, values.new_zeros(len(kept)))[kept] = values
    names = dict.fromkeys(name for output in outputs for name in output.metrics)
    found = {name: [output.metrics[name] for output in outputs if name in output.metrics] for name in names}
    return LossOutput(
        loss=torch.stack([output.loss for output in outputs]).mean(),
        denominator=1.0,
        token_stats=stats,
        metrics={name: sum(values) / len(values) for name, values in found.items()},
    )
