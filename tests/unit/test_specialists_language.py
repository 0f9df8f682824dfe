"""Fine-tuning a language model on reasoning-gym, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moteach.catalogue.modeling import load_causal_lm, load_tokenizer
from moteach.catalogue.registry import scan_catalogue
from moteach.catalogue.spec import ExpertSpec
from moteach.data.reasoning_gym import ReasoningGymPrompts
from moteach.errors import ConfigError, DataError
from moteach.paths import conf_dir
from moteach.specialists.language import REPORT, LanguageRecipe, fine_tune, specialize_language_model
from moteach.testing import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

pytest.importorskip("reasoning_gym", reason="pip install 'moteach[reasoning-gym]'")

DATA = {
    "tasks": {"math": ["basic_arithmetic"]},
    "configs": {
        "basic_arithmetic": {
            "min_terms": 2,
            "max_terms": 2,
            "min_digits": 1,
            "max_digits": 1,
            "operators": ["+"],
            "allow_parentheses": False,
            "format_style": "simple",
        }
    },
    "train_size": 60,
    "evaluation_size": 10,
}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    tiny_model(hidden=32, layers=3, vocab_size=96).save_pretrained(folder)
    tiny_tokenizer(vocab_size=96, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def _spec(start: Path, tmp_path: Path, **changes: Any) -> ExpertSpec:
    recipe = {
        "kind": "language",
        "start": str(start),
        "output": str(tmp_path / "out" / "sums"),
        "data": DATA,
        "max_steps": 30,
        "cooldown_steps": 5,
        "validate_every": 10,
        "validation_size": 8,
        "learning_rate": 3e-3,
        **changes,
    }
    return ExpertSpec(name="sums", recipe=recipe, domains=["math"])


def test_it_writes_a_model_that_opens_and_has_learned(start: Path, tmp_path: Path) -> None:
    seen = []

    def measure(model: Any, tokenizer: Any, prompts: Any) -> list[float]:
        """Logprob of the first answer token of each prompt."""
        found = []
        for prompt in prompts:
            with torch.no_grad():
                logits = model(torch.tensor([prompt.token_ids])).logits[0, -1]
            first = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"][0]
            found.append(float(logits.float().log_softmax(dim=-1)[first]))
        return found

    report = specialize_language_model(_spec(start, tmp_path), measure=measure, report=seen.append)
    assert report.steps == 35
    assert len(seen) == 1 + 3 + 1  # before, every ten steps, after the cool-down
    assert report.after["basic_arithmetic"] > report.before["basic_arithmetic"] + 1
    folder = tmp_path / "out" / "sums"
    assert report.output == folder
    assert {p.dtype for p in load_causal_lm(str(folder), dtype="auto").parameters()} == {torch.bfloat16}
    assert load_tokenizer(str(folder)).chat_template == CHAT_TEMPLATE
    facts = json.loads((folder / REPORT).read_text())
    assert facts["steps"] == 35
    assert facts["recipe"]["data"] == DATA
    assert sorted(path.name for path in folder.parent.iterdir()) == ["sums"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(start: Path, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> torch.Tensor:
        spec = _spec(start, tmp_path, max_steps=2, cooldown_steps=0)
        specialize_language_model(spec, output=tmp_path / name, seed=seed)
        return load_causal_lm(str(tmp_path / name)).model.layers[0].mlp.up_proj.weight

    assert torch.equal(weights("a", 1), weights("b", 1))
    assert not torch.equal(weights("c", 2), weights("d", 1))


def test_only_the_last_layers_move_when_the_recipe_says_so(start: Path, tmp_path: Path) -> None:
    spec = _spec(start, tmp_path, trained_layers=1, dtype="float32")
    specialize_language_model(spec)
    before, after = load_causal_lm(str(start)), load_causal_lm(spec.weights)
    moved = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved
    assert all(name.startswith(("model.layers.2.", "model.norm.")) for name in moved)


def test_an_expert_that_is_there_is_replaced(start: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "sums"
    output.mkdir(parents=True)
    (output / "old.txt").write_text("old")
    specialize_language_model(_spec(start, tmp_path, max_steps=1, cooldown_steps=0))
    assert not (output / "old.txt").exists()
    assert (output / REPORT).is_file()


def test_training_stops_when_the_validation_prompts_are_right(start: Path, tmp_path: Path) -> None:
    spec = _spec(start, tmp_path, lowest=0.0, cooldown_steps=0)
    assert specialize_language_model(spec).steps == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_step": 3}, "there is no key 'max_step'; did you mean 'max_steps'"),
        ({"batch_size": 0}, "recipe.batch_size: expected at least 1, got 0"),
        ({"trained_layers": 0}, "recipe.trained_layers: expected at least 1"),
        ({"trained_layers": 9}, "recipe.trained_layers: expected at most 3, got 9"),
        ({"dtype": "float16"}, "recipe.dtype: got 'float16'"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(
    start: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        specialize_language_model(_spec(start, tmp_path, **changes))
    assert not (tmp_path / "out" / "sums").exists()


def test_a_recipe_names_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.start: expected a value"):
        LanguageRecipe.of({"kind": "language", "output": "x", "data": {}})


def test_a_task_with_fewer_prompts_than_the_stop_rule_takes_is_refused(start: Path, tmp_path: Path) -> None:
    recipe = LanguageRecipe.of(_spec(start, tmp_path, validation_size=60).recipe)
    tokenizer = load_tokenizer(str(start))
    prompts = ReasoningGymPrompts(**DATA).load(tokenizer)
    with pytest.raises(DataError, match="more than validation_size=60 prompts of 'basic_arithmetic', got 60"):
        fine_tune(load_causal_lm(str(start)), tokenizer, prompts, recipe)


def test_the_smollm2_experts_never_train_on_the_held_out_prompts_of_the_experiment() -> None:
    shipped = yaml.safe_load((conf_dir() / "data" / "smollm2.yaml").read_text())
    del shipped["_target_"]
    tokenizer = tiny_tokenizer(vocab_size=96, chat_template=CHAT_TEMPLATE)
    held_out = {prompt.prompt_id for prompt in ReasoningGymPrompts(**shipped).load(tokenizer).evaluation}
    assert len(held_out) == 2 * shipped["evaluation_size"]
    experts = scan_catalogue().experts
    for name in ("smollm2_math", "smollm2_code"):
        recipe = LanguageRecipe.of(experts[name].recipe)
        (domain,) = experts[name].domains
        assert recipe.data["tasks"] == {domain: shipped["tasks"][domain]}
        own = ReasoningGymPrompts(**recipe.data).load(tokenizer)
        assert {prompt.prompt_id for prompt in own.evaluation} <= held_out
        assert not held_out & {prompt.prompt_id for prompt in own.train}
