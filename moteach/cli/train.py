"""`moteach train`: the main job, from a composed config to a run folder and a closing table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from moteach.cli.app import quiet_libraries, run_app
from moteach.cli.table import closing_table


def run(argv: Sequence[str]) -> None:
    """Runs `moteach train` with Hydra's overrides."""
    run_app("train", argv, task)


def task(cfg: DictConfig) -> float | None:
    """Trains once; returns the mean normalised score, which sweepers maximise."""
    from moteach.config.validate import validate
    from moteach.distributed import Ranks

    ranks = Ranks.from_environment()
    console = Console(quiet=not ranks.is_first)
    validate(cfg)
    # the name holds the time, which differs between processes
    cfg.run_dir = ranks.first(str(cfg.run_dir))
    run_dir = Path(cfg.run_dir)
    if (run_dir / "summary.json").is_file():
        console.print(f"{run_dir} is finished; choose another run_dir to train again")
        return _report(console, json.loads((run_dir / "summary.json").read_text(encoding="utf-8")))
    quiet_libraries()
    from moteach.config.assemble import assemble
    from moteach.tracking.terminal import TerminalTracker

    terminal = TerminalTracker(console=console, max_steps=cfg.max_steps)
    job = assemble(cfg, trackers=[terminal], ranks=ranks)
    try:
        summary = _train(job, console)
    finally:
        terminal.stop()
    ranks.wait()
    return _report(console, summary)


def _train(job: Any, console: Console) -> dict[str, Any]:
    from moteach.config.assemble import untaught_domains
    from moteach.evaluation.tasks import summarise

    start = _open_run(job)
    measure = Measurement(job, console)
    if untaught := untaught_domains(job.prompts, job.experts):
        console.print(f"not trained on, since no expert of this run claims them: {', '.join(untaught)}")
    before, teacher = measure.baseline()
    if start == 0:
        measure.divergence("before")
    trainer = job.trainer
    first = trainer.ranks.is_first
    if first:
        trainer.traces.start(start)
    config = _plain(job.cfg)
    for tracker in trainer.trackers:
        tracker.start(run_dir=job.run_dir, config=config, step=start)
    trainer.train(start)
    summary: dict[str, Any] = {}
    if job.cfg.eval.enabled:
        summary = summarise(before, teacher, measure.student("student after"))
        if job.cfg.eval.divergence:
            summary["held_out_divergence"] = {
                "before": measure.divergence("before"),
                "after": measure.divergence("after"),
            }
    _save_student(job)
    for tracker in trainer.trackers:
        tracker.finish(summary)
    if first:
        trainer.traces.finish()
        _write_json(job.run_dir / "summary.json", summary)
    return summary


def _open_run(job: Any) -> int:
    """Makes the run folder, or checks that the run in it is the same, and returns the step to start from."""
    from moteach.checkpoint import refuse_changes

    run_dir: Path = job.run_dir
    identity = run_dir / "identity.json"
    current = json.loads(json.dumps(dict(job.trainer.identity)))
    ranks = job.trainer.ranks
    if ranks.is_first:
        if identity.is_file():
            refuse_changes(json.loads(identity.read_text(encoding="utf-8")), current)
        else:
            run_dir.mkdir(parents=True, exist_ok=True)
            _write_json(identity, current)
        plain = OmegaConf.create(_plain(job.cfg, redacted=True))
        _write_text(run_dir / "config.yaml", OmegaConf.to_yaml(plain, resolve=True))
    steps: list[int] = ranks.first(job.trainer.checkpoints.steps())
    if steps:
        job.trainer.resume(steps[-1])
    return steps[-1] if steps else 0


def _plain(cfg: DictConfig, *, redacted: bool = False) -> dict[str, Any]:
    from moteach.tracking.base import redact

    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    named = {str(key): value for key, value in plain.items()}
    return dict(redact(named)) if redacted else named


