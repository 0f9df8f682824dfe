"""Making an expert again, from the shipped base and the recipe."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moteach.paths import experts_dir
from moteach.rollouts.hf import HFEngine
from moteach.specialists.manifest import manifest_entry, read_manifest, save_specialist, write_manifest
from moteach.specialists.recipe import recipe_for, specialize


@pytest.mark.slow
def test_the_recipe_makes_a_code_expert_again(tmp_path):
    arena = experts_dir() / "arena"
    tokenizer = AutoTokenizer.from_pretrained(arena / "base")
    model = AutoModelForCausalLM.from_pretrained(arena / "base")
    engine = HFEngine(seed=0).bind(model, tokenizer)
    measured = []
    expert = specialize(recipe_for("code"), model=model, tokenizer=tokenizer, engine=engine, report=measured.append)
    assert expert.sft.reached
    assert min(measured[0].values()) < 0.7
    assert expert.accuracies["domains"]["code"] >= 0.97
    assert expert.accuracies["steps"]["spell"]["code"] >= 0.9
    assert expert.grpo is not None
    assert sum(expert.grpo.rewards[-5:]) / 5 >= 0.9

    save_specialist(expert, tmp_path / "code", tokenizer=tokenizer)
    write_manifest(tmp_path, {"code": manifest_entry(expert, tmp_path / "code")})
    again, shipped = read_manifest(tmp_path)["code"], read_manifest(arena)["code"]
    assert again["recipe"] == shipped["recipe"]
    assert again["accuracy"]["domains"]["code"] == pytest.approx(shipped["accuracy"]["domains"]["code"], abs=0.02)
