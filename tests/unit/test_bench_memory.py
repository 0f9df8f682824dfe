from __future__ import annotations

import pytest
import torch

from moteach.bench.memory import Size, measure, peak_bytes, summarise
from moteach.conflict.pools import Geometric, Linear

SMALL = Size(vocab=4096, tokens=48, chunk=8, hidden=8)


def test_the_peak_counts_what_is_alive_together():
    def apart() -> None:
        for _ in range(3):
            torch.empty(10_000, dtype=torch.uint8)

    def together() -> None:
        kept = [torch.empty(10_000, dtype=torch.uint8) for _ in range(3)]
        kept.clear()

    assert peak_bytes(apart) == 10_000
    assert peak_bytes(together) == 30_000


@pytest.mark.parametrize("pool", [Linear(), Geometric()], ids=lambda pool: pool.name)
def test_the_kernel_does_not_grow_and_plain_autograd_does(pool):
    rows = [measure(SMALL, pool=pool, teachers=n) for n in (1, 2, 8)]
    growth = summarise(rows)
    assert growth[f"growth/{pool.name}/4096"] < 1.1
    assert growth[f"plain_growth/{pool.name}/4096"] > 1.5
    assert all(row["peak_mib"] < 0.5 * row["plain_peak_mib"] for row in rows)


@pytest.mark.parametrize("pool", [Linear(), Geometric()], ids=lambda pool: pool.name)
def test_both_arms_compute_the_same_loss(pool):
    from moteach.bench.memory import _Work

    one, other = _Work.make(SMALL, 3), _Work.make(SMALL, 3)
    losses = [one.kernel(pool), other.plain(pool)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.hidden.grad, other.hidden.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(one.head.weight.grad, other.head.weight.grad, rtol=1e-3, atol=1e-6)
