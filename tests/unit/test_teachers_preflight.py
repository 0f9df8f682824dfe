from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, DeadTeacherError, IncompatibleTeacherError, MissingFileError
from moteach.objectives.answers import Answers
from moteach.teachers import preflight
from moteach.teachers.preflight import Finding, PreflightLimits, PreflightReport
from moteach.testing import CHAT_TEMPLATE, tiny_model, tiny_prompts, tiny_tokenizer

Save = Callable[..., ExpertSpec]
PROMPTS = tiny_prompts(["1+1=", "abc", "max of 3 4 is "])


@pytest.fixture
def student() -> Any:
    return tiny_model(seed=0, scale=3.0)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def saver(model: Any, tokenizer: Any = None, **fields: Any) -> ExpertSpec:
        model.save_pretrained(tmp_path / "law")
        (tokenizer or tiny_tokenizer()).save_pretrained(tmp_path / "law")
        return ExpertSpec(name="law", model=str(tmp_path / "law"), **fields)

    return saver


def check(*args: Any, max_new_tokens: int = 8, **fields: Any) -> PreflightReport:
    return preflight.check(*args, max_new_tokens=max_new_tokens, **fields)


def finding(report: PreflightReport, name: str) -> Finding:
    (found,) = [finding for finding in report.findings if finding.name == name]
    return found


