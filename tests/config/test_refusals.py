"""A wrong word on the command line gets one line that says what is right, exit code 2, no traceback and no folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moteach.cli.main import main

WRONG = [
    # misspelt keys
    ("max_step=3", r"there is no key 'max_step'; did you mean 'max_steps'"),
    ("optim.lrr=1", r"there is no key 'optim\.lrr'; in 'optim': did you mean 'lr'"),
    ("router.fallbak=math", r"there is no key 'router\.fallbak'; in 'router': did you mean 'fallback'"),
    ("divergence.beta=2", r"there is no key 'divergence\.beta'; 'divergence' takes no arguments"),
    ("experts.math.wieght=2", r"in 'experts\.math': did you mean 'weight'"),
    ("experts.maths.weight=2", r"in 'experts': did you mean 'math'"),
    ("tracker.wandb.mode=online", r"there is no key 'tracker\.wandb\.mode'.*valid choices: jsonl"),
    ("+foo=1", r"there is no key 'foo'"),
    ("+optim.lrr=1", r"there is no key 'optim\.lrr'; in 'optim': did you mean 'lr'"),
    ("+router.fallbak=math", r"router\.fallbak: 'LabelRouter' has no such argument; did you mean 'fallback'"),
    # unknown options and experts
    ("router=lable", r"router: there is no option 'lable'; did you mean 'label'.*\? \(valid choices: .*uniform"),
    ("divergence=kl", r"divergence: there is no option 'kl'; .*reverse_kl"),
    ("experts=[math,cod]", r"experts: there is no option 'cod'; did you mean 'code'"),
    ("experts=maths", r"experts: there is no option 'maths'; did you mean 'math'"),
    ("tracker=[jsonl,wandbb]", r"tracker: there is no option 'wandbb'; did you mean 'wandb'"),
    ("team=reasonning", r"team: there is no option 'reasonning'; did you mean 'reasoning'"),
    ("debug=quik", r"debug: there is no option 'quik'; did you mean 'quick'"),
    ("eval=non", r"eval: there is no option 'non'; did you mean 'none'"),
    ("experiment=nope", r"experiment: there is no option 'nope'"),
    ("support.name=ful", r"support\.name: got 'ful'; did you mean 'full'"),
    ("optim.schedule=cosin", r"optim\.schedule: got 'cosin'; did you mean 'cosine'"),
    # wrong types and ranges
    ("optim.lr=fast", r"optim\.lr=fast: Value 'fast'.*Float"),
    ("max_steps=ten", r"max_steps=ten: .*Integer"),
    ("max_steps=0", r"max_steps: expected at least 1, got 0"),
    ("group_size=0", r"group_size: expected at least 1, got 0"),
    ("threads=0", r"threads: expected at least 1, got 0"),
    ("eval.prompts_per_domain=0", r"eval\.prompts_per_domain: expected at least 1, got 0"),
    ("teachers.max_tokens_per_forward=0", r"teachers\.max_tokens_per_forward: expected at least 1, got 0"),
    ("teachers.memory=2", r"teachers\.memory: expected an amount of memory such as 2GiB or 500MB, got '2'"),
    ("teachers.hidden_dtype=bfloat", r"teachers\.hidden_dtype: .*got 'bfloat'; did you mean 'bfloat16'"),
    ("checkpoint.every_steps=-1", r"checkpoint\.every_steps: expected at least 0, got -1"),
    ("checkpoint.keep_last=0", r"checkpoint\.keep_last: expected at least 1, got 0"),
    ("optim.lr=0", r"optim\.lr: expected a finite number above 0, got 0"),
    ("optim.lr=nan", r"optim\.lr: expected a finite number above 0, got nan"),
    ("optim.max_grad_norm=0", r"optim\.max_grad_norm: expected"),
    ("optim.betas=[0.9]", r"optim\.betas: expected two numbers .* got \[0\.9\]"),
    ("optim.betas=[0.9,1.0]", r"optim\.betas: expected two numbers"),
    ("optim.weight_decay=-1", r"optim\.weight_decay: expected at least 0, got -1"),
    ("optim.warmup_steps=-1", r"optim\.warmup_steps: expected at least 0"),
    ("optim.micro_batch_size=0", r"optim\.micro_batch_size: expected at least 1"),
    ("optim.final_lr_fraction=2", r"optim\.final_lr_fraction: expected a number from 0 to 1, got 2"),
    ("experts.math.weight=heavy", r"experts\.math\.weight=heavy: .*Float"),
    ("objective.normalise=tokens", r"objective\.normalise: expected one of token_mean, sequence_mean, got 'tokens'"),
    ("objective.chunk_size=1.5", r"objective\.chunk_size: expected a whole number.*got 1\.5"),
    ("objective.student_temperature=hot", r"objective\.student_temperature: expected a number, got 'hot'"),
    ("sampler.shuffle=3", r"sampler\.shuffle: expected true or false, got 3"),
    ("data.domains=[1,2]", r"data\.domains: expected a list of text, got \[1, 2\]"),
    ("data.domains={a:1}", r"data\.domains={a:1}: "),
    ("sampler.mixture=[math]", r"sampler\.mixture: expected a mapping of text to .*got \['math'\]"),
    ("data=jsonl", r"data\.path: expected text, got nothing; set data\.path="),
    ("data=jsonl data.path=null", r"data\.path: expected text, got None"),
    ("tracker=[wandb] tracker.wandb.mode=onlin", r"tracker\.wandb\.mode: expected one of offline, online, disabled"),
    ("divergence=jsd divergence.beta=half", r"divergence\.beta: expected a number, got 'half'"),
    # nothing to do
    ("experts=[]", r"experts: expected at least one expert, got none"),
    ("experts=[math] experts.math.weight=0", r"expected at least one weight above 0, got \{'math': 0\.0\}"),
    # syntax
    ("max_steps", r"does not parse: expected key=value, got 'max_steps"),
    ("=3", r"an override cannot be used: .*got '=3"),
    ("router=null", r"an override cannot be used: .*got 'router=null"),
    ("experts=[math,", r"does not parse: expected key=value, got 'experts=\[math,"),
    ("rollout.seed=${nope}", r"Interpolation key 'nope' not found"),
    # combinations
    ("support=sampled", r"support=sampled is not defined for objective=DivergenceObjective.*objective=policy_gradient"),
    ("objective=sampled_loss", r"support=full is not defined for objective=.*Choose support=sampled"),
    ("support=topk objective=policy_gradient", r"support=topk is not defined for objective=.*full, sampled"),
    (
        "conflict=sum_of_divergences objective=policy_gradient",
        r"conflict=sum_of_divergences keeps one loss a teacher.*linear",
    ),
    (
        "conflict=sum_of_divergences support=sampled objective=sampled_loss",
        r"support=sampled is not defined for conflict=",
    ),
    ("conflict=pcgrad mix.reference=0.1", r"conflict=pcgrad combines gradients of teachers.*Set both to 0"),
    ("conflict=cagrad conflict.c=1", r"conflict\.c: expected a radius from 0 to below 1, got 1"),
    ("conflict=perplexity conflict.temperature=0", r"conflict\.temperature: .*conflict=min_ce"),
    (
        "support=topk support.k=8 objective=topk objective.k=8 conflict=perplexity",
        r"support=topk is not defined for conflict=",
    ),
    ("conflict=agreement conflict.disagreement=entropy", r"conflict\.disagreement: expected one of jsd, neg_log_z"),
    ("conflict=anchored conflict.nats=-1", r"conflict\.nats: expected a budget of at least 0 nats, got -1"),
    (
        "support=sampled objective=policy_gradient conflict=max_peak",
        r"support=sampled is not defined for conflict=MaxPeak.*conflict=.*geometric.*linear.*power.*select",
    ),
    ("support=topk objective=topk conflict=geometric", r"support=topk is not defined for conflict=Geometric"),
    (
        "support=topk objective=topk objective.k=64",
        r"objective\.k=64 asks for more .* choose objective\.k=32 or support",
    ),
    ("support=topk objective=topk objective.source=student", r"source=student needs .*source=teacher\|intersection"),
    ("support=topk objective=topk objective.teacher_temperature=2", r"teacher_temperature=2\.0 .* would be ignored"),
    ("objective=topk divergence=renyi objective.truncation=plain", r"renyi"),
    ("objective=policy_gradient objective.estimator=k3", r"estimator.*k1"),
    ("objective=policy_gradient objective.estimator=k4", r"objective\.estimator: expected one of k1, k2, k3, got 'k4'"),
    ("objective=policy_gradient objective.advantage=divergence", r"expected gradient is exactly zero"),
    ("objective=sampled_loss support=sampled objective.estimator=k1", r"k1.*objective=policy_gradient"),
    (
        "support=sampled objective=policy_gradient objective.baseline=reverse_kl",
        r"needs the teachers' whole distributions",
    ),
    (
        "support=sampled objective=policy_gradient token_weights=[tip]",
        r"token_weights=tip reads divergence, which support=samp",
    ),
    ("token_weights=[tipp]", r"token_weights: there is no option 'tipp'; did you mean 'tip'"),
    ("token_weights=[tip] token_weights.tip.rho=2", r"rho.*got 2"),
    ("balance=sigmaa", r"balance: there is no option 'sigmaa'; did you mean 'sigma'"),
    (
        "conflict=geometric conflict.sequence_penalty=1 objective=topk",
        r"sequence_penalty=1.* objective=divergence alone",
    ),
    ("conflict=geometric conflict.sequence_penalty=-1", r"conflict\.sequence_penalty: expected a finite weight"),
    ("mix.outcome=0.5", r"mix\.outcome=0\.5 needs group_size of at least 2, got 1"),
    ("mix.reference=-1", r"mix\.reference: expected a finite weight of at least 0, got -1"),
    ("mix.refrence=1", r"there is no key 'mix\.refrence'; in 'mix': did you mean 'reference'"),
    ("optim.updates_per_step=0", r"optim\.updates_per_step: expected at least 1, got 0"),
    ("divergence=jsd divergence.beta=1", r"expected 0 < beta < 1"),
    ("divergence=renyi divergence.order=-1", r"order"),
    ("support.k=3", r"support\.k: expected a number with support=topk and null otherwise, got 3"),
    ("support.name=topk", r"support\.k: expected a number with support=topk"),
    # code from data
    ("router._target_=os.system", r"router\._target_: expected a class below moteach\., got 'os\.system'"),
    ("router.fallback={_target_:os.system}", r"router\.fallback: expected text or null"),
    (
        "router._target_=moteach.routing.label.LabelRoutr",
        r"has no 'LabelRoutr'; did you mean 'LabelRouter'",
    ),
    ("expert_path=[/no/such/folder]", r"expected a folder of expert cards at /no/such/folder \(from expert_path\)"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[overrides for overrides, _ in WRONG])
def test_a_wrong_override_is_refused_in_one_line(
    overrides: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(["train", *overrides.split(" "), f"run_dir={run_dir}"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("moteach train: ")
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    assert re.search(message, output.err), output.err
    assert not run_dir.exists()


def test_a_space_inside_an_override_is_refused_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "foo bar"]) == 2
    assert "does not parse: expected key=value, got 'foo bar'" in capsys.readouterr().err


def test_an_error_of_a_job_of_a_sweep_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "max_steps=0", "seed=0,1", "--multirun", f"run_dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == "moteach train: max_steps: expected at least 1, got 0\n"


def test_a_config_can_be_printed_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "divergence=jsd", f"run_dir={tmp_path / 'run'}"]) == 0
    assert "_target_: moteach.divergences.full.JSD" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_same_process_can_go_on_after_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["train", "router=lable"]) == 2
    assert main(["train", "--cfg", "job", f"run_dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().err.count("did you mean 'label'") == 2


def test_values_of_an_expert_that_is_not_chosen_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", "experiment=recovery", "experts=[code,search]", f"run_dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "got some of 'self', which is not among experts=[...]" in line
