"""Whole runs with each kind of objective, weighting, balance and sampler, and that they resume to the same bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from integration_runs import metrics, student_bytes, train

from moteach.divergences.measure import OF_TOPK
from moteach.testing import TinyWorld

OBJECTIVES = {
    "topk on whole distributions": ["objective=topk", "objective.k=4"],
    "topk as a server sends it": ["objective=topk", "objective.k=4", "support=topk", "support.k=8"],
    "corrected top-k": ["objective=topk", "objective.truncation=corrected", "objective.source=student"],
    "sampled": ["objective=policy_gradient", "support=sampled"],
    "sampled from whole distributions": ["objective=policy_gradient", "objective.baseline=reverse_kl"],
    "proximal": ["objective=policy_gradient", "support=sampled", "objective.ppo_clip=0.2", "optim.updates_per_step=3"],
    "sampled loss": ["objective=sampled_loss", "support=sampled"],
    "entropy aware": ["objective=entropy_aware"],
    "trust region": ["objective=trust_region"],
    "credit": ["objective.discount=0.9"],
    "mixed": ["mix.outcome=0.5", "mix.reference=0.1", "mix.supervised=0.2", "group_size=2"],
    "outcome in the advantage": ["objective=policy_gradient", "support=sampled", "mix.outcome=0.5", "group_size=2"],
}
STATEFUL = [
    "balance=gap",
    "balance.reference=anchored",
    "token_weights=[tip,special_tokens]",
    "sampler=adaptive",
    "sampler.update_every=2",
    "sampler.window=1",
    "sampler.initial_steps=1",
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name: str, world: TinyWorld, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *world.overrides, "eval=none", "optim.micro_batch_size=5", *OBJECTIVES[name])
    lines = metrics(run)
    assert len(lines) == 4
    for line in lines:
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert line["divergence"] != 0
        for domain in ("alpha", "beta"):
            for kind in ("prompt_share", "token_share", "weight_share", "log_ratio_sigma", "advantage_abs"):
                assert math.isfinite(line[f"balance/{kind}/{domain}"])
            assert line[f"sampler/share/{domain}"] == pytest.approx(0.5)
    if "topk" in name:
        assert all(0 < line["student_mass"] < 1 for line in lines)
    if name == "mixed":
        # the reference is where the student starts
        assert lines[0]["reference_divergence"] == pytest.approx(0.0, abs=1e-5)
        assert lines[-1]["reference_divergence"] > 1e-5
        assert all(line["supervised_loss"] > 0 for line in lines)


def test_both_supports_of_the_truncated_loss_give_the_same_run(world: TinyWorld, tmp_path: Path) -> None:
    arguments = [*world.overrides, "eval=none", "objective=topk", "objective.k=4"]
    full = metrics(train(tmp_path / "full", *arguments))
    sent = metrics(train(tmp_path / "sent", *arguments, "support=topk"))
    for left, right in zip(full, sent, strict=True):
        for key in ("loss", "student_mass", "teacher_mass", "log_ratio"):
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-5)


def test_state_of_sampler_balance_and_weights_survives_an_interruption(world: TinyWorld, tmp_path: Path) -> None:
    arguments = [*world.overrides, "eval=none", "max_steps=8", "optim.schedule=constant", *STATEFUL]
    whole = train(tmp_path / "whole", *arguments)
    part = train(tmp_path / "part", *arguments, "checkpoint.every_steps=5", "checkpoint.keep_last=9")
    kept = part / "checkpoints" / "step-000005"
    assert kept.is_dir()
    for path in (part / "checkpoints").glob("step-000008"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (part / "summary.json").unlink()
    train(part, *arguments, "checkpoint.every_steps=5", "checkpoint.keep_last=9")
    assert student_bytes(part) == student_bytes(whole)
    shares = [line["sampler/share/alpha"] for line in metrics(whole)]
    assert len({round(share, 6) for share in shares}) > 1
    assert [line["sampler/share/alpha"] for line in metrics(part)] == shares


def test_the_gradients_of_domains_are_compared_on_request(world: TinyWorld, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *world.overrides, "eval=none", "trace.gradient_cosine_every=2")
    seen = ["gradient_cosine/alpha/beta" in line for line in metrics(run)]
    assert seen == [True, False, True, False]
    assert all(-1 <= line["gradient_cosine/alpha/beta"] <= 1 for line in metrics(run)[::2])
    assert student_bytes(run) == student_bytes(train(tmp_path / "plain", *world.overrides, "eval=none"))


def test_likeliest_tokens_are_compared_on_request_and_the_student_is_the_same(world: TinyWorld, tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", *world.overrides, "eval=none", "trace.diagnostics_every=3", "optim.micro_batch_size=2"
    )
    names = {*OF_TOPK}
    assert [names & set(line) for line in metrics(run)] == [names, set(), set(), names]
    assert all(0 < line["topk_overlap"] <= 1 and line["overlap_token_advantage"] <= 0 for line in metrics(run)[::3])
    plain = train(tmp_path / "plain", *world.overrides, "eval=none", "optim.micro_batch_size=2")
    assert student_bytes(run) == student_bytes(plain)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(plain)]


def test_several_updates_of_a_step_each_take_their_share_of_the_rows(world: TinyWorld, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *world.overrides, "eval=none", "optim.updates_per_step=4")
    lines = metrics(run)
    assert all(line["num_tokens"] > 0 for line in lines)
    assert {line["balance/prompt_share/alpha"] for line in lines} == {0.5}
    assert student_bytes(run) != student_bytes(train(tmp_path / "one", *world.overrides, "eval=none"))
