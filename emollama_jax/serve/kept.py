"""What was computed once and may be asked for again, within a bound of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by key; the one that was not asked for for longest goes first. For one thread.

    Attributes:
        hits: values that were there when asked for.
        misses: values that had to be made.
        nbytes: bytes that are held.
    """

    def __init__(self, largest: int, *, size: Callable[[Value], int]):
        """Holds nothing yet.

        Args:
            largest: bytes to hold at most; a larger value is not kept at all.
            size: bytes of a value.
        """
        self._largest, self._size = largest, size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.hits = self.misses = self.nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """A value, and counts whether there was one."""
        if key not in self._values:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: Hashable, value: Value) -> Value:
        """Keeps a value that is not there yet; returns it."""
        if self._size(value) > self._largest:
            return value
        self._values[key] = value
        self.nbytes += self._size(value)
        while self.nbytes > self._largest:
            _, oldest = self._values.popitem(last=False)
            self.nbytes -= self._size(oldest)
        return value
