from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moteach.bench._resident import anonymous_growth
from moteach.bench.experts import Start, Turns, run, table_rows
from moteach.bench.memory import peak_bytes
from moteach.catalogue.spec import ExpertSpec
from moteach.errors import ConfigError
from moteach.testing import tiny_prompts

MIB = 2**20


def test_the_experts_take_turns() -> None:
    experts = [ExpertSpec(name=f"e{index}", model="nowhere") for index in range(3)]
    routing = Turns(experts=experts).route(tiny_prompts(["1", "2", "3", "4"]))
    assert routing.teacher_ids == ("e0", "e1", "e2")
    assert routing.weights.argmax(dim=1).tolist() == [0, 1, 2, 0]
    assert routing.weights.sum(dim=1).tolist() == [1.0] * 4


def test_a_ratio_is_the_median_of_the_ratios_of_the_same_step() -> None:
    times = {
        count: [{"step": step, "cpu": cpu, "score": 0.5, "tokens": 40.0} for step in steps]
        for count, cpu, steps in ((1, 1.0, (1.0, 10.0, 2.0)), (12, 2.0, (1.1, 11.0, 8.0)))
    }
    peaks = {
        count: {"peak_mib": peak, "mapped_mib": 1.0, "anonymous_mib": 0.0} for count, peak in ((1, 4.0), (12, 5.0))
    }
    one, twelve = table_rows(times, peaks, {1: 2, 12: 30})
    assert (one["step_ratio"], one["cpu_ratio"], one["peak_ratio"]) == (1, 1, 1)
    assert twelve["step_ratio"] == pytest.approx(1.1), "not 8 / 2, the ratio of the medians"
    assert (twelve["cpu_ratio"], twelve["peak_ratio"], twelve["loads"]) == (2, 1.25, 30)


def test_a_size_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"size: got 'smolm'.*smollm2"):
        run(["size=smolm"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is anonymous")
def test_the_pages_of_a_mapped_file_are_not_anonymous_and_those_of_an_allocation_are(tmp_path: Path) -> None:
    size = 64 * MIB
    file = tmp_path / "weights"
    file.write_bytes(b"\1" * size)

    def read() -> torch.Tensor:
        storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))[::4096].clone()  # type: ignore[arg-type]

    assert anonymous_growth(read) < 8 * MIB
    assert peak_bytes(read) == pytest.approx(size, rel=0.01), "torch counts the whole file, read or not"
    assert peak_bytes(read, mapped=[size]) < 8 * MIB
    held: list[torch.Tensor] = []
    assert anonymous_growth(lambda: held.append(torch.ones(size, dtype=torch.uint8))) > 0.9 * size


def test_every_arm_begins_with_the_same_student_and_the_same_prompts() -> None:
    model = torch.nn.Linear(2, 2)
    place = {"at": 3}
    sampler = SimpleNamespace(state_dict=lambda: dict(place), load_state_dict=place.update)
    synced: list[int] = []
    engine = SimpleNamespace(sync=lambda student, version: synced.append(version))
    trainer = SimpleNamespace(student=SimpleNamespace(model=model), sampler=sampler, engine=engine)
    start = Start.of(trainer)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    place["at"] = 4
    start.rewind(trainer, 7)
    assert torch.equal(model.weight, before)
    assert (place, synced) == ({"at": 3}, [7])
