"""From a validated config to the objects of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from moteach.catalogue.modeling import load_tokenizer
from moteach.catalogue.spec import ExpertSpec, require_built
from moteach.checkpoint import Checkpoints
from moteach.config.build import build
from moteach.config.checks import (
    check_contexts,
    check_exemplars,
    check_first_step,
    check_labels,
    check_lengths,
    check_mix,
    check_ranks,
    check_references,
    check_run_dir,
    check_teachers,
    drawn_prompts,
)
from moteach.config.connect import check_router_needs, connect_engine, connect_router
from moteach.config.identity import identity_of
from moteach.config.parts import (
    build_balance,
    build_conditioning,
    build_failure_policy,
    build_lessons,
    build_mix,
    build_objective,
    build_teacher_gate,
    build_token_weights,
    lora_of,
)
from moteach.config.teachers import hidden_dtype_of, memory_of
from moteach.data.base import DEFAULT_DOMAIN, PromptSet, check_disjoint, domain_of, rows_by_domain
from moteach.distributed import Ranks
from moteach.errors import ConfigError, nearest
from moteach.evaluation.examiner import TeacherExaminer
from moteach.evaluation.runner import grade_rollouts
from moteach.learner import Learner
from moteach.objectives.answers import Answers
from moteach.rollouts.ahead import ahead_of
from moteach.rollouts.base import RolloutEngine
from moteach.settings import TrainerSettings
from moteach.sharding import shard, whole
from moteach.students import Student
from moteach.teachers.failover import Failover
from moteach.teachers.following import bind_student
from moteach.teachers.hf import HFTeacher
from moteach.teachers.pool import TeacherPool, store_of
from moteach.teachers.privileged import contexts
from moteach.tracking.base import Tracker
from moteach.tracking.traces import Traces
from moteach.trainer import Trainer
from moteach.types import Prompt
from moteach.verifiers.base import VERIFIERS, verifier_named

_TINY_PARAMETERS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to start: the trainer and what surrounds it."""

    cfg: DictConfig
    run_dir: Path
    trainer: Trainer
    prompts: PromptSet
    experts: tuple[ExpertSpec, ...]
    tokenizer: Any

    def engine_for(self, model: torch.nn.Module, tokenizer: Any = None) -> RolloutEngine:
        """Makes another engine of the same settings in this process, bound to `model`; `tokenizer` where it is another."""
        return build_engine(self.cfg, model, self.tokenizer if tokenizer is None else tokenizer, here=True)


def assemble(cfg: DictConfig, *, trackers: Sequence[Tracker] = (), ranks: Ranks | None = None) -> Job:
    """Builds every object of a training run and checks that they fit; loads weights, writes nothing.

    Args:
        cfg: A composed and validated config.
        trackers: Trackers beside those of the config (the terminal).
        ranks: The processes that train together; only the first one tracks and writes.

    Raises:
        MoteachError: Something cannot be used, or would go wrong in the middle of the run.
    """
    ranks = Ranks() if ranks is None else ranks
    run_dir = Path(cfg.run_dir)
    check_run_dir(run_dir)
    torch.manual_seed(cfg.seed)
    experts = tuple(_spec(cfg, name) for name in cfg.experts)
    tokenizer = load_tokenizer(cfg.student.model, revision=cfg.student.revision)
    prompts: PromptSet = build(cfg.data, where="data").load(tokenizer, verifiers=VERIFIERS)
    check_disjoint(prompts)
    objective = build_objective(cfg, tokenizer)
    student = Student.from_pretrained(
        cfg.student.model,
        revision=cfg.student.revision,
        dtype=cfg.student.dtype,
        gradient_checkpointing=cfg.student.gradient_checkpointing,
        lora=lora_of(cfg.student.lora),
    )
    _set_threads(cfg.threads, student)
    shard(student, ranks, compute_dtype=cfg.student.compute_dtype)
    trainer = Trainer(
        settings=_settings(cfg),
        learner=Learner(
            student=student,
            objective=objective,
            token_weights=tuple(build_token_weights(cfg, tokenizer).values()),
            balance=build_balance(cfg),
            micro_batch_size=cfg.optim.micro_batch_size,
            ranks=ranks,
        ),
        teachers=_teachers(cfg, experts, student, tokenizer),
        router=_router(cfg, experts),
        sampler=_sampler(cfg, prompts, experts),
        engine=connect_engine(build_engine(cfg, student.model, tokenizer), student, ranks),
        optimizer=torch.optim.AdamW(
            [parameter for parameter in student.parameters() if parameter.requires_grad],
            lr=cfg.optim.lr,
            betas=tuple(cfg.optim.betas),
            eps=cfg.optim.eps,
            weight_decay=cfg.optim.weight_decay,
        ),
        trackers=_trackers(cfg, trackers) if ranks.is_first else [],
        traces=Traces(
            run_dir, decode=decoder(tokenizer), completions=cfg.trace.completions, tokens=bool(cfg.gate.get("trace"))
        ),
        checkpoints=Checkpoints(run_dir / "checkpoints", keep_last=cfg.checkpoint.keep_last, ranks=ranks),
        grade=partial(grade_rollouts, grade=grade_prompt, decode=decoder(tokenizer)),
        mix=build_mix(cfg),
        reference=_reference(cfg, vocab_size=student.vocab_size),
        answers=Answers(tokenizer) if cfg.mix.supervised > 0 else None,
        conditioning=build_conditioning(objective, Answers(tokenizer)),
        lessons=build_lessons(objective, Answers(tokenizer)),
        teacher_gate=build_teacher_gate(cfg),
        failover=Failover(policy=build_failure_policy(cfg), ranks=ranks),
        identity=identity_of(cfg, experts, prompts),
    )
    bind_student(trainer.teachers, student.model, ranks=ranks, gathered=partial(whole, student))
    connect_router(trainer)
    job = Job(cfg=cfg, run_dir=run_dir, trainer=trainer, prompts=prompts, experts=experts, tokenizer=tokenizer)
    _check(job)
    trainer.engine = ahead_of(trainer.engine, trainer.sampler, max_steps=cfg.max_steps, ranks=ranks)
    return job


