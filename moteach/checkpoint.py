"""Crash-safe checkpoints: written aside, fsynced, renamed; read only when every file's hash is right.

Tensors are safetensors, everything else is JSON. The parts of a student that is sharded over ranks are written by
torch.distributed.checkpoint, each rank its own, and read back by any number of ranks; its index is the one file that is
unpickled, after its hash has been compared with the manifest, and only from the run's own folder.
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

from moteach.distributed import Ranks, is_sharded, like
from moteach.errors import CheckpointError

_MANIFEST = "manifest.json"
_SHARDS = "shards"
Tensors = Mapping[str, Mapping[str, Tensor]]
"""Flat tensor mappings by file stem."""


class Checkpoints:
    """The checkpoints of one run, in `folder/step-000100/`.

    Args:
        folder: Where they live.
        keep_last: How many complete ones stay.
        ranks: The processes that save and load together.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, ranks: Ranks | None = None) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.ranks = Ranks() if ranks is None else ranks

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, ascending; unfinished folders do not count."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.glob("step-*") if (path / _MANIFEST).is_file())
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def save(self, step: int, *, tensors: Tensors, state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint so that a crash at any moment leaves the previous one in place; every rank must call it.

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
            if self.ranks.is_first:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
            self.ranks.wait()
            plain = _write_shards(temporary / _SHARDS, tensors)
            if self.ranks.is_first:
                _complete(temporary, final, step=step, tensors=plain, state=state)
                for old in self.steps()[: -self.keep_last]:
                    shutil.rmtree(self.folder / f"step-{old:06d}", ignore_errors=True)
            self.ranks.wait()
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); the "
                "last good one is in place. Free space or fix the folder, then run the same command again"
            ) from error
        return final

    def load(self, step: int, *, like: Tensors | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Reads a checkpoint back after checking the hash of each of its files.

        Args:
            step: Optimizer steps taken.
            like: By stem and name, or by stem and the part of the name before its first dot, a tensor that is cut over
                the ranks as what is read will be; needed for a checkpoint that several ranks wrote.

        Raises:
            CheckpointError: When a file is missing or differs from what was written.
        """
        path = self.folder / f"step-{step:06d}"
        if self.ranks.is_first:
            for name, digest in _digests(path / _MANIFEST).items():
                if not (path / name).is_file() or _sha256(path / name) != digest:
                    raise CheckpointError(
                        f"{path / name}: missing, or not what was written (sha256 differs); continuing would train from "
                        f"damaged weights. Delete {path} to fall back to an earlier checkpoint"
                    )
        self.ranks.wait()
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        if (path / _SHARDS).is_dir():
            for stem, mapping in _read_shards(path / _SHARDS, {} if like is None else like).items():
                tensors.setdefault(stem, {}).update(mapping)
        return tensors, json.loads((path / "state.json").read_text(encoding="utf-8"))


def _complete(temporary: Path, final: Path, *, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Adds what one rank writes for all, then makes the checkpoint appear at once."""
    for stem, mapping in tensors.items():
        save_file(
            {key: value.detach().contiguous().cpu() for key, value in mapping.items()},
            temporary / f"{stem}.safetensors",
        )
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    written = sorted(path for path in temporary.rglob("*") if path.is_file())
    files = {path.relative_to(temporary).as_posix(): _sha256(path) for path in written}
    (temporary / _MANIFEST).write_text(json.dumps({"step": step, "sha256": files}), encoding="utf-8")
    for path in [*written, temporary / _MANIFEST, *temporary.glob(_SHARDS), temporary]:
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    _fsync(final.parent)


def _write_shards(folder: Path, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Writes the mappings that hold a sharded tensor, this rank its parts of them; returns the other mappings."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    sharded = {stem for stem, mapping in tensors.items() if any(is_sharded(value) for value in mapping.values())}
    if sharded:
        flat = {f"{stem}/{name}": value for stem in sorted(sharded) for name, value in tensors[stem].items()}
        save(flat, storage_writer=FileSystemWriter(folder))
    return {stem: dict(mapping) for stem, mapping in tensors.items() if stem not in sharded}


def _read_shards(folder: Path, like: Tensors) -> dict[str, dict[str, Tensor]]:
    """Reads what `_write_shards` wrote, cut as `like` is, whatever the number of ranks that wrote it."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    flat: dict[str, Tensor] = {}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        stem, _, name = key.partition("/")
        known = like.get(stem, {})
        model = known.get(name, known.get(name.partition(".")[0]))
        if not isinstance(saved, TensorStorageMetadata) or (model is None and stem in like):
            raise CheckpointError(f"the checkpoint holds other parameters than the student: {name} in {folder}")
        same = model is not None and model.shape == saved.size
        empty = torch.zeros_like(model.detach()) if same and model is not None else torch.zeros(saved.size)
        flat[key] = empty.to(saved.properties.dtype)
    load(flat, storage_reader=reader)
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        stem, _, name = key.partition("/")
        found.setdefault(stem, {})[name] = value
    return found


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
    """Puts back what `flatten_optimizer` took; buffers of a parameter's shape are cut over the ranks as it is."""
    parameters = optimized(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        cut = not is_sharded(value) and value.shape == parameter.shape
        state.setdefault(int(index), {})[name] = like(value, parameter) if cut else value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def optimized(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns the parameters in the order of the optimizer's own numbers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
        own[name].copy_(value if is_sharded(value) else like(value, own[name]))


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
