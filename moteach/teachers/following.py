"""The teachers of a run that follow its student, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext

from torch import Tensor, nn

from moteach.distributed import ALONE, Ranks
from moteach.teachers.own import FollowsStudent, Gathered
from moteach.teachers.pool import TeacherPool
from moteach.teachers.privileged import PrivilegedTeacher
from moteach.teachers.reuse import ReusingTeachers


def bind_student(
    teachers: TeacherPool | ReusingTeachers,
    model: nn.Module,
    *,
    ranks: Ranks = ALONE,
    gathered: Gathered = nullcontext,
) -> None:
    """Hands the student to those that follow it, see `FollowsStudent.bind_student`."""
    for _, teacher in following(teachers):
        teacher.bind_student(model, ranks=ranks, gathered=gathered)


def follow(teachers: TeacherPool | ReusingTeachers, *, version: int) -> None:
    """Lets them see an optimizer step."""
    for _, teacher in following(teachers):
        teacher.follow(version=version)


def following_tensors(teachers: TeacherPool | ReusingTeachers) -> dict[str, Tensor]:
    """What a checkpoint must hold of them, under `<teacher>/<parameter>`."""
    return {f"{name}/{key}": value for name, teacher in following(teachers) for key, value in teacher.tensors().items()}


def load_following(teachers: TeacherPool | ReusingTeachers, tensors: Mapping[str, Tensor]) -> None:
    """Restores `following_tensors`.

    Raises:
        CheckpointError: Something is missing.
    """
    for name, teacher in following(teachers):
        prefix = f"{name}/"
        teacher.load_tensors({key[len(prefix) :]: v for key, v in tensors.items() if key.startswith(prefix)})


def following(teachers: TeacherPool | ReusingTeachers) -> Iterator[tuple[str, FollowsStudent]]:
    """Lists the teachers that follow the student, by name."""
    for name in teachers.teacher_ids:
        teacher = teachers.get(name)
        inner = teacher.inner if isinstance(teacher, PrivilegedTeacher) else teacher
        if isinstance(inner, FollowsStudent):
            yield name, inner