def _teachers(cfg: DictConfig, experts: Sequence[ExpertSpec], student: Student, tokenizer: Any) -> TeacherPool:
    longest = getattr(student.model.config, "max_position_embeddings", None)
    return TeacherPool.from_experts(
        {expert.name: expert for expert in experts},
        max_tokens_per_forward=cfg.teachers.max_tokens_per_forward,
        vocab_size=student.vocab_size,
        store=store_of(memory_of(cfg.teachers)),
        hidden_dtype=hidden_dtype_of(cfg.teachers),
        served=_served(cfg),
        wraps=build(cfg.alignment, where="alignment").wraps(experts, tokenizer),
        contexts=contexts(experts, tokenizer, longest=longest),
    )


def _trackers(cfg: DictConfig, more: Sequence[Tracker]) -> list[Tracker]:
    return [*(build(cfg.tracker[name], where=f"tracker.{name}") for name in cfg.tracker), *more]


def _set_threads(threads: int | None, student: torch.nn.Module) -> None:
    """Sets the CPU threads of torch; a tiny student gets one, unless the config says otherwise.

    Below some millions of parameters threads wait for each other longer than they compute (the arena's run was 10 % slower
    on two), and on one thread a seed gives the same numbers whatever the number of cores.
    """
    if threads is None and sum(parameter.numel() for parameter in student.parameters()) < _TINY_PARAMETERS:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def _check(job: Job) -> None:
    """Finds, before anything is written, what would end the run later."""
    cfg, trainer, prompts = job.cfg, job.trainer, job.prompts
    taught_domains(cfg, prompts, job.experts)
    shares = OmegaConf.select(cfg, "sampler.mixture") or domain_weights(prompts, job.experts)
    drawn = drawn_prompts(prompts, shares)
    check_labels(trainer.router, drawn)
    check_router_needs(trainer.router, drawn)
    check_exemplars(trainer.router, prompts.evaluation)
    check_mix(trainer.mix, drawn)
    held_out = prompts.evaluation if cfg.eval.enabled else ()
    check_lengths(trainer.engine, drawn, held_out, held_out_limit=cfg.eval.max_new_tokens)
    check_first_step(trainer.sampler)
    check_ranks(trainer)
    check_references(trainer.learner.objective.needs, job.experts, trainer.teachers)
    check_contexts(job.experts, trainer.teachers, drawn)
    check_teachers(job.experts, trainer.student, trainer.teachers, support=cfg.support.name, k=cfg.support.k)
    if trainer.teacher_gate.examines:
        _bind_examiner(job)


def _bind_examiner(job: Job) -> None:
    """Lets the gate ask the teachers for answers of their own."""
    examiner = TeacherExaminer(
        teachers=job.trainer.teachers,
        engine_for=job.engine_for,
        grade=grade_prompt,
        decode=decoder(job.tokenizer),
        train=job.prompts.train,
        seed=job.cfg.seed,
    )
    examiner.check()
    job.trainer.teacher_gate.bind(examiner)


