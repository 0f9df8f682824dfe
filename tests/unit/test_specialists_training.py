from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moteach.specialists.recipe as recipe_module
from moteach.data.arena.tokenizer import build_tokenizer
from moteach.errors import ConfigError, DataError, UnknownChoiceError
from moteach.specialists.examples import ExampleMaker, collate
from moteach.specialists.grpo import GRPOSettings, group_advantages, policy_gradient_loss, train_grpo
from moteach.specialists.measure import accuracy
from moteach.specialists.recipe import Recipe, new_model, recipe_for, specialize
from moteach.specialists.sft import SFTSettings, supervised_backward, train_supervised
from moteach.types import Prompt, Rollout, RolloutBatch

EOS = 1


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def maker(tokenizer):
    return ExampleMaker(tokenizer)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=86,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=32,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=EOS,
            bos_token_id=None,
            initializer_range=0.1,
        )
    )


def learned_text(example, tokenizer) -> str:
    return tokenizer.decode([t for t, learned in zip(example.token_ids, example.learned, strict=True) if learned])


def test_an_example_learns_the_completion_and_its_end(maker, tokenizer):
    example = maker("12+30=")
    assert tokenizer.decode(list(example.token_ids)) == "12+30=42<eos>"
    assert learned_text(example, tokenizer) == "42<eos>"


def test_an_expert_learns_only_its_own_steps_of_a_composite(maker, tokenizer):
    assert learned_text(maker("A37 B52?A+B", kinds=["search"]), tokenizer) == "A37+B52="
    assert learned_text(maker("A37 B52?A+B", kinds=["math"]), tokenizer) == "89<eos>"
    assert learned_text(maker("A37 B52?A+B", kinds=["code"]), tokenizer) == ""


def test_examples_are_padded_on_the_right(maker):
    token_ids, learned = collate([maker("1+1="), maker("12+30=")], pad_id=0)
    assert token_ids.shape == (2, 9)
    assert token_ids[0, 6:].tolist() == [0, 0, 0]
    assert learned.sum(dim=1).tolist() == [2, 3]
    assert not learned[0, 6:].any()


def test_a_character_the_tokenizer_lacks_is_refused(tokenizer):
    tokenizer_of_digits = build_tokenizer()
    maker = ExampleMaker(tokenizer_of_digits)
    maker._ids.pop("A")
    with pytest.raises(DataError, match="character-level tokenizer"):
        maker("A37 B52?A+B")


