"""Memory in huge pages, where Linux gives them: what every step reads from end to end is read faster so."""

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE = 2 << 20
_CHUNK = 32 << 20
_LINE = 64


class HugePages:
    """Room for tensors that stay, side by side; pages that nothing lies in cost nothing."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor that begins a line of memory; nothing is touched yet."""
        size = dtype.itemsize * torch.Size(shape).numel()
        room = -(-size // _LINE) * _LINE
        if room > len(self._left):
            self._left = _mapped(max(room, _CHUNK))
        place, self._left = self._left[:size], self._left[room:]
        return place.view(dtype).view(shape)

    def copied(self, tensor: Tensor) -> Tensor:
        return self.zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def give_back_freed() -> None:
    """Gives memory that is free in malloc's hands back to the system: what loading leaves behind, some
    hundred MB that are not needed again. No effect with another libc than glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)


def _mapped(size: int) -> Tensor:
    """uint8 [size], zeros, which begin a huge page; the mapping lives as long as any tensor in it."""
    mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not Linux, or built without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size]
