"""What `moteach bench conflict` asks resolvers about: teams of teachers, some of them with a known fault.

Each scenario has two variants of the same kind of fault. On `tuning` numbers may be chosen; the table is made of `test`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moteach.bench._faults import Fault, make_teacher

Variant = Literal["tuning", "test"]
VARIANTS: tuple[Variant, ...] = ("tuning", "test")
_TEAM = ("math", "code", "search")


@dataclass(frozen=True, kw_only=True)
class Team:
    """The teachers of one variant of a scenario."""

    experts: tuple[str, ...] = _TEAM
    faults: Mapping[str, Fault] = field(default_factory=dict)
    """What the experts that are not shipped are."""
    left_out: tuple[str, ...] = ()
    """Those that labels of an oracle give nothing to."""

    def overrides(self, folder: Path) -> list[str]:
        """Makes the teachers that are missing in `folder`; returns what `moteach train` needs to be told."""
        if not self.faults:
            return [f"experts=[{','.join(self.experts)}]"]
        folder.mkdir(parents=True, exist_ok=True)
        for name, fault in self.faults.items():
            make_teacher(name, fault, folder)
        return [f"expert_path=[{folder}]", f"experts=[{','.join(self.experts)}]"]

    def oracle(self) -> list[str]:
        """Overrides under which a router by labels chooses as one would who knows the faults."""
        return [f"experts.{name}.weight=0" for name in self.left_out]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One question to a resolver."""

    about: str
    tuning: Team
    test: Team

    def team(self, variant: Variant) -> Team:
        """The teachers of a variant."""
        return self.test if variant == "test" else self.tuning


def _biased(family: str, *, seed: int) -> Fault:
    domain = "math" if family in ("add", "subtract") else "code"
    kind: Literal["shifted", "rotated"] = "shifted" if domain == "math" else "rotated"
    amount = 11 if domain == "math" else 2
    return Fault(kind=kind, start=domain, domains=(domain,), families=(family,), amount=amount, seed=seed)


def _noisy(domain: str, *, seed: int) -> Fault:
    return Fault(kind="noisy", start=domain, domains=(domain,), seed=seed)


def _twin(family: str, *, amount: int, seed: int) -> Fault:
    return Fault(
        kind="slipped", start="math", domains=("math",), families=(family,), amount=amount, below=40, seed=seed
    )


def _styled(text: str, domains: tuple[str, str], families: tuple[str, ...], *, seed: int) -> Fault:
    return Fault(
        kind="styled", start=domains[0], domains=domains, families=families, text=text, steps=250, lr=1.5e-3, seed=seed
    )


def _foreign(*, seed: int) -> Fault:
    return Fault(kind="foreign", start="base", domains=("code",), steps=700, lr=3e-3, seed=seed)


def _beside(name: str, fault: Fault) -> Team:
    return Team(experts=(*_TEAM, name), faults={name: fault}, left_out=(name,))


def _instead(name: str, fault: Fault) -> Team:
    return Team(experts=tuple(name if fault.domains[0] == own else own for own in _TEAM), faults={name: fault})


_PLAIN = ("add", "subtract", "reverse", "sort", "rotate")

SCENARIOS: Mapping[str, Scenario] = {
    "clean": Scenario(about="three good teachers of three domains", tuning=Team(), test=Team()),
    "biased": Scenario(
        about="a teacher that is surely wrong on part of its domain, beside a good one",
        tuning=_beside("reverse_biased", _biased("reverse", seed=1)),
        test=_beside("add_biased", _biased("add", seed=2)),
    ),
    "biased_alone": Scenario(
        about="the same teacher, the only one of its domain",
        tuning=_instead("reverse_biased", _biased("reverse", seed=1)),
        test=_instead("add_biased", _biased("add", seed=2)),
    ),
    "noisy": Scenario(
        about="a teacher with noise on its weights, beside a good one",
        tuning=_beside("code_noisy", _noisy("code", seed=1)),
        test=_beside("search_noisy", _noisy("search", seed=2)),
    ),
    "twins": Scenario(
        about="two teachers that differ in a few tokens, in which one of them is wrong",
        tuning=_beside("subtract_twin", _twin("subtract", amount=1, seed=1)),
        test=_beside("add_twin", _twin("add", amount=3, seed=2)),
    ),
    "styles": Scenario(
        about="a teacher of two domains that others teach too, in a style that the verifier refuses",
        tuning=_beside("bracketed", _styled(")", ("math", "code"), ("subtract", "reverse", "rotate"), seed=1)),
        test=_beside("dotted", _styled(".", ("math", "code"), _PLAIN, seed=2)),
    ),
    "foreign": Scenario(
        about="a good teacher that was trained from another initialisation",
        tuning=_instead("code_foreign_tuning", _foreign(seed=1)),
        test=_instead("code_foreign", _foreign(seed=2)),
    ),
}
"""The scenarios by name, in the order of the table."""
