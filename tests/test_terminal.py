"""What long commands say of their progress where nobody looks at a terminal."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from sdrt.cli import run_command
from sdrt.cli.terminal import progress_bar

LINE = re.compile(r" *\d+ s  (.+)")


def phases(text):
    """The stages that lines of progress name; each line is one."""
    return [LINE.fullmatch(line)[1] for line in text.splitlines()]


@pytest.fixture
def stage(monkeypatch):
    """Stand in for the stage that a command starts: it reports two phases, makes something, and returns a result."""

    def install(command, result, make=lambda arguments: None):
        def run(module, arguments, progress):
            for done in range(3):
                progress("engines", done, 2)
            progress("parity", 0, 1)
            make(arguments)
            progress("done", 1, 1)
            return result

        monkeypatch.setattr(f"sdrt.cli.{command}.run_stage", run)

    return install


def test_each_phase_is_one_line_when_it_begins(capsys):
    with progress_bar(phases=True) as progress:
        for done in range(3):
            progress("engines", done, 2)
        assert phases(capsys.readouterr().err) == ["engines"]
        progress("whole\nimage", 0, 1)
        progress("whole\nimage", 1, 1)
        progress("sealed", 1, 1)
        assert phases(capsys.readouterr().err) == ["whole image"]


def test_build_says_its_phases_and_json_stays_alone_on_stdout(stage, tiny_export, tiny_bundle, tmp_path, capsys):
    out = tmp_path / "a.sdrt"
    stage("build", {}, lambda arguments: shutil.copytree(tiny_bundle, out))
    assert run_command(["build", str(tiny_export), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert phases(captured.err) == ["engines", "parity"]
    assert json.loads(captured.out)["bundle"] == str(out)


def test_bench_says_its_phases_and_json_stays_alone_on_stdout(stage, tiny_bundle, tmp_path, capsys):
    stage("bench", {"table": "", "report": "r.html", "valid": True})
    assert run_command(["bench", str(tiny_bundle), "--out", str(tmp_path / "r"), "--json"]) == 0
    captured = capsys.readouterr()
    assert phases(captured.err) == ["engines", "parity"]
    assert json.loads(captured.out)["report"] == "r.html"


def test_quick_commands_say_nothing_of_their_progress(capsys):
    with progress_bar() as progress:
        progress("drawing", 0, 1)
    assert capsys.readouterr().err == ""


def test_work_goes_on_and_ends_well_when_the_reader_of_its_progress_has_gone():
    program = """
from sdrt.cli.terminal import print_warning, progress_bar

with progress_bar(phases=True) as progress:
    progress("engines", 0, 1)
    progress("parity", 0, 1)
print_warning("something")
print("sealed")
"""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writing, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stdout) == (0, "sealed\n")
