from __future__ import annotations

import builtins
import itertools
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError, DataError, MissingDependencyError, MissingFileError
from moteach.report import routing as show
from moteach.report.quality import contingency_counts, reliability_bins, wilson
from moteach.report.routing import load_per_step
from moteach.report.style import MANY, colours, dark, luminance, readable_on, spread, tint
from moteach.report.tokens import read_completions, shown
from moteach.routing.learned import EmbeddingPrototypeRouter
from moteach.routing.quality import expected_calibration_error
from moteach.types import Prompt

TEACHERS = ("math", "code", "law")
TOKEN_COLUMNS = [("sample", pa.int32()), ("position", pa.int32()), ("token", pa.string())]


def row(domain, weights, confidence, *, step=1, prompt_id="p", **token):
    shares = dict(zip(TEACHERS, weights, strict=True))
    nobody = sum(weights) == 0
    best = None if nobody else max(shares, key=shares.get)
    said = {"step": step, "prompt_id": prompt_id, "domain": domain, "weights": shares, "teacher": best}
    return {**said, "confidence": confidence, "abstained": nobody, **token}


PROMPT_ROWS = [
    row("math", (1, 0, 0), 0.9),
    row("math", (0, 1, 0), 0.4),
    row("sums", (0.75, 0.25, 0), 0.7, step=2),
    row("code", (0, 0, 0), 0.0, step=2),
    row("poetry", (0, 0, 1), 0.6, step=2),
]
TOKEN_ROWS = [
    row("math", (0.25, 0.75, 0), 0.5, step=2, prompt_id="a", sample=0, position=1, token="$b$"),
    row("math", (1, 0, 0), 0.5, step=2, prompt_id="a", sample=0, position=0, token="a"),
    row("math", (0, 0, 0), 0.0, step=2, prompt_id="a", sample=0, position=2, token="\n"),
    row("math", (0, 0, 1), 0.5, step=2, prompt_id="a", sample=1, position=0, token="other"),
    row("math", (0, 0, 1), 0.5, step=1, prompt_id="b", sample=0, position=0, token="early"),
]


def write_run(folder: Path, rows, *, traced: bool = False) -> Path:
    folder.mkdir(parents=True)
    columns = [
        ("step", pa.int64()),
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("weights", pa.struct([(name, pa.float32()) for name in TEACHERS])),
        ("teacher", pa.string()),
        ("confidence", pa.float32()),
        ("abstained", pa.bool_()),
        *(TOKEN_COLUMNS if traced else []),
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), folder / "routing.parquet")
    cards = {name: {"domains": ["sums"] if name == "math" else []} for name in TEACHERS}
    (folder / "config.yaml").write_text(yaml.safe_dump({"experts": cards}))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", PROMPT_ROWS)


@pytest.fixture
def traced(tmp_path):
    return write_run(tmp_path / "traced", PROMPT_ROWS + TOKEN_ROWS, traced=True)


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    texts = {"math": ["12+34=", "56+78=", "9+1="], "code": ["rev(abc)=", "sort(cab)=", "rot(xyz)="]}
    experts = []
    for name, mine in texts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in mine))
        experts.append(ExpertSpec(name=name, model="-", domains=[name], exemplars=str(path)))
    made = EmbeddingPrototypeRouter(encoder="ngrams", cache=None, calibration="none", min_similarity=0.3)
    made.bind(experts)
    return made


