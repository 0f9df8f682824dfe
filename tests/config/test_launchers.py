"""Launchers of sweeps, and the example of two nodes: they compose and validate without the machines they are for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from moteach.cli.app import prepare, run_app
from moteach.config.validate import validate
from moteach.errors import MissingDependencyError, UnsupportedCombinationError
from moteach.paths import conf_dir

LAUNCHERS = sorted((conf_dir() / "hydra" / "launcher").glob("*.yaml"))


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=hydra)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_composes_without_its_plugin_and_takes_overrides(path: Path) -> None:
    ray = path.stem == "ray_tasks"
    key = "ray.remote.num_cpus" if ray else "timeout_min"
    cfg = composed(f"hydra/launcher={path.stem}", f"hydra.launcher.{key}=7", hydra=True)
    launcher = cfg.hydra.launcher
    assert OmegaConf.select(launcher, key) == 7
    plugin = "hydra_ray_launcher" if ray else "hydra_submitit_launcher"
    assert str(launcher._target_).startswith(f"hydra_plugins.{plugin}.")
    assert set(launcher) == ({"_target_", "ray"} if ray else {*launcher, "name", "submitit_folder"})


@pytest.mark.parametrize(("launcher", "extra"), [("slurm", "slurm"), ("local", "slurm"), ("ray_tasks", "ray")])
def test_a_launcher_without_its_package_is_refused_before_the_first_run(launcher: str, extra: str) -> None:
    plugin = "hydra_ray_launcher" if extra == "ray" else "hydra_submitit_launcher"
    try:
        there = find_spec(f"hydra_plugins.{plugin}")
    except ModuleNotFoundError:
        there = None
    if there is not None:
        pytest.skip(f"{plugin} is installed")
    started: list[DictConfig] = []
    with pytest.raises(MissingDependencyError, match=rf"pip install 'moteach\[{extra}\]'"):
        run_app("train", ["seed=1,2", f"hydra/launcher={launcher}", "--multirun"], started.append)
    assert not started


SERVED = ["rollout=vllm", "rollout.url=http://student-0:8000", "rollout.allowed_hosts=[student-0]", "eval=none"]
SERVED += ["rollout.folder=/shared/weights", "rollout.concurrency=16"]


@pytest.mark.parametrize("more", [[], SERVED], ids=["in process", "served"])
def test_the_example_of_two_nodes_is_valid_with_teachers_behind_servers(more: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(("law", "latin")):
        card = f"url: http://teacher-{number}:8000\ndomains: [{name}]\n"
        (tmp_path / f"{name}.yaml").write_text(card, encoding="utf-8")
    prepare([tmp_path])
    try:
        cfg = composed("experiment=two_nodes", "experts=[law,latin]", "student.model=org/base", *more)
    finally:
        prepare()
    validate(cfg)
    text = (conf_dir() / "experiment" / "two_nodes.yaml").read_text(encoding="utf-8")
    assert all(word in text for word in more)
    assert (cfg.support.name, cfg.support.k) == ("topk", 64)
    assert {expert.url.split(":")[1].strip("/") for expert in cfg.experts.values()} <= set(cfg.teachers.allowed_hosts)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_refusal_in_another_process_is_no_success(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here refusals are noted and told once, after the sweep; of a job in another process only what it raises comes back."""
    seen = []

    def task(cfg: DictConfig) -> None:
        seen.append(cfg.seed)
        if elsewhere:
            monkeypatch.setattr("moteach.cli.app.os.getpid", lambda: -1)
        raise UnsupportedCombinationError("these two do not meet")

    sweep = ["seed=1,2", f"run_dir={tmp_path}", f"hydra.sweep.dir={tmp_path}", "--multirun"]
    with pytest.raises(UnsupportedCombinationError, match=r"^these two do not meet$"):
        run_app("train", sweep, task)
    assert seen == [1, 2]
    # what Hydra says of a job that raised
    assert ("Error executing job" in capsys.readouterr().err) == elsewhere
