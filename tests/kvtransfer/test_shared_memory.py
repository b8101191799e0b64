"""Segments and rings: no two frames overlap, nothing foreign is mapped, nothing is left behind."""

import fcntl
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.frames import LARGEST, NONCE_BYTES, Ring, Segment, SharedPayload, map_segment

SIZE = 1 << 16


@given(st.lists(st.none() | st.integers(1, 700)))
def test_places_do_not_overlap(steps: list[int | None]) -> None:
    """A number takes so many bytes, None frees the oldest place."""
    ring, taken = Ring(16, 1500), deque[tuple[int, int]]()
    for size in steps:
        if size is None:
            if taken:
                ring.free_oldest(1)
                taken.popleft()
        elif (offset := ring.take(size)) is not None:
            assert offset >= 16
            assert offset + size <= 1500
            assert all(offset + size <= start or end <= offset for start, end in taken)
            taken.append((offset, offset + size))
        else:
            assert taken, "an empty ring takes whatever is not larger than itself"


def test_the_whole_ring_fits_again_and_again() -> None:
    ring = Ring(16, 1500)
    for _ in range(3):
        assert ring.take(ring.largest) is not None
        assert ring.take(1) is None
        ring.free_oldest(1)
    with pytest.raises(ValueError, match="1 places come free, 0 are taken"):
        ring.free_oldest(1)


def test_both_see_the_same_memory() -> None:
    made = Segment(SIZE)
    mapped = map_segment(made.name, SIZE)
    assert mapped[:NONCE_BYTES] == made.nonce
    made.close_file()
    made.close_file()
    made.memory[100:103] = b"abc"
    assert mapped[100:103] == b"abc"
    made.close()
    mapped.close()


def test_another_process_sees_it_until_its_maker_dies() -> None:
    code = (
        "import time; from kvtransfer.frames import Segment; kept = Segment(1 << 16); "
        "print(kept.name, kept.nonce.hex(), flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        name, nonce = process.stdout.readline().split()
        mapped = map_segment(name, SIZE)
        process.send_signal(signal.SIGKILL)
    assert mapped[:NONCE_BYTES] == bytes.fromhex(nonce), "decode keeps the memory"
    with pytest.raises(FileNotFoundError):
        map_segment(name, SIZE)
    mapped.close()


def test_nobody_can_cut_it_while_it_is_read() -> None:
    """Reading behind the end of a mapped file would kill the reader by SIGBUS."""
    made = Segment(SIZE)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.truncate(made.name, size)
    file = os.open(made.name, os.O_RDWR)
    with pytest.raises(PermissionError):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(file)
    made.close()


@pytest.mark.parametrize(
    "name",
    ["", "../etc/passwd", "/proc/self/fd/3", "/proc/1/mem", "/proc/1/fd/3/x", "/proc/1/fd/x", "1/fd/3"],
)
def test_names_that_are_not_ours(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        map_segment(name, SIZE)


def test_what_is_not_as_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Segment(SIZE)
    for size in (SIZE - 1, SIZE + 1):
        with pytest.raises(ValueError, match="another size"):
            map_segment(made.name, size)
    for size in (0, NONCE_BYTES, LARGEST + 1):
        with pytest.raises(ValueError, match="is refused"):
            map_segment(made.name, size)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="of this user"):
        map_segment(made.name, SIZE)
    made.close()


def test_files_that_are_not_sealed(tmp_path: Path) -> None:
    """Whatever a process of this user has open: a file on a disk, one in memory, a pipe."""
    with (tmp_path / "plain").open("w+b") as plain, open(os.memfd_create("unsealed"), "w+b") as unsealed:
        for file in (plain, unsealed):
            file.truncate(SIZE)
            with pytest.raises((OSError, ValueError)):
                map_segment(f"/proc/{os.getpid()}/fd/{file.fileno()}", SIZE)
    reading, writing = os.pipe()
    with pytest.raises(ValueError, match="plain file"):
        map_segment(f"/proc/{os.getpid()}/fd/{reading}", SIZE)
    os.close(reading)
    os.close(writing)


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Segment(SIZE)
    assert SharedPayload.offered(SIZE) is None
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_system_without_such_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert SharedPayload.offered(SIZE) is None
