"""Files mapped one after the other, so that they read as one, and whose memory can be given back at any time."""

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

# Bytes: each file begins at a multiple of this, which pages of any system divide. Engines whose weights lie in several
# files hold offsets that count with it: another value is another format of bundles.
GRANULARITY = 65_536
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value
_SECONDS_BETWEEN_RETURNS = 0.1


def joined_offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where files of these sizes begin, in bytes, and where the last one ends."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(-(-end // GRANULARITY) * GRANULARITY)
        end = offsets[-1] + size
    return (*offsets, end)


class MappedFiles:
    """The files' bytes at their `joined_offsets`, zeros between them, as `array` (uint8).

    On Linux they are mapped: what of them is in memory can be given back, and comes from the files again. Elsewhere
    they are read. The array is not to be written to, whatever it says: OpenVINO takes none that says so.
    Whoever reads its memory without a reference to it, as a library does, needs it to be kept. Raises OSError.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._mapped = sys.platform == "linux"
        self.array = _map(files) if self._mapped else _read(files)

    def give_back(self) -> None:
        """Free the memory of what has been read. It stays where a process has locked its memory."""
        if self._mapped:
            advise = ctypes.CDLL(None).madvise
            advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            advise(self.array.ctypes.data, self.array.nbytes, mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def given_back(self) -> Iterator[None]:
        """Free that memory again and again while the block runs, so that a reader never holds the whole of it."""
        ended = threading.Event()

        def return_often() -> None:
            while not ended.wait(_SECONDS_BETWEEN_RETURNS):
                self.give_back()

        thread = threading.Thread(target=return_often, name="sdrt-mapped-files", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.give_back()


def _map(files: Sequence[Path]) -> npt.NDArray[np.uint8]:
    sizes = [file.stat().st_size for file in files]
    *offsets, end = joined_offsets(sizes)
    # The mappings of the files replace parts of this one, whose end, when nothing refers to the array, is theirs.
    array = np.frombuffer(mmap.mmap(-1, max(end, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)[:end]
    place = ctypes.CDLL(None, use_errno=True).mmap
    place.restype = ctypes.c_void_p
    place.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    for file, size, offset in zip(files, sizes, offsets, strict=True):
        if size == 0:
            continue
        with file.open("rb") as opened:
            how = (mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, opened.fileno(), 0)
            if place(array.ctypes.data + offset, size, *how) == _FAILED:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), os.fspath(file))
    return array


def _read(files: Sequence[Path]) -> npt.NDArray[np.uint8]:
    contents = [np.fromfile(file, np.uint8) for file in files]
    *offsets, end = joined_offsets([content.size for content in contents])
    array = np.zeros(end, np.uint8)
    for content, offset in zip(contents, offsets, strict=True):
        array[offset : offset + content.size] = content
    return array
