"""Generation from a student sharded by FSDP2, with a different amount of work on every rank."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from moteach.rollouts.hf import HFEngine
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer

TEXTS = ["12+30=", "a", "reverse abc:", "9*9="]


def _generate(model, rank):
    prompts = tiny_prompts(TEXTS if rank else TEXTS[:1])
    engine = HFEngine(max_new_tokens=12 if rank else 5).bind(model, tiny_tokenizer())
    return [list(r.completion_ids) for r in engine.generate(prompts, step=0, group_size=2).rollouts]


def _work(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = tiny_model(seed=3)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    completions = _generate(model, rank)
    resharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    model(input_ids=torch.tensor([[4, 5, 6]])).logits.sum().backward()
    gradients = all(parameter.grad is not None for parameter in model.parameters())
    (folder / f"{rank}.json").write_text(json.dumps([completions, resharded, gradients]))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_with_different_work_sample_what_one_process_samples_and_can_train_on(tmp_path):
    multiprocessing.spawn(_work, args=(tmp_path,), nprocs=2)
    for rank in (0, 1):
        completions, resharded, gradients = json.loads((tmp_path / f"{rank}.json").read_text())
        assert completions == _generate(tiny_model(seed=3), rank)
        assert resharded
        assert gradients
