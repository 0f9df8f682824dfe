"""`moteach route fit | explain | eval`: learn a router, say why a prompt or token goes where, compare routes with labels."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moteach.catalogue.spec import ExpertSpec
from moteach.cli.app import quiet_libraries, run_app
from moteach.cli.route_prompt import fresh_rows
from moteach.cli.route_tokens import show, show_rows
from moteach.errors import ConfigError, nearest

_ACTIONS = ("fit", "explain", "eval")


def run(argv: Sequence[str]) -> None:
    """Runs `moteach route ACTION` with Hydra's overrides; `explain` takes the text of a prompt, or `run=DIR`, or both.

    Raises:
        ConfigError: The action is none of them, or `explain` has no text.
    """
    if not argv or argv[0] not in _ACTIONS:
        given = argv[0] if argv else "nothing"
        raise ConfigError(f"expected an action, got {given}; {nearest(given, _ACTIONS)}")
    action, rest = argv[0], list(argv[1:])
    command = f"moteach route {shlex.join(argv)}"
    if action == "explain" and any(word.startswith("run=") for word in rest):
        text = None if _is_override(rest[0]) else rest.pop(0)
        run_app("route", rest, partial(explain_tokens, command=command, text=text))
    elif action == "explain":
        if not rest or not rest[0].strip() or rest[0].startswith("--"):
            raise ConfigError('expected the text of a prompt, got none: moteach route explain "12+30=", or run=DIR')
        run_app("route", rest[1:], partial(explain, text=rest[0]))
    else:
        run_app("route", rest, partial(fit if action == "fit" else evaluate, command=command))


def _is_override(word: str) -> bool:
    """Tells an override from a prompt, which may have an equals sign too (`12+30=`): by the name before it."""
    from moteach.config.schema import RouteConfig

    name = word.lstrip("+~").partition("=")[0].split(".")[0].split("@")[0]
    return word.startswith("--") or ("=" in word and (name in RouteConfig.__dataclass_fields__ or name == "hydra"))


def fit(cfg: DictConfig, *, command: str) -> float | None:
    """Learns from the exemplars, saves to `run_dir/router`, shows what was learned.

    Returns:
        Accuracy on the exemplars, each scored by a head that has not seen it.
    """
    router, _, _ = _router(cfg)
    learned = _learned(router, "fit")
    folder = Path(cfg.run_dir) / "router"
    learned.save_pretrained(folder)
    counts = learned.exemplars.owners.sum(dim=0).tolist()
    rows = [{"expert": name, "exemplars": n} for name, n in zip(learned.exemplars.names, counts, strict=True)]
    share: float | None = learned.held_out_accuracy()
    console = Console()
    table = Table(title=f"{learned.router}: {learned.embedder.encoder.identity}")
    table.add_column("expert")
    table.add_column("exemplars", justify="right")
    for row in rows:
        table.add_row(str(row["expert"]), str(row["exemplars"]))
    console.print(table)
    if share is not None:
        console.print(f"accuracy on exemplars held out in turn: {share:.3f}")
    console.print(f"saved to {folder}", soft_wrap=True)
    _write(cfg.out, {"rows": rows, "held_out_accuracy": share, "router": str(folder)}, command)
    return share


def explain(cfg: DictConfig, *, text: str) -> None:
    """Shows the weights of one prompt, how sure the router is, and the exemplars that are nearest."""
    if not cfg.nearest >= 1:
        raise ConfigError(f"nearest: expected at least 1, got {cfg.nearest}")
    router, experts, _ = _router(cfg)
    learned = _learned(router, "explain")
    routing, scores, unsure = learned.decide([text])
    console = Console()
    table = Table(title=escape(text if len(text) <= 60 else f"{text[:57]}..."))
    for column in ("expert", "weight", "probability"):
        table.add_column(column, justify="left" if column == "expert" else "right")
    for place, expert in enumerate(experts):
        weight, probability = float(routing.weights[0, place]), float(scores.probabilities[0, place])
        table.add_row(expert.name, f"{weight:.3f}", f"{probability:.3f}")
    console.print(table)
    verdict = f"yes, on_abstain={cfg.router.on_abstain}" if bool(unsure[0]) else "no"
    console.print(
        f"confidence {float(scores.confidence[0]):.3f}   similarity {float(scores.similarity[0]):.3f}   "
        f"energy {float(scores.energy[0]):.3f}   abstains: {verdict}",
        highlight=False,
        soft_wrap=True,
    )
    close = Table(title="nearest exemplars")
    for column in ("cosine", "expert", "exemplar"):
        close.add_column(column, overflow="fold")
    found = learned.nearest(text, count=cfg.nearest)
    for exemplar, names, cosine in found:
        close.add_row(f"{cosine:.3f}", ", ".join(names), escape(exemplar))
    console.print(close)
    weights = dict(zip(routing.teacher_ids, routing.weights[0].tolist(), strict=True))
    rows = [{"exemplar": exemplar, "experts": list(names), "cosine": cosine} for exemplar, names, cosine in found]
    report = {
        "text": text,
        "weights": weights,
        "confidence": float(scores.confidence[0]),
        "similarity": float(scores.similarity[0]),
        "energy": float(scores.energy[0]),
        "abstains": bool(unsure[0]),
        "rows": rows,
    }
    _write(cfg.out, report, f"moteach route explain {shlex.quote(text)}")


def explain_tokens(cfg: DictConfig, *, command: str, text: str | None = None) -> None:
    """Shows completions of a traced run, or the answer of its student to `text`, coloured by the teacher of each token."""
    from moteach.config.validate import check_keys

    check_keys(cfg)
    if not cfg.nearest >= 1:
        raise ConfigError(f"nearest: expected at least 1, got {cfg.nearest}")
    run_dir = Path(cfg.run).expanduser()
    if text is None:
        rows = show(run_dir, count=cfg.nearest, console=Console())
    else:
        rows = show_rows(fresh_rows(run_dir, text), count=1, console=Console())
    _write(cfg.out, {"rows": rows}, command)


def evaluate(cfg: DictConfig, *, command: str) -> float:
    """Compares the routes of labelled prompts with their labels; returns the accuracy."""
    from moteach.config.build import build
    from moteach.config.validate import check_component
    from moteach.routing.evaluate import measure, read_prompts

    router, experts, seconds = _router(cfg)
    if cfg.prompts is not None:
        prompts = read_prompts(Path(cfg.prompts).expanduser())
    else:
        from moteach.catalogue.modeling import load_tokenizer

        check_component(cfg.data, where="data")
        tokenizer = load_tokenizer(cfg.student.model, revision=cfg.student.revision)
        prompts = list(build(cfg.data, where="data").load(tokenizer).evaluation)
    report = measure(router, prompts, experts) | {"seconds_to_fit": seconds}
    console = Console()
    console.print(_table(report))
    shown = ("accuracy", "ece", "aurc", "macro_f1", "coverage", "routed_accuracy", "coverage_at_risk")
    console.print(
        "   ".join(f"{name} {report[name]:.4f}" for name in shown if report[name] is not None),
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"regret against the oracle teacher {report['regret']:.4f}   {report['prompts_per_second']:.0f} prompts a second   "
        f"fitted or opened in {seconds:.2f} s",
        highlight=False,
        soft_wrap=True,
    )
    if report["ood_auroc"] is not None:
        values = "   ".join(f"{name} {value:.3f}" for name, value in report["ood_auroc"].items())
        console.print(f"AUROC against prompts that no expert claims: {values}", highlight=False, soft_wrap=True)
    _write(cfg.out, report, command)
    return float(report["accuracy"])


def _router(cfg: DictConfig) -> tuple[Any, tuple[ExpertSpec, ...], float]:
    """Makes the router of the config and binds it to the experts; also the seconds that took, in which it learns."""
    from moteach.config.build import build
    from moteach.config.validate import check_component, check_keys

    check_keys(cfg)
    check_component(cfg.router, where="router")
    if not cfg.experts:
        raise ConfigError("experts: expected at least one expert, got none; nobody could be chosen")
    quiet_libraries()
    found = [OmegaConf.to_object(cfg.experts[name]) for name in cfg.experts]
    experts = tuple(expert for expert in found if isinstance(expert, ExpertSpec))
    router = build(cfg.router, where="router")
    begin = time.perf_counter()
    router.bind(experts)
    return router, experts, time.perf_counter() - begin


def _learned(router: Any, action: str) -> Any:
    from moteach.routing.learner import Learner

    learned = getattr(router, "learned", None)
    if not isinstance(learned, Learner):
        raise ConfigError(
            f"route {action}: expected a router that learns from exemplars, got {type(router).__name__}, which has nothing to "
            f"{'save' if action == 'fit' else 'show'}. Try router=embedding_prototype, embedding_knn, classifier or finetuned"
        )
    return learned


def _table(report: Mapping[str, Any]) -> Table:
    names = list(report["contingency"])
    table = Table(title="routes against labels")
    for column in ("label", "prompts", "accuracy", "confidence", "coverage"):
        table.add_column(column, justify="left" if column == "label" else "right")
    for row in report["rows"]:
        share = "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        table.add_row(row["label"], str(row["prompts"]), share, f"{row['confidence']:.3f}", f"{row['coverage']:.3f}")
    wrong = [
        f"{label} -> {chosen}: {report['contingency'][label][chosen]}"
        for label in names
        for chosen in names
        if label != chosen and report["contingency"][label][chosen]
    ]
    table.caption = "confused: " + ("; ".join(wrong) if wrong else "nothing")
    return table


def _write(out: str | None, report: Mapping[str, Any], command: str) -> None:
    if out:
        said = {**report, "command": command, "machine": platform.platform()}
        Path(out).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
