"""Memory that is taken, given back and taken again: allocating and freeing make a GPU wait."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sdrt.errors import BackendError

SMALLEST = 2**12

Block = TypeVar("Block")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease(Generic[Block]):
    """A block that is in use. size: of the block, which is at least what was asked for."""

    block: Block
    size: int


class Pool(Generic[Block]):
    """Blocks of powers of two. Not thread-safe. make, release: what allocates and frees one."""

    def __init__(self, make: Callable[[int], Block], release: Callable[[Block], None]) -> None:
        self._make = make
        self._release = release
        self._free: list[Lease[Block]] = []

    def take(self, size: int) -> Lease[Block]:
        """A block of at least this size. Raises what `make` raises, when giving up the unused blocks does not help."""
        wanted = max(SMALLEST, 1 << (size - 1).bit_length())
        for lease in self._free:
            if lease.size == wanted:
                self._free.remove(lease)
                return lease
        try:
            return Lease(block=self._make(wanted), size=wanted)
        except BackendError:
            if not self._free:
                raise
            self.clear()
            return Lease(block=self._make(wanted), size=wanted)

    def give(self, lease: Lease[Block]) -> None:
        """Give a block back. Work that uses it may still be queued, if what takes it next is queued behind."""
        self._free.append(lease)

    def clear(self) -> None:
        """Release the unused blocks. No work may be queued that uses them."""
        while self._free:
            self._release(self._free.pop().block)
