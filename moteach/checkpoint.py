"""Crash-safe checkpoints: written aside, fsynced, renamed; read only when every file's hash is right.

Tensors are safetensors, everything else is JSON: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moteach.errors import CheckpointError

_MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run, in `folder/step-000100/`.

    Args:
        folder: Where they live.
        keep_last: How many complete ones stay.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, ascending; unfinished folders do not count."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.glob("step-*") if (path / _MANIFEST).is_file())
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def save(self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint so that a crash at any moment leaves the previous one in place.

        Args:
            step: Optimizer steps taken.
            tensors: Flat tensor mappings by file stem, such as `{"student": {...}, "optimizer": {...}}`.
            state: What JSON holds.

        Raises:
            CheckpointError: When the files cannot be written; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{step:06d}"
        temporary = self.folder / f".tmp-{final.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for stem, mapping in tensors.items():
                save_file(
                    {key: value.detach().contiguous().cpu() for key, value in mapping.items()},
                    temporary / f"{stem}.safetensors",
                )
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            files = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
            (temporary / _MANIFEST).write_text(json.dumps({"step": step, "sha256": files}), encoding="utf-8")
            for path in temporary.iterdir():
                _fsync(path)
            _fsync(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.replace(final)
            _fsync(self.folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); the "
                "last good one is in place. Free space or fix the folder, then run the same command again"
            ) from error
        for old in self.steps()[: -self.keep_last]:
            shutil.rmtree(self.folder / f"step-{old:06d}", ignore_errors=True)
        return final

    def load(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Reads a checkpoint back after checking the hash of each of its files.

        Raises:
            CheckpointError: When a file is missing or differs from what was written.
        """
        path = self.folder / f"step-{step:06d}"
        for name, digest in _digests(path / _MANIFEST).items():
            if not (path / name).is_file() or _sha256(path / name) != digest:
                raise CheckpointError(
                    f"{path / name}: missing, or not what was written (sha256 differs); continuing would train from "
                    f"damaged weights. Delete {path} to fall back to an earlier checkpoint"
                )
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return tensors, json.loads((path / "state.json").read_text(encoding="utf-8"))


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Splits an optimizer's state into tensors named `<parameter>.<buffer>` and JSON parameter groups."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, buffers in state["state"].items()
        for name, value in buffers.items()
    }
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Puts back what `flatten_optimizer` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the trained parameters by name, tied ones once."""
    return {name: parameter.data for name, parameter in module.named_parameters() if parameter.requires_grad}


def restore_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `trained_tensors` took.

    Raises:
        CheckpointError: When the names or shapes differ from the module's: it is another architecture.
    """
    own = trained_tensors(module)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise CheckpointError(f"the checkpoint holds other parameters than the student: {', '.join(odd[:4])}")
    for name, value in tensors.items():
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"the checkpoint holds '{name}' of shape {tuple(value.shape)}, the student's is {tuple(own[name].shape)}"
            )
        own[name].copy_(value)


def refuse_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to resume when something that changes the weights differs from what the run began with.

    Raises:
        CheckpointError: Naming each changed key with both values.
    """
    changed = [
        f"{key}: was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise CheckpointError(
            "this run_dir was begun with other settings; continuing would mix two experiments in one result. "
            f"Changed: {'; '.join(changed[:6])}. Set them back, or choose another run_dir"
        )


def _digests(manifest: Path) -> dict[str, str]:
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{manifest}: missing or damaged ({error}); nothing vouches for the files beside it. Delete {manifest.parent} "
            "to fall back to an earlier checkpoint"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
