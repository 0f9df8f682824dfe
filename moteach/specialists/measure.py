"""How often a model is right on arena texts, by teacher forcing.

A greedy answer is right as a whole exactly when every token of the reference is the most probable one after the reference
tokens before it; so one forward pass measures greedy accuracy. Restricted to the steps of one kind it says how good a model
is at that step when the steps before it are right.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moteach.data.arena.families import COMPOSITE, FAMILIES, families_of
from moteach.data.arena.source import DOMAINS
from moteach.data.arena.splits import Split, draw_distinct
from moteach.specialists.examples import Example, ExampleMaker, collate


@torch.no_grad()
def accuracy(model: nn.Module, examples: Sequence[Example], *, pad_id: int, batch_size: int = 256) -> float:
    """Returns the share of examples all of whose learned tokens are the model's first choice.

    Args:
        model: Causal language model of transformers.
        examples: What to measure on.
        pad_id: Padding token.
        batch_size: Rows per forward pass.
    """
    training = model.training
    model.eval()
    right = 0
    for start in range(0, len(examples), batch_size):
        token_ids, learned = collate(examples[start : start + batch_size], pad_id=pad_id)
        choices = model(input_ids=token_ids, use_cache=False).logits[:, :-1].argmax(dim=-1)
        right += int(((choices == token_ids[:, 1:]) | ~learned[:, 1:]).all(dim=1).sum())
    model.train(training)
    return right / len(examples)


def family_examples(
    maker: ExampleMaker, family: str, *, count: int, split: Split, kinds: Collection[str] | None = None
) -> list[Example]:
    """Builds examples of `count` different texts of a family, the same ones every time.

    Args:
        maker: Builds the examples.
        family: Name of the family.
        count: How many texts.
        split: Which split they come from.
        kinds: Step kinds that count, given the reference before them; None counts whole answers.
    """
    texts = draw_distinct(FAMILIES[family], count, split=split, seed="evaluation")
    return [maker(text, kinds=kinds) for text in texts]


def measure(model: nn.Module, maker: ExampleMaker, *, pad_id: int, count: int = 500) -> Mapping[str, Any]:
    """Measures a model on the held-out texts: per domain, per family, and per step kind inside composite answers.

    Args:
        model: Causal language model.
        maker: Builds the examples.
        pad_id: Padding token.
        count: Texts per family.

    Returns:
        `{"domains": {...}, "families": {...}, "steps": {family: {kind: accuracy}}}`; a domain is the mean of its families.
    """
    examples = partial(family_examples, maker, count=count, split="evaluation")
    families = {name: accuracy(model, examples(name), pad_id=pad_id) for name in FAMILIES}
    steps = {
        family.name: {
            kind: accuracy(model, examples(family.name, kinds=[kind]), pad_id=pad_id) for kind in family.kinds
        }
        for family in families_of(COMPOSITE)
    }
    domains = {
        domain: sum(families[family.name] for family in families_of(domain)) / len(families_of(domain))
        for domain in (*DOMAINS, COMPOSITE)
    }
    return {"domains": domains, "families": families, "steps": steps}