def words(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_a_run_is_read_with_its_abstentions(run):
    routes = show.read_routes(run)
    assert routes.teachers == TEACHERS
    assert routes.chosen.tolist() == [0, 1, 0, -1, 2]
    assert routes.owners.tolist()[2] == [True, False, False]
    assert routes.judged.tolist() == [True, True, True, False, False]
    assert routes.correct.tolist() == [True, False, True, False, False]


def test_token_rows_are_no_prompts(run, traced):
    assert show.read_routes(traced).labels == show.read_routes(run).labels


def test_a_run_that_is_going_is_read_from_its_parts(tmp_path):
    for step in (1, 2):
        mine = [said for said in PROMPT_ROWS if said["step"] == step]
        part = write_run(tmp_path / str(step), mine) / "routing.parquet"
        (tmp_path / "run" / "traces").mkdir(parents=True, exist_ok=True)
        part.rename(tmp_path / "run" / "traces" / f"routing-{step:06d}.parquet")
    assert show.read_routes(tmp_path / "run").steps.tolist() == [1, 1, 2, 2, 2]


def test_the_contingency_counts_by_label_and_teacher(run):
    names, counts, claims = contingency_counts(show.read_routes(run))
    assert names == ("math", "sums", "code", "poetry")
    assert counts.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert claims.tolist()[1] == [True, False, False, False]
    assert not claims[3].any()


def test_the_load_of_a_step_sums_to_one(run):
    steps, shares = load_per_step(show.read_routes(run))
    assert steps == [1, 2]
    assert [column[1] for column in shares] == pytest.approx([0.25, 0.25 / 3, 1 / 3, 1 / 3])
    assert [sum(column) for column in zip(*shares, strict=True)] == pytest.approx([1, 1])


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_gaps_of_the_diagram_add_up_to_the_ece(bins):
    generator = torch.Generator().manual_seed(bins)
    confidence = torch.rand(200, generator=generator, dtype=torch.float64)
    confidence[:4] = torch.tensor([0.0, 1.0, 1 / 15, 2 / 7])
    correct = torch.rand(200, generator=generator) < 0.6
    counts, means, shares = reliability_bins(confidence, correct, bins=bins)
    gaps = torch.where(counts > 0, counts * (means - shares).abs(), 0.0)
    assert int(counts.sum()) == 200
    assert float(gaps.sum()) / 200 == pytest.approx(
        expected_calibration_error(confidence, correct, bins=bins), abs=1e-12
    )


@pytest.mark.parametrize(("hits", "count"), [(3, 10), (0, 5), (7, 7)])
def test_wilsons_interval_solves_the_score_equation(hits, count):
    """Its ends are where |p - share| = z sqrt(p (1 - p) / n), what the interval is defined by."""
    share = hits / count
    for end in wilson(share, count):
        assert abs(end - share) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / count), abs=1e-9)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one prompt"):
        wilson(0.5, 0)


def test_labels_keep_their_distance_and_their_order():
    found = spread([0.5, 0.1, 0.5, 0.99, 0.98], gap=0.1)
    assert found[1] < found[0] < found[2] < found[4] < found[3] <= 1
    ordered = sorted(found)
    assert all(b - a >= 0.1 - 1e-12 for a, b in itertools.pairwise(ordered))
    assert spread([0.2, 0.8], gap=0.1) == [0.2, 0.8]


def test_ten_teachers_have_ten_colours_and_readable_names():
    for many in (3, 6, 7, 10):
        assert len(set(colours([str(name) for name in range(many)]).values())) == many
    for colour in MANY:
        red, green, blue = (int(dark(colour)[place : place + 2], 16) / 255 for place in (1, 3, 5))
        assert 1.05 / (luminance((red, green, blue)) + 0.05) >= 4.45
    assert readable_on(tint("#332288", 1.0)) == "white"
    assert readable_on(tint("#332288", 0.1)) == "black"


@pytest.mark.parametrize("draw", [show.contingency, show.reliability, show.risk, show.load])
def test_every_picture_of_a_run_is_drawn(run, draw):
    first, second = (draw(run)._repr_png_() for _ in range(2))
    assert first.startswith(b"\x89PNG")
    assert first == second


def test_what_a_run_did_not_keep_is_said(run):
    assert any("1 abstentions are left out" in text for text in words(show.reliability(run)))


def test_prompts_are_asked_of_a_router(router):
    prompts = [
        Prompt(prompt_id=text, text=text, token_ids=(), domain=domain)
        for text, domain in (("11+22=", "math"), ("rev(bca)=", "code"), ("Bonjour tout le monde", "poetry"))
    ]
    routes = show.ask(router, prompts)
    assert routes.chosen.tolist()[:2] == [0, 1]
    assert routes.abstained.tolist() == [False, False, True]
    assert routes.confidence[2] > 0
    with pytest.raises(DataError, match="got none"):
        show.ask(router, [])


