"""Who may write where in a segment: places are taken in a ring and come free in the order they were taken."""

from collections import deque

_ALIGN = 64  # bytes: a tensor library may read any place as any number type


class Ring:
    """Places in bytes first .. end; pure arithmetic."""

    def __init__(self, first: int, end: int) -> None:
        self._first = -(-first // _ALIGN) * _ALIGN
        self._end = end
        self._next = self._first
        self._taken: deque[int] = deque()  # offsets, oldest first

    @property
    def largest(self) -> int:
        """What fits at most, when nothing is taken."""
        return max(0, self._end - self._first)

    def take(self, size: int) -> int | None:
        """The offset of `size` free bytes, None if there are none now."""
        if not self._taken:
            self._next = self._first  # the same few pages again: they are warm
        oldest = self._taken[0] if self._taken else None
        if oldest is None or self._next > oldest:
            if self._next + size <= self._end:
                return self._take(self._next, size)
            if oldest is None or self._first + size > oldest:
                return None
            return self._take(self._first, size)
        return self._take(self._next, size) if self._next + size <= oldest else None

    def free_oldest(self, count: int) -> None:
        """Raises ValueError for more than are taken."""
        if count > len(self._taken):
            raise ValueError(f"{count} places come free, {len(self._taken)} are taken")
        for _ in range(count):
            self._taken.popleft()

    def _take(self, offset: int, size: int) -> int:
        self._taken.append(offset)
        self._next = -(-(offset + size) // _ALIGN) * _ALIGN
        return offset
