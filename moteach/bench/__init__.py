"""The project's own benchmarks: `moteach bench NAME` runs `run(argv)` of `moteach/bench/NAME.py`.

A new benchmark is a new file; the first line of its docstring is its description. Names with a leading underscore are
shared parts. With `out=FILE.json` a benchmark writes the numbers it prints, the command and the machine.
"""

import os

# Read when torch loads: its profiler, which counts the bytes of tensors, announces every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
