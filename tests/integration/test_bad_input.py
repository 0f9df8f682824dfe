"""What a user gets wrong: one line that says so, exit code 2, and nothing on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from integration_runs import moteach

from moteach.cli.main import main
from moteach.testing import TinyWorld, tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class Mistake:
    """Overrides that are wrong, and what the one line must say."""

    name: str
    make: Callable[[TinyWorld, Path], list[str]]
    says: tuple[str, ...]


def overriding(*overrides: str) -> Callable[[TinyWorld, Path], list[str]]:
    return lambda world, folder: list(overrides)


def rows_of(world: TinyWorld) -> list[dict[str, str]]:
    return [json.loads(line) for line in world.prompts.read_text().splitlines()]


def data(change: Callable[[list[dict[str, str]]], object]) -> Callable[[TinyWorld, Path], list[str]]:
    """Trains on a changed copy of the world's prompts; what `change` returns replaces them."""

    def make(world: TinyWorld, folder: Path) -> list[str]:
        rows = rows_of(world)
        changed = change(rows)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in (changed or rows)]  # type: ignore[union-attr,attr-defined]
        file = folder / "mine.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return [f"data.path={file}"]

    return make


def in_row(number: int, **values: str) -> Callable[[TinyWorld, Path], list[str]]:
    return data(lambda rows: rows[number - 1].update(values))


def everywhere(**values: str) -> Callable[[TinyWorld, Path], list[str]]:
    return data(lambda rows: [row | values for row in rows])


def card(text: str) -> Callable[[TinyWorld, Path], list[str]]:
    """Adds the card `law.yaml` in a folder of its own."""

    def make(world: TinyWorld, folder: Path) -> list[str]:
        (folder / "law.yaml").write_text(text.format(world=world))
        return [f"expert_path=[{world.cards},{folder}]", "experts=[alpha,law]"]

    return make