def test_why_names_weights_exemplars_and_the_threshold(router, tmp_path):
    text = "12+34= for $5 or $6"
    said = words(show.why(router, text))
    assert f"“{text}”  →  math 1.00" in said
    assert {"math", "code", "12+34=", "at least 0.30"} <= set(said)
    router.save_pretrained(tmp_path / "saved")
    assert words(show.why(tmp_path / "saved", text)) == words(show.why(router, text))


def test_why_says_why_nobody_teaches(router):
    said = words(show.why(router, "Bonjour tout le monde"))
    assert any(text.endswith("→  nobody") for text in said)
    assert any("abstains: similarity" in text and "< 0.30" in text for text in said)


def test_what_has_no_reasons_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="got int, which has no reasons"):
        show.why(3, "text")
    with pytest.raises(MissingFileError, match="moteach route fit"):
        show.why(tmp_path, "text")


def test_completions_are_read_token_by_token(traced):
    teachers, (first, second) = read_completions(traced)
    assert teachers == TEACHERS
    assert [(token.token, token.teacher, token.weight) for token in first.tokens] == [
        ("a", "math", 1.0),
        ("$b$", "code", 0.75),
        ("\n", None, 0.0),
    ]
    assert (second.sample, second.step, second.prompt) == (1, 2, None)
    assert [c.prompt_id for c in read_completions(traced, step=1)[1]] == ["b"]
    assert len(read_completions(traced, limit=1)[1]) == 1


def test_tokens_are_drawn_with_their_text_and_prompt(traced):
    pq.write_table(
        pa.table({"step": [2], "prompt_id": ["a"], "prompt": ["2 for $1 or $2?"]}), traced / "rollouts.parquet"
    )
    figure = show.tokens(traced)
    assert {"a", "$b$", "↵", "other", "2 for $1 or $2?", "nobody (abstained)"} <= set(words(figure))
    assert figure._repr_png_().startswith(b"\x89PNG")
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert len(hatched) == 2


def test_a_long_completion_goes_on_in_the_next_line(tmp_path):
    rows = [row("math", (1, 0, 0), 1, prompt_id="a", sample=0, position=i, token="word") for i in range(100)]
    short = show.tokens(write_run(tmp_path / "short", rows[:10], traced=True))
    long = show.tokens(write_run(tmp_path / "long", rows, traced=True))
    assert long.get_size_inches()[1] > short.get_size_inches()[1] + 0.5
    assert max(patch.get_x() + patch.get_width() for patch in long.axes[0].patches) <= 11


@pytest.mark.parametrize("with_columns", [True, False])
def test_a_run_without_token_rows_says_how_to_get_them(tmp_path, with_columns):
    folder = write_run(tmp_path / "run", PROMPT_ROWS, traced=with_columns)
    with pytest.raises(DataError, match=r"Train with gate\.trace=true"):
        show.tokens(folder)


def test_a_step_without_token_rows_names_those_that_have_some(traced):
    with pytest.raises(DataError, match="steps 1 to 2"):
        show.tokens(traced, step=9)


@pytest.mark.parametrize(("token", "expected"), [("Ġthe", " the"), ("▁", "␣"), ("a\n", "a↵"), ("\x07", "·"), ("", "·")])
def test_what_cannot_be_seen_gets_a_sign(token, expected):
    assert shown(token) == expected


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match=r"routing\.parquet"):
        show.load(tmp_path)


def test_labels_that_nobody_claims_cannot_be_judged(tmp_path):
    folder = write_run(tmp_path / "run", [row("poetry", (0, 0, 1), 0.6)])
    with pytest.raises(DataError, match="domain a teacher claims"):
        show.risk(folder)
    unlabelled = write_run(tmp_path / "none", [row(None, (0, 0, 1), 0.6)])
    with pytest.raises(DataError, match="expected prompts with a domain"):
        show.contingency(unlabelled)


def test_without_matplotlib_the_remedy_is_named(run, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r"moteach\[plots\]"):
        show.load(run)
