"""Memory of a device that is taken and given back."""

import pytest

from sdrt.errors import BackendError
from sdrt.runners.device_pool import SMALLEST, Pool


class Memory:
    def __init__(self, limit=10**9):
        self.limit = limit
        self.blocks = {}

    def make(self, size):
        if sum(self.blocks.values()) + size > self.limit:
            raise BackendError("no memory", hint="none")
        self.blocks[len(self.blocks) + 1] = size
        return len(self.blocks)

    def pool(self):
        return Pool(self.make, self.blocks.pop)


@pytest.mark.parametrize(("asked", "given"), [(1, SMALLEST), (SMALLEST, SMALLEST), (SMALLEST + 1, 2 * SMALLEST)])
def test_blocks_are_powers_of_two(asked, given):
    memory = Memory()
    assert memory.pool().take(asked).size == given
    assert list(memory.blocks.values()) == [given]


def test_what_was_given_back_is_taken_again():
    memory = Memory()
    pool = memory.pool()
    first, second = pool.take(5000), pool.take(5000)
    pool.give(first)
    assert pool.take(6000) is first
    assert pool.take(6000) not in (first, second)
    assert len(memory.blocks) == 3


def test_a_block_of_another_size_is_not():
    memory = Memory()
    pool = memory.pool()
    pool.give(pool.take(10**6))
    pool.take(10)
    assert len(memory.blocks) == 2


def test_unused_blocks_are_given_up_when_memory_is_short():
    memory = Memory(limit=2**20)
    pool = memory.pool()
    pool.give(pool.take(2**19))
    pool.take(2**20)
    assert list(memory.blocks.values()) == [2**20]
    with pytest.raises(BackendError, match="no memory"):
        pool.take(1)


def test_clearing_releases_what_is_unused_alone():
    memory = Memory()
    pool = memory.pool()
    kept = pool.take(1)
    pool.give(pool.take(2**20))
    pool.clear()
    assert list(memory.blocks) == [kept.block]
