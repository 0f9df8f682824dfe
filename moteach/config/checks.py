"""Checks that need the objects of a run: what would otherwise fail, or silently go wrong, after the run has begun."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from moteach.catalogue.spec import ExpertSpec
from moteach.data.base import PromptSet, rows_by_domain
from moteach.data.sampling import Sampler
from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.objectives.mix import Mix
from moteach.rollouts.base import RolloutEngine
from moteach.routing.base import ObservingRouter
from moteach.routing.exemplars import check_leak
from moteach.routing.label import LabelRouter
from moteach.routing.learner import Learner
from moteach.students import Student
from moteach.teachers.aligned import AlignedTeacher
from moteach.teachers.hf import HFTeacher
from moteach.teachers.lora import LoRATeacher
from moteach.teachers.pool import TeacherPool
from moteach.teachers.preflight import check
from moteach.teachers.privileged import PrivilegedTeacher
from moteach.teachers.reuse import ReusingTeachers
from moteach.trainer import Trainer
from moteach.types import Prompt, Support


def check_teachers(
    experts: Sequence[ExpertSpec],
    student: Student,
    teachers: TeacherPool | ReusingTeachers,
    *,
    support: Support = "full",
    k: int | None = None,
) -> None:
    """Compares the vocabulary, special tokens and head of every teacher with the student's, without any probe prompt.

    Args:
        experts: The run's experts.
        student: What they are compared with.
        teachers: Their teachers.
        support: What the run will ask them for; teachers behind servers are asked for it once.
        k: Entries a token, for `topk` only.

    Raises:
        IncompatibleTeacherError: A teacher would grade another text than the student wrote.
        MoteachError: A teacher cannot be opened.
    """
    for expert in experts:
        teacher: Any = teachers.get(expert.name)
        if expert.student is not None:
            continue
        teacher = teacher.inner if isinstance(teacher, PrivilegedTeacher) else teacher
        if isinstance(teacher, AlignedTeacher):
            teacher.check(support=support, k=k)
            continue
        if expert.url is not None:
            teacher.check(student.tokenizer, support=support, k=k)
            continue
        loaded = teacher if isinstance(teacher, HFTeacher | LoRATeacher) else None
        check(expert, student.model, student.tokenizer, [], teacher=loaded).raise_if_failed()


def check_contexts(
    experts: Sequence[ExpertSpec], teachers: TeacherPool | ReusingTeachers, drawn: Sequence[Prompt]
) -> None:
    """Writes what teachers with a `context` will read, once.

    Raises:
        DataError: A prompt has no answer that could be shown.
        ConfigError: The tokenizer cannot write the context.
    """
    for expert in experts:
        teacher = teachers.get(expert.name)
        if isinstance(teacher, PrivilegedTeacher):
            teacher.check(drawn, domains=expert.domains)


def check_references(
    needs: Collection[str], experts: Sequence[ExpertSpec], teachers: TeacherPool | ReusingTeachers
) -> None:
    """Asks for the origin of every teacher, where the gate or the resolver compares with it.

    Raises:
        ConfigError: A card does not name it.
    """
    if "references" in needs:
        teachers.references.require([expert.name for expert in experts])


def check_ranks(trainer: Trainer) -> None:
    """Refuses, with several ranks, what would learn another thing on each of them.

    Raises:
        UnsupportedCombinationError: Naming the part.
    """
    if trainer.ranks.size == 1:
        return
    parts = {
        "a router that learns while it routes": isinstance(trainer.router, ObservingRouter),
        "a gate that learns": trainer.lessons is not None,
        f"teacher_gate={trainer.teacher_gate.name}": trainer.teacher_gate.name != "none",
        "a resolver that operates on gradients": trainer.learner.surgery is not None,
    }
    if found := [name for name, here in parts.items() if here]:
        raise UnsupportedCombinationError(
            f"expected one process for {' and '.join(found)}, got {trainer.ranks.size} ranks; each rank would learn from its "
            "own share only and the student's shards would be updated differently. Start one process, or fit the router "
            "before (moteach route fit)"
        )


def drawn_prompts(prompts: PromptSet, shares: Mapping[str, float]) -> list[Prompt]:
    """Lists the training prompts that can be drawn; of a lazy training set, one of each domain.

    Args:
        prompts: The data.
        shares: Weight of each domain; those that are not named, or get nothing, are never drawn.
    """
    rows = {name: own for name, own in rows_by_domain(prompts.train).items() if shares.get(name, 0) > 0}
    lazy = not isinstance(prompts.train, tuple | list)
    return [prompts.train[row] for own in rows.values() for row in (own[:1] if lazy else own)]


def check_labels(router: Any, drawn: Sequence[Prompt]) -> None:
    """Routes one prompt of each label, for a router that goes by labels.

    Raises:
        RoutingError: No expert claims a label, and there is no fallback.
    """
    if isinstance(router, LabelRouter):
        router.route(list({(prompt.domain, prompt.teacher_id): prompt for prompt in drawn}.values()))


def check_exemplars(router: Any, held_out: Sequence[Prompt]) -> None:
    """Compares what a router has learned from with the held-out prompts, for a router that learns.

    Raises:
        DataError: It has learned from a prompt that the run is evaluated on.
    """
    learned = getattr(router, "learned", None)
    if isinstance(learned, Learner):
        check_leak(learned.exemplars.texts, held_out, what="data (held-out prompts)")


def check_lengths(
    engine: RolloutEngine, drawn: Sequence[Prompt], held_out: Sequence[Prompt], *, held_out_limit: int | None
) -> None:
    """Looks for prompts that do not fit into the student's context, for an engine that knows it; a server is asked.

    Raises:
        DataError: A prompt is empty or too long.
        MoteachError: A server does not answer, or cannot be used.
    """
    check = getattr(engine, "check", None)
    if check is not None:
        check(drawn)
        check(held_out, max_new_tokens=held_out_limit)


def check_mix(mix: Mix, drawn: Sequence[Prompt]) -> None:
    """Looks for what the terms beside the teachers' loss are made of.

    Raises:
        ConfigError: No training prompt has a verifier, or none has an answer.
    """
    for name, weight, field in (("outcome", mix.outcome, "verifier"), ("supervised", mix.supervised, "answer")):
        if weight > 0 and not any(getattr(prompt, field) for prompt in drawn):
            raise ConfigError(
                f"mix.{name}={weight}: expected training prompts with a column '{field}', got none; the term would be zero "
                f"throughout. Add the column, or set mix.{name}=0"
            )


def check_first_step(sampler: Sampler) -> None:
    """Draws the prompts of the first step and puts them back.

    Raises:
        DataError: There are too few different prompts for a step.
    """
    state = sampler.state_dict()
    sampler.next(0)
    sampler.load_state_dict(state)


def check_run_dir(run_dir: Path) -> None:
    """Refuses a folder that is neither new nor one of moteach's runs.

    Raises:
        ConfigError: The folder holds other files, or cannot be a folder.
    """
    above = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ConfigError(
            f"run_dir: expected a new folder or one of moteach's runs, got {run_dir}, but {above} is a file"
        )
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / "identity.json").is_file():
        raise ConfigError(
            f"run_dir: expected a new folder or one of moteach's runs, got {run_dir}, which holds other files; they could "
            "be overwritten. Choose another run_dir"
        )
