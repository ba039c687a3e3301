"""Files mapped one after the other, so that they read as one: an engine's weights where they lie in several files."""

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

GRANULARITY = 65_536  # bytes: each file begins at a multiple of this, which pages of any system divide
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


def joined_offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where files of these sizes begin, in bytes, and where the last one ends."""
    offsets = [0]
    for size in sizes[:-1]:
        offsets.append(-(-(offsets[-1] + size) // GRANULARITY) * GRANULARITY)
    return (*offsets, offsets[-1] + sizes[-1])


def join_files(files: Sequence[Path]) -> npt.NDArray[np.uint8]:
    """The files' bytes at their `joined_offsets`, zeros between them.

    On Linux they are mapped: their memory is that of the files, which `release_mapped` gives back. Elsewhere they are
    read. Not to be written to, whatever the array says: OpenVINO takes none that says so. Raises OSError.
    """
    sizes = [file.stat().st_size for file in files]
    *offsets, end = joined_offsets(sizes)
    if sys.platform != "linux":
        return _read(files, sizes, offsets, end)
    reserved = np.frombuffer(mmap.mmap(-1, end, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    place = ctypes.CDLL(None, use_errno=True).mmap
    place.restype = ctypes.c_void_p
    place.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    for file, size, offset in zip(files, sizes, offsets, strict=True):
        if size == 0:
            continue
        handle = os.open(file, os.O_RDONLY)
        try:
            address = place(
                reserved.ctypes.data + offset, size, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, handle, 0
            )
        finally:
            os.close(handle)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), os.fspath(file))
    return reserved


def _read(files: Sequence[Path], sizes: Sequence[int], offsets: Sequence[int], end: int) -> npt.NDArray[np.uint8]:
    whole = np.zeros(end, np.uint8)
    for file, size, offset in zip(files, sizes, offsets, strict=True):
        whole[offset : offset + size] = np.fromfile(file, np.uint8, count=size)
    return whole
