from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_runs import environment, metrics, rows, student_bytes, student_tensors, train
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moteach.testing import TinyWorld, write_tiny_world

Pool = Callable[[dict[str, Tensor], str], Tensor]
"""Log target of one row, from the logprobs of each teacher and the row's domain."""


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def logprobs_of(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probabilities [token, vocab] of the model at each token of the completion."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(dim=-1)


class Oracle:
    """The numbers of a run's first step, from the files it left and the models it began with, in float64."""

    def __init__(self, world: TinyWorld, run_dir: Path, experts: tuple[str, ...] = ("alpha", "beta")) -> None:
        self.rollouts = [row for row in rows(run_dir, "rollouts") if row["step"] == 1]
        assert self.rollouts
        tokenizer = AutoTokenizer.from_pretrained(world.student)
        models = {name: opened(world.cards / "weights" / name) for name in experts}
        self.student: list[Tensor] = []
        self.teachers: list[dict[str, Tensor]] = []
        student = opened(world.student)
        for row in self.rollouts:
            prompt = tokenizer(row["prompt"])["input_ids"]
            self.student.append(logprobs_of(student, prompt, row["completion_ids"]))
            self.teachers.append(
                {name: logprobs_of(model, prompt, row["completion_ids"]) for name, model in models.items()}
            )

    def written(self, logprobs: list[Tensor]) -> Tensor:
        """Logprob of each written token, all rows after one another."""
        ids = [torch.tensor(row["completion_ids"]) for row in self.rollouts]
        return torch.cat([one.gather(1, own[:, None])[:, 0] for one, own in zip(logprobs, ids, strict=True)])

    def reverse_kl(self, pool: Pool) -> float:
        """Mean over tokens of KL(student || pool)."""
        values = []
        for row, student, teachers in zip(self.rollouts, self.student, self.teachers, strict=True):
            target = pool(teachers, row["domain"])
            values.append((student.exp() * (student - target)).sum(dim=-1))
        return float(torch.cat(values).mean())


def own_teacher(teachers: dict[str, Tensor], domain: str) -> Tensor:
    return teachers[domain]


def linear(teachers: dict[str, Tensor], domain: str) -> Tensor:
    del domain
    return torch.stack([logprobs.exp() for logprobs in teachers.values()]).mean(dim=0).log()


def geometric(teachers: dict[str, Tensor], domain: str) -> Tensor:
    del domain
    return torch.stack(list(teachers.values())).mean(dim=0).log_softmax(dim=-1)


def test_run_folder_holds_what_a_reader_needs_and_nothing_temporary(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "baseline.json",
        "checkpoints",
        "config.yaml",
        "identity.json",
        "metrics.jsonl",
        "rollouts.parquet",
        "routing.parquet",
        "student",
        "summary.json",
    }
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"step-000002", "step-000004"}
    assert not [path for path in finished.rglob("*") if ".tmp" in path.name]


def test_config_is_the_resolved_one_of_the_run(world: TinyWorld, finished: Path) -> None:
    cfg = OmegaConf.load(finished / "config.yaml")
    assert (cfg.max_steps, cfg.checkpoint.every_steps, cfg.student.model) == (4, 2, str(world.student))
    assert cfg.experts.alpha.domains == ["alpha"]
    assert cfg.rollout.seed == cfg.seed
    assert "${" not in (finished / "config.yaml").read_text()


def test_identity_covers_settings_weights_and_data(finished: Path) -> None:
    identity = json.loads((finished / "identity.json").read_text())
    assert {
        "optim.lr",
        "seed",
        "data (prompts)",
        "student.model (weights)",
        "experts.beta (weights)",
    } <= identity.keys()
    assert identity["experts.alpha (weights)"] != identity["experts.beta (weights)"]
    assert not [key for key in identity if key.startswith(("tracker", "checkpoint", "run_dir"))]


