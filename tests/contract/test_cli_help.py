"""The command line's promises: its commands, their common options, fast help, and what the README shows of it."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from sdrt.cli import app, run_command
from sdrt.plan import SCHEDULERS

ROOT = Path(__file__).parents[2]
SDRT = str(Path(sys.executable).with_name("sdrt"))
COMMANDS = ("build", "run", "bench", "inspect", "verify", "encode", "decode", "demo", "doctor", "schedulers")
ALIASES = {
    "run": ("--steps", "--num-inference-steps", "--guidance-scale", "--cfg-scale", "--size", "--width", "--height"),
    "build": ("--backend", "--precision", "--sizes", "--batch", "--threads", "--jobs", "--force", "--out"),
    "bench": ("--baseline", "--suite", "--rounds", "--warmup", "--contestants", "--force", "--out"),
    "demo": ("--bundle", "--out", "--force"),
}


def help_of(capsys, *command) -> str:
    assert run_command([*command, "--help"]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")


def test_the_commands_are_these(capsys):
    text = help_of(capsys)
    listed = re.findall(r"^  ([a-z]+) +[A-Z]", text, re.MULTILINE)
    assert tuple(listed) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_json_and_explains_each_option(command, capsys):
    text = help_of(capsys, command)
    assert "--json" in text
    assert all(name in text for name in ALIASES.get(command, ()))


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_nothing_is_cut_off_in_a_narrow_terminal(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(capsys, *command.split())
    assert max(map(len, text.splitlines())) <= columns
    shown = typer.main.get_command(app)
    for parameter in (shown.commands[command] if command else shown).params:
        assert all(re.search(rf"{name}(?![\w-])", text) for name in parameter.opts if name.startswith("--"))
    assert re.findall(r"\w\.\.\.$", text, re.MULTILINE) == []


def test_the_size_says_whose_it_is_where_none_is_given(capsys):
    text = " ".join(help_of(capsys, "run").split())
    assert "--size WxH In pixels; an --image is scaled to it. Default: the picture's, or else the model's own." in text


def test_every_scheduler_is_listed(capsys):
    assert run_command(["schedulers"]) == 0
    shown = capsys.readouterr().out
    assert run_command(["schedulers", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert tuple(listed["names"]) == SCHEDULERS
    for each in listed["schedulers"]:
        assert re.search(rf"^  {each['name']} +{each['class']}\b", shown, re.MULTILINE)
        assert {each["name"], *(f"{each['name']}_{spacing}" for spacing in each["spacings"])} <= set(SCHEDULERS)


def test_help_loads_nothing_heavy():
    heavy = ("numpy", "PIL", "torch", "openvino", "onnxruntime", "onnx", "msgspec", "tokenizers")
    code = (
        "import sys\nfrom sdrt.cli import run_command\nrun_command(['--help'])\n"
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_help_is_quick():
    def cpu_seconds() -> float:
        began = time.perf_counter()
        subprocess.run([SDRT, "--help"], capture_output=True, check=True)
        return time.perf_counter() - began

    assert min(cpu_seconds() for _ in range(8)) <= 0.5


def test_the_version_is_shown(capsys):
    from sdrt import __version__

    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"sdrt {__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert run_command([]) == 0
    assert "Usage" in capsys.readouterr().out


def readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("sdrt ")]


@pytest.mark.parametrize("words", readme_commands(), ids=lambda words: " ".join(words[:2]))
def test_the_readme_uses_options_that_exist(words, capsys):
    text = help_of(capsys, words[1])
    assert [word for word in words[2:] if word.startswith("--") and word not in text] == []
