"""What ships in experts/arena is what the manifest says, and does what the experts are for."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moteach.data.arena.families import FAMILIES
from moteach.data.arena.source import DOMAINS, ArenaSource
from moteach.data.arena.splits import split_of
from moteach.data.arena.tokenizer import build_tokenizer
from moteach.paths import experts_dir
from moteach.rollouts.hf import HFEngine
from moteach.specialists.examples import ExampleMaker
from moteach.specialists.manifest import file_table, read_manifest
from moteach.specialists.measure import accuracy, family_examples
from moteach.specialists.recipe import describe, recipe_for
from moteach.verifiers.arena import ArenaVerifier

ARENA = experts_dir() / "arena"
NAMES = ("base", *DOMAINS)
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(ARENA)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ARENA / "base")


@pytest.fixture(scope="module")
def maker(tokenizer):
    return ExampleMaker(tokenizer)


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(ARENA / name).eval() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_those_of_the_manifest_and_small(manifest, name):
    assert file_table(ARENA / name) == manifest[name]["files"]
    assert sum(entry["size"] for entry in manifest[name]["files"].values()) <= 2 * MEGABYTE
    digest = hashlib.sha256((ARENA / name / "model.safetensors").read_bytes()).hexdigest()
    assert manifest[name]["files"]["model.safetensors"]["sha256"] == digest


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_holds_the_recipe_of_this_version(manifest, name):
    assert manifest[name]["recipe"] == json.loads(json.dumps(describe(recipe_for(name))))
    assert manifest[name]["stages"]["supervised"]["stop_rule_met"]


@pytest.mark.parametrize("name", NAMES)
def test_every_folder_has_the_same_tokenizer(name):
    loaded = AutoTokenizer.from_pretrained(ARENA / name)
    assert loaded.get_vocab() == build_tokenizer().get_vocab()


def test_the_tokenizer_restores_every_arena_prompt(tokenizer):
    for prompt in ArenaSource(composite_size=200).load(tokenizer).evaluation:
        assert tokenizer.decode(list(prompt.token_ids)) == prompt.text
        assert tokenizer.unk_token_id not in prompt.token_ids
        assert len(prompt.token_ids) == len(prompt.text)


def of_family(model, maker, family, *, count=70, kinds=None):
    examples = family_examples(maker, family, count=count, split="evaluation", kinds=kinds)
    return accuracy(model, examples, pad_id=0)


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_expert_is_right_on_its_own_domain_and_the_base_half_of_the_time(models, maker, domain):
    families = [family.name for family in FAMILIES.values() if family.domain == domain and not family.auxiliary]
    expert = [of_family(models[domain], maker, family) for family in families]
    base = [of_family(models["base"], maker, family, count=300) for family in families]
    assert sum(expert) / len(expert) >= 0.95
    assert all(0.3 < value < 0.7 for value in base)
    assert sum(expert) / len(expert) - sum(base) / len(base) >= 0.25


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_expert_is_worse_than_its_base_elsewhere(manifest, domain):
    expert, base = manifest[domain]["accuracy"]["domains"], manifest["base"]["accuracy"]["domains"]
    assert all(expert[other] < base[other] for other in DOMAINS if other != domain)


@pytest.mark.parametrize(("family", "kinds"), [("total", ("search", "math")), ("spell", ("search", "code"))])
def test_inside_composites_each_expert_owns_its_steps(models, maker, family, kinds):
    for kind in kinds:
        owner = of_family(models[kind], maker, family, count=100, kinds=[kind])
        assert owner >= 0.9
        for other in DOMAINS:
            if other != kind:
                assert of_family(models[other], maker, family, count=100, kinds=[kind]) <= owner - 0.3


def test_no_single_expert_solves_composites(manifest):
    for name in NAMES:
        assert manifest[name]["accuracy"]["domains"]["composite"] < 0.5


def test_the_measured_accuracy_is_that_of_real_greedy_generation(models, manifest, tokenizer):
    prompts = [p for p in ArenaSource(evaluation_size=90).load(tokenizer).evaluation if p.domain == "math"]
    batch = HFEngine(max_new_tokens=16).bind(models["math"], tokenizer).generate(prompts, step=0, temperature=0.0)
    verifier = ArenaVerifier()
    scores = torch.tensor(
        [
            verifier.score(r.prompt, tokenizer.decode(list(r.completion_ids), skip_special_tokens=True))
            for r in batch.rollouts
        ]
    )
    assert float(scores.mean()) >= 0.93
    assert float(scores.mean()) == pytest.approx(manifest["math"]["accuracy"]["domains"]["math"], abs=0.06)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_card_and_its_exemplars_point_at_the_model(domain):
    card = yaml.safe_load((experts_dir() / f"{domain}.yaml").read_text())
    assert card["domains"] == [domain]
    assert (experts_dir() / card["model"] / "model.safetensors").is_file()
    assert (experts_dir() / card["reference"] / "model.safetensors").is_file()
    lines = (experts_dir() / card["exemplars"]).read_text().splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    assert len(set(texts)) == 64
    assert {split_of(text) for text in texts} == {"train"}
