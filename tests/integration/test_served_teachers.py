"""A run whose teachers answer from servers is the run with the same teachers in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from integration_runs import metrics, train

from moteach.catalogue.modeling import load_causal_lm
from moteach.cli.main import main
from moteach.testing import TinyWorld, write_tiny_world

sys.path.append(str(Path(__file__).resolve().parents[1] / "contracts"))

from fake_vllm import FakeVLLM


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return write_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def servers(world: TinyWorld, tmp_path: Path) -> Iterator[dict[str, FakeVLLM]]:
    """Serves both experts by their hidden states; their cards are in `tmp_path / "cards"`."""
    cards = tmp_path / "cards"
    cards.mkdir()
    with ExitStack() as stack:
        found = {}
        for name in ("alpha", "beta"):
            weights = world.cards / "weights" / name
            fake = stack.enter_context(FakeVLLM(load_causal_lm(str(weights)).eval(), name=f"{name}-v1", pooling=True))
            card = f"url: {fake.url}\nserved_name: {name}-v1\nmodel: {weights}\ndomains: [{name}]\n"
            (cards / f"{name}.yaml").write_text(card, encoding="utf-8")
            found[name] = fake
        yield found


def overrides(world: TinyWorld, cards: Path) -> list[str]:
    kept = [override for override in world.overrides if not override.startswith("expert_path=")]
    return [*kept, f"expert_path=[{cards}]", "teachers.http.backoff=0.0"]


def test_a_run_with_served_teachers_learns_what_the_same_run_in_process_learns(
    world: TinyWorld, servers: dict[str, FakeVLLM], tmp_path: Path
) -> None:
    here = metrics(train(tmp_path / "here", *world.overrides))
    servers["alpha"].faults = ["", "500", "cut_states"]  # the first is the handshake's
    run = train(tmp_path / "there", *overrides(world, tmp_path / "cards"))
    there = metrics(run)
    assert len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert not any(key.startswith("teacher_http/") for key in one)
        assert other["teacher_http/beta/requests"] >= 1
        assert other["teacher_http/alpha/failures"] == 0
    assert sum(line["teacher_http/alpha/retries"] for line in there) == 2
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["raw"]) == {"alpha", "beta"}


def test_a_host_that_is_not_on_the_list_ends_the_run_before_it_begins(
    world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = tmp_path / "cards"
    cards.mkdir()
    for name in ("alpha", "beta"):
        (cards / f"{name}.yaml").write_text(f"url: http://teachers.invalid:8000\ndomains: [{name}]\n")
    assert main(["train", *overrides(world, cards), f"run_dir={tmp_path / 'run'}"]) == 2
    assert "teachers.allowed_hosts=[127.0.0.1,localhost,::1,teachers.invalid]" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "run").exists()


def test_a_support_the_server_does_not_offer_ends_the_run_before_it_begins(
    world: TinyWorld, servers: dict[str, FakeVLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers["beta"].pooling = False
    assert main(["train", *overrides(world, tmp_path / "cards"), f"run_dir={tmp_path / 'run'}"]) == 2
    assert "support=full of the teacher 'beta'" in " ".join(capsys.readouterr().err.split())


def test_the_pre_flight_asks_the_server(
    world: TinyWorld, servers: dict[str, FakeVLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [
        word for word in overrides(world, tmp_path / "cards") if word.startswith(("experts=", "expert_path=", "stu"))
    ]
    kept += [
        "data=jsonl",
        f"data.path={world.prompts}",
        "data.evaluation_fraction=0.25",
        f"out={tmp_path / 'out.json'}",
    ]
    assert main(["experts", "check", *kept]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["teacher_id"] for row in rows] == ["alpha", "beta"]
    assert "offers support full, sampled, topk" in rows[0]["findings"][0]["message"]
    servers["alpha"].name = "someone"
    assert main(["experts", "check", *kept]) == 2
    assert "served_name" in capsys.readouterr().err
