from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_rollouts_hf import TEXTS, _by_key, _engine, _eos_heavy_model, _family

from moteach.errors import ConfigError, UnsupportedCombinationError
from moteach.rollouts import compiled
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer

FAMILIES = ["llama", "qwen3", "gemma3", "eos"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def prompts(tokenizer):
    return tiny_prompts(TEXTS, tokenizer=tokenizer)


@pytest.fixture
def uncompiled(monkeypatch):
    """The functions that are compiled, as they are: what they compute, without the minutes of a compiler."""
    monkeypatch.setattr(compiled, "_compiled_read", compiled._read)
    monkeypatch.setattr(compiled, "_compiled_write", compiled._write)


def _made(name):
    return _eos_heavy_model() if name == "eos" else _family(name)


def _agree(model, tokenizer, prompts, **call):
    eager = _engine(model, tokenizer).generate(prompts, **call)
    fast = _engine(model, tokenizer, compile=True).generate(prompts, **call)
    assert _by_key(fast) == _by_key(eager)
    torch.testing.assert_close(fast.rollout_logprobs, eager.rollout_logprobs, atol=1e-5, rtol=0)
    return _by_key(fast)


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("group_size", [1, 3])
def test_preallocated_keys_and_values_give_the_completions_of_a_growing_cache(
    make, group_size, uncompiled, prompts, tokenizer
):
    model = _made(make)
    some = ([4, 1], [1, 7], [1], [2])  # ragged, one token each, one row of one token, one row
    for chosen in (range(len(prompts)), *some):
        _agree(model, tokenizer, [prompts[i] for i in chosen], step=1, group_size=group_size)


def test_short_prompts_are_read_apart_where_it_saves_padding():
    def parts(*lengths):
        width = max(lengths)
        mask = torch.arange(width)[None, :] >= width - torch.tensor(lengths)[:, None]
        return [(rows.tolist(), columns) for rows, columns in compiled._parts(mask)]

    assert parts(9, 2, 8, 3, 3) == [([0, 2], 9), ([1, 3, 4], 3)]
    assert parts(9, 9, 8, 8) == [([0, 1, 2, 3], 9)]
    assert parts(9, 9, 9, 1) == [([0, 1, 2, 3], 9)]  # one row by itself would be another size
    assert parts(4, 4) == [([0, 1], 4)]


def test_what_is_compiled_is_never_given_one_row_or_one_token_to_read(uncompiled, monkeypatch, prompts, tokenizer):
    seen = []
    for name in ("_compiled_read", "_compiled_write"):
        inner = getattr(compiled, name)
        monkeypatch.setattr(compiled, name, lambda *args, f=inner, n=name: seen.append((n, args[3].shape)) or f(*args))
    engine = _engine(_eos_heavy_model(), tokenizer, compile=True)
    engine.generate(prompts, step=0)
    engine.generate(prompts[1:2], step=0)
    assert min(shape[0] for _, shape in seen) == 2
    assert {shape[1] > 1 for name, shape in seen if name == "_compiled_read"} == {True}
    assert {shape[0] for name, shape in seen if name == "_compiled_write"} > {2}  # finished rows leave the batch


@pytest.mark.slow
def test_two_graphs_serve_every_batch_and_every_weight(prompts, tokenizer):
    counters = torch._dynamo.utils.counters
    model = _made("llama")
    torch._dynamo.reset()
    counters.clear()
    before = _agree(model, tokenizer, prompts, step=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.train()
    model(input_ids=torch.tensor([[4, 5, 6]])).logits.sum().backward()
    after = _agree(model, tokenizer, prompts, step=1)
    assert sum(before[key] != after[key] for key in before) > len(before) / 2
    _agree(model, tokenizer, prompts[:5], step=2, group_size=3)
    _agree(model, tokenizer, prompts[1:2], step=2)
    assert counters["stats"]["unique_graphs"] == 2


def test_logits_that_differ_are_refused(uncompiled, monkeypatch, prompts, tokenizer):
    monkeypatch.setattr(compiled, "_compiled_write", lambda *args: compiled._write(*args) + torch.randn(64))
    with pytest.raises(ConfigError, match=r"expected the logits of LlamaForCausalLM to .* sample from another model"):
        _engine(tiny_model(), tokenizer, compile=True).check(prompts)


def test_a_model_that_remembers_more_than_keys_and_values_is_refused(prompts, tokenizer):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        eos_token_id=1,
    )
    with pytest.raises(UnsupportedCombinationError, match="Lfm2ForCausalLM with LinearAttentionLayer"):
        _engine(Lfm2ForCausalLM(config), tokenizer, compile=True).check(prompts)


def test_a_sharded_student_is_refused(monkeypatch, prompts, tokenizer):
    monkeypatch.setattr(compiled, "sharded_modules", lambda model: [model])
    with pytest.raises(UnsupportedCombinationError, match="expected one process, got LlamaForCausalLM sharded"):
        _engine(tiny_model(), tokenizer, compile=True).check(prompts)


@pytest.mark.slow
def test_without_a_compiler_a_run_ends_in_one_line_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "moteach", "train", "rollout.compile=true", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "InvalidCxxCompiler" in done.stderr
    assert "rollout.compile=false" in done.stderr
    assert not (tmp_path / "run").exists()
