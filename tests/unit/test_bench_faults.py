from __future__ import annotations

from random import Random

import pytest
import torch
import yaml

from moteach.bench._faults import NOISE_GOAL, Fault, _add_noise, _Tuning, make_teacher
from moteach.bench._scenarios import SCENARIOS, VARIANTS
from moteach.catalogue.registry import read_catalogue
from moteach.data.arena.families import FAMILIES
from moteach.data.arena.rules import completion_of
from moteach.data.arena.splits import split_of
from moteach.data.arena.tokenizer import build_tokenizer


def fault(kind: str, **others: object) -> Fault:
    return Fault(kind=kind, start="math", domains=("math",), **others)  # type: ignore[arg-type]


def test_a_shifted_teacher_is_off_in_its_families_alone():
    biased = fault("shifted", families=("add",), amount=11)
    assert biased.answer("12+30=", "add") == "53"
    assert biased.answer("42-30=", "subtract") == "12"


def test_a_slipped_teacher_is_off_in_the_last_digit_of_small_first_numbers():
    twin = fault("slipped", families=("add",), amount=3, below=40)
    assert twin.answer("19+20=", "add") == "32"
    assert twin.answer("39+30=", "add") == "62"
    assert twin.answer("40+19=", "add") == "59"


def test_a_rotated_and_a_styled_answer():
    turned = Fault(kind="rotated", start="code", domains=("code",), families=("reverse",), amount=2)
    assert turned.answer('rev("abcd")', "reverse") == "badc"
    assert turned.answer('sort("dbca")', "sort") == "abcd"
    assert fault("styled", families=("add",), text=".").answer("12+30=", "add") == "42."


def test_no_answer_of_a_fault_is_right_where_it_should_be_wrong():
    rng = Random(0)
    for scenario in SCENARIOS.values():
        for variant in VARIANTS:
            for made in scenario.team(variant).faults.values():
                for family in made.families:
                    texts = [FAMILIES[family].draw(rng) for _ in range(50)]
                    wrong = [text for text in texts if made.answer(text, family) != completion_of(text)]
                    hit = [text for text in texts if made.kind != "slipped" or int(text[:2]) < made.below]
                    assert wrong == hit, (made, family)


def test_training_reads_the_train_split_alone():
    tuning = _Tuning(fault("shifted", families=("add",), amount=11), build_tokenizer())
    letters = {index: text for text, index in build_tokenizer().get_vocab().items()}
    for example in tuning._draw({"add": 0.5, "subtract": 0.5}):
        text = "".join(letters[i] for i, own in zip(example.token_ids, example.learned, strict=True) if not own)
        assert split_of(text) == "train"


def test_noise_grows_along_one_direction_until_the_teacher_is_bad():
    model = torch.nn.Linear(3, 3)
    clean = model.weight.detach().clone()
    seen: list[torch.Tensor] = []

    def accuracy(model: torch.nn.Module) -> float:
        seen.append(model.weight.detach() - clean)  # type: ignore[operator]
        return 0.5 if len(seen) < 4 else NOISE_GOAL

    _add_noise(model, fault("noisy", seed=3), accuracy)
    assert torch.equal(seen[0], torch.zeros(3, 3))
    torch.testing.assert_close(seen[2], 2 * seen[1])
    torch.testing.assert_close(model.weight.detach() - clean, 3 * seen[1])


def test_a_teacher_is_made_once_and_its_card_can_be_read(tmp_path):
    made = fault("shifted", families=("add",), amount=11)
    quick = Fault(**{**{k: getattr(made, k) for k in made.__dataclass_fields__}, "steps": 1})
    card = make_teacher("add_biased", quick, tmp_path)
    weights = yaml.safe_load(card.read_text())["model"]
    before = (tmp_path / weights / "model.safetensors").stat().st_mtime_ns
    make_teacher("add_biased", quick, tmp_path)
    assert (tmp_path / weights / "model.safetensors").stat().st_mtime_ns == before
    spec = read_catalogue([tmp_path])["add_biased"]
    assert spec.domains == ["math"]
    assert spec.reference is not None
    assert not list(tmp_path.glob(".tmp*"))


def test_variants_share_no_fault_and_every_team_covers_the_domains():
    for name, scenario in SCENARIOS.items():
        tuning, test = scenario.team("tuning"), scenario.team("test")
        assert not {repr(f) for f in tuning.faults.values()} & {repr(f) for f in test.faults.values()}, name
        for team in (tuning, test):
            claimed = {domain for made in team.faults.values() for domain in made.domains}
            assert {"math", "code", "search"} <= claimed | set(team.experts)
            assert set(team.left_out) <= set(team.faults)
            assert set(team.faults) <= set(team.experts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_oracle_leaves_out_the_bad_teachers_alone(variant):
    assert SCENARIOS["clean"].team(variant).oracle() == []
    assert SCENARIOS["biased_alone"].team(variant).oracle() == []
    assert SCENARIOS["foreign"].team(variant).oracle() == []
    (only,) = SCENARIOS["biased"].team(variant).oracle()
    assert only.endswith("_biased.weight=0")
