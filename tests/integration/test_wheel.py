"""The wheel as somebody else gets it: built, installed beside nothing, and used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from integration_runs import REPO, environment, metrics, rows

from moteach.testing import TinyWorld, tiny_model, tiny_tokenizer

pytest.importorskip("hatchling", reason="building a wheel needs hatchling (extra 'dev')")

JUNK = ("runs/mine/metrics.jsonl", "tests/scratch.py", "notes.txt", "moteach/__pycache__/x.pyc", "dist/old.whl")


def run(arguments: list[str], cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments, cwd=cwd, env=environment(**extra), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without network from a copy of the checkout, in which junk lies about."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("moteach", "conf", "experts"):
        shutil.copytree(REPO / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        if (REPO / name).exists():
            shutil.copy(REPO / name, tree / name)
    (tree / "README.md").touch()
    for name in JUNK:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("junk")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-q"]
    run([*pip, "-w", str(dist), "."], cwd=tree)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the wheel alone is installed."""
    place = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--no-compile"]
    run([*pip, "--target", str(place), str(wheel)], cwd=place)
    return place


def files_below(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_wheel_holds_the_package_the_options_and_the_experts_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "moteach = moteach.cli.main:entry" in archive.read(metadata).decode()
    expected = {f"moteach/{name}" for name in files_below(REPO / "moteach")}
    expected |= {f"moteach/_bundled/conf/{name}" for name in files_below(REPO / "conf")}
    expected |= {f"moteach/_bundled/experts/{name}" for name in files_below(REPO / "experts")}
    assert names == expected
    assert {"moteach/_bundled/conf/train.yaml", "moteach/_bundled/experts/README.md"} <= names


def test_installed_wheel_trains_with_an_expert_of_the_users_own(
    installed: Path, world: TinyWorld, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    tiny_model(seed=7, hidden=32, layers=1, head_dim=16, scale=2.0).save_pretrained(mine / "law")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(mine / "law")
    (mine / "law.yaml").write_text("model: ./law\ndomains: [law]\n")
    prompts = tmp_path / "prompts.jsonl"
    law = [f'{{"prompt": "law {i}?", "domain": "law", "answer": "no"}}\n' for i in range(60)]
    prompts.write_text(world.prompts.read_text() + "".join(law))
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    catalogue = {"PYTHONPATH": str(installed), "MOTEACH_EXPERTS": os.pathsep.join([str(world.cards), str(mine)])}

    where = run([sys.executable, "-c", "import moteach; print(moteach.__file__)"], cwd, **catalogue).stdout.strip()
    assert Path(where) == installed / "moteach" / "__init__.py"

    kept = [item for item in world.overrides if not item.startswith(("expert_path=", "experts=", "data.path="))]
    chosen = ["experts=[alpha,beta,law]", "experts.law.weight=2", f"data.path={prompts}", "run_dir=out"]
    done = run([sys.executable, "-m", "moteach", "train", *kept, *chosen], cwd, **catalogue)
    assert "law" in done.stdout
    taught = [row["teacher"] for row in rows(cwd / "out", "routing")]
    assert {name: taught.count(name) for name in ("alpha", "beta", "law")} == {"alpha": 8, "beta": 8, "law": 16}
    assert len(metrics(cwd / "out")) == 4
    assert {path.name for path in cwd.iterdir()} == {"out"}


def test_console_script_of_the_wheel_lists_the_experts(installed: Path, world: TinyWorld, tmp_path: Path) -> None:
    (script,) = (installed / "bin").glob("moteach")
    places = {"PYTHONPATH": str(installed), "MOTEACH_EXPERTS": str(world.cards)}
    done = run([sys.executable, str(script), "experts", "list"], tmp_path, **places)
    assert "alpha" in done.stdout
    assert str(installed / "moteach" / "_bundled" / "experts") in done.stdout.replace("\n", "")
