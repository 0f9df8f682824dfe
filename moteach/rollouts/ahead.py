"""Generation one step ahead: while the student learns from step t, a server writes the completions of step t + 1.

They are written by the weights of before the update, so every rollout is one step stale and none is more (one-step off-policy,
Noukhovitch et al., arXiv 2410.18252); teachers and verifiers see them when they are learned from. `token_weights=ratio_mask`
says how far the student has moved, and masks where it has moved too far.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import nn

from moteach.data.sampling import Sampler
from moteach.distributed import Ranks
from moteach.rollouts.base import RolloutEngine
from moteach.types import Prompt, Rollout, RolloutBatch


class Ahead:
    """Wraps an engine whose generation leaves this process free.

    When a step is asked for, its completions are mostly there, and those of the next one are begun. Which prompts that will
    be is asked of `peek`; prompts that were guessed wrong, by a sampler that looks at what a step showed, are completed when
    they are asked for, and what was written for others is thrown away and counted. A sync waits for what is being written.

    Nothing that was written ahead is in a checkpoint: after a resume the first step is written by the newest weights, so a
    resumed run is the same run but not bitwise.

    Of several ranks each writes its own share ahead; the other thread only asks the server, ranks talk in `sync` and `lap`.

    Args:
        engine: Writes the completions; is called from another thread, never from two at once.
        peek: Prompts that the step will probably ask for; of several ranks, this one's.
        last_step: The first step that does not exist.
        ranks: The processes that train the student together.
    """

    def __init__(
        self,
        *,
        engine: RolloutEngine,
        peek: Callable[[int], Sequence[Prompt]],
        last_step: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.engine = engine
        self.served = bool(getattr(engine, "served", False))
        self._ranks = Ranks() if ranks is None else ranks
        self._peek = peek
        self._last_step = last_step
        self._running: tuple[int, int, Future[RolloutBatch]] | None = None
        self._missed = 0
        self._wasted = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        group_size: int = 1,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> RolloutBatch:
        """Returns completions of every prompt; see `RolloutEngine.generate`.

        With a temperature or a length of its own, or beyond the last step, nothing is taken from or written ahead.

        Raises:
            MoteachError: What went wrong while they were written ahead, or now.
        """
        if temperature is not None or max_new_tokens is not None or step >= self._last_step:
            self._wait()
            return self.engine.generate(
                prompts, step=step, group_size=group_size, temperature=temperature, max_new_tokens=max_new_tokens
            )
        ready = self._taken(step, group_size)
        if ready is None:
            batch = self.engine.generate(prompts, step=step, group_size=group_size)
        else:
            batch = self._completed(ready, prompts, step=step, group_size=group_size)
        if step + 1 < self._last_step:
            self._begin(step + 1, group_size)
        return batch

    def sync(self, student: nn.Module, *, version: int) -> None:
        """Waits until what is being written is written, then hands the weights on."""
        self._wait()
        self.engine.sync(student, version=version)

    def lap(self) -> dict[str, float]:
        """What the engine says, and how many prompts of the step were not, or needlessly, written ahead, on all ranks."""
        missed, wasted = zip(*self._ranks.gather((self._missed, self._wasted)), strict=True)
        counts = {"rollouts/ahead_missed": float(sum(missed)), "rollouts/ahead_wasted": float(sum(wasted))}
        self._missed = self._wasted = 0
        return {**getattr(self.engine, "lap", dict)(), **counts}

    def _completed(self, ready: RolloutBatch, prompts: Sequence[Prompt], *, step: int, group_size: int) -> RolloutBatch:
        """What was written ahead of these prompts, and the rest of them now."""
        groups = _groups(ready)
        asked = [prompt.prompt_id for prompt in prompts]
        if list(groups) == asked:
            return ready
        missing = [prompt for prompt in prompts if prompt.prompt_id not in groups]
        self._missed += len(missing)
        self._wasted += len(groups.keys() - set(asked))
        fresh = self.engine.generate(missing, step=step, group_size=group_size)
        groups |= _groups(fresh)
        made = [rollout for prompt_id in asked for rollout in groups[prompt_id]]
        return RolloutBatch.from_rollouts(made, pad_id=_pad_id(ready))

    def _begin(self, step: int, group_size: int) -> None:
        prompts = list(self._peek(step))
        made: Future[RolloutBatch] = Future()

        def work() -> None:
            try:
                made.set_result(self.engine.generate(prompts, step=step, group_size=group_size))
            except BaseException as error:  # raised where the step is asked for
                made.set_exception(error)

        # a daemon, so that a run that fails meanwhile ends at once
        threading.Thread(target=work, name=f"moteach-ahead-{step}", daemon=True).start()
        self._running = (step, group_size, made)

    def _taken(self, step: int, group_size: int) -> RolloutBatch | None:
        if self._running is None:
            return None
        self._wait()
        (began, size, made), self._running = self._running, None
        return made.result() if (began, size) == (step, group_size) else None

    def _wait(self) -> None:
        if self._running is not None:
            self._running[2].exception()


def peek_at(sampler: Sampler) -> Callable[[int], Sequence[Prompt]]:
    """Returns the function that draws the prompts of a step and puts them back.

    Args:
        sampler: Keeps what the next draw depends on in its `state_dict`.
    """

    def peek(step: int) -> Sequence[Prompt]:
        state = sampler.state_dict()
        drawn = sampler.next(step)
        sampler.load_state_dict(state)
        return drawn

    return peek


def ahead_of(engine: RolloutEngine, sampler: Sampler, *, max_steps: int, ranks: Ranks) -> RolloutEngine:
    """Wraps an engine that asks for it (`async_steps=1`); any other comes back as it is."""
    if not getattr(engine, "async_steps", 0):
        return engine
    peek = peek_at(sampler)
    return Ahead(engine=engine, peek=lambda step: ranks.share(peek(step)), last_step=max_steps, ranks=ranks)


def _groups(batch: RolloutBatch) -> dict[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = {}
    for rollout in batch.rollouts:
        groups.setdefault(rollout.prompt.prompt_id, []).append(rollout)
    return groups


def _pad_id(batch: RolloutBatch) -> int:
    """What fills the rows; 0 where nothing does."""
    padding = batch.input_ids[~batch.attention_mask]
    return int(padding[0]) if len(padding) else 0
