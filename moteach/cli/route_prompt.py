"""`moteach route explain "text" run=DIR`: a run's student answers a new prompt; who would have taught which token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from moteach.cli.app import quiet_libraries
from moteach.errors import ConfigError, MissingFileError
from moteach.objectives.gating import trace_of
from moteach.tracking.token_rows import token_rows
from moteach.types import Prompt


def fresh_rows(run: Path, text: str) -> list[Mapping[str, Any]]:
    """Lets the student of a run's last checkpoint answer a prompt, greedily, and asks router, teachers and gate about it.

    Nothing is trained and nothing is written into the run. A prompt of the run's held-out set keeps its label.

    Args:
        run: Folder of the run.
        text: The prompt, as a user writes it.

    Returns:
        A row a token of the completion, as `gate.trace` writes them; the step is the checkpoint's.

    Raises:
        MissingFileError: There is no run, or no checkpoint in it.
        ConfigError: The run's config cannot be read by this version, or none of its teachers may speak about the prompt.
        RoutingError: The run goes by labels, and the prompt is not of its held-out set.
    """
    from moteach.config.assemble import assemble, decoder

    quiet_libraries()
    job = assemble(_config(run))
    trainer = job.trainer
    steps = trainer.checkpoints.steps()
    if not steps:
        raise MissingFileError(
            f"run: expected a checkpoint in {run}/checkpoints, got none; nobody could answer the prompt"
        )
    trainer.resume(steps[-1])
    trainer.student.eval()
    trainer.engine.sync(trainer.student.model, version=steps[-1])
    with torch.no_grad():
        rollouts = trainer.engine.generate([_prompt(text, job)], step=steps[-1], temperature=0.0)
        routing, evidence = trainer.ask(rollouts)
        if not evidence.teachers:
            raise ConfigError(f"run: no teacher of {run} may speak about this prompt; its router abstains")
        scored = trainer.with_references(trainer.unmixed(rollouts, routing, evidence))
        stats = trainer.learner.loss(scored, weigh=False).token_stats
    trace = trace_of(stats, routing)
    assert trace is not None, "the gate is traced"
    return list(token_rows(steps[-1], rollouts, routing.teacher_ids, trace, decoder(job.tokenizer)))


def _config(run: Path) -> DictConfig:
    from moteach.config.schema import TrainConfig
    from moteach.config.validate import validate

    path = run / "config.yaml"
    if not path.is_file():
        raise MissingFileError(f"run: expected the folder of a run with its config.yaml, got {run}")
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
    except Exception as error:  # whatever OmegaConf raises about a key or a type
        raise ConfigError(f"run: {path} is not a config of this version of moteach: {error}") from error
    assert isinstance(cfg, DictConfig)
    cfg.run_dir = str(run)
    cfg.tracker = {}
    OmegaConf.update(cfg, "gate.trace", True, force_add=True)
    validate(cfg)
    return cfg


def _prompt(text: str, job: Any) -> Prompt:
    from moteach.data.encoding import encode_chat, encode_text, has_chat_template

    for known in job.prompts.evaluation:
        if known.text == text:
            return cast(Prompt, known)
    if has_chat_template(job.tokenizer):
        encoded, ids = encode_chat([{"role": "user", "content": text}], job.tokenizer)
    else:
        encoded, ids = encode_text(text, job.tokenizer)
    return Prompt(prompt_id="explained", text=encoded, token_ids=ids)
