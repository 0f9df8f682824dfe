from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers_of_their_own import byte_level, sentence_pieces

from moteach.catalogue.spec import ExpertSpec
from moteach.conflict.pools import Linear
from moteach.errors import ConfigError, IncompatibleTeacherError, UnsupportedCombinationError
from moteach.objectives.base import Scored, where_scored
from moteach.objectives.sampled_loss import SampledLossObjective
from moteach.objectives.teaching import Teaching
from moteach.routing.token import PromptGate
from moteach.teachers.aligned import AlignedTeacher
from moteach.teachers.alignment import ByteAlignment, NoAlignment, tokenizer_place
from moteach.teachers.hf import HFTeacher
from moteach.teachers.pool import TeacherPool
from moteach.teachers.reuse import ReusingTeachers
from moteach.testing import tiny_model, tiny_prompts, tiny_tokenizer
from moteach.types import Evidence, Rollout, RolloutBatch, Routing, TeacherEvidence

STUDENT = tiny_tokenizer()
OWN = byte_level()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(seed=3, vocab_size=len(OWN), scale=2.0)


class Held(HFTeacher):
    """A teacher whose weights are already in memory."""

    def __init__(self, model: Any, teacher_id: str = "law") -> None:
        super().__init__(teacher_id=teacher_id, model="unused")
        self._held = model

    @property
    def model(self) -> Any:
        return self._held


def aligned(model: Any, tokenizer: Any = OWN, **given: Any) -> AlignedTeacher:
    return AlignedTeacher(Held(model), tokenizer=tokenizer, student_tokenizer=STUDENT, **given)


def rows(*texts: tuple[str, str], finished: bool = True, tokenizer: Any = STUDENT) -> RolloutBatch:
    """Prompts and completions in the student's tokens; each token has a logprob of its own."""
    found = []
    for index, (prompt, text) in enumerate(texts):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *([tokenizer.eos_token_id] if finished else [])]
        found.append(
            Rollout(
                prompt=replace(tiny_prompts([prompt], tokenizer=tokenizer)[0], prompt_id=f"p{index}"),
                sample=0,
                completion_ids=tuple(ids),
                rollout_logprobs=tuple(-0.1 * (place % 5 + 1) for place in range(len(ids))),
                finished=finished,
                student_version=0,
            )
        )
    return RolloutBatch.from_rollouts(found, pad_id=0)


@torch.no_grad()
def total_by_hand(model: Any, prompt: str, text: str, *, end: bool) -> float:
    """log T(text and end | prompt), from the model's own logits on its own tokens."""
    start = OWN(prompt, add_special_tokens=False)["input_ids"]
    ids = OWN(text, add_special_tokens=False)["input_ids"] + ([OWN.eos_token_id] if end else [])
    logprobs = model(torch.tensor([start + ids])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logprobs[len(start) + place - 1, token]) for place, token in enumerate(ids))


TEXTS = (("alpha 1+1=", "the answer is 17"), ("beta ", "42"), ("x", "zzqq  17 and"))


@pytest.mark.parametrize("finished", [True, False])
def test_each_completion_gets_the_teachers_logprob_of_its_text(model: Any, finished: bool) -> None:
    batch = rows(*TEXTS, finished=finished)
    said = aligned(model).score(batch, support="sampled")
    assert said.sampled_logprobs is not None
    assert said.tokens.tolist() == list(range(batch.num_tokens))
    assert bool((said.sampled_logprobs <= 0).all())
    for row, (prompt, text) in enumerate(TEXTS):
        mine = batch.token_rows == row
        expected = total_by_hand(model, prompt, text, end=finished)
        assert float(said.sampled_logprobs[mine].double().sum()) == pytest.approx(expected, abs=2e-4)


def test_a_span_is_shared_in_proportion_to_the_student(model: Any) -> None:
    """`answer` is one token of the teacher and six letters of the student."""
    batch = rows(("alpha", " answer"), finished=False)
    (token,) = OWN(" answer", add_special_tokens=False)["input_ids"]
    said = aligned(model).score(batch, support="sampled").sampled_logprobs
    assert said is not None
    own = batch.rollout_logprobs[batch.loss_mask]
    assert token >= 0
    torch.testing.assert_close(said / own, torch.full_like(own, float(said.sum() / own.sum())))


def test_the_same_tokenizer_changes_no_bit() -> None:
    own = tiny_model(seed=4, scale=2.0)
    batch = rows(*TEXTS)
    wrapped = AlignedTeacher(Held(own), tokenizer=tiny_tokenizer(), student_tokenizer=STUDENT)
    said, plain = wrapped.score(batch, support="sampled"), Held(own).score(batch, support="sampled")
    assert plain.sampled_logprobs is not None
    assert said.sampled_logprobs is not None
    assert torch.equal(said.sampled_logprobs, plain.sampled_logprobs)
    assert torch.equal(said.tokens, plain.tokens)


