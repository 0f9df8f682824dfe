"""`moteach experts list | check`: the catalogue, and the pre-flight of each teacher against the student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from moteach.catalogue.registry import scan_catalogue
from moteach.catalogue.spec import ExpertSpec
from moteach.cli.app import expert_folders, quiet_libraries, run_app
from moteach.errors import ConfigError, MoteachError, nearest

_ACTIONS = ("list", "check")
_COLOURS = {"ok": "green", "warn": "yellow", "error": "red"}


def run(argv: Sequence[str]) -> None:
    """Runs `moteach experts list` or `moteach experts check` with Hydra's overrides.

    Raises:
        ConfigError: The action is neither.
        MoteachError: A card is wrong, or a teacher does not fit the student.
    """
    if not argv or argv[0] not in _ACTIONS:
        given = argv[0] if argv else "nothing"
        raise ConfigError(f"expected an action, got {given}; {nearest(given, _ACTIONS)}")
    if argv[0] == "list":
        show_catalogue(expert_folders(argv[1:]))
    else:
        run_app("experts", argv[1:], check_teachers)


def show_catalogue(folders: Sequence[Path]) -> None:
    """Prints every expert that can be named, and every card that cannot be read.

    Raises:
        MoteachError: The first problem, after everything readable was printed.
    """
    console = Console()
    catalogue = scan_catalogue(folders)
    table = Table(title="experts")
    for column in ("name", "domains", "weights", "description"):
        table.add_column(column, overflow="fold")
    for name, spec in catalogue.experts.items():
        table.add_row(name, ", ".join(spec.domains), _weights(spec), spec.description)
    console.print(table)
    console.print("read from: " + ", ".join(str(folder) for folder in catalogue.folders), style="dim", soft_wrap=True)
    if catalogue.errors:
        raise catalogue.errors[0]


def _weights(spec: ExpertSpec) -> str:
    if spec.student is not None:
        return f"the student ({spec.student})"
    folder = Path(spec.weights)
    if folder.is_absolute() and not folder.exists():
        return f"not built: moteach specialize expert={spec.name}"
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else spec.weights


def check_teachers(cfg: DictConfig) -> None:
    """Runs the pre-flight of every chosen expert and prints one row each.

    Raises:
        MoteachError: The first error found, after the whole table was printed.
    """
    from moteach.catalogue.modeling import load_causal_lm, load_tokenizer
    from moteach.config.build import build
    from moteach.config.validate import check_component
    from moteach.objectives.answers import Answers
    from moteach.teachers.preflight import PreflightLimits, check

    check_component(cfg.data, where="data")
    quiet_libraries()
    console = Console()
    model = load_causal_lm(cfg.student.model, revision=cfg.student.revision, dtype=cfg.student.dtype)
    tokenizer = load_tokenizer(cfg.student.model, revision=cfg.student.revision)
    prompts = build(cfg.data, where="data").load(tokenizer)
    given = {"max_reverse_kl": cfg.max_reverse_kl, "min_overlap": cfg.min_overlap}
    limits = PreflightLimits(**{key: value for key, value in given.items() if value is not None})
    reports, failed = [], []
    for name in cfg.experts:
        spec = OmegaConf.to_object(cfg.experts[name])
        assert isinstance(spec, ExpertSpec)
        if spec.student is not None:
            console.print(f"{name}: the student itself ({spec.student}); there is nothing to compare before a run")
            continue
        own = [prompt for prompt in prompts.evaluation if prompt.domain in spec.domains]
        probe = (own or list(prompts.evaluation))[: cfg.probe_prompts]
        try:
            report = check(
                spec,
                model,
                tokenizer,
                probe,
                limits=limits,
                max_new_tokens=cfg.max_new_tokens,
                seed=cfg.seed,
                allowed_hosts=tuple(cfg.allowed_hosts),
                answers=Answers(tokenizer)(own[: cfg.probe_prompts]),
                student_place=cfg.student.model,
            )
            report.raise_if_failed()
        except MoteachError as error:
            failed.append(error)
            console.print(f"[red]{name}[/red]: {error}", soft_wrap=True)
            continue
        reports.append(report)
    console.print(_table(reports, limits.k))
    for report in reports:
        for finding in report.findings:
            if finding.level != "ok":
                console.print(f"[{_COLOURS[finding.level]}]{report.teacher_id}: {finding.message}[/]", soft_wrap=True)
    if cfg.out:
        _write(Path(cfg.out), reports)
    if failed:
        raise failed[0]


def _table(reports: Sequence[Any], k: int) -> Table:
    table = Table(title="teachers against the student")
    answers = ("answers under teacher", "answers under student")
    for column in ("teacher", "checks", "reverse KL", f"top-{k} overlap", *answers, "probe tokens", "memory"):
        table.add_column(column, justify="left" if column in ("teacher", "checks") else "right")
    table.caption = "reverse KL and mean logprob of the reference answers in nats a token"
    for report in reports:
        colour = _COLOURS[report.level]
        known = report.affinity
        table.add_row(
            report.teacher_id,
            f"[{colour}]{report.level}[/{colour}]",
            "-" if report.reverse_kl is None else f"{report.reverse_kl:.4f}",
            "-" if report.topk_overlap is None else f"{report.topk_overlap:.3f}",
            *(("-", "-") if known is None else (f"{known.teacher:.3f}", f"{known.student:.3f}")),
            str(report.probe_tokens),
            "-" if report.memory_bytes is None else f"{report.memory_bytes / 2**20:.1f} MiB",
        )
    return table


def _write(path: Path, reports: Sequence[Any]) -> None:
    from dataclasses import asdict

    path.write_text(json.dumps({"rows": [asdict(report) for report in reports]}, indent=2) + "\n", encoding="utf-8")
