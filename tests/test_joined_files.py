"""Files that read as one: each at its place, whatever its size, and given back like any other mapping."""

import sys

import numpy as np
import pytest

from sdrt.runners import joined_files
from sdrt.runners.joined_files import GRANULARITY, join_files, joined_offsets
from sdrt.runners.mapped_files import release_mapped

SIZES = [(10,), (GRANULARITY, 1), (100_001, 70_000, 5), (3, 0, 4)]


def written(folder, sizes):
    random = np.random.default_rng(0)
    files = [folder / f"{index}.bin" for index in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(random.bytes(size))
    return files


def expected(files):
    whole = bytearray()
    for file in files:
        whole += bytes(-len(whole) % GRANULARITY) + file.read_bytes()
    return bytes(whole)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("system", [sys.platform, "win32"])
def test_they_read_as_one(sizes, system, tmp_path, monkeypatch):
    monkeypatch.setattr(joined_files.sys, "platform", system)
    files = written(tmp_path, sizes)
    joined = join_files(files)
    monkeypatch.undo()
    assert joined.tobytes() == expected(files)
    *offsets, end = joined_offsets(sizes)
    assert end == len(joined)
    for file, offset in zip(files, offsets, strict=True):
        assert offset % GRANULARITY == 0
        content = file.read_bytes()
        assert joined[offset : offset + len(content)].tobytes() == content


@pytest.mark.skipif(sys.platform != "linux", reason="files are read, not mapped, where this is not Linux")
def test_their_memory_is_given_back_and_comes_from_the_files_again(tmp_path):
    files = written(tmp_path, (300_000, 200_000))
    joined = join_files(files)
    before = joined.tobytes()
    assert [release_mapped(file) >= file.stat().st_size for file in files] == [True, True]
    assert joined.tobytes() == before


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.bin"):
        join_files([*written(tmp_path, (10,)), tmp_path / "gone.bin"])
