"""The entry point: strips the command's words, hands the rest to Hydra, turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import moteach
from moteach.errors import MoteachError, nearest

COMMANDS = {
    "train": "the main job: multi-teacher on-policy distillation",
    "eval": "run=DIR | model=DIR: scores per domain, with verifiers",
    "experts": "list | check: the catalogue, and a pre-flight of each teacher against the student",
    "route": "fit | explain | eval: learn a router, say why a prompt goes where, compare it with labels",
    "specialize": "expert=NAME: make a specialist, supervised and then by a verifier's reward",
    "bench": "NAME: the project's own benchmarks",
}


def usage() -> str:
    """Returns the text of `moteach --help`."""
    lines = [
        f"moteach {moteach.__version__}: one student, many expert teachers, on-policy.",
        "",
        "usage: moteach COMMAND [overrides]",
        "",
    ]
    lines += [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "Every command is a Hydra app: `moteach train experts=[math,code] divergence=jsd --cfg job` prints the config,",
        "`--multirun seed=0,1,2` sweeps. `moteach COMMAND --help` lists groups and options.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 when it worked, 2 when what the user gave cannot be used, 130 when interrupted. Anything else that goes wrong is
        a defect and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(moteach.__version__)
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            print(f"moteach: no command '{command}'; {nearest(command, COMMANDS)}", file=sys.stderr)
            return 2
        module = importlib.import_module(f"moteach.cli.{command}")
        module.run(rest)
    except MoteachError as error:
        print(f"moteach {command}: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmoteach {command}: interrupted; the same command with the same run_dir continues", file=sys.stderr)
        return 130
    return 0


def one_line(message: str) -> str:
    """Joins the lines of a message with single spaces."""
    return " ".join(part.strip() for part in message.splitlines() if part.strip())


def entry() -> None:
    """Exits with the code of `main`."""
    sys.exit(main())
