"""Memory for large messages stays with the process."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory(nbytes: int = 256 << 20) -> None:
    """Lets malloc keep up to about `nbytes` that are free, in this process, from now on.

    By itself glibc gives the memory of each KV frame back to the system and takes it anew for the next, page
    by page: with frames of megabytes that was more than half of a sender's CPU time. No effect with another
    libc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, nbytes)
