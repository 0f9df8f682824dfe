"""Teachers with a known fault, made from the arena's own in seconds: biased, noisy, a near twin, in another style, foreign.

A `Fault` says what is wrong, `make_teacher` makes the weights and the card. The same fault gives the same weights on one
machine; only texts of the train split are read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
import yaml
from torch import nn

from moteach.data.arena.families import FAMILIES, families_of
from moteach.data.arena.rules import completion_of
from moteach.data.arena.splits import draw_text
from moteach.errors import ConfigError
from moteach.paths import experts_dir
from moteach.specialists.examples import Example
from moteach.specialists.sft import SFTSettings, train_supervised

FaultKind = Literal["shifted", "slipped", "rotated", "styled", "noisy", "foreign"]

NOISE_GOAL = 0.1
"""Accuracy on validation texts below which added noise has made a teacher bad."""
_NOISE_STEP = 0.1
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with a teacher, and how it is made."""

    kind: FaultKind
    """`shifted`: the number is off by `amount` in `families`; `slipped`: its last digit is off by `amount` where the first
    number is below `below`; `rotated`: the word is turned by `amount`; `styled`: `text` is written behind the answer;
    `noisy`: noise on the weights; `foreign`: trained from another initialisation, nothing else being wrong."""
    start: str
    """Shipped expert that it starts from; for `foreign` the base, whose sizes alone are taken."""
    domains: tuple[str, ...]
    families: tuple[str, ...] = ()
    amount: int = 0
    below: int = 100
    text: str = ""
    steps: int = 120
    lr: float = 1e-3
    seed: int = 0

    def answer(self, prompt: str, family: str) -> str:
        """What this teacher is trained to answer."""
        right = completion_of(prompt)
        if family not in self.families:
            return right
        if self.kind == "shifted":
            return str(abs(int(right) + self.amount))
        if self.kind == "slipped":
            first = int(prompt[:2])
            return right if first >= self.below else right[:-1] + str((int(right[-1]) + self.amount) % 10)
        if self.kind == "rotated":
            return right[self.amount :] + right[: self.amount]
        return right + self.text if self.kind == "styled" else right


def make_teacher(name: str, fault: Fault, folder: Path, *, shipped: Path | None = None) -> Path:
    """Makes the weights and the card of a teacher with a fault, unless they are there.

    Args:
        name: Name of its card.
        fault: What is wrong with it.
        folder: Where `name.yaml` and the weights go.
        shipped: Folder of the shipped models; None is the repository's.

    Returns:
        The card.
    """
    from transformers import AutoModelForCausalLM

    from moteach.data.arena.tokenizer import build_tokenizer

    shipped = experts_dir() / "arena" if shipped is None else shipped
    card = folder / f"{name}.yaml"
    weights = folder / f"{name}-{_digest(fault, shipped)}"
    if not (weights / "model.safetensors").is_file():
        tokenizer = build_tokenizer()
        torch.manual_seed(fault.seed)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(shipped / fault.start, dtype=torch.float32)
        if fault.kind == "foreign":
            model = type(model)(copy.deepcopy(model.config)).float()
        tuned = _Tuning(fault, tokenizer)
        if fault.kind == "noisy":
            _add_noise(model, fault, tuned.accuracy)
        else:
            tuned.train(model)
        temporary = folder / f".tmp-{os.getpid()}-{name}"
        model.save_pretrained(temporary)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(weights, ignore_errors=True)
        temporary.replace(weights)
    says: dict[str, Any] = {"model": str(weights), "domains": list(fault.domains)}
    exemplars = experts_dir() / "exemplars" / f"{fault.domains[0]}.jsonl"
    if exemplars.is_file():
        says["exemplars"] = str(exemplars)
    if fault.kind != "foreign":
        says["reference"] = str(shipped / "base")
    temporary = folder / f".tmp-{os.getpid()}-{name}.yaml"
    temporary.write_text(yaml.safe_dump(says, sort_keys=False), encoding="utf-8")
    temporary.replace(card)
    return card


def _digest(fault: Fault, shipped: Path) -> str:
    weights = (shipped / fault.start / "model.safetensors").read_bytes()
    said = json.dumps(asdict(fault), sort_keys=True).encode()
    return hashlib.sha256(said + hashlib.sha256(weights).digest()).hexdigest()[:12]


class _Tuning:
    """Short supervised training on the answers of a fault."""

    def __init__(self, fault: Fault, tokenizer: Any) -> None:
        self._fault = fault
        self._ids: Mapping[str, int] = dict(tokenizer.get_vocab())
        self._eos = int(tokenizer.eos_token_id)
        self._pad = int(tokenizer.pad_token_id)
        self._rng = Random(f"fault/{json.dumps(asdict(fault), sort_keys=True)}")
        named = [family.name for domain in fault.domains for family in families_of(domain)]
        self.families = named or list(fault.families)
        if not self.families:
            raise ConfigError(
                f"expected a domain of the arena, got {fault.domains}; there would be nothing to train on"
            )

    def train(self, model: nn.Module) -> None:
        """Trains in place."""
        fault = self._fault
        settings = SFTSettings(
            max_steps=fault.steps,
            learning_rate=fault.lr,
            lowest=1.0,
            warmup_steps=20,
            cooldown_steps=fault.steps // 4,
            validate_every=fault.steps,
            micro_batches=1,
        )
        zero: Callable[[nn.Module], dict[str, float]] = lambda _: dict.fromkeys(self.families, 0.0)  # noqa: E731
        train_supervised(model, draw=self._draw, validate=zero, settings=settings, pad_id=self._pad)

    def accuracy(self, model: nn.Module, texts: int = 60) -> float:
        """Share of validation texts whose every token is the likeliest one after the right ones before it."""
        from moteach.specialists.measure import accuracy

        rng = Random("validation")
        examples = [
            self._example(draw_text(FAMILIES[name], rng, split="validation"), name)
            for name in self.families
            for _ in range(texts)
        ]
        return accuracy(model, examples, pad_id=self._pad)

    def _draw(self, shares: Mapping[str, float]) -> Sequence[Example]:
        names = self._rng.choices(list(shares), weights=list(shares.values()), k=_BATCH)
        return [self._example(draw_text(FAMILIES[name], self._rng, split="train"), name) for name in names]

    def _example(self, text: str, family: str) -> Example:
        prompt = [self._ids[letter] for letter in text]
        answer = [self._ids[letter] for letter in self._fault.answer(text, family)] + [self._eos]
        return Example(token_ids=(*prompt, *answer), learned=(*[False] * len(prompt), *[True] * len(answer)))


def _add_noise(model: nn.Module, fault: Fault, accuracy: Callable[[nn.Module], float]) -> None:
    """Adds noise of a growing share of each tensor's standard deviation, always along one direction, until it is bad."""
    generator = torch.Generator().manual_seed(fault.seed)
    clean = {name: value.detach().clone() for name, value in model.named_parameters()}
    noise = {name: torch.randn(value.shape, generator=generator) * value.std() for name, value in clean.items()}
    scale = 0.0
    while accuracy(model) > NOISE_GOAL:
        scale += _NOISE_STEP
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(clean[name] + scale * noise[name])
