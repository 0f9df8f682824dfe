"""Teachers whose weights stay on disk: files mapped into memory, one module for all experts of an architecture."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moteach.catalogue.modeling import body_and_head, check_head, load_causal_lm
from moteach.catalogue.packaged import resolve_location
from moteach.teachers.residency import Residency
from moteach.teachers.store import device_of
from moteach.types import Head

_PAGE = 4096
_LARGE = 16 * _PAGE
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORTH_A_THREAD = 16 * 2**20
"""Bytes of an expert below which it is mapped sooner than a thread is woken."""
_Key = tuple[str, str | None, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    """One place of a module where a tensor belongs."""

    name: str
    held: dict[str, Any]
    attribute: str
    parameter: bool
    blank: nn.Parameter


@dataclass(kw_only=True)
class _Frame:
    """A module whose weights are exchanged; `owner` is the expert whose weights it has now."""

    module: nn.Module
    slots: tuple[_Slot, ...]
    owner: _Key | None = None

    @classmethod
    def of(cls, module: nn.Module) -> _Frame:
        """Remembers where the weights of a module are."""
        slots = []
        for name, tensor in _places(module).items():
            owner, _, attribute = name.rpartition(".")
            part = module.get_submodule(owner)
            parameter = attribute in part._parameters
            slots.append(
                _Slot(
                    name=name,
                    held=part._parameters if parameter else part._buffers,
                    attribute=attribute,
                    parameter=parameter,
                    blank=nn.Parameter(tensor.detach().to("meta"), requires_grad=False),
                )
            )
        return cls(module=module, slots=tuple(slots))

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives the module these weights; tied parameters stay one parameter."""
        made: dict[int, nn.Parameter] = {}
        for slot in self.slots:
            tensor = tensors[slot.name]
            if slot.parameter and id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(tensor, requires_grad=False)
            slot.held[slot.attribute] = made[id(tensor)] if slot.parameter else tensor

    def empty(self) -> None:
        """Takes the weights out of the module."""
        for slot in self.slots:
            slot.held[slot.attribute] = slot.blank
        self.owner = None


@dataclass(frozen=True, kw_only=True)
class _Expert:
    """What is remembered about an expert while its weights are away."""

    frame: _Frame
    nbytes: int
    head_bytes: int
    load: Callable[[], Mapping[str, Tensor]]
    load_head: Callable[[], Mapping[str, Tensor]]
    head: Mapping[str, str]
    """Names of the head's `weight` and `bias` among the tensors."""
    scale: float
    softcap: float | None


