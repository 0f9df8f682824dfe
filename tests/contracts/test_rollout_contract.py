"""Every option of the group `rollout` keeps the promises of `RolloutEngine`."""

from __future__ import annotations

import importlib
import inspect

import pytest
import yaml

from moteach.paths import conf_dir
from moteach.rollouts.base import RolloutEngine
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer

OPTIONS = sorted((conf_dir() / "rollout").glob("*.yaml"))
IN_PROCESS = [path for path in OPTIONS if "vllm" not in path.stem]


def _read(path):
    settings = yaml.safe_load(path.read_text())
    module, _, name = settings.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name), settings


def _build(path):
    engine_class, settings = _read(path)
    settings = {key: 0 if value == "${seed}" else value for key, value in settings.items()}
    return engine_class(**settings).bind(tiny_model(seed=2), tiny_tokenizer())


def _keys(batch):
    return {(r.prompt.prompt_id, r.sample): r.completion_ids for r in batch.rollouts}


def test_the_group_has_the_in_process_engine():
    assert "hf" in {path.stem for path in IN_PROCESS}


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_yaml_lists_every_constructor_argument_with_its_default(path):
    engine_class, settings = _read(path)
    parameters = inspect.signature(engine_class).parameters
    assert settings.keys() == parameters.keys()
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    for key, value in settings.items():
        if parameters[key].default is not inspect.Parameter.empty and value not in ("${seed}", "???"):
            assert value == parameters[key].default, key


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_methods_have_the_arguments_of_the_protocol(path):
    engine_class, _ = _read(path)
    for method in ("generate", "sync"):
        expected = inspect.signature(getattr(RolloutEngine, method)).parameters
        actual = inspect.signature(getattr(engine_class, method)).parameters
        assert [(p.name, p.kind, p.default) for p in expected.values()] == [
            (p.name, p.kind, p.default) for p in list(actual.values())[: len(expected)]
        ]


@pytest.mark.parametrize("path", IN_PROCESS, ids=lambda path: path.stem)
def test_rows_are_prompt_major_and_aligned_with_their_tensors(path):
    prompts = tiny_prompts(["1+1=", "abc", "reverse xyz: "])
    batch = _build(path).generate(prompts, step=3, group_size=2, max_new_tokens=5)
    assert [(r.prompt.prompt_id, r.sample) for r in batch.rollouts] == [
        (p.prompt_id, s) for p in prompts for s in (0, 1)
    ]
    assert batch.num_tokens == sum(len(r.completion_ids) for r in batch.rollouts)
    for row, rollout in enumerate(batch.rollouts):
        assert tuple(batch.input_ids[row][batch.loss_mask[row]].tolist()) == rollout.completion_ids
        assert len(rollout.rollout_logprobs) == len(rollout.completion_ids) <= 5
        assert max(rollout.rollout_logprobs) <= 0.0


@pytest.mark.parametrize("path", IN_PROCESS, ids=lambda path: path.stem)
def test_noise_is_keyed_by_step_prompt_and_sample_only(path):
    prompts = tiny_prompts(["1+1=", "abc", "reverse xyz: "])
    reference = _keys(_build(path).generate(prompts, step=3, group_size=2, max_new_tokens=5))
    assert _keys(_build(path).generate(prompts[::-1], step=3, group_size=2, max_new_tokens=5)) == reference
    alone = [_keys(_build(path).generate([p], step=3, group_size=1, max_new_tokens=5)) for p in prompts]
    assert all(part.items() <= reference.items() for part in alone)
    assert _keys(_build(path).generate(prompts, step=4, group_size=2, max_new_tokens=5)) != reference


@pytest.mark.parametrize("path", IN_PROCESS, ids=lambda path: path.stem)
def test_sync_stamps_the_version(path):
    engine = _build(path)
    engine.sync(tiny_model(seed=9), version=41)
    batch = engine.generate(tiny_prompts(["1+1="]), step=0, temperature=0.0, max_new_tokens=4)
    assert batch.rollouts[0].student_version == 41
    stale = _build(path).generate(tiny_prompts(["1+1="]), step=0, temperature=0.0, max_new_tokens=4)
    assert batch.rollouts[0].rollout_logprobs != stale.rollouts[0].rollout_logprobs
