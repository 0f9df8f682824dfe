"""The student: the model that is trained, as one module whose forward ends in the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moteach.catalogue.modeling import body_and_head, check_head, hidden_states, load_causal_lm, load_tokenizer
from moteach.errors import ConfigError, MissingDependencyError
from moteach.types import Head, LossOutput, RolloutBatch


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank update of the student: W + (alpha / rank) B A, with B = 0 at the start (arXiv 2106.09685, section 4.1).

    Raises:
        ConfigError: A value is out of range.
    """

    rank: int
    """Rows of A, at least 1."""
    alpha: float | None = None
    """Scale of the update times `rank`; None takes twice the rank."""
    dropout: float = 0.0
    """Of the input of A while training."""
    targets: Sequence[str] | None = None
    """Ends of the names of the linear layers that get one; None takes all but the head."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or (self.alpha is not None and not self.alpha > 0):
            raise ConfigError(
                "student.lora: expected rank >= 1, alpha > 0 and dropout in [0, 1), got "
                f"{self.rank}, {self.alpha} and {self.dropout}; nothing would be learned"
            )

    def wrap(self, model: Any) -> Any:
        """Puts the update into a model, in place, and freezes everything else.

        Returns:
            The peft model around it; the model itself keeps its class and its head.

        Raises:
            MissingDependencyError: peft is not installed.
            ConfigError: No layer has such a name.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingDependencyError(
                "expected the package peft for student.lora, got none; pip install 'moteach[peft]'"
            ) from error
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear" if self.targets is None else list(self.targets),
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"student.lora.targets: {' '.join(str(error).split())}") from error


class Student(nn.Module):
    """A causal language model with the loss inside its forward.

    The loss needs the weights of the head. Computing it inside the forward of the root module lets FSDP2 gather them,
    tied to the embedding or not, and reduce their gradient like any other; nothing else touches the student's
    weights.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        lora: Train this update of the model alone.

    Raises:
        ConfigError: The model has no linear output layer.
        DeadTeacherError: Its logits are not finite.
        IncompatibleTeacherError: Its logits cannot be rebuilt from its hidden states.
    """

    def __init__(self, model: Any, tokenizer: Any, *, lora: LoRA | None = None) -> None:
        super().__init__()
        check_head(model, name=getattr(model.config, "_name_or_path", "") or "the student")
        # in a tuple, because a second path to the same parameters would name them twice
        self._adapted = () if lora is None else (lora.wrap(model),)
        self._lora = lora
        self.model = model
        self.tokenizer = tokenizer

    @property
    def adapted(self) -> bool:
        """Whether a low-rank update is trained, and the model under it frozen."""
        return bool(self._adapted)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> Student:
        """Opens a checkpoint for training.

        Args:
            path: Folder or hub id.
            revision: Commit of the hub repository.
            dtype: Precision of the trained parameters. In `bfloat16` an update smaller than 1/256 of a weight is lost.
            gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more compute.
            lora: Train this update of the checkpoint alone.

        Raises:
            ConfigError: The checkpoint cannot be opened safely.
            MissingFileError: The folder does not exist.
        """
        model = load_causal_lm(path, revision=revision, dtype=dtype)
        if gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise ConfigError(
                    f"expected a model that can recompute its activations, got {type(model).__name__}; "
                    "set student.gradient_checkpointing=false"
                )
            # transformers 5.2x renames the method and warns about the old one
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        return cls(model.train(), load_tokenizer(path, revision=revision), lora=lora)

    @property
    def vocab_size(self) -> int:
        """Rows of the head, the length of the vocab axis everywhere."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def forward(
        self, rollouts: RolloutBatch, loss: Callable[[Float[Tensor, "packed hidden"], Head], LossOutput]
    ) -> LossOutput:
        """Runs the body on the rows and hands the loss what predicts the trained tokens.

        Args:
            rollouts: The rows of one micro-batch.
            loss: Called with hidden states `[packed, hidden]` in packed order, and the live head.

        Returns:
            What the loss returned; back-propagate its `loss`.
        """
        body, head = body_and_head(self.model)
        states = hidden_states(body, rollouts.input_ids)
        return loss(rollouts.pack(states), head)

    def save_pretrained(self, folder: Path | str, *, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes safetensors, tokenizer, chat template and generation config, for `AutoModelForCausalLM` to open.

        A low-rank update is added to the weights that are written; by itself it lies in the folder `adapter`.

        Args:
            folder: Where to.
            weights: The model's state, where the model itself holds only parts of it.
        """
        model = self.model
        for adapted in self._adapted:
            apart = copy.deepcopy(adapted) if weights is None else self._adapted_from(weights)
            apart.save_pretrained(Path(folder) / "adapter")
            model, weights = apart.merge_and_unload(), None
        model.save_pretrained(folder, safe_serialization=True, state_dict=None if weights is None else dict(weights))
        self.tokenizer.save_pretrained(folder)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)

    def _adapted_from(self, weights: Mapping[str, Tensor]) -> Any:
        """The peft model anew, of whole tensors: a model that is cut into shards can neither be copied nor merged."""
        assert self._lora is not None, "only where a low-rank update is trained"
        with torch.device("meta"):
            bare = type(self.model)(self.model.config)
            adapted = self._lora.wrap(bare)
        # tied weights are not in the state
        bare.load_state_dict(dict(weights), strict=False, assign=True)
        bare.tie_weights()
        return adapted
