"""`moteach specialize expert=NAME`: makes an expert by the recipe of its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from moteach.catalogue.registry import read_catalogue
from moteach.catalogue.spec import ExpertSpec
from moteach.cli.app import quiet_libraries, run_app
from moteach.errors import ConfigError, UnknownChoiceError, nearest
from moteach.types import Prompt

_BASE = "base"
_ANSWER_TOKENS = 24


def run(argv: Sequence[str]) -> None:
    """Runs `moteach specialize` with Hydra's overrides."""
    run_app("specialize", argv, task)


def task(cfg: DictConfig) -> None:
    """Trains one expert and says how good it became.

    Raises:
        UnknownChoiceError: No card has this name.
        ConfigError: The card has no recipe.
    """
    console = Console()
    quiet_libraries()
    output = None if cfg.output is None else Path(cfg.output)
    if cfg.expert == _BASE:
        _arena(console, _BASE, output=output, seed=cfg.seed)
        return
    catalogue = read_catalogue([Path(folder) for folder in cfg.expert_path])
    if cfg.expert not in catalogue:
        raise UnknownChoiceError(
            f"expert: no card is called '{cfg.expert}'; {nearest(cfg.expert, [*catalogue, _BASE])}"
        )
    spec = catalogue[cfg.expert]
    kind = spec.recipe.get("kind")
    if kind == "arena":
        _arena(console, str(spec.recipe["domain"]), output=output, seed=cfg.seed)
    elif kind == "language":
        _language(console, spec, output=output, seed=cfg.seed)
    else:
        raise ConfigError(
            f"expert '{cfg.expert}': expected a recipe of kind 'arena' or 'language' in its card, got {kind!r}; this expert "
            "was not made here"
        )


def _arena(console: Console, name: str, *, output: Path | None, seed: int | None) -> None:
    """Trains the arena's base or one of its experts; writes the model and its entry of the manifest."""
    from moteach.catalogue.modeling import load_causal_lm
    from moteach.data.arena.tokenizer import build_tokenizer
    from moteach.paths import experts_dir
    from moteach.rollouts.hf import HFEngine
    from moteach.specialists.manifest import manifest_entry, save_specialist, write_manifest
    from moteach.specialists.recipe import new_model, recipe_for, specialize

    recipe = recipe_for(name) if seed is None else recipe_for(name, seed=seed)
    tokenizer = build_tokenizer()
    shipped = experts_dir() / "arena"
    model = new_model(recipe, tokenizer) if name == _BASE else load_causal_lm(str(shipped / _BASE))
    engine = HFEngine(seed=recipe.seed).bind(model, tokenizer)
    with console.status(f"training {name}") as status:

        def report(accuracies: Mapping[str, float]) -> None:
            status.update(f"training {name}: " + "  ".join(f"{key} {value:.2f}" for key, value in accuracies.items()))

        made = specialize(recipe, model=model, tokenizer=tokenizer, engine=engine, report=report)
    folder = output or shipped / name
    save_specialist(made, folder, tokenizer=tokenizer)
    write_manifest(folder.parent, {folder.name: manifest_entry(made, folder)})
    console.print(f"{folder}: {made.seconds:.0f} s, stop rule {'met' if made.sft.reached else 'not met'}")
    console.print(_table(made.accuracies))


def _table(accuracies: Mapping[str, Any]) -> Table:
    table = Table(title="held-out accuracy")
    table.add_column("what")
    table.add_column("accuracy", justify="right")
    for group in ("domains", "families"):
        for name, value in accuracies[group].items():
            table.add_row(f"{group[:-1] if group == 'domains' else 'family'} {name}", f"{value:.3f}")
    for family, kinds in accuracies["steps"].items():
        for kind, value in kinds.items():
            table.add_row(f"{kind} step of {family}", f"{value:.3f}")
    return table


def greedy_scores(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[float]:
    """Verified score of a model's greedy answer to each prompt."""
    from moteach.config.assemble import decoder, grade_prompt
    from moteach.evaluation.runner import grade_rollouts
    from moteach.rollouts.hf import HFEngine

    engine = HFEngine(max_new_tokens=_ANSWER_TOKENS).bind(model, tokenizer)
    batch = engine.generate(prompts, step=0, temperature=0.0)
    return grade_rollouts(batch, grade=grade_prompt, decode=decoder(tokenizer))


def _language(console: Console, spec: ExpertSpec, *, output: Path | None, seed: int | None) -> None:
    """Fine-tunes a language model and compares it with where it started, by the verifier."""
    from moteach.specialists.language import specialize_language_model

    with console.status(f"training {spec.name}") as status:

        def report(accuracies: Mapping[str, float]) -> None:
            status.update(
                f"training {spec.name}: " + "  ".join(f"{key} {value:.2f}" for key, value in accuracies.items())
            )

        made = specialize_language_model(spec, output=output, seed=seed, measure=greedy_scores, report=report)
    console.print(f"{made.output}: {made.steps} steps, {made.seconds:.0f} s")
    table = Table(title="held-out, verified")
    for column in ("task", "before", "after"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, value in made.after.items():
        table.add_row(name, f"{made.before[name]:.3f}", f"{value:.3f}")
    console.print(table)
