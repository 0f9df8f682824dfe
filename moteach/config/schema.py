"""The schema of a run: one dataclass per group of fixed keys; component groups are checked against their class.

A *component* group (router, divergence, ...) holds `_target_` and the keyword arguments of that class; the constructor is
its schema (`validate.check_components`), so a new option is a class and a YAML, with no list to edit here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from moteach.catalogue.spec import ExpertSpec
from moteach.catalogue.urls import LOOPBACK


@dataclass
class SupportConfig:
    """What a teacher is asked about each token."""

    name: str = "full"
    """`full` (last hidden states), `topk` or `sampled` (logprob of the written token)."""
    k: int | None = None
    """Entries per token, for `topk` only."""


@dataclass
class LoRAConfig:
    """A low-rank update that is trained in the place of the student's weights."""

    rank: int | None = None
    """Of the update; None trains all weights."""
    alpha: float | None = None
    """Scale times rank; None: twice the rank."""
    dropout: float = 0.0
    targets: list[str] | None = None
    """Ends of the names of the layers that get one; None: every linear layer but the head."""


@dataclass
class StudentConfig:
    """The model that is trained."""

    model: str = MISSING
    """Folder or hub id of the starting checkpoint."""
    revision: str | None = None
    """Commit of a hub checkpoint."""
    dtype: str = "float32"
    """Dtype of the trained parameters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    compute_dtype: str | None = None
    """With several ranks, the precision of forward and backward (`bfloat16`); parameters keep `dtype`, sums are float32."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class HttpConfig:
    """How teachers behind servers (cards with `url:`) are asked."""

    concurrency: int = 8
    """Requests in flight at one server; also the number of pooled connections."""
    timeout: float = 120.0
    """Seconds of one attempt, from connecting to the last byte."""
    deadline: float = 600.0
    """Seconds for a teacher's share of a step, repetitions included."""
    attempts: int = 5
    """Attempts of one request; only errors of transport, 429, 5xx and damaged answers are repeated."""
    backoff: float = 0.5
    """Seconds before the second attempt; doubled each time, 16 at most."""
    max_response_bytes: int = 536870912
    """Largest answer that is read."""
    wait: float = 0.0
    """Seconds for which the run waits for a server that is down, before it counts as unavailable; `inf` waits for ever."""
    breaker_failures: int = 3
    """Failed calls in a row after which a server is left alone."""
    breaker_cool_down: float = 30.0
    """Seconds for which it is; then one call may try."""


@dataclass
class TeachersConfig:
    """How teachers score."""

    max_tokens_per_forward: int = 16384
    """Padded tokens in one teacher forward; bounds the memory of scoring."""
    memory: str | None = None
    """Most weights of teachers in memory at once, such as `2GiB`; the others wait on disk. None keeps all loaded."""
    hidden_dtype: str | None = None
    """Precision in which hidden states wait for the loss, `float32` or `bfloat16`; None keeps the teacher's own."""
    allowed_hosts: list[str] = field(default_factory=lambda: list(LOOPBACK))
    """Hosts that cards with `url:` may name."""
    http: HttpConfig = field(default_factory=HttpConfig)
    on_failure: str = "stop"
    """Rows of a teacher that is dead or does not answer: `stop`, `drop`, `renormalise` or `fallback:<expert>`."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    schedule: str = "cosine"
    """`cosine` (to `final_lr_fraction`), `linear` or `constant` after the warm-up."""
    final_lr_fraction: float = 0.0
    """Learning rate of the last step as a fraction of `lr`."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; `inf` turns it off."""
    micro_batch_size: int | None = None
    """Rows of one forward and backward; gradients add up exactly. None: the whole batch."""
    updates_per_step: int = 1
    """Optimizer steps per batch of rollouts, each on its own share of the rows; above 1 the later ones are off-policy."""


@dataclass
class EvalConfig:
    """Held-out evaluation with verifiers, greedy."""

    enabled: bool = True
    """Measure the student before and after, and every teacher on its own domains."""
    prompts_per_domain: int | None = None
    """Use only the first so many held-out prompts of a domain; None: all."""
    max_new_tokens: int | None = None
    """Length limit while evaluating; None: the rollout engine's."""
    extra_domains: list[str] = field(default_factory=list)
    """Domains that are only evaluated (raw accuracy), never trained on."""
    divergence: bool = False
    """Also measure the held-out reverse KL from the student to its routed teacher, before and after."""


@dataclass
class MixConfig:
    """What is mixed into the teachers' loss; a weight of zero leaves a term out."""

    outcome: float = 0.0
    """Weight of the group-relative advantage of the verified outcome (MiMo-V2-Flash, Eq. 9); needs group_size >= 2."""
    outcome_normalise: bool = True
    """Divide a group's centred scores by their standard deviation."""
    reference: float = 0.0
    """Weight of the exact KL(student || reference)."""
    reference_model: str | None = None
    """Folder or hub id of the reference; None: the checkpoint the student starts from."""
    reference_revision: str | None = None
    supervised: float = 0.0
    """Weight of the cross-entropy on the prompts' own answers."""


