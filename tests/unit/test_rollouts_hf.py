from __future__ import annotations

import random

import pytest
import torch

from moteach.errors import ConfigError, DataError
from moteach.rollouts.base import RolloutEngine
from moteach.rollouts.hf import HFEngine
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer
from moteach.types import Prompt

TEXTS = ["12+30=", "a", "reverse abc:", "9*9=", "sort 3 1 2 -> ", "max(4,17)=", "7-5=", "x"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3, scale=2.0)


@pytest.fixture
def prompts(tokenizer):
    return tiny_prompts(TEXTS, tokenizer=tokenizer)


def _engine(model, tokenizer, **settings):
    return HFEngine(**{"max_new_tokens": 12, **settings}).bind(model, tokenizer)


def _by_key(batch):
    return {(r.prompt.prompt_id, r.sample): r.completion_ids for r in batch.rollouts}


def _eos_heavy_model(seed=5, probability=0.2):
    """A model whose end-of-sequence token has about this probability everywhere."""
    model = tiny_model(seed=seed, tied=False)
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[1] = torch.logit(torch.tensor(probability)) + torch.log(torch.tensor(63.0))
    model.lm_head = head
    return model


def test_the_engine_satisfies_the_protocol(model, tokenizer):
    assert isinstance(_engine(model, tokenizer), RolloutEngine)


@pytest.mark.parametrize("make", ["llama", "qwen3", "gemma3"])
def test_greedy_equals_transformers_generate_on_ragged_prompts(make, prompts, tokenizer):
    model = _family(make)
    batch = _engine(model, tokenizer).generate(prompts, step=0, temperature=0.0)
    for rollout in batch.rollouts:
        ids = torch.tensor([rollout.prompt.token_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0
        )
        assert rollout.completion_ids == tuple(expected[0, ids.shape[1] :].tolist())


def _family(name):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

    if name == "llama":
        return tiny_model(seed=3, scale=2.0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **shape)).eval()
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(num_hidden_layers=3, layer_types=layers, sliding_window=6, query_pre_attn_scalar=32, **shape)
    ).eval()