def test_the_first_token_that_the_teacher_could_not_write_gets_the_floor_and_the_rest_nothing() -> None:
    """The teacher has no token for `é`, two bytes of the student: of `abécd` it grades `ab`, bars the next and is silent."""
    tokenizer, student = tiny_tokenizer(), sentence_pieces()
    batch = rows(("a", "abécd"), ("a", "é"), ("a", "he"), tokenizer=student)
    wrapped = AlignedTeacher(Held(tiny_model(seed=1)), tokenizer=tokenizer, student_tokenizer=student)
    said = wrapped.score(batch, support="sampled")
    assert said.partial
    assert said.sampled_logprobs is not None
    heard = [said.sampled_logprobs[batch.token_rows[said.tokens] == row].tolist() for row in range(3)]
    pieces = [student.convert_ids_to_tokens(list(one.completion_ids)) for one in batch.rollouts]
    first = pieces[0].index("<0xC3>")
    assert heard[0][first:] == [-10.0]
    assert all(value > -10 for value in heard[0][:first])
    assert len(heard[2]) == len(pieces[2])
    counts = wrapped.alignment_lap()
    assert (counts["barred"], counts["rows_cut"]) == (2, 2)
    in_spans = len(said.tokens) - 2
    assert counts["scored"] == pytest.approx(in_spans / batch.num_tokens)
    assert wrapped.alignment_lap() == {}


def test_without_a_floor_such_a_token_is_left_out_too() -> None:
    student = byte_level()
    batch = rows(("a", "éé"), tokenizer=student)
    given = {"tokenizer": tiny_tokenizer(), "student_tokenizer": student}
    silent = AlignedTeacher(Held(tiny_model()), floor=None, **given).score(batch, support="sampled")
    assert silent.tokens.tolist() == []
    assert silent.sampled_logprobs is not None
    assert len(silent.sampled_logprobs) == 0
    barred = AlignedTeacher(Held(tiny_model()), floor=-7.0, **given).score(batch, support="sampled")
    assert barred.tokens.tolist() == [0]
    assert barred.sampled_logprobs is not None
    assert barred.sampled_logprobs.tolist() == [-7.0]


def test_a_character_that_the_length_limit_cut_is_no_fault(model: Any) -> None:
    """`日` is three bytes; the limit came after two of them."""
    student = byte_level(vocab_size=260)
    ids = student("a日", add_special_tokens=False)["input_ids"]
    (one,) = rows(("a", "a"), tokenizer=student).rollouts
    wrapped = AlignedTeacher(Held(model), tokenizer=OWN, student_tokenizer=student)
    for finished, end, graded in ((False, [], [0]), (True, [student.eos_token_id], [0, 1])):
        cut = (*ids[:-1], *end)
        row = replace(one, completion_ids=cut, rollout_logprobs=(-1.0,) * len(cut), finished=finished)
        said = wrapped.score(RolloutBatch.from_rollouts([row], pad_id=0), support="sampled")
        assert said.tokens.tolist() == graded


def test_a_special_token_inside_a_completion_is_barred(model: Any) -> None:
    (one,) = rows(("a", "17"), finished=False).rollouts
    ids = (one.completion_ids[0], STUDENT.unk_token_id, one.completion_ids[1])
    batch = RolloutBatch.from_rollouts([replace(one, completion_ids=ids, rollout_logprobs=(-1.0,) * 3)], pad_id=0)
    said = aligned(model).score(batch, support="sampled")
    assert said.tokens.tolist() == [0, 1]
    assert said.sampled_logprobs is not None
    assert float(said.sampled_logprobs[1]) == -10.0


@pytest.mark.parametrize("floor", [0.0, 1.0, -math.inf, math.nan])
def test_a_floor_that_bars_nothing_is_refused(floor: float) -> None:
    with pytest.raises(ConfigError, match=r"alignment\.floor"):
        ByteAlignment(floor=floor)


def test_a_row_longer_than_the_teacher_reads_is_left_out(model: Any) -> None:
    short = tiny_model(seed=3, vocab_size=len(OWN), context=16)
    batch = rows(("alpha", "q" * 40), ("alpha", "17"))
    said = aligned(short).score(batch, support="sampled")
    assert set(batch.token_rows[said.tokens].tolist()) == {1}


@pytest.mark.parametrize(("end", "graded"), [(True, 3), (False, 2)])
def test_the_end_is_graded_by_the_teachers_own_end_or_not_at_all(model: Any, end: bool, graded: int) -> None:
    said = aligned(model, end_of_sequence=end).score(rows(("alpha", "17")), support="sampled")
    assert len(said.tokens) == graded


