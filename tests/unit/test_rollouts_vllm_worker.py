"""The part that runs inside a server, with a stand-in for vLLM's life-cycle of a reload."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moteach.rollouts.vllm_worker import WeightLoader


class Packing:
    """Like vLLM's linears on a CPU: what is computed with is a copy, made after loading."""

    def process_weights_after_loading(self, module: Any) -> None:
        packed = module.weight.detach().clone()
        module.cpu_linear = lambda x: x @ packed.T


class Served(nn.Module):
    """A model whose head shares the embedding's weight and is packed apart from it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.packing = Packing()
        self.head.quant_method = self.packing
        self.packing.process_weights_after_loading(self.head)
        self.emptied = nn.Linear(3, 5, bias=False)
        self.emptied.weight = nn.Parameter(torch.empty(0))
        self.emptied.cpu_linear = None

    def load_weights(self, tensors: Any) -> None:
        for name, value in tensors:
            assert name == "embedding.weight"
            self.embedding.weight.data.copy_(value)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    reload = types.ModuleType("vllm.model_executor.model_loader.reload")
    reload.initialize_layerwise_reload = lambda model: found.append("begin")  # type: ignore[attr-defined]
    reload.finalize_layerwise_reload = lambda model, config: found.append(f"end {config}")  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, reload.__name__, reload)
    return found


def loader(model: nn.Module) -> WeightLoader:
    made = WeightLoader()
    made.model_runner = types.SimpleNamespace(get_model=lambda: model, model_config="config")
    return made


def test_a_tied_head_computes_with_the_new_weights(calls: list[str], tmp_path: Path) -> None:
    model = Served()
    new = torch.randn(5, 3)
    save_file({"embedding.weight": new}, tmp_path / "model.safetensors")
    assert loader(model).moteach_load(str(tmp_path)) == {"tensors": 1}
    assert calls == ["begin", "end config"]
    x = torch.randn(2, 3)
    assert torch.equal(model.head.cpu_linear(x), x @ new.T)


def test_a_folder_without_weights_is_refused_before_anything_is_touched(calls: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is the folder shared"):
        loader(Served()).moteach_load(str(tmp_path))
    assert calls == []


def test_the_server_needs_none_of_our_dependencies() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('jaxtyping', 'transformers', 'hydra', 'httpx', 'tenacity')));"
        "import moteach.rollouts.vllm_worker"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
