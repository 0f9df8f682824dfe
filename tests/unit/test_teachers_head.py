from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moteach.errors import MissingFileError
from moteach.teachers.head import _from_folder, load_head
from moteach.testing import tiny_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_head_is_that_of_the_model_whatever_name_it_is_saved_under(tmp_path: Path, tied: bool, dtype: str) -> None:
    model = tiny_model(seed=4, tied=tied)
    model.save_pretrained(tmp_path)
    head = load_head(str(tmp_path), dtype=dtype)
    expected = model.get_output_embeddings().weight.detach()
    assert torch.equal(head.weight, expected.to(torch.bfloat16) if dtype == "bfloat16" else expected)
    assert torch.equal(expected, model.get_input_embeddings().weight) == tied
    assert not head.weight.requires_grad
    assert (head.bias, head.scale, head.softcap) == (None, 1.0, None)


def test_only_the_head_is_read_of_a_folder(tmp_path: Path) -> None:
    model = tiny_model(seed=4, tied=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_head(str(tmp_path)).weight, tensors["lm_head.weight"])


def test_scaling_and_softcap_of_the_family_come_with_the_head(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0}
    Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=30.0)).save_pretrained(tmp_path / "gemma")
    GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0)).save_pretrained(tmp_path / "granite")
    assert load_head(str(tmp_path / "gemma")).softcap == 30.0
    assert load_head(str(tmp_path / "granite")).scale == 0.25


def test_weights_saved_under_unknown_names_are_found_by_loading_the_model(tmp_path: Path) -> None:
    model = tiny_model(seed=4, tied=False)
    model.save_pretrained(tmp_path)
    assert _from_folder(tmp_path, "float32") is not None
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["other.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert _from_folder(tmp_path, "float32") is None


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        load_head(str(tmp_path / "nowhere"))
