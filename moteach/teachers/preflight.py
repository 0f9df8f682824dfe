"""Pre-flight of a teacher against the student: what would silently go wrong, found before the first step.

A teacher grades the token ids the student wrote. When its vocabulary differs in one id, its scores are about another
text; when its template differs, it grades a format it never saw; when it is of another origin, its scores can be
right and still teach nothing. The first is an error, the others are warnings with numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from moteach.catalogue.modeling import body_and_head, load_tokenizer, weights_bytes
from moteach.catalogue.places import is_commit, is_hub_id, same_place
from moteach.catalogue.spec import ExpertSpec, require_built
from moteach.catalogue.urls import LOOPBACK
from moteach.errors import ConfigError, DeadTeacherError, IncompatibleTeacherError
from moteach.teachers.hf import HFTeacher
from moteach.teachers.lora import LoRATeacher
from moteach.teachers.pool import build_teachers
from moteach.teachers.probe import UNIFORM, Affinity, Probe, affinity, compare
from moteach.types import Prompt, RolloutBatch, Support

Level = Literal["ok", "warn", "error"]
_SPECIAL = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")
_SUPPORTS: tuple[Support, ...] = ("full", "topk", "sampled")
_ENDINGS = "; endings would be misjudged. It needs alignment=bytes (with support=sampled), or leave it out"
_SAME_ORIGIN, _FOREIGN = 0.04, 0.19


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check and how it ended."""

    level: Level
    name: str
    message: str


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What the pre-flight of one teacher found."""

    teacher_id: str
    findings: tuple[Finding, ...]
    reverse_kl: float | None = None
    """Mean over probe tokens of KL(student || teacher), in nats."""
    topk_overlap: float | None = None
    """Mean over probe tokens of |top-k of the student and of the teacher| / k."""
    probe_tokens: int = 0
    affinity: Affinity | None = None
    """How likely teacher and student find the reference answers; None without answers."""
    memory_bytes: int | None = None
    """Bytes of the weights once loaded; None when they are not on this machine."""
    chat_template_hash: str | None = field(default=None)

    @property
    def level(self) -> Level:
        """The worst level among the findings."""
        levels = {finding.level for finding in self.findings}
        return "error" if "error" in levels else "warn" if "warn" in levels else "ok"

    def raise_if_failed(self) -> None:
        """Raises the first error that was found.

        Raises:
            DeadTeacherError: The scores are not finite, or uniform.
            IncompatibleTeacherError: Anything else at level `error`.
        """
        for finding in self.findings:
            if finding.level == "error":
                kind = DeadTeacherError if finding.name == "scores" else IncompatibleTeacherError
                raise kind(finding.message)


@dataclass(frozen=True, kw_only=True)
class PreflightLimits:
    """Where numbers become warnings. None of them is a published threshold; set them from your own pairs.

    MOPD (arXiv 2606.30406) reports an initial reverse KL of about 0.04 for a teacher of the student's origin and
    about 0.19 for a stronger one of foreign origin, with which distillation got worse; the default lies between. The
    literature on top-k overlap (72 to 91 % in runs that succeed) names no threshold at all. Neither makes a teacher foreign
    that was trained from the student's own checkpoint.
    """

    max_reverse_kl: float = 0.1
    """Nats a token above which the teacher is called foreign."""
    min_overlap: float = 0.5
    """Share of common entries among the k largest below which the teacher is called foreign."""
    k: int = 16

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 <= self.min_overlap <= 1 or self.max_reverse_kl < 0:
            raise ConfigError(f"expected k >= 1, min_overlap in [0, 1] and max_reverse_kl >= 0, got {self}")


def check(
    spec: ExpertSpec,
    student_model: Any,
    student_tokenizer: Any,
    probe_prompts: Sequence[Prompt],
    *,
    limits: PreflightLimits | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    teacher: HFTeacher | LoRATeacher | None = None,
    allowed_hosts: Sequence[str] = LOOPBACK,
    answers: RolloutBatch | None = None,
    student_place: str | None = None,
) -> PreflightReport:
    """Checks a teacher against the student.

    The probe is on-policy: for each prompt the student samples one continuation at temperature 1 (seeded, torch's
    global generator is left as it was), and both models are compared on the tokens of the continuation, since that is
    where the teacher will be asked. Reverse KL is over the full vocabulary, exact at each position.

    Args:
        spec: The expert.
        student_model: The student's causal language model.
        student_tokenizer: The student's tokenizer.
        probe_prompts: A few prompts, best of the expert's own domains; without any, the models are not compared.
        limits: Where numbers become warnings.
        max_new_tokens: Longest continuation.
        seed: Seed of the sampled continuations.
        teacher: The expert's teacher, so that its weights load once; None builds one.
        allowed_hosts: Hosts that a card with `url:` may name; of such an expert server and vocabulary are checked alone.
        answers: Reference answers of prompts of the expert's own domains, each written as a completion.
        student_place: Folder or hub id the student was opened from: an expert whose card says that it was trained from
            there (`reference`, or `base` under an adapter) is not foreign, however far it has moved.

    Raises:
        MoteachError: The teacher cannot be opened at all.
    """
    limits = limits or PreflightLimits()
    require_built(spec)
    if spec.url is not None:
        return _check_served(spec, student_tokenizer, allowed_hosts, limits.k)
    place = spec.base or spec.weights
    tokenizer = load_tokenizer(place, revision=spec.revision)
    template = _template_hash(tokenizer)
    findings = [_origin(spec, place), *_vocabulary(spec.name, tokenizer, student_tokenizer)]
    findings.append(_template(spec.name, template, _template_hash(student_tokenizer)))
    memory = _memory(spec, place)
    findings.append(_memory_finding(spec.name, memory))
    reverse_kl = overlap = known = None
    tokens = 0
    model = _open(teacher or build_teachers([spec])[0], findings)
    if model is not None:
        findings.append(_head_size(spec.name, model, student_model, student_tokenizer))
    if any(finding.level == "error" for finding in findings):
        findings.append(
            Finding(level="warn", name="comparison", message="not compared with the student: see the errors")
        )
    elif probe_prompts:
        probe = compare(model, student_model, probe_prompts, k=limits.k, max_new_tokens=max_new_tokens, seed=seed)
        findings.append(_alive(spec.name, probe))
        tokens = probe.tokens
        if findings[-1].level == "ok":
            reverse_kl, overlap = probe.reverse_kl, probe.overlap
            origin = spec.reference or spec.base
            same = origin is not None and student_place is not None and same_place(origin, student_place)
            findings += _origin_distance(spec.name, probe, limits, same_origin=same)
            known = None if answers is None else affinity(model, student_model, answers)
    return PreflightReport(
        teacher_id=spec.name,
        findings=tuple(findings),
        reverse_kl=reverse_kl,
        topk_overlap=overlap,
        probe_tokens=tokens,
        affinity=known,
        memory_bytes=memory,
        chat_template_hash=template,
    )


def _check_served(spec: ExpertSpec, tokenizer: Any, allowed_hosts: Sequence[str], k: int) -> PreflightReport:
    """Asks the server what it offers and for its vocabulary; what cannot be asked over HTTP is not compared."""
    served = build_teachers([spec], served={"allowed_hosts": allowed_hosts, "wait": 0.0, "attempts": 2})[0]
    supports = served.supports
    best: Support = next((one for one in _SUPPORTS if one in supports), "sampled")
    served.check(tokenizer, support=best, k=k if best == "topk" else None)
    offers = f"{spec.url} offers support {', '.join(sorted(supports))}"
    if served.capabilities.exact_ids:
        offers += ", and logprobs of chosen ids"
    return PreflightReport(
        teacher_id=spec.name,
        findings=(
            Finding(level="ok", name="server", message=offers),
            Finding(level="ok", name="vocabulary", message=f"{len(tokenizer)} tokens, the same text"),
            Finding(level="warn", name="comparison", message="not compared with the student: it answers from a server"),
        ),
    )


def _open(teacher: HFTeacher | LoRATeacher, findings: list[Finding]) -> Any:
    """Loads the teacher; one that is broken becomes a finding, so that the other checks are still reported."""
    try:
        return teacher.model
    except DeadTeacherError as error:
        findings.append(Finding(level="error", name="scores", message=str(error)))
    except IncompatibleTeacherError as error:
        findings.append(Finding(level="error", name="head", message=str(error)))
    return None


def _origin(spec: ExpertSpec, place: str) -> Finding:
    if is_hub_id(place) and not is_commit(spec.revision):
        return Finding(
            level="warn",
            name="revision",
            message=f"expected 'revision' of '{spec.name}' to be a commit of 40 hexadecimal digits, got "
            f"{spec.revision}; a branch "
            "can move, and the run could not be repeated",
        )
    return Finding(level="ok", name="revision", message="the weights cannot move under the run")


def _vocabulary(name: str, theirs: Any, mine: Any) -> list[Finding]:
    one, other = mine.get_vocab(), theirs.get_vocab()
    differing = [token for token in one.keys() | other.keys() if one.get(token) != other.get(token)]
    findings = []
    if differing:
        token = min(differing, key=lambda token: (one.get(token, math.inf), other.get(token, math.inf), token))
        findings.append(
            Finding(
                level="error",
                name="vocabulary",
                message=f"expected the teacher '{name}' to have the student's vocabulary, got {len(differing)} "
                "tokens that "
                f"differ, first {token!r} (student {one.get(token)}, teacher {other.get(token)}); it would grade "
                "another text. It needs alignment=bytes (with support=sampled), or leave it out",
            )
        )
    else:
        findings.append(Finding(level="ok", name="vocabulary", message=f"{len(one)} tokens, the same ids"))
    wrong = [
        f"{key} (student {getattr(mine, key, None)}, teacher {getattr(theirs, key, None)})"
        for key in _SPECIAL
        if getattr(mine, key, None) != getattr(theirs, key, None)
    ]
    if wrong:
        message = (
            f"expected the teacher '{name}' to have the student's special tokens, got other ids for {', '.join(wrong)}"
        )
        findings.append(Finding(level="error", name="special_tokens", message=message + _ENDINGS))
    else:
        findings.append(Finding(level="ok", name="special_tokens", message="the same ids"))
    return findings


def _template_hash(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return None
    text = template if isinstance(template, str) else repr(sorted(template.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _template(name: str, theirs: str | None, mine: str | None) -> Finding:
    if theirs == mine:
        return Finding(level="ok", name="chat_template", message=f"the same ({mine or 'none'})")
    return Finding(
        level="warn",
        name="chat_template",
        message=f"expected the teacher '{name}' to have the student's chat template ({mine or 'none'}), got "
        f"{theirs or 'none'}; it grades prompts in the student's format, which it may never have seen",
    )


def _memory(spec: ExpertSpec, place: str) -> int | None:
    parts = [weights_bytes(part, dtype=spec.dtype) for part in (place, spec.adapter) if part]
    return None if None in parts else sum(part for part in parts if part is not None)


def _memory_finding(name: str, memory: int | None) -> Finding:
    if memory is None:
        return Finding(level="warn", name="memory", message=f"'{name}' is on the hub: its size is not known yet")
    return Finding(level="ok", name="memory", message=f"{memory / 2**20:.1f} MiB of weights")


def _head_size(name: str, teacher: nn.Module, student: Any, tokenizer: Any) -> Finding:
    theirs, mine = (int(body_and_head(model)[1].weight.shape[0]) for model in (teacher, student))
    if theirs == mine:
        return Finding(level="ok", name="head", message=f"{mine} rows, as the student's")
    if theirs > mine >= len(tokenizer):
        return Finding(
            level="warn",
            name="head",
            message=f"the head of '{name}' has {theirs} rows, the student's {mine}, the vocabulary {len(tokenizer)}: "
            "the "
            f"{theirs - mine} rows of padding are left out",
        )
    return Finding(
        level="error",
        name="head",
        message=f"expected a head of at least {mine} rows (the student's) from the teacher '{name}', got {theirs}; "
        "trim the "
        f"student with resize_token_embeddings({len(tokenizer)}) if those rows are padding",
    )


def _alive(name: str, probe: Probe) -> Finding:
    if not probe.finite:
        problem = "got NaN or infinity"
    elif probe.uniform:
        problem = f"got the uniform distribution (within {UNIFORM:.0%} of -ln V) on all {probe.tokens} tokens"
    else:
        return Finding(level="ok", name="scores", message=f"finite and not uniform on {probe.tokens} tokens")
    message = f"expected opinions from the teacher '{name}', {problem}; the student would forget. Check its weights"
    return Finding(level="error", name="scores", message=message)


def _origin_distance(name: str, probe: Probe, limits: PreflightLimits, *, same_origin: bool) -> list[Finding]:
    far = probe.reverse_kl > limits.max_reverse_kl
    distance = f"KL(student || teacher) is {probe.reverse_kl:.3f} nats a token"
    reference = f"MOPD saw about {_SAME_ORIGIN} for a teacher of the same origin and {_FOREIGN} for a foreign one"
    few = probe.overlap < limits.min_overlap
    share = f"{probe.overlap:.0%} of the {limits.k} likeliest tokens are common"
    if same_origin:
        known = f"'{name}' was trained from the student's checkpoint"
        return [
            Finding(level="ok", name="reverse_kl", message=f"{distance}; {known}"),
            Finding(level="ok", name="topk_overlap", message=f"{share}; {known}"),
        ]
    advice = f"'{name}' may be of foreign origin: prefer one trained from the student's own base, or support=sampled"
    return [
        Finding(
            level="warn" if far else "ok",
            name="reverse_kl",
            message=f"{distance} ({reference}); {advice}" if far else f"{distance} ({reference})",
        ),
        Finding(
            level="warn" if few else "ok",
            name="topk_overlap",
            message=f"{share}, below the chosen {limits.min_overlap:.0%} (no published threshold); {advice}"
            if few
            else share,
        ),
    ]