@pytest.mark.parametrize("make", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_logprobs_equal_a_teacher_forced_forward(make, temperature, prompts, tokenizer):
    model = _family(make)
    batch = _engine(model, tokenizer, temperature=temperature).generate(prompts, step=1, group_size=3)
    for rollout in batch.rollouts:
        start = len(rollout.prompt.token_ids)
        ids = torch.tensor([rollout.prompt.token_ids + rollout.completion_ids])
        with torch.no_grad():
            logprobs = (model(input_ids=ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
        expected = logprobs.gather(1, ids[0, start:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, atol=1e-5, rtol=1e-5)


def test_samples_do_not_depend_on_order_batch_size_or_company(model, prompts, tokenizer):
    reference = _by_key(_engine(model, tokenizer).generate(prompts, step=4, group_size=2))
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert _by_key(_engine(model, tokenizer).generate(shuffled, step=4, group_size=2)) == reference
    for batch_size in (1, 3, 5):
        engine = _engine(model, tokenizer, batch_size=batch_size)
        assert _by_key(engine.generate(prompts, step=4, group_size=2)) == reference
    for prompt in prompts:
        alone = _by_key(_engine(model, tokenizer).generate([prompt], step=4, group_size=2))
        assert alone.items() <= reference.items()


def test_a_group_extends_a_smaller_group(model, prompts, tokenizer):
    small = _by_key(_engine(model, tokenizer).generate(prompts, step=4, group_size=2))
    large = _by_key(_engine(model, tokenizer).generate(prompts, step=4, group_size=5))
    assert small.items() <= large.items()


def test_step_seed_and_sample_change_the_completions(model, prompts, tokenizer):
    reference = _by_key(_engine(model, tokenizer).generate(prompts, step=0, group_size=2))
    other_step = _by_key(_engine(model, tokenizer).generate(prompts, step=1, group_size=2))
    other_seed = _by_key(_engine(model, tokenizer, seed=1).generate(prompts, step=0, group_size=2))
    assert all(reference[key] != other_step[key] for key in reference)
    assert all(reference[key] != other_seed[key] for key in reference)
    assert all(reference[p.prompt_id, 0] != reference[p.prompt_id, 1] for p in prompts)


def test_rollouts_are_prompt_major_in_the_order_given(model, prompts, tokenizer):
    batch = _engine(model, tokenizer, batch_size=4).generate(prompts, step=0, group_size=3)
    assert [(r.prompt.prompt_id, r.sample) for r in batch.rollouts] == [
        (p.prompt_id, sample) for p in prompts for sample in range(3)
    ]
    for row, rollout in enumerate(batch.rollouts):
        sequence = rollout.prompt.token_ids + rollout.completion_ids
        assert batch.input_ids[row, : len(sequence)].tolist() == list(sequence)
        assert batch.loss_mask[row].sum() == len(rollout.completion_ids)


def test_first_tokens_follow_the_softmax(tokenizer):
    model = tiny_model(seed=1, scale=1.5)
    prompt = tiny_prompts(["12+30="], tokenizer=tokenizer)[0]
    draws = 4000
    batch = _engine(model, tokenizer, max_new_tokens=1, batch_size=draws).generate([prompt], step=0, group_size=draws)
    first = torch.tensor([r.completion_ids[0] for r in batch.rollouts])
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1)
    expected = probs * draws
    frequent = expected >= 5
    counts = torch.bincount(first, minlength=64)
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    expected = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom > 15
    assert chi2 < freedom + 3.1 * (2 * freedom) ** 0.5 + 6  # about the 99.9 % point


def test_a_completion_ends_at_the_first_eos_and_keeps_it(tokenizer, prompts):
    batch = _engine(_eos_heavy_model(), tokenizer).generate(prompts, step=0, group_size=8)
    lengths = [len(r.completion_ids) for r in batch.rollouts]
    assert min(lengths) == 1
    assert max(lengths) == 12
    for rollout in batch.rollouts:
        assert rollout.finished == (rollout.completion_ids[-1] == 1)
        assert 1 not in rollout.completion_ids[:-1]
        assert rollout.finished or len(rollout.completion_ids) == 12
    assert {True, False} == {r.finished for r in batch.rollouts}


def test_dropping_finished_rows_does_not_change_the_others(tokenizer, prompts):
    model = _eos_heavy_model()
    never = _engine(model, tokenizer, compact_at=1.0).generate(prompts, step=0, group_size=8)
    always = _engine(model, tokenizer, compact_at=1e-9).generate(prompts, step=0, group_size=8)
    assert _by_key(never) == _by_key(always)
    torch.testing.assert_close(never.rollout_logprobs, always.rollout_logprobs, atol=1e-5, rtol=0)


def test_finished_rows_leave_the_batch(tokenizer, prompts):
    model = _eos_heavy_model()
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    _engine(model, tokenizer).generate(prompts, step=0, group_size=8)
    handle.remove()
    assert sizes[0] == len(prompts)  # one prefill per prompt, whatever the group size
    assert sizes[1] <= 64
    assert sizes[-1] < 32


def test_several_end_tokens_come_from_the_generation_config(tokenizer, prompts):
    model = tiny_model(seed=3)
    model.generation_config.eos_token_id = [1, *range(10, 30)]
    batch = _engine(model, tokenizer).generate(prompts, step=0, group_size=4)
    assert any(r.finished and r.completion_ids[-1] in range(10, 30) for r in batch.rollouts)
    assert all(not set(r.completion_ids[:-1]) & {1, *range(10, 30)} for r in batch.rollouts)


def test_end_tokens_of_another_vocabulary_are_ignored(tokenizer, prompts):
    model = tiny_model(seed=3)
    model.generation_config.eos_token_id = 14
    batch = _engine(model, tokenizer, max_new_tokens=40).generate(prompts, step=0, group_size=4)
    assert any(14 in r.completion_ids[:-1] for r in batch.rollouts)


def test_training_mode_is_restored_module_by_module_and_dropout_is_off(tokenizer, prompts):
    model = tiny_model(seed=3)
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    handle = model.lm_head.register_forward_hook(lambda head, *_: seen.append((head.training, torch.is_grad_enabled())))
    _engine(model, tokenizer).generate(prompts, step=0)
    handle.remove()
    assert set(seen) == {(False, False)}
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


def test_rollouts_can_be_trained_on(tokenizer, prompts):
    model = tiny_model(seed=3)
    batch = _engine(model, tokenizer).generate(prompts, step=0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    (logits.log_softmax(-1).sum() + batch.rollout_logprobs.sum()).backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_sync_shares_weights_and_stamps_the_version(tokenizer, prompts):
    model = tiny_model(seed=3)
    engine = _engine(model, tokenizer)
    first = engine.generate(prompts, step=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    engine.sync(model, version=17)
    second = engine.generate(prompts, step=0)
    assert {r.student_version for r in first.rollouts} == {0}
    assert {r.student_version for r in second.rollouts} == {17}
    assert _by_key(first) != _by_key(second)


def test_call_arguments_override_the_settings(model, tokenizer, prompts):
    engine = _engine(model, tokenizer)
    assert max(len(r.completion_ids) for r in engine.generate(prompts, step=0, max_new_tokens=3).rollouts) == 3
    greedy = engine.generate(prompts, step=0, temperature=0.0, group_size=2)
    assert all(greedy.rollouts[i].completion_ids == greedy.rollouts[i + 1].completion_ids for i in range(0, 16, 2))


def test_top_k_one_is_greedy_with_logprob_zero(model, tokenizer, prompts):
    greedy = _engine(model, tokenizer).generate(prompts, step=0, temperature=0.0)
    batch = _engine(model, tokenizer, top_k=1).generate(prompts, step=0)
    assert _by_key(batch) == _by_key(greedy)
    assert batch.rollout_logprobs.abs().max() == 0


def test_no_prompts_give_an_empty_batch(model, tokenizer):
    assert len(_engine(model, tokenizer).generate([], step=0)) == 0


def test_a_prompt_longer_than_the_context_is_named(model, tokenizer):
    long = Prompt(prompt_id="law-17", text="", token_ids=(5,) * 250)
    with pytest.raises(DataError, match=r"'law-17' has 250 tokens, expected at most 244 .*context of the student 256"):
        _engine(model, tokenizer).generate([long], step=0)
    _engine(model, tokenizer).generate([long], step=0, max_new_tokens=6)


def test_an_empty_prompt_is_named(model, tokenizer):
    with pytest.raises(DataError, match="'empty-1' has no tokens"):
        _engine(model, tokenizer).generate([Prompt(prompt_id="empty-1", text="", token_ids=())], step=0)


def test_an_unbound_engine_says_how_to_bind_it(prompts):
    with pytest.raises(ConfigError, match=r"engine\.bind\(model, tokenizer\)"):
        HFEngine().generate(prompts, step=0)


def test_a_model_without_an_end_token_is_refused():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="every completion would run to max_new_tokens"):
        HFEngine().bind(model, tokenizer)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens to be a whole number of at least 1, got 0"),
        ({"temperature": -0.1}, "temperature to be a number of at least 0"),
        ({"top_p": 0.0}, r"top_p to be a number in \(0, 1\]"),
        ({"top_k": -1}, "top_k to be"),
        ({"batch_size": 0}, "batch_size to be"),
        ({"compact_at": 1.5}, "compact_at to be"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        HFEngine(**setting)