def _served(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of teachers behind servers."""
    http = OmegaConf.to_container(cfg.teachers.http)
    assert isinstance(http, dict)
    return {"allowed_hosts": tuple(cfg.teachers.allowed_hosts), **{str(key): value for key, value in http.items()}}


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Returns the function from token ids to text, special tokens skipped."""
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def grade_prompt(prompt: Prompt, completion: str) -> float:
    """Scores one completion with the verifier that the prompt names."""
    return float(verifier_named(str(prompt.verifier)).score(prompt, completion))


def build_engine(cfg: DictConfig, model: torch.nn.Module, tokenizer: Any, *, here: bool = False) -> RolloutEngine:
    """Makes the rollout engine of the config and binds it to a model.

    Args:
        cfg: The config.
        model: What is sampled from.
        tokenizer: Its tokenizer.
        here: Sample in this process, also where a server writes the rollouts: it holds the student alone.
    """
    made = build(cfg.rollout, where="rollout")
    engine: RolloutEngine = (getattr(made, "local", made) if here else made).bind(model, tokenizer)
    return engine


def _reference(cfg: DictConfig, *, vocab_size: int) -> HFTeacher | None:
    """The frozen model the student is held near to, or that shifts are added to; by default the one it starts from."""
    if not cfg.mix.reference > 0 and "anchor_logprobs" not in build(cfg.conflict, where="conflict").needs:
        return None
    named = cfg.mix.reference_model is not None
    return HFTeacher(
        teacher_id="reference",
        model=cfg.mix.reference_model if named else cfg.student.model,
        revision=cfg.mix.reference_revision if named else cfg.student.revision,
        dtype=cfg.student.dtype,
        max_tokens_per_forward=cfg.teachers.max_tokens_per_forward,
        vocab_size=vocab_size,
    )


def _spec(cfg: DictConfig, name: str) -> ExpertSpec:
    spec = OmegaConf.to_object(cfg.experts[name])
    if not isinstance(spec, ExpertSpec):
        raise ConfigError(f"experts.{name}: expected an expert card, got {spec!r}")
    require_built(spec)
    return spec


def _settings(cfg: DictConfig) -> TrainerSettings:
    optim = cfg.optim
    return TrainerSettings(
        max_steps=cfg.max_steps,
        support=cfg.support.name,
        k=cfg.support.k,
        group_size=cfg.group_size,
        lr=optim.lr,
        warmup_steps=optim.warmup_steps,
        schedule=optim.schedule,
        final_lr_fraction=optim.final_lr_fraction,
        max_grad_norm=optim.max_grad_norm,
        updates_per_step=optim.updates_per_step,
        gradient_cosine_every=cfg.trace.gradient_cosine_every,
        diagnostics_every=cfg.trace.diagnostics_every,
        checkpoint_every=cfg.checkpoint.every_steps,
    )


def _router(cfg: DictConfig, experts: Sequence[ExpertSpec]) -> Any:
    router = build(cfg.router, where="router")
    router.bind(experts)
    return router


def _sampler(cfg: DictConfig, prompts: PromptSet, experts: Sequence[ExpertSpec]) -> Any:
    sampler = build(cfg.sampler, where="sampler")
    sampler.bind(prompts, weights=domain_weights(prompts, experts))
    return sampler


def domain_weights(prompts: PromptSet, experts: Sequence[ExpertSpec]) -> dict[str, float]:
    """Share of each domain in training: what the data proposes, times the largest weight among the experts that claim it.

    A domain that nobody claims gets nothing, except when that would leave nothing at all: prompts without a domain, or
    experts that claim none, are for a router that needs no labels.
    """
    domains = tuple(rows_by_domain(prompts.train))
    weights = {}
    for domain in domains:
        claims = [expert.weight for expert in experts if domain in expert.domains]
        weights[domain] = max(claims, default=1.0 if domain == DEFAULT_DOMAIN else 0.0)
    if not any(weights.values()):
        weights = dict.fromkeys(domains, 1.0)
    return {domain: weight * prompts.shares.get(domain, 1.0) for domain, weight in weights.items()}


def untaught_domains(prompts: PromptSet, experts: Sequence[ExpertSpec]) -> tuple[str, ...]:
    """Domains of the training prompts that get no share, see `domain_weights`."""
    shares = domain_weights(prompts, experts)
    return tuple(domain for domain, share in shares.items() if share == 0)


def taught_domains(cfg: DictConfig, prompts: PromptSet, experts: Sequence[ExpertSpec]) -> tuple[str, ...]:
    """Domains that this run trains on and that have held-out prompts.

    Raises:
        ConfigError: When `eval.extra_domains` names a domain without held-out prompts.
    """
    held_out = dict.fromkeys(domain_of(prompt) for prompt in prompts.evaluation)
    for domain in cfg.eval.extra_domains:
        if domain not in held_out:
            raise ConfigError(f"eval.extra_domains: no held-out prompts of '{domain}'; {nearest(domain, held_out)}")
    weights = domain_weights(prompts, experts)
    return tuple(domain for domain in held_out if weights.get(domain, 0) > 0)
