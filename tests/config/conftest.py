"""Expert cards for composition: the shipped ones, and stand-ins for those of the default config that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from moteach.cli.app import prepare
from moteach.paths import experts_dir


@pytest.fixture(autouse=True)
def _cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    missing = [name for name in ("math", "code", "search") if not (experts_dir() / f"{name}.yaml").exists()]
    folder = tmp_path / "cards"
    (folder / "weights").mkdir(parents=True)
    for name in missing:
        (folder / f"{name}.yaml").write_text(f"model: ./weights\ndomains: [{name}]\n")
    monkeypatch.setenv("MOTEACH_EXPERTS", str(folder))
    prepare()
    yield
    GlobalHydra.instance().clear()