class Measurement:
    """Evaluates the student and the teachers of a job; what was measured before training survives a crash."""

    def __init__(self, job: Any, console: Console) -> None:
        from moteach.config.assemble import taught_domains

        self.job = job
        self.console = console
        self.domains = taught_domains(job.cfg, job.prompts, job.experts)

    def prompts_of(self, domains: Sequence[str]) -> list[Any]:
        """Held-out prompts of these domains, at most `eval.prompts_per_domain` each."""
        from moteach.evaluation.tasks import chosen_prompts

        return chosen_prompts(self.job.prompts.evaluation, domains, limit=self.job.cfg.eval.prompts_per_domain)

    def of(self, model: Any, domains: Sequence[str], label: str, *, aligned: Any = None) -> dict[str, Any]:
        """Scores one model on the held-out prompts of some domains; an aligned teacher reads and writes its own tokens."""
        from moteach.config.assemble import decoder, grade_prompt
        from moteach.evaluation.runner import evaluate

        tokenizer = self.job.tokenizer if aligned is None else aligned.tokenizer
        prompts = self.prompts_of(domains)
        with self.console.status(f"evaluating {label}"):
            return evaluate(
                self.job.engine_for(model, tokenizer),
                prompts if aligned is None else [aligned.prompt(prompt) for prompt in prompts],
                grade=grade_prompt,
                decode=decoder(tokenizer),
                max_new_tokens=self.job.cfg.eval.max_new_tokens,
                ranks=self.job.trainer.ranks,
            )

    def student(self, label: str) -> dict[str, Any]:
        """Scores the student as it is now."""
        from moteach.sharding import whole

        student = self.job.trainer.student
        with whole(student):
            return self.of(student.model, [*self.domains, *self.job.cfg.eval.extra_domains], label)

    def baseline(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Scores the student before training and each teacher on the domains it claims; the best teacher counts."""
        from moteach.evaluation.runner import DomainScore
        from moteach.teachers.aligned import AlignedTeacher

        if not self.job.cfg.eval.enabled:
            return {}, {}
        path = self.job.run_dir / "baseline.json"
        if self.job.trainer.ranks.first(path.is_file()):
            saved = json.loads(path.read_text(encoding="utf-8"))
            return (
                {domain: DomainScore(**score) for domain, score in saved["before"].items()},
                {domain: DomainScore(**score) for domain, score in saved["teacher"].items()},
            )
        before = self.student("student before")
        teacher: dict[str, Any] = {}
        for expert in self.job.experts:
            own = [domain for domain in self.domains if domain in expert.domains and expert.weight > 0]
            if not own:
                continue
            asked = self.job.trainer.teachers.get(expert.name)
            model = getattr(asked, "model", None)
            if model is None or expert.url is not None:
                reason = "answers from a server" if expert.url else "is the student or told more"
                self.console.print(f"not measured before training, since it {reason}: {expert.name}")
                continue
            aligned = asked if isinstance(asked, AlignedTeacher) else None
            for domain, score in self.of(model, own, f"teacher {expert.name}", aligned=aligned).items():
                if domain not in teacher or score.accuracy > teacher[domain].accuracy:
                    teacher[domain] = score
        scores = {"before": before, "teacher": teacher}
        if self.job.trainer.ranks.is_first:
            _write_json(
                path, {name: {d: asdict(score) for d, score in table.items()} for name, table in scores.items()}
            )
        return before, teacher

    def divergence(self, when: str) -> dict[str, float] | None:
        """Mean divergence of the student to its routed teachers on its own samples of held-out prompts, in nats a token.

        The value before training is kept in the run folder, for a run that is resumed.
        """
        if not (self.job.cfg.eval.enabled and self.job.cfg.eval.divergence):
            return None
        path = self.job.run_dir / f"divergence_{when}.json"
        if self.job.trainer.ranks.first(path.is_file()):
            return dict(json.loads(path.read_text(encoding="utf-8")))
        found: dict[str, float] = self.job.trainer.held_out_divergence(self.prompts_of(self.domains))
        if self.job.trainer.ranks.is_first:
            _write_json(path, found)
        return found


def _save_student(job: Any) -> None:
    """Writes `run_dir/student` whole or not at all."""
    from moteach.sharding import full_tensors

    temporary, final = job.run_dir / ".tmp-student", job.run_dir / "student"
    student, ranks = job.trainer.student, job.trainer.ranks
    weights = full_tensors(student.model) if ranks.size > 1 else None
    if not ranks.is_first:
        return
    shutil.rmtree(temporary, ignore_errors=True)
    student.save_pretrained(temporary, weights=weights)
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _report(console: Console, summary: dict[str, Any]) -> float | None:
    if summary.get("domains") or summary.get("raw"):
        console.print(closing_table(summary))
    score = summary.get("mean")
    return None if score is None else float(score)
