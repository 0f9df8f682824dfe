from __future__ import annotations

from pathlib import Path

import pytest
from integration_runs import train

from moteach.testing import TinyWorld, write_tiny_world


@pytest.fixture(autouse=True)
def no_outside_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cards and trackers of whoever runs the tests stay out of them."""
    monkeypatch.delenv("MOTEACH_EXPERTS", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Shared by all tests; nobody writes into it."""
    return write_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4; nobody writes into it."""
    return train(tmp_path_factory.mktemp("finished") / "run", *world.overrides, "checkpoint.every_steps=2")
