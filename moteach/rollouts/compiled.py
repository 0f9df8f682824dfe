"""The forwards of generation compiled by torch: one graph reads the prompts, one adds a token to keys and values in place.

The numbers of rows and of tokens are symbols in both graphs and weights are arguments of them, so that finished rows may leave
the batch and weights may change without compiling again. `check_compiled` compiles on sizes of its own before a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.rollouts.decoding import EagerForward, Forward, forward_options, generation_mode, sharded_modules


@no_type_check
class _Slots(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values in buffers that were made once; of a sliding layer too, the model masks what is too old."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, seen: int) -> None:
        super().__init__()
        self.keys, self.values, self.seen = keys, values, seen
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the buffers are given")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.seen + 1
        self.keys[:, :, self.seen : end] = key_states
        self.values[:, :, self.seen : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length


@no_type_check
def _read(
    model: nn.Module, cache_name: str, options: dict[str, Any], ids: Tensor, mask: Tensor, positions: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    cache = DynamicCache()
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, **options, **{cache_name: cache})
    return output.logits[:, -1], [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


@no_type_check
def _write(
    model: nn.Module,
    cache_name: str,
    options: dict[str, Any],
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    seen = mask.shape[1] - 1
    cache = Cache(layers=[_Slots(*pair, seen) for pair in zip(keys, values, strict=True)])
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, **options, **{cache_name: cache})
    return output.logits[:, -1]


_compiled_read: Callable[..., Any] = torch.compile(_read, fullgraph=True)
_compiled_write: Callable[..., Any] = torch.compile(_write, fullgraph=True)


class CompiledForward:
    """The two forwards of `decode`, compiled, and the preallocated keys and values between them.

    Args:
        model: Causal language model of transformers that `check_compiled` let pass.
        limit: Most tokens that will be written.
        mark: Declare the sizes that vary, in the calls that compile.
    """

    def __init__(self, model: nn.Module, *, limit: int, mark: bool = False) -> None:
        self._model = model
        self._cache_name, self._options = forward_options(model)
        self._limit = limit
        self._mark = mark
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(
        self,
        ids: Int[Tensor, "batch query"],
        mask: Bool[Tensor, "batch key"] | None,
        positions: Int[Tensor, "batch query"],
    ) -> Float[Tensor, "batch vocab"]:
        """Returns the logits after the last token; `mask` must be given."""
        assert mask is not None
        rows, width = ids.shape
        if rows == 1:
            # a size of 1 is never a symbol: one row would be compiled for itself, and so would a prompt of one token
            ids, mask, positions = ids.repeat(2, 1), mask.repeat(2, 1), positions.repeat(2, 1)
        if self._keys:
            written: Tensor = self._call(_compiled_write, ids, mask, positions, self._keys, self._values)
            return written[:rows]
        if width == 1:
            ids, mask, positions = (nn.functional.pad(each, (1, 0)) for each in (ids, mask, positions))
        logits, keys, values = self._call(_compiled_read, ids, mask, positions)
        room = (0, 0, 0, self._limit)
        self._keys = [nn.functional.pad(each[:, :, -width:], room) for each in keys]
        self._values = [nn.functional.pad(each[:, :, -width:], room) for each in values]
        read: Tensor = logits[:rows]
        return read

    def take(self, rows: Int[Tensor, " row"]) -> None:
        """Makes these rows, repeats allowed, the batch of the cache."""
        rows = rows.repeat(2) if len(rows) == 1 else rows
        self._keys = [each[rows] for each in self._keys]
        self._values = [each[rows] for each in self._values]

    def _call(
        self, forward: Callable[..., Any], ids: Tensor, mask: Tensor, positions: Tensor, *cache: list[Tensor]
    ) -> Any:
        # other strides would be another graph
        ids, mask, positions = ids.contiguous(), mask.contiguous(), positions.contiguous()
        if self._mark:
            for each in (ids, mask, positions):
                torch._dynamo.mark_dynamic(each, [0, 1] if each.shape[1] > 1 else 0)
            for each in (tensor for tensors in cache for tensor in tensors):
                torch._dynamo.mark_dynamic(each, [0, 2])
        return forward(self._model, self._cache_name, self._options, ids, mask, positions, *cache)


def check_compiled(model: nn.Module) -> None:
    """Compiles generation from this model on three made-up prompts, and compares its logits with those of the eager forwards.

    Raises:
        UnsupportedCombinationError: The model is sharded, or keeps something else than keys and values of every token.
        ConfigError: It cannot be compiled here, or computes something else when it is.
    """
    name = type(model).__name__
    if sharded_modules(model):
        raise UnsupportedCombinationError(
            f"rollout.compile=true: expected one process, got {name} sharded over ranks; hooks gather its weights, and they "
            "cannot be compiled. Start one process, or set rollout.compile=false"
        )
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if odd := sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}):
        raise UnsupportedCombinationError(
            f"rollout.compile=true: expected a model that keeps keys and values of every token, got {name} with "
            f"{', '.join(odd)}; tokens would be written without what it remembers. Set rollout.compile=false"
        )
    try:
        with generation_mode(model):
            compiled = _trial(model, CompiledForward(model, limit=6, mark=True))
            eager = _trial(model, EagerForward(model))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"rollout.compile=true: expected {name} to get through torch.compile with a C++ compiler of this machine, got "
            f"{type(error).__name__}: {reason}. Install one (g++), or set rollout.compile=false"
        ) from error
    allowed = torch.finfo(eager.dtype).eps ** 0.5 * float(eager.abs().max())
    gap = float((compiled - eager).abs().max())
    if not gap <= allowed:
        raise ConfigError(
            f"rollout.compile=true: expected the logits of {name} to {allowed:.2g}, got a difference of {gap:.2g} once it is "
            "compiled; it would sample from another model than is trained. Set rollout.compile=false"
        )


def _trial(model: nn.Module, forward: Forward) -> Float[Tensor, "call row vocab"]:
    device = next(model.parameters()).device
    ids = torch.arange(12, device=device).view(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[0, 0] = False
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    calls = [forward(ids, mask, positions)]
    for new in range(2):
        mask = nn.functional.pad(mask, (0, 1), value=True)
        calls.append(forward(ids[:, new : new + 1], mask, positions[:, -1:] + new + 1))
    return torch.stack(calls)
