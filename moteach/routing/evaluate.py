"""Measures a router on labelled prompts: is a prompt given to an expert that claims it, and does the router know."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moteach.catalogue.spec import ExpertSpec
from moteach.data.base import domain_of, words_of
from moteach.errors import DataError
from moteach.routing.base import Router
from moteach.routing.exemplars import check_leak, claimants, read_rows, text_of
from moteach.routing.learner import Learner
from moteach.routing.quality import (
    accuracy,
    area_under_risk_coverage,
    auroc,
    contingency,
    coverage_at_risk,
    expected_calibration_error,
    macro_f1,
)
from moteach.types import Prompt

RISK = 0.05
"""Risk at which the coverage is reported, unless another is given."""


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What a router says of prompts, before and after it abstains."""

    weights: Float[Tensor, "prompt teacher"]
    preference: Float[Tensor, "prompt teacher"]
    confidence: Float[Tensor, " prompt"]
    unsure: Tensor
    familiar: dict[str, Tensor]


def read_prompts(path: Path) -> list[Prompt]:
    """Reads labelled prompts for `measure`: `prompt`, and `teacher_id` or `domain`; no tokenizer is needed.

    Raises:
        MissingFileError: There is no such file.
        DataError: A row cannot be read.
    """
    prompts = []
    for where, row in read_rows(path):
        labels = {name: row.get(name) for name in ("domain", "teacher_id")}
        for name, value in labels.items():
            if value is not None and not isinstance(value, str):
                raise DataError(f"{where}: expected '{name}' to be a string, got {value!r}")
        given = row.get("metadata")
        metadata: dict[str, Any] = given if isinstance(given, dict) else {}
        prompts.append(
            Prompt(
                prompt_id=str(row.get("id", where)), text=text_of(row, where), token_ids=(), metadata=metadata, **labels
            )
        )
    return prompts


def measure(
    router: Router, prompts: Sequence[Prompt], experts: Sequence[ExpertSpec], *, risk: float = RISK
) -> dict[str, Any]:
    """Compares the routes of labelled prompts with their labels.

    A prompt counts as right when its most probable expert (before any threshold) is one that its label names. Prompts with a
    label that no expert claims are outside; how well they are told apart is `ood_auroc`. Prompts without a label are left out.

    Args:
        router: Bound to `experts`.
        prompts: What to route.
        experts: The experts, in the router's order.
        risk: Share of wrong ones that `coverage_at_risk` allows.

    Returns:
        In JSON types: `accuracy`, `ece` (15 bins of equal width), `aurc`, `macro_f1`, `coverage` (share that is not abstained
        on), `routed_accuracy` (of those), `coverage_at_risk` (largest share with at most `risk` wrong), `regret`
        (against an oracle teacher: 1 - the weight of the experts that the label names, so an abstention costs 1),
        `prompts_per_second`, `abstained_outside`,
        `ood_auroc` by score or None, `contingency` {label: {chosen: prompts}} (a prompt of several experts counts for the
        chosen one if right, else for the first), and `rows`, one a domain.

    Raises:
        DataError: No prompt has a label that an expert claims, or one is among the router's exemplars.
    """
    labelled = [prompt for prompt in prompts if prompt.domain is not None or prompt.teacher_id is not None]
    owners = [claimants(experts, teacher_id=prompt.teacher_id, domain=prompt.domain) for prompt in labelled]
    if not any(owners):
        names = sorted({name for expert in experts for name in (expert.name, *expert.domains)})
        raise DataError(
            f"expected prompts whose 'teacher_id' or 'domain' is one of {', '.join(names)}, got {len(prompts)} without; the "
            "routes could not be compared with anything"
        )
    learned = getattr(router, "learned", None)
    if isinstance(learned, Learner):
        check_leak(learned.exemplars.texts, labelled, what="prompts")
    begin = time.perf_counter()
    said = _ask(router, labelled)
    seconds = time.perf_counter() - begin
    inside = torch.tensor([bool(own) for own in owners])
    right = torch.tensor([[expert.name in own for expert in experts] for own in owners])
    chosen = said.preference.argmax(dim=1)
    decided = said.preference.sum(dim=1) > 0
    correct = right.gather(1, chosen[:, None])[:, 0] & decided
    label = torch.where(correct, chosen, right.long().argmax(dim=1))
    table = contingency(chosen[inside & decided], label[inside & decided], experts=len(experts))
    routed = ~said.unsure & (said.weights.sum(dim=1) > 0)
    outside = ~inside
    names = [expert.name for expert in experts]
    return {
        "accuracy": accuracy(correct[inside]),
        "ece": expected_calibration_error(said.confidence[inside], correct[inside]),
        "aurc": area_under_risk_coverage(said.confidence[inside], correct[inside]),
        "macro_f1": macro_f1(table) if int(table.sum()) else 0.0,
        "coverage": float(routed[inside].double().mean()),
        "routed_accuracy": accuracy(correct[inside & routed]) if bool((inside & routed).any()) else None,
        "coverage_at_risk": coverage_at_risk(said.confidence[inside], correct[inside], risk=risk),
        "regret": float(1 - (said.weights * right).sum(dim=1)[inside].double().mean()),
        "prompts_per_second": len(labelled) / max(seconds, 1e-9),
        "abstained_outside": float((~routed[outside]).double().mean()) if bool(outside.any()) else None,
        "ood_auroc": {name: auroc(score[inside], score[outside]) for name, score in said.familiar.items()}
        if bool(outside.any())
        else None,
        "contingency": {
            name: dict(zip(names, counts, strict=True)) for name, counts in zip(names, table.tolist(), strict=True)
        },
        "rows": _rows(labelled, inside=inside, correct=correct, confidence=said.confidence, routed=routed),
    }


def _ask(router: Router, prompts: Sequence[Prompt]) -> _Answers:
    learned = getattr(router, "learned", None)
    if isinstance(learned, Learner):
        routing, scores, unsure = learned.decide([words_of(prompt) for prompt in prompts])
        return _Answers(
            weights=routing.weights,
            preference=scores.probabilities,
            confidence=scores.confidence.clamp(0, 1),
            unsure=unsure,
            familiar={"confidence": scores.confidence, "similarity": scores.similarity, "energy": scores.energy},
        )
    routing = router.route(prompts)
    return _Answers(
        weights=routing.weights,
        preference=routing.weights,
        confidence=routing.confidence,
        unsure=routing.abstained,
        familiar={"confidence": routing.confidence},
    )


def _rows(
    prompts: Sequence[Prompt], *, inside: Tensor, correct: Tensor, confidence: Tensor, routed: Tensor
) -> list[dict[str, Any]]:
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt.teacher_id or domain_of(prompt), []).append(row)
    return [
        {
            "label": label,
            "prompts": len(rows),
            "accuracy": float(correct[rows].double().mean()) if bool(inside[rows].any()) else None,
            "confidence": float(confidence[rows].double().mean()),
            "coverage": float(routed[rows].double().mean()),
        }
        for label, rows in groups.items()
    ]