def noisy(model: Any, amount: float, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def test_a_copy_of_the_student_passes_with_no_divergence_and_full_overlap(save: Save, student: Any) -> None:
    report = check(save(tiny_model(seed=0, scale=3.0)), student, tiny_tokenizer(), PROMPTS, max_new_tokens=8)
    assert report.level == "ok"
    assert report.reverse_kl == pytest.approx(0.0, abs=1e-5)
    assert report.topk_overlap == pytest.approx(1.0)
    assert 3 <= report.probe_tokens <= 24
    report.raise_if_failed()


def test_the_reverse_kl_is_that_of_the_definition_on_the_students_own_continuations(save: Save, student: Any) -> None:
    teacher = tiny_model(seed=1, scale=3.0)
    prompt = PROMPTS[0]
    report = check(save(teacher), student, tiny_tokenizer(), [prompt], max_new_tokens=6, seed=11)
    torch.manual_seed(11)
    ids = student.generate(torch.tensor([prompt.token_ids]), do_sample=True, top_k=0, max_new_tokens=6)
    kept = slice(len(prompt.token_ids) - 1, -1)
    with torch.no_grad():
        mine = student(ids).logits[0, kept].double().log_softmax(-1)
        theirs = teacher(ids).logits[0, kept].double().log_softmax(-1)
    reverse = float((mine.exp() * (mine - theirs)).sum(-1).mean())
    forward = float((theirs.exp() * (theirs - mine)).sum(-1).mean())
    assert abs(reverse - forward) > 0.05
    assert report.reverse_kl == pytest.approx(reverse, rel=1e-4)
    common = [
        len(set(a.topk(16).indices.tolist()) & set(b.topk(16).indices.tolist())) / 16
        for a, b in zip(mine, theirs, strict=True)
    ]
    assert report.topk_overlap == pytest.approx(sum(common) / len(common))


def test_a_teacher_of_the_same_origin_is_nearer_than_a_foreign_one(save: Save, student: Any) -> None:
    near = check(save(noisy(tiny_model(seed=0, scale=3.0), 0.01)), student, tiny_tokenizer(), PROMPTS)
    far = check(save(tiny_model(seed=9, scale=3.0)), student, tiny_tokenizer(), PROMPTS)
    assert near.level == "ok"
    assert near.reverse_kl is not None
    assert far.reverse_kl is not None
    assert 0 < near.reverse_kl < 0.1 < far.reverse_kl
    assert finding(far, "reverse_kl").level == "warn"
    assert "0.04 for a teacher of the same origin and 0.19 for a foreign one" in finding(far, "reverse_kl").message
    assert "no published threshold" in finding(far, "topk_overlap").message
    far.raise_if_failed()
    lenient = PreflightLimits(max_reverse_kl=100.0, min_overlap=0.0)
    assert check(save(tiny_model(seed=9, scale=3.0)), student, tiny_tokenizer(), PROMPTS, limits=lenient).level == "ok"


def test_a_teacher_trained_from_the_students_checkpoint_is_not_foreign_however_far_it_is(
    save: Save, student: Any, tmp_path: Path
) -> None:
    student.save_pretrained(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    card = save(tiny_model(seed=9, scale=3.0), reference=str(tmp_path / "base"))

    def levels(spec: ExpertSpec, place: str | None) -> set[str]:
        limits = PreflightLimits(max_reverse_kl=0.1, min_overlap=1.0)
        report = check(spec, student, tiny_tokenizer(), PROMPTS, limits=limits, student_place=place)
        assert report.reverse_kl is not None
        assert report.reverse_kl > 0.1
        return {finding(report, name).level for name in ("reverse_kl", "topk_overlap")}

    assert levels(card, str(tmp_path / "link")) == {"ok"}
    assert levels(card, str(tmp_path / "law")) == {"warn"}
    assert levels(card, None) == {"warn"}
    assert levels(replace(card, reference=None), str(tmp_path / "base")) == {"warn"}


def test_affinity_is_the_mean_logprob_of_the_answers_under_each_model(save: Save, student: Any) -> None:
    teacher = tiny_model(seed=1, scale=3.0)
    prompts = [replace(prompt, answer=text) for prompt, text in zip(PROMPTS, ("2", "abcd", "4"), strict=True)]
    answers = Answers(tiny_tokenizer())(prompts)
    assert answers is not None
    report = check(save(teacher), student, tiny_tokenizer(), PROMPTS, answers=answers)
    expected = []
    for model in (teacher, student):
        values = []
        for row in answers.rollouts:
            ids = torch.tensor([[*row.prompt.token_ids, *row.completion_ids]])
            with torch.no_grad():
                logprobs = model(ids).logits[0].double().log_softmax(-1)
            before = len(row.prompt.token_ids)
            values += [float(logprobs[t - 1, ids[0, t]]) for t in range(before, ids.shape[1])]
        expected.append((sum(values) / len(values), len(values)))
    found = report.affinity
    assert found is not None
    assert abs(expected[0][0] - expected[1][0]) > 0.05
    assert found.teacher == pytest.approx(expected[0][0], rel=1e-5)
    assert found.student == pytest.approx(expected[1][0], rel=1e-5)
    assert (found.tokens, found.answers) == (expected[0][1], 3)
    assert check(save(teacher), student, tiny_tokenizer(), PROMPTS).affinity is None


def test_one_swapped_id_in_the_vocabulary_is_an_error_though_the_sizes_agree(save: Save, student: Any) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = tiny_tokenizer().backend_tokenizer.to_str()
    swapped = text.replace('"a":13', '"a":99').replace('"b":14', '"b":13').replace('"a":99', '"a":14')
    assert swapped != text
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(swapped), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    report = check(save(tiny_model(seed=0, scale=3.0), other), student, tiny_tokenizer(), PROMPTS)
    assert finding(report, "vocabulary").level == "error"
    assert "2 tokens that differ, first 'a' (student 13, teacher 14)" in finding(report, "vocabulary").message
    assert report.reverse_kl is None
    with pytest.raises(IncompatibleTeacherError, match="would grade another text"):
        report.raise_if_failed()


def test_other_special_tokens_are_an_error(save: Save, student: Any) -> None:
    other = tiny_tokenizer()
    other.eos_token = "<pad>"
    report = check(save(tiny_model(), other), student, tiny_tokenizer(), PROMPTS)
    assert "eos_token_id (student 1, teacher 0)" in finding(report, "special_tokens").message
    assert report.level == "error"


def test_another_chat_template_is_a_warning_with_both_hashes(save: Save, student: Any) -> None:
    spec = save(tiny_model(seed=0, scale=3.0), tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    report = check(spec, student, tiny_tokenizer(), [])
    assert finding(report, "chat_template").level == "warn"
    assert str(report.chat_template_hash) in finding(report, "chat_template").message
    same = check(spec, student, tiny_tokenizer(chat_template=CHAT_TEMPLATE), [])
    assert finding(same, "chat_template").level == "ok"
    assert report.level == "warn"


def test_a_uniform_teacher_is_dead(save: Save, student: Any) -> None:
    teacher = tiny_model(seed=0, tied=False)
    with torch.no_grad():
        teacher.get_parameter("lm_head.weight").mul_(1e-3)
    report = check(save(teacher), student, tiny_tokenizer(), PROMPTS)
    assert finding(report, "scores").level == "error"
    assert report.reverse_kl is None
    with pytest.raises(DeadTeacherError, match=r"uniform distribution \(within 1% of -ln V\)"):
        report.raise_if_failed()


def test_a_teacher_with_broken_weights_is_dead_and_the_other_checks_are_still_reported(
    save: Save, student: Any
) -> None:
    teacher = tiny_model(seed=0)
    with torch.no_grad():
        teacher.get_parameter("model.norm.weight")[:] = math.nan
    report = check(save(teacher), student, tiny_tokenizer(), PROMPTS)
    assert finding(report, "vocabulary").level == "ok"
    with pytest.raises(DeadTeacherError, match="NaN or infinity"):
        report.raise_if_failed()


def test_heads_of_other_sizes_are_cut_or_refused(save: Save, student: Any) -> None:
    larger = check(save(tiny_model(vocab_size=72, scale=3.0)), student, tiny_tokenizer(), PROMPTS, max_new_tokens=4)
    assert finding(larger, "head").level == "warn"
    assert "the 8 rows of padding are left out" in finding(larger, "head").message
    assert larger.reverse_kl is not None
    smaller = check(save(tiny_model(vocab_size=64)), tiny_model(vocab_size=72), tiny_tokenizer(), PROMPTS)
    assert finding(smaller, "head").level == "error"


def test_memory_is_that_of_the_precision_the_teacher_is_loaded_in(save: Save, student: Any) -> None:
    model = tiny_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert check(save(model), student, tiny_tokenizer(), []).memory_bytes == 4 * count
    assert check(save(model, dtype="bfloat16"), student, tiny_tokenizer(), []).memory_bytes == 2 * count


def test_the_check_leaves_the_student_and_the_random_numbers_alone(save: Save, student: Any) -> None:
    student.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    spec = save(tiny_model(seed=1, scale=3.0))
    first = check(spec, student, tiny_tokenizer(), PROMPTS, max_new_tokens=5)
    torch.manual_seed(3)
    second = check(spec, student, tiny_tokenizer(), PROMPTS, max_new_tokens=5)
    assert torch.equal(torch.rand(1), expected)
    assert first == second
    assert student.training


def test_a_revision_that_can_move_is_a_warning() -> None:
    from moteach.teachers.preflight import _origin

    assert _origin(ExpertSpec(name="law", model="o/law"), "o/law").level == "warn"
    assert _origin(ExpertSpec(name="law", model="o/law", revision="main"), "o/law").level == "warn"
    assert _origin(ExpertSpec(name="law", model="o/law", revision="0" * 40), "o/law").level == "ok"


def test_an_expert_that_was_not_trained_yet_is_a_missing_file(tmp_path: Path, student: Any) -> None:
    spec = ExpertSpec(name="law", recipe={"output": str(tmp_path / "not-yet")})
    with pytest.raises(MissingFileError, match="not-yet"):
        check(spec, student, tiny_tokenizer(), PROMPTS)


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"min_overlap in \[0, 1\]"):
        PreflightLimits(min_overlap=2.0)
