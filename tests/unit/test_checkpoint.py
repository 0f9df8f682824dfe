from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from moteach.checkpoint import (
    Checkpoints,
    flatten_optimizer,
    refuse_changes,
    restore_optimizer,
    restore_tensors,
    trained_tensors,
)
from moteach.errors import CheckpointError


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"student": {"w": torch.full((2, 3), value)}, "rng": {"torch": torch.get_rng_state()}}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    path = store.save(7, tensors=tensors(1.5), state={"step": 7, "nested": {"a": [1, None, "x"]}})
    assert path == tmp_path / "checkpoints" / "step-000007"
    back, state = store.load(7)
    assert back.keys() == {"student", "rng"}
    assert torch.equal(back["student"]["w"], torch.full((2, 3), 1.5))
    assert torch.equal(back["rng"]["torch"], torch.get_rng_state())
    assert state == {"step": 7, "nested": {"a": [1, None, "x"]}}


def test_views_and_transposes_are_saved_as_what_they_show(tmp_path: Path) -> None:
    grid = torch.arange(6.0).reshape(2, 3)
    store = Checkpoints(tmp_path)
    store.save(1, tensors={"student": {"t": grid.T, "half": grid[:, :1]}}, state={})
    back = store.load(1)[0]["student"]
    assert torch.equal(back["t"], grid.T)
    assert torch.equal(back["half"], grid[:, :1])


def test_an_optimizer_that_has_taken_no_step_is_saved(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, tensors={"optimizer": {}}, state={})
    assert store.load(1)[0].get("optimizer", {}) == {}


def test_only_the_last_ones_stay(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep_last=2)
    for step in (5, 10, 15):
        store.save(step, tensors=tensors(step), state={})
    assert store.steps() == [10, 15]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000015"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(5, tensors=tensors(1.0), state={"life": 1})
    store.save(5, tensors=tensors(2.0), state={"life": 2})
    back, state = store.load(5)
    assert state == {"life": 2}
    assert float(back["student"]["w"][0, 0]) == 2.0


@pytest.mark.parametrize("name", ["student.safetensors", "state.json"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    store = Checkpoints(tmp_path)
    path = store.save(5, tensors=tensors(1.0), state={"step": 5}) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*sha256 differs.*earlier checkpoint"):
        store.load(5)


@pytest.mark.parametrize("name", ["student.safetensors", "manifest.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    store = Checkpoints(tmp_path)
    (store.save(5, tensors=tensors(1.0), state={}) / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.*missing"):
        store.load(5)


def test_a_torn_manifest_is_refused(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    path = store.save(5, tensors=tensors(1.0), state={}) / "manifest.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing or damaged"):
        store.load(5)


def test_what_a_crash_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    good = store.save(5, tensors=tensors(1.0), state={})
    torn = tmp_path / ".tmp-step-000010"
    shutil.copytree(good, torn)
    (tmp_path / "step-000020").mkdir()  # no manifest
    assert store.steps() == [5]
    store.save(10, tensors=tensors(2.0), state={})
    assert store.steps() == [5, 10]
    assert not torn.exists()


def test_no_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").steps() == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"step 5 could not be written to .*checkpoints \(File exists\)"):
        Checkpoints(tmp_path / "checkpoints").save(5, tensors=tensors(1.0), state={})


def test_a_failed_save_leaves_the_earlier_one_intact(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep_last=1)
    store.save(5, tensors=tensors(1.0), state={"step": 5})
    (tmp_path / ".tmp-step-000010").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="last good one is in place"):
        store.save(10, tensors=tensors(2.0), state={})
    assert store.steps() == [5]
    assert store.load(5)[1] == {"step": 5}


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files above `limit` bytes cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_earlier_one_intact(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(5, tensors=tensors(1.0), state={"step": 5})
    large = {"student": {"w": torch.zeros(200_000)}}
    with small_files(100_000), pytest.raises(CheckpointError, match=r"step 10 could not be written.*File too large"):
        store.save(10, tensors=large, state={})
    assert store.steps() == [5]
    assert store.load(5)[1] == {"step": 5}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    made[0].bias.requires_grad_(False)
    return made


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    net(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, betas=(0.8, 0.95))


def test_a_resumed_optimizer_goes_on_bitwise(tmp_path: Path) -> None:
    straight = model(0)
    optimizer = adamw(straight)
    for i in range(3):
        step(straight, optimizer, i)
    store = Checkpoints(tmp_path)
    buffers, groups = flatten_optimizer(optimizer)
    assert set(buffers) == {f"{i}.{name}" for i in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")}
    store.save(3, tensors={"student": trained_tensors(straight), "optimizer": buffers}, state={"groups": groups})
    for i in range(3, 6):
        step(straight, optimizer, i)

    resumed = model(0)
    again = adamw(resumed)
    again.param_groups[0]["lr"] = 99.0
    back, state = store.load(3)
    restore_tensors(resumed, back["student"])
    restore_optimizer(again, back["optimizer"], state["groups"])
    for i in range(3, 6):
        step(resumed, again, i)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_forgetting_the_optimizer_would_be_noticed(tmp_path: Path) -> None:
    straight, fresh = model(0), model(0)
    optimizer = adamw(straight)
    step(straight, optimizer, 0)
    restore_tensors(fresh, trained_tensors(straight))
    step(straight, optimizer, 1)
    step(fresh, adamw(fresh), 1)
    assert not torch.equal(straight[2].weight, fresh[2].weight)


def test_only_trained_parameters_are_saved_and_tied_ones_once() -> None:
    net = model(0)
    net[2].weight = nn.Parameter(torch.zeros(2, 4))
    net.register_parameter("again", net[2].weight)
    assert set(trained_tensors(net)) == {"0.weight", "again"}


def test_another_architecture_is_refused() -> None:
    net = model(0)
    saved = {name: value.clone() for name, value in trained_tensors(net).items()}
    with pytest.raises(CheckpointError, match=r"other parameters.*9\.weight"):
        restore_tensors(net, {**saved, "9.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'2\.weight' of shape \(1, 4\).*\(2, 4\)"):
        restore_tensors(net, {**saved, "2.weight": torch.zeros(1, 4)})


def test_changed_settings_are_named_with_both_values() -> None:
    saved = {"seed": 0, "optim.lr": 0.1, "gone": "x"}
    refuse_changes(saved, dict(saved))
    with pytest.raises(CheckpointError) as caught:
        refuse_changes(saved, {"seed": 1, "optim.lr": 0.1, "new": True})
    message = str(caught.value)
    assert "Changed: gone: was 'x', is None; new: was None, is True; seed: was 0, is 1." in message
    assert "optim.lr" not in message
    assert "run_dir" in message


def test_settings_survive_json() -> None:
    settings = {"betas": [0.9, 0.999], "k": None, "lr": 1e-3}
    refuse_changes(json.loads(json.dumps(settings)), settings)
