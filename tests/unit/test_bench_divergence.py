from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from moteach.bench import _peers
from moteach.bench._arms import Problem, Size, arms_of, kernel, plain
from moteach.bench._peers import Peer, find_peers, peer_beta
from moteach.bench.divergence import (
    POOLS,
    choose,
    compare,
    divergences,
    interleave,
    measure,
    measure_pool,
    peak_of,
    read_sizes,
    run,
    summarise,
)
from moteach.cli.bench import benchmarks
from moteach.cli.main import main
from moteach.conflict.pools import Linear
from moteach.divergences.full import JSD, ForwardKL, ReverseKL
from moteach.errors import ConfigError, UnknownChoiceError
from moteach.paths import conf_dir

SMALL = Size(vocab=512, tokens=96, hidden=8)
OPTIONS = divergences()


@pytest.fixture(scope="module", params=["trl", "liger"])
def peer(request: pytest.FixtureRequest) -> Peer:
    found = {each.name: each for each in find_peers()[0]}
    if request.param not in found:
        pytest.skip(f"{request.param} is not installed (extra 'dev')")
    return found[request.param]


def fake_peer(loss: Any) -> Peer:
    return Peer(name="fake", version="1", loss=loss)


def logprobs_of(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.t(), dim=-1)


def test_every_option_of_the_config_group_and_every_truncation_is_measured():
    stems = {path.stem for path in (conf_dir() / "divergence").glob("*.yaml")}
    truncations = {"topk_renormalise", "topk_tail_bucket", "topk_plain", "topk_corrected"}
    assert set(OPTIONS) == stems | truncations
    assert all(OPTIONS[stem].name == stem for stem in stems)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_kernel_and_plain_autograd_agree_on_every_option(name: str):
    arms = {
        "moteach": partial(kernel, divergence=OPTIONS[name], resolver=Linear()),
        "plain": partial(plain, divergence=OPTIONS[name]),
    }
    compared = compare(Problem.make(SMALL), arms)
    assert compared["moteach"]["agrees"]
    assert compared["moteach"]["loss"] > 1e-3


def test_the_problem_is_asymmetric_and_the_plain_arm_is_the_formula():
    problem = Problem.make(SMALL)
    p = logprobs_of(problem.hidden.detach(), problem.head.weight.detach())
    q = logprobs_of(*problem.teacher())
    reverse = float((p.exp() * (p - q)).sum(-1).mean())
    forward = float((q.exp() * (q - p)).sum(-1).mean())
    assert abs(reverse - forward) > 0.01 * forward
    assert plain(problem, divergence=ReverseKL()).item() == pytest.approx(reverse, rel=1e-5)
    assert plain(problem, divergence=ForwardKL()).item() == pytest.approx(forward, rel=1e-5)


def test_the_same_size_gives_the_same_inputs_and_more_teachers_leave_the_student_alone():
    one, three = Problem.make(SMALL), Problem.make(SMALL, teachers=3)
    assert torch.equal(one.hidden, three.hidden)
    assert torch.equal(one.head.weight, three.head.weight)
    assert not torch.equal(three.evidence[0].head.weight, three.evidence[1].head.weight)
    torch.testing.assert_close(three.weights.sum(-1), torch.ones(SMALL.tokens))


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JSD(beta=0.5), JSD(beta=0.2)], ids=repr)
def test_a_peer_computes_the_same_loss_and_gradients(peer: Peer, divergence: Any):
    compared = compare(Problem.make(SMALL), arms_of(divergence, [peer]))
    assert compared[peer.name]["agrees"], compared


def test_the_check_would_see_a_peer_that_takes_beta_for_the_other_side(peer: Peer):
    def swapped(*tensors: Tensor, beta: float, chunk_size: int) -> Tensor:
        return peer.loss(*tensors, beta=1.0 - beta, chunk_size=chunk_size)

    for divergence in (ReverseKL(), ForwardKL(), JSD(beta=0.2)):
        compared = compare(Problem.make(SMALL), arms_of(divergence, [fake_peer(swapped)]))
        assert not compared["fake"]["agrees"]


