"""Segments and rings: no two frames overlap, nothing foreign is mapped, nothing is left behind."""

import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import memory
from kvtransfer.memory import NONCE_BYTES, Ring, Segment, map_segment, remove_orphans

SIZE = 1 << 16


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "FOLDER", tmp_path)
    return tmp_path


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


def test_both_see_the_same_memory(folder: Path) -> None:
    made = Segment(SIZE)
    mapped = map_segment(made.name, SIZE)
    assert mapped[:NONCE_BYTES] == made.nonce
    made.unlink()
    made.unlink()
    assert not list(folder.iterdir())
    made.memory[100:103] = b"abc"
    assert mapped[100:103] == b"abc"
    made.close()
    mapped.close()


@pytest.mark.parametrize(
    "name", ["", "../etc/passwd", "prad-kv-" + "0" * 31, "prad-kv-" + "0" * 32 + "/x", "prad-kv-" + "G" * 32]
)
def test_names_that_are_not_ours(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        map_segment(name, SIZE)


def test_what_is_not_as_offered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Segment(SIZE)
    for size in (SIZE - 1, SIZE + 1):
        with pytest.raises(ValueError, match="another size"):
            map_segment(made.name, size)
    for size in (0, NONCE_BYTES, memory.LARGEST + 1):
        with pytest.raises(ValueError, match="is refused"):
            map_segment(made.name, size)
    (folder / made.name).rename(folder / "elsewhere")
    (folder / made.name).symlink_to(folder / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        map_segment(made.name, SIZE)
    (folder / made.name).unlink()
    with pytest.raises(FileNotFoundError):
        map_segment(made.name, SIZE)
    (folder / "elsewhere").rename(folder / made.name)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="of this user"):
        map_segment(made.name, SIZE)
    made.close()


def test_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Segment(SIZE)
    assert not list(folder.iterdir())


def test_what_a_killed_process_leaves_is_removed(folder: Path) -> None:
    code = (
        "import sys, time, pathlib; from kvtransfer import memory; "
        "memory.FOLDER = pathlib.Path(sys.argv[1]); kept = memory.Segment(1 << 16); "
        "print(kept.name, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        remove_orphans()
        assert (folder / name).exists(), "its maker lives"
        process.send_signal(signal.SIGKILL)
    assert (folder / name).exists()
    made = Segment(SIZE)
    assert [path.name for path in folder.iterdir()] == [made.name]
    made.close()
