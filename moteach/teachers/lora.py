"""A teacher that is a LoRA adapter; teachers on the same base share the base, and each adds only its adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from moteach.catalogue.modeling import check_head, check_weights, load_causal_lm
from moteach.errors import ConfigError, MissingDependencyError
from moteach.teachers.scoring import check_settings, score_with
from moteach.teachers.store import device_of
from moteach.types import RolloutBatch, Support, TeacherEvidence


class AdapterStore:
    """Loads each base once and hangs every adapter of the run on it: memory P + sum of adapters instead of N * P.

    Args:
        device: Where the bases live: a torch device, or `auto`.
    """

    def __init__(self, *, device: str = "cpu") -> None:
        self._device = device_of(device)
        self._bases: dict[tuple[str, str | None, str], Any] = {}
        self._names: dict[tuple[str, str, str | None, str], str] = {}

    def get(self, adapter: str, *, base: str, revision: str | None = None, dtype: str = "float32") -> nn.Module:
        """Returns the base with this adapter switched on, frozen and in evaluation mode.

        The same module serves all adapters of a base: use it before asking for another one.

        Raises:
            MissingDependencyError: peft is not installed.
            ConfigError: The adapter cannot be opened on this base.
        """
        try:
            from peft import PeftModel
        except ImportError as error:
            raise MissingDependencyError(
                "expected the package peft for an expert with 'adapter:', got none; pip install 'moteach[peft]'"
            ) from error
        folder = Path(base)
        key = (str(folder.resolve()) if folder.is_dir() else base, revision, dtype)
        local = check_weights(adapter)
        name = hashlib.sha256(str(Path(adapter).resolve() if local else adapter).encode()).hexdigest()[:16]
        try:
            if key not in self._bases:
                model = load_causal_lm(base, revision=revision, dtype=dtype).to(self._device)
                wrapped = PeftModel.from_pretrained(model, adapter, adapter_name=name, use_safetensors=True)
                self._bases[key] = wrapped
            elif name not in self._bases[key].peft_config:
                self._bases[key].load_adapter(adapter, adapter_name=name, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(
                f"expected a LoRA adapter at '{adapter}' that fits the base '{base}', got {type(error).__name__}: "
                f"{error}"
            ) from error
        wrapped = self._bases[key]
        self._names[adapter, *key] = name
        # set_adapter alone would make the adapter trainable again
        wrapped.set_adapter(name, inference_mode=True)
        wrapped.eval().requires_grad_(False)
        whole: nn.Module = wrapped.get_base_model()
        return whole

    def mixed(
        self, adapters: Sequence[str], *, base: str, revision: str | None = None, dtype: str = "float32"
    ) -> tuple[Any, dict[str, str]] | None:
        """Returns the base under several adapters, for one forward in which each row has its own, and peft's names of them.

        None when their rows cannot share a forward: an adapter changes whole modules, or the head, or is not a plain LoRA.

        Raises:
            MissingDependencyError: peft is not installed.
            ConfigError: An adapter cannot be opened on this base.
        """
        folder = Path(base)
        key = (str(folder.resolve()) if folder.is_dir() else base, revision, dtype)
        for adapter in adapters:
            if (adapter, *key) not in self._names:
                self.get(adapter, base=base, revision=revision, dtype=dtype)
        wrapped = self._bases[key]
        names = {adapter: self._names[adapter, *key] for adapter in adapters}
        for name in names.values():
            config = wrapped.peft_config[name]
            odd = [
                key for key in ("modules_to_save", "use_dora", "trainable_token_indices") if getattr(config, key, None)
            ]
            if odd or str(getattr(config, "peft_type", "")).rpartition(".")[2] != "LORA":
                return None
        head = wrapped.get_base_model().get_output_embeddings()
        return None if hasattr(head, "lora_A") else (wrapped, names)


class LoRATeacher:
    """Scores with an adapter on a base that is shared with the other adapters of the run.

    Args:
        teacher_id: Name of the expert.
        adapter: Folder or hub id of the LoRA.
        base: Folder or hub id of the model under it.
        revision: Commit of the base's hub repository.
        dtype: `float32`, `bfloat16` or `auto`.
        chunk_size: Tokens whose logits exist at once (supports `topk` and `sampled`).
        max_tokens_per_forward: Padded tokens in one forward of the body.
        vocab_size: Size of the student's head; the rows of a larger teacher head beyond it are left out.
        store: Where bases are kept; teachers that share a store share the bases they have in common.
    """

    supports: frozenset[Support] = frozenset({"full", "topk", "sampled"})

    def __init__(
        self,
        *,
        teacher_id: str,
        adapter: str,
        base: str,
        revision: str | None = None,
        dtype: str = "float32",
        chunk_size: int = 1024,
        max_tokens_per_forward: int = 16384,
        vocab_size: int | None = None,
        store: AdapterStore | None = None,
    ) -> None:
        check_settings(chunk_size=chunk_size, max_tokens_per_forward=max_tokens_per_forward)
        self.teacher_id = teacher_id
        self._adapter = adapter
        self._base = base
        self._revision = revision
        self._dtype = dtype
        self.chunk_size = chunk_size
        self.max_tokens = max_tokens_per_forward
        self.vocab_size = vocab_size
        self._store = AdapterStore() if store is None else store
        self._checked = False

    @property
    def shares(self) -> tuple[object, ...]:
        """Equal for teachers whose rows can go through one forward, see `with_others`."""
        folder = Path(self._base)
        place = str(folder.resolve()) if folder.is_dir() else self._base
        return (id(self._store), place, self._revision, self._dtype, self.max_tokens)

    def with_others(self, teachers: Sequence[LoRATeacher]) -> tuple[Any, dict[str, str]] | None:
        """Returns the shared base with the adapters of all these teachers, and peft's name of each by teacher."""
        adapters = {teacher.teacher_id: teacher._adapter for teacher in teachers}
        opened = self._store.mixed(list(adapters.values()), base=self._base, revision=self._revision, dtype=self._dtype)
        return None if opened is None else (opened[0], {name: opened[1][path] for name, path in adapters.items()})

    @property
    def model(self) -> nn.Module:
        """The base with this adapter on; valid until another adapter of the same base is asked for."""
        model = self._store.get(self._adapter, base=self._base, revision=self._revision, dtype=self._dtype)
        if not self._checked:
            check_head(model, name=self._adapter)
            self._checked = True
        return model

    def score(self, rollouts: RolloutBatch, *, support: Support, k: int | None = None) -> TeacherEvidence:
        """Scores every trained token of these rows, see `moteach.teachers.base.Teacher.score`."""
        return score_with(
            self.model,
            rollouts,
            teacher_id=self.teacher_id,
            support=support,
            k=k,
            chunk_size=self.chunk_size,
            max_tokens_per_forward=self.max_tokens,
            vocab_size=self.vocab_size,
        )
