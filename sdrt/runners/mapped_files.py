"""Mapped files that have been read: their memory given back. What is read again comes from the file again."""

import ctypes
import mmap
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")


def release_mapped(path: Path) -> int:
    """Give back the memory of this process's read-only mappings of a file; returns how many bytes they span.

    A library that compiles weights from a mapped file may keep the mapping, which counts as this process's memory
    though hardly any of it is read again. Where mappings cannot be told (no Linux) nothing happens: 0 is returned.
    """
    if sys.platform != "linux" or not _MAPS.exists():
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    spanned, wanted = 0, str(path.resolve())
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if len(fields) < 6 or fields[5] != wanted or "w" in fields[1]:
            continue
        start, end = (int(number, 16) for number in fields[0].split("-"))
        if advise(start, end - start, mmap.MADV_DONTNEED) == 0:
            spanned += end - start
    return spanned
