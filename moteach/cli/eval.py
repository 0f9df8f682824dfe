"""`moteach eval`: held-out scores per domain of a run's student or of any checkpoint."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from moteach.cli.app import quiet_libraries, run_app
from moteach.errors import ConfigError, DataError, MissingFileError


def run(argv: Sequence[str]) -> None:
    """Runs `moteach eval` with Hydra's overrides."""
    run_app("eval", argv, partial(task, command=f"moteach eval {shlex.join(argv)}"))


def task(cfg: DictConfig, *, command: str = "moteach eval") -> float:
    """Scores one model; returns the mean accuracy over domains.

    Args:
        cfg: The composed config.
        command: What the user typed, for the report.

    Raises:
        ConfigError: Neither or both of `run` and `model` are given.
        MissingFileError: The run has no student.
        DataError: No held-out prompt can be graded.
    """
    from moteach.catalogue.modeling import load_causal_lm, load_tokenizer
    from moteach.config.assemble import build_engine, decoder, grade_prompt
    from moteach.config.build import build
    from moteach.config.validate import check_component
    from moteach.evaluation.runner import evaluate
    from moteach.evaluation.tasks import chosen_prompts, normalised_score

    if (cfg.run is None) == (cfg.model is None):
        raise ConfigError("expected either run=DIR or model=DIR, got " + ("both" if cfg.run else "neither"))
    if cfg.run:
        _settings_of_run(cfg)
    for group in ("data", "rollout"):
        check_component(cfg[group], where=group)
    quiet_libraries()
    location = str(Path(cfg.run) / "student") if cfg.run else str(cfg.model)
    if cfg.run and not Path(location).is_dir():
        raise MissingFileError(f"run: expected a finished run with a 'student' folder in {cfg.run}, found none")
    model = load_causal_lm(location, revision=cfg.revision, dtype=cfg.dtype)
    tokenizer = load_tokenizer(location, revision=cfg.revision)
    prompts = build(cfg.data, where="data").load(tokenizer)
    domains = [*prompts.domains, *cfg.eval.extra_domains]
    scores = evaluate(
        build_engine(cfg, model, tokenizer, here=True),
        chosen_prompts(prompts.evaluation, domains, limit=cfg.eval.prompts_per_domain),
        grade=grade_prompt,
        decode=decoder(tokenizer),
        max_new_tokens=cfg.eval.max_new_tokens,
    )
    if not scores:
        raise DataError(
            "data: expected held-out prompts with a verifier, got none; set data.evaluation_path or "
            "data.evaluation_fraction, and give every prompt an answer"
        )
    baseline = _baseline(cfg)
    rows: list[dict[str, Any]] = []
    for domain, score in scores.items():
        row = {"domain": domain, "prompts": score.prompts, "accuracy": score.accuracy, "mean_length": score.mean_length}
        row["truncated"] = score.truncated
        if domain in baseline.get("teacher", {}):
            before, teacher = baseline["before"][domain]["accuracy"], baseline["teacher"][domain]["accuracy"]
            row |= {
                "before": before,
                "teacher": teacher,
                "normalised": normalised_score(before, teacher, score.accuracy),
            }
        rows.append(row)
    Console().print(_table(location, rows))
    if cfg.out:
        report = {"rows": rows, "command": command, "machine": platform.platform()}
        Path(cfg.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return sum(score.accuracy for score in scores.values()) / len(scores)


def _settings_of_run(cfg: DictConfig) -> None:
    """Takes data, engine and evaluation settings from the run, except the groups that the command line names."""
    path = Path(cfg.run) / "config.yaml"
    if not path.is_file():
        return
    saved = OmegaConf.load(path)
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    named = {override.lstrip("+~").partition("=")[0].partition(".")[0] for override in given}
    for group in ("data", "rollout", "eval"):
        node = OmegaConf.select(saved, group)
        if group not in named and node is not None:
            OmegaConf.update(cfg, group, node, merge=group == "eval", force_add=True)


def _baseline(cfg: DictConfig) -> dict[str, Any]:
    path = Path(cfg.run) / "baseline.json" if cfg.run else None
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.is_file() else {}


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"held-out accuracy, greedy: {title}")
    for name in ("domain", "prompts", "accuracy", "before", "teacher", "normalised", "mean length", "truncated"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for row in rows:
        shares = [row.get(name) for name in ("accuracy", "before", "teacher", "normalised")]
        table.add_row(
            row["domain"],
            str(row["prompts"]),
            *("" if share is None else f"{share:.3f}" for share in shares),
            f"{row['mean_length']:.1f}",
            f"{row['truncated']:.3f}",
        )
    return table