def test_an_arm_with_the_right_loss_and_a_wrong_gradient_is_seen():
    def half(student_hidden: Tensor, student_weight: Tensor, *teacher: Tensor, beta: float, chunk_size: int) -> Tensor:
        p, q = logprobs_of(student_hidden, student_weight), logprobs_of(*teacher)
        value = (p.exp() * (p - q)).sum(-1).mean()
        return (value + value.detach()) / 2

    compared = compare(Problem.make(SMALL), arms_of(ReverseKL(), [fake_peer(half)]))["fake"]
    assert compared["loss_error"] < 1e-5
    assert compared["gradient_error"] == pytest.approx(0.5, abs=1e-3)
    assert not compared["agrees"]


def test_a_peer_that_computes_something_else_is_reported_and_not_timed():
    def other(student_hidden: Tensor, student_weight: Tensor, *teacher: Tensor, beta: float, chunk_size: int) -> Tensor:
        return logprobs_of(student_hidden, student_weight).square().mean()

    rows = measure(SMALL, name="reverse_kl", arms=arms_of(ReverseKL(), [fake_peer(other)]), rounds=1)
    by_arm = {row["arm"]: row for row in rows}
    assert "ms" not in by_arm["fake"]
    assert "peak_mib" not in by_arm["fake"]
    assert by_arm["plain"]["memory_ratio"] > 0.0
    summary = summarise(rows)
    assert summary["different"] == ["fake/reverse_kl/512"]
    assert "time_ratio/fake/reverse_kl/512" not in summary
    assert "time_ratio/plain/reverse_kl/512" in summary


@dataclass(frozen=True, kw_only=True)
class Unknown:
    name: ClassVar[str] = "unknown"
    supports: ClassVar[frozenset[str]] = frozenset({"full"})

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (student_logits - teacher_logits).square().sum(-1)


def test_peers_take_part_only_where_they_have_the_divergence():
    assert [peer_beta(each) for each in (ForwardKL(), ReverseKL(), JSD(beta=0.3), Unknown())] == [0.0, 1.0, 0.3, None]
    peer = fake_peer(lambda *tensors, beta, chunk_size: tensors[0].sum())
    assert list(arms_of(ReverseKL(), [peer])) == ["moteach", "plain", "fake"]
    assert list(arms_of(Unknown(), [peer])) == ["moteach", "plain"]


def test_a_peer_that_is_not_installed_is_left_out_with_a_remedy(monkeypatch):
    def absent(name: str) -> Any:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(_peers.importlib, "import_module", absent)
    found, missing = find_peers()
    assert found == []
    assert [line.partition(" ")[0] for line in missing] == ["trl", "liger"]
    assert all("pip install 'moteach[dev]'" in line for line in missing)


def test_arms_are_timed_in_turn():
    calls = []

    def arm(name: str) -> Any:
        def work(problem: Problem) -> Tensor:
            calls.append(name)
            assert problem.hidden.grad is None
            return problem.hidden.sum()

        return work

    problem = Problem.make(SMALL)
    seconds = interleave({name: (problem, arm(name)) for name in "abc"}, 3)
    assert "".join(calls) == "abcabcabc"
    assert [len(times) for times in seconds.values()] == [3, 3, 3]


def test_a_peak_counts_the_gradients_also_when_older_ones_were_there():
    gradients = (SMALL.vocab + SMALL.tokens) * SMALL.hidden * 4

    def arm(problem: Problem) -> Tensor:
        return (problem.head.weight * 2.0).sum() + problem.hidden.sum()

    problem = Problem.make(SMALL)
    first = peak_of(problem, arm)
    assert gradients <= first < 2 * gradients
    assert peak_of(problem, arm) == first


