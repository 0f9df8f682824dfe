"""Runs one Hydra app with moteach's conventions: no folders of Hydra's own, errors raised instead of printed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moteach.catalogue.registry import read_catalogue, register_with_hydra
from moteach.config.schema import register_schema
from moteach.errors import ConfigError, MissingDependencyError, MoteachError, nearest
from moteach.paths import conf_dir, experts_dir

_OWN_FOLDERS_OFF = (
    "hydra.run.dir=.",
    "hydra.sweep.dir=runs",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)

_PLUGINS = {"hydra_submitit_launcher": "slurm", "hydra_ray_launcher": "ray"}
"""The extra that brings a package of Hydra's plugins."""
_FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)


def run_app(config_name: str, argv: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Composes `config_name` with the overrides in `argv` and runs `task` on it, once or per job of a sweep.

    Raises:
        ConfigError: When the overrides do not compose, in one line with the nearest valid choices.
        MoteachError: What the task raised; in a sweep the first one, after the other jobs.
    """
    prepare(expert_folders(argv))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    chosen = {argument.split("=", 1)[0].lstrip("+~") for argument in argv}
    defaults = [setting for setting in _OWN_FOLDERS_OFF if setting.split("=", 1)[0] not in chosen]
    refused: list[MoteachError] = []
    home = os.getpid()
    composed = False

    def guarded(cfg: DictConfig) -> Any:
        # Hydra announces every exception of a job on its own; ours are one line, printed once.
        nonlocal composed
        composed = True
        try:
            return task(cfg)
        except MoteachError as error:
            refusal: MoteachError = error
        except OmegaConfBaseException as error:
            refusal = ConfigError(explain(error, list(argv), config_name))
        if os.getpid() != home:
            # a launcher runs the jobs of a sweep elsewhere: what is only noted there would pass for a success here
            raise refusal
        refused.append(refusal)
        return None

    saved = sys.argv
    sys.argv = [f"moteach {config_name}", *defaults, *overrides_first(argv)]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(guarded)()
    except MoteachError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, list(argv), config_name)) from error
    except ValueError as error:
        # Hydra's parser of overrides raises it bare; one of a job is a defect and keeps its traceback.
        if composed:
            raise
        raise ConfigError(f"an override cannot be used: {error}; got {' '.join(argv)!r}") from error
    except RuntimeError as error:
        # what Hydra raises, bare, for a launcher or sweeper whose package is not here
        if composed or "Unknown plugin class" not in str(error):
            raise
        raise MissingDependencyError(_missing_plugin(str(error))) from error
    finally:
        sys.argv = saved
    if refused:
        raise refused[0]


def _missing_plugin(said: str) -> str:
    extra = next((extra for part, extra in _PLUGINS.items() if part in said), None)
    remedy = f"pip install 'moteach[{extra}]'" if extra else "install the package that has it"
    return (
        f"expected the Hydra plugin of the chosen launcher or sweeper, got {said[:1].lower()}{said[1:]}; no run was "
        f"started: {remedy}, or leave the choice out"
    )


def overrides_first(argv: Sequence[str]) -> list[str]:
    """Moves Hydra's flags behind the overrides: its parser refuses overrides on both sides of a flag.

    Raises:
        ConfigError: A flag is not one of Hydra's.
    """
    for flag in (argument.partition("=")[0] for argument in argv if argument[:1] == "-"):
        if flag not in _FLAGS:
            raise ConfigError(f"expected a flag of Hydra or key=value, got '{flag}'; {nearest(flag, _FLAGS)}")
    overrides = [argument for argument in argv if argument[:1] == "~" or (argument[:1] != "-" and "=" in argument)]
    return [*overrides, *(argument for argument in argv if argument not in overrides)]


def prepare(expert_path: Sequence[Path] = ()) -> None:
    """Registers resolvers, schemas and the expert catalogue with Hydra; may be called again."""
    OmegaConf.register_new_resolver("moteach.shipped", _shipped, replace=True)
    OmegaConf.register_new_resolver("moteach.job", _job_suffix, replace=True)
    register_schema()
    register_with_hydra(read_catalogue(expert_path))


def expert_folders(argv: Sequence[str]) -> list[Path]:
    """Reads `expert_path=DIR` or `expert_path=[DIR,DIR]` from the command line, before composition."""
    for argument in argv:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "expert_path" and value:
            return [Path(part.strip().strip("'\"")) for part in value.strip("[]").split(",") if part.strip()]
    return []


def _shipped(name: str) -> str:
    return str({"experts": experts_dir, "conf": conf_dir}[name]())


def _job_suffix() -> str:
    """`-3` in the third job of a sweep, so that jobs of one second do not share a folder; nothing in a single run."""
    if not HydraConfig.initialized():
        return ""
    job = HydraConfig.get().job
    number = None if OmegaConf.is_missing(job, "num") else job.num
    return "" if number is None else f"-{number}"


def explain(error: Exception, argv: list[str], config_name: str) -> str:
    """Turns a compose error into one line that names what was given and the nearest valid choices."""
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    if match := re.search(r"(?:Could not find|Could not load) '([\w/.\-]+)'", text):
        group, _, option = match[1].rpartition("/")
        known = group_options(group)
        if known or group == "experts":
            return f"{group}: there is no option '{option}'; {nearest(option, known)}"
        return f"there is no config '{match[1]}'"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1].split("@")[0]
        return f"there is no key '{key}'; {nearest_key(key, config_name, argv)}"
    if match := re.search(r"Error merging override (\S+)", text):
        reason = text.split("\n")[1].strip() if "\n" in text else text
        if key := re.search(r"Key '(\w+)' (?:is )?not in", text):
            return f"{match[1]}: there is no key '{key[1]}'; {nearest_key(match[1].split('=')[0], config_name, argv)}"
        return f"{match[1]}: {reason}"
    if match := re.search(r"missing mandatory value: name\s+full_key: experts\.([\w-]+)\.name", text):
        return (
            f"experts.{match[1]}: expected values of experts that are chosen, got some of '{match[1]}', which is not among "
            "experts=[...]; choose it, or leave out what sets them (an experiment or a team may)"
        )
    if re.search(
        r"mismatched input|extraneous input|no viable alternative|token recognition error|missing EQUAL|LexerNoViable",
        text,
    ):
        return f"an override does not parse: expected key=value, got {' '.join(argv)!r}; {text.splitlines()[0]}"
    return " ".join(line.strip() for line in text.splitlines()[:3])


def group_options(group: str) -> list[str]:
    """Returns every option of a config group: files of the shipped conf and, for `experts`, the catalogue."""
    if group == "experts":
        return sorted(name.removesuffix(".yaml") for name in ConfigStore.instance().repo.get("experts", {}))
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def nearest_key(key: str, config_name: str, argv: Sequence[str]) -> str:
    """Names the keys of the config, with the options that were chosen, that are closest to a wrong one."""
    GlobalHydra.instance().clear()
    choices = [
        argument
        for argument in argv
        if (conf_dir() / argument.partition("=")[0]).is_dir() or argument.startswith("experts=")
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            cfg = compose(config_name, choices)
        except HydraException:
            cfg = compose(config_name)
    parent, _, name = key.rpartition(".")
    while parent and not isinstance(OmegaConf.select(cfg, parent, throw_on_missing=False), DictConfig):
        parent, _, name = parent.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    keys = [str(child) for child in node if child != "_target_"]
    if not parent:
        return nearest(name, keys)
    return f"in '{parent}': {nearest(name, keys)}" if keys else f"'{parent}' takes no arguments"


def quiet_libraries() -> None:
    """Weights are opened many times in a run; the libraries' own progress bars and notices would bury ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