def test_metrics_have_one_line_a_step_with_a_finite_loss(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert math.isfinite(line["loss"])
        assert None not in line.values()
        assert line["teacher_token_frac/alpha"] + line["teacher_token_frac/beta"] == pytest.approx(1.0)


def test_routing_has_one_row_a_prompt_and_the_teacher_follows_the_domain(finished: Path) -> None:
    found = rows(finished, "routing")
    assert [row["step"] for row in found] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    assert set(found[0]) == {"step", "prompt_id", "domain", "weights", "teacher", "confidence", "abstained"}
    for row in found:
        assert row["teacher"] == row["domain"]
        other = "beta" if row["domain"] == "alpha" else "alpha"
        assert row["weights"] == {row["domain"]: 1.0, other: 0.0}
        assert (row["confidence"], row["abstained"]) == (1.0, False)
    assert {row["domain"] for row in found} == {"alpha", "beta"}
    assert len({(row["step"], row["prompt_id"]) for row in found}) == len(found)


def test_rollouts_are_the_students_own_samples(world: TinyWorld, finished: Path) -> None:
    found = rows(finished, "rollouts")
    assert [(row["step"], row["prompt_id"]) for row in found] == [
        (row["step"], row["prompt_id"]) for row in rows(finished, "routing")
    ]
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    for row in found:
        assert row["student_version"] == row["step"] - 1
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["prompt"].startswith(row["domain"])
    oracle = Oracle(world, finished)
    reported = torch.tensor([p for row in oracle.rollouts for p in row["rollout_logprobs"]], dtype=torch.float64)
    torch.testing.assert_close(reported, oracle.written(oracle.student), atol=1e-5, rtol=0)


def test_summary_says_before_teacher_after_per_domain(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == {"domains", "raw", "mean", "worst"}
    assert set(summary["domains"]) == {"alpha", "beta"}
    for row in summary["domains"].values():
        assert {"before", "teacher", "after", "normalised", "prompts"} <= set(row)
        assert row["prompts"] > 0


def test_student_reopens_with_the_weights_of_the_last_checkpoint(world: TinyWorld, finished: Path) -> None:
    reopened = AutoModelForCausalLM.from_pretrained(finished / "student").eval()
    rebuilt = AutoModelForCausalLM.from_pretrained(world.student).eval()
    saved = load_file(finished / "checkpoints" / "step-000004" / "student.safetensors")
    missing = rebuilt.load_state_dict({k.removeprefix("model."): v for k, v in saved.items()}, strict=False)
    assert not missing.unexpected_keys
    ids = torch.tensor([AutoTokenizer.from_pretrained(finished / "student")("alpha 12+5=")["input_ids"]])
    with torch.no_grad():
        logits = reopened(input_ids=ids).logits
        assert torch.equal(logits, rebuilt(input_ids=ids).logits)
        before = AutoModelForCausalLM.from_pretrained(world.student).eval()(input_ids=ids).logits
    assert not torch.allclose(logits, before, atol=1e-3)


def test_first_loss_is_the_reverse_kl_to_the_teacher_of_each_domain(world: TinyWorld, finished: Path) -> None:
    assert metrics(finished)[0]["loss"] == pytest.approx(Oracle(world, finished).reverse_kl(own_teacher), rel=1e-5)


@pytest.mark.parametrize(("conflict", "pool"), [("linear", linear), ("geometric", geometric)])
def test_uniform_router_distils_the_pool_of_all_teachers(
    world: TinyWorld, tmp_path: Path, conflict: str, pool: Pool
) -> None:
    run = train(
        tmp_path / "run", *world.overrides, "router=uniform", f"conflict={conflict}", "max_steps=3", "eval=none"
    )
    assert metrics(run)[0]["loss"] == pytest.approx(Oracle(world, run).reverse_kl(pool), rel=1e-5)
    assert all(math.isfinite(line["loss"]) for line in metrics(run))
    assert all(row["weights"] == {"alpha": 0.5, "beta": 0.5} for row in rows(run, "routing"))
    assert metrics(run)[0]["routing/entropy"] == pytest.approx(math.log(2))


def test_policy_gradient_follows_the_log_ratio_of_the_written_tokens(world: TinyWorld, tmp_path: Path) -> None:
    overrides = ["objective=policy_gradient", "support=sampled", "max_steps=3", "eval=none"]
    run = train(tmp_path / "run", *world.overrides, *overrides)
    lines = metrics(run)
    assert all(math.isfinite(line["loss"]) for line in lines)
    oracle = Oracle(world, run)
    own = [teachers[row["domain"]] for row, teachers in zip(oracle.rollouts, oracle.teachers, strict=True)]
    advantages = oracle.written(own) - oracle.written(oracle.student)
    assert lines[0]["advantages"] == pytest.approx(float(advantages.mean()), rel=1e-4)
    assert lines[0]["importance_ratio"] == pytest.approx(1.0, abs=1e-4)
    before = load_file(world.student / "model.safetensors")
    assert all(not torch.equal(before[name], after) for name, after in student_tensors(run).items())


def test_five_experts_teach_their_own_domains(tmp_path: Path) -> None:
    names = ("one", "two", "three", "four", "five")
    world = write_tiny_world(tmp_path / "world", experts=names)
    run = train(tmp_path / "run", *world.overrides, "sampler.prompts_per_step=10", "max_steps=3", "eval=none")
    found = rows(run, "routing")
    assert all(row["teacher"] == row["domain"] for row in found)
    assert [sum(row["domain"] == name for row in found) for name in names] == [6] * 5
    assert metrics(run)[0]["loss"] == pytest.approx(Oracle(world, run, names).reverse_kl(own_teacher), rel=1e-5)


def test_one_teacher_under_label_equals_it_under_uniform_bitwise(world: TinyWorld, tmp_path: Path) -> None:
    alone = [*world.overrides, "experts=[alpha]", "max_steps=3", "eval=none"]
    label = train(tmp_path / "label", *alone, "router=label")
    uniform = train(tmp_path / "uniform", *alone, "router=uniform")
    assert student_bytes(label) == student_bytes(uniform)
    assert student_bytes(label) != (world.student / "model.safetensors").read_bytes()
    assert {row["domain"] for row in rows(label, "routing")} == {"alpha"}
    assert rows(label, "routing") == rows(uniform, "routing")


def test_micro_batches_give_the_weights_of_the_whole_batch(world: TinyWorld, tmp_path: Path) -> None:
    short = [*world.overrides, "max_steps=3", "eval=none"]
    whole = train(tmp_path / "whole", *short)
    parts = train(tmp_path / "parts", *short, "optim.micro_batch_size=3")
    mine, other = student_tensors(whole), student_tensors(parts)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=0)
    assert [line["loss"] for line in metrics(whole)] == pytest.approx(
        [line["loss"] for line in metrics(parts)], rel=1e-4
    )


def test_group_size_samples_every_prompt_that_often(world: TinyWorld, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *world.overrides, "group_size=2", "max_steps=3", "eval=none")
    rollouts, routing = rows(run, "rollouts"), rows(run, "routing")
    assert (len(rollouts), len(routing)) == (48, 24)
    assert [row["sample"] for row in rollouts] == [0, 1] * 24
    pairs = list(zip(rollouts[::2], rollouts[1::2], strict=True))
    assert all(first["prompt_id"] == second["prompt_id"] for first, second in pairs)
    assert sum(first["completion_ids"] != second["completion_ids"] for first, second in pairs) > 12
    assert metrics(run)[0]["loss"] == pytest.approx(Oracle(world, run).reverse_kl(own_teacher), rel=1e-5)


def test_student_comes_closer_to_its_teachers(world: TinyWorld, tmp_path: Path) -> None:
    longer = ["max_steps=30", "sampler.prompts_per_step=32", "optim.lr=2e-2", "eval.divergence=true"]
    run = train(tmp_path / "run", *world.overrides, *longer)
    losses = [line["loss"] for line in metrics(run)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    held_out = json.loads((run / "summary.json").read_text())["held_out_divergence"]
    for domain, factor in (("mean", 0.6), ("alpha", 0.75), ("beta", 0.6)):
        assert held_out["after"][domain] < factor * held_out["before"][domain]


def test_wandb_offline_beside_jsonl(world: TinyWorld, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *world.overrides, "max_steps=2", "tracker=[jsonl,wandb]", "eval=none")
    assert len(metrics(run)) == 2
    assert json.loads((run / "wandb_run.json").read_text())["sent"] == 2
    assert list(run.glob("wandb/offline-run-*/*.wandb"))


def test_prompts_without_answers_train_and_leave_valid_json(world: TinyWorld, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"prompt": row["prompt"], "domain": row["domain"]}) + "\n" for row in lines))
    run = train(tmp_path / "run", *world.overrides, f"data.path={bare}", "max_steps=2")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("summary.json", "baseline.json"):
        json.loads((run / name).read_text(), parse_constant=refuse)
    assert all(row["reward"] is None for row in rows(run, "rollouts"))


def test_a_run_needs_no_optional_package(world: TinyWorld, tmp_path: Path) -> None:
    extras = ["httpx", "tenacity", "peft", "vllm", "submitit", "wandb", "matplotlib", "datasets", "reasoning_gym"]
    extras += ["sentence_transformers", "gguf", "trl", "liger_kernel"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
        "from moteach.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", *world.overrides, "max_steps=1", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
