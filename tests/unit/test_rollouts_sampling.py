from __future__ import annotations

import hashlib

import pytest
import torch

from moteach.rollouts.sampling import keyed_uniforms, pick_tokens, prompt_key, truncate


def _splitmix(word: int) -> int:
    mask = (1 << 64) - 1
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def _uniform_by_hand(seed: int, step: int, prompt_id: str, sample: int, position: int) -> float:
    mask, golden, mix = (1 << 64) - 1, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
    key = int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "little")
    state = 0
    for word in (seed, step, key, sample, position):
        word &= mask
        state = _splitmix(_splitmix((state + golden) & mask) ^ ((word * golden + mix) & mask))
    return ((state >> 12) + 0.5) / 2**52


def test_noise_is_the_documented_hash_of_its_key():
    noise = keyed_uniforms(seed=7, step=3, prompt_ids=["a", "b"], samples=[0, 5], length=4)
    for row, (prompt_id, sample) in enumerate([("a", 0), ("b", 5)]):
        for position in range(4):
            assert noise[row, position].item() == _uniform_by_hand(7, 3, prompt_id, sample, position)


def test_negative_and_huge_key_words_are_taken_modulo_two_to_the_64():
    left = keyed_uniforms(seed=-1, step=2**64 + 5, prompt_ids=["a"], samples=[0], length=3)
    right = keyed_uniforms(seed=2**64 - 1, step=5, prompt_ids=["a"], samples=[0], length=3)
    assert torch.equal(left, right)


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"prompt_ids": ["b"]}, {"samples": [1]}])
def test_every_word_of_the_key_changes_the_noise(change):
    key = {"seed": 0, "step": 0, "prompt_ids": ["a"], "samples": [0]}
    left = keyed_uniforms(**key, length=64)
    right = keyed_uniforms(**{**key, **change}, length=64)
    assert not (left == right).any()


def test_prompt_key_is_the_same_on_every_machine():
    assert prompt_key("math-3f2a") == 15377811890351181195


def test_noise_is_uniform_and_uncorrelated_along_every_axis_of_the_key():
    ids = [f"p{i}" for i in range(200)]
    by_prompt = keyed_uniforms(seed=0, step=0, prompt_ids=ids, samples=[0] * 200, length=200)
    by_sample = keyed_uniforms(seed=0, step=0, prompt_ids=["a"] * 200, samples=list(range(200)), length=200)
    for noise in (by_prompt, by_sample):
        counts = torch.histc(noise, bins=64, min=0, max=1)
        expected = noise.numel() / 64
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 103  # 99.9 % point of 63 degrees of freedom
        for shifted in (noise.roll(1, 0), noise.roll(1, 1)):
            correlation = torch.corrcoef(torch.stack([noise.flatten(), shifted.flatten()]))[0, 1]
            assert abs(float(correlation)) < 0.02


def test_noise_stays_inside_the_open_interval():
    noise = keyed_uniforms(seed=0, step=0, prompt_ids=["a"] * 1000, samples=list(range(1000)), length=200)
    assert 0.0 < float(noise.min()) < 1e-4
    assert 1 - 1e-4 < float(noise.max()) < 1.0


def test_inverse_cdf_walks_the_vocabulary_in_order():
    probs = torch.tensor([[0.5, 0.25, 0.0, 0.25]])
    noise = torch.tensor([0.0001, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = pick_tokens(probs.log().repeat(6, 1), noise)
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3]
    torch.testing.assert_close(logprobs.exp(), probs[0].double()[tokens])


def test_a_token_of_probability_zero_never_comes_out():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, 50, generator=generator)
    logits[:, -5:] = -torch.inf
    edge = torch.full((4096,), 1 - 2.0**-53, dtype=torch.float64)
    tokens, logprobs = pick_tokens(logits, edge)
    assert int(tokens.max()) == 44
    assert torch.isfinite(logprobs).all()


def test_temperature_divides_the_logits():
    logits = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens, logprobs = pick_tokens(logits, noise, temperature=0.5)
    expected = (logits.double() * 2).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


def test_greedy_takes_the_argmax_and_reports_the_untempered_logprob():
    logits = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = pick_tokens(logits, torch.full((8,), 0.5).double(), temperature=0.0, top_k=1)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.double().log_softmax(-1).amax(-1))


def test_top_k_keeps_the_k_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert truncate(logits, top_k=2, top_p=1.0).tolist() == [[-torch.inf, 3.0, -torch.inf, 2.0]]
    assert torch.equal(truncate(logits, top_k=0, top_p=1.0), logits)
    assert torch.equal(truncate(logits, top_k=9, top_p=1.0), logits)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [3]), (0.55, [1, 3]), (0.75, [1, 3]), (0.85, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = torch.tensor([[0.15, 0.3, 0.05, 0.5]]).log()
    assert truncate(logits, top_k=0, top_p=top_p)[0].isfinite().nonzero()[:, 0].tolist() == kept


def test_truncated_logprobs_are_those_of_the_actual_sampler():
    logits = torch.tensor([[0.15, 0.3, 0.05, 0.5]]).log()
    tokens, logprobs = pick_tokens(logits, torch.tensor([0.1], dtype=torch.float64), top_k=2)
    assert tokens.tolist() == [1]
    assert logprobs.exp().item() == pytest.approx(0.3 / 0.8)


def test_large_vocabularies_are_processed_in_chunks_without_changing_the_result(monkeypatch):
    logits = torch.randn(10, 30, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = pick_tokens(logits, noise)
    monkeypatch.setattr("moteach.rollouts.sampling._CHUNK_ELEMENTS", 90)
    parts = pick_tokens(logits, noise)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
