"""Large messages do not cost a page fault per page each time."""

import subprocess
import sys

_FAULTS = """
import resource
from kvtransfer.frames import keep_freed_memory
{call}
def use():
    for _ in range(8):
        frames = [bytearray(3 << 20) for _ in range(4)]
        for frame in frames:
            frame[::4096] = frame[::4096]
        del frame, frames
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> int:
    ended = subprocess.run([sys.executable, "-c", _FAULTS.format(call=call)], capture_output=True, check=True)
    return int(ended.stdout)


def test_freed_memory_is_used_again() -> None:
    pages = 8 * 4 * (3 << 20) // 4096
    assert faults("") > pages / 4
    assert faults("keep_freed_memory()") < pages / 100