@dataclass(kw_only=True)
class MappedStore:
    """Holds as many teachers as a budget of bytes allows, and brings the others back from their files when needed.

    Weights are views of memory-mapped safetensors files: bringing an expert back copies nothing, and giving it up unmaps it.
    Tensors are copied only where the teacher's precision is not that of the file, on a GPU, and for architectures whose
    files name their tensors otherwise than the module does. Experts of one architecture share one module, so the
    module returned by `get` is valid until another expert is asked for. What a teacher says does not depend on the budget.

    Args:
        memory: Most bytes of weights at once; at least those of the largest expert. Twice that lets the next expert be
            loaded while one scores.
        device: Where models run: a torch device, or `auto`.
    """

    memory: int
    device: str = "cpu"
    residency: Residency = field(init=False)
    _keys: dict[_Key, _Key] = field(init=False, default_factory=dict)
    _experts: dict[_Key, _Expert] = field(init=False, default_factory=dict)
    _frames: dict[str, _Frame] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.device = device_of(self.device)
        self.residency = Residency(budget=self.memory, dropped=self._give_up)

    def get(self, path: str, *, revision: str | None = None, dtype: str = "float32") -> nn.Module:
        """Returns the frozen model in evaluation mode; valid until another one is asked for.

        Raises:
            ConfigError: It cannot be opened safely, or is larger than the budget.
            MissingFileError: The folder does not exist.
            DeadTeacherError: Its logits are not finite.
            IncompatibleTeacherError: Its logits cannot be rebuilt from its hidden states.
        """
        key = self._key(path, revision, dtype)
        expert = self._expert(key, name=path)
        tensors = self.residency.get(("model", key), expert.load, nbytes=expert.nbytes)
        if expert.frame.owner != key:
            expert.frame.put(tensors)
            expert.frame.owner = key
        return expert.frame.module

    def prefetch(self, path: str, *, revision: str | None = None, dtype: str = "float32") -> None:
        """Begins to bring an expert back in the background, when the budget has room for it beside the one in use."""
        key = self._key(path, revision, dtype)
        expert = self._experts.get(key)
        if expert is not None and expert.nbytes >= _WORTH_A_THREAD:
            self.residency.prefetch(("model", key), expert.load, nbytes=expert.nbytes)

    def lend(self, path: str, *, revision: str | None, dtype: str, rows: int) -> Callable[[], Head]:
        """Returns a function that brings the head of an expert, cut to its first `rows`, whenever it is called."""
        return partial(self._head, self._key(path, revision, dtype), rows)

    def _head(self, key: _Key, rows: int) -> Head:
        expert = self._experts[key]
        if ("model", key) in self.residency:
            tensors = self.residency.get(("model", key), expert.load, nbytes=expert.nbytes)
        else:
            tensors = self.residency.get(("head", key), expert.load_head, nbytes=expert.head_bytes)
        bias = tensors[expert.head["bias"]][:rows] if "bias" in expert.head else None
        return Head(weight=tensors[expert.head["weight"]][:rows], bias=bias, scale=expert.scale, softcap=expert.softcap)

    def _expert(self, key: _Key, *, name: str) -> _Expert:
        """Opens an expert for the first time: checks it, and compares its files with the module they make."""
        if key in self._experts:
            return self._experts[key]
        path, revision, dtype = key
        # it is opened whole once: the others make room
        self.residency.clear()
        model: Any = load_causal_lm(path, revision=revision, dtype=dtype).to(self.device)
        model.eval().requires_grad_(False)
        check_head(model, name=name)
        head = body_and_head(model)[1]
        owned = _places(model)
        of_head = {"weight": _name_of(owned, head.weight)}
        if head.bias is not None:
            of_head["bias"] = _name_of(owned, head.bias)
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in owned.values()}
        load, load_head = self._readers(key, owned, frozenset(of_head.values()))
        architecture = _architecture(model, dtype)
        if architecture not in self._frames:
            self._frames[architecture] = _Frame.of(model)
            self._frames[architecture].empty()
        expert = _Expert(
            frame=self._frames[architecture],
            nbytes=sum(unique.values()),
            head_bytes=sum(owned[place].nbytes for place in of_head.values()),
            load=load,
            load_head=load_head,
            head=of_head,
            scale=head.scale,
            softcap=head.softcap,
        )
        self._experts[key] = expert
        return expert

    def _readers(
        self, key: _Key, owned: Mapping[str, Tensor], of_head: frozenset[str]
    ) -> tuple[Callable[[], Mapping[str, Tensor]], Callable[[], Mapping[str, Tensor]]]:
        """Chooses how an expert and its head are read: from the mapped files when these give the same bits."""
        path, revision, dtype = key
        folder = Path(resolve_location(path))
        views = _views(folder, owned) if folder.is_dir() else None
        if views is not None:
            whole = _Plan.of(views)
            again = whole.read(self.device)
            if all(torch.equal(again[name], tensor) for name, tensor in owned.items()):
                head = _Plan.of({name: view for name, view in views.items() if name in of_head})
                return partial(whole.read, self.device), partial(head.read, self.device)
        afresh = partial(_read_whole, path, revision, dtype, self.device)
        return partial(afresh, frozenset(owned)), partial(afresh, of_head)

    def _key(self, path: str, revision: str | None, dtype: str) -> _Key:
        """Tells experts apart by resolved path, revision and precision; a path is resolved once."""
        named = (path, revision, dtype)
        if named not in self._keys:
            folder = Path(path)
            local = folder.is_dir()
            self._keys[named] = (str(folder.resolve()) if local else path, None if local else revision, dtype)
        return self._keys[named]

    def _give_up(self, kept: tuple[str, _Key]) -> None:
        kind, key = kept
        frame = self._experts[key].frame
        if kind == "model" and frame.owner == key:
            frame.empty()


