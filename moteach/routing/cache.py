"""Vectors of texts on disk, found again by the hash of encoder and text."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from moteach.errors import ConfigError, DataError

_MAGIC = b"moteach1"
_HEADER = struct.Struct("<8sI4x")
_KEY_BYTES = 32


class EmbeddingCache:
    """One append-only file an encoder: a header, then records `sha256(encoder, text) | float32 vector | crc32`.

    A record counts when it is whole and its checksum is right, so a crash in the middle of a write loses that write only;
    the torn end is cut off before the next one. Several processes may share the file: writers take turns by a lock.

    Args:
        folder: Where the file is; made at the first write.
        identity: Identity of the encoder; another encoder has another file.
    """

    def __init__(self, folder: Path, *, identity: str) -> None:
        self._identity = identity.encode() + b"\0"
        self.path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.vectors"
        self._rows: dict[bytes, int] = {}
        self._vectors: npt.NDArray[np.float32] | None = None
        self._read = 0
        self._load()

    def __len__(self) -> int:
        return len(self._rows)

    def get_or_make(
        self, texts: Sequence[str], make: Callable[[Sequence[str]], Float[Tensor, "text hidden"]]
    ) -> Float[Tensor, "text hidden"]:
        """Returns the vectors of `texts`, making and storing those that are not there.

        Args:
            texts: Texts, repeats allowed.
            make: Encodes the missing ones, each once.

        Raises:
            ConfigError: The file cannot be written.
        """
        keys = [hashlib.sha256(self._identity + text.encode()).digest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._rows}
        if missing:
            vectors = make(list(missing.values())).to(torch.float32)
            self._append(list(missing), vectors.numpy())
        assert self._vectors is not None
        return torch.from_numpy(self._vectors[[self._rows[key] for key in keys]])

    def _record(self, size: int) -> np.dtype[Any]:
        return np.dtype([("key", f"V{_KEY_BYTES}"), ("vector", "<f4", (size,)), ("check", "<u4")])

    def _load(self) -> None:
        """Takes over the records that were added to the file since the last look."""
        try:
            with self.path.open("rb") as file:
                header = file.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    return
                magic, size = _HEADER.unpack(header)
                if magic != _MAGIC or not size:
                    raise DataError(
                        f"{self.path}: expected a cache of vectors, got another file; prompts would be routed by noise. "
                        "Delete it, or set router.cache to another folder"
                    )
                record = self._record(size)
                file.seek(self._read * record.itemsize, os.SEEK_CUR)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return
        added = np.frombuffer(data[: len(data) // record.itemsize * record.itemsize], dtype=record)
        for row, (key, check) in enumerate(zip(added["key"], added["check"], strict=True), start=self._read):
            start = (row - self._read) * record.itemsize
            if zlib.crc32(data[start : start + record.itemsize - 4]) == check:
                self._rows[key.tobytes()] = row
        vectors = np.array(added["vector"])
        self._vectors = vectors if self._vectors is None else np.concatenate([self._vectors, vectors])
        self._read += len(added)

    def _append(self, keys: Sequence[bytes], vectors: npt.NDArray[np.float32]) -> None:
        size = vectors.shape[1]
        record = self._record(size)
        block = np.zeros(len(keys), dtype=record)
        block["key"] = np.frombuffer(b"".join(keys), dtype=f"V{_KEY_BYTES}")
        block["vector"] = vectors
        block["check"] = [zlib.crc32(row.tobytes()[:-4]) for row in block]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                end = os.fstat(file.fileno()).st_size
                if end < _HEADER.size:
                    file.truncate(0)
                    file.write(_HEADER.pack(_MAGIC, size))
                else:
                    file.truncate(end - (end - _HEADER.size) % record.itemsize)
                file.write(block.tobytes())
                file.flush()
        except OSError as error:
            raise ConfigError(
                f"router.cache: expected a folder that can be written, got {self.path.parent} ({error.strerror or error}). "
                "Name another one, or set router.cache=null"
            ) from error
        self._load()
