"""The forwards of generation compiled by torch: one graph reads the prompts, one adds a token to keys and values in place.

The numbers of rows and of tokens are symbols in both graphs and weights are arguments of them, so that finished rows may leave
the batch and weights may change without compiling again. `check_compiled` compiles on sizes of its own before a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.rollouts.decoding import EagerForward, Forward, forward_options, generation_mode, sharded_modules


# no_type_check, here and below: what is compiled must not be wrapped by the checks of shapes that tests put around functions
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


_WORTH_A_CALL = 0.1
"""Short prompts are read by themselves where that saves this share of the tokens."""


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
        self._seen = 0
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
        rows = len(ids)
        if rows == 1:
            # a size of 1 is never a symbol: one row would be compiled for itself, and so would a prompt of one token
            ids, mask, positions = ids.repeat(2, 1), mask.repeat(2, 1), positions.repeat(2, 1)
        self._seen = mask.shape[1]
        if self._keys:
            logits: Tensor = self._call(_compiled_write, ids, mask, positions, self._keys, self._values)
        else:
            logits = self._read(ids, mask, positions)
        return logits[:rows]

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Reads prompts, short ones apart where that saves padding, into buffers with room for what will be written."""
        rows, width = mask.shape
        ends: list[tuple[Tensor, Tensor]] = []
        for part, columns in _parts(mask):
            inputs = [each[part, -columns:] for each in (ids, mask, positions)]
            inputs = [nn.functional.pad(each, (1, 0)) for each in inputs] if columns == 1 else inputs
            logits, *read = self._call(_compiled_read, inputs[0], inputs[1], inputs[2])
            if not self._keys:
                self._keys, self._values = (
                    [each.new_empty(rows, each.shape[1], width + self._limit, each.shape[3]) for each in own]
                    for own in read
                )
            for buffers, own in zip((self._keys, self._values), read, strict=True):
                for buffer, each in zip(buffers, own, strict=True):
                    buffer[part, :, width - columns : width] = each[:, :, -columns:]
                    if columns < width:
                        buffer[part, :, : width - columns] = 0  # masked, but not a number would come through a mask
            ends.append((part, logits))
        last = ends[0][1].new_empty(rows, ends[0][1].shape[1])
        for part, logits in ends:
            last[part] = logits
        return last

    def take(self, rows: Int[Tensor, " row"]) -> None:
        """Makes these rows, repeats allowed, the batch of the cache."""
        rows = rows.repeat(2) if len(rows) == 1 else rows
        self._keys = [self._taken(each, rows) for each in self._keys]
        self._values = [self._taken(each, rows) for each in self._values]

    def _taken(self, buffer: Tensor, rows: Tensor) -> Tensor:
        kept = buffer[rows, :, : self._seen]
        buffer = buffer.new_empty(len(rows), *buffer.shape[1:]) if len(rows) > len(buffer) else buffer[: len(rows)]
        buffer[:, :, : self._seen] = kept
        return buffer

    def _call(
        self, forward: Callable[..., Any], ids: Tensor, mask: Tensor, positions: Tensor, *cache: Sequence[Tensor]
    ) -> Any:
        # other strides would be another graph
        ids, mask, positions = ids.contiguous(), mask.contiguous(), positions.contiguous()
        if self._mark:
            for each in (ids, mask, positions):
                torch._dynamo.mark_dynamic(each, [0, 1] if each.shape[1] > 1 else 0)
            for each in (tensor for tensors in cache for tensor in tensors):
                torch._dynamo.mark_dynamic(each, [0, 2])
        return forward(self._model, self._cache_name, self._options, ids, mask, positions, *cache)


def _parts(mask: Bool[Tensor, "row token"]) -> list[tuple[Int[Tensor, " part"], int]]:
    """Rows that are read together and how many of their last columns: all of them, or short and long prompts by themselves."""
    rows, width = mask.shape
    lengths = mask.sum(dim=1)
    counts = torch.bincount(lengths, minlength=width + 1)
    # tokens of two batches whose shorter one is so wide; the last is one batch of all
    cost = counts.cumsum(0) * torch.arange(width + 1, device=mask.device) + (rows - counts.cumsum(0)) * width
    split = int(cost.argmin())
    short = lengths <= split
    if cost[split] > (1 - _WORTH_A_CALL) * rows * width or not 2 <= int(short.sum()) <= rows - 2:
        return [(torch.arange(rows, device=mask.device), width)]
    return [((~short).nonzero()[:, 0], width), (short.nonzero()[:, 0], split)]


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
            f"{type(error).__name__}: {reason}. If none is there, install g++; else set rollout.compile=false"
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
