"""The student: the model that is trained, as one module whose forward ends in the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from moteach.catalogue.modeling import body_and_head, check_head, hidden_states, load_causal_lm, load_tokenizer
from moteach.errors import ConfigError
from moteach.types import Head, LossOutput, RolloutBatch


class Student(nn.Module):
    """A causal language model with the loss inside its forward.

    The loss needs the weights of the head. Computing it inside the forward of the root module lets FSDP2 gather them,
    tied to the embedding or not, and reduce their gradient like any other; nothing else touches the student's
    weights.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.

    Raises:
        ConfigError: The model has no linear output layer.
        DeadTeacherError: Its logits are not finite.
        IncompatibleTeacherError: Its logits cannot be rebuilt from its hidden states.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        check_head(model, name=getattr(model.config, "_name_or_path", "") or "the student")
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> Student:
        """Opens a checkpoint for training.

        Args:
            path: Folder or hub id.
            revision: Commit of the hub repository.
            dtype: Precision of the trained parameters. In `bfloat16` an update smaller than 1/256 of a weight is lost.
            gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more compute.

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
        return cls(model.train(), load_tokenizer(path, revision=revision))

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
        states = hidden_states(body, rollouts.input_ids, rollouts.attention_mask)
        return loss(rollouts.pack(states), head)

    def save_pretrained(self, folder: Path | str, *, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes safetensors, tokenizer, chat template and generation config, for `AutoModelForCausalLM` to open.

        Args:
            folder: Where to.
            weights: The model's state, where the model itself holds only parts of it.
        """
        self.model.save_pretrained(
            folder, safe_serialization=True, state_dict=None if weights is None else dict(weights)
        )
        self.tokenizer.save_pretrained(folder)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)
