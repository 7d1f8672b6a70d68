from __future__ import annotations

import fcntl
import os

import pytest

from deepseek_ray.errors import LinkError
from deepseek_ray.links.arena import create_arena, map_arena


def memory(num_bytes: int, seals: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def test_both_ends_see_the_same_slots() -> None:
    ours, descriptor = create_arena(3, 100)
    theirs = map_arena(descriptor, 3, 100)
    ours.fill(1, [memoryview(b"ab"), memoryview(b"cde")])
    assert theirs.slot(1, 5) == b"abcde"
    assert theirs.slot(0, 100) == theirs.slot(2, 100) == bytes(100)
    ours.close()
    theirs.close()


def test_the_memory_can_neither_shrink_nor_grow() -> None:
    arena, descriptor = create_arena(1, 4096)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)
    arena.close()


def test_a_view_outlives_the_arena() -> None:
    arena, descriptor = create_arena(1, 100)
    os.close(descriptor)
    arena.fill(0, [memoryview(b"kept")])
    view = arena.slot(0, 4)
    arena.close()
    assert view == b"kept"


@pytest.mark.parametrize(
    ("num_bytes", "seals", "announced", "text"),
    [
        (4096, 0, (1, 4096), "not sealed"),
        (4096, fcntl.F_SEAL_SHRINK, (2, 4096), r"2 slots of 4096 bytes in a memory of 4096 bytes"),
        (4096, fcntl.F_SEAL_SHRINK, (0, 4096), "0 slots"),
        (512, fcntl.F_SEAL_SHRINK, (256, 2), "limits are 255 slots"),
    ],
    ids=["unsealed", "too-small", "no-slots", "too-many-slots"],
)
def test_memory_that_could_kill_its_reader_is_refused(
    num_bytes: int, seals: int, announced: tuple[int, int], text: str
) -> None:
    with pytest.raises(LinkError, match=text):
        map_arena(memory(num_bytes, seals), *announced)


def test_a_descriptor_of_something_else_is_refused(tmp_path: object) -> None:
    with pytest.raises(LinkError, match="in a memory of 0 bytes"):
        map_arena(os.open(os.devnull, os.O_RDONLY), 1, 4096)
    with open(f"{tmp_path}/file", "wb") as file:
        file.truncate(4096)
    with pytest.raises(LinkError, match="cannot be mapped"):
        map_arena(os.open(f"{tmp_path}/file", os.O_RDWR), 1, 4096)
