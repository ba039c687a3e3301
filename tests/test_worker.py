"""Stages as children: results, progress, warnings, errors and deaths cross the pipe as they should."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest

from sdrt import errors
from sdrt.worker import run_child

STAGE = """
import sys
from sdrt.worker import serve

def main(progress):
{body}

sys.exit(serve(main))
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A function that makes a stage module of a body, and returns its name."""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path.rstrip(os.pathsep))

    def make(body: str, name: str = "a_stage") -> str:
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / f"{name}.py").write_text(STAGE.format(body=lines))
        return name

    return make


def test_the_result_comes_back(stage):
    assert run_child(stage("return {'arguments': sys.argv[1:]}"), ["a b", "é"]) == {"arguments": ["a b", "é"]}


def test_progress_is_reported_in_order(stage):
    seen = []
    run_child(stage("progress('s', 0, 2)\nprogress('s', 2, 2)"), [], lambda *report: seen.append(report))
    assert seen == [("s", 0, 2), ("s", 2, 2)]


def test_prints_of_libraries_do_not_break_the_protocol(stage):
    body = "import os\nprint('{not json')\nos.write(1, b'nor this\\n')\nreturn 1"
    assert run_child(stage(body), []) == 1


def test_a_user_warning_becomes_a_warning_here_and_others_do_not(stage):
    body = "import warnings\nwarnings.warn('look')\nwarnings.warn('old', DeprecationWarning)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_child(stage(body), [])
    assert [str(warning.message) for warning in caught] == ["look"]


@pytest.mark.parametrize("kind", ["CheckpointError", "ParityError", "RequestError"])
def test_an_error_is_raised_again_with_its_kind_message_and_hint(stage, kind):
    body = f"from sdrt import errors\nraise errors.{kind}('what', hint='do')"
    with pytest.raises(getattr(errors, kind), match="what") as caught:
        run_child(stage(body), [])
    assert caught.value.hint == "do"


def test_a_missing_package_is_told_with_what_installs_it(stage):
    with pytest.raises(errors.BuildError, match="no_such_package") as caught:
        run_child(stage("import no_such_package"), [], hint_if_absent="pip install it")
    assert caught.value.hint == "pip install it"


def test_an_unexpected_exception_is_an_error_with_its_last_line(stage):
    with pytest.raises(errors.BuildError, match="ValueError: surprise"):
        run_child(stage("raise ValueError('surprise')"), [])


def test_a_killed_child_is_told_as_such(stage):
    with pytest.raises(errors.BuildError, match="was killed") as caught:
        run_child(stage("import os\nos.kill(os.getpid(), 9)"), [])
    assert "memory" in caught.value.hint


def test_a_module_that_is_not_there_is_an_error():
    with pytest.raises(errors.BuildError):
        run_child("sdrt_has_no_such_stage", [])


def test_the_log_keeps_standard_error(stage, tmp_path):
    log = tmp_path / "log.txt"
    run_child(stage("print('for the log')"), [], log=log)
    assert "for the log" in log.read_text()


def test_ctrl_c_stops_the_child_and_lets_it_clean_up(stage, tmp_path):
    left = tmp_path / "left.txt"
    body = (
        f"import os, time\nfrom pathlib import Path\nleft = Path({str(left)!r})\n"
        "try:\n    left.write_text(str(os.getpid()))\n    progress('working', 0, 1)\n    time.sleep(60)\n"
        "finally:\n    left.unlink()"
    )
    began, pids = time.monotonic(), []

    def interrupt(*_):
        pids.append(int(left.read_text()))
        raise KeyboardInterrupt

    with pytest.raises(errors.Cancelled):
        run_child(stage(body), [], interrupt)
    assert not left.exists()
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], signal.SIG_DFL)


def test_a_child_that_does_not_end_when_it_is_stopped_is_killed(stage, tmp_path):
    mark = tmp_path / "pid"
    body = (
        "import os, signal, time\nfrom pathlib import Path\n"
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nPath({str(mark)!r}).write_text(str(os.getpid()))\n"
        "progress('working', 0, 1)\ntime.sleep(600)"
    )

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(errors.Cancelled):
        run_child(stage(body), [], interrupt, grace_seconds=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), signal.SIG_DFL)


def test_the_interpreter_is_the_same(stage):
    assert Path(str(run_child(stage("return sys.executable"), []))) == Path(sys.executable)