def foreign_vocabulary(world: TinyWorld, folder: Path) -> list[str]:
    weights = folder / "weights"
    shutil.copytree(world.cards / "weights" / "beta", weights)
    tokenizer = json.loads((weights / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (weights / "tokenizer.json").write_text(json.dumps(tokenizer))
    return card("model: ./weights\ndomains: [beta]\n")(world, folder)


def small_head(world: TinyWorld, folder: Path) -> list[str]:
    tiny_model(hidden=32, layers=1, head_dim=16, vocab_size=48).save_pretrained(folder / "weights")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder / "weights")
    return card("model: ./weights\ndomains: [beta]\n")(world, folder)


def pickled(folder: Path, source: Path) -> Path:
    place = folder / "pickled"
    shutil.copytree(source, place)
    (place / "model.safetensors").unlink()
    torch.save({}, place / "pytorch_model.bin")
    return place


def pickled_student(world: TinyWorld, folder: Path) -> list[str]:
    return [f"student.model={pickled(folder, world.student)}"]


def pickled_teacher(world: TinyWorld, folder: Path) -> list[str]:
    pickled(folder, world.cards / "weights" / "beta")
    return card("model: ./pickled\ndomains: [beta]\n")(world, folder)


def run_dir_below_a_file(world: TinyWorld, folder: Path) -> list[str]:
    (folder / "note").write_text("a file")
    return [f"run_dir={folder / 'note' / 'run'}"]


MISTAKES = [
    Mistake("missing data file", overriding("data.path=/nowhere/p.jsonl"), ("no file '/nowhere/p.jsonl'",)),
    Mistake("no data path", overriding("data.path=???"), ("data.path",)),
    Mistake(
        "bad JSON line", data(lambda rows: [*rows[:6], '{"prompt": "1+1="', *rows[6:]]), ("mine.jsonl:7: ", "JSON")
    ),
    Mistake(
        "missing prompt column",
        data(lambda rows: [{"promt": row["prompt"], "domain": row["domain"]} for row in rows]),
        ("mine.jsonl:1: ", "'prompt'", "did you mean 'promt'"),
    ),
    Mistake("empty data file", data(lambda rows: [""]), ("mine.jsonl", "at least one prompt")),
    Mistake("unknown verifier of a row", in_row(3, verifier="exakt"), ("mine.jsonl:3: ", "'exakt'", "'exact'")),
    Mistake("unknown default verifier", overriding("data.verifier=maths"), ("data.verifier", "'maths'", "'math'")),
    Mistake("no expert claims any domain", everywhere(domain="gamma"), ("'gamma'", "router.fallback", "alpha, beta")),
    Mistake("a row asks for an unknown teacher", in_row(5, teacher_id="alhpa"), ("'alhpa'", "did you mean 'alpha'")),
    Mistake("fallback is no expert", overriding("router.fallback=alhpa"), ("router.fallback", "did you mean 'alpha'")),
    Mistake("prompt beyond the context", in_row(9, prompt="9" * 300), ("300 tokens", "256")),
    Mistake("evaluation beyond the context", overriding("eval.max_new_tokens=250"), ("context", "256")),
    Mistake("more prompts a step than there are", overriding("sampler.prompts_per_step=500"), ("different prompts",)),
    Mistake(
        "unknown domain in the mixture", overriding("+sampler.mixture={alfa:1}"), ("'alfa'", "did you mean 'alpha'")
    ),
    Mistake("unknown extra domain", overriding("eval.extra_domains=[bta]"), ("eval.extra_domains", "'bta'", "'beta'")),
    Mistake("unknown expert", overriding("experts=[alpha,beat]"), ("'beat'", "did you mean 'beta'")),
    Mistake("no expert", overriding("experts=[]"), ("experts", "at least one")),
    Mistake("no weight", overriding("experts.alpha.weight=0", "experts.beta.weight=0"), ("weight",)),
    Mistake("negative weight", overriding("experts.beta.weight=-1"), ("weight", "-1")),
    Mistake("typo in an expert's key", overriding("experts.beta.wieght=2"), ("wieght", "did you mean 'weight'")),
    Mistake(
        "typo in a card",
        card("model: {world.student}\ndomans: [beta]\n"),
        ("law.yaml:2: ", "'domans'", "did you mean 'domains'"),
    ),
    Mistake("card without weights on disk", card("model: ./weigths\n"), ("law.yaml:1: ", "weigths")),
    Mistake("missing folder of cards", overriding("expert_path=[/nowhere/cards]"), ("/nowhere/cards",)),
    Mistake("missing student", overriding("student.model=/nowhere/model"), ("/nowhere/model",)),
    Mistake("pickled student", pickled_student, ("pytorch_model.bin", "safetensors")),
    Mistake("pickled teacher", pickled_teacher, ("pytorch_model.bin", "safetensors")),
    Mistake("teacher of another vocabulary", foreign_vocabulary, ("'law'", "2 tokens that differ", "'a'")),
    Mistake("teacher with a smaller head", small_head, ("'law'", "48")),
    Mistake("wrong type of a number", overriding("max_steps=many"), ("max_steps", "many")),
    Mistake("fraction for a whole number", overriding("group_size=1.5"), ("group_size", "1.5")),
    Mistake("wrong type in a component", overriding("rollout.max_new_tokens=few"), ("rollout.max_new_tokens", "few")),
    Mistake(
        "wrong choice in a component", overriding("objective.normalise=mean"), ("objective.normalise", "token_mean")
    ),
    Mistake("out of range in a component", overriding("rollout.top_p=2"), ("top_p", "2")),
    Mistake("unknown key", overriding("max_stpes=3"), ("max_stpes", "did you mean 'max_steps'")),
    Mistake("unknown key of a group", overriding("optim.learning_rate=3"), ("learning_rate", "lr")),
    Mistake("unknown key of a component", overriding("rollout.temprature=1"), ("temprature", "'temperature'")),
    Mistake("added unknown key", overriding("+rollout.temprature=1"), ("temprature", "'temperature'")),
    Mistake("unknown option", overriding("router=lable"), ("router", "'lable'", "did you mean 'label'")),
    Mistake("unknown group", overriding("rooter=label"), ("rooter", "did you mean 'router'")),
    Mistake("not an override", overriding("label"), ("label", "key=value")),
    Mistake("flag that is none", overriding("--verbose"), ("--verbose",)),
    Mistake(
        "support and objective that do not meet", overriding("support=sampled"), ("support=sampled", "policy_gradient")
    ),
    Mistake("zero steps", overriding("max_steps=0"), ("max_steps", "at least 1")),
    Mistake("learning rate of nan", overriding("optim.lr=nan"), ("optim.lr", "nan")),
    Mistake("code in a target", overriding("router._target_=os.system"), ("router._target_", "os.system")),
    Mistake("run_dir below a file", run_dir_below_a_file, ("run_dir", "note", "file")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "-"))
def test_mistake_gets_one_line_and_leaves_nothing_behind(
    mistake: Mistake,
    world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, cwd = tmp_path / "given", tmp_path / "cwd"
    folder.mkdir()
    cwd.mkdir()
    wrong = mistake.make(world, folder)
    replaced = {override.partition("=")[0] for override in wrong}
    kept = [override for override in [*world.overrides, "run_dir=run"] if override.partition("=")[0] not in replaced]
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(cwd)
    capfd.readouterr()
    assert main(["train", *kept, *wrong]) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert said.startswith("moteach train: ")
    for words in mistake.says:
        assert words in said
    assert not list(cwd.iterdir())
    assert sorted(folder.rglob("*")) == before


def test_mistake_in_a_process_of_its_own_gets_one_line(world: TinyWorld, tmp_path: Path) -> None:
    done = moteach("train", *world.overrides, "eval.extra_domains=[gamma]", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("moteach train: eval.extra_domains: no held-out prompts of 'gamma'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "did you mean 'train'"),
        (["experts", "lst"], "did you mean 'list'"),
        (["experts"], "expected an action"),
        (["eval"], "either run=DIR or model=DIR"),
        (["eval", "run=/nowhere"], "/nowhere"),
        (["eval", "model=/nowhere/model"], "/nowhere/model"),
    ],
)
def test_other_commands_refuse_in_one_line_too(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert said.startswith("moteach")
    assert says in said
