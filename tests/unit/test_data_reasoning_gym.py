from __future__ import annotations

import builtins
import inspect
import json

import pytest
import yaml

from moteach.data import prompts as prompts_module
from moteach.data import reasoning_gym as module
from moteach.data import sampling as sampling_module
from moteach.data.base import PromptSource, text_key
from moteach.data.reasoning_gym import ReasoningGymPrompts
from moteach.errors import ConfigError, DataError, MissingDependencyError, UnknownChoiceError
from moteach.paths import conf_dir
from moteach.testing import CHAT_TEMPLATE, tiny_tokenizer
from moteach.types import Prompt
from moteach.verifiers.reasoning_gym import ReasoningGymVerifier

pytest.importorskip("reasoning_gym")

TASKS = {"math": ["chain_sum", "basic_arithmetic"], "code": ["spell_backward"]}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def loaded(tokenizer):
    source = ReasoningGymPrompts(
        tasks=TASKS, train_size=31, evaluation_size=10, configs={"chain_sum": {"max_terms": 2}}
    )
    return source.load(tokenizer, verifiers=["reasoning_gym"])


def _tasks(prompts):
    return [prompt.metadata["reasoning_gym"]["task"] for prompt in prompts]


def test_sizes_are_per_domain_and_spread_over_tasks(loaded):
    assert isinstance(ReasoningGymPrompts(tasks=TASKS), PromptSource)
    assert loaded.domains == ("math", "code")
    assert _tasks(loaded.train) == ["chain_sum"] * 16 + ["basic_arithmetic"] * 15 + ["spell_backward"] * 31
    assert _tasks(loaded.evaluation) == ["chain_sum"] * 5 + ["basic_arithmetic"] * 5 + ["spell_backward"] * 10
    assert {p.domain for p in loaded.train if p.metadata["reasoning_gym"]["task"] == "spell_backward"} == {"code"}


def test_train_and_evaluation_share_no_text_and_no_id(loaded):
    everything = [*loaded.train, *loaded.evaluation]
    assert len({p.prompt_id for p in everything}) == len({text_key(p.text) for p in everything}) == len(everything)


def test_seed_decides_the_prompts(tokenizer):
    def texts(seed):
        source = ReasoningGymPrompts(tasks={"math": ["chain_sum"]}, train_size=5, evaluation_size=2, seed=seed)
        return [p.text for p in source.load(tokenizer).train]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)


def test_task_configs_reach_the_generator(loaded):
    terms = [p.metadata["reasoning_gym"]["entry"]["metadata"]["num_terms"] for p in loaded.train[:16]]
    assert set(terms) == {2}


def test_the_reference_answer_scores_one_and_another_does_not(loaded):
    verifier = ReasoningGymVerifier(exact=True)
    for prompt in loaded.train:
        assert verifier.score(prompt, prompt.answer) == 1.0
        assert verifier.score(prompt, f"<think>99</think> so <answer> {prompt.answer} </answer>") == 1.0
        assert verifier.score(prompt, f"{prompt.answer}17") == 0.0


def test_partial_scores_of_the_task_are_kept_unless_exact_is_asked(loaded):
    prompt = loaded.train[0]
    nearly = f"the result is {prompt.answer}"
    assert 0.0 < ReasoningGymVerifier().score(prompt, nearly) < 1.0
    assert ReasoningGymVerifier(exact=True).score(prompt, nearly) == 0.0


def test_prompts_survive_json_and_still_score(loaded):
    prompt = loaded.train[-1]
    metadata = json.loads(json.dumps(prompt.metadata))
    again = Prompt(prompt_id="x", text=prompt.text, token_ids=prompt.token_ids, metadata=metadata)
    assert ReasoningGymVerifier().score(again, prompt.answer) == 1.0


def test_the_verifier_refuses_prompts_of_another_source():
    with pytest.raises(DataError, match=r"expected metadata\.reasoning_gym .* in prompt 'x', got \['family'\]"):
        ReasoningGymVerifier().score(Prompt(prompt_id="x", text="", token_ids=(3,), metadata={"family": "add"}), "1")


def test_questions_go_through_the_chat_template_with_instruction_and_system_prompt():
    source = ReasoningGymPrompts(
        tasks={"math": ["chain_sum"]},
        train_size=1,
        evaluation_size=1,
        instruction="result only.",
        system_prompt="be brief",
    )
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    prompt = source.load(tokenizer).train[0]
    question = prompt.metadata["reasoning_gym"]["entry"]["question"]
    assert prompt.text == f"<s>be brief\n<u>{question}\nresult only.\n<a>"
    plain = source.load(tiny_tokenizer()).train[0]
    assert plain.text == f"{question}\nresult only."


def test_generators_print_nothing(tokenizer, capsys):
    ReasoningGymPrompts(tasks={"code": ["bf"]}, train_size=3, evaluation_size=1).load(tokenizer)
    assert capsys.readouterr().out == ""


def test_a_task_that_runs_out_of_questions_says_so(tokenizer):
    source = ReasoningGymPrompts(
        tasks={"math": ["chain_sum"]},
        train_size=300,
        evaluation_size=5,
        configs={"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
    )
    with pytest.raises(DataError, match=r"'chain_sum': expected 300 different train questions, got \d+ in 1500 draws"):
        source.load(tokenizer)


def test_an_unknown_task_is_answered_with_the_nearest(tokenizer):
    source = ReasoningGymPrompts(tasks={"math": ["chain_sums"]})
    with pytest.raises(UnknownChoiceError, match="got 'chain_sums'; did you mean 'chain_sum'"):
        source.load(tokenizer)


@pytest.mark.parametrize("config", [{"max_term": 3}, {"max_terms": -1}])
def test_a_config_the_task_refuses_is_reported(config, tokenizer):
    source = ReasoningGymPrompts(tasks={"math": ["chain_sum"]}, configs={"chain_sum": config})
    with pytest.raises(ConfigError, match=r"data\.configs\.chain_sum: reasoning-gym refuses"):
        source.load(tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": {}}, "at least one task for every domain"),
        ({"tasks": {"math": []}}, "at least one task for every domain"),
        ({"tasks": TASKS, "train_size": 0}, r"data\.train_size: expected at least 1, got 0"),
        ({"tasks": TASKS, "configs": {"chain_sun": {}}}, "got 'chain_sun'; did you mean 'chain_sum'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReasoningGymPrompts(**settings)


def test_a_missing_package_is_answered_with_the_command(monkeypatch, tokenizer):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "reasoning_gym":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingDependencyError, match=r"pip install 'moteach\[reasoning-gym\]'"):
        ReasoningGymPrompts(tasks=TASKS).load(tokenizer)
    prompt = Prompt(
        prompt_id="x", text="", token_ids=(3,), metadata={"reasoning_gym": {"task": "gcd", "config": {}, "entry": {}}}
    )
    with pytest.raises(MissingDependencyError, match=r"pip install 'moteach\[reasoning-gym\]'"):
        ReasoningGymVerifier().score(prompt, "1")


@pytest.mark.parametrize(
    ("option", "component"),
    [
        ("data/jsonl", prompts_module.JsonlPrompts),
        ("data/hf", prompts_module.HFPrompts),
        ("data/reasoning_gym", module.ReasoningGymPrompts),
        ("sampler/fixed", sampling_module.FixedMixture),
    ],
)
def test_yaml_lists_every_constructor_argument(option, component):
    settings = yaml.safe_load((conf_dir() / f"{option}.yaml").read_text())
    assert settings.pop("_target_") == f"{component.__module__}.{component.__name__}"
    assert settings.keys() == inspect.signature(component).parameters.keys()
