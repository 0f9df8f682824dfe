"""What a verified rollout says about the teachers: does a teacher find the right completions likelier than the wrong ones?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def verdicts(
    logprobs: Float[Tensor, "row teacher"],
    rewards: Float[Tensor, " row"],
    contexts: Float[Tensor, "row size"],
    prompt_ids: Sequence[str],
    *,
    sharpness: float | None,
) -> tuple[Float[Tensor, "row teacher"], Float[Tensor, "row teacher"]]:
    """Scores each teacher on each row by how it orders that row among rows with another reward.

    For rows i and k with r_i != r_k let o_ik = 1 where sign(L_ij - L_kj) = sign(r_i - r_k), 1/2 where L_ij = L_kj, else 0, and
    a_ik = 1 for two completions of one prompt, max(cos(x_i, x_k), 0)^sharpness for different prompts. With p_ik =
    a_ik |r_i - r_k| the verdict is y_ij = sum_k p_ik o_ik / sum_k p_ik - 1/2: half the rank correlation within what is alike
    (for one prompt and rewards 0 and 1, the area under the ROC curve less 1/2), from -1/2 to 1/2.

    The sign of the gap in a teacher's logprob between right and wrong rollouts is the informativeness of arXiv 2607.13399,
    Eq. 4, without its size: sizes are not comparable between teachers, orders are.

    Args:
        logprobs: Mean logprob per token of each completion, NaN where a teacher did not score it.
        rewards: Verified rewards, NaN where there is none.
        contexts: One vector a row, of length one.
        prompt_ids: Prompt of each row.
        sharpness: Of the likeness of different prompts; None compares completions of one prompt only.

    Returns:
        Verdicts (0 where there is none), and how much each counts: min(1, sum_k p_ik).
    """
    ids = {name: place for place, name in enumerate(dict.fromkeys(prompt_ids))}
    prompt = torch.tensor([ids[name] for name in prompt_ids])
    alike = (prompt[:, None] == prompt[None, :]).double()
    if sharpness is not None:
        alike = torch.maximum(alike, (contexts @ contexts.T).clamp(min=0, max=1).pow(sharpness))
    gap = torch.nan_to_num(rewards[:, None] - rewards[None, :], nan=0.0).double()
    found, counts = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    for column in range(logprobs.shape[1]):
        apart = logprobs[:, None, column] - logprobs[None, :, column]
        weight = alike * gap.abs() * ~apart.isnan()
        order = (torch.nan_to_num(apart, nan=0.0).sign() * gap.sign()).double() / 2
        total = weight.sum(dim=1)
        found[:, column] = (weight * order).sum(dim=1) / torch.where(total == 0, torch.ones_like(total), total)
        counts[:, column] = total.clamp(max=1)
    return found, counts