@pytest.mark.parametrize("support", ["full", "topk"])
def test_other_supports_are_refused_by_name(model: Any, support: Any) -> None:
    with pytest.raises(UnsupportedCombinationError, match=r"support=sampled of the teacher 'law'.*other tokens"):
        aligned(model).score(rows(("a", "b")), support=support, k=2 if support == "topk" else None)
    with pytest.raises(UnsupportedCombinationError, match="'law'"):
        aligned(model).check(support=support)


def test_a_head_smaller_than_its_tokenizer_is_refused() -> None:
    with pytest.raises(IncompatibleTeacherError, match=r"head of at least \d+ rows.*'law', got 64"):
        aligned(tiny_model(vocab_size=64)).check(support="sampled")


def routing_of(weights: Sequence[Sequence[float]], names: Sequence[str]) -> Routing:
    table = torch.tensor(weights)
    return Routing(
        teacher_ids=tuple(names),
        prompt_ids=tuple(f"p{row}" for row in range(len(weights))),
        weights=table,
        confidence=table.amax(dim=1),
        abstained=table.sum(dim=1) == 0,
    )


def entry(name: str, tokens: Sequence[int], *, partial: bool) -> TeacherEvidence:
    values = torch.full((len(tokens),), -1.0 if partial else -2.0)
    return TeacherEvidence(
        teacher_id=name, support="sampled", tokens=torch.tensor(tokens), sampled_logprobs=values, partial=partial
    )


def test_the_weight_of_a_silent_teacher_goes_to_those_that_spoke() -> None:
    evidence = Evidence(
        teachers=(entry("law", [0, 2], partial=True), entry("math", [0, 1], partial=False)), num_tokens=3
    )
    weights = torch.tensor([[0.25, 0.75], [0.25, 0.75], [1.0, 0.0]])
    assert where_scored(weights, evidence).tolist() == [[0.25, 0.75], [0.0, 1.0], [1.0, 0.0]]
    alone = Evidence(teachers=(entry("law", [1], partial=True),), num_tokens=3)
    assert where_scored(torch.ones(3, 1), alone).tolist() == [[0.0], [1.0], [0.0]]
    sure = Evidence(teachers=(entry("math", [0, 1, 2], partial=False),), num_tokens=3)
    given = torch.ones(3, 1)
    assert where_scored(given, sure) is given


def test_a_micro_batch_of_which_the_teacher_said_nothing_is_taught_nothing() -> None:
    batch = rows(("a", "bc"), ("a", "de"), finished=False)
    evidence = Evidence(teachers=(entry("law", [0, 1], partial=True),), num_tokens=4)
    scored = Scored.of(batch, routing_of([[1.0], [1.0]], ["law"]), evidence, normalise="token_mean")
    teaching = Teaching(gate=PromptGate(), resolver=Linear())
    assert teaching.taught(scored).tolist() == [True, True, False, False]
    part = scored.select([1])
    assert teaching.taught(part).tolist() == [False, False]
    assert isinstance(SampledLossObjective(gate=PromptGate(), resolver=Linear()).taught(part), torch.Tensor)


def test_the_pool_maps_what_was_said_and_counts(model: Any) -> None:
    batch = rows(*TEXTS)
    wrapped = aligned(model)
    pool = TeacherPool([wrapped, Held(tiny_model(seed=9), "math")])
    routing = routing_of([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], ["law", "math"])
    found = pool.score(batch, routing, support="sampled")
    law = found.of("law")
    assert law is not None
    assert set(batch.token_rows[law.tokens].tolist()) == {1, 2}
    lap = pool.lap()
    assert lap["alignment/law/scored"] == 1.0
    assert lap["alignment/law/tokens_per_span"] > 1
    reusing = ReusingTeachers(pool, support="sampled")
    asked = reusing.ask(batch, routing).of("law")
    assert asked is not None
    assert asked.partial
    assert torch.equal(asked.sampled_logprobs, law.sampled_logprobs)  # type: ignore[arg-type]


def test_only_experts_with_other_tokens_are_wrapped(tmp_path: Any) -> None:
    for name, tokenizer in (("same", tiny_tokenizer()), ("other", OWN)):
        tokenizer.save_pretrained(tmp_path / name)
    same, other = (ExpertSpec(name=name, model=str(tmp_path / name)) for name in ("same", "other"))
    named = ExpertSpec(name="named", model=str(tmp_path / "same"), tokenizer=str(tmp_path / "other"))
    served = ExpertSpec(name="served", url="http://127.0.0.1:1", tokenizer=str(tmp_path / "other"))
    unknown = ExpertSpec(name="unknown", url="http://127.0.0.1:1")
    experts = [same, other, named, served, unknown]
    assert list(ByteAlignment().wraps(experts, STUDENT)) == ["other", "named", "served"]
    assert NoAlignment().wraps(experts, STUDENT) == {}
    assert tokenizer_place(unknown) is None