def test_the_gradient_does_not_depend_on_the_micro_batches(maker):
    examples = [maker(text) for text in ("1+1=", "12+30=", 'rev("dbca")', "A37 C80 B52?B", "99+99=")]
    gradients, losses = [], []
    for micro_batches in (1, 3):
        model = tiny_model()
        losses.append(supervised_backward(model, examples, micro_batches=micro_batches, pad_id=0))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_the_supervised_loss_is_the_mean_cross_entropy_of_learned_tokens(maker):
    model, example = tiny_model(), maker("12+30=")
    logprobs = torch.log_softmax(model(torch.tensor([example.token_ids])).logits[0], dim=-1)
    expected = -sum(logprobs[i - 1, example.token_ids[i]] for i in range(6, 9)) / 3
    assert supervised_backward(model, [example], micro_batches=1, pad_id=0) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_forced_accuracy_is_greedy_accuracy(maker, tokenizer):
    model = tiny_model()
    examples = [maker("12+30="), maker("11+11=")]
    settings = SFTSettings(max_steps=80, learning_rate=1e-2, lowest=1.0, validate_every=80, warmup_steps=1)
    train_supervised(model, draw=lambda _: examples[:1], validate=lambda _: {"a": 0.0}, settings=settings, pad_id=0)
    assert accuracy(model, examples[:1], pad_id=0) == 1.0
    assert accuracy(model, examples, pad_id=0) == 0.5
    greedy = model.generate(torch.tensor([example_prompt(examples[0])]), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(greedy[0]) == "12+30=42<eos>"


def example_prompt(example) -> list[int]:
    return [t for t, learned in zip(example.token_ids, example.learned, strict=True) if not learned]


def test_training_stops_when_every_group_is_in_the_band(maker):
    measured = iter([{"a": 0.0, "b": 0.0}, {"a": 0.5, "b": 0.9}, {"a": 0.5, "b": 0.6}, {"a": 0.5, "b": 0.5}])
    settings = SFTSettings(max_steps=50, learning_rate=1e-3, lowest=0.4, highest=0.7, validate_every=2)
    result = train_supervised(
        tiny_model(), draw=lambda _: [maker("1+1=")], validate=lambda _: next(measured), settings=settings, pad_id=0
    )
    assert result.reached
    assert result.steps == 4
    assert result.accuracies == {"a": 0.5, "b": 0.6}


def test_training_that_never_meets_the_stop_rule_says_so(maker):
    settings = SFTSettings(max_steps=3, learning_rate=1e-3, lowest=0.9, cooldown_steps=2)
    result = train_supervised(
        tiny_model(), draw=lambda _: [maker("1+1=")], validate=lambda _: {"a": 0.1}, settings=settings, pad_id=0
    )
    assert not result.reached
    assert result.steps == 5


def test_families_that_lag_get_a_larger_share(maker):
    seen = []

    def draw(shares):
        seen.append(dict(shares))
        return [maker("1+1=")]

    settings = SFTSettings(max_steps=4, learning_rate=1e-3, lowest=0.95, validate_every=1, goal=1.0)
    train_supervised(
        tiny_model(), draw=draw, validate=lambda _: {"weak": 0.1, "strong": 0.9}, settings=settings, pad_id=0
    )
    assert seen[0] == {"weak": 0.5, "strong": 0.5}
    assert seen[3]["weak"] > seen[1]["weak"] > 0.6
    assert all(sum(shares.values()) == pytest.approx(1) for shares in seen)


def test_settings_that_could_never_stop_are_refused():
    with pytest.raises(ConfigError, match="lowest <= highest"):
        SFTSettings(max_steps=1, learning_rate=1e-3, lowest=0.7, highest=0.6)
    with pytest.raises(ConfigError, match="group of one"):
        GRPOSettings(steps=1, group_size=1)


def test_advantages_are_standardised_within_a_group_only():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    advantages = group_advantages(rewards, epsilon=0.0)
    torch.testing.assert_close(advantages[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert advantages[2, 0] == pytest.approx(0.75 / (0.1875**0.5))
    torch.testing.assert_close(group_advantages(rewards)[1], torch.zeros(4))


def rollout(prompt: Prompt, sample: int, ids: tuple[int, ...]) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample=sample,
        completion_ids=ids,
        rollout_logprobs=(0.0,) * len(ids),
        finished=True,
        student_version=0,
    )


def test_the_policy_gradient_raises_rewarded_completions_and_lowers_others():
    model = tiny_model()
    prompt = Prompt(prompt_id="a", text="1+1=", token_ids=(4, 60, 4, 70))
    batch = RolloutBatch.from_rollouts([rollout(prompt, 0, (5, EOS)), rollout(prompt, 1, (6, 7, EOS))], pad_id=0)

    def logprobs():
        with torch.no_grad():
            packed = torch.log_softmax(batch.pack(model(batch.input_ids).logits), dim=-1)
        written = packed.gather(1, batch.token_targets[:, None])[:, 0]
        return float(written[:2].sum()), float(written[2:].sum())

    before = logprobs()
    loss = policy_gradient_loss(model, batch, torch.tensor([1.0, -1.0]))
    assert float(loss.detach()) == pytest.approx(-(before[0] - before[1]) / 5, rel=1e-4)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    after = logprobs()
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_uninformative_groups_leave_the_weights_without_gradient():
    model = tiny_model()
    prompt = Prompt(prompt_id="a", text="1+1=", token_ids=(4, 60, 4, 70))
    batch = RolloutBatch.from_rollouts([rollout(prompt, 0, (5, EOS))], pad_id=0)
    policy_gradient_loss(model, batch, torch.zeros(1)).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_the_verifier_stage_learns_what_is_rewarded(tokenizer):
    from moteach.rollouts.hf import HFEngine

    model = tiny_model()
    prompt = Prompt(prompt_id="a", text="1+1=", token_ids=tuple(tokenizer("1+1=")["input_ids"]))
    wanted = tokenizer("2")["input_ids"][0]
    settings = GRPOSettings(
        steps=30, prompts_per_step=1, group_size=32, learning_rate=1e-2, max_new_tokens=2, temperature=1.0
    )
    result = train_grpo(
        model,
        prompts=[prompt],
        engine=HFEngine(seed=0).bind(model, tokenizer),
        grade=lambda _, ids: float(ids[0] == wanted),
        settings=settings,
    )
    assert len(result.rewards) == 30
    assert sum(result.rewards[:3]) / 3 < 0.3
    assert sum(result.rewards[-3:]) / 3 > 0.8


def test_specializing_is_deterministic_and_changes_only_through_the_seed(tokenizer, monkeypatch):
    # how many texts the final measurement reads does not touch the weights
    monkeypatch.setattr(recipe_module, "measure", partial(recipe_module.measure, count=20))
    settings = SFTSettings(max_steps=3, learning_rate=1e-3, lowest=1.0, validate_every=3)
    weights = []
    for seed in (0, 0, 1):
        recipe = Recipe(domain="math", sft=settings, batch_tokens=200, seed=seed)
        done = specialize(recipe, model=tiny_model(), tokenizer=tokenizer)
        weights.append(torch.cat([p.detach().flatten() for p in done.model.parameters()]))
        assert set(done.accuracies) == {"domains", "families", "steps"}
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_reward_stage_without_an_engine_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="expected a rollout engine"):
        specialize(recipe_for("math"), model=tiny_model(), tokenizer=tokenizer)


def test_recipes_are_known_by_name():
    assert recipe_for("base").kinds == {"math", "code", "search"}
    assert recipe_for("code").kinds == {"code"}
    assert "spell@code" in recipe_for("code").groups
    assert "total" not in recipe_for("base").groups
    with pytest.raises(UnknownChoiceError, match="did you mean 'math'"):
        recipe_for("maths")


def test_a_new_base_is_drawn_from_the_seed(tokenizer):
    first, again, other = (new_model(recipe_for("base", seed=seed), tokenizer) for seed in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert 0.3e6 < sum(parameter.numel() for parameter in first.parameters()) < 0.5e6
