"""Mapped files read as one, give their memory back, and are read again where they are needed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sdrt
from sdrt.runners import mapped_files
from sdrt.runners.mapped_files import GRANULARITY, MappedFiles, joined_offsets

SIZES = [(10,), (GRANULARITY, 1), (100_001, 70_000, 5), (3, 0, 4), (0,), ()]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="files are read, not mapped, where this is not Linux")


def written(folder, sizes):
    random = np.random.default_rng(0)
    files = [folder / f"{index}.bin" for index in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(random.bytes(size))
    return files


def joined(files):
    whole = bytearray()
    for file in files:
        whole += bytes(-len(whole) % GRANULARITY) + file.read_bytes()
    return bytes(whole)


def resident_bytes(path: Path) -> int:
    """How much of a file's mappings is in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("system", [sys.platform, "win32"])
def test_they_read_as_one(sizes, system, tmp_path, monkeypatch):
    files = written(tmp_path, sizes)
    with monkeypatch.context() as patch:
        patch.setattr(mapped_files.sys, "platform", system)
        mapped = MappedFiles(files)
    assert mapped.array.tobytes() == joined(files)
    mapped.give_back()
    *offsets, end = joined_offsets(sizes)
    assert end == len(mapped.array)
    for file, offset in zip(files, offsets, strict=True):
        assert offset % GRANULARITY == 0
        content = file.read_bytes()
        assert mapped.array[offset : offset + len(content)].tobytes() == content


@on_linux
def test_the_memory_is_given_back_and_the_content_stays(tmp_path):
    files = written(tmp_path, (300_000, 200_000))
    mapped = MappedFiles(files)
    before = mapped.array.tobytes()
    assert all(resident_bytes(file) >= file.stat().st_size for file in files)
    mapped.give_back()
    assert [resident_bytes(file) for file in files] == [0, 0]
    assert mapped.array.tobytes() == before


@on_linux
def test_it_is_given_back_while_a_reader_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_files, "_SECONDS_BETWEEN_RETURNS", 0.001)
    (file,) = written(tmp_path, (4 * 2**20,))
    mapped, content, seen = MappedFiles([file]), file.read_bytes(), []
    with mapped.given_back():
        while 0 not in seen and len(seen) < 10_000:
            assert mapped.array.tobytes() == content
            seen.append(resident_bytes(file))
    assert 0 in seen
    assert resident_bytes(file) == 0


@on_linux
def test_the_mappings_end_with_the_array(tmp_path):
    files = written(tmp_path, (100_000, 100_000))
    mapped = MappedFiles(files)
    kept = mapped.array[:10]
    del mapped
    assert kept.tobytes() == files[0].read_bytes()[:10]
    del kept
    maps = Path("/proc/self/maps").read_text()
    assert not any(str(file.resolve()) in maps for file in files)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.bin"):
        MappedFiles([*written(tmp_path, (10,)), tmp_path / "gone.bin"])


@on_linux
def test_an_opened_bundle_keeps_little_of_its_weights_mapped_and_draws_the_same(tiny_bundle):
    options = {"num_inference_steps": 2, "seed": 1, "height": 64, "width": 64}
    with sdrt.open(tiny_bundle) as pipeline:
        weights = tiny_bundle / "engines" / "step" / "model.bin"
        assert resident_bytes(weights) < weights.stat().st_size / 4
        first = pipeline.generate("red", **options).images[0].tobytes()
        assert pipeline.generate("red", **options).images[0].tobytes() == first
    assert str(weights.resolve()) not in Path("/proc/self/maps").read_text()


CLOSED_WHILE_IT_RUNS = """
import sys, threading, time
import numpy as np
from sdrt.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.runners import open_runner

for delay in (0.0, 0.001, 0.002, 0.005, 0.01, 0.02):
    runner = open_runner(Bundle.open(sys.argv[1]), threads=1)
    running = threading.Event()

    def infer():
        try:
            while True:
                running.set()
                runner.run("text_encoder", {"input_ids": np.ones((2000, 77), np.int64)})
        except BackendError as error:
            assert "is closed" in error.message

    thread = threading.Thread(target=infer)
    thread.start()
    running.wait()
    time.sleep(delay)
    runner.close()
    thread.join()
"""


def test_a_runner_may_be_closed_while_another_thread_is_in_an_engine(tiny_bundle):
    command = [sys.executable, "-c", CLOSED_WHILE_IT_RUNS, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
