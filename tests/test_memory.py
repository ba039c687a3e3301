"""Memory is asked for before a build begins."""

import pytest

from sdrt.engines.memory import check_memory
from sdrt.errors import BuildError

GIGABYTE = 10**9


def meminfo(folder, gibibytes):
    path = folder / "meminfo"
    path.write_text(f"MemTotal: 33554432 kB\nMemAvailable: {int(gibibytes * 2**20)} kB\n")
    return path


def test_a_build_that_does_not_fit_is_refused_with_both_figures(tmp_path):
    with pytest.raises(BuildError, match=r"building step takes about 6.1 GiB of memory; 6.0 are free"):
        check_memory("building step", int(1.72 * GIGABYTE), meminfo=meminfo(tmp_path, 6))


def test_a_build_that_fits_is_not_refused(tmp_path):
    check_memory("building step", int(1.72 * GIGABYTE), meminfo=meminfo(tmp_path, 6.2))


def test_where_the_system_does_not_tell_nothing_is_refused(tmp_path):
    check_memory("building step", 10**15, meminfo=tmp_path / "absent")
