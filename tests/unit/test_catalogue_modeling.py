from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from moteach.catalogue.modeling import (
    body_and_head,
    check_head,
    hidden_states,
    load_causal_lm,
    load_tokenizer,
    weights_bytes,
)
from moteach.divergences.projection import project
from moteach.errors import ConfigError, IncompatibleTeacherError, MissingFileError
from moteach.testing import tiny_model, tiny_tokenizer

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, final_logit_softcapping=3.0, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, final_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=4.0),
    "cohere": lambda: CohereConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, logit_scale=0.0625),
    "hyperclovax": lambda: AutoConfig.for_model("hyperclovax", **SHAPE, logits_scaling=0.25),
    "minicpm3": lambda: AutoConfig.for_model(
        "minicpm3",
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        dim_model_base=8,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4),
}


def model_of(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_body_and_head_give_the_logits_of_the_model_in_every_family(family: str) -> None:
    model = model_of(FAMILIES[family]())
    ids = torch.randint(2, 48, (3, 7), generator=torch.Generator().manual_seed(1))
    body, head = body_and_head(model)
    hidden = hidden_states(body, ids)
    logits = model(input_ids=ids).logits
    rebuilt = project(hidden.flatten(0, 1), head).view_as(logits)
    assert logits.std() > 0.05
    torch.testing.assert_close(rebuilt, logits, rtol=1e-5, atol=1e-5)
    check_head(model, name=family)


def test_the_output_scaling_of_each_family_is_read_in_its_own_direction() -> None:
    scaling = {
        name: body_and_head(model_of(FAMILIES[name]()))[1] for name in ("granite", "cohere", "gemma2", "hyperclovax")
    }
    assert {name: (head.scale, head.softcap) for name, head in scaling.items()} == {
        "granite": (0.25, None),
        "cohere": (0.0625, None),
        "gemma2": (1.0, 3.0),
        "hyperclovax": (0.25, None),
    }


@torch.no_grad()
def test_the_bias_of_a_head_is_part_of_it() -> None:
    model = model_of(LlamaConfig(**SHAPE))
    model.lm_head = torch.nn.Linear(32, 48, bias=True)
    torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.arange(2, 9)[None]
    body, head = body_and_head(model)
    hidden = hidden_states(body, ids)[0]
    torch.testing.assert_close(project(hidden, head), model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)


def test_the_head_is_the_live_parameter() -> None:
    model = tiny_model()
    assert body_and_head(model)[1].weight is model.lm_head.weight


@torch.no_grad()
def test_right_padding_does_not_change_hidden_states() -> None:
    model = tiny_model(scale=3.0)
    body, _ = body_and_head(model)
    ids = torch.randint(2, 60, (1, 6), generator=torch.Generator().manual_seed(0))
    alone = hidden_states(body, ids)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(hidden_states(body, padded)[:, :6], alone, rtol=1e-5, atol=1e-5)


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    class Odd(type(tiny_model())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    odd = Odd(tiny_model(scale=3.0).config)
    with pytest.raises(IncompatibleTeacherError, match=r"'odd-one' .*apart.*support=topk"):
        check_head(odd, name="odd-one")


def test_a_check_leaves_the_mode_of_the_model_alone() -> None:
    model = tiny_model().train()
    check_head(model, name="x")
    assert model.training


def test_a_model_without_a_linear_output_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear output layer, got LlamaModel"):
        body_and_head(tiny_model().model)


def test_a_saved_model_is_opened_in_the_precision_that_was_asked_for(tmp_path: Path) -> None:
    tiny_model(seed=1).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path)).dtype == torch.float32
    assert load_causal_lm(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16
    assert load_causal_lm(str(tmp_path), dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        load_causal_lm(str(tmp_path), dtype="float31")


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"got pytorch_model.bin; reading a pickle runs whatever its author"):
        load_causal_lm(str(tmp_path))


def test_a_folder_without_weights_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(MissingFileError, match=r"weights \(\*.safetensors\).*got none"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(MissingFileError, match="got nothing there"):
        load_causal_lm(str(tmp_path / "nowhere"))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nclass EvilConfig: pass\nclass Evil: pass\n"
    )
    auto = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(ConfigError, match="without code of its own"):
        load_causal_lm(str(tmp_path))
    assert not ran.exists()


def test_memory_is_read_from_the_headers_alone(tmp_path: Path) -> None:
    model = tiny_model(tied=False)
    model.save_pretrained(tmp_path)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert weights_bytes(str(tmp_path)) == 4 * count
    assert weights_bytes(str(tmp_path), dtype="bfloat16") == 2 * count
    assert weights_bytes("org/on-the-hub") is None


def test_a_tokenizer_is_opened_with_its_template(tmp_path: Path) -> None:
    from moteach.testing import CHAT_TEMPLATE

    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path)
    opened = load_tokenizer(str(tmp_path))
    assert opened.get_vocab() == tiny_tokenizer().get_vocab()
    assert opened.chat_template == CHAT_TEMPLATE
    with pytest.raises(MissingFileError, match="nothing there"):
        load_tokenizer(str(tmp_path / "nowhere"))
