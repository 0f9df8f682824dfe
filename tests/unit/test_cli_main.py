from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import moteach
from moteach.cli import main as module
from moteach.cli.main import COMMANDS, main, one_line
from moteach.errors import DataError

ROOT = Path(moteach.__file__).parents[1]


def fake(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[list[str]]:
    """Puts a command `train` in place that records what it was given and raises `error`."""
    calls: list[list[str]] = []

    def run(argv: list[str]) -> None:
        calls.append(argv)
        if error is not None:
            raise error

    command = types.ModuleType("moteach.cli.train")
    command.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moteach.cli.train", command)
    return calls


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["help"], 0)])
def test_usage_names_every_command(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_exists(name: str) -> None:
    assert callable(importlib.import_module(f"moteach.cli.{name}").run)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{moteach.__version__}\n"


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "seed=1"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("moteach: no command 'trian'; did you mean 'train'")
    assert output.err.count("\n") == 1


def test_the_rest_goes_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch)
    assert main(["train", "seed=1", "--cfg", "job"]) == 0
    assert calls == [["seed=1", "--cfg", "job"]]


def test_the_arguments_of_the_process_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["moteach", "train", "seed=2"])
    assert main() == 0
    assert calls == [["seed=2"]]


def test_a_user_error_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, DataError("the file\n   is  wrong\n\n  here"))
    assert main(["train"]) == 2
    assert capsys.readouterr() == ("", "moteach train: the file is  wrong here\n")


def test_an_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert "interrupted; the same command with the same run_dir continues" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["train"])


def test_entry_exits_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moteach", "nope"])
    with pytest.raises(SystemExit) as caught:
        module.entry()
    assert caught.value.code == 2


def test_one_line_joins_lines() -> None:
    assert one_line(" a \n\n b\nc ") == "a b c"


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moteach", "trian"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moteach: no command 'trian'")