def test_the_kernel_needs_less_memory_than_plain_autograd_on_many_chunks():
    size = Size(vocab=65_536, tokens=256, hidden=4)
    work = partial(kernel, divergence=ReverseKL(), resolver=Linear())
    assert peak_of(Problem.make(size), work) < 0.5 * peak_of(Problem.make(size), partial(plain, divergence=ReverseKL()))


def test_merged_teachers_are_measured_against_one():
    rows = measure_pool(SMALL, pool=Linear(), rounds=2)
    assert [(row["teachers"], row["table"]) for row in rows] == [(1, POOLS), (3, POOLS)]
    assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1.0
    summary = summarise(rows)
    assert summary["memory_growth/linear/512"] == rows[1]["memory_ratio"] < 1.2
    assert summary["time_growth/linear/512"] == rows[1]["time_ratio"]


def test_the_ratio_is_the_median_of_the_ratios_inside_rounds():
    from moteach.bench.divergence import _measured

    seconds = {"moteach": [1.0, 10.0, 2.0], "trl": [2.0, 15.0, 8.0]}
    row = _measured(seconds, {"moteach": 2**20, "trl": 3 * 2**20}, "trl", against="moteach")
    assert (row["time_ratio"], row["time_ratio_min"], row["time_ratio_max"]) == (2.0, 1.5, 4.0)
    assert (row["ms"], row["min_ms"]) == (8000.0, 2000.0)
    assert (row["peak_mib"], row["memory_ratio"]) == (3.0, 3.0)


def test_words_choose_what_is_measured():
    assert list(choose(OPTIONS, None)) == [*OPTIONS, POOLS]
    assert list(choose(OPTIONS, "jsd, pools,jsd")) == ["jsd", POOLS]
    with pytest.raises(UnknownChoiceError, match="did you mean 'reverse_kl'"):
        choose(OPTIONS, "reverse_k")


def test_words_choose_the_sizes():
    assert [size.vocab for size in read_sizes({})] == [32_000, 152_000]
    assert read_sizes({"vocab": "64,128", "tokens": "7", "hidden": "3"}) == [
        Size(vocab=64, tokens=7, hidden=3),
        Size(vocab=128, tokens=7, hidden=3),
    ]
    for words in ({"vocab": "64,"}, {"vocab": "many"}, {"vocab": "31"}, {"tokens": "0"}, {"hidden": "-1"}):
        with pytest.raises(ConfigError, match=next(iter(words))):
            read_sizes(words)


def test_a_wrong_word_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        run(["round=3"])


def test_the_command_prints_and_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "report.json"
    argv = ["vocab=256", "tokens=80", "hidden=4", "rounds=2", "only=reverse_kl,topk_corrected,pools", f"out={out}"]
    assert main(["bench", "divergence", *argv]) == 0
    printed = capsys.readouterr().out
    assert "reverse_kl" in printed
    assert "geometric" in printed
    report = json.loads(out.read_text())
    assert report["command"].startswith("moteach bench divergence vocab=256")
    assert report["summary"]["different"] == []
    assert report["summary"]["rounds"] == 2
    arms = [row["arm"] for row in report["rows"] if row.get("divergence") == "reverse_kl"]
    assert arms == ["moteach", "plain", *report["summary"]["versions"]]
    assert len(report["summary"]["versions"]) + len(report["summary"]["missing"]) == 2
    keys = ["time_ratio/plain/reverse_kl/256", "memory_growth/geometric/256"]
    assert all(math.isfinite(report["summary"][key]) for key in keys)


def test_a_new_yaml_is_a_new_row(tmp_path, monkeypatch):
    (tmp_path / "divergence").mkdir()
    (tmp_path / "divergence" / "steep.yaml").write_text("_target_: moteach.divergences.full.JSD\nbeta: 0.9\n")
    monkeypatch.setattr("moteach.bench.divergence.conf_dir", lambda: tmp_path)
    assert divergences()["steep"] == JSD(beta=0.9)


def test_it_is_listed():
    assert "time and memory of every divergence" in benchmarks()["divergence"]