def _architecture(model: Any, dtype: str) -> str:
    """Everything about a model but its weights; experts for which it is equal take turns in one module."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in _places(model).items()]
    return repr((type(model).__name__, dtype, sorted(config.items(), key=lambda item: item[0]), shapes))


def _places(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by every name they have, tied ones under each."""
    return module.state_dict(keep_vars=True)


def _name_of(owned: Mapping[str, Tensor], tensor: Tensor) -> str:
    return next(name for name, own in owned.items() if own is tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """Where in a file a tensor is, and what it becomes."""

    file: str
    first: int
    saved: torch.dtype
    shape: tuple[int, ...]
    wanted: torch.dtype


def _views(folder: Path, owned: Mapping[str, Tensor]) -> dict[str, _View] | None:
    """Says where each tensor is saved; a tied one is where its twin is. None when one is nowhere, or cannot be mapped."""
    saved: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        saved |= {name: (file, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    twins = {tensor.data_ptr(): name for name, tensor in owned.items() if name in saved}
    found = {}
    for name, tensor in owned.items():
        source = name if name in saved else twins.get(tensor.data_ptr())
        if source is None:
            return None
        file, data, entry = saved[source]
        dtype, first = _DTYPES.get(entry["dtype"]), data + entry["data_offsets"][0]
        if dtype is None or first % dtype.itemsize or tuple(entry["shape"]) != tuple(tensor.shape):
            return None
        found[name] = _View(
            file=str(file), first=first // dtype.itemsize, saved=dtype, shape=tuple(tensor.shape), wanted=tensor.dtype
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How tensors are read from mapped files; worked out once, for it is carried out in every step."""

    files: Mapping[str, int]
    """Bytes of each file."""
    dtypes: Mapping[str, frozenset[torch.dtype]]
    """Precisions that its tensors are saved in."""
    parts: Sequence[tuple[_View, tuple[int, ...], tuple[str, ...]]]
    """Each view, its strides, and the names that share it."""

    @classmethod
    def of(cls, views: Mapping[str, _View]) -> _Plan:
        """Joins the names of tied tensors."""
        names: dict[_View, list[str]] = {}
        for name, view in views.items():
            names.setdefault(view, []).append(name)
        parts = []
        for view, shared in names.items():
            strides = tuple(math.prod(view.shape[place + 1 :]) for place in range(len(view.shape)))
            parts.append((view, strides, tuple(shared)))
        dtypes = {
            file: frozenset(view.saved for view in names if view.file == file) for file in {v.file for v in names}
        }
        return cls(files={file: Path(file).stat().st_size for file in dtypes}, dtypes=dtypes, parts=parts)

    def read(self, device: str) -> Mapping[str, Tensor]:
        """Maps the tensors and touches the pages of large ones, so that a background thread has waited for the disk."""
        flat: dict[tuple[str, torch.dtype], Tensor] = {}
        for file, nbytes in self.files.items():
            storage = torch.UntypedStorage.from_file(file, shared=False, nbytes=nbytes)
            for dtype in self.dtypes[file]:
                # set_ takes no storage whose size is no multiple of the element's
                size = (nbytes // dtype.itemsize,)
                blank = torch.empty(0, dtype=dtype)
                flat[file, dtype] = blank.set_(storage, 0, size, (1,))  # type: ignore[arg-type, unused-ignore]
        found: dict[str, Tensor] = {}
        for view, strides, names in self.parts:
            tensor = flat[view.file, view.saved].as_strided(view.shape, strides, view.first)
            if tensor.nbytes > _LARGE:
                tensor.view(-1).view(torch.uint8)[::_PAGE].sum()
            if view.wanted != view.saved or device != "cpu":
                tensor = tensor.to(device=device, dtype=view.wanted)
            for name in names:
                found[name] = tensor
        return found


def _read_whole(
    path: str, revision: str | None, dtype: str, device: str, names: frozenset[str]
) -> Mapping[str, Tensor]:
    owned = _places(load_causal_lm(path, revision=revision, dtype=dtype).to(device))
    return {name: owned[name].detach() for name in names}
