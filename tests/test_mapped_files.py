"""Mapped files give their memory back and are read again where they are needed."""

import mmap
import os
import re
import sys
from pathlib import Path

import pytest

import sdrt
from sdrt.runners.mapped_files import release_mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what of a mapping is in memory")

PAGES = 64


def resident_bytes(path: Path) -> int:
    """How much of a file's mappings is in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_the_memory_is_given_back_and_the_content_stays(tmp_path):
    path = tmp_path / "some weights.bin"
    content = os.urandom(PAGES * mmap.PAGESIZE)
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == content
        assert resident_bytes(path) == len(content)
        assert release_mapped(path) == len(content)
        assert resident_bytes(path) == 0
        assert mapped[:] == content


def test_what_is_written_to_is_left_alone(tmp_path):
    path = tmp_path / "scratch.bin"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:4] = b"mine"
        assert release_mapped(path) == 0
        assert mapped[:4] == b"mine"


def test_a_file_that_is_not_mapped_is_nothing_to_give_back(tmp_path):
    assert release_mapped(tmp_path / "absent.bin") == 0


def test_an_opened_bundle_keeps_little_of_its_weights_mapped_and_draws_the_same(tiny_bundle):
    options = {"num_inference_steps": 2, "seed": 1, "height": 64, "width": 64}
    with sdrt.open(tiny_bundle) as pipeline:
        weights = tiny_bundle / "engines" / "step" / "model.bin"
        assert resident_bytes(weights) < weights.stat().st_size / 4
        first = pipeline.generate("red", **options).images[0].tobytes()
        release_mapped(weights)
        assert pipeline.generate("red", **options).images[0].tobytes() == first
