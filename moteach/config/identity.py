"""What must not change between a run and its resumption."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moteach.catalogue.packaged import resolve_location
from moteach.catalogue.spec import ExpertSpec
from moteach.config.schema import IGNORED_ON_RESUME
from moteach.data.base import PromptSet, fingerprint
from moteach.tracking.base import redact


def identity_of(cfg: DictConfig, experts: Sequence[ExpertSpec], prompts: PromptSet) -> dict[str, Any]:
    """What must not change between a run and its resumption: config keys, weights of every model, the prompts."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    kept = {str(key): value for key, value in plain.items() if key not in IGNORED_ON_RESUME}
    identity = dict(_flat(redact(kept)))
    for place in ("rollout.url", "rollout.folder", "rollout.nccl_address", "rollout.nccl_port"):
        identity.pop(place, None)
    for expert in experts:
        # a server may move; what it serves may not change
        identity.pop(f"experts.{expert.name}.url", None)
        served = expert.url is not None and expert.model is None
        if expert.student is not None:
            digest = "of the student"
        else:
            digest = "behind a server" if served else weights_digest(expert.weights, expert.revision)
        identity[f"experts.{expert.name} (weights)"] = digest
    identity["student.model (weights)"] = weights_digest(cfg.student.model, cfg.student.revision)
    if cfg.teachers.hidden_dtype is not None:
        identity["teachers.hidden_dtype"] = cfg.teachers.hidden_dtype
    identity["data (prompts)"] = fingerprint(prompts)
    return identity


def weights_digest(model: str, revision: str | None) -> str:
    """sha256 over the weight files of a folder; the revision for a model that is not on this disk."""
    folder = Path(resolve_location(model))
    if not folder.is_dir():
        return f"{model}@{revision}"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [pair for key, child in value.items() for pair in _flat(child, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), value)]
