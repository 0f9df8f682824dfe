"""What students are compared with: the untrained one, each teacher in its domain, and the step oracle of composites."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moteach.bench._students import greedy_accuracy
from moteach.types import Prompt

_ENDS = "=>"
"""What ends the look-up of a composite answer."""


def references(overrides: Sequence[str], *, folder: Path, extra_domains: Sequence[str] = ()) -> dict[str, Any]:
    """Measures student and teachers of a run without training; kept in `folder`.

    Returns:
        `before` by domain; `teachers` by name, then domain; and `step_oracle` where composites are measured.
    """
    from moteach.cli.app import run_app

    asked = hashlib.sha256(json.dumps([list(overrides), list(extra_domains)]).encode()).hexdigest()[:20]
    path = folder / f"reference-{asked}.json"
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    found: dict[str, Any] = {}

    def task(cfg: Any) -> None:
        from moteach.cli.app import quiet_libraries
        from moteach.config.assemble import assemble

        quiet_libraries()
        cfg.run_dir = str(folder / "never-written")
        job: Any = assemble(cfg)
        domains = ["math", "code", "search", *extra_domains]
        models = {expert.name: job.trainer.teachers.get(expert.name).model for expert in job.experts}
        found["before"] = greedy_accuracy(job, job.trainer.student.model, domains)
        found["teachers"] = {name: greedy_accuracy(job, model, domains) for name, model in models.items()}
        if "composite" in extra_domains:
            kinds = {domain: models[e.name] for e in reversed(job.experts) for domain in e.domains}
            found["step_oracle"] = step_oracle(job, kinds)

    # nobody is routed here; labels would refuse prompts that no expert claims
    run_app("train", ["router=uniform", *overrides, "tracker=[]", "threads=1"], task)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def step_oracle(job: Any, kinds: Mapping[str, Any]) -> float:
    """Accuracy on held-out composites of greedy decoding where each token comes from the expert of its step's kind.

    The look-up is read up to and including the mark that ends it; the expert of the second step continues from there.

    Args:
        job: An assembled run whose data hold composites.
        kinds: The model of each kind of step.
    """
    from moteach.config.assemble import decoder, grade_prompt

    decode = decoder(job.tokenizer)
    prompts = [prompt for prompt in job.prompts.evaluation if prompt.domain == "composite"]
    begun: dict[str, list[tuple[Prompt, Prompt, str]]] = {}
    first = job.engine_for(kinds["search"]).generate(prompts, step=0, temperature=0.0)
    for rollout in first.rollouts:
        written = decode(rollout.completion_ids)
        ends = [written.index(mark) for mark in _ENDS if mark in written]
        kept = min(ends) + 1 if ends else len(written)
        ids = (*rollout.prompt.token_ids, *rollout.completion_ids[:kept])
        continued = replace(rollout.prompt, token_ids=ids)
        kind = str((rollout.prompt.metadata or {})["steps"][-1]["kind"])
        begun.setdefault(kind, []).append((rollout.prompt, continued, written[:kept]))
    right = 0.0
    for kind, rows in begun.items():
        engine = job.engine_for(kinds[kind])
        second = engine.generate([continued for _, continued, _ in rows], step=0, temperature=0.0)
        texts = {rollout.prompt.prompt_id: decode(rollout.completion_ids) for rollout in second.rollouts}
        right += sum(grade_prompt(prompt, start + texts[prompt.prompt_id]) for prompt, _, start in rows)
    return right / len(prompts)
