"""The habits of the house that no linter checks."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "moteach").rglob("*.py"))
TOP_LEVEL = {
    "moteach", "experts", "conf", "tests", "notebooks", "pyproject.toml", "README.md", "CONTRIBUTING.md", "PAPERS.md",
    "CHANGELOG.md", "LICENSE", ".ci",
}  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(params=MODULES, ids=relative)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def in_a_fresh_process(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that some code imports."""
    report = "import sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    return set(json.loads(in_a_fresh_process(f"{code}\n{report}").splitlines()[-1]))


HEAVY = {"vllm", "wandb", "sentence_transformers", "transformers", "datasets", "peft", "reasoning_gym", "pandas"}


def test_importing_moteach_is_light() -> None:
    assert loaded_after("import moteach") & (HEAVY | {"torch", "hydra", "omegaconf", "numpy"}) == set()


def test_the_public_names_come_on_first_use() -> None:
    loaded = loaded_after("import moteach; [getattr(moteach, name) for name in moteach.__all__]")
    assert "torch" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("argument", ["--help", "--version", "nope"])
def test_the_command_line_answers_without_torch_or_hydra(argument: str) -> None:
    loaded = loaded_after(f"from moteach.cli.main import main; main([{argument!r}])")
    assert loaded & (HEAVY | {"torch", "hydra", "omegaconf", "rich"}) == set()


def test_python_dash_m_prints_the_usage() -> None:
    code = "import runpy, sys; sys.argv = ['moteach', '--help']; runpy.run_module('moteach', run_name='__main__')"
    assert "usage: moteach COMMAND" in in_a_fresh_process(code)


@pytest.mark.parametrize("room", ["divergences", "conflict"])
def test_the_library_rooms_load_nothing_heavy(room: str) -> None:
    files = [p for p in (ROOT / "moteach" / room).glob("*.py") if p.stem != "__init__"]
    imports = "\n".join(f"import moteach.{room}.{file.stem}" for file in files)
    assert loaded_after(imports) & (HEAVY | {"hydra", "omegaconf", "yaml", "pyarrow"}) == set()


def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def lines_of(function: Function) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        length -= docstring.end_lineno - docstring.lineno + 1
    return length


def test_a_function_is_short(path: Path) -> None:
    long = {f.name: lines_of(f) for f in functions(ast.parse(path.read_text())) if lines_of(f) > 70}
    assert long == {}


def undocumented(node: ast.AST, name: str) -> list[str]:
    """Public definitions without a docstring, below one that is public itself; constructors belong to their class."""
    found = [] if ast.get_docstring(node) else [name]  # type: ignore[arg-type]
    for child in getattr(node, "body", []):
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            overload = any("overload" in ast.unparse(item) for item in child.decorator_list)
            if isinstance(child, ast.ClassDef):
                found += undocumented(child, f"{name}.{child.name}")
            elif not overload and not ast.get_docstring(child):
                found.append(f"{name}.{child.name}")
    return found


def test_what_is_public_is_documented(path: Path) -> None:
    if path.read_text().strip():
        assert undocumented(ast.parse(path.read_text()), relative(path)) == []


def test_only_the_builder_calls_hydras_instantiate(path: Path) -> None:
    mentions = re.search(r"hydra\.utils\b|from hydra import .*\butils\b|\binstantiate\(", path.read_text())
    assert bool(mentions) == (relative(path) == "moteach/config/build.py")


def test_forbidden_words_are_not_used(path: Path) -> None:
    found = re.findall(r"\b\w*(?:ensemble|fusion)\w*\b", path.read_text(), re.IGNORECASE)
    assert found == []


def test_a_bare_kl_names_no_direction(path: Path) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    assert [token.start for token in tokens if token.type == tokenize.NAME and token.string in ("kl", "KL")] == []


@pytest.mark.parametrize("folder", ["conf", "experts"])
def test_a_bare_kl_is_no_key_either(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.yaml"))
    assert folder != "conf" or files
    bad = [relative(file) for file in files if re.search(r"^\s*kl\s*:|=kl\b", file.read_text(), re.MULTILINE)]
    assert bad == []
    assert not [relative(file) for file in files if file.stem == "kl"]


def test_nothing_is_left_to_do(path: Path) -> None:
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK|NotImplementedError)\b", path.read_text()) == []


def repository_files() -> list[Path]:
    """Files under version control or about to be; everything that is not a cache where there is no git."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    try:
        done = subprocess.run(listing, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        done = subprocess.CompletedProcess(listing, 1, "", "")
    if done.returncode == 0 and done.stdout:
        return [Path(line) for line in done.stdout.splitlines()]
    ignored = {line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    return [path.relative_to(ROOT) for path in ROOT.iterdir() if path.name not in ignored]


def test_the_top_level_holds_only_what_belongs_there() -> None:
    # a user's virtual environment, whatever it is called, is not ours
    tops = {path.parts[0] for path in repository_files() if not (ROOT / path.parts[0] / "pyvenv.cfg").is_file()}
    assert {"moteach", "conf", "tests", "pyproject.toml"} <= tops
    assert {top for top in tops if not top.startswith(".")} - TOP_LEVEL == set()


def test_every_experiment_is_listed_among_the_papers() -> None:
    experiments = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
    papers = ROOT / "PAPERS.md"
    text = papers.read_text() if papers.exists() else ""
    assert [name for name in experiments if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)] == []


def test_test_modules_have_different_names_or_folders() -> None:
    """Without packages, pytest imports test files by their stem."""
    stems = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({stem for stem in stems if stems.count(stem) > 1}) == []