@dataclass
class CheckpointConfig:
    """Crash-safe checkpoints; a run that finds one in its `run_dir` resumes."""

    every_steps: int = 100
    """Steps between checkpoints; 0 keeps only the last one."""
    keep_last: int = 2
    """How many checkpoints stay on disk."""


@dataclass
class TraceConfig:
    """What is written about every rollout."""

    completions: bool = True
    """Write `rollouts.parquet` with the text of every completion."""
    gradient_cosine_every: int = 0
    """Steps between measurements of the gradients' cosine between domains (one more backward a domain); 0 never."""
    diagnostics_every: int = 0
    """Steps between looks at the 16 likeliest tokens of student and target (one more forward of the student,
    about 14 % of a step of the default job); 0 never.

    Needs `support=full`; on other supports nothing can be compared and nothing is told.
    """


@dataclass
class TrainConfig:
    """The main job: multi-teacher on-policy distillation."""

    seed: int = 0
    """Seed of sampling noise, prompt order and initialisation of learned parts."""
    max_steps: int = MISSING
    """Optimizer steps."""
    run_dir: str = MISSING
    """Where the run is written; an existing run is resumed."""
    group_size: int = 1
    """Completions per prompt."""
    threads: int | None = None
    """CPU threads of torch; None: one for a student below two million parameters, else torch's choice."""
    expert_path: list[str] = field(default_factory=list)
    """More folders of expert cards; read from the command line before composition."""
    experts: dict[str, ExpertSpec] = field(default_factory=dict)
    team: str | None = None
    """Name of the mix of experts that was chosen, if any."""
    router: Any = MISSING
    teacher_gate: Any = MISSING
    alignment: Any = MISSING
    gate: Any = MISSING
    conflict: Any = MISSING
    objective: Any = MISSING
    divergence: Any = MISSING
    token_weights: dict[str, Any] = field(default_factory=dict)
    balance: Any = MISSING
    mix: MixConfig = field(default_factory=MixConfig)
    sampler: Any = MISSING
    rollout: Any = MISSING
    data: Any = MISSING
    tracker: dict[str, Any] = field(default_factory=dict)
    support: SupportConfig = field(default_factory=SupportConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)


@dataclass
class ExpertsConfig:
    """`moteach experts check`."""

    seed: int = 0
    expert_path: list[str] = field(default_factory=list)
    experts: dict[str, ExpertSpec] = field(default_factory=dict)
    team: str | None = None
    student: StudentConfig = field(default_factory=StudentConfig)
    data: Any = MISSING
    probe_prompts: int = 32
    """Held-out prompts of the expert's domains to compare on."""
    max_new_tokens: int = 16
    max_reverse_kl: float | None = None
    min_overlap: float | None = None
    allowed_hosts: list[str] = field(default_factory=lambda: list(LOOPBACK))
    """Hosts that cards with `url:` may name."""
    out: str | None = None


@dataclass
class EvalCommandConfig:
    """`moteach eval`."""

    seed: int = 0
    run: str | None = None
    model: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    data: Any = MISSING
    rollout: Any = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    out: str | None = None


@dataclass
class RouteConfig:
    """`moteach route`."""

    seed: int = 0
    run_dir: str = MISSING
    """`route fit` saves to `run_dir/router`."""
    expert_path: list[str] = field(default_factory=list)
    experts: dict[str, ExpertSpec] = field(default_factory=dict)
    team: str | None = None
    router: Any = MISSING
    student: StudentConfig = field(default_factory=StudentConfig)
    data: Any = MISSING
    run: str | None = None
    """Folder of a run trained with `gate.trace=true`, whose tokens `route explain` shows; with a prompt, of a run
    whose student answers it."""
    prompts: str | None = None
    """Labelled JSONL of `route eval`; None: the held-out prompts of `data`."""
    nearest: int = 5
    """Exemplars that `route explain` shows; of a run, completions a domain."""
    out: str | None = None


@dataclass
class SpecializeConfig:
    """`moteach specialize`."""

    expert: str = MISSING
    """Name of the card whose recipe is run, or `base` for the arena's base."""
    output: str | None = None
    """Where the model is written; None: where the card expects it."""
    seed: int | None = None
    """Seed of the recipe; None: the recipe's own."""
    expert_path: list[str] = field(default_factory=list)


COMPONENT_GROUPS = (
    *("router", "teacher_gate", "alignment", "gate", "conflict", "objective", "divergence", "balance"),
    *("sampler", "rollout", "data"),
)
"""Groups whose node is one component: `_target_` and its arguments."""

MULTI_GROUPS = ("token_weights", "tracker")
"""Groups of which several options may be chosen: a component under the name of each."""

IGNORED_ON_RESUME = frozenset(
    {"run_dir", "tracker", "checkpoint", "threads", "expert_path", "team", "trace", "teachers"}
)
"""Top-level keys that may change between a run and its resumption: they do not change the weights.

`eval` may not: what was measured before training would be compared with something else after it.
"""


def register_schema() -> None:
    """Puts the schemas into Hydra's store, under the names the shipped configs refer to."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="experts_schema", node=ExpertsConfig)
    store.store(name="eval_schema", node=EvalCommandConfig)
    store.store(name="route_schema", node=RouteConfig)
    store.store(name="specialize_schema", node=SpecializeConfig)
