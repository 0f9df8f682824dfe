"""A learned router in a folder: safetensors, JSON and a model card; nothing is unpickled."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moteach.catalogue.packaged import replace_folder
from moteach.errors import ConfigError, DataError, MissingFileError
from moteach.routing.exemplars import Exemplars

_FORMAT = 1
_CONFIG, _TENSORS, _CARD = "router.json", "router.safetensors", "README.md"
_HEAD = "head."
ENCODER = "encoder"
"""Folder of an encoder of the router's own, beside its files."""


@dataclass(frozen=True, kw_only=True)
class SavedRouter:
    """Everything that the routes depend on, and what a reader wants to know."""

    router: str
    """Name of the class."""
    head: Mapping[str, Any]
    """Constructor arguments of the head."""
    arguments: Mapping[str, Any]
    """Constructor arguments of the router."""
    encoder: str
    encoder_identity: str
    experts: tuple[Mapping[str, Any], ...]
    """`name`, `domains`, `weight`, `cost` of each expert, in the order of the routes."""
    exemplars: Exemplars
    vectors: Float[Tensor, "exemplar hidden"]
    tensors: Mapping[str, Tensor]
    """Of the head."""
    temperature: float
    isotonic: Mapping[str, list[float]] | None
    encoder_folder: Path | None = None
    """The encoder where it is the router's own: copied in when it is written, found when it is read."""


def write_router(folder: Path, saved: SavedRouter) -> None:
    """Writes a router whole or not at all.

    Args:
        folder: Made, or replaced when it is empty or holds a saved router.
        saved: The router.

    Raises:
        ConfigError: The folder holds other files, or cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / _CONFIG).is_file()):
        raise ConfigError(
            f"expected a new folder or one of a saved router, got {folder}, which holds other files; they would be lost. "
            "Choose another folder"
        )
    document = {
        "format": _FORMAT,
        "router": saved.router,
        "head": saved.head,
        "arguments": saved.arguments,
        "encoder": saved.encoder,
        "encoder_identity": saved.encoder_identity,
        "experts": list(saved.experts),
        "columns": list(saved.exemplars.names),
        "temperature": saved.temperature,
        "isotonic": saved.isotonic,
        "exemplars": list(saved.exemplars.texts),
    }
    tensors = {f"{_HEAD}{name}": tensor.contiguous() for name, tensor in saved.tensors.items()}
    tensors["exemplars"] = saved.vectors.contiguous()
    tensors["owners"] = saved.exemplars.owners.to(torch.uint8).contiguous()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"expected a folder that can be written, got {folder} ({error.strerror or error})") from error
    try:
        aside.chmod(0o755)
        save_file(tensors, aside / _TENSORS)
        (aside / _CONFIG).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (aside / _CARD).write_text(_card(saved), encoding="utf-8")
        if saved.encoder_folder is not None:
            shutil.copytree(saved.encoder_folder, aside / ENCODER)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_router(folder: Path) -> SavedRouter:
    """Reads a saved router.

    Raises:
        MissingFileError: There is none.
        DataError: Its files are damaged, or of another format.
    """
    folder = folder.expanduser()
    if not (folder / _CONFIG).is_file() or not (folder / _TENSORS).is_file():
        raise MissingFileError(
            f"expected a saved router ({_CONFIG}, {_TENSORS}) in {folder}, found none; make one: moteach route fit run_dir=DIR "
            "saves to DIR/router"
        )
    try:
        said = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
        if said["format"] != _FORMAT:
            raise DataError(
                f"{folder / _CONFIG}: expected format {_FORMAT}, got {said['format']}; its values would be misread. Fit the "
                "router again with this version"
            )
        owners = tensors["owners"].bool()
        names, texts = tuple(said["columns"]), tuple(said["exemplars"])
        if owners.shape != (len(texts), len(names)) or len(tensors["exemplars"]) != len(texts):
            raise DataError(
                f"{folder}: expected one vector and one row of owners per exemplar, got {len(texts)} exemplars, "
                f"{len(tensors['exemplars'])} vectors and owners {tuple(owners.shape)}; exemplars would be taken for others. "
                "Fit the router again"
            )
        return SavedRouter(
            router=said["router"],
            head=said["head"],
            arguments=said["arguments"],
            encoder=said["encoder"],
            encoder_identity=said["encoder_identity"],
            experts=tuple(said["experts"]),
            exemplars=Exemplars(names=names, texts=texts, owners=owners),
            vectors=tensors["exemplars"],
            tensors={k.removeprefix(_HEAD): v for k, v in tensors.items() if k.startswith(_HEAD)},
            temperature=float(said["temperature"]),
            isotonic=said["isotonic"],
            encoder_folder=folder / ENCODER if (folder / ENCODER).is_dir() else None,
        )
    except (json.JSONDecodeError, SafetensorError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: expected a saved router, got damaged files ({type(error).__name__}: {error}); fit the router again"
        ) from error


def _card(saved: SavedRouter) -> str:
    counts = saved.exemplars.owners.sum(dim=0).tolist()
    domains = {row["name"]: ", ".join(row["domains"]) for row in saved.experts}
    rows = "\n".join(
        f"| {name} | {domains.get(name, '')} | {count} |"
        for name, count in zip(saved.exemplars.names, counts, strict=True)
    )
    settings = "\n".join(f"- `{name}`: {value}" for name, value in {**saved.arguments, **saved.head}.items())
    calibration = (
        f"temperature {saved.temperature:.4g}" if saved.isotonic is None else "isotonic regression of the confidence"
    )
    return f"""---
library_name: moteach
tags: [moteach, router]
---

# A router of moteach: {saved.router}

Decides which expert teacher grades a prompt. Learned from the experts' exemplars alone, never from a distillation loss.

| expert | domains | exemplars |
|---|---|---|
{rows}

- encoder: `{saved.encoder_identity}`
- calibration: {calibration}

Use it with `moteach train router=... router.path=THIS_FOLDER`, or in Python with `{saved.router}.from_pretrained(THIS_FOLDER)`.
`router.json` holds the text of every exemplar: share the folder only if you may share those.

Settings:

{settings}
"""
