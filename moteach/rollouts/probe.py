"""Does the server sample from the student's weights? Its logprobs of a fixed text are compared with the student's own.

An answer that all is well is no evidence: vLLM's `reload_weights` gives it where the kernels go on with a packed copy of old
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moteach.distributed import Ranks
from moteach.divergences.projection import project
from moteach.errors import WeightSyncError
from moteach.rollouts.decoding import SamplerSettings, decode, generation_mode
from moteach.rollouts.sampling import keyed_uniforms, pick_tokens
from moteach.types import Head, LossOutput, Prompt, Rollout, RolloutBatch

_MOVED = 1e-4
"""Nats by which the student must have moved before a server that has not is called stale."""


class WeightCheck:
    """Compares logprobs after every sync; of several ranks all run the student, and the first one asks and compares.

    The text is what the student, as it is first seen, writes at temperature 1 after one start token. Two things are refused:
    logprobs further than `tolerance` from the student's own, and logprobs that are bit by bit those of before while the
    student's own have moved: one small update hides below any tolerance that half precision needs.

    Args:
        tokens: Length of the text.
        tolerance: Largest difference of a token's logprobs, in nats.
        start_id: Token the text begins with.
    """

    def __init__(self, *, tokens: int, tolerance: float, start_id: int) -> None:
        self._tokens = tokens
        self._tolerance = tolerance
        self._start_id = start_id
        self._ids: list[int] = []
        self._mine: Tensor | None = None
        self._theirs: Tensor | None = None

    def __call__(
        self,
        student: nn.Module,
        *,
        version: int,
        ask: Callable[[Sequence[int]], Float[Tensor, " token"]],
        ranks: Ranks | None = None,
        root: nn.Module | None = None,
    ) -> float:
        """Compares and returns the largest difference, in nats.

        Args:
            student: Causal language model of transformers.
            version: Optimizer steps it has taken.
            ask: The server's logprobs of every token of a text but the first; called on the first rank alone.
            ranks: The processes that hold the student together.
            root: Around a student in shards, what gathers them layer by layer, see `moteach.students.Student.forward`.

        Raises:
            WeightSyncError: The server has other weights.
        """
        if root is None:
            with generation_mode(student):
                self._ids = self._ids or self._written(student)
                mine = token_logprobs(student, self._ids)
        else:
            with _sharded_mode(root):
                self._ids = self._ids or self._written_in_shards(root)
                logprobs = _logits_in_shards(root, self._ids).double().log_softmax(dim=-1)
            mine = logprobs.gather(1, torch.tensor(self._ids)[1:, None])[:, 0]
        return (Ranks() if ranks is None else ranks).agreed(lambda: self._compared(mine, version, ask))

    def _compared(self, mine: Tensor, version: int, ask: Callable[[Sequence[int]], Float[Tensor, " token"]]) -> float:
        theirs = ask(self._ids).double()
        distance = float((mine - theirs).abs().max())
        stale = self._theirs is not None and torch.equal(theirs, self._theirs)
        moved = 0.0 if self._mine is None else float((mine - self._mine).abs().max())
        if not distance <= self._tolerance or (stale and moved > _MOVED):
            got = f"differences of up to {distance:.3g}"
            if stale and moved > _MOVED:
                got += f", and the very logprobs of before the sync, while the student's moved by up to {moved:.3g}"
            raise WeightSyncError(
                f"expected the rollout server to give {len(theirs)} tokens the student's logprobs within "
                f"{self._tolerance:g} nats after the sync of version {version}, got {got}; completions would be written by "
                "another model than the one that is trained. Start the server as the README says "
                "(--worker-extension-cls moteach.rollouts.vllm_worker.WeightLoader, the student's own checkpoint); if it only "
                "computes in half precision, raise rollout.check_tolerance"
            )
        self._mine, self._theirs = mine, theirs
        return distance

    def _noise(self) -> Tensor:
        return keyed_uniforms(seed=0, step=0, prompt_ids=["weight check"], samples=[0], length=self._tokens)

    def _written(self, student: nn.Module) -> list[int]:
        noise = self._noise()
        settings = SamplerSettings(
            temperature=1.0, top_p=1.0, top_k=0, eos_ids=(), pad_id=self._start_id, compact_at=1.0
        )
        made = decode(student, [[self._start_id]], noise, group_size=1, settings=settings)
        return [self._start_id, *made.tokens[0].tolist()]

    def _written_in_shards(self, root: nn.Module) -> list[int]:
        """The same text without a cache, once a run: the whole student is nowhere at any time."""
        ids = [self._start_id]
        for uniform in self._noise()[0]:
            logits = _logits_in_shards(root, [*ids, self._start_id])[-1:]
            ids.append(int(pick_tokens(logits, uniform[None])[0]))
        return ids


@contextmanager
def _sharded_mode(root: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd; every module gets its own mode back, and the root is cut again."""
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        sharded: Any = root
        sharded.reshard()
        for module in training:
            module.training = True


def _logits_in_shards(root: nn.Module, ids: Sequence[int]) -> Float[Tensor, "token vocab"]:
    """Logits that predict every token but the first, on the CPU; all ranks must call it."""
    prompt = Prompt(prompt_id="weight check", text="", token_ids=tuple(ids[:1]))
    rollout = Rollout(
        prompt=prompt,
        sample=0,
        completion_ids=tuple(ids[1:]),
        rollout_logprobs=(0.0,) * (len(ids) - 1),
        finished=False,
        student_version=0,
    )
    found: list[Tensor] = []

    def look(hidden: Tensor, head: Head) -> LossOutput:
        found.append(project(hidden, head).cpu())
        return LossOutput(loss=torch.zeros(()), denominator=1.0)

    root(RolloutBatch.from_rollouts([rollout], pad_id=0), look)
    return found[0]


def token_logprobs(student: nn.Module, ids: Sequence[int]) -> Float[Tensor, " token"]:
    """Returns log softmax(logits)[token] of every token but the first, in float64 from the model's own logits.

    Args:
        student: Causal language model of transformers, in `generation_mode`.
        ids: One text.
    """
    device = next(student.parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    logits: Tensor = student(input_ids=tokens, use_cache=False).logits[0, :-1]
    logprobs = logits.double().log_softmax(dim=-1)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0].cpu()
