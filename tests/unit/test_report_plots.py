from __future__ import annotations

import builtins
import json
import math
from pathlib import Path

import pytest
import yaml

from moteach.errors import ConfigError, DataError, MissingDependencyError, MissingFileError
from moteach.report.plots import heading, mean_curve, read_run, smooth, smoothing_window, training_curves

DOMAINS = ("algebra", "poetry")


def write_run(folder: Path, *, seed: int = 0, steps: int = 40, lr: float = 1e-3) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": step}
        | {f"reward/{domain}": 0.01 * step + 0.1 * i + 0.001 * seed for i, domain in enumerate(DOMAINS)}
        | {f"divergence/{domain}": 2.0 / (step + i) for i, domain in enumerate(DOMAINS)}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {
        who: {domain: {"accuracy": accuracy, "prompts": 10} for domain in DOMAINS}
        for who, accuracy in (("before", 0.1), ("teacher", 0.9))
    }
    (folder / "baseline.json").write_text(json.dumps(scores))
    data = {"_target_": "moteach.data.arena.source.ArenaSource", "seed": seed}
    config = {"seed": seed, "run_dir": str(folder), "optim": {"lr": lr}, "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_run_is_read_with_its_gaps(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/poetry": null}\n{"step": 2, "reward/algebra": 0.5}\n')
    history = read_run(run)
    assert history.columns["step"] == [1.0, 2.0]
    assert math.isnan(history.columns["reward/poetry"][0])
    assert history.columns["reward/algebra"][1] == 0.5
    assert history.domains("reward") == ["poetry", "algebra"]
    assert history.baseline["teacher"] == {"algebra": 0.9, "poetry": 0.9}


def test_the_figure_names_the_domains_and_what_it_is(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in (0, 1, 2)]
    training_curves(runs, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    for word in (
        *DOMAINS,
        "MOPD on the arena, 3 seeds",
        "nats per token",
        "teacher (held-out, greedy)",
        "student before",
    ):
        assert word in text


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_the_same_runs_give_the_same_bytes(tmp_path, suffix):
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    files = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
    for file in files:
        training_curves(runs, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    training_curves(runs[:1], files[1])
    assert files[0].read_bytes() != files[1].read_bytes()


def test_a_run_without_baseline_or_config_is_drawn(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "baseline.json").unlink()
    (run / "config.yaml").unlink()
    training_curves([run], tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert "MOPD, 1 run" in text
    assert "held-out" not in text


def test_runs_that_differ_in_more_than_the_seed_are_not_called_seeds(tmp_path):
    same = [read_run(write_run(tmp_path / f"same{seed}", seed=seed)) for seed in (0, 1)]
    assert heading(same) == "MOPD on the arena, 2 seeds"
    other = read_run(write_run(tmp_path / "other", seed=2, lr=5.0))
    assert heading([*same, other]) == "MOPD on the arena, 3 runs"
    assert heading([same[0], same[0]]) == "MOPD on the arena, 2 runs"


def test_smoothing_leaves_short_runs_alone_and_is_a_mean_over_known_neighbours():
    assert smoothing_window(40) == 1
    assert smoothing_window(300) == 7
    assert smoothing_window(10**6) == 9
    assert smooth([1.0, 2.0, 9.0], 1) == [1.0, 2.0, 9.0]
    assert smooth([1.0, 2.0, 9.0, math.nan], 3) == [1.5, 4.0, 5.5, 9.0]


def test_the_mean_ends_where_the_shortest_run_ends():
    steps, values = mean_curve([([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]), ([1.0, 2.0], [1.0, math.nan])])
    assert steps == [1.0, 2.0]
    assert values == [0.5, 0.0]


def test_what_cannot_be_drawn_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"ends in \.svg"):
        training_curves([run], tmp_path / "figure.bmp")
    with pytest.raises(ConfigError, match="at least one run"):
        training_curves([], tmp_path / "figure.svg")
    with pytest.raises(MissingFileError, match=r"metrics\.jsonl"):
        training_curves([tmp_path], tmp_path / "figure.svg")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(DataError, match="got neither"):
        training_curves([run], tmp_path / "figure.svg")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        training_curves([run], tmp_path / "figure.svg")


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r"moteach\[plots\]"):
        training_curves([tmp_path], tmp_path / "figure.svg")
